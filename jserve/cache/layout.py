"""The page groups of a model, by which its layers share KV pages. Plain data, from its spec."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGroup:
    """Layers whose pages are allocated together: a page id means a page in each of them."""

    name: str
    layers: tuple[int, ...]
    window: int  # tokens that its pages must keep; 0: all
    page_size: int  # tokens a page
    page_bytes: int  # bytes of one page, K and V, over all its layers and devices


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The page groups of a model, which share one range of page ids.

    Raises:
        ConfigError: there is no group, two have one name, or a page holds no token.
    """

    groups: tuple[PageGroup, ...]

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"page groups are {names}; there must be one, and no name twice")
        for group in self.groups:
            if group.page_size < 1:
                raise ConfigError(f"page_size is {group.page_size}; it must be at least 1")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every group."""
        return sum(group.page_bytes for group in self.groups)


def kv_layout(spec: ModelSpec, *, page_size: int, kv_heads: int, value_bytes: int) -> KVLayout:
    """The layout of `spec`: one group of all layers, which keeps every token.

    A page stores `kv_heads` heads, of numbers of `value_bytes` bytes. Layers with
    a sliding window are in the same group: their pages keep tokens that they no longer read.
    """
    layers = tuple(range(spec.layers))
    token_bytes = 2 * kv_heads * spec.head_dim * spec.layers * value_bytes
    group = PageGroup(
        name="all", layers=layers, window=0, page_size=page_size, page_bytes=page_size * token_bytes
    )
    return KVLayout((group,))


def single_group(page_size: int) -> KVLayout:
    """A layout of one group of one layer whose bytes nobody counts: for schedulers alone."""
    group = PageGroup(name="all", layers=(0,), window=0, page_size=page_size, page_bytes=0)
    return KVLayout((group,))
