"""GPU memory as far as the pool knows it: what there is, who holds how much, what a model needs.

Pure bookkeeping. `gpu_monitor` asks NVML and the runtimes and writes down what it saw; `load` is what the policy
decides by. Memory is counted per GPU, in bytes, by the GPU's UUID.

What a model needs is learned from its last run, before that from its checkpoint's manifest, before that from the
setting `gpu_memory`. What nobody of ours holds - other programs, the driver - is foreign, and no room for anybody.
"""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from proxy.gpu.cuda import MAX_LEFT_BYTES
from proxy.gpu.placement import roomy
from proxy.pool.instance import State
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from proxy.gpu.nvml import GpuMemory
    from proxy.pool.instance import Instance
    from proxy.pool.model_view import InstanceView

Bytes: TypeAlias = "Mapping[str, int]"
"""UUID of a GPU → bytes of its memory."""

NOTHING: Final[Bytes] = {}
HOST: Final = "host memory"
"""Among the GPUs' UUIDs: the host's own memory, which `memory_accounting` adds."""
READY: Final = "ready"
SLEEPING: Final = "sleeping"
_KINDS: Final = {State.READY: READY, State.RETIRING: READY, State.SLEEPING: SLEEPING}
"""The states in which what an instance holds says something about its model."""
HOLDS_NOTHING: Final = frozenset(
    {State.NEW, State.CHECKPOINTED, State.CLONING, State.ARCHIVING, State.ARCHIVED, State.GONE}
)
"""The states in which an instance has no process."""
_IN_IMAGE: Final = frozenset({State.CHECKPOINTED, State.ARCHIVED})
_RECENT: Final = 3
"""How many readings in a row have to show a growth."""
MAX_EXCESS_BYTES: Final = MAX_LEFT_BYTES
"""An instance that holds this much more than expected leaks."""


def plus(one: Bytes, other: Bytes) -> dict[str, int]:
    """The sum, GPU by GPU."""
    return {uuid: one.get(uuid, 0) + other.get(uuid, 0) for uuid in one.keys() | other.keys()}


def beyond(one: Bytes, other: Bytes) -> dict[str, int]:
    """What `one` has more than `other`, on the GPUs where it has more."""
    return {uuid: more for uuid, count in one.items() if (more := count - other.get(uuid, 0)) > 0}


def moved(known: Bytes, moves: Mapping[str, str] | None) -> Bytes:
    """What is known of some GPUs, of those that an engine is on instead."""
    return {moves.get(uuid, uuid): count for uuid, count in known.items()} if moves else known


@dataclass(frozen=True, slots=True)
class GpuLoad:
    """What the policy knows of GPU memory; empty where there is no GPU or none can be asked."""

    capacity: Bytes = field(default_factory=dict)
    """Everything but what is foreign."""
    now: Mapping[str, Bytes] = field(default_factory=dict)
    """Instance → what it holds, or is about to."""
    after: Mapping[str, Bytes] = field(default_factory=dict)
    """Instance → what it will hold when the move under way has ended."""
    needs: Mapping[str, Bytes] = field(default_factory=dict)
    """Model → what an instance holds when it is ready; models of which that is not known are missing."""
    asleep: Mapping[str, Bytes] = field(default_factory=dict)
    """Model → what an instance holds when it sleeps; likewise."""
    suspending_frees: bool = True
    """False where suspended engines stay on the GPU."""
    host_left: Mapping[tuple[str, Tier], int] = field(default_factory=dict)
    """Instance and colder tier → what it would hold of host memory there; below 0 where its image goes too."""
    unpacks: Mapping[str, int] = field(default_factory=dict)
    """Instance → what its image takes on tmpfs when a wake brings it there from the archive."""
    host_short: int = 0
    """How much less host memory is free than is to be left, as it was read; below 0 where there is more."""
    guessed: AbstractSet[str] = frozenset()
    """Models whose need of host memory is a guess."""

    moves: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Instance → UUIDs of its model's GPUs → of those that it is on instead."""
    gpus: Sequence[GpuMemory] = ()
    """Those that an image may be restored onto, wherever it was made; none where it stays where it is."""
    bound: Container[str] = frozenset()
    """Models whose images stay there in any case."""

    def held_on(self, tier: Tier, instance: InstanceView) -> Bytes | None:
        """What a resting instance would hold on a colder tier; None where that is not known."""
        gpus = self._held_of_gpus(tier, instance)
        if gpus is None or HOST not in self.capacity:
            return gpus
        return {**gpus, HOST: self.host_left[instance.id, tier]}

    def _held_of_gpus(self, tier: Tier, instance: InstanceView) -> Bytes | None:
        if self.capacity.keys() == {HOST}:
            return NOTHING
        if tier <= Tier.SLEEPING or (tier is Tier.SUSPENDED and not self.suspending_frees):
            known = self.asleep.get(instance.model)
            return known and moved(known, self.moves.get(instance.id))
        return NOTHING

    def need_of(self, model: str, candidate: InstanceView | None, free: Bytes) -> Bytes:
        """What an instance holds when it is ready, where it is or would be restored; nothing where that is not known.

        `free`: what is free of each GPU.
        """
        known = self.needs.get(model, NOTHING)
        if candidate is None:
            return known
        if candidate.state not in _IN_IMAGE:
            return moved(known, self.moves.get(candidate.id))
        return moved(known, place_for(known, self.gpus, free)) if model not in self.bound else known


