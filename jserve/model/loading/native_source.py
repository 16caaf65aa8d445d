"""A native folder read tensor by tensor on the host, for converting it to other formats."""

from pathlib import Path

import numpy as np
import tensorstore as ts

from jserve.checkpoints.config import Quantization
from jserve.checkpoints.native_folder import PARAMS, read_manifest, verify
from jserve.checkpoints.tensor_source import TensorInfo
from jserve.core.errors import ConfigError


class NativeSource:
    """A `TensorSource` over a native folder. Owns the open arrays."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if a file differs from its digest, or weights are quantized."""
        self.path = folder
        manifest = read_manifest(folder)
        if manifest.quantization is not Quantization.NONE:
            raise ConfigError(
                f"{folder}: holds {manifest.quantization.value} weights; convert the model "
                f"that it was made from ({manifest.source})"
            )
        verify(folder, manifest)
        self._infos = {
            name: TensorInfo(shape, manifest.dtype.value)
            for name, shape in manifest.tensors.items()
        }
        self._open: dict[str, ts.TensorStore] = {}

    def tensors(self) -> dict[str, TensorInfo]:
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._open:
            path = str((self.path / PARAMS / name).resolve())
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
            self._open[name] = ts.open(spec, open=True, read=True).result()
        return np.asarray(self._open[name][start:stop].read().result())
