"""Settings: one TOML file, every key overridable by environment, validated whole before anything starts.

Loading and validating is pydantic-settings' work; this module says which keys there are, what they mean and what is
allowed. Durations are text with a unit (``"90s"``, ``"1m30s"``, ``"500ms"``) and become seconds; sizes are text with a
unit (``"16GiB"``) or bytes. Environment names are ``WARMPOOL_`` and the path of the key joined by ``__``
(``WARMPOOL_MODELS__DEMO__IDLE__SLEEPING=10s``); they win over the file.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from proxy.config.masking import mask_urls
from proxy.errors import ConfigError, ModelNotFoundError
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ENGINE_TABLES: Final = ("process", "podman")
"""The tables of a model that say what its engine is; each is the name of a runtime."""
ENV_PREFIX = "WARMPOOL_"
ENV_DELIMITER = "__"
RESERVED_ENV = frozenset({"WARMPOOL_CONFIG", "WARMPOOL_INSTANCE_ID", "WARMPOOL_URL", "WARMPOOL_TOKEN_FILE"})
"""Names with the prefix that are not keys: where the file is, the mark on every engine process, and where the commands
find a server."""

MIN_HEARTBEAT_S: Final = 0.1
RESEED_FIELDS: Final = ("host", "port", "model", "instance")
"""What is replaced in `reseed.command`."""
_WORKER_EXTENSION: Final = "--worker-extension-cls"

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_NEVER = frozenset({"never", "off"})
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


def parse_duration(value: object) -> float:
    """Seconds of a duration such as ``"90s"``, ``"1m30s"`` or ``"250ms"``.

    Raises ValueError for anything else; a bare number too, since its unit would be a guess.
    """
    if isinstance(value, str) and _DURATION.fullmatch(value.strip()):
        return sum(float(n) * _UNITS_S[unit] for n, unit in _DURATION_PART.findall(value))
    raise ValueError('a duration needs a unit: "500ms", "90s", "1m30s", "2h" or "1d"')


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back as `seconds` (to the millisecond)."""
    left_ms = round(seconds * 1000)
    parts = []
    for unit, size_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left_ms = divmod(left_ms, size_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"


def _parse_optional_duration(value: object) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in _NEVER):
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise ValueError(f'{error}, or "never"') from None


def _format_optional_duration(seconds: float | None) -> str:
    return "never" if seconds is None else format_duration(seconds)


def format_size(count: int) -> str:
    """A size in the largest binary unit that divides it: ``"16GiB"``, ``"1536KiB"``, ``"100B"``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count}B"


def default_state_dir() -> Path:
    """Where state is kept when nothing says where: the same folder whatever the working directory is."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/warmpool")
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return home / "warmpool"


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{str(path)!r} is not an absolute path")
    return path


Duration = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(format_duration)]
OptionalDuration = Annotated[
    float | None, BeforeValidator(_parse_optional_duration), PlainSerializer(_format_optional_duration)
]
Size = Annotated[ByteSize, PlainSerializer(format_size)]
Port = Annotated[int, Field(ge=1, le=65535)]
ActionName = Literal[
    "pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume", "network-lock",
    "network-unlock", "setup-namespaces", "post-setup-namespaces",
]  # fmt: skip
"""The points at which CRIU runs action scripts (criu.org/Action_scripts)."""
PortRange = Annotated[str, Field(pattern=r"^\d{1,5}-\d{1,5}$")]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
ModelKey = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
ArgumentList = Annotated[list[str], Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LimitSettings(_Section):
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


class TlsSettings(_Section):
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


class CorsSettings(_Section):
    """Which web pages may use the API from a browser; never the admin routes."""

    origins: list[Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/ ]+)$")]] = Field(
        default=[], description='Origins such as "https://chat.example.org", or "*"; none: no page may.'
    )
    max_age: Duration = Field(default=600.0, description="How long a browser may remember the answer.")


class AdminSettings(_Section):
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


