"""Files that others can neither read nor change: keys and tokens."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from proxy.errors import ConfigError
from proxy.host import owned

if TYPE_CHECKING:
    from pathlib import Path

_LIMIT_BYTES: Final = 64 << 20


def read(path: Path, advice: str) -> str:
    """The text of a file that others can neither read nor change. Raises ConfigError with `advice` where they can."""
    try:
        with owned.open_plain(path, follow=True) as file:
            facts = os.fstat(file.fileno())
            text = file.read(_LIMIT_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(str(path), [f"cannot be read: {reason}; {advice}"]) from None
    problems = []
    if facts.st_mode & 0o027:
        problems.append(
            f"mode {stat.S_IMODE(facts.st_mode):04o}: others may read it, or the group may write it; {advice}"
        )
    if facts.st_uid not in (0, os.geteuid()):
        problems.append(f"belongs to user {facts.st_uid}, who is neither root nor the one that runs warmpool; {advice}")
    if problems:
        raise ConfigError(str(path), problems)
    return text


def write(path: Path, text: str) -> None:
    """Replace a file at once, with its owner and mode; 0600 where there was none. Raises ConfigError."""
    try:
        before = path.stat() if path.exists() else None
        with owned.replacing(path) as file:
            if before is not None:
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            file.write(text.encode())
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be written: {error.strerror}"]) from None
