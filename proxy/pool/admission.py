"""Who gets an engine: leases, the queue of those who wait, and whom to refuse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Final

from proxy.errors import DrainingError, MaxWaitError, NoCapacityError, QueueFullError
from proxy.pool.instance import Instance, State, holding, pick
from proxy.pool.lease import Lease
from proxy.pool.model import client_of, tier_found
from proxy.pool.model_view import is_failing
from proxy.pool.state import SERVING_PHASES, Phase
from proxy.pool.turns import behind_s
from proxy.pool.wait_queue import Waiter
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.effects import Effects
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.pool")

_READY: Final = State.READY
_FOUND_READY: Final = Tier.READY
"""For what is asked of every request: Python 3.11 takes longer for a member of an enumeration than for a call."""


class Admission:
    """Grants leases and takes them back."""

    def __init__(self, state: PoolState, effects: Effects) -> None:
        self._state, self._effects = state, effects
        self._tick_is_due = False

    async def lease(
        self,
        name: str,
        *,
        priority: int = 0,
        max_wait_s: float | None = None,
        preferred: str | None = None,
        near: bytes | None = None,
        counts: bool = True,
        streams: bool = False,
        size: int = 0,
    ) -> Lease:
        """A hold on a ready instance of the model, once there is one.

        On the `preferred` one as long as that holds the engine it had: it is woken, or waited for.
        `near`: what it has in common with others, which should go to the same instance.
        `counts`: it is a use of the model. `streams`: its answer comes token by token. `size`: of the request, in
        bytes; among those who wait, a long one counts as having come later (`turns.behind_s`).
        Joins the wake under way or starts one. Of those who wait, the ones of a higher priority come first, but one
        that waited `priority_head_start` longer comes before them, so that nobody waits for ever. Raises
        ModelNotFoundError, QueueFullError, NoCapacityError (nothing became free in `queue_timeout`), MaxWaitError
        (nothing will, or did, in `max_wait_s`), WakeFailedError
        or DrainingError. Cancelling hands on what was granted in the same moment.
        """
        model = self._state.models[self._state.resolve(name)]
        if self._state.phase not in SERVING_PHASES:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        if self._state.draining or model.draining:
            what = "The server" if self._state.draining else f"The model {name!r}"
            raise DrainingError(f"{what} is draining: it takes no new requests for now.", retry_after_s=1.0)
        if counts:
            self._state.note_use(model.key)
        if (lease := self._at_once(model, preferred, near)) is not None:
            if streams:
                lease.await_token()
            return lease
        held = holding(model.instances.values(), preferred) if preferred is not None else None
        found = tier_found(model.instances.values() if held is None else [model.instances[held.id]])
        self._refuse_if_failing(model)
        self._refuse_if_full(model)
        self._refuse_if_longer(model, max_wait_s)
        limit_s = min(model.settings.queue_timeout, math.inf if max_wait_s is None else max_wait_s)
        since = self._state.clock()
        head_start_s = priority * self._state.settings.pool.priority_head_start
        if self._state.settings.pool.policy == "turns":
            model.demand.note_size(size)
            head_start_s -= behind_s(size, model.demand.usual_size, model.max_wait_s)
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop.create_future(), since, found, preferred, near, head_start_s, streams)
        timer = loop.call_later(limit_s, self._expire, waiter, model, name, limit_s)
        self._state.waiting += 1
        queue = model.queue  # a reload hands it to the model that takes over
        joins = bool(queue)
        queue.add(waiter, since - head_start_s)
        if preferred is not None:
            model.wanted[preferred] += 1
        try:
            if joins:
                self._tick_once()
            else:
                self._effects.tick()
            return await waiter.granted
        except asyncio.CancelledError:
            waiter.hand_on()
            raise
        finally:
            timer.cancel()
            # One that was granted or failed has left the queue already.
            queue.discard(waiter)
            self._state.waiting -= 1
            if preferred is not None:
                model.wanted[preferred] -= 1
            self._state.tell()

    def _expire(self, waiter: Waiter, model: Model, name: str, limit_s: float) -> None:
        """It has waited for as long as it may."""
        if not waiter.granted.done():
            kind = NoCapacityError if limit_s == model.settings.queue_timeout else MaxWaitError
            text = f"No instance of {name!r} became free within {limit_s:g} s."
            waiter.granted.set_exception(kind(text, retry_after_s=self._expected_wait_s(model)))

    def try_lease(self, key: str, near: bytes | None = None) -> Lease | None:
        """A hold on a ready instance of a model, by its key, if there is one with room for which nobody waits.

        None wherever `lease` would wait or refuse; nothing has happened then.
        """
        state = self._state
        model = state.models.get(key)
        if model is None or model.draining or state.draining or state.phase not in SERVING_PHASES:
            return None
        if (lease := self._at_once(model, None, near)) is not None:
            if key in (uses := state.uses):
                uses[key] += 1
            else:
                state.note_use(key)
        return lease

    def _at_once(self, model: Model, preferred: str | None, near: bytes | None) -> Lease | None:
        state = self._state
        if state.waiting and model.queue:
            return None
        most = state.live_view.most_unanswered(model.key) if state.live_view.is_contended else math.inf
        instance = pick(model.instances.values(), model.settings.max_concurrency, preferred, near, most)
        if instance is None:
            return None
        instance.begin_lease()
        state.open_leases += 1
        if state.listeners:
            state.tell()
        return Lease(self, instance, _FOUND_READY, 0.0, None)

    def fallback(self, key: str, *, failed: bool = False) -> str | None:
        """The key of the model that should answer instead of one that has no instance with room, if there is one.

        That is where a request would wait longer than `fallback_wait`, or the model cannot be started for now, as one
        that `failed` has just found out.
        """
        model = self._state.models.get(key)
        if model is None or model.settings.fallback is None:
            return None
        other = self._state.models.get(self._named(model.settings.fallback) or "")
        if other is None or other is model or other.draining or self._fails(other):
            return None
        limit_s = model.settings.fallback_wait
        too_long = limit_s is not None and self._state.estimate_s(key) > limit_s
        return other.key if failed or too_long or model.draining or self._fails(model) else None

    def _named(self, name: str) -> str | None:
        return name if name in self._state.models else self._state.settings.names().get(name)

    def _fails(self, model: Model) -> bool:
        return model.last_failure is not None and is_failing(model.view(), self._state.clock())

    def _tick_once(self) -> None:
        """Decide anew for all who join a queue in the same turn of the event loop: one reason, not a thousand."""
        if not self._tick_is_due:
            self._tick_is_due = True
            asyncio.get_running_loop().call_soon(self._tick)

    def _tick(self) -> None:
        self._tick_is_due = False
        self._effects.tick()

    def _refuse_if_failing(self, model: Model) -> None:
        if model.last_failure is not None and self._fails(model):
            raise model.wake_failed(model.last_failure, self._state.clock())

    def _refuse_if_full(self, model: Model) -> None:
        everywhere = self._state.queued.total()
        if len(model.queue) >= model.settings.max_queue or everywhere >= self._state.settings.pool.max_queue:
            raise QueueFullError(
                f"{len(model.queue)} requests wait for {model.served_name!r} already.",
                retry_after_s=self._expected_wait_s(model),
            )

    def _refuse_if_longer(self, model: Model, max_wait_s: float | None) -> None:
        if max_wait_s is not None and (expected_s := self._state.estimate_s(model.key)) > max_wait_s:
            raise MaxWaitError(
                f"An instance of {model.served_name!r} is expected in {expected_s:.1f} s, "
                f"more than the {max_wait_s:g} s that the request would wait.",
                retry_after_s=self._expected_wait_s(model),
            )

    def _expected_wait_s(self, model: Model) -> float:
        return max(1.0, self._state.estimate_s(model.key))

    def token_came(self, instance: Instance, generation: int) -> None:
        """A stream has its first token; the next one may go to the engine, which was spared a pause until then."""
        if instance.generation != generation:
            return
        instance.token_came()
        if not instance.can_pause or not self._state.live_view.is_contended:
            return
        model = self._state.models.get(instance.model)
        if model is not None and model.queue and instance.state is _READY:
            self.dispatch(model)
        if not instance.unanswered:
            if instance.state is State.RETIRING:
                self._effects.tick()
            else:
                self._effects.tick_soon()

    def lease_charged(self, instance: Instance, generation: int, key: str) -> None:
        """The time on the GPU of a lease is that of a key."""
        if instance.generation == generation:
            instance.gpu_time.charge(key)

    def lease_ended(
        self, instance: Instance, generation: int, keep_s: float | None = None, key: str | None = None
    ) -> None:
        """Take a lease back; `keep_s`: how long its client wants the instance to stay ready; `key`: whose it was."""
        state = self._state
        state.open_leases -= 1
        if instance.generation == generation:
            if keep_s is not None:
                keep_s = self._allowed_keep_s(instance, keep_s)
            if instance.leases > 1 and keep_s is None and key is None:
                instance.end_one_lease()
            else:
                instance.end_lease(state.clock(), time.time(), keep_s, key)
            goes_on = instance.state is _READY and instance.command is None
            if goes_on and instance.leases and not state.waiting:
                # It goes on, and nobody waits: there is nothing to decide.
                if state.listeners:
                    state.tell()
                return
            if goes_on:
                # Unless others wait for its place, nothing is to be decided now; what an idle one does next has time.
                model = state.models.get(instance.model)
                mine = (
                    model is not None and model.instances.get(instance.id) is instance
                )  # a reload may have replaced it
                others_wait = len(state.queued) > (model in state.queued)
                if model is not None and mine and not others_wait:
                    self.dispatch(model)
                    if not instance.leases:
                        self._effects.tick_soon()
                    state.tell()
                    return
        self._effects.tick()

    def _allowed_keep_s(self, instance: Instance, keep_s: float) -> float | None:
        model = self._state.settings.models.get(instance.model)
        most_s = model.max_keep_alive if model is not None else None
        return None if most_s is None else min(keep_s, most_s)

    def dispatch(self, model: Model) -> None:
        """Grant leases in the order of the queue as long as there is room; past who waits for one instance."""
        if not model.queue:
            return
        done: list[Waiter] = []
        concurrency, most = model.settings.max_concurrency, self._state.live_view.most_unanswered(model.key)
        for waiter in model.queue:
            if not waiter.granted.done():
                instance = pick(model.instances.values(), concurrency, waiter.preferred, waiter.near, most)
                if instance is None and waiter.preferred is None:
                    break
                if instance is None:
                    continue
                self._grant_to(waiter, instance)
            done.append(waiter)
        for waiter in done:
            model.queue.discard(waiter)

    def _grant_to(self, waiter: Waiter, instance: Instance) -> None:
        waited_s = self._state.clock() - waiter.since
        wake = instance.last_wake
        # A wake that ended before the request came is not the one it waited for.
        if wake is not None and wake.ended < waiter.since:
            wake = None
        queue_s = max(0.0, waited_s - wake.seconds) if wake is not None else waited_s
        instance.begin_lease()
        self._state.open_leases += 1
        lease = Lease(self, instance, waiter.found, queue_s, wake)
        if waiter.streams:
            lease.await_token()
        waiter.granted.set_result(lease)

    async def examine(self, instance: Instance, generation: int) -> None:
        """Look at an engine that failed a request, and give it up if it does not serve."""
        if self._state.phase is Phase.CLOSED or instance.generation != generation:
            return
        model = self._state.home(instance)
        most_s = model.settings.response_timeout
        if most_s is not None and (silent_s := client_of(instance).silent_s) >= most_s:
            self._effects.give_up_stalled(
                model, instance, f"no byte for {silent_s:.0f} s, which is over response_timeout"
            )
            return
        healthy = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                healthy = await client_of(instance).healthy(model.settings.health.path)
        if not healthy and instance.generation == generation:
            log.warning("%s failed a request and does not answer %s", instance.id, model.settings.health.path)
            self._effects.give_up(model, instance)
