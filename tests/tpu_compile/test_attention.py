"""Attention compiles for real TPUs on a machine without one: Mosaic accepts the kernel.

Few programs here, each for one generation; `make tpu-compile` compiles all for all.
"""

from tests.tpu_compile.quick import compile_quickly, needs_libtpu


@needs_libtpu
def test_pages_are_updated_in_place_by_one_launch() -> None:
    programs = compile_quickly("programs")  # fails where one is not
    assert {program["generation"] for program in programs} == {"v5e", "v5p", "v6e"}
