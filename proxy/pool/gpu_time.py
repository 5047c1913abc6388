"""Who had the GPU, for how long: the time that an instance holds it, divided among the requests that run in it.

At each moment it is divided evenly among those that run then; while none does it is idle time, which is the model's.
What one request would have got since the start is kept as one number, which grows by 1/n of the time while n run
(processor sharing's virtual time), so that a request that begins or ends costs the same however many others there are,
and the parts add up to the whole at any moment, those of requests that still run among them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Taken(NamedTuple):
    """GPU seconds since they were last taken."""

    idle_s: float
    """While no request ran."""
    unnamed_s: float
    """Of requests without a key."""
    by_key: Mapping[str, float]
    """Of the others, by the key's name."""


class _Key:
    """The requests of one key."""

    __slots__ = ("running", "seconds", "share")

    def __init__(self, share: float) -> None:
        self.running = 0
        self.seconds = 0.0
        self.share = share

    def settle(self, share: float) -> None:
        self.seconds += self.running * (share - self.share)
        self.share = share


class GpuTime:
    """The time of one instance, on so many `gpus`. `clock` is monotonic, in seconds."""

    __slots__ = ("_at", "_busy_s", "_clock", "_holds", "_idle_s", "_keys", "_running", "_share", "ended", "gpus")

    def __init__(self, gpus: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.gpus = gpus
        self._clock = clock
        self._at = clock()
        self._holds = False
        self._running = 0
        self._busy_s = self._idle_s = self._share = 0.0
        self._keys: dict[str, _Key] = {}
        self.ended = False
        """The instance is gone: nothing comes after what is there to be taken."""

    def hold(self, *, holds: bool) -> None:
        """Whether it holds the GPU from now on; requests that stand still meanwhile get nothing."""
        if holds is not self._holds:
            self._advance()
            self._holds = holds

    def begin(self) -> None:
        """One more request runs, for nobody until `charge`."""
        # Among others, and with no key, nothing depends on when: this is done for every request.
        if not self._running or self._keys:
            self._advance()
        self._running += 1

    def charge(self, key: str) -> None:
        """One of those that run is of this key; that it had until now stays nobody's."""
        self._advance()
        entry = self._keys.get(key)
        if entry is None:
            entry = self._keys[key] = _Key(self._share)
        entry.settle(self._share)
        entry.running += 1

    def end(self, key: str | None = None) -> None:
        """One has ended; `key`: whose it was, if it was charged."""
        if self._running == 1 or self._keys:
            self._advance()
        self._running -= 1
        if key is not None:
            entry = self._keys[key]
            entry.settle(self._share)
            entry.running -= 1

    def clear(self) -> None:
        """None runs any more: the engine broke."""
        self._advance()
        for entry in self._keys.values():
            entry.settle(self._share)
            entry.running = 0
        self._running = 0

    def take(self) -> Taken:
        """What came together since the last time."""
        self._advance()
        by_key = {}
        for name, entry in [*self._keys.items()]:
            entry.settle(self._share)
            if entry.seconds:
                by_key[name], entry.seconds = entry.seconds * self.gpus, 0.0
            if not entry.running:
                del self._keys[name]
        unnamed_s = max(0.0, self._busy_s * self.gpus - sum(by_key.values()))
        idle_s = self._idle_s * self.gpus
        self._busy_s = self._idle_s = 0.0
        return Taken(idle_s, unnamed_s, by_key)

    def _advance(self) -> None:
        now = self._clock()
        if self._holds:
            if self._running:
                passed = now - self._at
                self._busy_s += passed
                self._share += passed / self._running
            else:
                self._idle_s += now - self._at
        self._at = now
