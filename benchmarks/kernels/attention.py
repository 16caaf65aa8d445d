"""Attention by itself, beside what memory and matrix units can do in the same run.

    python -m benchmarks.kernels.attention --dtype bfloat16 --page_size 64
    python -m benchmarks.kernels.attention --backends gpu cpu --kv_dtype float8_e4m3fn
    python -m benchmarks.kernels.attention --slots 1 8 --contexts 256 --prompts 64 --layers 2

`decode`: every slot has one new token; GB/s are bytes of K and V read and written over time.
`prompt`: one chunk after `context` tokens; TFLOP/s count the keys that each query may see.
`mixed`: such a chunk beside decoding slots; of many, reading takes longer than computing. Times are
of one layer, medians of the turns. Kernels of libraries are measured beside ours on what they can
do (see `libraries.py`): they only read K and V. Prints one table, one JSON line.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp

from benchmarks.engine import ceilings
from benchmarks.kernels.chained_attention import (
    Heads,
    Lengths,
    Turns,
    time_attention,
    time_library,
)
from benchmarks.kernels.libraries import FAILURES, AttentionLibrary, attention_libraries
from benchmarks.serving import report
from jserve.pallas_kernels.backend import Backend, backend_for

_GIGA, _TERA = 1e9, 1e12
_LAYERS = 8  # layers in one program
_RUNS = 4  # runs in a turn: 32 layers, as many as a model has, between two looks at the clock
_SLOW = Turns(3)  # for XLA's loops, which take many times as long


@dataclass(frozen=True)
class Cell:
    """One shape on one backend."""

    kind: str
    backend: str  # or a library
    slots: int
    context: int
    chunk: int
    us: float  # a layer
    bytes_share: float  # share of the faster stream's rate
    operations_share: float  # share of the matmul's rate


def parse() -> argparse.Namespace:
    """Parses the flags; sizes of heads are Llama 3.1 8B's unless given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", help="default: the best, and XLA's loops")
    parser.add_argument("--q_heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--page_size", type=int, default=64)
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv_dtype", help="default: --dtype")
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048], help="chunks")
    parser.add_argument("--layers", type=int, default=_LAYERS, help="in one program, if they fit")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument(
        "--most_gib", type=float, default=0.0, help="of K and V in all layers; 0: by device"
    )
    parser.add_argument("--stream_mib", type=int, default=1024, help="of each streamed array")
    parser.add_argument("--product_dim", type=int, default=0, help="0: by device")
    return parser.parse_args()


def kv_bytes(heads: Heads, lengths: Lengths) -> int:
    """Bytes of K and V that one layer must read, and of new ones that it must write."""
    window = heads.windows[0] or max(before + new for before, new in lengths)
    read = sum(min(before + new, window + new - 1) for before, new in lengths)
    token = 2 * heads.kv_heads * heads.head_dim * jnp.dtype(heads.kv_dtype).itemsize
    return token * (read + sum(new for _, new in lengths))


def operations(heads: Heads, lengths: Lengths) -> int:
    """Multiplications and additions of one layer: q·k and p·v of each key that a query sees."""
    seen = 0
    for before, new in lengths:
        window = heads.windows[0] or before + new
        seen += sum(min(before + i + 1, window) for i in range(new))
    return 4 * heads.q_heads * heads.head_dim * seen


