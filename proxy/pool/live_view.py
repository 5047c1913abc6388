"""The policy's view of a pool, kept up to date: only what has changed since the last decision is copied again."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from proxy.pool import turns
from proxy.pool.gpu_accounting import HOST, GpuLoad
from proxy.pool.memory_accounting import ImageHeld
from proxy.pool.view import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.pool.gpu_accounting import Bytes, GpuAccounting
    from proxy.pool.memory_accounting import HostShare, MemoryAccounting
    from proxy.pool.model import Model
    from proxy.pool.model_view import Rules
    from proxy.tiers import Tier


class LiveView:
    """One view for the life of a pool. `changed` is what it is told; `is_there` says whether a model still counts."""

    def __init__(
        self, gpu_accounting: GpuAccounting, memory_accounting: MemoryAccounting, is_there: Callable[[Model], bool]
    ) -> None:
        self.changed: dict[Model, None] = {}
        """The models that are to be looked at again, in the order in which they changed."""
        self._gpus, self._memory, self._is_there = gpu_accounting, memory_accounting, is_there
        self._view = View()
        self.is_contended = False
        """Somebody waited for an engine, or stood still, at the last decision."""
        self._shares: dict[Model, tuple[list[str], HostShare | None]] = {}
        """What each model has of the accounts: the ids of its instances, and its part of host memory."""
        self._keys: Counter[str] = Counter()
        self._guess = 0
        self._held = 0
        """What the processes of all instances hold of host memory."""
        self._on_tmpfs = 0
        """What all images take there."""
        self._now: dict[str, Bytes] = {}
        self._after: dict[str, Bytes] = {}
        self._needs: dict[str, Bytes] = {}
        self._asleep: dict[str, Bytes] = {}
        self._left: dict[tuple[str, Tier], int] = {}
        self._unpacks: dict[str, int] = {}
        self._guessed: set[str] = set()

    def most_unanswered(self, key: str) -> float:
        """How many streams without a token one instance of a model may have, as of the last decision."""
        return turns.most_unanswered(self._view, key)

    def refreshed(self, rules: Rules) -> View:
        """The view as of now."""
        view = self._view
        if self._memory.is_kept and self._memory.guess() != self._guess:
            self._guess = self._memory.guess()
            self.changed |= dict.fromkeys(m for m in self._shares if m.key in self._guessed)
        places = set(self._gpus.capacity()) | ({HOST} if self._memory.is_kept else set())
        frees = self._gpus.suspending_frees
        if places != view.gpus.capacity.keys() or rules != view.rules or frees != view.gpus.suspending_frees:
            self.changed |= dict.fromkeys(self._shares)
            view.use(rules, GpuLoad(suspending_frees=frees))  # all are put anew below, with what they hold
        changed = [*self.changed]
        self.changed.clear()
        for model in changed:
            self._count(model)
        view.gpus = self._load()
        for model in changed:
            if model in self._shares:
                view.put(model, model.view())
            else:
                view.drop(model)
        self.is_contended = len(view.needy) > 0
        return view

    def _count(self, model: Model) -> None:
        """Take a model out of the accounts, and enter it again as it is."""
        known = self._shares.pop(model, None)
        ids, share = known if known is not None else ([], None)
        self._keys[model.key] -= known is not None
        for id_ in ids:
            for table in (self._now, self._after, self._unpacks):
                table.pop(id_, None)
        if share is not None:
            self._held -= share.held
            self._on_tmpfs -= share.on_tmpfs
            for place in share.left:
                self._left.pop(place, None)
        if self._is_there(model):
            self._enter(model)
        elif self._keys[model.key] <= 0:
            del self._keys[model.key]
            for by_key in (self._needs, self._asleep):
                by_key.pop(model.key, None)
            self._guessed.discard(model.key)

    def _enter(self, model: Model) -> None:
        instances = [*model.instances.values()]
        share = None
        load = self._gpus.load(instances, (model.key,))
        if self._memory.is_kept:
            images = {
                i.id: ImageHeld(i.image.present, i.image.archived, not model.runtime.shares_images) for i in instances
            }
            share = self._memory.share(load, instances, images)
            self._held += share.held
            self._on_tmpfs += share.on_tmpfs
            self._left |= share.left
            self._unpacks |= share.unpacks
        for target, part in ((self._now, load.now), (self._after, load.after)):
            target.update(part)
        if share is not None:
            self._now |= {id_: {**load.now.get(id_, {}), HOST: count} for id_, count in share.now.items()}
            self._after |= {id_: {**load.after.get(id_, {}), HOST: count} for id_, count in share.after.items()}
        self._learn(model, load)
        self._keys[model.key] += 1
        self._shares[model] = [instance.id for instance in instances], share

    def _learn(self, model: Model, load: GpuLoad) -> None:
        """What a model's instances need, awake and asleep."""
        key = model.key
        need = dict(load.needs.get(key, {}))
        self._guessed.discard(key)
        if self._memory.is_kept:
            host_need = self._memory.need(key)
            if host_need is None:
                self._guessed.add(key)
                host_need = self._guess or None
            if host_need:
                need[HOST] = host_need
        for table, found in ((self._needs, need), (self._asleep, load.asleep.get(key, {}))):
            if found:
                table[key] = found
            else:
                table.pop(key, None)

    def _load(self) -> GpuLoad:
        capacity = dict(self._gpus.capacity())
        short = 0
        if self._memory.is_kept:
            free = self._memory.free(self._on_tmpfs)
            capacity[HOST] = free + self._memory.held_then
            short = -free - max(0, self._memory.held_then - self._held)
        return GpuLoad(
            capacity, self._now, self._after, self._needs, self._asleep, self._gpus.suspending_frees, self._left,
            self._unpacks, short, self._guessed, self._gpus.all_moves, self._gpus.images_may_go_to(), self._gpus.bound,
        )  # fmt: skip