class ServerSettings(_Section):
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
    body_limit: Size = Field(default=ByteSize(32 << 20), description="Largest request body.")
    drain_timeout: Duration = Field(
        default=30.0, description="On SIGTERM: how long running and waiting requests may take to finish."
    )
    default_model: str | None = Field(
        default=None,
        min_length=1,
        description="A model's name, for requests that name none; without, they are refused.",
        examples=["org/Model-7B"],
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
        if not is_loopback(self.host) and not self.guarded and not self.allow_anyone:
            raise ValueError(
                f"{self.host} can be reached by others, and there are no keys: set keys_file (`warmpool key new`) or "
                "tls.client_ca, or allow_anyone = true if whoever reaches the port may use every model"
            )
        return self

    @property
    def guarded(self) -> bool:
        """Whether clients have to show who they are."""
        return self.keys_file is not None or self.tls.client_ca is not None


def is_loopback(host: str) -> bool:
    """Whether only processes of this host reach an address; names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class PoolSettings(_Section):
    """What all models share."""

    max_awake: Count = Field(
        default=0,
        description="How many instances may be awake at once, over all models; 0 is no limit. An idle instance of one "
        "model steps down to make room for another.",
    )
    prewarm: Count = Field(
        default=4,
        description="After a start, as after a reboot: the checkpoints of how many models are brought back to tmpfs in "
        "the background if they are not there, those used most first; and all that an upgrade made useless. 0: none.",
    )
    max_queue: PositiveInt = Field(default=10_000, description="How many requests may wait at once, over all models.")
    priority_head_start: Duration = Field(
        default=60.0,
        description="A request of a higher priority (of its API key) is served before one that came up to this much "
        "earlier, for each class between them; after that, the earlier one.",
    )
    switch_after: Duration = Field(
        default=10.0,
        description="With max_awake reached and no idle instance: how long a request waits before a busy instance of "
        "another model is closed to new requests, so that it becomes idle.",
    )
    gpu_creep: Size = Field(
        default=ByteSize(512 << 20),
        description="How much more GPU memory an engine may hold than when it was started or restored. One that holds "
        "more and has a checkpoint ends when it is idle, and is restored from it; 0 is any amount.",
    )
    engine_log_size: Size = Field(
        default=ByteSize(64 << 20),
        ge=64 << 10,
        description="How large an engine's log may grow; then its older half goes (of a container: all of it). "
        "A container keeps the limit that it was made with.",
    )
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="Folder for engine logs and records (made, mode 0700). Default: $STATE_DIRECTORY, which systemd "
        "sets; without it /var/lib/warmpool for root, and warmpool in the user's own folder for state "
        "($XDG_STATE_HOME, ~/.local/state) for others.",
        examples=["/var/lib/warmpool"],
    )
    checkpoint_dir: Path = Field(
        default=Path("/mnt/checkpoint-ram"),
        description="Folder for checkpoint images, on tmpfs (made, mode 0700).",
    )
    checkpoint_size: Annotated[str, Field(pattern=r"^(0|[1-9]\d*(KiB|MiB|GiB)|[1-9]\d?%|100%)$")] = Field(
        default="50%",
        description='Size of the tmpfs that `warmpool install` mounts at checkpoint_dir, as "200GiB" or as a share of '
        'the memory ("50%"); "0" mounts none, and none is mounted below /dev/shm and /run.',
    )
    checkpoint_reserve: Size = Field(
        default=ByteSize(256 << 20),
        description="Free space to leave in checkpoint_dir; a checkpoint that would go below is not begun.",
    )
    memory_reserve: Size = Field(
        default=ByteSize(256 << 20),
        description="Host memory to leave free, of the host or of the smallest cgroup that warmpool is in: a wake that "
        "would go below makes others step down, or is refused.",
    )
    memory_check: bool = Field(
        default=True, description="Keep account of host memory; without, the kernel's OOM killer decides."
    )
    archive_copies: bool = Field(
        default=True,
        description="With archive_dir: keep a copy of every golden checkpoint there, written in the background, which "
        "survives a reboot.",
    )
    archive_dir: Path | None = Field(
        default=None,
        description="Folder on disk for archived checkpoints (made, mode 0700); without, there is no tier archived.",
        examples=["/var/lib/warmpool/archive"],
    )


class _Ports(_Section):
    """Settings with a range of ports."""

    ports: PortRange

    @model_validator(mode="after")
    def _ports_are_a_range(self) -> Self:
        first, last = self.port_range()
        if not 1024 <= first <= last <= 65535:
            raise ValueError("ports must be FIRST-LAST with 1024 <= FIRST <= LAST <= 65535")
        return self

    def port_range(self) -> tuple[int, int]:
        """First and last port, both included."""
        first, last = self.ports.split("-")
        return int(first), int(last)


class ProcessRuntimeSettings(_Ports):
    """Engines as plain local processes."""

    ports: PortRange = Field(
        default="18100-18999",
        description="Loopback ports for engines. Outside the kernel's ephemeral range, or a restored engine may find "
        "its port taken.",
    )
    criu: str = Field(default="criu", description="The CRIU binary: a name in PATH, or a path.")
    stop_grace: Duration = Field(default=5.0, description="Time between SIGTERM and SIGKILL of an engine.")


class PodmanRuntimeSettings(_Ports):
    """Engines in podman containers (rootful)."""

    ports: PortRange = Field(
        default="19100-19999",
        description='Loopback ports for engines with network = "host", outside the kernel\'s ephemeral range.',
    )
    socket: Path = Field(
        default=Path("/run/podman/podman.sock"),
        description="podman's REST API. Where nobody listens there, warmpool starts `podman system service` itself.",
    )
    timeout: Duration = Field(
        default=20.0,
        gt=0,
        description="How long podman's service may take to answer, beside the time that the work of a call takes; then "
        "the call has failed. A service of warmpool's own that says nothing for as long is started again.",
    )
    stop_grace: Duration = Field(
        default=10.0, description="Time between SIGTERM and SIGKILL of an engine; whole seconds."
    )
    on_exit: Literal["keep", "stop"] = Field(
        default="keep",
        description="What becomes of running engines when warmpool ends: kept for the next one to adopt, or stopped.",
    )


class RuntimeSettings(_Section):
    """The runtimes that start engines."""

    process: ProcessRuntimeSettings = ProcessRuntimeSettings()
    podman: PodmanRuntimeSettings = PodmanRuntimeSettings()


class IdleSettings(_Section):
    """The idle timetable: how long after its last request an instance steps down to each tier."""

    sleeping: OptionalDuration = Field(
        default=30.0, description="Asleep by the engine's own sleep mode, where it has one."
    )
    suspended: OptionalDuration = Field(default=120.0, description="Suspended: frozen, and its GPU memory in host RAM.")
    checkpointed: OptionalDuration = Field(default=600.0, description="Checkpointed: an image on tmpfs, no process.")
    archived: OptionalDuration = Field(
        default=None, description="Archived: the image compressed on disk, in pool.archive_dir."
    )
    stopped: OptionalDuration = Field(
        default=None, description="Stopped: the instance is removed, and its image unless other instances share it."
    )

    @model_validator(mode="after")
    def _colder_is_later(self) -> IdleSettings:
        previous_name, previous_s = "", 0.0
        for name in ("sleeping", "suspended", "checkpointed", "archived", "stopped"):
            after_s = getattr(self, name)
            if after_s is None:
                continue
            if after_s < previous_s:
                raise ValueError(f"{name} comes before {previous_name}: a colder tier must have the longer time")
            previous_name, previous_s = name, after_s
        return self

    def timetable(self) -> Mapping[Tier, float]:
        """Tier → seconds of idleness after which an instance should be there; tiers set to "never" are missing."""
        times = {
            Tier.SLEEPING: self.sleeping,
            Tier.SUSPENDED: self.suspended,
            Tier.CHECKPOINTED: self.checkpointed,
            Tier.ARCHIVED: self.archived,
            Tier.STOPPED: self.stopped,
        }
        return {tier: after_s for tier, after_s in times.items() if after_s is not None}


class HealthSettings(_Section):
    """How it is known that an engine serves."""

    path: Annotated[str, Field(pattern=r"^/[!-~]*$")] = Field(
        default="/health", description="Answers 200 when the engine serves."
    )
    interval: Duration = Field(default=0.1, description="Time between two questions while it starts.")


class WarmupSettings(_Section):
    """Requests sent to a started engine before it serves, so that caches and compiled code are in the checkpoint."""

    requests: Count = Field(default=1, description="How many.")
    prompt: str = Field(default="Hello, world.", min_length=1, description="The prompt of each.")
    max_tokens: PositiveInt = Field(default=8, description="Tokens to generate for each.")


def _check_fields(command: Iterable[str], known: tuple[str, ...]) -> None:
    for argument in command:
        for name in re.findall(r"\{(\w*)\}", argument):
            if name not in known:
                raise ValueError(f"command: {{{name}}} is not one of {', '.join(f'{{{k}}}' for k in known)}")
    if not any("{port}" in argument for argument in command):
        raise ValueError("command: {port} is missing; warmpool chooses the port the engine has to listen on")


class ProcessEngineSettings(_Section):
    """An engine as a local process tree."""

    command: ArgumentList = Field(
        description="Program and arguments. {host}, {port} and {model} are replaced, {python} is the interpreter that "
        "runs warmpool."
    )
    env: dict[str, SecretStr] = Field(default={}, description="Environment added to warmpool's own.")
    cwd: Path | None = Field(
        default=None, description="Working directory; default is warmpool's own.", examples=["/srv/demo"]
    )

    @model_validator(mode="after")
    def _fields_exist(self) -> ProcessEngineSettings:
        _check_fields(self.command, ("host", "port", "model", "python"))
        return self


class VolumeSettings(_Section):
    """A folder or file of the host, or a volume of podman's, in the container."""

    source: str = Field(min_length=1, description="Absolute path on the host, or the name of a volume.")
    target: AbsolutePath = Field(description="Absolute path in the container.")
    writable: bool = Field(default=False, description="Whether the engine may write to it.")

    @model_validator(mode="after")
    def _source_is_a_path_or_a_name(self) -> VolumeSettings:
        if not self.source.startswith("/") and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.source):
            raise ValueError(f"source: {self.source!r} is neither an absolute path nor the name of a volume")
        return self


