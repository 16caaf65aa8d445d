"""SmolLM2-135M-Instruct on a CPU, fast: the file's own 4-bit weights, 8-bit activations."""

import dataclasses
from pathlib import Path

from jserve.checkpoints.config import Quantization
from jserve.config import ServeConfig, load
from jserve.engine.config import KVDtype


def get_config() -> ServeConfig:
    """The `smollm2_135m` config with quantized weights; docs/performance.md has gains and costs.

    It is made for processors with AVX512-VNNI; without it prompts are slower than in float32. K
    and V are bfloat16, so that 1 GiB of pages holds twice the tokens.
    """
    exact = load(str(Path(__file__).with_name("smollm2_135m.py")))
    return dataclasses.replace(
        exact,
        model=dataclasses.replace(exact.model, quantization=Quantization.INT4),
        engine=dataclasses.replace(exact.engine, kv_dtype=KVDtype.BFLOAT16),
    )
