"""Checks of where images lie and what this process may use: tmpfs, huge pages, folders, limits."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Final

from proxy.checkpoint.files import MANIFEST
from proxy.checkpoint.store import LOCK
from proxy.config.values import short_size
from proxy.doctor.report import Check, Repair
from proxy.host.capabilities import CAP_SYS_RESOURCE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from proxy.doctor.needs import Situation
    from proxy.doctor.view import Host, Space
    from proxy.host.mounts import Mount

_NEVER: Final = "no model is ever checkpointed"
_HUGE_PAGES: Final = "/sys/kernel/mm/transparent_hugepage/enabled"
_SHARED_HUGE_PAGES: Final = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_SPARE_FILES: Final = 512
_LEAST_PROCESSES: Final = 4096
_GIB: Final = 1 << 30


async def images(it: Situation) -> list[Check]:
    """Whether images are in RAM, and how much room there is for them."""
    name = "tmpfs"
    if not it.needs.checkpoints:
        return [Check(name, "skip", _NEVER)]
    folder = it.needs.pool.checkpoint_dir.absolute()
    mount, space = it.host.mount_of(folder), it.host.space(folder)
    ram_bytes = it.host.memory().get("MemTotal", 0)
    fix = _mount_lines(folder, ram_bytes)
    if mount is None or space is None:
        return [Check(name, "warn", f"{folder}: which filesystem it is on cannot be read", fix)]
    if mount.kind == "ramfs":
        return [Check(name, "fail", f"{folder} is on ramfs, which never says how much is free", fix)]
    reserve = it.needs.pool.checkpoint_reserve
    if space.free_bytes < reserve:
        text = f"{folder}: {short_size(space.free_bytes)} free, less than the reserve of {short_size(reserve)}"
        return [Check(name, "fail", text, f"free some, lower pool.checkpoint_reserve, or\n{fix}")]
    if mount.kind != "tmpfs":
        return [Check(name, "warn", f"{folder} is on {mount.kind}: restores read from disk", fix)]
    return [_tmpfs(it.host, folder, mount, space, ram_bytes)]


def _tmpfs(host: Host, folder: Path, mount: Mount, space: Space, ram_bytes: int) -> Check:
    huge = next((o for o in mount.options if o.startswith("huge=")), "huge=never")
    found = f"{folder}: {short_size(space.total_bytes)}, {short_size(space.free_bytes)} free, {huge}"
    if space.total_bytes > ram_bytes > 0:
        size = f"mount -o remount,size={_half_gib(ram_bytes)}G {mount.point}"
        return Check("tmpfs", "warn", f"{found}; more than there is RAM ({short_size(ram_bytes)})", size)
    if host.memory().get("SwapTotal", 0) > 0 and "noswap" not in mount.options:
        fix = f"swapoff -a, or mount {mount.point} with noswap (kernel 6.4 or later)"
        return Check("tmpfs", "warn", f"{found}; swap is on: images, prompts included, can end up on disk", fix)
    if huge not in ("huge=within_size", "huge=always"):
        fix = f"mount -o remount,huge=within_size {mount.point}   # and in /etc/fstab or the mount's unit"
        return Check("tmpfs", "warn", f"{found}: restores read small pages, which takes longer", fix)
    return Check("tmpfs", "ok", found)


def _half_gib(ram_bytes: int) -> int:
    return max(1, ram_bytes // 2 // _GIB)


def _mount_lines(folder: Path, ram_bytes: int) -> str:
    """A mount with half of the RAM, now and at every start.

    ``huge=always`` would give the many small files of an image 2 MiB each; the store sees to it that large files get
    huge pages with ``huge=within_size`` too.
    """
    options = f"size={_half_gib(ram_bytes)}G,mode=0700,huge=within_size"
    return (
        f"mkdir -p {folder} && mount -t tmpfs -o {options} tmpfs {folder}\n"
        f"echo 'tmpfs {folder} tmpfs {options} 0 0' >> /etc/fstab"
    )


async def huge_pages(it: Situation) -> list[Check]:
    """Whether restored memory comes in huge pages, which makes a restore up to twice as fast."""
    name = "huge pages"
    if not it.needs.checkpoints:
        return [Check(name, "skip", _NEVER)]
    text = it.host.text(_HUGE_PAGES)
    if text is None:
        fix = "run a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
        return [Check(name, "warn", "this kernel has no transparent huge pages: restores are slower", fix)]
    return [_huge(it.host, name, _HUGE_PAGES, text, {"always": "always"}, "restores are slower")]


def _huge(host: Host, name: str, setting: str, text: str, good: Mapping[str, str], else_: str) -> Check:
    """Whether one of the good values is chosen, in brackets as the kernel has it; `good` says what to call it."""
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in good:
        return Check(name, "ok", good[chosen])
    now = f"echo always > {setting}"
    fix = f"{now}\necho 'w {setting} - - - - always' >> /etc/tmpfiles.d/warmpool.conf   # at every start"
    path = host.path(setting)

    def switch() -> None:
        path.write_text("always")

    repair = Repair.of_files(f"run, until the next start: {now}", switch)
    return Check(name, "warn", f"{chosen or 'unknown'}: {else_}", fix, repair)


async def pinned_memory(it: Situation) -> list[Check]:
    """Whether memory that CUDA pins comes in huge pages: a suspended engine has to pin it again when it is resumed.

    Pinned memory is shared memory without a file (a mapping of /dev/zero), which has a setting of its own.
    """
    name = "pinned memory"
    if not it.needs.gpu_models():
        return [Check(name, "skip", "no model names a GPU")]
    text = it.host.text(_SHARED_HUGE_PAGES)
    if text is None:
        return [Check(name, "skip", "this kernel has no huge pages for shared memory")]
    good = {"always": "huge pages always", "force": "huge pages force"}
    wakes = "no huge pages for it: suspended engines that sleep at level 1 wake more slowly"
    return [_huge(it.host, name, _SHARED_HUGE_PAGES, text, good, wakes)]


async def folders(it: Situation) -> list[Check]:
    """The folders that hold the memory of engines, prompts included: there, and only ours."""
    pool = it.needs.pool
    wanted: dict[str, Path] = {}
    if it.needs.checkpoints:
        wanted["checkpoint_dir"] = pool.checkpoint_dir.absolute()
        if pool.archive_dir is not None:
            wanted["archive_dir"] = pool.archive_dir.absolute()
    if it.needs.configured:
        wanted["state_dir"] = it.needs.state_dir()
    return [_folder(it.host, name, path) for name, path in wanted.items()]


def _folder(host: Host, name: str, path: Path) -> Check:
    here = host.path(path)
    try:
        found = here.stat()
    except FileNotFoundError:
        return Check(name, "ok", f"{path} is not there yet; warmpool makes it", repair=_make_folder(here, path))
    except OSError as error:
        return Check(name, "fail", f"{path}: {error.strerror}", f"set pool.{name} to a folder that can be used")
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, "fail", f"{path} is not a folder", f"set pool.{name} to a folder")
    if name == "checkpoint_dir" and _is_others(here):
        return Check(name, "fail", f"{path} holds files of others", f"set pool.{name} to a folder of warmpool's own")
    if mode & stat.S_ISVTX:
        return Check(name, "warn", f"{path} is everybody's (mode {mode:04o})", f"set pool.{name} to a folder below it")
    if found.st_uid not in (0, host.uid()):
        return Check(name, "fail", f"{path} belongs to user {found.st_uid}", f"chown root:root {path}")
    if mode & 0o077:
        return Check(
            name, "warn", f"{path} is open to others (mode {mode:04o})", f"chmod 0700 {path}", _close_folder(here, path)
        )
    return Check(name, "ok", f"{path}, mode {mode:04o}")


def _is_others(folder: Path) -> bool:
    """Whether the store would refuse the folder: it marks its own, and there is more in it than images."""
    try:
        there = list(folder.iterdir())
    except OSError:
        return False
    return all(path.name != LOCK for path in there) and not all((path / MANIFEST).is_file() for path in there)


def _make_folder(here: Path, path: Path) -> Repair:
    def make() -> None:
        here.parent.mkdir(parents=True, exist_ok=True)
        here.mkdir(mode=0o700)

    return Repair.of_files(f"make the folder {path}, mode 0700", make)


def _close_folder(here: Path, path: Path) -> Repair:
    def close() -> None:
        here.chmod(0o700)

    return Repair.of_files(f"run: chmod 0700 {path}", close)


async def limits(it: Situation) -> list[Check]:
    """Resource limits of this process, which warmpool and, without CAP_SYS_RESOURCE, its containers are bound to."""
    name = "limits"
    found = it.host.limits()
    may_raise = it.host.has_capability(CAP_SYS_RESOURCE)
    text = ", ".join(f"{limit} {_limit(limit, pair[0])}" for limit, pair in found.items())
    text += "" if may_raise else "; no CAP_SYS_RESOURCE, containers get no more than these"
    if refused := _refused(it, found) if not may_raise else "":
        return [Check(name, "fail", f"{text}; {refused}", "lower that setting, or run warmpool with CAP_SYS_RESOURCE")]
    files = it.needs.pool.max_queue + _SPARE_FILES
    files += sum(2 * model.max_concurrency * model.max_instances for model in it.needs.models.values())
    if 0 <= found["nofile"][0] < files:
        fix = f"ulimit -n {files}, or LimitNOFILE={files} in warmpool's unit"
        return [Check(name, "warn", f"{text}; with every queue full warmpool opens {files} files", fix)]
    if 0 <= found["nproc"][0] < _LEAST_PROCESSES:
        fix = "ulimit -u unlimited, or LimitNPROC=infinity in warmpool's unit"
        return [Check(name, "warn", f"{text}; few processes and threads for an engine", fix)]
    return [Check(name, "ok", text)]


def _limit(name: str, value: int) -> str:
    if value < 0:
        return "unlimited"
    return short_size(value) if name == "memlock" else str(value)


def _refused(it: Situation, found: dict[str, tuple[int, int]]) -> str:
    """A limit of a model's that the kernel would refuse; empty without one."""
    for key, engine in it.needs.podman.items():
        for limit, value in engine.ulimits.items():
            hard = found.get(limit, (-1, -1))[1]
            wanted = int(value.rpartition(":")[2])
            if hard >= 0 and (wanted < 0 or wanted > hard):
                return f"models.{key}.podman.ulimits.{limit} is above the hard limit of {hard}"
    return ""