class CriuSettings(_Section):
    """How an engine is checkpointed and restored."""

    program: AbsolutePath | None = Field(
        default=None,
        description="A CRIU binary of your own instead of the one in PATH.",
        examples=["/opt/criu/sbin/criu"],
    )
    tcp_established: bool = Field(
        default=False,
        description="Keep established TCP connections; only for a model with one instance, restored where it was.",
    )
    tcp_close: bool = Field(
        default=True, description="Restore established TCP connections as closed ones, so that none can fail a dump."
    )
    file_locks: bool = Field(default=True, description="Dump file locks.")
    link_remap: bool = Field(default=True, description="Dump unlinked files that are still open, such as semaphores.")
    ghost_limit: Size = Field(default=ByteSize(4 << 30), description="Largest deleted file to take into the image.")
    network_lock: Literal["skip", "nftables", "iptables"] = Field(
        default="skip",
        description="How traffic is held back during a dump; warmpool has closed its connections before.",
    )
    ignore_static_ip: bool = Field(
        default=True, description="A restored container may get another address; not with tcp_established."
    )
    ignore_static_mac: bool = Field(
        default=True, description="A restored container may get another MAC address; not with tcp_established."
    )
    ignore_rootfs: bool = Field(
        default=False, description="Leave what the engine wrote to its root filesystem out of the image."
    )
    leave_out_zeros: bool = Field(
        default=True,
        description="Take pages of zeros out of the image: the restored memory is the same, and they cost nothing.",
    )
    print_stats: bool = Field(default=True, description="Ask CRIU for its own timings; they appear among the stages.")
    leave_running: bool = Field(
        default=False, description="`warmpool checkpoint create` leaves the engine running, restored from the image."
    )
    compression: Literal["none", "gzip", "zstd"] = Field(
        default="zstd", description="Of `warmpool checkpoint export`; archives are always zstd."
    )
    options: list[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*( [^\n]*)?$")]] = Field(
        default=[], description="Further lines for CRIU's configuration file, such as `lsm-profile …`."
    )
    action_scripts: dict[ActionName, AbsolutePath] = Field(
        default={}, description="Programs to run at a point of dump or restore, by the name CRIU has for it."
    )

    @model_validator(mode="after")
    def _one_way_with_connections(self) -> CriuSettings:
        if self.tcp_established and self.tcp_close:
            raise ValueError("tcp_established and tcp_close exclude each other; set tcp_close = false")
        return self


