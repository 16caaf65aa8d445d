"""Jobs for a server: prompts and answers of given lengths, by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.serving.arrivals import arrivals
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.traces import TraceRow

# One token each, with the space before it, in the vocabularies of GPT-2, Llama, Qwen, Gemma and
# SmolLM: a text of n words has n tokens there, and one more where the server adds a first one.
_WORDS = (
    "the of and to in is that for it was on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know"
).split()

_SHARED = 1 << 21  # sets the seed of what prompts share apart from the seeds of prompts


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send. `at_s` is its arrival from the start of the load.

    Prompts of one run begin with the same `shared_tokens` tokens, and share no more than that.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    seed: tuple[int, ...]  # seed of the prompt; its first number is that of the run
    shared_tokens: int = 0

    def token_ids(self, first: int, last: int) -> list[int]:
        """A prompt of random ids in [first, last]."""
        return self._draw(first, last + 1)

    def text(self) -> str:
        """A prompt of random words, each one token in common vocabularies."""
        return " ".join(_WORDS[i] for i in self._draw(0, len(_WORDS)))

    def _draw(self, low: int, high: int) -> list[int]:
        shared = min(self.shared_tokens, self.prompt_tokens - 1)
        of_run = np.random.default_rng((self.seed[0], _SHARED))
        own = np.random.default_rng(self.seed)
        return [
            *of_run.integers(low, high, shared).tolist(),
            *own.integers(low, high, self.prompt_tokens - shared).tolist(),
        ]


def open_loop(
    rate: float, cv: float, count: int, prompt_tokens: int, output_tokens: int, seed: Sequence[int]
) -> list[Job]:
    """`count` jobs of equal lengths that arrive whatever the server does."""
    rng = np.random.default_rng([*seed, 1])
    return [
        Job(float(at_s), prompt_tokens, output_tokens, (*seed, 2, i))
        for i, at_s in enumerate(arrivals(rate, cv, count, rng))
    ]


def of_trace(rows: Sequence[TraceRow], seed: Sequence[int]) -> list[Job]:
    """One job per row, at its time and with its lengths."""
    return [
        Job(row.at_s, row.prompt_tokens, row.output_tokens, (*seed, 2, i))
        for i, row in enumerate(rows)
    ]


def clip(jobs: Sequence[Job], max_tokens: int | None) -> list[Job]:
    """Shortens jobs to at most `max_tokens`: the prompt first, of which one token is kept."""
    if max_tokens is None:
        return list(jobs)
    if max_tokens < 2:
        raise BenchmarkError(f"--clip_tokens is {max_tokens}; it must be at least 2")
    clipped: list[Job] = []
    for job in jobs:
        output = min(job.output_tokens, max_tokens - 1)
        prompt = min(job.prompt_tokens, max_tokens - output)
        clipped.append(replace(job, prompt_tokens=prompt, output_tokens=output))
    return clipped


def check_fits(jobs: Sequence[Job], max_model_len: int | None) -> None:
    """Raises BenchmarkError when a job is longer than the server's context (None: not known)."""
    if max_model_len is None or not jobs:
        return
    longest = max(jobs, key=lambda job: job.prompt_tokens + job.output_tokens)
    if longest.prompt_tokens + longest.output_tokens > max_model_len:
        raise BenchmarkError(
            f"a request of {longest.prompt_tokens} + {longest.output_tokens} tokens exceeds the "
            f"server's context of {max_model_len}; lower --prompt_tokens and --max_tokens, or of "
            f"a trace raise --length_divisor or set --clip_tokens {max_model_len}"
        )
