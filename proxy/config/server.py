"""The section `server`: where clients reach the proxy, and what it takes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import ByteSize, Field, model_validator

from proxy.config.fields import Count, Duration, Memory, OptionalDuration, PositiveInt, Section, Size
from proxy.config.values import format_duration, is_loopback

MIN_HEARTBEAT_S: Final = 0.1


class LimitSettings(Section):
    """What a client may take of the server; a request or connection that is over a limit is refused."""

    url: Size = Field(default=ByteSize(8 << 10), description="Longest path with its query.")
    headers: PositiveInt = Field(default=100, description="Most headers of a request.")
    header: Size = Field(default=ByteSize(16 << 10), description="Longest header, name and value.")
    head: Size = Field(default=ByteSize(64 << 10), description="Longest request line with all its headers.")
    head_timeout: Duration = Field(
        default=10.0,
        description="From the first byte of a request to the end of its headers, and for a TLS handshake.",
    )
    upload_timeout: Duration = Field(default=30.0, description="How long a body may take, beside upload_rate.")
    upload_rate: Size = Field(
        default=ByteSize(16 << 10), description="Each so many bytes of a body give it a second more."
    )
    idle_timeout: Duration = Field(default=75.0, description="How long a connection is kept between two requests.")
    stall_timeout: OptionalDuration = Field(
        default=120.0, description="How long a client may take nothing of an answer that waits for it."
    )
    connections: PositiveInt = Field(
        default=16_000, description="Most connections at once; fewer where the limit of open files leaves fewer."
    )
    connections_per_address: Count = Field(
        default=1000,
        description="Most connections of one client address (of one /64 with IPv6) at once; 0 is no limit. Loopback "
        "has none.",
    )

    @model_validator(mode="after")
    def _usable(self) -> LimitSettings:
        for name in ("url", "header", "head", "upload_rate"):
            if getattr(self, name) < 256:
                raise ValueError(f"{name} must be 256 bytes at least")
        if self.head < self.url:
            raise ValueError("head must be as large as url at least: it includes it")
        for name in ("head_timeout", "upload_timeout", "idle_timeout", "stall_timeout"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be more than 0s")
        return self


class TlsSettings(Section):
    """HTTPS. The files are read again on SIGHUP; connections that are open stay."""

    certificate: Path | None = Field(
        default=None,
        description="Certificate with its chain, PEM; with it the server speaks HTTPS only.",
        examples=["/etc/warmpool/tls/fullchain.pem"],
    )
    key: Path | None = Field(
        default=None,
        description="Its private key, PEM; nobody else may read it.",
        examples=["/etc/warmpool/tls/privkey.pem"],
    )
    minimum_version: Literal["1.2", "1.3"] = Field(default="1.2", description="Lowest version of TLS.")
    client_ca: Path | None = Field(
        default=None,
        description="Clients must have a certificate of one of these authorities, PEM.",
        examples=["/etc/warmpool/tls/clients.pem"],
    )

    @model_validator(mode="after")
    def _complete(self) -> TlsSettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or none")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key")
        return self


class CorsSettings(Section):
    """Which web pages may use the API from a browser; never the admin routes."""

    origins: list[Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/ ]+)$")]] = Field(
        default=[],
        description='Origins such as "https://chat.example.org"; all of a scheme that only programs on the user\'s own '
        'machine have, such as "vscode-webview://*" or "app://*"; or "*"; none: no page may.',
    )
    max_age: Duration = Field(default=600.0, description="How long a browser may remember the answer.")

    @model_validator(mode="after")
    def _stars_mean_what_they_say(self) -> CorsSettings:
        for origin in self.origins:
            scheme, _, rest = origin.partition("://")
            if "*" in rest and rest != "*":
                raise ValueError(f"{origin!r}: a * stands for all of a scheme (app://*), not for part of a name")
            if rest == "*" and scheme in ("http", "https"):
                raise ValueError(f'{origin!r} is nearly every page: name single origins, or "*" if any page may')
        return self


class AdminSettings(Section):
    """Who may use /metrics and /admin/: without socket and token, processes of this host by loopback."""

    token_file: Path | None = Field(
        default=None,
        description="File with the admin token (`warmpool key admin-token` makes it), asked of everybody who comes by "
        "the port. Read again on SIGHUP.",
        examples=["/etc/warmpool/admin-token"],
    )
    socket: Path | None = Field(
        default=None,
        description="A unix socket (made, mode 0600) by which no token is needed. With it and without a token the port "
        "has no admin routes.",
        examples=["/run/warmpool/admin.sock"],
    )
    socket_group: str | None = Field(
        default=None, min_length=1, description="The group that may use the socket too (mode 0660).", examples=["ops"]
    )

    @model_validator(mode="after")
    def _group_of_something(self) -> AdminSettings:
        if self.socket_group is not None and self.socket is None:
            raise ValueError("socket_group needs socket")
        return self

    @property
    def is_on_port(self) -> bool:
        """Whether the port has the admin routes, for whoever may use them."""
        return self.socket is None or self.token_file is not None


class ServerSettings(Section):
    """Where clients reach the proxy, and what it takes from them."""

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on. Other ones than loopback need keys_file, tls.client_ca or allow_anyone.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8080, description="Port to listen on; 0 picks a free one."
    )
    keys_file: Path | None = Field(
        default=None,
        description="File with the API keys (`warmpool key new` makes it); with it every request needs one. Read again "
        "on SIGHUP.",
        examples=["/etc/warmpool/keys.toml"],
    )
    hosts: list[Annotated[str, Field(pattern=r"^[0-9A-Za-z]([0-9A-Za-z.-]{0,252})$")]] = Field(
        default=[],
        description="Host names, beside localhost and addresses, by which clients may use models without keys on "
        'loopback: the name that a proxy on this host passes on, a name in /etc/hosts. Example: ["llm.example.org"]. '
        "Other names are refused, since a web page can make its own point here.",
    )
    allow_anyone: bool = Field(
        default=False,
        description="Listen on other addresses than loopback without keys: whoever reaches the port may use every "
        "model.",
    )
    body_limit: Memory = Field(default=ByteSize(32 << 20), description="Largest request body.")
    drain_timeout: Duration = Field(
        default=30.0, description="On SIGTERM: how long running and waiting requests may take to finish."
    )
    default_model: str | None = Field(
        default=None,
        min_length=1,
        description="A model's name, for requests that name none; without, they are refused.",
        examples=["org/Model-7B"],
    )
    watch: bool = Field(
        default=False,
        description="Reload, as on SIGHUP, when the configuration's file has changed; one that cannot be used changes "
        "nothing.",
    )
    azure_paths: bool = Field(
        default=False,
        description="Serve Azure OpenAI's paths too: /openai/deployments/MODEL/chat/completions and such, where MODEL "
        "is a model's name and api-version is not looked at.",
    )
    usage_days: Annotated[int, Field(ge=0, le=3660)] = Field(
        default=92,
        description="How many days usage by key and model is kept for, in pool.state_dir (`warmpool key usage`); "
        "0: not over a restart.",
    )
    heartbeat: OptionalDuration = Field(
        default=None,
        description="While a streaming request waits for an engine: how often it is sent a comment, so that its client "
        "and what is between do not give up. The status, 200, goes out with the first.",
    )
    limits: LimitSettings = LimitSettings()
    tls: TlsSettings = TlsSettings()
    cors: CorsSettings = CorsSettings()
    admin: AdminSettings = AdminSettings()

    websocket_idle_timeout: OptionalDuration = Field(
        default=600.0, description="How long a WebSocket may be without a message, either way, before it is closed."
    )

    @model_validator(mode="after")
    def _not_without_pause(self) -> ServerSettings:
        if self.heartbeat is not None and self.heartbeat < MIN_HEARTBEAT_S:
            raise ValueError(f"heartbeat must be at least {format_duration(MIN_HEARTBEAT_S)}")
        return self

    @model_validator(mode="after")
    def _not_open_by_accident(self) -> ServerSettings:
        if not is_loopback(self.host) and not self.authenticates_clients and not self.allow_anyone:
            raise ValueError(
                f"{self.host} can be reached by others, and there are no keys: set keys_file (`warmpool key new`) or "
                "tls.client_ca, or allow_anyone = true if whoever reaches the port may use every model"
            )
        return self

    @property
    def authenticates_clients(self) -> bool:
        """Whether clients have to show who they are."""
        return self.keys_file is not None or self.tls.client_ca is not None
