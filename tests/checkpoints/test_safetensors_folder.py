"""The safetensors reader against the safetensors package, and against damaged folders."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jserve.checkpoints.safetensors_folder import SafetensorsFolder
from jserve.core.errors import ConfigError

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray] = {
    "a.weight": RNG.normal(size=(6, 4)).astype(np.float32),
    "b.weight": RNG.normal(size=(5, 3)).astype(np.float16),
    "c.weight": RNG.normal(size=(7, 2)).astype(ml_dtypes.bfloat16),
    "norm": RNG.normal(size=9).astype(np.float32),
}


def whole(folder: Path) -> Path:
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    names = list(TENSORS)
    files = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, members in files.items():
        save_file({name: TENSORS[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("make", [whole, sharded])
def test_tensors_and_any_rows(make: Any, tmp_path: Path) -> None:
    folder = SafetensorsFolder(make(tmp_path))
    assert {n: i.shape for n, i in folder.tensors().items()} == {
        n: t.shape for n, t in TENSORS.items()
    }
    for name, expected in TENSORS.items():
        for start, stop in ((0, len(expected)), (1, 3), (2, 2)):
            rows = folder.read_rows(name, start, stop)
            assert rows.dtype == expected.dtype
            np.testing.assert_array_equal(rows, expected[start:stop])


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = whole(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            SafetensorsFolder(tmp_path)


def test_truncated_data_names_the_tensor(tmp_path: Path) -> None:
    path = whole(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"tensor \S+ ends at byte .* it is truncated"):
        SafetensorsFolder(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "header is corrupt"),
        (b"[1, 2]", "header is corrupt"),
        ({"x": 3}, "tensor x: its header entry is corrupt"),
        ({"x": entry(shape=[2, 3])}, "tensor x: 16 bytes do not fit shape"),
        ({"x": entry(shape=[-2, -2])}, "tensor x: its header entry is corrupt"),
        ({"x": entry(dtype="F8_E4M3")}, "tensor x has the type F8_E4M3"),
        ({"x": entry(data_offsets=[16, 32])}, "tensor x ends at byte"),
    ],
)
def test_a_corrupt_header_is_named(header: Any, message: str, tmp_path: Path) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        SafetensorsFolder(tmp_path)


def test_shards_and_index_must_agree(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    index.write_text(json.dumps({"weight_map": weight_map | {"gone": "model-2.safetensors"}}))
    with pytest.raises(ConfigError, match=r"not where it says: gone \(in model-2"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "../outside.safetensors"}}))
    with pytest.raises(ConfigError, match="no file name"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ConfigError, match="weight_map is missing or empty"):
        SafetensorsFolder(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file(TENSORS, tmp_path / "model-2.safetensors")
    with pytest.raises(ConfigError, match=r"model-2\.safetensors: tensor \S+ is also in another"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-2\.safetensors: is missing"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither"):
        SafetensorsFolder(tmp_path)
