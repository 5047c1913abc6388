"""What is known of the other hosts: their last words, aged by this host's own monotonic clock.

Only what comes in its order is taken in, so that what is known of a host is always what that host once was. What is
missing shows as a gap in `seq`: then the host is asked for all of it, and what is known stays until that comes.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from proxy.fleet.record import VERSION, Offer, RecordError, offer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from proxy.fleet.record import Record

STALE_S: Final = 5.0
"""A host of which nothing was heard for so long is not sent anything."""
HINT_S: Final = 60.0
"""The same while nobody can be heard, since the directory cannot be reached."""
READY: Final = "ready"
_BOOTS: Final = 4


class Taken(enum.Enum):
    """What became of a record."""

    NEW = enum.auto()
    OLD = enum.auto()
    """It was known, or something newer."""
    GAP = enum.auto()
    """Something before it is missing: that host should say everything again."""
    NEWER_VERSION = enum.auto()
    """Of a version that is not known here: shown, and not used."""
    TWICE = enum.auto()
    """Two processes go by this name: it came from one that another had followed."""


class HostEntry:
    """One host."""

    __slots__ = (
        "aliases", "boot", "boots", "drain", "name", "release", "rest_until", "rests", "role", "seen", "seq", "url",
        "usable_seen", "version",
    )  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = ""
        self.role = "host"
        self.version = VERSION
        self.release = ""
        self.boot = ""
        self.boots: deque[str] = deque(maxlen=_BOOTS)
        self.seq = -1
        self.drain = False
        self.aliases: Mapping[str, str] = {}
        """Other names of its models."""
        self.seen = -math.inf
        """When its last record came."""
        self.usable_seen = -math.inf
        """The same, as long as requests may be sent to it."""
        self.rest_until = -math.inf
        """It could not be reached: until then nothing is sent to it."""
        self.rests = 0
        """How often, one after the other."""


class Candidate:
    """An offer of a host for one model."""

    __slots__ = ("host", "is_ready", "offer", "price_ms", "raw", "room")

    def __init__(self, host: HostEntry, made: Offer, raw: list[Any] | None = None, extra_ms: float = 0.0) -> None:
        self.host = host
        self.offer = made
        self.is_ready, self.room = made.tier == READY, made.room
        self.price_ms = made.wait_ms + made.hurt_ms + extra_ms
        self.raw = raw


_NONE: Final[dict[str, Candidate]] = {}
HOP_MS: Final = 2.0
"""What a request loses by going to another host."""
_REST_S: Final = 1.0
_MOST_REST_S: Final = 30.0


class Table:
    """The other hosts, and what they offer by model; `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.hosts: dict[str, HostEntry] = {}
        self._models: dict[str, dict[str, Candidate]] = {}
        self._of_host: dict[str, dict[str, Candidate]] = {}
        self._ranks: dict[str, dict[str, int]] = {}
        self._aliases: dict[str, str] | None = {}
        """Of all hosts; None: to be gathered anew."""
        self._deaf_since: float | None = None
        """Since when the directory cannot be reached."""
        self._heard_again = -math.inf

    # --- what hosts say ---

    def take(self, record: Record) -> Taken:
        """Take a record in. Raises RecordError for one whose offers cannot be read; nothing has changed then."""
        name = record.host
        host = self.hosts.get(name)
        if host is None:
            host = HostEntry(name)
        known = host.boot == record.boot
        if known and record.seq <= host.seq:
            return Taken.OLD
        if not record.usable:
            self._models_of(name, {})
            self._note(host, record)
            return Taken.NEWER_VERSION
        if not record.full and not (known and record.seq == host.seq + 1):
            return Taken.GAP
        mine = self._of_host.get(name, _NONE)
        changed = self._changed(host, mine, record)
        twice = not known and record.boot in host.boots
        self._note(host, record)
        if record.full and mine.keys() != record.models.keys():
            self._models_of(name, {model: changed.get(model) or mine[model] for model in record.models})
        else:
            self._change(name, changed)
        return Taken.TWICE if twice else Taken.NEW

    def _changed(self, host: HostEntry, mine: dict[str, Candidate], record: Record) -> dict[str, Candidate | None]:
        """The offers of a record that are others than before."""
        found: dict[str, Candidate | None] = {}
        for model, raw in record.models.items():
            before = mine.get(model)
            if before is not None and before.raw == raw:
                continue
            if raw is not None:
                found[model] = Candidate(host, offer(model, raw), raw, HOP_MS)
            elif record.full:
                raise RecordError("a full record with a model that is null")
            else:
                found[model] = None
        return found

    def _note(self, host: HostEntry, record: Record) -> None:
        now = self._clock()
        if host.boot != record.boot:
            host.boots.append(record.boot)
            host.rest_until, host.rests = -math.inf, 0
        host.boot, host.seq, host.version = record.boot, record.seq, record.version
        host.release, host.seen = record.release, now
        if record.usable:
            host.url, host.role, host.drain = record.url, record.role, record.drain
            if record.full and record.aliases != host.aliases:
                host.aliases = record.aliases
                self._aliases = None
        self._set_usable(host)
        self.hosts[host.name] = host

    def _set_usable(self, host: HostEntry) -> None:
        out = host.drain or host.version > VERSION or host.rest_until > self._clock()
        host.usable_seen = -math.inf if out else host.seen

    def _change(self, name: str, changed: dict[str, Candidate | None]) -> None:
        mine = self._of_host.setdefault(name, {})
        for model, found in changed.items():
            if found is None:
                mine.pop(model, None)
                self._drop(model, name)
            else:
                mine[model] = self._models.setdefault(model, {})[name] = found

    def _models_of(self, name: str, offers: dict[str, Candidate]) -> None:
        """Have these be all that a host offers."""
        before = self._of_host.get(name, _NONE)
        for model in before:
            if model not in offers:
                self._drop(model, name)
        for model, found in offers.items():
            if before.get(model) is not found:
                self._models.setdefault(model, {})[name] = found
        self._of_host[name] = offers

    def _drop(self, model: str, name: str) -> None:
        offers = self._models.get(model)
        if offers is not None:
            offers.pop(name, None)
            if not offers:
                del self._models[model]
                self._ranks.pop(model, None)

    def correct(self, name: str, model: str, present: Offer | None) -> None:
        """A host has said, to a request, what it offers just now; until its next record, which says so too."""
        host, mine = self.hosts.get(name), self._of_host.get(name)
        if host is None or mine is None or model not in mine:
            return
        if present is None:
            del mine[model]
            self._drop(model, name)
        else:
            mine[model] = self._models[model][name] = Candidate(host, present, None, HOP_MS)

    def forget_old(self) -> None:
        """Let go of hosts that were not heard of for long."""
        oldest = self._clock() - 10 * HINT_S
        for name, host in [*self.hosts.items()]:
            if host.seen < oldest:
                self._models_of(name, {})
                self._aliases = None
                del self.hosts[name], self._of_host[name]

    # --- the way to them ---

    def deaf(self) -> None:
        """The directory cannot be reached: what is known are hints, which may be older."""
        if self._deaf_since is None:
            self._deaf_since = self._clock()

    def hears(self) -> None:
        """It can be reached again; hosts have a little time to be heard."""
        if self._deaf_since is not None:
            self._deaf_since, self._heard_again = None, self._clock()

    @property
    def oldest(self) -> float:
        """Hosts that were heard of before that are stale."""
        now = self._clock()
        hints = self._deaf_since is not None or now < self._heard_again + STALE_S
        return now - (HINT_S if hints else STALE_S)

    def unreachable(self, name: str) -> float:
        """A request could not be brought to a host; for how long it is left alone now."""
        host = self.hosts.get(name)
        if host is None:
            return 0.0
        rest_s = min(_MOST_REST_S, _REST_S * 2.0**host.rests)
        if host.rest_until <= self._clock():  # requests that fail at once are one reason
            host.rests += 1
            host.rest_until = self._clock() + rest_s
        self._set_usable(host)
        return rest_s

    def reached(self, name: str) -> None:
        """A host has answered a request."""
        host = self.hosts.get(name)
        if host is not None and host.rests:
            host.rests, host.rest_until = 0, -math.inf
            self._set_usable(host)

    def is_live(self, host: HostEntry) -> bool:
        """Whether it was heard of lately."""
        return host.seen >= self.oldest

    # --- who asks ---

    def offers(self, model: str) -> Collection[Candidate]:
        """All that hosts offer for a model, stale ones among them."""
        return self._models.get(model, _NONE).values()

    def resting(self, model: str) -> list[Candidate]:
        """The offers of hosts that could not be reached just now, and say themselves that they are there."""
        oldest, now = self.oldest, self._clock()
        return [
            each
            for each in self.offers(model)
            if each.host.rest_until > now and each.host.seen >= oldest and not each.host.drain
        ]

    def offers_of(self, name: str) -> dict[str, Candidate]:
        """What a host offers, by model."""
        return self._of_host.get(name, _NONE)

    def models(self) -> list[str]:
        """All models that some host offers that was heard of lately."""
        return [model for model in self._models if self.knows(model)]

    def knows(self, model: str) -> bool:
        """Whether a host offers a model that was heard of lately, though it may be out of reach just now."""
        oldest = self.oldest
        return any(
            offered.host.usable_seen >= oldest or (offered.host.seen >= oldest and not offered.host.drain)
            for offered in self.offers(model)
        )

    def name_of(self, called: str) -> str | None:
        """The name of the model that some host calls so; None where none that was heard of lately has one."""
        if self.knows(called):
            return called
        name = self.aliases().get(called)
        return name if name is not None and self.knows(name) else None

    def aliases(self) -> Mapping[str, str]:
        """Other names of models; of one that hosts use for several, that of the first host by name."""
        if self._aliases is None:
            self._aliases = {}
            for _, host in sorted(self.hosts.items(), reverse=True):
                self._aliases |= host.aliases
        return self._aliases

    def rank(self, model: str, host: str) -> int:
        """The place of a host for a model; the highest is the first."""
        ranks = self._ranks.setdefault(model, {})
        if (found := ranks.get(host)) is None:
            found = ranks[host] = rendezvous(model, host)
        return found


def rendezvous(model: str, host: str) -> int:
    """The same on every host: highest random weight (Thaler, Ravishankar: Using name-based mappings, 1998)."""
    digest = hashlib.blake2b(f"{model}\0{host}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
