"""The GGUF reader against the gguf package, and against files that are damaged."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jserve.checkpoints.gguf_file import GgufFile, hf_name
from jserve.checkpoints.gguf_header import read_header
from jserve.core.errors import ConfigError
from tests.model_files import LAYERS, gguf_metadata, tiny_weights, write_gguf

ARCHS = ("llama", "qwen2", "qwen3", "gemma3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", tiny_weights("llama"))


def test_header_agrees_with_the_gguf_package(tiny: Path) -> None:
    header, reader = read_header(tiny), gguf.GGUFReader(tiny)
    theirs = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    ours = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.metadata.items()}
    assert ours == theirs
    assert [(t.name, t.shape, t.type_id, t.offset) for t in header.tensors.values()] == [
        (t.name, tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset)
        for t in reader.tensors
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_tensors_come_back_as_hugging_face_has_them(arch: str, tied: bool, tmp_path: Path) -> None:
    weights = tiny_weights(arch, tied=tied)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", arch, weights))
    assert {n: i.shape for n, i in file.tensors().items()} == {
        n: w.shape for n, w in weights.items()
    }
    for name, expected in weights.items():
        np.testing.assert_array_equal(file.read_rows(name, 0, expected.shape[0]), expected, name)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_any_rows_equal_the_packages_own_dequantization(kind: Kind, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_weights("llama"), quantized=kind)
    file = GgufFile(path)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    down = stored["blk.1.ffn_down.weight"]
    expected = gguf.quants.dequantize(down.data, down.tensor_type).reshape(64, 96)
    q = stored["blk.0.attn_q.weight"]
    whole = gguf.quants.dequantize(q.data, q.tensor_type).reshape(4, 8, 2, 64)
    permuted = whole.swapaxes(1, 2).reshape(64, 64)
    for start, stop in ((0, 64), (0, 1), (63, 64), (13, 41), (5, 5)):
        rows = file.read_rows("model.layers.1.mlp.down_proj.weight", start, stop)
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[start:stop])
        rows = file.read_rows("model.layers.0.self_attn.q_proj.weight", start, stop)
        np.testing.assert_array_equal(rows, permuted[start:stop])


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_k_quants_are_read_in_blocks(kind: Kind, tmp_path: Path) -> None:
    """More elements than one block of rows, with random but finite scales."""
    rng = np.random.default_rng(0)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, width = 600, 2 * block
    data = rng.integers(0, 256, (rows, 2 * block_bytes), np.uint8)
    data[:, 1::2] &= 0x3F  # the high bytes of float16 scales: exponents that are finite
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = GgufFile(tmp_path / "m.gguf").read_rows("model.embed_tokens.weight", 7, rows)
    np.testing.assert_array_equal(ours, gguf.quants.dequantize(data, kind)[7:])
    assert ours.shape == (rows - 7, width)


@pytest.mark.parametrize("arch", ARCHS)
def test_names_are_those_of_the_gguf_package(arch: str) -> None:
    names = gguf.get_tensor_name_map(
        {
            "llama": gguf.MODEL_ARCH.LLAMA,
            "qwen2": gguf.MODEL_ARCH.QWEN2,
            "qwen3": gguf.MODEL_ARCH.QWEN3,
            "gemma3": gguf.MODEL_ARCH.GEMMA3,
        }[arch],
        LAYERS,
    )
    for name in tiny_weights(arch, tied=False):
        stem, _, kind = name.rpartition(".")
        assert hf_name(f"{names.get_name(stem)}.{kind}", arch) == name
    assert hf_name("blk.0.ffn_gate_shexp.weight", arch) is None
    assert hf_name("rope_freqs.weight", arch) is None


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3moe"])
def test_each_expert_is_a_tensor(arch: str, kind: Kind, tmp_path: Path) -> None:
    """One tensor holds all experts of a layer; as whole blocks of every row it can be cut."""
    weights = tiny_weights(arch)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", arch, weights, quantized=kind))
    assert {name: info.shape for name, info in file.tensors().items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    for name in (name for name in weights if ".experts." in name or ".gate." in name):
        stored = weights[name]
        if kind is not Kind.F32:
            stored = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
        np.testing.assert_array_equal(file.read_rows(name, 1, len(stored)), stored[1:], name)


def test_a_file_cut_anywhere_is_refused(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 200, 7), *range(200, len(whole), 4099), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=re.escape(str(cut))):
            GgufFile(cut)


def test_truncated_data_names_the_tensor(tiny: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"tensor output_norm\.weight ends at byte .* truncated"):
        GgufFile(cut)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_config_error(
    tiny: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(tiny.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 9000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        file = GgufFile(path)
        for name, info in file.tensors().items():
            assert file.read_rows(name, 0, min(2, info.shape[0])).dtype == np.float32
    except ConfigError as error:
        assert str(path) in str(error)  # noqa: PT017  whether it raises is up to the damage


def test_wrong_magic_version_type_and_place_are_named(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    path = tmp_path / "wrong.gguf"
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ConfigError, match="does not begin with 'GGUF'"):
        GgufFile(path)
    path.write_bytes(whole[:4] + (9).to_bytes(4, "little") + whole[8:])
    with pytest.raises(ConfigError, match="version 9"):
        GgufFile(path)
    # The entry of a tensor: name, number of dims, dims, type, offset.
    at = whole.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    path.write_bytes(whole[:at] + (999).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ConfigError, match=r"output_norm\.weight has the unknown ggml type 999"):
        GgufFile(path)
    path.write_bytes(whole[: at + 4] + (0).to_bytes(8, "little") + whole[at + 12 :])
    with pytest.raises(ConfigError, match="overlaps another tensor"):
        GgufFile(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.gguf: cannot be read"):
        GgufFile(tmp_path / "none.gguf")


def test_an_unknown_tensor_keeps_its_name(tmp_path: Path) -> None:
    extra = {"blk.0.attn_gate.weight": np.ones((4, 4), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_weights("llama"), extra=extra)
    assert "blk.0.attn_gate.weight" in GgufFile(path).tensors()
    assert gguf_metadata("llama")["llama.block_count"] == LAYERS


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    metadata = gguf_metadata("llama") | {"split.count": 3}
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_weights("llama"), metadata=metadata)
    with pytest.raises(ConfigError, match="one of 3 parts; join them"):
        GgufFile(path)
