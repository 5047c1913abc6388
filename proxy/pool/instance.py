"""One managed engine: its states, the transition table, its leases and its generations.

Everything that changes an instance's state is in `TRANSITIONS`; an event that is not there raises
`IllegalTransitionError` and changes nothing. Nothing here starts or asks anything, and nobody else stores to an
instance: the others call its methods, which say what happened.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal

from proxy.errors import IllegalTransitionError
from proxy.pool.gpu_time import GpuTime
from proxy.pool.image import Image
from proxy.pool.observed import Observed
from proxy.tiers import Tier

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from proxy.engine.client import EngineClient
    from proxy.pool.command import Command
    from proxy.runtime.base import EngineProcess


class State(enum.Enum):
    """Where an instance is; the value is the word shown to people."""

    NEW = "new"
    WAKING = "waking"
    READY = "ready"
    RETIRING = "retiring"
    PAUSING = "pausing"
    PAUSED = "paused"
    UNPAUSING = "unpausing"
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


_READY: Final = State.READY
"""For what is asked of every request: Python 3.11 takes longer for a member of an enumeration than for a call."""


class Event(enum.Enum):
    """What happens to an instance. The first group starts something, the second says where it ended."""

    WAKE = "wake"
    RETIRE = "retire"
    READMIT = "readmit"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    SLEEP = "sleep"
    SUSPEND = "suspend"
    CHECKPOINT = "checkpoint"
    CLONE = "clone"
    ARCHIVE = "archive"
    STOP = "stop"

    AT_READY = "at_ready"
    AT_PAUSED = "at_paused"
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
    # Its requests stand still, with their leases; nothing falls through from here to a colder tier.
    for awake in (s.READY, s.RETIRING):
        table[awake, e.PAUSE] = s.PAUSING
    table[s.PAUSING, e.AT_PAUSED] = s.PAUSED
    table[s.PAUSED, e.UNPAUSE] = s.UNPAUSING
    for going_on in (s.PAUSING, s.UNPAUSING):
        table[going_on, e.AT_READY] = s.READY
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
        s.WAKING, s.READY, s.RETIRING, s.PAUSING, s.PAUSED, s.UNPAUSING, s.FALLING_ASLEEP, s.SLEEPING, s.SUSPENDING,
        s.SUSPENDED, s.CHECKPOINTING, s.CLONING, s.ARCHIVING,
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

MOVING: Final = DESCENDING | {State.WAKING, State.PAUSING, State.UNPAUSING, State.BROKEN, State.STOPPING}
"""On the way to another state, which some task sees to."""

AWAKE: Final = frozenset(
    {
        State.WAKING, State.READY, State.RETIRING, State.PAUSING, State.UNPAUSING, State.FALLING_ASLEEP,
        State.SUSPENDING, State.CHECKPOINTING,
    }
)  # fmt: skip
"""Holding, or about to hold, what an awake engine holds."""

_ON_GPU: Final = frozenset({State.WAKING, State.READY, State.RETIRING, State.PAUSING, State.UNPAUSING})
_LEAVING_GPU: Final = frozenset({State.FALLING_ASLEEP, State.SUSPENDING, State.CHECKPOINTING})
"""For `GpuTime`: it has the GPU; it has it if it had it before, as one that sleeps has not."""
_RUNS: Final = itertools.count(1)


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


class Instance(Observed):
    """One managed engine of a model.

    `generation` counts wakes and breaks: a result or a lease that carries an older one belongs to an engine that is
    no more, and is dropped.
    `idle_since` is a reading of the pool's clock, set whenever the last lease ends or a tier is reached; None while
    there are leases.
    """

    __slots__ = (
        "barred", "can_pause", "canary", "client", "command", "discards_image", "engine", "evicted", "failed_steps",
        "from_image", "generation", "gpu_time", "id", "idle_since", "image", "keep_until", "last_used_unix_s",
        "last_wake", "leases", "loading", "model", "on_change", "on_hold", "pausable", "paused_since", "postponed",
        "run", "sleep_level", "state", "task", "turn_since", "unanswered", "unproven", "unwanted", "wake_began",
        "waking_from", "warmup", "watcher", "weights_copy",
    )  # fmt: skip

    def __init__(self, id_: str, model: str, image: Image | None = None, gpu_time: GpuTime | None = None) -> None:
        self.on_change = None
        self.gpu_time = GpuTime() if gpu_time is None else gpu_time
        """Who had the GPU of what it held it for."""
        self.id = id_
        self.model = model
        self.state = State.NEW
        self.generation = 0
        self.leases = 0
        self.unanswered = 0
        """Of those, streams that have got no token yet."""
        self.idle_since: float | None = None
        self.last_used_unix_s: float | None = None
        """When its last lease ended; it is in use while it has any."""
        self.sleep_level = 0
        """vLLM's sleep level the engine is in: 0 awake, 1 weights in host RAM, 2 weights dropped."""
        self.evicted = False
        """It stepped down to make room and has not been woken since: it goes on until its GPU is free."""
        self.barred: set[Tier] = set()
        """Tiers that this engine cannot step down to; not tried again until it was started anew."""
        self.postponed: dict[Tier, float] = {}
        """Tiers that could not be stepped down to for now, as for want of space, and when to try again."""
        self.keep_until = -math.inf
        """Until when, by the pool's clock, somebody has asked for it to stay ready while it is idle."""
        self.unwanted = False
        """Who used it last needs it no more: its place is free at once."""
        self.command: Command | None = None
        """What an operator wants of it and has not come true yet."""
        self.waking_from: Tier | None = None
        self.wake_began = 0.0
        self.last_wake: WakeRecord | None = None
        self.turn_since: float | None = None
        """When it was last woken or unpaused: it has been running since."""
        self.can_pause = False
        """Its requests can stand still while another model runs."""
        self.pausable = False
        """Its engine says that they can, with a copy of its weights."""
        self.paused_since: float | None = None
        """When its requests were made to stand still, while they are."""
        self.on_hold = False
        """An operator had it paused: it goes on when he says so, and not before."""

        self.run = next(_RUNS)
        """Another number, of all instances, whenever its engine is another one: started, or restored."""
        self.from_image = False
        """Its engine was restored."""

        # What the transitions work with.
        self.image = Image() if image is None else image
        self.engine: EngineProcess | None = None
        self.client: EngineClient | None = None
        self.task: asyncio.Task[None] | None = None
        """The one move under way."""
        self.watcher: asyncio.Task[str] | None = None
        """Ends when the engine does."""
        self.canary: str | None = None
        """What the running engine answers."""
        self.unproven = False
        """It was restored, and was not given fresh randomness nor asked for its canary, if that is due, since."""
        self.warmup: list[dict[str, float]] = []
        self.weights_copy: Literal["none", "good", "lost"] = "none"
        """`good`: there is a copy of the weights that fits this engine; `lost`: there was one."""
        self.failed_steps = 0
        """Steps down that failed without harm, in a row."""
        self.discards_image = False
        """Removing it deletes the image that it shares."""
        self.loading = False
        """Started from nothing and not healthy yet: another warmpool could go on from here."""

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
        self._note_gpu_time()
        if event in (Event.WAKE, Event.BROKE):
            self.generation += 1
            self.evicted = self.unwanted = False
        if event is Event.BROKE:
            self.paused_since, self.on_hold = None, False
            self.unanswered = 0
            self.gpu_time.clear()
            self.leases = 0  # whoever holds one finds its generation over
        return target

    def _note_gpu_time(self) -> None:
        if self.state not in _LEAVING_GPU:
            self.gpu_time.hold(holds=self.state in _ON_GPU)
        self.gpu_time.ended = self.state is State.GONE

    def begin_wake(self, origin: Tier, began: float) -> None:
        """It is woken from a tier since `began`."""
        self.apply(Event.WAKE)
        self.waking_from, self.wake_began = origin, began

    def woken(self, record: WakeRecord) -> None:
        """It is ready, and idle since then."""
        self.apply(Event.AT_READY)
        self.waking_from, self.last_wake, self.idle_since = None, record, record.ended
        self.turn_since = record.ended

    def begin_pause(self) -> None:
        """Its requests are made to stand still."""
        self.apply(Event.PAUSE)

    def paused(self, now: float) -> None:
        """They stand still."""
        self.apply(Event.AT_PAUSED)
        self.paused_since = now

    def begin_unpause(self) -> None:
        """Its requests are made to go on."""
        self.apply(Event.UNPAUSE)

    def runs_on(self, now: float) -> None:
        """Its requests go on, after a pause or because it could not be paused."""
        self.apply(Event.AT_READY)
        self.paused_since, self.turn_since, self.on_hold = None, now, False

    def hold(self) -> None:
        """It stays paused until `let_go`."""
        self.on_hold = True

    def let_go(self) -> None:
        """It goes on as soon as there is room."""
        self.on_hold = False

    def learn_pausable(self, *, pausable: bool) -> None:
        """What its engine says of pauses."""
        self.pausable = pausable
        self._note_can_pause()

    def no_pauses(self) -> None:
        """This engine could not be paused; that is not tried again unless something says that it can be now."""
        self.learn_pausable(pausable=False)

    def _note_can_pause(self) -> None:
        self.can_pause = self.pausable and self.weights_copy == "good"

    def begin_step_down(self, to: Tier, *, evicted: bool) -> None:
        """It goes to a colder tier; `evicted`: to make room."""
        self.apply(DESCENT[to])
        self.evicted = evicted

    def rest(self, tier: Tier, now: float) -> None:
        """It has come to rest on a tier, and is idle there from `now`."""
        self.apply(ARRIVAL[tier])
        self.idle_since = now

    def adopt(self, state: State, now: float) -> None:
        """An earlier process left it in this state; only a new one can be found so."""
        if self.state is not State.NEW:
            raise IllegalTransitionError(f"{self.id}: adopted in state {self.state.value!r}")
        self.state, self.idle_since = state, now
        self._note_gpu_time()
        if state is State.PAUSED:
            self.paused_since = now

    def started(self) -> None:
        """Its engine was started from nothing: what the one before could not do is not known of this one."""
        self.run, self.from_image = next(_RUNS), False
        self.sleep_level = 0
        self.pausable = self.can_pause = False
        self.barred.clear()
        self.postponed.clear()

    # --- its engine ---

    def reserve(self, engine: EngineProcess) -> None:
        """An engine is about to be started: what is left of a start that is cut off can be removed by this."""
        self.engine = self.engine or engine

    def attach(self, engine: EngineProcess, connect: Callable[[EngineProcess], EngineClient]) -> None:
        """This is its engine; `connect` makes the client of one that has none yet."""
        self.engine = engine
        if self.client is None:
            self.client = connect(engine)
        else:
            self.client.base_url = engine.base_url

    def watched_by(self, watcher: asyncio.Task[str]) -> None:
        """The end of its engine is learned from this task."""
        self.watcher = watcher

    def unwatch(self) -> asyncio.Task[str] | None:
        """Nobody is told of the end of its engine any more; the task that would have."""
        watcher, self.watcher = self.watcher, None
        return watcher

    def moved_by(self, task: asyncio.Task[None]) -> None:
        """This task takes it out of the moving state that it is in."""
        self.task = task

    def begin_load(self) -> None:
        """Its engine was started from nothing, and is not healthy yet."""
        self.loading = True

    def end_load(self) -> None:
        """Its engine is healthy, or will not be."""
        self.loading = False

    def warmed_up(self, requests: list[dict[str, float]]) -> None:
        """Its engine was started from nothing and has answered these requests; it has no image behind it."""
        self.warmup = requests
        self.canary, self.weights_copy, self.unproven = None, "none", False
        self._note_can_pause()

    def answers(self, canary: str | None) -> None:
        """What its engine answers, which one that is restored from its image has to repeat; None: it cannot say."""
        self.canary = canary

    def restored(self, *, copies_weights: bool) -> None:
        """Its engine came from its image, and has still to prove itself."""
        self.run, self.from_image = next(_RUNS), True
        self.canary, self.unproven = self.image.canary, True
        # Whether the copy fits, the engine finds out when it wakes.
        self.weights_copy = "good" if copies_weights else "none"
        self._note_can_pause()

    def proven(self) -> None:
        """Nothing is to be asked of its engine any more."""
        self.unproven = False

    def weights_copied(self) -> None:
        """There is a copy of the weights that fits its engine."""
        self.weights_copy = "good"
        self._note_can_pause()

    def weights_lost(self) -> None:
        """The copy of the weights did not fit its engine."""
        self.weights_copy = "lost"
        self._note_can_pause()

    def use_image(self, image: Image) -> None:
        """It is restored from this image."""
        self.image = image

    def discard_image(self) -> None:
        """Its image goes: nobody is restored from it any more, and removing this instance deletes it."""
        self.image.gone()
        self.discards_image = True

    def sleeps(self, level: int) -> None:
        """Its engine, or the one in its image, is in this sleep level; 0: it is awake."""
        self.sleep_level = level

    def bar(self, tier: Tier) -> None:
        """This engine cannot step down to a tier."""
        self.barred.add(tier)
        self.note_change()

    def postpone(self, tier: Tier, until: float) -> None:
        """A step down to a tier failed without harm; it is not tried again before then."""
        self.postponed[tier] = until
        self.note_change()
        self.failed_steps += 1

    def stepped_down(self, tier: Tier) -> None:
        """A step down came to its end."""
        self.apply(ARRIVAL[tier])
        self.failed_steps = 0

    def stay(self, tier: Tier) -> None:
        """A step down failed without harm: it is where it was, or on a tier between."""
        self.apply(ARRIVAL[tier])

    def give(self, command: Command) -> None:
        """Have it go where an operator wants it; a command that it has ends."""
        before, self.command = self.command, command
        self.on_hold = False  # what runs has to go on before it can go anywhere
        if before is not None:
            before.end(f"a command to go to {command.to.label} came after it")

    def end_command(self, failure: str | None = None) -> None:
        """Its command, if it has one, came true, or could not."""
        command, self.command = self.command, None
        if command is not None:
            command.end(failure)

    def fail_command(self, to: Tier, failure: str) -> None:
        """The step to `to` failed; a command to go to a colder tier than that goes on."""
        if self.command is not None and to >= self.command.to:
            self.end_command(failure)

    def note_command(self) -> None:
        """End its command if that came true."""
        if self.command is not None and self.state in RESTING and self.tier >= self.command.to:
            self.end_command()

    @property
    def commanded(self) -> Tier | None:
        """An operator wants it on this tier, or a colder one; it takes no new request until it is there."""
        return self.command.to if self.command is not None else None

    @property
    def renewable(self) -> bool:
        """Whether its processes can be had again from an image."""
        return self.image.present and not self.image.archived

    @property
    def tier(self) -> Tier:
        """The tier a request would find: where it rests, or where the move under way began or will end."""
        if self.state is State.WAKING:
            return self.waking_from if self.waking_from is not None else Tier.STOPPED
        return TIER_OF[self.state]

    def begin_lease(self) -> None:
        """Count one more request; only a ready instance takes one."""
        if self.state is not _READY:
            raise IllegalTransitionError(f"{self.id}: lease in state {self.state.value!r}")
        # Told of once: this is done for every request.
        _store(self, "leases", self.leases + 1)
        self.gpu_time.begin()
        if self.unwanted:
            _store(self, "unwanted", False)
        if self.idle_since is not None:
            _store(self, "idle_since", None)
        if self.on_change is not None:
            self.on_change()

    def await_token(self) -> None:
        """A lease is for a stream, which has got no token yet."""
        self.unanswered += 1

    def token_came(self) -> None:
        """It has got one, or ends without."""
        if self.unanswered <= 0:
            raise IllegalTransitionError(f"{self.id}: a first token twice")
        self.unanswered -= 1

    def keep_ready(self, until: float) -> None:
        """Somebody wants it to stay ready till then, though it is idle; the longest wish counts."""
        self.keep_until = max(self.keep_until, until)

    def end_one_lease(self) -> None:
        """Count one request less that nobody is charged for, while others go on."""
        if self.leases <= 1:
            raise IllegalTransitionError(f"{self.id}: no other lease goes on")
        _store(self, "leases", self.leases - 1)
        self.gpu_time.end()
        if self.on_change is not None:
            self.on_change()

    def end_lease(self, now: float, now_unix_s: float, keep_s: float | None = None, key: str | None = None) -> None:
        """Count one request less; with the last one the instance is idle from `now`.

        `keep_s`: for how long it is wanted after that; 0: no longer, unless somebody else wants it.
        `key`: whose time it was, where that was said.
        """
        if self.leases <= 0:
            raise IllegalTransitionError(f"{self.id}: a lease ended twice")
        _store(self, "leases", self.leases - 1)
        self.gpu_time.end(key)
        _store(self, "last_used_unix_s", now_unix_s)
        if keep_s:
            self.keep_ready(now + keep_s)
        if self.leases == 0:
            _store(self, "idle_since", now)
            if keep_s == 0:
                _store(self, "unwanted", True)
        self.note_change()


