"""The prefix cache against none and against one without end: tokens found, and times.

    python -m benchmarks.experiments.radix --gsm8k train.jsonl --mt_bench mt_bench_question.jsonl
    python -m benchmarks.experiments.radix … --config configs/smollm2_135m.py --plot radix.png

Loads: questions after the same eight solved ones (GSM8K), second turns of chats (MT-bench), choices
of one prompt, trees of continuations, agents whose contexts grow by answers and tools' outputs, and
prompts that share nothing. Chats and agents run twice: each to its end, at most eight at a time,
and "apart", where all others take a turn before one goes on. Each runs on the real scheduler and
cache over a simulated device, with words as tokens and made up answers: without a cache, with a
sixteenth and a quarter of the pages that the run would fill without sharing, and with all of them.
With `--config`, a real engine then gives times: to the first token of the questions, and of prompts
that share nothing; with and without the cache in turns.

The data is not part of the project: GSM8K and the questions of MT-bench are published under the MIT
and Apache licences.
"""

import argparse
import contextlib
import json
import random
import re
import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import plots, report
from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.core.request import Request, SamplingParams
from jserve.core.stats import EngineStats
from jserve.core.step import Program, ProgramKind
from jserve.engine.pipeline import Pipeline
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

_VOCAB, _PAGE, _SLOTS, _CONTEXT = 30_000, 16, 8, 8192
_ANSWER = 96  # tokens of each answer
_MODEL = SimulatedModel(vocab=_VOCAB, eos_token_ids=())
_PROGRAMS = (
    Program(ProgramKind.MIXED, 256, _SLOTS),
    Program(ProgramKind.DECODE, _SLOTS, _SLOTS, 8),
)

Tokens = tuple[int, ...]
# Yields prompts of one client, each after the answer to the one before, which is sent to it.
Session = Generator[Tokens, Tokens, None]


def tokens_of(text: str) -> Tokens:
    """Words and signs as ids: equal texts give equal ids, which is all that counts here."""
    return tuple(zlib.crc32(word.encode()) % _VOCAB for word in re.findall(r"\w+|[^\w\s]", text))


def lines_of(path: str) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def solved(rows: Sequence[dict[str, Any]]) -> str:
    """Questions with their solutions, to put before another question."""
    return "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in rows)


# Loads.


def questions(path: str, count: int) -> list[str]:
    """`count` questions, each after the same eight solved ones."""
    rows = lines_of(path)
    shots = solved(rows[:8])
    return [f"{shots}Question: {row['question']}\nAnswer:" for row in rows[8 : 8 + count]]


def few_shot(path: str, count: int) -> list[Session]:
    def session(text: str) -> Session:
        yield tokens_of(text)

    return [session(text) for text in questions(path, count)]


def chats(path: str, count: int) -> list[Session]:
    def session(turns: Sequence[str]) -> Session:
        context = tokens_of("You are a helpful assistant.")
        for turn in turns:
            context += tokens_of(turn)
            context += yield context

    return [session(row["turns"]) for row in lines_of(path)[:count]]


def choices(count: int, rng: random.Random) -> list[Session]:
    """Eight choices of each prompt, which come at once."""

    def session(prompt: Tokens) -> Session:
        yield prompt

    prompts = [tuple(rng.randrange(_VOCAB) for _ in range(300)) for _ in range(count)]
    return [session(prompt) for prompt in prompts for _ in range(8)]


def trees(count: int, rng: random.Random) -> list[Session]:
    """Three branches after one beginning, and three after each of them."""

    def words(length: int) -> Tokens:
        return tuple(rng.randrange(_VOCAB) for _ in range(length))

    def session(root: Tokens, branches: Sequence[Tokens]) -> Session:
        for branch in branches:
            answer = yield root + branch
            for leaf in range(3):
                yield root + branch + answer + (leaf,) * 8

    return [session(words(300), [words(40) for _ in range(3)]) for _ in range(count)]


