"""One managed engine: its states, the transition table, its leases and its generations.

Everything that changes an instance's state is in `TRANSITIONS`; an event that is not there raises
`IllegalTransitionError` and changes nothing. This module knows nothing of processes, HTTP or clocks.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proxy.errors import IllegalTransitionError
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """Where an instance is; the value is the word shown to people."""

    NEW = "new"
    WAKING = "waking"
    READY = "ready"
    RETIRING = "retiring"
    FALLING_ASLEEP = "falling_asleep"
    SLEEPING = "sleeping"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    CHECKPOINTING = "checkpointing"
    CHECKPOINTED = "checkpointed"
    CLONING = "cloning"
    ARCHIVING = "archiving"
    ARCHIVED = "archived"
    BROKEN = "broken"
    STOPPING = "stopping"
    GONE = "gone"


class Event(enum.Enum):
    """What happens to an instance. The first group starts something, the second says where it ended."""

    WAKE = "wake"
    RETIRE = "retire"
    READMIT = "readmit"
    SLEEP = "sleep"
    SUSPEND = "suspend"
    CHECKPOINT = "checkpoint"
    CLONE = "clone"
    ARCHIVE = "archive"
    STOP = "stop"

    AT_READY = "at_ready"
    AT_SLEEPING = "at_sleeping"
    AT_SUSPENDED = "at_suspended"
    AT_CHECKPOINTED = "at_checkpointed"
    AT_ARCHIVED = "at_archived"
    BROKE = "broke"
    WENT = "went"


def _table() -> dict[tuple[State, Event], State]:
    s, e = State, Event
    table: dict[tuple[State, Event], State] = {}
    for resting in (s.NEW, s.SLEEPING, s.SUSPENDED, s.CHECKPOINTED, s.ARCHIVED):
        table[resting, e.WAKE] = s.WAKING
    table[s.WAKING, e.AT_READY] = s.READY
    table[s.READY, e.RETIRE] = s.RETIRING
    table[s.RETIRING, e.READMIT] = s.READY
    for awake in (s.READY, s.RETIRING):
        table[awake, e.SLEEP] = s.FALLING_ASLEEP
    for live in (s.READY, s.RETIRING, s.SLEEPING):
        table[live, e.SUSPEND] = s.SUSPENDING
    for live in (s.READY, s.RETIRING, s.SLEEPING, s.SUSPENDED):
        table[live, e.CHECKPOINT] = s.CHECKPOINTING
    table[s.NEW, e.CLONE] = s.CLONING
    table[s.CHECKPOINTED, e.ARCHIVE] = s.ARCHIVING
    table[s.ARCHIVED, e.AT_CHECKPOINTED] = s.CHECKPOINTED  # its image came back to tmpfs
    # A step that failed without harm leaves the instance where it was.
    for moving, arrivals in {
        s.FALLING_ASLEEP: (e.AT_SLEEPING, e.AT_READY),
        s.SUSPENDING: (e.AT_SUSPENDED, e.AT_SLEEPING, e.AT_READY),
        s.CHECKPOINTING: (e.AT_CHECKPOINTED, e.AT_SUSPENDED, e.AT_SLEEPING, e.AT_READY),
        s.CLONING: (e.AT_CHECKPOINTED, e.AT_ARCHIVED),
        s.ARCHIVING: (e.AT_ARCHIVED, e.AT_CHECKPOINTED),
    }.items():
        for arrival in arrivals:
            table[moving, arrival] = _ARRIVALS[arrival]
    for alive in (
        s.WAKING, s.READY, s.RETIRING, s.FALLING_ASLEEP, s.SLEEPING, s.SUSPENDING, s.SUSPENDED, s.CHECKPOINTING,
        s.CLONING, s.ARCHIVING,
    ):  # fmt: skip
        table[alive, e.BROKE] = s.BROKEN
    # The processes of a broken instance are gone, its image is still good.
    table[s.BROKEN, e.AT_CHECKPOINTED] = s.CHECKPOINTED
    for state in (s.NEW, s.READY, s.RETIRING, s.SLEEPING, s.SUSPENDED, s.CHECKPOINTED, s.ARCHIVED, s.BROKEN):
        table[state, e.STOP] = s.STOPPING
    table[s.STOPPING, e.WENT] = s.GONE
    return table


_ARRIVALS: Final = {
    Event.AT_READY: State.READY,
    Event.AT_SLEEPING: State.SLEEPING,
    Event.AT_SUSPENDED: State.SUSPENDED,
    Event.AT_CHECKPOINTED: State.CHECKPOINTED,
    Event.AT_ARCHIVED: State.ARCHIVED,
}

TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = _table()
"""(state, event) → the state after it; a pair that is missing is illegal."""

ARRIVAL: Final[Mapping[Tier, Event]] = {
    Tier.READY: Event.AT_READY,
    Tier.SLEEPING: Event.AT_SLEEPING,
    Tier.SUSPENDED: Event.AT_SUSPENDED,
    Tier.CHECKPOINTED: Event.AT_CHECKPOINTED,
    Tier.ARCHIVED: Event.AT_ARCHIVED,
}
"""The event that says an instance has come to rest on a tier."""

DESCENT: Final[Mapping[Tier, Event]] = {
    Tier.SLEEPING: Event.SLEEP,
    Tier.SUSPENDED: Event.SUSPEND,
    Tier.CHECKPOINTED: Event.CHECKPOINT,
    Tier.ARCHIVED: Event.ARCHIVE,
    Tier.STOPPED: Event.STOP,
}
"""The event that starts the way down to a tier."""

RESTING: Final[Mapping[State, Tier]] = {
    State.NEW: Tier.STOPPED,
    State.READY: Tier.READY,
    State.SLEEPING: Tier.SLEEPING,
    State.SUSPENDED: Tier.SUSPENDED,
    State.CHECKPOINTED: Tier.CHECKPOINTED,
    State.ARCHIVED: Tier.ARCHIVED,
}
"""The states in which nothing is under way, and the tier each of them is."""

DESCENDING: Final = frozenset(
    {State.FALLING_ASLEEP, State.SUSPENDING, State.CHECKPOINTING, State.CLONING, State.ARCHIVING}
)
"""On the way to a tier from which it can be woken again once it is there."""

MOVING: Final = DESCENDING | {State.WAKING, State.BROKEN, State.STOPPING}
"""On the way to another state, which some task sees to."""

AWAKE: Final = frozenset(
    {State.WAKING, State.READY, State.RETIRING, State.FALLING_ASLEEP, State.SUSPENDING, State.CHECKPOINTING}
)
"""Holding, or about to hold, what an awake engine holds."""


@dataclass(slots=True, frozen=True)
class WakeRecord:
    """How an instance was last brought to ready: from which tier, when (Unix time), and how long each stage took."""

    found: Tier
    reached_from: Tier
    """The tier that worked in the end; colder than `found` when tiers in between failed."""
    at_unix_s: float
    ended: float
    """The same moment by the pool's clock."""
    seconds: float
    stages: Mapping[str, float]
    starts: Mapping[str, float] = field(default_factory=dict)
    """When each stage began, in seconds after the wake did."""


