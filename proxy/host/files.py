"""Files that warmpool writes for others to read: whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.host import owned

if TYPE_CHECKING:
    from pathlib import Path


def write_if_other(path: Path, content: bytes, *, mode: int = 0o600, folder_mode: int = 0o700) -> Path:
    """Make a file have this content, beside and renamed; nothing is done when it has it."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(mode=folder_mode, parents=True, exist_ok=True)
        with owned.replacing(path, mode) as file:
            file.write(content)
    return path
