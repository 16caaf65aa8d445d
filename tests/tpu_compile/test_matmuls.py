"""Products with quantized weights, and with experts, compile for real TPUs without having one.

Few cases here; `make tpu-compile` compiles all of them.
"""

import itertools

import pytest

from tests.tpu_compile.quick import compile_quickly, needs_libtpu


@needs_libtpu
def test_weights_are_read_as_they_are() -> None:
    compiled = compile_quickly("matmuls")  # which fails where one is not
    kinds = {(one["generation"], one["codes"]) for one in compiled}
    assert kinds == set(
        itertools.product(("v5e", "v5p", "v6e"), ("int8", "float8_e4m3fn", "bfloat16"))
    )
