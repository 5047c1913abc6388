"""The CRIU program: which one it is, whether it works here, and what its logs say."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from typing import TYPE_CHECKING, Final

from proxy.errors import Fault
from proxy.host import command

if TYPE_CHECKING:
    from pathlib import Path

MIN_VERSION: Final = (4, 2)
"""3.17 fails on kernels from 6.x on (vDSO), 4.1 on 6.17 and later (SO_PASSCRED)."""


async def version(program: str) -> str:
    """Its version, or an empty string when it does not say one. Raises OSError."""
    _, output = await command.run(program, "--version")
    return version_in(output)


def version_in(output: str) -> str:
    """The version in what `criu --version` prints; an empty string where there is none."""
    found = re.search(r"^Version:\s*(\S+)", output, re.MULTILINE)
    return found[1] if found else ""


def is_recent(text: str) -> bool:
    """Whether a version is one that works."""
    return command.version_in(text) >= MIN_VERSION


async def why_not(program: str) -> tuple[str, str | None]:
    """Its version, and why it cannot checkpoint on this host (None: it can)."""
    if shutil.which(program) is None:
        return "", f"no program {program!r} in PATH; install CRIU 4.2 or later (make host)"
    try:
        found = await version(program)
    except OSError as error:
        return "", f"{program} cannot be run: {error.strerror}"
    if os.geteuid() != 0:
        return found, "checkpointing needs root"
    if not is_recent(found):
        return found, f"CRIU is {found or 'unknown'}, 4.2 or later is needed (make host)"
    status, output = await command.run(program, "check")
    return found, None if status == 0 else f"criu check fails: {_last_line(output)}"


_HOSTS: Final = tuple(
    os.strerror(number)
    for number in (
        errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY,
        errno.EEXIST, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM, errno.ENODEV, errno.EROFS,
    )
)  # fmt: skip
"""What the kernel says when the host is not as it was or has too little of something; CRIU only logs it."""


def fault(reason: str) -> Fault:
    """What CRIU's first error says of the image. It has one exit status for all, so its words have to be read."""
    return Fault.HOST if any(words in reason for words in _HOSTS) or "killed" in reason else Fault.IMAGE


def log_reason(log: Path, output: str) -> str:
    """CRIU's first error, which is the cause; the ones after it are consequences."""
    with contextlib.suppress(OSError):
        text = log.read_text("utf-8", "replace")
        errors = [line for line in text.splitlines() if "Error" in line and "RLIMIT_NOFILE" not in line]
        if errors:
            return f"CRIU: {errors[0].strip()}"
    return f"CRIU: {_last_line(output)}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"