class PodmanEngineSettings(_Section):
    """An engine in a podman container."""

    image: str = Field(min_length=1, description="The container image; it must be there, warmpool pulls nothing.")
    command: ArgumentList = Field(
        description="Arguments for the image's entry point. {host}, {port} and {model} are replaced."
    )
    entrypoint: list[str] | None = Field(
        default=None, description="Instead of the image's entry point.", examples=[["vllm", "serve"]]
    )
    env: dict[str, SecretStr] = Field(default={}, description="Environment of the engine.")
    volumes: list[VolumeSettings] = Field(default=[], description="Folders to mount; any number.")
    devices: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description='Devices: CDI names ("nvidia.com/gpu=0"), or paths ("/dev/nvidia0", "/dev/nvidiactl").',
    )
    shm_size: Size = Field(default=ByteSize(64 << 20), description="Size of /dev/shm.")
    ulimits: dict[Annotated[str, Field(pattern=r"^[a-z]+$")], Annotated[str, Field(pattern=r"^-?\d+(:-?\d+)?$")]] = (
        Field(default={}, description='Resource limits, SOFT:HARD: { nofile = "65536:65536", memlock = "-1:-1" }.')
    )
    pids_limit: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="Most processes and threads; -1: no limit."
    )
    memory_limit: Size | None = Field(
        default=None, description="Most memory the container may use.", examples=["64GiB"]
    )
    privileged: bool = Field(
        default=False, description="Run with all capabilities and devices. The seccomp profile stays."
    )
    seccomp: AbsolutePath | None = Field(
        default=None,
        description="Seccomp profile; default is podman's own less io_uring, with `privileged` one that forbids only "
        "io_uring.",
        examples=["/etc/warmpool/no-io-uring.json"],
    )
    security_options: list[
        Annotated[str, Field(pattern=r"^(label|apparmor|no-new-privileges|mask|unmask)([=:].*)?$")]
    ] = Field(default=[], description='As for podman: "label=disable", "apparmor=unconfined", "no-new-privileges".')
    network: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = Field(
        default="bridge",
        description='"bridge" (an address of its own on podman\'s network), "host" (only for one instance), or the '
        "name of a network that this host has a route to.",
    )
    container_port: Port = Field(default=8000, description="The port the engine listens on inside, where not `host`.")
    criu: CriuSettings = CriuSettings()

    @model_validator(mode="after")
    def _fields_exist(self) -> PodmanEngineSettings:
        _check_fields(self.command, ("host", "port", "model"))
        return self


