"""Attention compiles for real TPUs on a machine without one: Mosaic accepts the kernel.

Few programs here; `make tpu-compile` compiles all of them.
"""

import pytest

from tests.tpu_compile.quick import compile_quickly, needs_libtpu


@pytest.mark.slow
@needs_libtpu
def test_pages_are_updated_in_place_by_one_launch() -> None:
    programs = compile_quickly("programs")
    assert {program["generation"] for program in programs} == {"v5e", "v5p", "v6e"}
    for program in programs:
        assert program["launches"] == 1, program
        assert program["alias_bytes"] >= program["page_bytes"], program
        # Room for the step's own queries, keys and values, not for a copy of the pages.
        assert 8 * program["temp_bytes"] < program["page_bytes"], program
