"""Host memory as far as the pool knows it: what is free, which instance holds how much, what a model needs.

Pure bookkeeping, as `gpu_accounting`; `share` adds it to what that knows, as one more place that is held and freed.
What a model needs is learned from its last run, before that from its checkpoint, before that from the setting
`host_memory`, and before that taken to be as much as the largest of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.pool.gpu_accounting import HOLDS_NOTHING
from proxy.pool.instance import State
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from proxy.host.facts import Memory
    from proxy.pool.gpu_accounting import GpuLoad
    from proxy.pool.instance import Instance

_TIERS: Final[Mapping[State, Tier]] = {
    State.READY: Tier.READY,
    State.RETIRING: Tier.READY,
    State.SLEEPING: Tier.SLEEPING,
    State.SUSPENDED: Tier.SUSPENDED,
}
_GOING: Final = frozenset({State.BROKEN, State.STOPPING})


@dataclass(frozen=True, slots=True)
class ImageHeld:
    """An instance's image, as far as it takes memory."""

    present: bool
    archived: bool
    """It is in the archive, and not on tmpfs."""
    own: bool
    """It belongs to this instance; else to its model."""


def _nobody_asks(_model: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class HostShare:
    """What the instances of one model have of the host's memory, by instance; in bytes."""

    now: Mapping[str, int]
    after: Mapping[str, int]
    """When the moves under way have ended."""
    left: Mapping[tuple[str, Tier], int]
    """What an instance would hold on a colder tier; below 0 where its image goes too."""
    unpacks: Mapping[str, int]
    """What its image takes on tmpfs when a wake brings it there from the archive."""
    held: int
    """What all processes hold, as far as it was seen."""
    on_tmpfs: int
    """What the images take there."""


class MemoryAccounting:
    """The accounts of one pool. `reserve_bytes` are left free."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        """As it was last read; None where it plays no part."""
        self.held_then = 0
        """What our engines held at about that time; those that have ended since have given it back."""
        self._on_tmpfs_then: int | None = None
        """What images took there at about that time; None before the policy has asked since."""
        self.reserve_bytes = 0
        self.on_news: Callable[[str], None] = _nobody_asks
        """Called with a model of which something else is known now."""
        self._seen: dict[str, tuple[int, int]] = {}
        """Instance → the generation in which it was measured, and what its processes held."""
        self._learned: dict[Tier, dict[str, int]] = {tier: {} for tier in (Tier.READY, Tier.SLEEPING, Tier.SUSPENDED)}
        self._measured: set[str] = set()
        self._configured: dict[str, int] = {}
        self._images: dict[str, int] = {}
        """Model → the size of an image of its own on tmpfs."""

    def configure(self, model: str, size_bytes: int | None) -> None:
        """What an engine is said to take, until it is known better; None: nothing is said."""
        self.on_news(model)
        self._configured.pop(model, None)
        if size_bytes is not None:
            self._configured[model] = size_bytes

    def unlearn(self, model: str) -> None:
        """Forget a model: it has other engines now, or is gone."""
        self.on_news(model)
        self._measured.discard(model)
        for known in (*self._learned.values(), self._configured, self._images):
            known.pop(model, None)

    def learn(self, model: str, engine_bytes: int, image_bytes: int) -> None:
        """What a checkpoint says of its model."""
        self.on_news(model)
        if engine_bytes > 0:
            self._learned[Tier.READY].setdefault(model, engine_bytes)
        self._images[model] = image_bytes

    def knows_image(self, model: str) -> bool:
        """Whether the size of its image is known."""
        return model in self._images

    def need(self, model: str) -> int | None:
        """What an instance holds when it is ready; None where that is not known."""
        return self._learned[Tier.READY].get(model, self._configured.get(model))

    def read(self, memory: Memory, held_bytes: int) -> None:
        """Write down what there is, and what all our engines together held at about the same time."""
        self.memory, self.held_then, self._on_tmpfs_then = memory, held_bytes, None

    @property
    def is_short(self) -> bool:
        """Whether less is free than is to be left."""
        return self.memory is not None and self.memory.available_bytes < self.reserve_bytes

    def broke(self, model: str) -> None:
        """An engine of it broke: what it held says nothing of the next one."""
        self.on_news(model)
        if model in self._measured:
            self._measured.discard(model)
            self._learned[Tier.READY].pop(model, None)
            self._images.pop(model, None)  # and so its checkpoint is asked again

    def record(self, instance: Instance, held_bytes: int, *, outgoing: bool = False) -> None:
        """Write down what an instance's processes were seen to hold; an `outgoing` one says nothing of its model."""
        self.on_news(instance.model)
        self._seen[instance.id] = instance.generation, held_bytes
        tier = _TIERS.get(instance.state)
        if tier is None or outgoing or not held_bytes:
            return
        learned = self._learned[tier]
        if tier is Tier.READY and instance.model in self._measured:
            held_bytes = max(held_bytes, learned.get(instance.model, 0))
        elif tier is Tier.READY:
            self._measured.add(instance.model)
        learned[instance.model] = held_bytes

    def forget(self, instance_id: str) -> None:
        """It is gone."""
        self._seen.pop(instance_id, None)

    def held(self, instance: Instance) -> int:
        """What its processes hold, as far as it was seen."""
        generation, seen = self._seen.get(instance.id, (-1, 0))
        if instance.state in HOLDS_NOTHING:
            return 0
        # One that wakes with the engine it had holds what it held.
        wakes_on = instance.state is State.WAKING and (instance.waking_from or Tier.STOPPED) < Tier.CHECKPOINTED
        if generation == instance.generation or (wakes_on and generation == instance.generation - 1):
            return seen
        return 0

    def _charge(self, instance: Instance) -> int:
        """What it holds or is about to."""
        held = self.held(instance)
        unseen = instance.state in _TIERS and not held
        if instance.state is not State.WAKING and not unseen:
            return held
        need = self.need(instance.model)
        return max(held, need if need is not None else self.guess())

    def guess(self) -> int:
        """What a model is taken to need of which nothing is known."""
        return max(self._learned[Tier.READY].values(), default=0)

    def lacking(self, instance: Instance, *, unpacks: bool = False) -> int:
        """How much less is free now than a wake from an image or from nothing needs; 0 where that is not known.

        `unpacks`: its image comes from the archive.
        """
        need = self.need(instance.model)
        if self.memory is None or need is None:
            return 0
        image = self._images.get(instance.model, 0) if unpacks else 0
        return max(0, need + image - self.held(instance) - self.memory.available_bytes)

    @property
    def is_kept(self) -> bool:
        """Whether host memory plays a part."""
        return self.memory is not None

    def share(self, gpus: GpuLoad, instances: Sequence[Instance], images: Mapping[str, ImageHeld]) -> HostShare:
        """What the policy decides by of one model. `gpus`: what its instances hold there; `images`: by instance."""
        for_all = _only_image(instances, images)
        unpacks = {i.id: self._images.get(i.model, 0) for i in instances if images[i.id].archived}
        waking = [i for i in instances if i.state is State.WAKING and i.id in unpacks]
        # Of those that share an image, one brings it for all.
        bring = {i.id if images[i.id].own else i.model: i.id for i in waking}
        unpacking = {id_: unpacks[id_] for id_ in bring.values()}
        charges = {i.id: self._charge(i) + unpacking.get(i.id, 0) for i in instances}
        left: dict[tuple[str, Tier], int] = {}
        after: dict[str, int] = {}
        for instance in instances:
            image = images[instance.id]
            tiers = self._left(instance, gpus, image, archives=image.own or instance.id == for_all)
            left |= {(instance.id, tier): count for tier, count in tiers.items()}
            going_to = _target(instance)
            after[instance.id] = charges[instance.id] if going_to is None else tiers[going_to]
        there = [i for i in instances if images[i.id].present and not images[i.id].archived]
        each = {i.id if images[i.id].own else i.model: self._images.get(i.model, 0) for i in there}
        return HostShare(charges, after, left, unpacks, sum(map(self.held, instances)), sum(each.values()))

    def free(self, on_tmpfs: int) -> int:
        """What is free beyond the reserve, with what images have given back since it was read: they take `on_tmpfs`."""
        assert self.memory is not None  # noqa: S101 - `is_kept`
        if self._on_tmpfs_then is None:
            self._on_tmpfs_then = on_tmpfs
        return self.memory.available_bytes - self.reserve_bytes + max(0, self._on_tmpfs_then - on_tmpfs)

    def _left(self, instance: Instance, gpus: GpuLoad, image: ImageHeld, *, archives: bool) -> dict[Tier, int]:
        """What it holds on each tier below; less than nothing where an image goes too.

        `archives`: nobody else needs its image on tmpfs.
        """
        held = self._charge(instance)
        on_gpus = sum(gpus.after.get(instance.id, {}).values()) if gpus.suspending_frees else 0
        asleep = self._learned[Tier.SLEEPING].get(instance.model, held)
        size = self._images.get(instance.model, 0) if image.present and not image.archived else 0
        return {
            Tier.SLEEPING: asleep,
            # CUDA's state goes from the GPU to the processes' own memory.
            Tier.SUSPENDED: self._learned[Tier.SUSPENDED].get(instance.model, held + on_gpus),
            Tier.CHECKPOINTED: 0 if image.present else held,
            Tier.ARCHIVED: -size if archives else 0,
            Tier.STOPPED: -size if image.own else 0,
        }


def _only_image(instances: Iterable[Instance], images: Mapping[str, ImageHeld]) -> str | None:
    """Where the instances of a model are nothing but one image on tmpfs: the one that goes to the archive for all."""
    found: str | None = None
    for instance in sorted(instances, key=lambda i: (i.state is not State.ARCHIVING, i.id)):
        image = images[instance.id]
        nothing_else = instance.state in (State.ARCHIVING, State.CHECKPOINTED)
        if not nothing_else or not image.present or image.archived or image.own:
            return None
        found = found or instance.id
    return found


def _target(instance: Instance) -> Tier | None:
    """Where an instance on its way down is going."""
    match instance.state:
        case State.FALLING_ASLEEP:
            return Tier.SLEEPING
        case State.SUSPENDING:
            return Tier.SUSPENDED
        case State.CHECKPOINTING:
            return Tier.CHECKPOINTED
        case State.ARCHIVING:
            return Tier.ARCHIVED
        case state if state in _GOING:
            return Tier.STOPPED
        case _:
            return None
