"""TLS of the server: certificate, key and client authorities from files, which can be read again while it serves."""

from __future__ import annotations

import os
import ssl
import stat
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from proxy.config.server import TlsSettings

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class Tls:
    """A context for listening whose certificates can be changed; open connections keep theirs."""

    def __init__(self, settings: TlsSettings) -> None:
        """Reads the files. Raises ConfigError."""
        self._settings = settings
        self._current = _load(settings)
        # A context in use cannot be emptied of what it has loaded, so each handshake is handed the current one.
        self.context = _load(settings)
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def reload(self) -> None:
        """Read the files again, for new connections. Raises ConfigError and changes nothing."""
        self.take(self.read())

    def read(self) -> ssl.SSLContext:
        """What the files have now, in any thread. Raises ConfigError."""
        return _load(self._settings)

    def take(self, context: ssl.SSLContext) -> None:
        """Have what was read in force, for new connections."""
        self._current = context


def names_in(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """The DNS names in a certificate, as `ssl` shows it."""
    found = (certificate or {}).get("subjectAltName", ())
    return frozenset(name for kind, name in found if kind == "DNS")


def _load(settings: TlsSettings) -> ssl.SSLContext:
    certificate, key = settings.certificate, settings.key
    assert certificate is not None  # noqa: S101 - Tls is for settings that have one
    assert key is not None  # noqa: S101
    _check_private(key)
    for path in filter(None, (certificate, key, settings.client_ca)):
        if path.exists() and not path.is_file():
            raise ConfigError("server.tls", [f"{path} is not a plain file"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[settings.minimum_version]
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigError("server.tls", [f"{certificate} with {key} cannot be used: {_reason(error)}"]) from None
    if settings.client_ca is not None:
        try:
            context.load_verify_locations(settings.client_ca)
        except OSError as error:
            raise ConfigError("server.tls", [f"{settings.client_ca} cannot be used: {_reason(error)}"]) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which nobody could type; give one without")


def _check_private(key: Path) -> None:
    try:
        mode = key.stat().st_mode
    except OSError as error:
        raise ConfigError("server.tls", [f"{key} cannot be read: {error.strerror}"]) from None
    if mode & 0o027:
        raise ConfigError(
            "server.tls",
            [f"{key} has mode {stat.S_IMODE(mode):04o}: others may read it, or the group write it; chmod 600 {key}"],
        )


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason.lower().replace("_", " ") if error.reason else "not PEM"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
