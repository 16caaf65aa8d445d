"""Compiles every GPU program for an H200 that is not here, and prints what it takes.

    python -m tests.gpu_compile.programs [--only WORD]

Needs JAX's CUDA plugin, no GPU and no driver. Exits with 1 where a program does not compile,
copies what it must update in place, takes more temporaries than it may, or launches another
number of kernels than it should.
"""

import argparse
import json
import sys

from tests.gpu_compile import attention, engines, matmuls
from tests.gpu_compile.h200 import Compiled, Program, compile_program, complaints

# One list for each kind of program.
PROGRAMS: tuple[Program, ...] = (*attention.PROGRAMS, *matmuls.PROGRAMS, *engines.PROGRAMS)

_TITLES = ("kernels in graphs", "registers", "spills, B", "smem, KiB", "temp, MiB", "s")


def _row(compiled: Compiled) -> list[str]:
    kernels = compiled.kernels
    return [
        f"{compiled.captured} of {compiled.calls}",
        " ".join(str(kernel.registers) for kernel in kernels),
        " ".join(str(kernel.spill_bytes) for kernel in kernels),
        " ".join(f"{kernel.smem_bytes / 1024:.0f}" for kernel in kernels),
        f"{compiled.temp_bytes / 2**20:.1f}",
        str(compiled.seconds),
    ]


def main() -> int:
    """Compiles, prints a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="programs with this in their names")
    only = parser.parse_args().only
    programs = [program for program in PROGRAMS if only in program.name]
    width = max(len(program.name) for program in programs)
    print(f"{'':{width}}", *(f"{title:>17}" for title in _TITLES))
    failed, record = 0, {}
    for program in programs:
        compiled = compile_program(program)
        print(f"{program.name:{width}}", *(f"{cell:>17}" for cell in _row(compiled)), flush=True)
        wrong = complaints(program, compiled)
        for words in wrong:
            print(f"    wrong: {words}", flush=True)
        failed += bool(wrong)
        record[program.name] = [vars(kernel) for kernel in compiled.kernels]
    print(json.dumps(record))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
