"""TLS between hosts, and to NATS: each shows its certificate to the other, both of one authority."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

from proxy.errors import ConfigError

if TYPE_CHECKING:
    from proxy.config.fleet import FleetSettings


def client_context(settings: FleetSettings) -> ssl.SSLContext:
    """For connections that are made from here. Raises ConfigError."""
    certificate, key, ca = settings.certificate, settings.key, settings.ca
    assert certificate is not None  # noqa: S101 - the settings are complete
    assert key is not None  # noqa: S101
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigError("fleet", [f"{certificate} with {key} cannot be used: {_reason(error)}"]) from None
    try:
        context.load_verify_locations(ca)
    except OSError as error:
        raise ConfigError("fleet", [f"{ca} cannot be used: {_reason(error)}"]) from None
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase, which nobody could type; give one without")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason.lower().replace("_", " ") if error.reason else "not PEM"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
