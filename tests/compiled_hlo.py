"""Finds in a program's text the operations that it must not have: copies, dots of narrow floats."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

_BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32}
_BITS |= {"f8e4m3fn": 8, "s4": 4, "u4": 4, "s16": 16, "u16": 16}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*{$")
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[([\d,]*)\](\{[^}]*\})?[^=]*? ([\w\-]+)\(")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
# Memory space 1 is on the chip: what is fetched there is read once, as it must be.
_ON_CHIP = re.compile(r"S\(1\)")
_VIEWS = {"parameter", "bitcast", "get-tuple-element", "tuple"}  # write nothing
_COPYING = {"copy", "copy-start", "copy-done", "transpose", "all-gather", "all-gather-start"}


class Op(NamedTuple):
    """One operation outside fusions, with its (first) result on one device."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    on_chip: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of the result, without the padding of tiled layouts."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 64) // 8


def operations(text: str) -> Iterator[Op]:
    """The operations outside of fusions; those inside write no memory."""
    fused = set(_CALLED.findall(text))
    inside = False
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            inside = found[1] in fused
        elif not inside and (found := _OP.match(line)):
            name, dtype, dims, layout, kind = found.groups()
            shape = tuple(int(size) for size in dims.split(",") if size)
            yield Op(name, kind, shape, dtype, bool(_ON_CHIP.search(layout or "")))


def written(text: str) -> Iterator[Op]:
    """The operations outside of fusions that write memory."""
    return (op for op in operations(text) if op.kind not in _VIEWS)


def writes_of(text: str, shapes: Iterable[Sequence[int]]) -> list[Op]:
    """Operations that write an array of one of these shapes to HBM, in any layout and dtype."""
    watched = {tuple(sorted(shape)) for shape in shapes}
    return [op for op in written(text) if not op.on_chip and tuple(sorted(op.shape)) in watched]


def copies_of(text: str, leaves: Iterable[jax.ShapeDtypeStruct], least_bytes: int) -> list[Op]:
    """Copies, transpositions and gatherings of arrays as large as one device's part of a leaf.

    Arrays below `least_bytes` are small change.
    """
    parts = set()
    for leaf in leaves:
        whole = tuple(leaf.shape)
        shard = leaf.sharding.shard_shape(whole) if leaf.sharding else whole
        parts |= {tuple(sorted(whole)), tuple(sorted(shard))}
    return [
        op
        for op in operations(text)
        if op.kind in _COPYING
        and not op.on_chip
        and op.size_bytes >= least_bytes
        and tuple(sorted(op.shape)) in parts
    ]


_DEFINED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ([a-z]\w*)\[[^=]*? ([\w\-]+)\(([^)]*)\)")
_LOWERED_DOT = re.compile(r'"?stablehlo\.(?:\w*dot\w*|convolution)"?[ (].* : \(([^)]*)\) ->')
_FULL_WIDTH = {"f32", "f64"}


def narrow_dots(lowered: jax.stages.Lowered, *, compile: bool = True) -> list[str]:  # noqa: A002
    """The dots of a program whose operands are not float32, lowered and compiled for a CPU."""
    found = []
    for line in lowered.as_text().splitlines():
        if operands := _LOWERED_DOT.search(line):
            types = re.findall(r"tensor<(?:\d+x)*(\w+)>", operands[1])
            found += [line.strip()] * any(dtype not in _FULL_WIDTH for dtype in types)
    return found + _narrow_compiled_dots(lowered.compile().as_text()) if compile else found


def _narrow_compiled_dots(text: str) -> list[str]:
    """The dots of a compiled program whose operands are not float32.

    A library that takes a dot and the conversions before it may still read the narrow values, so
    what goes into a library's fusion, or into a call of a library's matmul, counts as well.
    """
    found: list[str] = []
    ops: dict[str, tuple[str, str]] = {}  # name → dtype, kind
    computations = {"": ops}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            computations[begins[1]] = ops = {}
        elif defined := _DEFINED.match(line):
            name, dtype, kind, operands = defined.groups()
            ops[name] = dtype, kind
            read: list[str] = []
            if kind == "dot" or (kind == "custom-call" and re.search("matmul|dot", line)):
                read = [ops[at.strip().lstrip("%")][0] for at in operands.split(",")]
            elif kind == "fusion" and "kind=kCustom" in line and (called := _CALLED.search(line)):
                fused = computations[called[1]].values()
                if any(kind == "dot" for _, kind in fused):
                    read = [dtype for dtype, kind in fused if kind == "parameter"]
            found += [line.strip()] * any(dtype not in _FULL_WIDTH for dtype in read)
    return found
