"""The `generate` of Hugging Face transformers as a peer: prompts and greedy answers of one length.

    jserve convert model.gguf hf_folder --format=huggingface
    python -m venv peer && peer/bin/pip install torch transformers
    peer/bin/python -m benchmarks.engine.transformers_generate --model hf_folder

Needs nothing of jserve's own environment. A turn generates one token for each prompt of a batch,
then all tokens: the first call is the prefill, the difference of the two is the decode. Prints one
table and one JSON line.
"""

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving import failures, report
from benchmarks.serving.failures import BenchmarkError

_FIRST_ID, _LAST_ID = 100, 500  # ids of random prompts, as in benchmarks/serving


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=64, help="new tokens; 1: prefill alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--note", help="goes into the JSON line")
    arguments = parser.parse_args()
    torch, transformers = _library("torch"), _library("transformers")
    if not (Path(arguments.model) / "config.json").is_file():
        raise BenchmarkError(
            f"--model {arguments.model}: no Hugging Face folder; jserve convert "
            "--format=huggingface makes one"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype)
    ).eval()
    measured = [_measure(torch, model, batch, arguments) for batch in arguments.batches]
    versions = {library.__name__: library.__version__ for library in (torch, transformers)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="")
    print(f", {arguments.dtype}, {torch.get_num_threads()} threads; medians of the rounds\n")
    print(_table(measured))
    config = {**vars(arguments), "threads": torch.get_num_threads()}
    print(report.json_line("transformers_generate", config, versions=versions, batches=measured))
    return 0


def _measure(torch: Any, model: Any, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of one batch, each with other prompts; the first, unmeasured, warms up."""
    size, new = arguments.prompt_tokens, arguments.max_tokens
    prefills: list[float] = []
    totals: list[float] = []
    for seed in range(arguments.rounds + 1):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(_FIRST_ID, _LAST_ID + 1, (batch, size), generator=generator)
        prefills.append(_seconds(functools.partial(_generate, torch, model, ids, 1)))
        totals.append(_seconds(functools.partial(_generate, torch, model, ids, new)))
        print(f"batch {batch}: {totals[-1]:.2f} s", file=sys.stderr)
    prefills, totals = prefills[1:], totals[1:]
    decodes = [total - prefill for total, prefill in zip(totals, prefills, strict=True)]
    return {
        "batch": batch,
        "prefill_tokens_per_s": [round(batch * size / s, 1) for s in prefills],
        "output_tokens_per_s": [round(batch * new / s, 2) for s in totals],
        # One call may be noisier than what it is to measure: then there is no such number.
        "decode_tokens_per_s": [round(batch * (new - 1) / s, 2) for s in decodes if s > 0]
        if new > 1
        else [],
    }


def _generate(torch: Any, model: Any, ids: Any, new_tokens: int) -> None:
    """Generates greedy answers of exactly `new_tokens`."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    assert out.shape[1] == ids.shape[1] + new_tokens


def _seconds(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _table(measured: list[dict[str, Any]]) -> str:
    columns = ("prefill_tokens_per_s", "output_tokens_per_s", "decode_tokens_per_s")
    rows = [
        [str(row["batch"]), *(report.number(median(row[c]) if row[c] else None) for c in columns)]
        for row in measured
    ]
    return report.grid(["batch", "prefill tokens/s", "output tokens/s", "decode tokens/s"], rows)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"{error.name} is not in {sys.executable}; pip install torch transformers in an "
            "environment of its own, and run this with its python"
        ) from None


if __name__ == "__main__":
    failures.run(main)