class ReseedSettings(_Section):
    """How an engine that is not vLLM gets fresh randomness after a restore: by a request, by a command, or by both.

    Each is given 64 hexadecimal digits to begin its generators with: the request as its body, the command as its
    input. An engine that does not take them does not serve.
    """

    path: Annotated[str, Field(pattern=r"^/[!-~]*$", max_length=200)] | None = Field(
        default=None,
        description="Path of the engine that a POST goes to. It answers 200 or 204; 404 says that it has no such path.",
        examples=["/reseed"],
    )
    command: Annotated[list[str], Field(min_length=1, max_length=100)] | None = Field(
        default=None,
        description="Program and arguments, run on this host as warmpool's user; it ends with status 0. {host} and "
        "{port} are the engine's, {model} and {instance} its names.",
        examples=[["/usr/local/bin/reseed", "{host}", "{port}"]],
    )
    timeout: Annotated[Duration, Field(gt=0, le=600)] = Field(default=10.0, description="How long it may take.")

    @model_validator(mode="after")
    def _fields_exist(self) -> ReseedSettings:
        for argument in self.command or ():
            for name in re.findall(r"\{(\w*)\}", argument):
                if name not in RESEED_FIELDS:
                    known = ", ".join(f"{{{k}}}" for k in RESEED_FIELDS)
                    raise ValueError(f"command: {{{name}}} is not one of {known}")
        return self

    @property
    def present(self) -> bool:
        """Whether there is a way."""
        return self.path is not None or self.command is not None


class RouteSettings(_Section):
    """What of a model clients may use; engine routes that are not here are never forwarded."""

    chat: bool = Field(default=True, description="/v1/chat/completions, and /batch and /render below it.")
    completions: bool = Field(default=True, description="/v1/completions and /render below it.")
    responses: bool = Field(
        default=True, description="/v1/responses and /render below it, a response by its id, and /cancel below that."
    )
    messages: bool = Field(
        default=True, description="/v1/messages (Anthropic's API), /count_tokens and /render below it."
    )
    audio: bool = Field(default=True, description="/v1/audio/transcriptions and /v1/audio/translations.")
    realtime: bool = Field(default=True, description="/v1/realtime (WebSocket).")
    embeddings: bool = Field(default=True, description="/v1/embeddings and /v2/embed.")
    rerank: bool = Field(default=True, description="/rerank, /v1/rerank and /v2/rerank.")
    score: bool = Field(default=True, description="/score, /v1/score and /generative_scoring.")
    classify: bool = Field(default=True, description="/classify.")
    pooling: bool = Field(default=True, description="/pooling.")
    tokenize: bool = Field(default=True, description="/tokenize, /detokenize and /tokenizer_info.")
    systemone: bool = Field(default=True, description="/v1/systemone (structured decisions).")
    invocations: bool = Field(
        default=True,
        description="/invocations (SageMaker's route to chat, completions, embeddings, rerank, score, classify and "
        "pooling): only where none of these is off.",
    )
    lora: bool = Field(
        default=False,
        description="/v1/load_lora_adapter and /v1/unload_lora_adapter: clients may then have the engine load files.",
    )


class ParameterSettings(_Section):
    """What becomes of the parameters of requests for text: chat, completions, responses and messages."""

    defaults: dict[str, Any] = Field(
        default={}, description="Set where a request has none: { temperature = 0.7, max_tokens = 512 }."
    )
    caps: dict[str, int | float] = Field(
        default={}, description="Larger numbers are lowered to this: { max_tokens = 4096, n = 4 }."
    )
    remove: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description='Left out of every request: ["logit_bias", "vllm_xargs"].'
    )

    @model_validator(mode="after")
    def _agree(self) -> ParameterSettings:
        for table in ("defaults", "caps", "remove"):
            if "model" in getattr(self, table):
                raise ValueError(f"{table}: `model` is not a parameter; use `name` and `aliases`")
        for name in self.remove:
            if name in self.defaults or name in self.caps:
                raise ValueError(f"remove: {name!r} has a default or a cap too; keep one of them")
        for name, cap in self.caps.items():
            default = self.defaults.get(name, cap)
            if isinstance(default, bool) or not isinstance(default, int | float) or default > cap:
                raise ValueError(f"defaults: {name} must be a number up to its cap, {cap}")
        return self

    @property
    def present(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.defaults or self.caps or self.remove)

    def names(self) -> list[str]:
        """Every parameter that is looked at."""
        return [*self.defaults, *self.caps, *self.remove]


