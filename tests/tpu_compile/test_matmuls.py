"""Quantized and grouped matmuls compile for real TPUs without having one.

Few cases here, each for one generation; `make tpu-compile` compiles all for all.
"""

from tests.tpu_compile.quick import compile_quickly, needs_libtpu


@needs_libtpu
def test_weights_are_read_as_they_are() -> None:
    compiled = compile_quickly("matmuls")  # fails where one is not
    assert {one["generation"] for one in compiled} == {"v5e", "v5p", "v6e"}
    assert {one["codes"] for one in compiled} == {"int8", "float8_e4m3fn", "bfloat16"}
