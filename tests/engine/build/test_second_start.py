"""A second start finds everything made: the weights converted, the programs compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.model_files import tiny_weights, write_gguf

# In a process of its own, as a start is: what a process has compiled, it keeps.
_START = """
import json, sys
import jax
from jserve.cache.config import CacheConfig
from jserve.engine.config import EngineConfig
from jserve.engine.build.start import start_engine
from jserve.checkpoints.config import ModelConfig
from jserve.scheduler.config import SchedulerConfig

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration_secs, **kwargs: compiled.append(kwargs["fun_name"])
    if event == "/jax/core/compile/backend_compile_duration"
    else None
)
phases = []
source, cache_dir = sys.argv[1:]
engine = start_engine(
    ModelConfig(name="tiny", source=source, cache_dir=cache_dir),
    EngineConfig(
        num_slots=2, num_pages=32, max_model_len=64, mixed_tokens=(8,), decode_rows=(2,)
    ),
    SchedulerConfig(),
    CacheConfig(),
    on_files=lambda done, total: phases.append("converting"),
)
cached = [program.cached for program in engine.programs]
print(json.dumps({"compiled": compiled, "cached": cached, "converted": bool(phases)}))
"""


def test_compiles_and_converts_nothing(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "llama.gguf", "llama", tiny_weights("llama"))
    command = [sys.executable, "-c", _START, str(source), str(tmp_path / "cache")]
    flags = os.environ["XLA_FLAGS"] + " --xla_backend_optimization_level=0"
    quickly = os.environ | {"XLA_FLAGS": flags}
    first, second = (
        json.loads(subprocess.run(command, check=True, capture_output=True, env=quickly).stdout)
        for _ in range(2)
    )
    assert first["converted"]
    assert {"jit(mixed_step)", "jit(decode_step)"} < set(first["compiled"])
    assert second == {"compiled": [], "cached": [True, True], "converted": False}
