"""The bytes of a compiled program on disk: a seal, the trees of its arguments, JAX's payload.

The seal is an HMAC of all that follows it and of the entry's name. It is checked before a byte of
the rest is parsed: JAX's payload is a pickle, and XLA may crash on a program that is not what it
wrote. The trees are JSON, of containers and of this package's named tuples.
"""

import hashlib
import hmac
import importlib
import json
import struct
from typing import Any, NamedTuple, cast

import jax

_SEAL_BYTES = hashlib.sha256().digest_size
_LENGTH = struct.Struct("<Q")
_PACKAGE = "jserve."  # named tuples of other packages are not looked up


class StoredProgram(NamedTuple):
    """A compiled program as `serialize_executable.serialize` returns it."""

    payload: bytes
    in_tree: Any  # a PyTreeDef
    out_tree: Any


def seal(program: StoredProgram, secret: bytes, name: str) -> bytes:
    """The bytes of the entry `name`. Raises TypeError for trees that cannot be written."""
    trees = [_encode(_unflatten(tree)) for tree in (program.in_tree, program.out_tree)]
    header = json.dumps(trees).encode()
    body = b"".join((_LENGTH.pack(len(header)), header, program.payload))
    return _digest(body, secret, name) + body


def unseal(stored: bytes, secret: bytes, name: str) -> StoredProgram:
    """Reads what `seal` made. Raises ValueError for anything else, of which nothing is parsed."""
    digest, body = stored[:_SEAL_BYTES], stored[_SEAL_BYTES:]
    if not hmac.compare_digest(_digest(body, secret, name), digest):
        raise ValueError("its bytes have changed, or were not written by this user")
    (length,) = _LENGTH.unpack_from(body)
    start = _LENGTH.size + length
    trees = [jax.tree.structure(_decode(tree)) for tree in json.loads(body[_LENGTH.size : start])]
    return StoredProgram(body[start:], *trees)


def _digest(body: bytes, secret: bytes, name: str) -> bytes:
    return hmac.digest(secret, name.encode() + b"\0" + body, hashlib.sha256)


def _unflatten(tree: Any) -> Any:
    return jax.tree.unflatten(tree, [0] * tree.num_leaves)


def _encode(node: Any) -> Any:
    """A tree whose leaves are 0 as JSON: 0, null, or [kind, names of the children, children]."""
    kind = type(cast(object, node))
    if node is None or kind is int:
        return node
    if kind in (list, tuple):
        return [kind.__name__, [], [_encode(child) for child in node]]
    if kind is dict and all(isinstance(key, str) for key in node):
        return ["dict", list(node), [_encode(child) for child in node.values()]]
    if issubclass(kind, tuple) and kind.__module__.startswith(_PACKAGE):
        names: tuple[str, ...] = kind._fields  # pyright: ignore  a named tuple
        place = f"{kind.__module__}:{kind.__qualname__}"
        return [place, list(names), [_encode(child) for child in node]]
    raise TypeError(f"a program with a {kind.__qualname__} in its arguments cannot be kept")


def _decode(node: Any) -> Any:
    if node is None or node == 0:
        return node
    kind, names, children = node
    values = [_decode(child) for child in children]
    if kind == "list":
        return values
    if kind == "tuple":
        return tuple(values)
    if kind == "dict":
        return dict(zip(names, values, strict=True))
    module, _, name = kind.partition(":")
    found = getattr(importlib.import_module(module), name)
    if list(found._fields) != names:
        raise ValueError(f"{kind} has other fields now")
    return found(*values)
