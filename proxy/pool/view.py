"""What the policy sees: the pool as values, with what it looks for in order.

A view is made once and then told of each model that changed (`put`, `drop`), which costs the logarithm of their number:
so a decision looks at what is due, waits or is in the way, and not at everything there is.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from proxy.pool import gpu_accounting
from proxy.pool.gpu_accounting import HOST
from proxy.pool.instance import AWAKE, DESCENDING, State
from proxy.pool.model_view import (
    STANDING_STILL,
    STEPS,
    InstanceView,
    ModelView,
    Rules,
    dispensable,
    kept_ready,
    next_step,
    possible,
    spare_of,
    vacancies,
    wakes_wanted,
)  # fmt: skip
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

    from proxy.pool.gpu_accounting import Bytes, GpuLoad

_HOLDING: Final = frozenset({State.WAKING, *STANDING_STILL})
"""Beside those with requests: they hold what others may get some day."""
_GOING: Final = DESCENDING | {State.PAUSING}
"""Awake still, and about to give its place up."""


class Index:
    """Entries in ascending order; each comes and goes without a look at the others."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._entries)

    def add(self, entry: tuple[Any, ...]) -> None:
        """Entries must differ before anything in them that has no order."""
        insort(self._entries, entry)

    def remove(self, entry: tuple[Any, ...]) -> None:
        """It must be there."""
        del self._entries[bisect_left(self._entries, entry)]

    def up_to(self, key: float) -> Iterator[tuple[Any, ...]]:
        """Those whose first part is not above `key`."""
        return itertools.takewhile(lambda entry: entry[0] <= key, self._entries)

    def after(self, key: float) -> Iterator[tuple[Any, ...]]:
        """Those whose first part is above `key`."""
        at = bisect_left(self._entries, (key, math.inf))
        return itertools.islice(self._entries, at, None)


def merged(*indexes: Iterable[tuple[Any, ...]]) -> Iterator[tuple[InstanceView, ModelView]]:
    """The instances of several indexes in their common order."""
    for entry in _merge(indexes):
        yield entry[-2], entry[-1]


def _merge(indexes: Sequence[Iterable[tuple[Any, ...]]]) -> Iterator[tuple[Any, ...]]:
    heads: list[tuple[tuple[Any, ...], Iterator[tuple[Any, ...]]]] = []
    for index in indexes:
        entries = iter(index)
        if (first := next(entries, None)) is not None:
            heads.append((first, entries))
    while heads:
        at = min(range(len(heads)), key=lambda n: heads[n][0][:3]) if len(heads) > 1 else 0
        entry, entries = heads[at]
        yield entry
        if (following := next(entries, None)) is None:
            del heads[at]
        else:
            heads[at] = following, entries


@dataclass(slots=True)
class _Known:
    """What a view keeps of one model."""

    model: ModelView
    entries: list[tuple[Index, tuple[Any, ...]]] = field(default_factory=list)
    awake: int = 0
    going: int = 0
    quick_wakes: int = 0
    restoring: int = 0
    retiring: list[InstanceView] = field(default_factory=list)
    sums: dict[str, dict[str, int]] = field(default_factory=dict)
    moving: int = 0
    """The host memory that those of its instances give back who are on their way."""


NOW: Final = "now"
SOON: Final = "soon"
BUSY: Final = "busy"
IDLE: Final = "idle"


