"""Proof that both ends of a session over TCP hold the same token, which is never sent.

Each end proves itself by an HMAC over the nonces of both, so neither a stranger who takes the port
of a dead engine nor one who connects to a live engine gets anything that it could use.
"""

import enum
import hashlib
import hmac
import secrets

NONCE_KEY = "jserve-nonce"  # metadata: of the gateway in the call, of the engine in the answer
PROOF_KEY = "jserve-proof-bin"  # metadata: the engine's proof, beside its nonce
MIN_TOKEN_BYTES = 32
_MAX_NONCE_CHARS = 128


class Side(enum.Enum):
    """The end that proves itself; one end's proof is worthless as the other's."""

    ENGINE = b"jserve engine"
    GATEWAY = b"jserve gateway"


def new_nonce() -> str:
    """A text that no session has used before."""
    return secrets.token_hex(32)


def proof(token: str, side: Side, gateway_nonce: str, engine_nonce: str) -> bytes:
    """The proof by `side` that it holds `token`, for one session."""
    message = b"\0".join((side.value, gateway_nonce.encode(), engine_nonce.encode()))
    return hmac.digest(token.encode(), message, hashlib.sha256)


def is_proof(
    given: bytes | str | None, token: str, side: Side, gateway_nonce: str, engine_nonce: str
) -> bool:
    """Whether `given` is the proof by `side`; takes the same time for every wrong one."""
    expected = proof(token, side, gateway_nonce, engine_nonce)
    return isinstance(given, bytes) and hmac.compare_digest(given, expected)


def nonce_of(metadata: object) -> str | None:
    """The nonce in a call's metadata; None if there is none of a plausible length."""
    found = _value(metadata, NONCE_KEY)
    return found if isinstance(found, str) and 0 < len(found) <= _MAX_NONCE_CHARS else None


def proof_of(metadata: object) -> bytes | None:
    """The engine's proof in a call's metadata."""
    found = _value(metadata, PROOF_KEY)
    return found if isinstance(found, bytes) else None


def _value(metadata: object, wanted: str) -> object:
    pairs: list[tuple[str, object]] = list(metadata or ())  # type: ignore[call-overload]
    return next((value for key, value in pairs if key == wanted), None)