_store = object.__setattr__
_NEEDS_NO_LEASES: Final = frozenset({Event.SLEEP, Event.SUSPEND, Event.CHECKPOINT})

TIER_OF: Final[Mapping[State, Tier]] = {
    **RESTING,
    State.RETIRING: Tier.READY,
    State.PAUSING: Tier.SLEEPING,
    State.PAUSED: Tier.SLEEPING,
    State.UNPAUSING: Tier.READY,
    State.FALLING_ASLEEP: Tier.SLEEPING,
    State.SUSPENDING: Tier.SUSPENDED,
    State.CHECKPOINTING: Tier.CHECKPOINTED,
    State.CLONING: Tier.CHECKPOINTED,
    State.ARCHIVING: Tier.ARCHIVED,
    State.BROKEN: Tier.STOPPED,
    State.STOPPING: Tier.STOPPED,
    State.GONE: Tier.STOPPED,
}


WITH_ENGINE: Final = frozenset(
    {
        State.READY, State.RETIRING, State.PAUSING, State.PAUSED, State.UNPAUSING, State.FALLING_ASLEEP, State.SLEEPING,
        State.SUSPENDING, State.SUSPENDED,
    }
)  # fmt: skip


def pick(
    instances: Iterable[Instance],
    max_concurrency: int,
    preferred: str | None = None,
    near: bytes | None = None,
    most_unanswered: float = math.inf,
) -> Instance | None:
    """The ready instance with room for one more request, that with the fewest; or None.

    Where there is a `preferred` one that holds its engine, it is that or none: it is worth waiting for. `near`: what a
    request has in common with others, which go to the same instance as long as that has not twice as many as another.
    `most_unanswered`: one that can be paused has room only below so many streams without a token.
    """
    held = holding(instances, preferred) if preferred is not None else None
    if near is not None and held is None:
        return _nearest([i for i in instances if _takes(i, max_concurrency, most_unanswered)], near)
    best, least = None, max_concurrency
    for instance in instances if held is None else [held]:
        if instance.leases < least and _takes(instance, max_concurrency, most_unanswered):
            best, least = instance, instance.leases
    return best


