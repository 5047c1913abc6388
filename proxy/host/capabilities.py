"""What the kernel lets this process do (capabilities(7))."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

CAP_SYS_RESOURCE: Final = 24  # linux/capability.h
STATUS: Final = Path("/proc/self/status")


def has(capability: int, status: str | None = None) -> bool:
    """Whether it has a capability of linux/capability.h; `status`: what `STATUS` says, if it was read already."""
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", STATUS.read_text() if status is None else status, re.MULTILINE)
    return bool(int(found[1], 16) >> capability & 1) if found else False
