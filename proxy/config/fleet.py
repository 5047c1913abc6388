"""The section `fleet`: several hosts as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from proxy.config.fields import Section
from proxy.config.server import TlsSettings


def _is_base(url: str) -> str:
    """Raises ValueError unless it is https://HOST:PORT."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or not parts.port or parts.netloc != url[8:] or "@" in url:
        raise ValueError("must be https://HOST:PORT")
    return url


class NatsSettings(Section):
    """The NATS servers by which hosts learn of each other."""

    servers: list[Annotated[str, Field(pattern=r"^(nats|tls)://[0-9A-Za-z.:\[\]-]+:[0-9]+$")]] | None = Field(
        default=None,
        min_length=1,
        description="Their addresses; the first that answers is used. tls:// asks for TLS, with fleet.ca.",
        examples=[["tls://nats-1:4222", "tls://nats-2:4222"]],
    )
    user: str | None = Field(
        default=None, min_length=1, description="The user to log in as; default: fleet.host.", examples=["gpu-1"]
    )
    password_file: Path | None = Field(
        default=None,
        description="File with the user's password; without, only the certificate says who this is.",
        examples=["/etc/warmpool/fleet/nats-password"],
    )
    subject: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")] = Field(
        default="warmpool", description="What the subjects of this fleet begin with."
    )


class FleetSettings(Section):
    """Several hosts as one; needs the extra `fleet`."""

    host: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] | None = Field(
        default=None,
        description="This host's name in the fleet, which its certificate has too; without, it stands alone.",
        examples=["gpu-1"],
    )
    url: Annotated[str, AfterValidator(_is_base)] | None = Field(
        default=None,
        description="Where the other hosts reach this one's listener for them, which has this port.",
        examples=["https://10.0.0.1:8443"],
    )
    listen: str = Field(
        default="0.0.0.0",  # noqa: S104 - nobody comes in without a certificate
        min_length=1,
        description="Address to listen on for them.",
    )
    certificate: Path | None = Field(
        default=None,
        description="This host's certificate, PEM, with fleet.host among its DNS names.",
        examples=["/etc/warmpool/fleet/cert.pem"],
    )
    key: Path | None = Field(
        default=None,
        description="Its private key, PEM; nobody else may read it.",
        examples=["/etc/warmpool/fleet/key.pem"],
    )
    ca: Path | None = Field(
        default=None,
        description="The authority that signs the hosts' certificates, and nobody else's, PEM.",
        examples=["/etc/warmpool/fleet/ca.pem"],
    )
    nats: NatsSettings = NatsSettings()

    @property
    def tls(self) -> TlsSettings:
        """For the listener: whoever comes in shows a certificate of the same authority."""
        return TlsSettings(certificate=self.certificate, key=self.key, client_ca=self.ca, minimum_version="1.3")

    @model_validator(mode="after")
    def _complete(self) -> FleetSettings:
        if self.host is not None:
            missing = [name for name in ("url", "certificate", "key", "ca") if getattr(self, name) is None]
            missing += ["nats.servers"] if not self.nats.servers else []
            if missing:
                raise ValueError(f"fleet.host needs {', '.join(f'fleet.{name}' for name in missing)} too")
        return self
