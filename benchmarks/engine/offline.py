"""Tokens/s of `LLM.generate` over many prompts, and how full it keeps the slots.

    python -m benchmarks.engine.offline --config configs/smollm2_135m_fast.py --prompts 1000

Prompt and output lengths are drawn uniformly, so that sequences end at different times. Slots are
looked at 20 times a second; the tail, when the last prompts have been admitted and fewer run than
there are slots, is told apart.
"""

import argparse
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from benchmarks.serving.report import grid, json_line, number
from jserve.config import load
from jserve.gateway.validation import SamplingFields
from jserve.offline import LLM


@dataclass
class Occupancy:
    """Samples the number of sequences that run, and whether any wait. Owned by its thread."""

    llm: LLM
    running: list[int] = field(default_factory=list[int])
    waiting: list[int] = field(default_factory=list[int])
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Occupancy":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            stats = self.llm.stats
            self.running.append(stats.num_running)
            self.waiting.append(stats.num_waiting)

    def share(self, slots: int) -> float | None:
        """Share of the slots that run while a sequence waits for one."""
        taken = [r for r, w in zip(self.running, self.waiting, strict=True) if w]
        return float(np.mean(taken)) / slots if taken else None


def _draw(rng: np.random.Generator, bounds: tuple[int, int], count: int) -> np.ndarray:
    low, high = bounds
    return rng.integers(low, high, count, endpoint=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--prompt_tokens", type=int, nargs=2, default=(16, 128))
    parser.add_argument("--max_tokens", type=int, nargs=2, default=(16, 96))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    llm = LLM(load(options.config, options.overrides))
    lengths = _draw(rng, options.prompt_tokens, options.prompts)
    prompts = [rng.integers(100, llm.info.vocab, n).tolist() for n in lengths]
    limits = _draw(rng, options.max_tokens, options.prompts).tolist()
    fields = [SamplingFields(max_tokens=n, temperature=0, ignore_eos=True) for n in limits]
    llm.generate(prompts[:2], SamplingFields(max_tokens=8, temperature=0), use_tqdm=False)

    started_s = time.perf_counter()
    with Occupancy(llm) as occupancy:
        done = llm.generate(prompts, fields)
    seconds = time.perf_counter() - started_s
    output = sum(len(one.token_ids) for one in done)
    result = {
        "seconds": seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (output + int(lengths.sum())) / seconds,
        "cached_tokens": sum(one.num_cached_tokens for one in done),
        "slots_taken": occupancy.share(llm.info.num_slots),
    }
    print(grid(("", "all prompts"), [(name, number(value)) for name, value in result.items()]))
    print(json_line("offline", vars(options), **result))


if __name__ == "__main__":
    main()
