"""Two processes that JAX joins: their shares of a model, and the facts they agree on."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jserve.checkpoints.config import ModelConfig, Quantization
from jserve.engine.group.processes import free_port
from jserve.model.functional import Model
from jserve.model.loading.load import load_params, prepare
from jserve.model.sharding import device_mesh, param_shardings
from tests.model_files import tiny_weights, write_gguf

_PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jserve.engine.group.processes import (
    engine_devices, join_processes, leave_processes, least_of_all
)
from jserve.checkpoints.config import ModelConfig, Quantization
from jserve.model.loading.load import load_params, prepare
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh, param_shardings

index, address, source, cache, expected = sys.argv[1:]
join_processes(
    address, index=int(index), num_processes=2, num_cpu_devices=2, timeout_s=60
)
assert least_of_all(5 + int(index)) == 5
prepared = prepare(ModelConfig(name="t", source=source, cache_dir=cache), lambda done, total: None)
model = Model(prepared.spec, jnp.dtype(jnp.float32))
devices = engine_devices(4, 2)
assert [device.process_index for device in devices] == [0, 0, 1, 1]
assert [device.process_index for device in engine_devices(2, 2)] == [0, 1]
mesh = device_mesh(devices, model=4, expert=1)
shardings = param_shardings(model.param_specs(), prepared.spec, mesh)
whole = np.load(expected)
loaded = load_params(prepared, model, shardings)
quantized = Model(prepared.spec, jnp.dtype(jnp.float32), quantization=Quantization.INT8_CHANNEL)
coded = quantized.init(3, param_shardings(quantized.param_specs(), prepared.spec, mesh))
for kind, params in (("loaded", loaded), ("coded", coded)):
    for name, array in params.items():
        assert len(array.addressable_shards) == 2
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(
                np.asarray(shard.data), whole[f"{kind} {name}"][shard.index]
            )
leave_processes()
print("as expected")
"""


def test_each_process_holds_its_share_of_the_model(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "llama.gguf", "llama", tiny_weights("llama"))
    config = ModelConfig(name="t", source=str(source), cache_dir=str(tmp_path))
    prepared = prepare(config, lambda done, total: None)
    mesh = device_mesh(jax.devices()[:1], model=1, expert=1)
    whole: dict[str, np.ndarray] = {}
    for kind in ("loaded", "coded"):
        quantization = Quantization.INT8_CHANNEL if kind == "coded" else Quantization.NONE
        model = Model(prepared.spec, jnp.dtype(jnp.float32), quantization=quantization)
        shardings = param_shardings(model.param_specs(), prepared.spec, mesh)
        if kind == "loaded":
            params = load_params(prepared, model, shardings)
        else:
            params = model.init(3, shardings)
        whole |= {f"{kind} {name}": np.asarray(array) for name, array in params.items()}
    np.savez(tmp_path / "whole.npz", **whole)

    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    files = (str(source), str(tmp_path), str(tmp_path / "whole.npz"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(index), address, *files],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            assert "as expected" in output
    finally:
        for process in processes:
            with process:
                process.kill()