def _takes(instance: Instance, max_concurrency: int, most_unanswered: float) -> bool:
    """Whether one more request may go to an instance."""
    return (
        instance.state is _READY
        and instance.leases < max_concurrency
        and (instance.unanswered < most_unanswered or not instance.can_pause)
    )


def _nearest(ready: Sequence[Instance], near: bytes) -> Instance | None:
    """By rendezvous hashing (Thaler and Ravishankar): who else comes or goes moves few of them."""
    if len(ready) < 2:
        return ready[0] if ready else None
    most = 2 * (min(i.leases for i in ready) + 1)
    fit = [i for i in ready if i.leases < most]
    return max(fit, key=lambda i: blake2b(i.id.encode(), key=near, digest_size=8).digest())


def holding(instances: Iterable[Instance], wanted: str) -> Instance | None:
    """The instance of that id while it holds the engine it had, awake or not; one that is restored has another."""
    return next((i for i in instances if i.id == wanted and _holds_engine(i)), None)


def _holds_engine(instance: Instance) -> bool:
    if instance.state is State.WAKING:
        return instance.waking_from is not None and instance.waking_from < Tier.CHECKPOINTED
    return instance.state in WITH_ENGINE


def best_tier(instances: Iterable[Instance]) -> Tier:
    """The tier a request for the model finds: that of its warmest instance.

    One that takes no new requests because it is about to step down counts as on the first tier below.
    """
    return min((Tier.SLEEPING if i.state is State.RETIRING else i.tier for i in instances), default=Tier.STOPPED)