def place_for(need: Bytes, gpus: Sequence[GpuMemory], free: Bytes) -> Mapping[str, str]:
    """Where an image would be restored: where it was made if there is room, else where there is."""
    used = {uuid: count for uuid, count in need.items() if uuid != HOST}
    return roomy(used, gpus, free) if used and len(gpus) > len(used) else {}


class _Trail:
    """What an engine held in the same situation again and again, in bytes."""

    def __init__(self, first: int) -> None:
        self.first = first
        self._recent = deque([first], maxlen=_RECENT)

    def add(self, count: int) -> None:
        self._recent.append(count)

    def growth_bytes(self) -> int:
        # What is left behind is there every time; what a request takes for a moment is not.
        return min(self._recent) - self.first if len(self._recent) == _RECENT else 0


@dataclass(slots=True)
class _Account:
    """What is known of one engine since it was started or restored."""

    held: Bytes = field(default_factory=dict)
    """As it was last measured, or as is expected of the tier it has reached since."""
    trails: dict[str, _Trail] = field(default_factory=dict)
    """Kind (`READY`, `SLEEPING`) → what it held whenever it had just got there, over all GPUs."""
    fresh: bool = True
    """It has not been measured awake since it woke."""
    cycles: int = 0
    logged: bool = False
    """That it has grown was logged."""


def _nobody_asks(_model: str) -> None:
    pass


