"""The ladder: the tiers that an instance can be in."""

from __future__ import annotations

import enum


class Tier(enum.IntEnum):
    """The tiers of the ladder, warmest first; comparison follows the ladder, so `a < b` is "a is warmer"."""

    READY = 0
    SLEEPING = 1
    SUSPENDED = 2
    CHECKPOINTED = 3
    ARCHIVED = 4
    STOPPED = 5

    label: str
    """The word for headers, metrics and JSON: `ready`, `sleeping`, …"""

    def __init__(self, _: int) -> None:
        self.label = self.name.lower()