class ModelSettings(_Section):
    """One model that clients can name."""

    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="The name clients use; default is the table's key.",
        examples=["org/Model-7B"],
    )
    aliases: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=[], description="Further names for it."
    )
    adapters: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default=[], description="Names of LoRA adapters that the engine has; requests for them go on as they are."
    )
    max_instances: PositiveInt = Field(default=1, description="How many engines of it there may be.")
    min_ready: Count = Field(default=0, description="How many engines are kept ready, requests or not.")
    max_concurrency: PositiveInt = Field(default=256, description="Requests one engine is given at once.")
    max_queue: PositiveInt = Field(default=1000, description="How many requests may wait for it.")
    queue_timeout: Duration = Field(default=300.0, description="How long a request waits for an engine before 503.")
    start_timeout: Duration = Field(default=600.0, description="How long a cold start may take.")
    wake_timeout: Duration = Field(
        default=60.0, description="How long any other tier may take to wake, or to step down to."
    )
    checkpoint_timeout: Duration = Field(default=300.0, description="How long writing a checkpoint may take.")
    response_timeout: OptionalDuration = Field(
        default=None,
        description="How long an engine may be silent within an answer before that answer is ended; if no other one "
        "got a byte in that time, the engine counts as broken and is replaced.",
    )
    stall_after: OptionalDuration = Field(
        default=600.0,
        description="How long an engine with running requests may send none of them a byte before it is looked at. It "
        "is replaced only if it answers no request for one token within wake_timeout, and its own counters of tokens "
        "and the CPU time of its processes stand still; or if its processes were stopped or its container was paused.",
    )
    canary: Literal["first", "always", "never"] = Field(
        default="first",
        description="Whether a restored engine must repeat a known answer before it serves: "
        "once per image, each time, never.",
    )
    golden_sleep_level: Literal[1, 2] = Field(
        default=2,
        description="How an engine with a sleep mode sleeps until its checkpoint is written, and in it: 2 drops the "
        "weights, which are loaded again when it is woken; 1 keeps them in memory, and so in the checkpoint.",
    )
    sleep_level: Literal[1, 2] = Field(
        default=1,
        description="How it sleeps once there is a checkpoint: 1 keeps the weights of each instance in pinned memory; "
        "2, with weights_copy only, drops them, and all instances are woken from the one copy.",
    )
    weights: list[AbsolutePath] = Field(
        default=[],
        description="Folders with the model's *.safetensors on this host: read ahead while an engine is restored, so "
        "that its weights come from memory.",
    )
    weights_copy: bool = Field(
        default=False,
        description="vLLM with --enable-sleep-mode only: keep a copy of the weights, as they lie on the GPU, in "
        "pool.checkpoint_dir, from which several threads bring them back, instead of having vLLM load them again. "
        "Needs as much memory there as the weights take.",
    )
    gpu_memory: Annotated[Size, Field(ge=1)] | None = Field(
        default=None,
        description="GPU memory that one engine takes on each of `gpus` when it is ready. Only used until it was "
        "measured: here, or for the checkpoint.",
        examples=["72GiB"],
    )
    host_memory: Annotated[Size, Field(ge=1)] | None = Field(
        default=None,
        description="Host memory that one engine's processes take when it is ready. Only used until it was measured.",
        examples=["6GiB"],
    )
    gpus: Annotated[list[Count], Field(min_length=1)] = Field(
        default=[0], description="The GPUs that gpu_memory is about, by the driver's index."
    )
    keep: bool = Field(
        default=True,
        description="Keep the checkpoint once it was restored. Without, its memory is free while the engine runs, and "
        "the next step down writes it anew; only for one instance.",
    )
    engine: Literal["vllm", "generic"] | None = Field(
        default=None,
        description="What the engine is. vLLM is given a worker extension and a middleware of warmpool's (arguments "
        "added to its command), by which it gets fresh randomness after a restore. Without: vllm where a word of the "
        "command or entry point is `vllm` (or a module of it), or the container image with its own entry point is "
        "called so; else generic.",
        examples=["generic"],
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The API key that the engine asks for (vLLM: --api-key or VLLM_API_KEY, given to it in `env`). It "
        "goes with every request to the engine, clients' too, whose own keys never go there.",
        examples=["EXAMPLE-KEY"],
    )
    api_key_file: AbsolutePath | None = Field(
        default=None,
        description="A file with that key instead, which nobody else may read (mode 0600). Read when an engine is "
        "reached for the first time.",
        examples=["/etc/warmpool/engine-key"],
    )
    reseed: ReseedSettings = ReseedSettings()
    routes: RouteSettings = RouteSettings()
    parameters: ParameterSettings = ParameterSettings()
    idle: IdleSettings = IdleSettings()
    health: HealthSettings = HealthSettings()
    warmup: WarmupSettings = WarmupSettings()
    process: ProcessEngineSettings | None = Field(default=None, description="The engine, as a local process.")
    podman: PodmanEngineSettings | None = Field(default=None, description="The engine, in a podman container.")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        tables = [name for name in ENGINE_TABLES if getattr(self, name) is not None]
        if not tables:
            raise ValueError("no engine: add a table `process` or `podman` with a `command`")
        if len(tables) > 1:
            raise ValueError(f"more than one engine: keep one of the tables {', '.join(tables)}")
        if self.min_ready > self.max_instances:
            raise ValueError(f"min_ready is {self.min_ready}, more than max_instances ({self.max_instances})")
        if self.sleep_level == 2 and not self.weights_copy:
            raise ValueError("sleep_level = 2 needs weights_copy: the weights would be read from files at every wake")
        if self.weights_copy and self.golden_sleep_level != 2:
            raise ValueError("weights_copy needs golden_sleep_level = 2: at 1 the checkpoint holds the weights already")
        self._check_engine()
        if self.max_instances > 1:
            self._check_several()
        return self

    def _check_engine(self) -> None:
        if self.api_key is not None and not re.fullmatch(r"[!-~]{1,4096}", self.api_key.get_secret_value()):
            raise ValueError("api_key must be one word of printable ASCII, at most 4096 characters")
        if self.engine == "vllm" and self.reseed.present:
            raise ValueError('reseed is for engines that are not vLLM: remove it, or set engine = "generic"')
        if self.weights_copy and self.engine == "generic":
            raise ValueError('weights_copy needs vLLM: remove it, or set engine = "vllm"')
        if self.weights_copy and self.own_worker_extension:
            raise ValueError(f"weights_copy needs warmpool's own worker extension: remove {_WORKER_EXTENSION}")

    def _check_several(self) -> None:
        if not self.keep:
            raise ValueError("keep = false needs max_instances = 1: the others would have no checkpoint")
        if self.podman is not None and self.podman.network == "host":
            raise ValueError('podman.network = "host" needs max_instances = 1: clones would share one port')
        if self.podman is not None and self.podman.criu.tcp_established:
            raise ValueError("podman.criu.tcp_established needs max_instances = 1: connections cannot be cloned")

    @property
    def is_vllm(self) -> bool:
        """Whether its engines are vLLM."""
        if self.engine is not None:
            return self.engine == "vllm"
        return self.weights_copy or (not self.reseed.present and self._looks_like_vllm())

    def _looks_like_vllm(self) -> bool:
        named = any(PurePath(word).name == "vllm" or word.startswith("vllm.entrypoints.") for word in self._words())
        image = self.podman.image if self.podman is not None and self.podman.entrypoint is None else ""
        return named or "vllm" in PurePath(image).name

    def _words(self) -> list[str]:
        """The command, behind the entry point if it is given."""
        if self.podman is not None:
            return [*(self.podman.entrypoint or ()), *self.podman.command]
        return self.process.command if self.process is not None else []

    @property
    def own_worker_extension(self) -> str | None:
        """The option by which the command gives vLLM a worker extension of the user's own."""
        names = (word.partition("=")[0].replace("_", "-") for word in self._words())
        return next((word for word, name in zip(self._words(), names, strict=True) if name == _WORKER_EXTENSION), None)

    @property
    def runtime(self) -> str:
        """The name of the runtime that starts its engines."""
        return next(name for name in ENGINE_TABLES if getattr(self, name) is not None)


