"""Will an engine fit? Counted from shapes alone: no device, no weights, nothing compiled."""

import dataclasses
from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.step import Program, ProgramKind
from jserve.engine.chips import Chip
from jserve.engine.config import EngineConfig
from jserve.engine.memory import GRID
from jserve.engine.sizing import DeviceBytes, EngineShape, device_bytes, least_shape
from jserve.engine.state import page_bytes
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, vocab_axes

_GIB = 1 << 30
_FLOAT = 4  # bytes of float32 and int32
# Code of a program on TPU, where it lies in the same memory: the sampler's, and a layer's with
# prompts and without.
_CODE_BYTES = 24 << 20
_LAYER_CODE_BYTES = {ProgramKind.MIXED: 8 << 20, ProgramKind.WINDOW: 2 << 20}
# Arrays of [rows, vocab] that sampling holds at once: logits, those with processors applied,
# counts and masks of the rows, noise, and two that a copy or a comparison makes.
_VOCAB_ARRAYS = 8


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
    code = sum(code_bytes(model, program) for program in sizes) if chip.platform == "tpu" else 0
    need = device_bytes(model, mesh, least, temporaries=sizes[largest], code=code)
    fixed = need.params + need.slots + need.temporaries + need.code
    # One sequence of the longest context must fit, or of what the config insists on.
    context = config.max_model_len or config.page_size
    wanted = config.num_pages or -(-context // config.page_size)
    if config.kv_bytes and not config.num_pages:
        of_all = page_bytes(model, config.page_size, least.kv_dtype, least.kv_heads)
        wanted = max(wanted, config.kv_bytes // of_all)
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
        pages = max((chip.usable_bytes - fixed) // need.page // GRID * GRID, wanted)
    held = pages * config.page_size
    shape = dataclasses.replace(
        least, num_pages=pages, max_model_len=min(least.max_model_len, held)
    )
    return MemoryPlan(chip, shape, need, largest)


def code_bytes(model: Model, program: Program) -> int:
    """An estimate, from above, of a program's code on TPU."""
    return _CODE_BYTES + model.spec.layers * _LAYER_CODE_BYTES[program.kind]


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
    return layers + rows * vocab * _FLOAT * _VOCAB_ARRAYS
