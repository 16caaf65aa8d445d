"""Shapes of quantized matmuls that tests, benchmarks and compilation checks share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """Weights with a scale per output, multiplied with the same rows."""

    name: str
    rows: int
    in_dim: int
    out_dims: tuple[int, ...]


# Small shapes, which interpreters can run.
CASES = (
    Case("one_row", 1, 128, (256,)),
    Case("three_weights", 5, 256, (256, 128, 128)),
    Case("odd_rows", 19, 384, (128,)),
    Case("two_tiles", 70, 128, (384,)),
    Case("long", 8, 2048, (128,)),
    Case("odd_outputs", 3, 128, (672,)),
)

# Shapes of models on one device.
MODEL_CASES = tuple(
    Case(f"{name}, {rows} rows", rows, in_dim, out_dims)
    for name, in_dim, out_dims in (
        ("llama_8b qkv", 4096, (4096, 1024, 1024)),
        ("llama_8b o", 4096, (4096,)),
        ("llama_8b gate_up", 4096, (14336, 14336)),
        ("llama_8b down", 14336, (4096,)),
        ("llama_8b head", 4096, (128256,)),
        ("llama_8b head, 1 of 8", 4096, (16032,)),
    )
    for rows in (1, 8, 32, 64, 128, 256, 2048)
    if rows <= 256 or "head" not in name  # rows that sample, not all of a prompt
)