class TracingSettings(_Section):
    """Traces of requests by OpenTelemetry; needs the extra `warmpool[otel]`."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[!-~]+$")] | None = Field(
        default=None,
        description="Where spans go: OTLP over HTTP with protobuf. Without, there are none.",
        examples=["http://127.0.0.1:4318/v1/traces"],
    )
    sample: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=1.0,
        description="The share of requests to trace. One that comes with a `traceparent` is traced if its caller says "
        "so.",
    )
    service_name: str = Field(default="warmpool", min_length=1, description="What traces call this server.")


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
    )

    server: ServerSettings = ServerSettings()
    pool: PoolSettings = PoolSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    tracing: TracingSettings = TracingSettings()
    models: dict[ModelKey, ModelSettings] = Field(min_length=1, description="The models, by key.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Settings:
        owner: dict[str, str] = {}
        for key, model in self.models.items():
            for name in (model.name or key, *model.aliases, *model.adapters):
                if name in owner:
                    raise ValueError(f"models.{key}: the name {name!r} belongs to models.{owner[name]} already")
                owner[name] = key
        default = self.server.default_model
        if default is not None and default not in owner:
            raise ValueError(f"server.default_model: there is no model {default!r}; there are {', '.join(owner)}")
        return self

    @cached_property
    def _keys(self) -> Mapping[str, str]:
        return {
            name: key
            for key, model in self.models.items()
            for name in (self.served_name(key), *model.aliases, *model.adapters)
        }

    def names(self) -> Mapping[str, str]:
        """Every name a client may use → the model's key."""
        return self._keys

    def key_of(self, name: str) -> str:
        """The key of the model that clients call `name`. Raises ModelNotFoundError."""
        try:
            return self._keys[name]
        except KeyError:
            raise ModelNotFoundError(name) from None

    def served_name(self, key: str) -> str:
        """The name that models.`key` is listed under and that its engine knows."""
        return self.models[key].name or key


