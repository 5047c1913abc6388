"""Process trees: finding all that belongs to an instance, signalling it, waiting for its end, reaping it.

Every engine process carries a mark in its environment, which its descendants inherit and which CRIU restores; so a
child that left the session, or a tree whose parents are gone, is still found. psutil reads the process table.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

MARK = "WARMPOOL_INSTANCE_ID"
GPU_STATE = "GPU state"
"""Beside the kinds of `memory_by_kind`: what a suspend copied from the GPU to the processes' own memory."""
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def become_subreaper() -> None:
    """Make orphans among our descendants our children, so that we can reap them.

    A zombie keeps its session's id in use, and CRIU cannot restore a leader whose pid is still an id of anything.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def marked(mark_prefix: str) -> list[int]:
    """The pids of all processes whose mark begins with `mark_prefix`.

    Every process of the host is looked at, whenever an engine ends: nothing is parsed that is not looked for.
    """
    wanted = b"\0" + os.fsencode(f"{MARK}={mark_prefix}")
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb", buffering=0) as environment:  # noqa: PTH123
            if wanted in b"\0" + environment.read():
                found.append(pid)
    return found


def members(mark: str, session: int | None) -> list[int]:
    """The pids of an instance: those with its mark, and those of its session (zombies have no environment)."""
    found = set(marked(mark))
    if session is not None:
        for pid in psutil.pids():
            with contextlib.suppress(OSError):
                if os.getsid(pid) == session:
                    found.add(pid)
    return sorted(found)


def alive_among(mark: str, sessions: Iterable[int]) -> list[int]:
    """The pids of live processes that have the mark, or belong to one of the sessions."""
    found = set(marked(mark))
    for session in sessions:
        found |= set(members(mark, session))
    return sorted(pid for pid in found if alive(pid))


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """The CPU time that each of these processes has used."""
    used = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            used[pid] = times.user + times.system
    return used


def all_stopped(pids: Iterable[int]) -> bool:
    """Whether there are live processes among these, and each of them is stopped; not by a debugger."""
    states = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            states.append(psutil.Process(pid).status())
    living = [state for state in states if state not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)]
    return bool(living) and all(state == psutil.STATUS_STOPPED for state in living)


def resident_bytes(pids: Iterable[int]) -> int:
    """The memory private to these processes, about what an image of them will hold."""
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            total += psutil.Process(pid).memory_full_info().uss
    return total


def held_bytes(pids: Iterable[int]) -> int:
    """The memory that would come free with these processes: anonymous and shared, not of files (smaps_rollup, PSS)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(kib) << 10 for kib in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB$", text, re.MULTILINE))
    return total


def memory_by_kind(pids: Iterable[int]) -> dict[str, int]:
    """What fills the memory of these processes: bytes private to them (proc(5), smaps) by kind of mapping."""
    sizes = dict.fromkeys(("heap", "anonymous", "/dev/zero", "/dev/shm", "stack", "files"), 0)
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            for part in psutil.Process(pid).memory_maps(grouped=True):
                sizes[_mapping_kind(part.path)] += part.private_clean + part.private_dirty
    return {kind: size for kind, size in sizes.items() if size}


def _mapping_kind(path: str) -> str:
    if path.startswith("/dev/zero"):
        return "/dev/zero"  # pinned host memory of CUDA's
    if path.startswith("/dev/shm"):
        return "/dev/shm"
    return {"[heap]": "heap", "[anon]": "anonymous", "[stack]": "stack"}.get(path, "files")


def tree(pid: int) -> list[int]:
    """A process and all its descendants, as the kernel lists them; much faster than a walk through /proc.

    Of a container's first process: all of the container. Not by their mark, since vLLM's engine processes name
    themselves (setproctitle) where their environment was.
    """
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        found.append(parent)
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                with contextlib.suppress(OSError):
                    waiting += map(int, (thread / "children").read_text().split())
    return found


def began_unix_s(pid: int) -> float:
    """When a process was made; 0 where it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def alive(pid: int) -> bool:
    """Whether the process exists and has not ended."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def stop_whole(mark: str, session: int | None) -> None:
    """SIGSTOP everything that belongs to an instance and return when all of it stands still."""
    stopped: set[int] = set()
    # A process may fork while the others are being stopped.
    while new := set(members(mark, session)) - stopped:
        send(new, signal.SIGSTOP)
        stopped |= new
    while any(_runs(pid) for pid in stopped):
        await asyncio.sleep(0.001)  # the kernel tells only the parent of each


def _runs(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


async def wait_gone(pid: int) -> str:
    """Return when the process has ended, having reaped it if it is our child, with a word on how it ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return _reap(pid)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    loop.add_reader(fd, _resolve, ended)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return _reap(pid)


def _resolve(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _reap(pid: int) -> str:
    try:
        _, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"signal {-code}"


async def kill_whole(mark: str, session: int | None) -> None:
    """SIGKILL everything that belongs to an instance and return when all of it is gone and reaped.

    Repeats until nothing is found, for a process may fork while it is being looked for.
    """
    while pids := members(mark, session):
        send(pids, signal.SIGKILL)
        await asyncio.gather(*(wait_gone(pid) for pid in pids))
        # One whose parent died in the same sweep becomes our child only now.
        for pid in pids:
            _reap(pid)
        if not any(alive(pid) for pid in pids):
            session = None  # what is left of it are zombies of somebody else's