def cells(arguments: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """Kind, decoding slots, context and chunk of each measurement."""
    found = [
        ("decode", slots, context, 0) for context in arguments.contexts for slots in arguments.slots
    ]
    for chunk in arguments.prompts:
        for before in (0, *arguments.contexts[-1:]):
            found.append(("prompt", 0, before, chunk))
        for slots in arguments.slots if arguments.contexts else ():
            found.append(("mixed", slots, arguments.contexts[0], chunk))
    return found


def measure(arguments: argparse.Namespace, best: ceilings.Ceilings) -> list[Cell]:
    """Every cell on every backend, and with every library that can do it."""
    device = jax.devices()[0]
    dtype = jnp.dtype(arguments.dtype)
    heads = Heads(
        arguments.q_heads,
        arguments.kv_heads,
        arguments.head_dim,
        arguments.page_size,
        dtype,
        jnp.dtype(arguments.kv_dtype or dtype),
        (arguments.window,),
    )
    ours = backend_for(
        device.platform,
        dtype,
        device_kind=device.device_kind,
        head_dim=heads.head_dim,
        page_size=heads.page_size,
    )
    backends = list(map(Backend, arguments.backends or dict.fromkeys((ours, Backend.CPU))))
    most_gib = arguments.most_gib or (72 if device.platform == "gpu" else 4)
    found: list[Cell] = []
    for kind, slots, context, chunk in cells(arguments):
        lengths = [(context, 1)] * slots + ([(context, chunk)] if chunk else [])
        moved, computed = kv_bytes(heads, lengths), operations(heads, lengths)
        layers = min(arguments.layers, int(most_gib * 2**30 / moved))
        if not layers:
            print(f"left out, above --most_gib: {kind}, {slots} slots of {context} tokens")
            continue
        chain = replace(heads, windows=heads.windows * layers)
        turns = Turns(arguments.turns, _RUNS)
        for name, ms in _times(device.platform, chain, lengths, ours, backends, turns):
            seconds = ms / 1e3 / layers
            shares = moved / best.bytes_per_s / seconds, computed / best.operations_per_s / seconds
            found.append(Cell(kind, name, slots, context, chunk, seconds * 1e6, *shares))
    return found


def _times(
    platform: str,
    heads: Heads,
    lengths: Lengths,
    ours: Backend,
    backends: list[Backend],
    turns: Turns,
) -> Iterator[tuple[str, float]]:
    """Milliseconds of all layers; a library that fails is named."""
    for backend in backends:
        often = turns if backend is ours else _SLOW
        yield backend.value, time_attention(heads, lengths, backend, often)
    for library in _libraries(platform, heads, lengths):
        try:
            yield library.name, time_library(heads, lengths, ours, library, turns)
        except FAILURES as error:
            print(f"{library.name}, {len(lengths)} rows: {error}")


def _libraries(platform: str, heads: Heads, lengths: Lengths) -> tuple[AttentionLibrary, ...]:
    """Libraries that can do this, none of which takes other dtypes than bfloat16."""
    if {heads.dtype, heads.kv_dtype} != {jnp.dtype(jnp.bfloat16)}:
        return ()
    return attention_libraries(platform, heads.head_dim, heads.windows[0], lengths)


def show(found: list[Cell], best: ceilings.Ceilings) -> None:
    """Prints one table, with shares of the ceilings."""
    print(
        f"ceilings: {best.bytes_per_s / _GIGA:,.0f} GB/s, "
        f"{best.operations_per_s / _TERA:,.1f} TFLOP/s\n"
    )
    rows = [
        [
            f"{cell.kind} {cell.backend}",
            *(f"{number:,}" for number in (cell.slots, cell.context, cell.chunk)),
            f"{cell.us:,.0f}",
            f"{cell.bytes_share:.1%}",
            f"{cell.operations_share:.1%}",
        ]
        for cell in found
    ]
    print(report.grid(["", "slots", "context", "chunk", "us", "bandwidth", "matrix rate"], rows))


def main() -> None:
    arguments = parse()
    dim = arguments.product_dim or ceilings.default_product_dim()
    best = ceilings.measure(
        jnp.dtype(arguments.dtype), stream_mib=arguments.stream_mib, product_dim=dim
    )
    found = measure(arguments, best)
    show(found, best)
    print(
        report.json_line(
            "attention",
            vars(arguments),
            ceilings=asdict(best),
            cells=[asdict(cell) for cell in found],
        )
    )


if __name__ == "__main__":
    main()