class View:
    """Everything a decision depends on, beside the time."""

    def __init__(
        self,
        models: Iterable[ModelView] = (),
        max_awake: int = 0,
        switch_after_s: float = 10.0,
        gpus: GpuLoad = gpu_accounting.EMPTY,
        *,
        rules: Rules | None = None,
    ) -> None:
        self.rules = rules or Rules(max_awake=max_awake, switch_after_s=switch_after_s)
        self.gpus = gpus
        self._known: dict[Hashable, _Known] = {}
        self._serial = itertools.count()
        self._clear()
        for number, model in enumerate(models):
            self.put(number, model)

    def _clear(self) -> None:
        self.needy = Index()
        """(when it is to be served at the latest, …, model): those that somebody waits for, or that stand still."""
        self.due = Index()
        """(when, …, id of the instance or None, model): what the timetables and pauses after failures say."""
        self.unhurried = Index()
        """Likewise: those that made room and go on as soon as no wake is under way that they would slow."""
        self.spare = Index()
        """Idle ready instances that may make room, those that would be missed least first."""
        self.sleeping = Index()
        """Sleeping ones that may give up what they hold, likewise."""
        self.colder = Index()
        """Suspended and checkpointed ones, likewise."""
        self.busy = Index()
        """(leases, …): ready ones with requests that may make room."""
        self.lacking: dict[Hashable, ModelView] = {}
        """Those of which fewer are up than are to be kept ready, though nobody waits."""
        self.commanded: dict[Hashable, ModelView] = {}
        self.grown: dict[Hashable, ModelView] = {}
        self.retiring: dict[Hashable, list[InstanceView]] = {}
        self.waiting_models = 0
        self.awake = 0
        self.going = 0
        """Of those awake: on their way to give their place up."""
        self.quick_wakes = 0
        self.restoring = 0
        """Wakes under way from images, or from nothing."""
        """Wakes under way that take so little that it counts what goes on beside them."""
        self.sums: dict[str, Counter[str]] = {name: Counter() for name in (NOW, SOON, BUSY, IDLE)}
        """What is held by place: now; when all moves have ended; by busy ones; by those that may give it up."""
        self.host_moving = 0
        """The host memory that those give back who are on their way."""
        self._by_key: dict[str, dict[Hashable, ModelView]] = {}

    @property
    def models(self) -> list[ModelView]:
        """All of them."""
        return [known.model for known in self._known.values()]

    def called(self, key: str) -> list[ModelView]:
        """The models of a key; while one replaces another there are two."""
        return list(self._by_key.get(key, {}).values())

    def others_starve(self, key: str) -> bool:
        """Whether somebody waits for another model that has no instance up."""
        # Not many are up, and so not many are passed over.
        return any(not m.is_up and m.key != key for m in (entry[-1] for entry in self.needy))

    def use(self, rules: Rules, gpus: GpuLoad) -> None:
        """Take over other rules, or another account of memory."""
        self.rules, self.gpus = rules, gpus
        models = {handle: known.model for handle, known in self._known.items()}
        self._known.clear()
        self._clear()
        for handle, model in models.items():
            self.put(handle, model)

    def put(self, handle: Hashable, model: ModelView) -> None:
        """A model as it is now; `handle` stands for it."""
        self.drop(handle)
        known = self._known[handle] = _Known(model)
        self._by_key.setdefault(model.key, {})[handle] = model
        self._put_model(handle, known)
        self._put_instances(handle, known)
        self._put_sums(known)

    def drop(self, handle: Hashable) -> None:
        """A model that is no more."""
        known = self._known.pop(handle, None)
        if known is None:
            return
        for index, entry in known.entries:
            index.remove(entry)
        key = known.model.key
        del self._by_key[key][handle]
        if not self._by_key[key]:
            del self._by_key[key]
        for table in (self.lacking, self.commanded, self.grown, self.retiring):
            table.pop(handle, None)
        self.waiting_models -= bool(known.model.waiting)
        self.awake -= known.awake
        self.going -= known.going
        self.quick_wakes -= known.quick_wakes
        self.restoring -= known.restoring
        for name, places in known.sums.items():
            self.sums[name].subtract(places)
        self.host_moving -= known.moving

    def _enter(self, known: _Known, index: Index, *key: Any, instance: Any = None) -> None:
        entry = (*key, next(self._serial), instance, known.model)
        index.add(entry)
        known.entries.append((index, entry))

    def _put_model(self, handle: Hashable, known: _Known) -> None:
        model = known.model
        self.waiting_models += bool(model.waiting)
        since = model.since
        if model.waiting or since is not None:
            self._enter(known, self.needy, model.latest, since or 0.0)
            if model.start_at > -math.inf:
                self._enter(known, self.due, model.start_at, 0)
        elif wakes_wanted(model, math.inf) > 0:
            self.lacking[handle] = model
        if (kept_ready(model) or model.has_shared_image) and model.restock_at > -math.inf:
            self._enter(known, self.due, model.restock_at, 0)
        elif model.has_shared_image and vacancies(model):
            self._enter(known, self.due, -math.inf, 0)
        if any(i.commanded is not None for i in model.instances):
            self.commanded[handle] = model
        if model.grown and kept_ready(model):
            self.grown[handle] = model

    def _put_instances(self, handle: Hashable, known: _Known) -> None:
        model = known.model
        spare = {i.id for i in spare_of(model)}
        for instance in model.instances:
            state = instance.state
            known.awake += state in AWAKE
            known.going += state in _GOING
            origin = instance.waking_from
            known.quick_wakes += state is State.WAKING and origin is not None and origin <= Tier.CHECKPOINTED
            known.restoring += state is State.WAKING and instance.tier >= Tier.CHECKPOINTED
            if state is State.RETIRING:
                known.retiring.append(instance)
            if not model.waiting and (instance.id in spare or state is not State.READY):
                step, later = (next_step(instance, model, self.rules, hurried=hurried) for hurried in (False, True))
                if step is not None and step != later:
                    self._enter(known, self.unhurried, step[1], 1, instance=instance)
                if later is not None:
                    self._enter(known, self.due, later[1], 1, instance=instance)
            index = self._index_of(instance, model, spare)
            if index is self.busy:
                self._enter(known, index, instance.leases, 0, instance=instance)
            elif index is not None:
                self._enter(known, index, *dispensable(instance, model), instance=instance)
        if known.retiring:
            self.retiring[handle] = known.retiring
        self.awake += known.awake
        self.going += known.going
        self.quick_wakes += known.quick_wakes
        self.restoring += known.restoring

    def _index_of(self, instance: InstanceView, model: ModelView, spare: set[str]) -> Index | None:
        if not model.evictable:
            return None
        if instance.id in spare:
            return self.busy if instance.leases else self.spare
        if instance.commanded is not None:
            return None
        if instance.state is State.SLEEPING:
            return self.sleeping
        return self.colder if instance.state in (State.SUSPENDED, State.CHECKPOINTED) else None

    def _put_sums(self, known: _Known) -> None:
        load = self.gpus
        if not load.capacity:
            return
        sums = known.sums = {NOW: {}, SOON: {}, BUSY: {}, IDLE: {}}
        busy = {entry[-2].id for index, entry in known.entries if index is self.busy}
        idle = {entry[-2].id for index, entry in known.entries if index in (self.spare, self.sleeping, self.colder)}
        for instance in known.model.instances:
            now = load.now.get(instance.id, gpu_accounting.NOTHING)
            after = load.after.get(instance.id, gpu_accounting.NOTHING)
            _add(sums[NOW], now)
            _add(sums[SOON], after)
            known.moving += max(0, now.get(HOST, 0) - after.get(HOST, 0))
            stays = not known.model.evictable and instance.state is State.READY  # until a time of the day, or a reload
            if stays or instance.id in busy or instance.state in _HOLDING:
                _add(sums[BUSY], after)
            if instance.id in idle:
                _add(sums[IDLE], self._most_freed(instance, known.model))
        for name, places in sums.items():
            self.sums[name].update(places)
        self.host_moving += known.moving

    def _most_freed(self, instance: InstanceView, model: ModelView) -> Bytes:
        """No more than this can come free when it steps down, to whatever tier."""
        most: dict[str, int] = {}
        for tier in STEPS:
            if tier > instance.tier and possible(instance, tier, model):
                for place, count in freed_by(self.gpus, instance, tier).items():
                    most[place] = max(most.get(place, 0), count)
        return most


def _add(total: dict[str, int], more: Bytes) -> None:
    for place, count in more.items():
        total[place] = total.get(place, 0) + count


def freed_by(load: GpuLoad, instance: InstanceView, to: Tier) -> dict[str, int]:
    """What comes free when an instance steps down to a tier; nothing where that is not known."""
    left = load.held_on(to, instance)
    held = load.after.get(instance.id, gpu_accounting.NOTHING)
    if left is None:
        return {}
    freed = gpu_accounting.beyond(held, left)
    if HOST in load.capacity:
        freed[HOST] = held.get(HOST, 0) - left.get(HOST, 0)  # a colder tier may take more
    return freed
