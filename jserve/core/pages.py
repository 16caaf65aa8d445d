"""The names of KV pages: one digest for the content of a page and of all pages before it.

A page is named by the page before it and its own tokens, the first page by a root. So equal names
mean equal tokens from the start on, computed with the same weights, and whoever knows the root can
name the pages of any prompt.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

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


def page_digests(parent: Digest, tokens: Sequence[int], page_size: int) -> list[Digest]:
    """The names of the full pages of `tokens`, which follow the page named `parent`."""
    data = memoryview(array("i", tokens)).cast("B")  # int32
    size = 4 * page_size
    digests: list[Digest] = []
    for start in range(0, len(data) - size + 1, size):
        parent = blake2b(
            parent + bytes(data[start : start + size]), digest_size=DIGEST_BYTES
        ).digest()
        digests.append(parent)
    return digests