def agents(count: int, rng: random.Random) -> list[Session]:
    """Eight calls, each with all that came before and what a tool has said."""

    def session(context: Tokens, outputs: Sequence[Tokens]) -> Session:
        for output in outputs:
            context += yield context
            context += output

    def words(low: int, high: int) -> Tokens:
        return tuple(rng.randrange(_VOCAB) for _ in range(rng.randint(low, high)))

    system = words(400, 400)
    return [
        session(system + words(20, 80), [words(40, 300) for _ in range(8)]) for _ in range(count)
    ]


def unshared(count: int, rng: random.Random) -> list[Session]:
    def session(prompt: Tokens) -> Session:
        yield prompt

    return [session(tuple(rng.randrange(_VOCAB) for _ in range(400))) for _ in range(count)]


# On the simulated device.


@dataclass(frozen=True)
class Found:
    """The tokens and pages of one load with one cache."""

    stats: EngineStats
    num_pages_filled: int  # by all requests, if they share nothing
    num_pages_of_longest: int  # of the request that fills most
    seconds: float

    @property
    def share(self) -> float:
        """Prompt tokens that were found, of all."""
        return self.stats.prefix_hit_tokens / max(1, self.stats.prefix_query_tokens)


def simulate(sessions: Sequence[Session], num_pages: int, prefix: bool, apart: bool) -> Found:
    """Runs all sessions to their end, as many at a time as there are slots.

    `apart`: a session goes on only when all others have had a turn.
    """
    cache = KVCache(single_group(_PAGE), num_pages, PrefixSharing() if prefix else None)
    scheduler = Scheduler(
        SchedulerConfig(),
        cache=cache,
        num_slots=_SLOTS,
        max_model_len=_CONTEXT,
        programs=_PROGRAMS,
    )
    executor = SimulatedExecutor(
        _PROGRAMS,
        num_slots=_SLOTS,
        num_pages=num_pages,
        page_size=_PAGE,
        model=_MODEL,
        pages_per_slot=_CONTEXT // _PAGE,
    )
    pipeline = Pipeline(scheduler, executor)
    waiting = deque((session, next(session)) for session in sessions)
    running: dict[str, tuple[Session, list[int]]] = {}
    filled: list[int] = []

    def ask(session: Session, prompt: Tokens) -> None:
        name = str(len(filled))
        filled.append(cache.pages_for(len(prompt) + _ANSWER))
        sampling = SamplingParams(max_tokens=_ANSWER, seed=zlib.crc32(str(prompt).encode()))
        scheduler.add(Request(id=name, prompt=prompt, sampling=sampling), 0.0)
        running[name] = session, []

    started_s = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < _SLOTS:
            ask(*waiting.popleft())
        for update in pipeline.turn(lambda: 0.0) or ():
            session, answer = running[update.request_id]
            answer += update.tokens
            if update.finish is not None:
                del running[update.request_id]
                with contextlib.suppress(StopIteration):
                    prompt = session.send(tuple(answer))
                    (waiting.append if apart else waiting.appendleft)((session, prompt))
    return Found(scheduler.stats(), sum(filled), max(filled), time.perf_counter() - started_s)


