"""Will an engine fit? Counted from shapes alone: no device, no weights, nothing compiled."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.step import Program, ProgramKind
from jserve.engine.build.chips import Chip
from jserve.engine.build.memory import GRID, device_pages, host_pages
from jserve.engine.build.sizing import (
    DeviceBytes,
    EngineShape,
    device_bytes,
    least_shape,
    with_pages,
)
from jserve.engine.config import EngineConfig
from jserve.engine.program.state import page_bytes
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, vocab_axes

_GIB = 1 << 30
_FLOAT = 4  # bytes of float32 and int32
# Code of a program on TPU, where it lies in the same memory: what all layers share, and the rest.
_CODE_BYTES = 40 << 20
_LAYER_CODE_BYTES = 1 << 19
_LAYER_TEMPORARIES = 2 << 20  # what the compiler keeps of every layer through a program
# Arrays of [rows, vocab] that sampling holds at once: logits, those with processors applied,
# counts and masks of the rows, noise, and what copies and comparisons make (compiled: up to 9).
_VOCAB_ARRAYS = 10


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What an engine needs of each chip, and how many pages are left for it."""

    chip: Chip
    shape: EngineShape  # num_pages as planned
    need: DeviceBytes
    largest: Program  # whose temporaries are counted

    @property
    def used_bytes(self) -> int:
        """Of one chip."""
        need = self.need
        fixed = need.params + need.slots + need.temporaries + need.code
        return fixed + self.shape.num_pages * need.page

    @property
    def kv_tokens(self) -> int:
        """Tokens that all pages hold."""
        return self.shape.num_pages * self.shape.batch.page_size

    @property
    def full_sequences(self) -> int:
        """Sequences of the longest context that the pages hold at once."""
        page_size = self.shape.batch.page_size
        return self.shape.num_pages // -(-self.shape.max_model_len // page_size)


def plan_memory(model: Model, mesh: AnyMesh, config: EngineConfig, chip: Chip) -> MemoryPlan:
    """Counts what each chip of `mesh` holds: programs are estimated, all else is exact.

    Raises ConfigError with the bytes that are missing where the engine does not fit.
    """
    least = least_shape(model, mesh, config)
    sizes = {program: temporary_bytes(model, mesh, program) for program in config.programs()}
    largest = max(sizes, key=sizes.__getitem__)
    code = len(sizes) * code_bytes(model) if chip.platform == "tpu" else 0
    need = device_bytes(model, mesh, least, temporaries=sizes[largest], code=code)
    fixed = need.params + need.slots + need.temporaries + need.code
    wanted = _wanted_pages(model, config, least)
    missing = fixed + wanted * need.page - chip.usable_bytes
    if missing > 0:
        taken = {
            "weights": need.params,
            "slots": need.slots,
            f"temporaries ({largest.name})": need.temporaries,
            "code": need.code,
            f"{wanted} pages": wanted * need.page,
        }
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in taken.items() if size)
        raise ConfigError(
            f"{missing / _GIB:.2f} GiB too much for a {chip.name} "
            f"({chip.usable_bytes / _GIB:.2f} GiB): {parts} GiB; use more chips "
            "(engine.tensor_parallel), a quantized model, fewer slots or a shorter context"
        )
    pages = wanted
    if not config.num_pages and not config.kv_bytes:
        pages = device_pages(
            limit_bytes=chip.usable_bytes,
            params_bytes=need.params + need.slots,
            program_bytes=need.temporaries + need.code,
            page_bytes=need.page,
        )
    return MemoryPlan(chip, with_pages(least, config, pages), need, largest)


def _wanted_pages(model: Model, config: EngineConfig, least: EngineShape) -> int:
    """Those that the config says, or else as few as an engine starts with."""
    if config.num_pages:
        return config.num_pages
    if config.kv_bytes:
        of_all = page_bytes(model, config.page_size, least.kv_dtype, least.kv_heads)
        return host_pages(
            kv_bytes=config.kv_bytes, page_bytes=of_all, other_bytes=0, available_bytes=None
        )
    return -(-max(config.max_model_len, 1) // (config.page_size * GRID)) * GRID


def code_bytes(model: Model) -> int:
    """An estimate, from above, of a program's code on TPU."""
    return _CODE_BYTES + model.spec.layers * _LAYER_CODE_BYTES


def temporary_bytes(model: Model, mesh: AnyMesh, program: Program) -> int:
    """An estimate, from above, of what one device needs to run a program beside its arguments.

    Layers come one after the other and reuse memory, so the widest counts: its input, its
    products in float32 and in the compute dtype, and attention's own copies of q, k and v. The
    head and the sampler come after them.
    """
    spec, chips = model.spec, mesh.size
    tokens, itemsize = program.tokens, model.dtype.itemsize
    both = _FLOAT + itemsize
    heads = spec.q_heads // chips + 2 * max(spec.kv_heads // chips, 1)
    # q, k and v as products, rotated, and laid out for the kernel; its outputs twice.
    attention = heads * spec.head_dim * 3 * both
    ffn = 3 * spec.ffn_dim // chips * both
    if spec.experts:
        columns = spec.expert_ffn_dim // mesh.shape["model"]  # rows are there for all experts
        row = 3 * columns * both + 2 * spec.model_dim * both
        ffn = max(ffn if spec.sparse_layers else 0, spec.experts_per_token * row)
    layers = tokens * (3 * spec.model_dim * both + max(attention, ffn))
    rows = program.rows
    if program.kind is ProgramKind.MIXED:
        layers += tokens * spec.model_dim * both  # the hidden states of all tokens, for their rows
    vocab = spec.vocab // (chips if vocab_axes(spec.vocab, mesh) else 1)
    layers += spec.layers * _LAYER_TEMPORARIES
    return layers + rows * vocab * _FLOAT * _VOCAB_ARRAYS
