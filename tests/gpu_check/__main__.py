"""Everything that needs a Hopper GPU, with one command and nothing installed: `make gpu-check`.

    python3 -m tests.gpu_check [--out FILE] [--only WORD]

First every kernel against float64; then tables of bandwidth and arithmetic beside ceilings that
the same run measures, XLA's own code and the kernels of libraries next to ours; then the engine.
Each part is a process of its own, so one that fails leaves the others. Where there is no Hopper
GPU it says so and exits with 0: nothing was measured.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

_FIND = """
import jax
for device in jax.devices("gpu"):
    if getattr(device, "compute_capability", "") == "9.0":
        print(device.device_kind)
        break
"""
_LLAMA = ("--model", "llama-3.1-8b", "--dtype", "bfloat16")
_8_BITS = ("--set", "model.quantization=fp8", "--set", "engine.kv_dtype=float8_e4m3fn")
_STEPS = (
    *("benchmarks.engine.steps", *_LLAMA, "--rows", "1", "8", "64", "128", "--contexts", "1024"),
    *("--prompts", "512", "2048", "--at_once", "1"),
)
_SATURATION = (
    *("benchmarks.engine.saturation", *_LLAMA, "--prompt_tokens", "1000", "--max_tokens", "1000"),
    *("--set", "engine.num_slots=256", "--set", "engine.decode_rows=[8,256]"),
)
PARTS: dict[str, tuple[str, ...]] = {
    "correct": ("tests.gpu_check.correctness",),
    "matmuls are correct": ("tests.gpu_check.matmuls",),
    "attention": ("benchmarks.kernels.attention",),
    "attention in 8 bits": ("benchmarks.kernels.attention", "--kv_dtype", "float8_e4m3fn"),
    "attention, heads of 64": ("benchmarks.kernels.attention", "--head_dim", "64"),
    "attention, heads of 256": (
        *("benchmarks.kernels.attention", "--q_heads", "8", "--kv_heads", "4"),
        *("--head_dim", "256", "--window", "1024"),
    ),
    "matmuls": ("benchmarks.kernels.matmuls",),
    "engine": _STEPS,
    "engine in 8 bits": (*_STEPS, *_8_BITS),
    "saturation": _SATURATION,
    "saturation in 8 bits": (*_SATURATION, *_8_BITS),
}


def hopper() -> str:
    """The name of the first Hopper GPU that JAX can use, or nothing."""
    command = [sys.executable, "-c", _FIND]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> int:
    """The number of parts that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON lines are appended")
    parser.add_argument("--only", default="", help="parts whose name has this word")
    options = parser.parse_args()
    device = hopper()
    if not device:
        print("no Hopper GPU that JAX can use: nothing was checked, nothing measured")
        return 0
    print(f"on {device}")
    failed: list[str] = []
    for name, arguments in PARTS.items():
        if options.only not in name:
            continue
        started = time.monotonic()
        print(f"\n== {name}: python3 -m {' '.join(arguments)}", flush=True)
        # JAX takes three quarters of the memory unless told; an engine has the GPU to itself.
        environment = os.environ | {"XLA_CLIENT_MEM_FRACTION": "0.92"}
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
        )
        lines = done.stdout.splitlines()
        print("\n".join(line for line in lines if not line.startswith("{")))
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines if line.startswith("{"))
        if done.returncode:
            failed.append(name)
        print(f"== {name}: exit {done.returncode}, {time.monotonic() - started:.0f} s", flush=True)
    print(f"\n{len(failed)} parts failed: {', '.join(failed)}" if failed else "\nevery part passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