class Instance:
    """One managed engine of a model.

    `generation` counts wakes and breaks: a result or a lease that carries an older one belongs to an engine that is
    no more, and is dropped.
    `idle_since` is a reading of the pool's clock, set whenever the last lease ends or a tier is reached; None while
    there are leases.
    """

    __slots__ = (
        "barred", "evicted", "generation", "id", "idle_since", "last_used_unix_s", "last_wake", "leases",
        "model", "ordered", "postponed", "sleep_level", "state", "waking_from",
    )  # fmt: skip

    def __init__(self, id_: str, model: str) -> None:
        self.id = id_
        self.model = model
        self.state = State.NEW
        self.generation = 0
        self.leases = 0
        self.idle_since: float | None = None
        self.last_used_unix_s: float | None = None
        self.sleep_level = 0
        """vLLM's sleep level the engine is in: 0 awake, 1 weights in host RAM, 2 weights dropped."""
        self.evicted = False
        """It stepped down to make room and has not been woken since: it goes on until its GPU is free."""
        self.barred: set[Tier] = set()
        """Tiers that this engine cannot step down to; not tried again until it was started anew."""
        self.postponed: dict[Tier, float] = {}
        """Tiers that could not be stepped down to for now, as for want of space, and when to try again."""
        self.ordered: Tier | None = None
        """An operator wants it on this tier, or a colder one; it takes no new request until it is there."""
        self.waking_from: Tier | None = None
        self.last_wake: WakeRecord | None = None

    def __repr__(self) -> str:
        return f"<Instance {self.id} {self.state.value} leases={self.leases} generation={self.generation}>"

    def apply(self, event: Event) -> State:
        """Move along the table and return the new state.

        Raises IllegalTransitionError, with nothing changed, when the table has no such move, or when the event would
        take a leased engine away.
        """
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise IllegalTransitionError(f"{self.id}: no event {event.value!r} in state {self.state.value!r}")
        if self.leases and event in _NEEDS_NO_LEASES:
            raise IllegalTransitionError(f"{self.id}: {event.value!r} with {self.leases} leases in use")
        self.state = target
        if event in (Event.WAKE, Event.BROKE):
            self.generation += 1
            self.evicted = False
        if event is Event.BROKE:
            self.leases = 0  # whoever holds one finds its generation over
        return target

    @property
    def tier(self) -> Tier:
        """The tier a request would find: where it rests, or where the move under way began or will end."""
        if self.state is State.WAKING:
            return self.waking_from if self.waking_from is not None else Tier.STOPPED
        return _TIER_OF[self.state]

    def begin_lease(self, now_unix_s: float) -> None:
        """Count one more request; only a ready instance takes one."""
        if self.state is not State.READY:
            raise IllegalTransitionError(f"{self.id}: lease in state {self.state.value!r}")
        self.leases += 1
        self.idle_since = None
        self.last_used_unix_s = now_unix_s

    def end_lease(self, now: float, now_unix_s: float) -> None:
        """Count one request less; with the last one the instance is idle from `now`."""
        if self.leases <= 0:
            raise IllegalTransitionError(f"{self.id}: a lease ended twice")
        self.leases -= 1
        self.last_used_unix_s = now_unix_s
        if self.leases == 0:
            self.idle_since = now


_NEEDS_NO_LEASES: Final = frozenset({Event.SLEEP, Event.SUSPEND, Event.CHECKPOINT})

_TIER_OF: Final[Mapping[State, Tier]] = {
    **RESTING,
    State.RETIRING: Tier.READY,
    State.FALLING_ASLEEP: Tier.SLEEPING,
    State.SUSPENDING: Tier.SUSPENDED,
    State.CHECKPOINTING: Tier.CHECKPOINTED,
    State.CLONING: Tier.CHECKPOINTED,
    State.ARCHIVING: Tier.ARCHIVED,
    State.BROKEN: Tier.STOPPED,
    State.STOPPING: Tier.STOPPED,
    State.GONE: Tier.STOPPED,
}
