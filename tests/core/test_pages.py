"""Names of pages, against a computation of their own from the specification."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.pages import DIGEST_BYTES, page_digests, root_digest, root_of
from jserve.core.request import EngineInfo

INFO = EngineInfo(
    model="m",
    vocab=49152,
    max_model_len=2048,
    num_slots=4,
    num_pages=100,
    page_size=4,
    max_queue=8,
    eos_token_ids=(2,),
    weights="a1b2",
    kv_dtype="float32",
)
tokens_of_prompts = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def expected_root(*parts: str) -> bytes:
    """The digest of each part's length, as 8 bytes, and its UTF-8 text."""
    data = b""
    for part in parts:
        text = part.encode()
        data += np.uint64(len(text)).astype("<u8").tobytes() + text
    return blake(data)


def test_a_root_is_the_digest_of_its_parts_with_their_lengths() -> None:
    expected = expected_root("a1b2", "float32", "4", "lora-7", "given:Grüße")
    assert root_of(INFO, "given:Grüße", "lora-7") == expected
    assert root_of(INFO, "") == expected_root("a1b2", "float32", "4", "", "")
    assert len(expected) == DIGEST_BYTES


def test_names_never_change() -> None:
    """Engines and gateways of two versions may name the same pages."""
    root = root_of(INFO, "tenant:alice")
    assert root.hex() == "1c509675fb0ad589d2d386b683412539"
    assert [it.hex() for it in page_digests(root, range(8), 4)] == [
        "cc9aa6dad6116b577f228005ec7fb63d",
        "0be046d7db7e6ba78e7256cda575e858",
    ]


@given(tokens_of_prompts, st.integers(1, 8))
def test_a_page_is_the_digest_of_its_parent_and_its_tokens(
    tokens: list[int], page_size: int
) -> None:
    parent, expected = b"r" * 16, []
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        page = np.asarray(tokens[start : start + page_size], dtype="<i4")
        parent = blake(parent + page.tobytes())
        expected.append(parent)
    assert page_digests(b"r" * 16, tokens, page_size) == expected


def test_only_full_pages_have_names() -> None:
    root = root_of(INFO, "")
    assert [len(page_digests(root, range(n), 4)) for n in (0, 3, 4, 5, 7, 8)] == [0, 0, 1, 1, 1, 2]


@given(tokens_of_prompts, tokens_of_prompts, st.integers(1, 8))
def test_a_name_does_not_depend_on_what_follows(
    tokens: list[int], more: list[int], page_size: int
) -> None:
    alone = page_digests(b"", tokens, page_size)
    assert page_digests(b"", tokens + more, page_size)[: len(alone)] == alone


@given(tokens_of_prompts.filter(lambda tokens: len(tokens) >= 8), st.data())
def test_a_name_depends_on_every_token_before(tokens: list[int], data: st.DataObject) -> None:
    changed = data.draw(st.integers(0, len(tokens) // 4 * 4 - 1))
    others = [*tokens]
    others[changed] ^= 1
    names, other_names = page_digests(b"", tokens, 4), page_digests(b"", others, 4)
    equal = [one == other for one, other in zip(names, other_names, strict=True)]
    assert equal == [page < changed // 4 for page in range(len(names))]


def test_pages_are_named_after_any_page() -> None:
    root, tokens = root_of(INFO, ""), tuple(range(100, 116))
    names = page_digests(root, tokens, 4)
    for page, (parent, _) in enumerate(pairwise([root, *names])):
        assert page_digests(parent, tokens[4 * page :], 4) == names[page:]


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "a1b3"},
        {"kv_dtype": "bfloat16"},
        {"page_size": 8},
        {"adapter": "lora-7"},
        {"salt": "given:x"},
        {"salt": "tenant:x"},
        {"weights": "a1b2f", "kv_dtype": "loat32"},  # the same text, cut elsewhere
        {"weights": "", "salt": "a1b2"},
    ],
)
def test_another_root_changes_every_name(changed: dict[str, Any]) -> None:
    parts: dict[str, Any] = {
        "weights": "a1b2",
        "kv_dtype": "float32",
        "page_size": 4,
        "adapter": "",
        "salt": "",
    }
    other_parts = parts | changed
    names = page_digests(root_digest(**parts), range(32), 4)
    other_names = page_digests(root_digest(**other_parts), range(32), 4)
    assert len(names) == 8
    assert not set(names) & set(other_names)


def test_what_does_not_change_pages_does_not_change_names() -> None:
    other = replace(INFO, model="another", num_slots=1, num_pages=7, max_queue=0, numerics="n")
    assert root_of(other, "given:x") == root_of(INFO, "given:x")
