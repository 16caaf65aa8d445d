"""The certificate of both front ends, read anew when its files change."""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from jserve.core.errors import ConfigError
from jserve.gateway.config import GatewayConfig

_log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate chain and its key that belong together."""

    context: ssl.SSLContext  # for HTTP/1.1
    chain_pem: bytes
    key_pem: bytes


class TlsFiles:
    """Certificate and key on disk. `current` may be asked from several threads.

    A renewal replaces two files, one after the other. So a pair that does not fit, or is not whole,
    is not an error after the start: the last good one stays until the files change again.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Reads the files.

        Raises:
            ConfigError: one cannot be read, or they do not belong together.
        """
        self._paths = (certificate, key)
        self._stamp = self._stat()
        try:
            self._current = self._load()
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise ConfigError(
                f"gateway.tls_cert {str(certificate)!r} with gateway.tls_key {str(key)!r}: "
                f"{_reason(error)}"
            ) from error

    @classmethod
    def from_config(cls, config: GatewayConfig) -> Self | None:
        """The files that the config names; None without TLS."""
        # Not a check of the config itself, in which `--set` changes one field at a time.
        if (config.tls_cert is None) != (config.tls_key is None):
            raise ConfigError("gateway.tls_cert and gateway.tls_key need each other")
        if config.tls_cert is None or config.tls_key is None:
            return None
        return cls(Path(config.tls_cert), Path(config.tls_key))

    @property
    def current(self) -> Certificate:
        """The newest pair that fits; looks at the files' times."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._current = self._load()
            except (OSError, ValueError) as error:
                _log.warning("the TLS certificate stays as it is: %s", _reason(error))
            else:
                _log.info("the TLS certificate was read anew")
        return self._current

    def server_context(self) -> ssl.SSLContext:
        """A context for HTTP/1.1 whose every handshake uses the `current` certificate."""
        context = _context()
        context.load_cert_chain(*self._paths, password=_refuse_password)

        def choose(connection: ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self.current.context

        context.sni_callback = choose  # called in every handshake, also without a server's name
        return context

    def _load(self) -> Certificate:
        context = _context()
        context.load_cert_chain(*self._paths, password=_refuse_password)
        chain_pem, key_pem = (path.read_bytes() for path in self._paths)
        return Certificate(context, chain_pem, key_pem)

    def _stat(self) -> _Stamp:
        """What changes when a file does; a missing one counts, too."""
        return tuple(map(_stamp, self._paths))


def grpc_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a gRPC server whose every handshake uses the `current` certificate."""

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = files.current
        return grpc.ssl_server_certificate_configuration([(pair.key_pem, pair.chain_pem)])

    return grpc.dynamic_ssl_server_credentials(
        configuration(), configuration, require_client_authentication=False
    )


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def _refuse_password() -> str:
    raise ValueError("the key has a passphrase; give one without")  # OpenSSL would ask a terminal


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_mtime_ns, status.st_size, status.st_ino


def _reason(error: Exception) -> str:
    """What OpenSSL or the system says, without source lines of OpenSSL."""
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "no PEM certificate or key in it"
        return "they do not belong together" if reason == "KEY_VALUES_MISMATCH" else reason
    return (isinstance(error, OSError) and error.strerror) or str(error)