def load(path: Path | None) -> Settings:
    """The settings of a TOML file (None: none) with the environment laid over it.

    Raises ConfigError with every problem found: the file's syntax, or each key that is unknown, missing or has a value
    that is not allowed.
    """
    source = str(path) if path is not None else "environment"
    if path is not None:
        _check_syntax(path)

    class FileAndEnvironment(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources: tuple[PydanticBaseSettingsSource, ...] = (EnvSettingsSource(settings_cls),)
            return sources if path is None else (*sources, TomlConfigSettingsSource(settings_cls, toml_file=path))

    unknown = _unknown_environment(Settings.model_fields)
    try:
        settings = FileAndEnvironment()
    except ValidationError as error:
        raise ConfigError(source, [*unknown, *(_explain(e) for e in error.errors())]) from None
    except SettingsError as error:
        raise ConfigError(source, [*unknown, f"environment: {error}"]) from None
    if unknown:
        raise ConfigError(source, unknown)
    return settings


def _check_syntax(path: Path) -> None:
    try:
        # A pipe would be waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(str(path), ["is not a plain file"])
            tomllib.load(file)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not TOML: {error}"]) from None


def _unknown_environment(fields: Iterable[str]) -> list[str]:
    known = tuple(f"{ENV_PREFIX}{name.upper()}" for name in fields)
    problems = []
    for name in sorted(os.environ):
        key = name.upper()
        if not key.startswith(ENV_PREFIX) or name in RESERVED_ENV:
            continue
        if not any(key == k or key.startswith(k + ENV_DELIMITER) for k in known):
            problems.append(f"environment variable {name}: not a key; they begin with {', '.join(known)}")
        elif f"{ENV_DELIMITER}ENV{ENV_DELIMITER}" in key:
            table, _, variable = name.rpartition(ENV_DELIMITER)
            # pydantic-settings lower-cases names, which would change the engine's variable
            problems.append(f'environment variable {name}: set {table}=\'{{"{variable}": "…"}}\' instead')
    return problems


def _explain(error: Mapping[str, Any]) -> str:
    """One line for one of pydantic's errors: the key, what is wrong, where it was set if not in the file."""
    path = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join(_without_secrets(path)) or "(whole file)"
    variable = ENV_PREFIX + ENV_DELIMITER.join(path).upper()
    origin = f" (from environment variable {variable})" if path and variable in os.environ else ""
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            allowed = ", ".join(sorted(_fields_at(path[:-1])))
            message = f"unknown key; allowed here: {allowed}"
        case "missing":
            message = "is required"
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            message = (
                "a model's key has lower-case letters, digits and _, and begins with a letter (48 at most); "
                "set `name` to what clients say"
            )
    return mask_urls(f"{key}: {message}{origin}")


def _without_secrets(path: list[str]) -> Iterable[str]:
    """The parts of a key's path; where a variable of an engine should be named, only what looks like a name."""
    for before, part in zip([None, *path], path, strict=False):
        yield "…" if before == "env" and not _VARIABLE.fullmatch(part) else part


def _fields_at(path: list[str]) -> Iterable[str]:
    """The names of the keys that the table at `path` knows."""
    section: Any = Settings
    parts = iter(path)
    for part in parts:
        if section is Settings and part == "models":
            section = ModelSettings
            next(parts, None)
            continue
        if part.isdecimal():
            continue  # of a list, whose elements' class is there already
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
