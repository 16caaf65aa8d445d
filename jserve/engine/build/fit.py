"""Whether an engine fits its chips, from shapes alone: no device, no weights, nothing compiled."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.engine.build.chips import Chip
from jserve.engine.build.kv_budget import KVBudget, estimated_budget
from jserve.engine.build.shape import GRID, EngineShape, least_shape, with_pages
from jserve.engine.config import EngineConfig
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """The memory of each chip: the budget of an engine, and the pages that fit beside it."""

    chip: Chip
    shape: EngineShape
    budget: KVBudget

    @property
    def used_bytes(self) -> int:
        """Bytes used on one chip."""
        return self.budget.used(self.shape.num_pages)

    @property
    def kv_tokens(self) -> int:
        """Tokens that all pages hold."""
        return self.shape.num_pages * self.shape.batch.page_size

    @property
    def full_sequences(self) -> int:
        """Sequences of the longest context that the pages hold at once."""
        page_size = self.shape.batch.page_size
        return self.shape.num_pages // -(-self.shape.max_model_len // page_size)


def fit_memory(model: Model, mesh: AnyMesh, config: EngineConfig, chip: Chip) -> MemoryFit:
    """Counts what each chip of `mesh` holds: programs are estimated, all else is exact.

    Raises ConfigError with the missing bytes where the engine does not fit.
    """
    least = least_shape(model, mesh, config)
    budget = estimated_budget(model, mesh, config, least, platform=chip.platform)
    pages = _wanted_pages(config, budget)
    if budget.used(pages) > chip.usable_bytes:
        raise _too_large(budget, pages, chip)
    if not config.num_pages and not config.kv_bytes:
        pages = budget.pages_within(chip.usable_bytes)
    return MemoryFit(chip, with_pages(least, config, pages), budget)


def _too_large(budget: KVBudget, num_pages: int, chip: Chip) -> ConfigError:
    assert budget.largest is not None
    consumers = {
        "weights": budget.params,
        "slots": budget.slots,
        f"temporaries ({budget.largest.name})": budget.temporaries,
        "code": budget.code,
        "page moves": budget.moves,
        f"{num_pages} pages": num_pages * budget.page,
    }
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in consumers.items() if size)
    missing = budget.used(num_pages) - chip.usable_bytes
    return ConfigError(
        f"{missing / _GIB:.2f} GiB too much for a {chip.name} "
        f"({chip.usable_bytes / _GIB:.2f} GiB): {parts} GiB; use more chips "
        "(engine.tensor_parallel), a quantized model, fewer slots or a shorter context"
    )


def _wanted_pages(config: EngineConfig, budget: KVBudget) -> int:
    """Pages requested by the config, or the minimum an engine needs."""
    if config.num_pages:
        return config.num_pages
    if config.kv_bytes:
        return budget.pages_in_kv_bytes(config.kv_bytes)
    return -(-(config.max_model_len or 1) // (config.page_size * GRID)) * GRID
