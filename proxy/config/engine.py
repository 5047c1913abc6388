"""The engine of a model: the tables `process` and `podman`, and how it is checked, warmed up and reseeded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import ByteSize, Field, SecretStr, model_validator

from proxy.config.calls import Command, check_command
from proxy.config.fields import AbsolutePath, ArgumentList, Count, Duration, Memory, Port, PositiveInt, Section

if TYPE_CHECKING:
    from collections.abc import Iterable

MountOption = Literal[
    "z", "Z", "U", "exec", "noexec", "dev", "nodev", "suid", "nosuid", "rshared", "rslave", "rprivate"
]  # fmt: skip
MOUNT_OPTIONS: Final[tuple[str, ...]] = get_args(MountOption)
"""What podman takes for a volume beside `ro` and `rw`."""
ActionName = Literal[
    "pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume", "network-lock",
    "network-unlock", "setup-namespaces", "post-setup-namespaces",
]  # fmt: skip
"""The points at which CRIU runs action scripts (criu.org/Action_scripts)."""


class HealthSettings(Section):
    """How it is known that an engine serves."""

    path: Annotated[str, Field(pattern=r"^/[!-~]*$")] = Field(
        default="/health", description="Answers 200 when the engine serves."
    )
    command: Command = Field(
        default=[],
        description="Engines that are not vLLM: a command that is run on this host instead, with status 0 when the "
        "engine serves. {host} and {port} are the engine's, {model} and {instance} its names.",
    )
    interval: Duration = Field(default=0.1, description="Time between two questions while it starts.")

    @model_validator(mode="after")
    def _fields_exist(self) -> HealthSettings:
        check_command(self.command)
        return self


class WarmupSettings(Section):
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


class ProcessEngineSettings(Section):
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


class VolumeSettings(Section):
    """A folder or file of the host, or a volume of podman's, in the container: a table, or "/srv/models:/models:ro"."""

    source: str = Field(min_length=1, description="Absolute path on the host, or the name of a volume.")
    target: AbsolutePath = Field(description="Absolute path in the container.")
    writable: bool = Field(default=False, description="Whether the engine may write to it.")
    options: list[MountOption] = Field(
        default=[],
        description="Further options of podman's for it: z or Z (labels for SELinux), U (it is given to the engine's "
        "user), and those of mounts.",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_podman_writes_it(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(":")
        if len(parts) not in (2, 3):
            raise ValueError("a volume is SOURCE:TARGET or SOURCE:TARGET:OPTIONS, as for `podman run --volume`")
        options = [option for option in ":".join(parts[2:]).split(",") if option]
        if unknown := [option for option in options if option not in ("ro", "rw", *MOUNT_OPTIONS)]:
            raise ValueError(f"{unknown[0]} is none of the options of a volume: ro, rw, {', '.join(MOUNT_OPTIONS)}")
        further = [option for option in options if option not in ("ro", "rw")]
        return {"source": parts[0], "target": parts[1], "writable": "ro" not in options, "options": further}

    @model_validator(mode="after")
    def _source_is_a_path_or_a_name(self) -> VolumeSettings:
        if not self.source.startswith("/") and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.source):
            raise ValueError(f"source: {self.source!r} is neither an absolute path nor the name of a volume")
        return self


class CriuSettings(Section):
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
    ghost_limit: Memory = Field(default=ByteSize(4 << 30), description="Largest deleted file to take into the image.")
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


class PodmanEngineSettings(Section):
    """An engine in a podman container."""

    image: str = Field(min_length=1, description="The container image; it must be there, warmpool pulls nothing.")
    command: ArgumentList = Field(
        description="Arguments for the image's entry point. {host}, {port} and {model} are replaced."
    )
    entrypoint: list[str] | None = Field(
        default=None, description="Instead of the image's entry point.", examples=[["vllm", "serve"]]
    )
    env: dict[str, SecretStr] = Field(default={}, description="Environment of the engine.")
    volumes: list[VolumeSettings] = Field(
        default=[], description='Folders to mount, as tables or as for podman: ["/srv/models:/models:ro"].'
    )
    devices: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[],
        description='Devices: CDI names ("nvidia.com/gpu=0"), or paths ("/dev/nvidia0", "/dev/nvidiactl").',
    )
    shm_size: Memory = Field(default=ByteSize(64 << 20), description="Size of /dev/shm.")
    ulimits: dict[Annotated[str, Field(pattern=r"^[a-z]+$")], Annotated[str, Field(pattern=r"^-?\d+(:-?\d+)?$")]] = (
        Field(default={}, description='Resource limits, SOFT:HARD: { nofile = "65536:65536", memlock = "-1:-1" }.')
    )
    pids_limit: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="Most processes and threads; -1: no limit."
    )
    memory_limit: Memory | None = Field(
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


class ReseedSettings(Section):
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
    from_kernel: bool = Field(
        default=False,
        description="It draws its randomness from the kernel for each request, as llama.cpp does: nothing has to be "
        "asked of it.",
    )

    @model_validator(mode="after")
    def _fields_exist(self) -> ReseedSettings:
        check_command(self.command or [])
        return self

    @property
    def present(self) -> bool:
        """Whether there is a way."""
        return self.from_kernel or self.asks

    @property
    def asks(self) -> bool:
        """Whether there is something to ask."""
        return self.path is not None or self.command is not None