def compare(load: Callable[[], list[Session]], apart: bool) -> dict[str, Any]:
    """One row: off, a sixteenth and a quarter of the pages, all of them."""
    most = 1 << 16
    off = simulate(load(), most, False, apart)
    infinite = simulate(load(), most, True, apart)
    least = _SLOTS * (off.num_pages_of_longest + 1)  # or sequences are preempted
    sixteenth, quarter = (
        simulate(load(), max(off.num_pages_filled // part, least), True, apart) for part in (16, 4)
    )
    found = max(1, infinite.stats.prefix_hit_tokens)
    return {
        "prompt_tokens": off.stats.prompt_tokens,
        "pages": off.num_pages_filled,
        "off": off.share,
        "sixteenth": sixteenth.share,
        "quarter": quarter.share,
        "infinite": infinite.share,
        "of_infinite": quarter.stats.prefix_hit_tokens / found,
        "evicted": quarter.stats.prefix_evicted_pages,
        "preemptions": quarter.stats.num_preemptions,
    }


# On a real engine.


def times(config: str, path: str | None, count: int, rng: random.Random) -> dict[str, Any]:
    """Seconds to the first token with and without the cache, in turns."""
    # Imported here: the simulated part needs no JAX.
    from jserve.config import load
    from jserve.gateway.validation import SamplingFields
    from jserve.offline import LLM

    arms = {
        name: LLM(load(config, [f"cache.prefix={prefix}", "engine.num_pages=1024"]))
        for name, prefix in (("off", False), ("on", True))
    }
    first = SamplingFields(max_tokens=1, temperature=0)

    def measure(prompts: Sequence[Any], warm: int) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        cached: dict[str, int] = {}
        for prompt in prompts:
            for name, llm in arms.items():
                started_s = time.perf_counter()
                (done,) = llm.generate([prompt], first, use_tqdm=False)
                seconds[name].append(time.perf_counter() - started_s)
                cached[name] = done.num_cached_tokens
        medians = {name: statistics.median(many[warm:]) for name, many in seconds.items()}
        return {
            "seconds": medians,
            "times_faster": medians["off"] / medians["on"],
            "cached_tokens": cached,
        }

    vocab = arms["off"].info.vocab
    random_prompts = [[rng.randrange(100, vocab) for _ in range(400)] for _ in range(count)]
    found = {"unshared": measure(random_prompts, warm=2)}
    if path is not None:
        found["few-shot"] = measure(questions(path, count), warm=1)
    return found


def draw(path: str, rows: dict[str, dict[str, Any]]) -> None:
    """Writes bars of what each cache finds, by load."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11, 4), layout="constrained")
    for offset, arm in enumerate(("sixteenth", "quarter", "infinite")):
        shares = [100 * row[arm] for row in rows.values()]
        axis.bar([x + 0.27 * offset for x in range(len(rows))], shares, width=0.25, label=arm)
    axis.set_xticks([x + 0.27 for x in range(len(rows))], list(rows))
    axis.set_ylabel("prompt tokens found, %")
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def loads(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[Session]], bool]]:
    """The loads by name, and whether sessions are apart; each call makes the same sessions anew."""
    count, seed = options.sessions, options.seed
    if options.gsm8k:
        yield "few-shot", lambda: few_shot(options.gsm8k, 2 * count), False
    if options.mt_bench:
        yield "chats", lambda: chats(options.mt_bench, count), False
        yield "chats apart", lambda: chats(options.mt_bench, count), True
    yield "choices", lambda: choices(count // 2, random.Random(seed)), False
    yield "trees", lambda: trees(count // 2, random.Random(seed)), False
    yield "agents", lambda: agents(count // 2, random.Random(seed)), False
    yield "agents apart", lambda: agents(count // 2, random.Random(seed)), True
    yield "unshared", lambda: unshared(count, random.Random(seed)), False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", help="file of questions and answers, JSON lines")
    parser.add_argument("--mt_bench", help="file of questions with their turns, JSON lines")
    parser.add_argument("--sessions", type=int, default=80)
    parser.add_argument("--config", help="of a real engine, for times")
    parser.add_argument("--prompts", type=int, default=12, help="of each load on a real engine")
    parser.add_argument("--plot", help="file of a picture, .png or .svg")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.plot:
        plots.check(options.plot)
    rows = {name: compare(load, apart) for name, load, apart in loads(options)}
    header = ["load", *next(iter(rows.values()))]
    cells = [[name, *map(report.number, row.values())] for name, row in rows.items()]
    print(report.grid(header, cells))
    if options.plot:
        draw(options.plot, rows)
    measured: dict[str, Any] = {}
    if options.config:
        rng = random.Random(options.seed)
        measured = times(options.config, options.gsm8k, options.prompts, rng)
        for name, row in measured.items():
            print(f"{name}: first token {row}")
    print(report.json_line("radix", vars(options), rows=rows, times=measured))


if __name__ == "__main__":
    main()
