"""Tensors of a GGUF file under Hugging Face's names and layouts, dequantized on read. No JAX."""

import dataclasses
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jserve.checkpoints.gguf_header import GgufHeader, GgufTensor, read_header
from jserve.checkpoints.tensor_source import TensorInfo
from jserve.core.errors import ConfigError

# Dequantization needs about four times its result in temporaries: rows are taken in blocks.
BLOCK_ELEMENTS = 1 << 18
ROPE_FREQS = "rope_freqs.weight"

_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA3_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Names of the router and of the three weights per expert, for architectures with experts.
EXPERT_NAMES = {
    "llama": {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    "qwen3moe": {
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{}.gate_proj",
        "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj",
    },
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def hf_name(name: str, arch: str) -> str | None:
    """Hugging Face's name of a GGUF tensor; None if the architecture has no such tensor.

    The name of a tensor that holds all experts has {} where one's number is.
    """
    if match := _BLOCK_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        block = _BLOCK | (_GEMMA3_NORMS if arch == "gemma3" else _NORMS)
        block |= EXPERT_NAMES.get(arch, {})
        return f"model.layers.{layer}.{block[part]}.{kind}" if part in block else None
    stem, _, kind = name.rpartition(".")
    return f"{_GLOBAL[stem]}.{kind}" if stem in _GLOBAL and kind == "weight" else None


class GgufFile:
    """A `TensorSource` over one GGUF file, mapped into memory; every read is checked.

    Undoes what llama.cpp's converter does to a Hugging Face checkpoint: for `llama` the rows of
    q and k are interleaved for its rotary kernel, for `gemma3` norm weights are stored plus one;
    experts lie in one tensor.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError naming the file (and tensor) if it is corrupt or not supported."""
        self.path = Path(path)
        self.header: GgufHeader = read_header(self.path)
        if (parts := self.header.metadata.get("split.count", 1)) > 1:
            raise ConfigError(
                f"{self.path}: is one of {parts} parts; join them with llama-gguf-split --merge"
            )
        self.arch = str(self.header.metadata.get("general.architecture", ""))
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._check_tensors()
        self._stored = {
            name: part
            for tensor in self.header.tensors.values()
            if tensor.name != ROPE_FREQS  # gguf_spec reads it
            for name, part in _parts(tensor, hf_name(tensor.name, self.arch) or tensor.name)
        }
        self._infos = {
            name: TensorInfo(tensor.shape, GGMLQuantizationType(tensor.type_id).name)
            for name, tensor in self._stored.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor; one that the architecture does not have keeps its GGUF name."""
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows in float32, dequantized in blocks. Safe to call from threads."""
        tensor = self._stored[name]
        out = np.empty((stop - start, *tensor.shape[1:]), np.float32)
        order = self._row_order(name, tensor.shape[0])
        step = max(1, BLOCK_ELEMENTS // int(np.prod(tensor.shape[1:])))
        rows = self._raw_rows(tensor)
        for low in range(start, stop, step):
            high = min(low + step, stop)
            block = rows[low:high] if order is None else rows[order[low:high]]
            out[low - start : high - start] = self._dequantize(tensor, block)
        if self.arch == "gemma3" and name.endswith("norm.weight"):
            out -= 1
        return out

    def read_stored(self, name: str) -> np.ndarray:
        """Reads a whole tensor by its GGUF name in the file's layout, as float32."""
        tensor = self.header.tensors[name]
        return self._dequantize(tensor, self._raw_rows(tensor)).reshape(tensor.shape)

    def _raw_rows(self, tensor: GgufTensor) -> np.ndarray:
        """Bytes [rows, bytes per row]; a vector of one number per row counts as a column."""
        num_rows = tensor.shape[0]
        num_bytes = _num_bytes(tensor)
        data = np.frombuffer(self._data, np.uint8, num_bytes, tensor.offset)
        return data.reshape(num_rows, num_bytes // num_rows)

    def _dequantize(self, tensor: GgufTensor, rows: np.ndarray) -> np.ndarray:
        values = dequantize(rows, GGMLQuantizationType(tensor.type_id))
        return values.astype(np.float32, copy=False).reshape(-1, *tensor.shape[1:])

    def _row_order(self, name: str, num_rows: int) -> np.ndarray | None:
        """The stored row of each Hugging Face row; None if all are in place."""
        match = re.search(r"\.self_attn\.([qk])_proj\.(weight|bias)$", name)
        if self.arch != "llama" or match is None:
            return None
        heads = self.header.metadata.get("llama.attention.head_count")
        if match[1] == "k":
            heads = self.header.metadata.get("llama.attention.head_count_kv", heads)
        if isinstance(heads, np.ndarray) and heads.size and (heads == heads[0]).all():
            heads = int(heads[0])  # one entry per layer
        if type(heads) is not int or heads < 1 or num_rows % (2 * heads):
            raise ConfigError(
                f"{self.path}: tensor {name} has {num_rows} rows, which are no {heads!r} heads"
            )
        stored = np.arange(num_rows).reshape(heads, num_rows // heads // 2, 2)
        return stored.swapaxes(1, 2).reshape(num_rows)

    def _check_tensors(self) -> None:
        """Checks that types are known, sizes are whole blocks, and data lie in the file, apart."""
        problems: list[str] = []
        kinds: set[int] = set()
        end_before = 0
        for tensor in sorted(self.header.tensors.values(), key=lambda tensor: tensor.offset):
            problem = _type_problem(tensor, kinds)
            if problem is None and 0 in tensor.shape:
                problem = f"has the empty shape {tensor.shape}"
            if problem is None:
                end = tensor.offset + _num_bytes(tensor)
                if end > self.header.file_bytes:
                    problem = (
                        f"ends at byte {end}, but the file has {self.header.file_bytes}: "
                        "it is truncated; fetch it again"
                    )
                elif tensor.offset < end_before:
                    problem = "overlaps another tensor"
                end_before = end
            if problem is not None:
                problems.append(f"{tensor.name} {problem}")
        if problems:
            more = f"; and {len(problems) - 8} more tensors" if len(problems) > 8 else ""
            raise ConfigError(f"{self.path}: tensor " + "; tensor ".join(problems[:8]) + more)


def _parts(tensor: GgufTensor, name: str) -> Iterator[tuple[str, GgufTensor]]:
    """A tensor under its name, or, if it holds all experts, the part of each expert."""
    if "{}" not in name or len(tensor.shape) != 3:
        yield name, tensor
        return
    part = dataclasses.replace(tensor, shape=tensor.shape[1:])
    for expert in range(tensor.shape[0]):
        at = tensor.offset + expert * _num_bytes(part)
        yield name.format(expert), dataclasses.replace(part, offset=at)


def _num_bytes(tensor: GgufTensor) -> int:
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    return int(np.prod(tensor.shape, dtype=object)) // block * block_bytes


def _type_problem(tensor: GgufTensor, known: set[int]) -> str | None:
    """The problem of a tensor's type, if any. `known` collects types that work."""
    try:
        kind = GGMLQuantizationType(tensor.type_id)
    except ValueError:
        return f"has the unknown ggml type {tensor.type_id}"
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block or (len(tensor.shape) == 1 and block > 1):
        return f"of type {kind.name} has rows of {tensor.shape[-1]}, not whole blocks of {block}"
    if tensor.type_id not in known:
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            return f"has the type {kind.name}, which cannot be dequantized"
        known.add(tensor.type_id)
    return None
