"""What `/admin/status` says of models, instances and wakes."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from proxy.pool.instance import Instance, State
from proxy.pool.model import tier_found
from proxy.pool.model_view import next_step, view_of
from proxy.pool.state import Phase
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.pool.instance import WakeRecord
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

_COMING_UP: Final = frozenset({State.WAKING, State.UNPAUSING})


def pool_status(state: PoolState, models: dict[str, Any]) -> dict[str, Any]:
    """All of it but the GPUs; `models`: what `model_status` says of each."""
    now = state.clock()
    return {
        "ready": state.ready,
        "draining": state.draining or state.phase is Phase.CLOSED,
        "leases": state.open_leases,
        "models": models,
        "coming": [
            instance_status(state, m, instance, now) for m in state.coming.values() for instance in m.instances.values()
        ],
        "leaving": [
            instance_status(state, m, instance, now) for m in state.leaving for instance in m.instances.values()
        ],
        "wakes": [*state.wakes],
        "strays": [line for runtime in state.runtimes.values() for line in runtime.strays()],
        "overdue": state.overdue.status(),
        "written_off": state.written_off.status(),
    }


def publish(state: PoolState) -> Iterator[None]:
    """Bring the gauges up to date, a model a step; asked for when they are read: requests have no time for it."""
    models: dict[str, list[Model]] = {}
    for model in state.everyone():
        models.setdefault(model.key, []).append(model)
    for key, same in models.items():
        instances = [i for m in same for i in m.instances.values()]
        counts = Counter(i.state for i in instances)
        for kind in State:
            if kind is not State.GONE:
                state.metrics.instances.labels(key, kind.value).set(counts[kind])
        state.metrics.queue_depth.labels(key).set(sum(len(m.queue) for m in same))
        state.metrics.running_requests.labels(key).set(sum(i.leases for i in instances))
        yield


def model_status(state: PoolState, key: str) -> dict[str, Any]:
    """A model with its instances."""
    model, now = state.models[key], state.clock()
    tiers = model.tiers()
    return {
        "name": model.served_name,
        "aliases": [*model.settings.aliases],
        "draining": model.draining,
        "tier": tier_found(model.instances.values()).label,
        "queue": len(model.queue),
        "backs_off_s": round(max(0.0, model.start_at - now), 3),
        "last_failure": None if model.last_failure is None else model.last_failure.status(),
        "estimate_s": round(state.estimate_s(key), 3),
        "max_model_len": model.max_model_len,
        "runtime": model.runtime.name,
        "chats": model.settings.routes.chat,
        "shares_checkpoint": model.runtime.shares_images,
        "tiers": sorted(t.label for t in tiers.offered),
        "missing_tiers": {t.label: reason for t, reason in tiers.missing.items()},
        "repeats_randomness": model.reseed_gap,
        "gpu_need_bytes": model.gpu_accounting.need(model.key),
        "host_need_bytes": model.memory_accounting.need(model.key),
        "outdated": _outdated(model),
        "instances": [instance_status(state, model, instance, now) for instance in model.instances.values()],
    }


def listed(state: PoolState, key: str) -> dict[str, Any]:
    """What clients are told of a model beside its names: tier, expected wait, and what user interfaces show."""
    model = state.models[key]
    tier = tier_found(model.instances.values())
    waking = any(i.state in _COMING_UP for i in model.instances.values())
    value = "loaded" if tier is Tier.READY else "loading" if waking else "unloaded"
    said: dict[str, Any] = {
        "tier": tier.label,
        "expected_wait_s": round(state.estimate_s(key), 3),
        "status": {"value": value},  # in llama.cpp's words, which its and other user interfaces read
    }
    if model.max_model_len is not None:
        said["max_model_len"] = model.max_model_len
    if model.settings.info:
        said["meta"] = model.settings.info
    return said


def _outdated(model: Model) -> dict[str, Any] | None:
    if model.outdated is None:
        return None
    return {"reason": model.outdated.reason, "renewal": model.renewal or "waits for its turn"}


def instance_status(state: PoolState, model: Model, instance: Instance, now: float) -> dict[str, Any]:
    """One instance."""
    wake = instance.last_wake
    waking = state.wakes_under_way.get(instance.id) if instance.state is State.WAKING else None
    step = next_step(view_of(instance), model.view(), state.rules)
    due = None if step is None else round(time.time() + max(0.0, step[1] - now))
    return {
        "id": instance.id,
        "state": instance.state.value,
        "tier": instance.tier.label,
        "leases": instance.leases,
        "generation": instance.generation,
        "has_checkpoint": instance.image.present,
        "gpu_bytes": model.gpu_accounting.charge(instance),
        "host_bytes": model.memory_accounting.held(instance),
        "gpu_growth_bytes": model.gpu_accounting.growth_bytes(instance),
        "cycles": model.gpu_accounting.cycles(instance),
        "can_pause": instance.can_pause,
        "paused_s": None if instance.paused_since is None else round(now - instance.paused_since, 3),
        "on_hold": instance.on_hold,
        "commanded": instance.commanded.label if instance.commanded is not None else None,
        "next_step": None if step is None else {"to": step[0].label, "at_unix_s": due},
        "last_used_unix_s": time.time() if instance.leases else instance.last_used_unix_s,
        "waking": None if waking is None else waking.status(),
        "last_wake": None if wake is None else wake_status(wake),
    }


def wake_status(wake: WakeRecord) -> dict[str, Any]:
    """A wake, with when each stage began and how long it took, in seconds."""
    return {
        "found": wake.found.label,
        "from": wake.reached_from.label,
        "at_unix_s": wake.at_unix_s,
        "seconds": round(wake.seconds, 6),
        "stages": {name: round(value, 6) for name, value in wake.stages.items()},
        "starts": {name: round(value, 6) for name, value in wake.starts.items()},
    }
