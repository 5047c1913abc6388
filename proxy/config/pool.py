"""The section `pool`: what all models share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field

from proxy.config.fields import Count, Duration, Memory, OptionalDuration, PositiveInt, Section, TimesOfDay


def default_state_dir() -> Path:
    """Where state is kept when nothing says where: the same folder whatever the working directory is."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/warmpool")
    home = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return home / "warmpool"


class PoolSettings(Section):
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
    max_restores: Count = Field(
        default=0,
        description="How many engines may be started or restored from a checkpoint at once, over all models: each "
        "takes a CPU core or more and the disk. The others wait in the order in which they are to be served. 0: any "
        "number.",
    )
    drill: OptionalDuration = Field(
        default=86400.0,
        description="How often the checkpoint of a model of which nothing is awake is restored, asked for its canary "
        "and put back, while no request runs or waits: one that fails is set aside, and a new one is made.",
    )
    drill_times: list[TimesOfDay] = Field(
        default=[], description='Only at these times of the day on this host: ["02:00-05:30"]. Empty: at any.'
    )
    max_queue: PositiveInt = Field(default=10_000, description="How many requests may wait at once, over all models.")
    priority_head_start: Duration = Field(
        default=60.0,
        description="A request of a higher priority (of its API key) is served before one that came up to this much "
        "earlier, for each class between them; after that, the earlier one.",
    )
    policy: Literal["turns", "fifo", "lru"] = Field(
        default="turns",
        description="Who runs when not all models fit. turns: busy models take turns of a quantum, paused where they "
        "can be, and who has waited for max_wait comes first; fifo: in the order in which requests came, the running "
        "model retires at once; lru: an idle instance makes room, a busy one never (docs/scheduling.md compares them).",
    )
    quantum: Duration = Field(
        default=0.5,
        description="How long an instance with one request runs at least when other models wait for its place; longer "
        "with more requests, and where the switch takes longer.",
    )
    switch_after: Duration = Field(
        default=10.0,
        description="With no room and no idle instance: how long a request waits before a busy instance of another "
        "model that cannot be paused takes no new requests, so that it becomes idle.",
    )
    lru_ttl: Duration = Field(default=300.0, description='With policy = "lru": how long an idle instance stays ready.')
    gpu_creep: Memory = Field(
        default=ByteSize(512 << 20),
        description="How much more GPU memory an engine may hold than when it was started or restored. One that holds "
        "more and has a checkpoint ends when it is idle, and is restored from it; 0 is any amount.",
    )
    engine_metrics: list[Annotated[str, Field(pattern=r"^[a-zA-Z_:][a-zA-Z0-9_:]{0,99}$")]] = Field(
        default=["vllm:"],
        description="What engines' own metrics are called that /metrics passes on: the beginnings of their names. Only "
        "engines that are awake are asked. [] asks none.",
    )
    engine_log_size: Memory = Field(
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
    checkpoint_reserve: Memory = Field(
        default=ByteSize(256 << 20),
        description="Free space to leave in checkpoint_dir; a checkpoint that would go below is not begun.",
    )
    memory_reserve: Memory = Field(
        default=ByteSize(256 << 20),
        description="Host memory to leave free, of the host or of the smallest cgroup that engines are in: a wake that "
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