class GpuAccounting:
    """All accounts of one pool. `creep_bytes`: how much an engine may grow before it is grown; 0 is any amount."""

    def __init__(self, creep_bytes: int) -> None:
        self._creep_bytes = creep_bytes
        self.suspending_frees = True
        self.on_news: Callable[[str], None] = _nobody_asks
        """Called with a model of which something else is known now."""
        self.gpus: Sequence[GpuMemory] = ()
        """As they were last read."""
        self.foreign: dict[str, int] = {}
        """Held by none of ours."""
        self._accounts: dict[str, _Account] = {}
        self._learned: dict[str, dict[str, Bytes]] = {READY: {}, SLEEPING: {}}
        self._measured: set[str] = set()
        """The models whose need was seen here."""
        self._configured: dict[str, tuple[int, Sequence[int]]] = {}
        self.can_move = False
        """An image can be restored onto other GPUs than it was made on."""
        self._bound: set[str] = set()
        """Models that name their GPUs themselves, and stay there."""
        self.all_moves: dict[str, Mapping[str, str]] = {}
        """Instance → UUIDs of its model's GPUs → of those that it is on instead."""
        self._tried: set[str] = set()
        """Instances that are suspended for a trial, and take their memory back at once."""

    # --- what a model needs ---

    def configure(self, model: str, size_bytes: int | None, indices: Sequence[int], *, bound: bool = False) -> None:
        """What an engine is said to take on each of some GPUs, until it is known better; None: nothing is said.

        `bound`: it names its GPUs itself.
        """
        self.on_news(model)
        self._configured.pop(model, None)
        (self._bound.add if bound else self._bound.discard)(model)
        if size_bytes is not None:
            self._configured[model] = size_bytes, indices

    def unlearn(self, model: str) -> None:
        """Forget what was known of a model: it has other engines now, or is gone."""
        self.on_news(model)
        self._configured.pop(model, None)
        self._measured.discard(model)
        for learned in self._learned.values():
            learned.pop(model, None)

    def learn(self, model: str, figures: Any) -> None:
        """Take over what a manifest says (`figures` of an earlier run); what is not of that form is passed over."""
        self.on_news(model)
        if not isinstance(figures, dict):
            return
        for kind, learned in self._learned.items():
            found = figures.get(kind)
            if isinstance(found, dict) and found and all(type(n) is int and n > 0 for n in found.values()):
                learned.setdefault(model, {str(uuid): count for uuid, count in found.items()})

    def knows(self, model: str, kind: str) -> bool:
        """Whether what the model holds awake (`READY`) or asleep (`SLEEPING`) was ever measured."""
        return model in self._learned[kind]

    def figures(self, model: str) -> dict[str, dict[str, int]]:
        """What is known from measurements, for a manifest: ``{"ready": {UUID: bytes}, "sleeping": {…}}``."""
        return {kind: dict(learned[model]) for kind, learned in self._learned.items() if model in learned}

    def need(self, model: str) -> Bytes | None:
        """What an instance of the model holds when it is ready; None where that is not known."""
        known = self._here(self._learned[READY].get(model))
        if known or model not in self._configured:
            return known
        size_bytes, indices = self._configured[model]
        return {gpu.uuid: size_bytes for gpu in self.gpus if gpu.index in indices} or None

    def asleep(self, model: str) -> Bytes | None:
        """What an instance of the model holds when it sleeps; None where that is not known."""
        return self._here(self._learned[SLEEPING].get(model))

    def _here(self, known: Bytes | None) -> Bytes | None:
        """On the GPUs of this host: where there is only one, an image of another host can only mean that one."""
        if not known:
            return None
        if len(self.gpus) == 1:
            return {self.gpus[0].uuid: sum(known.values())}
        present = {gpu.uuid for gpu in self.gpus}
        return {uuid: count for uuid, count in known.items() if uuid in present} or None

    # --- where an instance is ---

    def _need_of(self, instance: Instance) -> Bytes | None:
        known = self.need(instance.model)
        return known and moved(known, self.all_moves.get(instance.id))

    def asleep_of(self, instance: Instance) -> Bytes | None:
        """What it holds when it sleeps, where it is; None where that is not known."""
        known = self.asleep(instance.model)
        return known and moved(known, self.all_moves.get(instance.id))

    def need_of(self, instance: Instance) -> Bytes:
        """What it holds when it is ready, where it is or is to be; nothing where that is not known."""
        return self._need_of(instance) or NOTHING

    def images_may_go_to(self) -> Sequence[GpuMemory]:
        """See `GpuLoad.gpus`."""
        return self.gpus if self.can_move and len(self.gpus) > 1 else ()

    @property
    def bound(self) -> Container[str]:
        """See `GpuLoad.bound`."""
        return self._bound

    def _free_beside(self, everyone: Iterable[Instance]) -> dict[str, int]:
        """What is free of each GPU and stays so while moves go on; one that is to be placed holds nothing."""
        free = {gpu.uuid: gpu.total_bytes - self.foreign.get(gpu.uuid, 0) for gpu in self.gpus}
        for instance in everyone:
            now, after = self.charge(instance), self._charge_after(instance)
            for uuid in now.keys() | after.keys():
                free[uuid] = free.get(uuid, 0) - max(now.get(uuid, 0), after.get(uuid, 0))
        return free

    def place(self, instance: Instance, everyone: Iterable[Instance]) -> None:
        """It is about to wake: decide where, if that is from its image."""
        gpus, need = self.images_may_go_to(), self.need(instance.model)
        if gpus and need and instance.state in _IN_IMAGE and instance.model not in self._bound:
            self.on_news(instance.model)
            self.all_moves[instance.id] = place_for(need, gpus, self._free_beside(everyone))

    def wrote_image(self, instance: Instance) -> None:
        """Its image is of the GPUs that it is on, whatever an earlier one was of."""
        self.on_news(instance.model)
        moves = self.all_moves.pop(instance.id, None)
        for learned in self._learned.values():
            if moves and instance.model in learned:
                learned[instance.model] = moved(learned[instance.model], moves)

    def moves(self, instance: Instance) -> Mapping[str, str]:
        """UUIDs of GPUs that its image was made on → of those it is to be on; empty where it stays."""
        return self.all_moves.get(instance.id, {})

    # --- what an instance holds ---

    @contextmanager
    def holding(self, instance: Instance) -> Iterator[None]:
        """Whatever an instance is seen to hold meanwhile, it holds what its model needs."""
        self._tried.add(instance.id)
        self.on_news(instance.model)
        try:
            yield
        finally:
            self._tried.discard(instance.id)
            self.on_news(instance.model)

    def started(self, instance: Instance) -> None:
        """It was started from nothing, so it is where its model's engines are by themselves."""
        self.all_moves.pop(instance.id, None)
        self.began(instance)

    def began(self, instance: Instance) -> None:
        """It was started or restored: an engine that nothing is known of yet."""
        self.on_news(instance.model)
        if self.grown(instance):
            self._measured.discard(instance.model)  # what it needed is more than a fresh one needs
        self._accounts[instance.id] = _Account()

    def woke(self, instance: Instance) -> None:
        """It came back from asleep or suspended."""
        self.on_news(instance.model)
        account = self._account(instance)
        account.cycles += 1
        account.fresh = True
        account.held = self._need_of(instance) or account.held

    def arrived(self, instance: Instance, tier: Tier) -> None:
        """It stepped down; until it is measured it holds what is expected there."""
        self.on_news(instance.model)
        account = self._account(instance)
        if tier is Tier.SLEEPING or (tier is Tier.SUSPENDED and not self.suspending_frees):
            account.held = self.asleep_of(instance) or account.held
        else:
            account.held = NOTHING

    def paused(self, instance: Instance) -> None:
        """Its requests stand still; until it is measured it holds what it does asleep."""
        self.arrived(instance, Tier.SLEEPING)

    def runs_on(self, instance: Instance) -> None:
        """Its requests go on after a pause."""
        account = self._account(instance)
        account.held = self.need(instance.model) or account.held

    def forget(self, instance_id: str) -> None:
        """It is gone."""
        self._accounts.pop(instance_id, None)
        self.all_moves.pop(instance_id, None)

    def _account(self, instance: Instance) -> _Account:
        return self._accounts.setdefault(instance.id, _Account())

    def record(self, instance: Instance, held: Bytes, *, outgoing: bool = False) -> None:
        """Write down what a resting instance was seen to hold; one that is `outgoing` says nothing about its model."""
        if instance.id in self._tried:
            return
        self.on_news(instance.model)
        kind = _KINDS.get(instance.state)
        if kind is not None and not any(held.values()):
            return  # NVML had no answer, or the engine runs on the CPU
        account = self._account(instance)
        account.held = dict(held)
        if outgoing:
            return
        if moves := self.all_moves.get(instance.id):  # what is learned is of the GPUs that its image was made on
            held = moved(held, {new: old for old, new in moves.items()})
        if kind == READY:
            # The most of its run: under load an engine holds more than just after a wake.
            before = self._learned[READY].get(instance.model, NOTHING) if instance.model in self._measured else NOTHING
            most = {uuid: max(held.get(uuid, 0), before.get(uuid, 0)) for uuid in held.keys() | before.keys()}
            self._learned[READY][instance.model] = most
            self._measured.add(instance.model)
            self._follow_ready(account, instance, sum(held.values()))
        elif kind == SLEEPING:
            self._learned[SLEEPING][instance.model] = dict(held)
            self._follow(account, SLEEPING, sum(held.values()))

    def _follow_ready(self, account: _Account, instance: Instance, total: int) -> None:
        if account.fresh:
            account.fresh = False
            self._follow(account, READY, total)
        elif account.cycles == 0 and Tier.SLEEPING in instance.barred:
            # One without a sleep mode keeps what its requests took.
            account.trails[READY].first = max(account.trails[READY].first, total)

    def _follow(self, account: _Account, kind: str, total: int) -> None:
        if kind in account.trails:
            account.trails[kind].add(total)
        else:
            account.trails[kind] = _Trail(total)

    def read(self, gpus: Sequence[GpuMemory], ours: Iterable[tuple[Instance, Bytes]], *, settled: bool) -> None:
        """Write down what the GPUs say, and what each of our engines was seen to hold at about the same time.

        What is foreign is only taken from a time in which nothing moved (`settled`), once it is known at all.
        """
        self.gpus = tuple(gpus)
        if self.foreign and not settled:
            return
        total: Bytes = {}
        for instance, held in ours:
            # Where NVML cannot tell processes apart, what is expected of an engine is not foreign either.
            total = plus(total, held if any(held.values()) else self.charge(instance))
        self.foreign = {gpu.uuid: max(0, gpu.used_bytes - total.get(gpu.uuid, 0)) for gpu in gpus}

    def charge(self, instance: Instance) -> Bytes:
        """What an instance holds of the GPUs, or is about to hold."""
        state = instance.state
        if state in HOLDS_NOTHING:
            return NOTHING
        account = self._accounts.get(instance.id)
        held = account.held if account is not None else NOTHING
        if state in (State.WAKING, State.UNPAUSING) or instance.id in self._tried:
            need = self.need_of(instance)
            return {uuid: max(held.get(uuid, 0), need.get(uuid, 0)) for uuid in held.keys() | need.keys()}
        if held:
            return held
        kind = _KINDS.get(state)
        if kind == READY or state in (State.FALLING_ASLEEP, State.PAUSING):
            return self.need_of(instance)
        if kind == SLEEPING or state is State.PAUSED:
            return self.asleep_of(instance) or self.need_of(instance)
        return NOTHING

    def _charge_after(self, instance: Instance) -> Bytes:
        if instance.id in self._tried:
            return self.charge(instance)
        match instance.state:
            case State.FALLING_ASLEEP | State.PAUSING:
                return self.asleep_of(instance) or self.charge(instance)
            case State.SUSPENDING if not self.suspending_frees:
                return self.charge(instance)
            case State.SUSPENDING | State.CHECKPOINTING | State.BROKEN | State.STOPPING:
                return NOTHING
            case _:
                return self.charge(instance)

    def cycles(self, instance: Instance) -> int:
        """How often it came back from asleep or suspended since it was started or restored."""
        account = self._accounts.get(instance.id)
        return account.cycles if account is not None else 0

    def growth_bytes(self, instance: Instance) -> int:
        """How much more it holds than at first, just woken or asleep, over all GPUs."""
        account = self._accounts.get(instance.id)
        trails = account.trails.values() if account is not None else ()
        return max(0, *(trail.growth_bytes() for trail in trails), 0)

    def grown(self, instance: Instance) -> bool:
        """Whether it has grown so much that it should be replaced by a fresh one."""
        return 0 < self._creep_bytes < self.growth_bytes(instance)

    def newly_grown(self, instance: Instance) -> bool:
        """Whether it is grown and nobody has been told."""
        account = self._accounts.get(instance.id)
        if account is None or account.logged or not self.grown(instance):
            return False
        account.logged = True
        return True

    def expected(self, instance: Instance, tier: Tier) -> Bytes:
        """What it should hold on its own tier, or on one below."""
        if instance.state is State.SLEEPING and tier is Tier.SLEEPING:
            return self.charge(instance)
        if tier is Tier.SLEEPING or (tier is Tier.SUSPENDED and not self.suspending_frees):
            return self.asleep_of(instance) or self.charge(instance)
        return NOTHING

    def leaked_bytes(self, instance: Instance, expected: Bytes) -> int:
        """How much more than expected it was seen to hold; 0 for what is within the measure's own noise."""
        excess = sum(beyond(self.charge(instance), expected).values())
        return excess if excess > MAX_EXCESS_BYTES else 0

    # --- everything together ---

    def capacity(self) -> Bytes:
        """Everything but what is foreign; empty where no GPU can be asked."""
        return {gpu.uuid: gpu.total_bytes - self.foreign.get(gpu.uuid, 0) for gpu in self.gpus}

    def load(self, instances: Iterable[Instance], keys: Iterable[str] | None = None) -> GpuLoad:
        """What the policy decides by; `keys`: of these models only."""
        if not self.gpus:
            return EMPTY
        everyone = list(instances)
        if keys is None:
            keys = {instance.model for instance in everyone} | self._learned[READY].keys() | self._configured.keys()
        models = set(keys)
        return GpuLoad(
            capacity=self.capacity(),
            now={instance.id: self.charge(instance) for instance in everyone},
            after={instance.id: self._charge_after(instance) for instance in everyone},
            needs={model: need for model in models if (need := self.need(model))},
            asleep={model: held for model in models if (held := self.asleep(model))},
            suspending_frees=self.suspending_frees,
            moves=self.all_moves,
            gpus=self.images_may_go_to(),
            bound=self._bound,
        )

    def charged(self, instances: Iterable[Instance]) -> Bytes:
        """What all of them hold together."""
        total: Bytes = {}
        for instance in instances:
            total = plus(total, self.charge(instance))
        return total


EMPTY: Final = GpuLoad()
