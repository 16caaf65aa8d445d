"""The names of KV pages: one digest for the content of a page and of all pages before it.

A page is named by the page before it and its own tokens, the first page by a root. So equal names
mean equal tokens from the start on, computed with the same weights, and whoever knows the root can
name the pages of any prompt.
"""

from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from struct import Struct

from jserve.core.request import EngineInfo

DIGEST_BYTES = 16

Digest = bytes  # of DIGEST_BYTES


def root_digest(
    *, weights: str, kv_dtype: str, page_size: int, adapter: str = "", salt: str = ""
) -> Digest:
    """The name before the first page: pages of different roots never have equal names.

    Args:
        weights: digest of the model's weights.
        kv_dtype: type of the numbers in pages.
        page_size: tokens a page.
        adapter: digest of the adapter's weights, empty without one.
        salt: requests of different salts share nothing.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in (weights, kv_dtype, str(page_size), adapter, salt):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))  # or two parts could be cut elsewhere
        digest.update(data)
    return digest.digest()


def root_of(info: EngineInfo, cache_salt: str, adapter: str = "") -> Digest:
    """The root of the pages that an engine keeps for requests of `cache_salt`.

    Whoever has the engine's hello and a request names its pages with this and `page_digests`.
    """
    return root_digest(
        weights=info.weights,
        kv_dtype=info.kv_dtype,
        page_size=info.page_size,
        adapter=adapter,
        salt=cache_salt,
    )


def page_digests(parent: Digest, tokens: Sequence[int], page_size: int) -> list[Digest]:
    """The names of the full pages of `tokens`, which follow the page named `parent`."""
    pack = _packer(page_size)
    digests: list[Digest] = []
    for end in range(page_size, len(tokens) + 1, page_size):
        page = pack(*tokens[end - page_size : end])
        parent = blake2b(parent + page, digest_size=DIGEST_BYTES).digest()
        digests.append(parent)
    return digests


@cache
def _packer(page_size: int) -> Callable[..., bytes]:
    """Makes bytes of the tokens of a page; made once, since each costs as much as a digest."""
    # The machine of a gateway and that of its engine may order bytes differently.
    return Struct(f"<{page_size}i").pack  # int32, little-endian
