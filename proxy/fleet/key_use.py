"""What the holders of keys use on each host, so that their limits hold for all together.

`PREFIX.use.HOST`: `{v, host, boot, seq, keys: {id: [requests, tokens, running]}}`, each second in which something was
used: requests and tokens since the last message, and how many run now. What is lost is not counted elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import orjson

from proxy.fleet.record import HOST, MOST_BYTES, VERSION, RecordError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MOST: Final = 10**9
_MOST_KEYS: Final = 10_000
_ID_BYTES: Final = 64
_STALE_S: Final = 5.0


class Use(NamedTuple):
    """Of one key."""

    requests: int
    tokens: int
    """Below 0 where a request cost less than it was expected to."""
    running: int


class KeyLimits(Protocol):
    """Who limits the keys of this host."""

    def taken(self) -> Mapping[str, Use]:
        """What was used here since this was asked last, and what runs; of keys that are limited."""

    def used_elsewhere(self, uses: Mapping[str, Use]) -> None:
        """Count what was used on another host."""

    def running_elsewhere(self, running: Mapping[str, int]) -> None:
        """How many requests of each key run on other hosts, all together."""


@dataclass(slots=True)
class _Source:
    boot: str
    seq: int
    seen: float
    running: dict[str, int]


class KeyUses:
    """Says what is used here, and counts here what is used elsewhere. `clock` is monotonic, in seconds."""

    def __init__(self, host: str, boot: str, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self._host = host
        self._boot = boot
        self._limits = limits
        self._clock = clock
        self._seq = 0
        self._said: dict[str, int] = {}
        """How many ran, as it was said last."""
        self._sources: dict[str, _Source] = {}
        self._running: dict[str, int] = {}

    def message(self) -> bytes | None:
        """What to publish now, if there is anything. Runs are said again each time, for those who missed it."""
        self._forget_stale()
        taken = self._limits.taken()
        keys = {i: [*use] for i, use in taken.items() if use.requests or use.tokens or use.running or i in self._said}
        self._said = {key: use.running for key, use in taken.items() if use.running}
        if not keys:
            return None
        self._seq += 1
        said = {"v": VERSION, "host": self._host, "boot": self._boot, "seq": self._seq, "keys": keys}
        return orjson.dumps(said)

    def take(self, host: str, data: bytes) -> None:
        """Count what another host, of this name, has published. Raises RecordError."""
        boot, seq, uses = _parsed(host, data)
        source = self._sources.get(host)
        if source is not None and source.boot == boot and seq <= source.seq:
            return  # it came twice, or late
        running = {key: use.running for key, use in uses.items() if use.running}
        self._sources[host] = _Source(boot, seq, self._clock(), running)
        self._limits.used_elsewhere(uses)
        self._tell()

    def _forget_stale(self) -> None:
        oldest = self._clock() - _STALE_S
        for source in self._sources.values():
            if source.seen < oldest:
                source.running = {}
        self._tell()

    def _tell(self) -> None:
        total: dict[str, int] = {}
        for source in self._sources.values():
            for key, count in source.running.items():
                total[key] = total.get(key, 0) + count
        if total != self._running:
            self._running = total
            self._limits.running_elsewhere(total)


def _parsed(host: str, data: bytes) -> tuple[str, int, dict[str, Use]]:
    if len(data) > MOST_BYTES:
        raise RecordError(f"over {MOST_BYTES} bytes")
    try:
        found = orjson.loads(data)
        version, boot, seq, keys = (found[name] for name in ("v", "boot", "seq", "keys"))
        named = found["host"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise RecordError("no use of keys") from None
    if type(version) is not int or version > VERSION or named != host or not HOST.fullmatch(host):
        raise RecordError("of another host or version")
    if type(boot) is not str or type(seq) is not int or not isinstance(keys, dict) or len(keys) > _MOST_KEYS:
        raise RecordError("no use of keys")
    return boot, seq, {key: _use(key, value) for key, value in keys.items()}


def _use(key: str, value: Any) -> Use:
    if not 0 < len(key) <= _ID_BYTES or type(value) is not list or len(value) < len(Use._fields):
        raise RecordError("a use that is none")
    requests, tokens, running = value[:3]
    for number in (requests, tokens, running):
        if type(number) is not int or not -_MOST <= number <= _MOST:
            raise RecordError("a use with a number out of its range")
    return Use(max(0, requests), tokens, max(0, running))
