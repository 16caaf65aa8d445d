r"""Costs of a fast config in quality: its perplexity, and how often it chooses as another does.

    python benchmarks/quality/compare.py --text FILE --configs configs/smollm2_135m.py \
        configs/smollm2_135m_fast.py

The first config is the yardstick. The text (plain, or the strings of a .jsonl file) is cut into
passages; every token of a passage is predicted from those before it, by the engine that serves.
Then each passage's first tokens are continued greedily.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.serving.report import json_line
from jserve.config import load
from jserve.gateway.validation import SamplingFields
from jserve.offline import LLM


@dataclass(frozen=True)
class Answers:
    """Answers of one config to all passages."""

    logprobs: np.ndarray  # float64 [predicted tokens], of the text's own tokens
    best: np.ndarray  # int [predicted tokens], the most likely one
    continuations: list[tuple[int, ...]]


@dataclass(frozen=True)
class Quality:
    """One config beside the first one."""

    config: str
    perplexity: float
    ratio: float  # perplexity over that of the first config
    same_best: float  # share of positions where both find the same token most likely
    same_greedy: float  # share of greedy tokens before the first that differs


def read_text(path: Path) -> str:
    """A plain text; of a .jsonl file the strings of every line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join("\n".join(_strings(json.loads(line))) for line in text.splitlines() if line)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def ask(config: str, text: str, passages: int, length: int, prompt: int, greedy: int) -> Answers:
    """Runs one config over the text's first passages of `length` tokens."""
    llm = LLM(load(config))
    ids = llm.text.tokenizer.encode(text)
    cut = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][:passages]
    if not cut:
        raise SystemExit(f"the text has {len(ids)} tokens; a passage has {length}")
    scored = llm.generate(cut, SamplingFields(max_tokens=1, temperature=0, prompt_logprobs=1))
    found = [entry for done in scored for entry in done.prompt_logprobs or () if entry]
    continued = llm.generate(
        [passage[:prompt] for passage in cut],
        SamplingFields(max_tokens=greedy, temperature=0, ignore_eos=True),
    )
    return Answers(
        np.array([entry.logprob for entry in found]),
        np.array([entry.top[0][0] for entry in found]),
        [done.token_ids for done in continued],
    )


def judge(config: str, answers: Answers, yardstick: Answers) -> Quality:
    """Compares two configs' answers to the same passages."""
    perplexity = math.exp(-answers.logprobs.mean())
    pairs = list(zip(answers.continuations, yardstick.continuations, strict=True))
    return Quality(
        config,
        perplexity,
        perplexity / math.exp(-yardstick.logprobs.mean()),
        float(np.mean(answers.best == yardstick.best)),
        sum(_equal_prefix(*pair) for pair in pairs) / sum(len(pair[1]) for pair in pairs),
    )


def _equal_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return next(differing, len(a))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--configs", nargs="+", required=True, help="the yardstick first")
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a passage")
    parser.add_argument("--prompt", type=int, default=64, help="tokens that are continued")
    parser.add_argument("--greedy", type=int, default=64, help="tokens of a continuation")
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"--text: there is no file {options.text}")
    text = read_text(options.text)
    sizes = (options.passages, options.length, options.prompt, options.greedy)
    answers = [ask(config, text, *sizes) for config in options.configs]
    found = [
        judge(config, mine, answers[0])
        for config, mine in zip(options.configs, answers, strict=True)
    ]
    print(f"{'config':40}{'perplexity':>12}{'ratio':>9}{'same best':>11}{'same greedy':>13}")
    for one in found:
        print(
            f"{one.config:40}{one.perplexity:12.3f}{one.ratio:9.4f}"
            f"{one.same_best:11.1%}{one.same_greedy:13.1%}"
        )
    settings = {"text": options.text.name, "predicted_tokens": len(answers[0].logprobs)}
    print(json_line("quality", settings, configs=[asdict(one) for one in found]))


if __name__ == "__main__":
    main()
