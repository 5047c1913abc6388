"""The one owner of instances: what others may ask of the pool, and where it decides.

`Pool.tick` is the only place where something is decided: it hands ready instances to those who wait, asks the policy
for a plan, moves every instance concerned along its table and only then starts the tasks that do the work. It never
awaits. Whatever may change the answer - a new waiter, a lease that ends, a task that is done, a deadline - calls it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from proxy.engine import kinds
from proxy.engine.api_key import key_of
from proxy.errors import DrainingError, ModelNotFoundError
from proxy.host.turns import in_turns
from proxy.pool import offering, policy, status
from proxy.pool.admission import Admission
from proxy.pool.adoption import Adoption
from proxy.pool.commands import Commands
from proxy.pool.drill import Drills
from proxy.pool.engine_renewal import Renewals
from proxy.pool.instance_moves import Moves
from proxy.pool.model import is_left, tier_found
from proxy.pool.plan import Action, Clone, StepDown, Wake
from proxy.pool.prewarm import Prewarm
from proxy.pool.reconfigure import Reconfiguration
from proxy.pool.state import Phase, PoolState
from proxy.pool.usage import Usage
from proxy.runtime.ladder_probes import LadderProbes
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.engine.client import EngineClient
    from proxy.gpu.cuda import Gpus
    from proxy.host.facts import Memory
    from proxy.pool.gpu_time import Taken
    from proxy.pool.instance import Instance
    from proxy.pool.model import Model
    from proxy.pool.offering import Offered
    from proxy.runtime.base import EngineProcess, Runtime
    from proxy.telemetry.metrics import Metrics

log = logging.getLogger("warmpool.pool")

_MOMENT_S = 0.05
_MODELS_A_TURN = 10
"""How many models `/admin/status` looks at in one turn of the event loop."""
_CLOSE_S = 60.0
"""How long `close` may take where nobody says so."""


class Pool:
    """All instances of all models on this host.

    `runtimes` by name; `clock` is monotonic, in seconds, and may be a test's, as `unix_s`, the time of the day;
    `connect` makes the client of an engine.
    `gpus`: whose memory is kept account of; opened by the runtimes. Without, it plays no part in any decision.
    `memory` reads the host's; likewise.
    """

    def __init__(
        self,
        settings: Settings,
        runtimes: Mapping[str, Runtime],
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_s: Callable[[], float] = time.time,
        connect: Callable[[EngineProcess, str, ModelSettings], EngineClient] | None = None,
        usage: Usage | None = None,
        probes: LadderProbes | None = None,
        gpus: Gpus | None = None,
        memory: Callable[[], Memory] | None = None,
    ) -> None:
        self._state = state = PoolState(
            settings,
            runtimes,
            metrics,
            clock=clock,
            unix_s=unix_s,
            usage=usage or Usage(),
            probes=probes or LadderProbes(),
        )
        self._moves = Moves(
            state,
            tick=self.tick,
            tick_soon=self._tick_soon,
            connect=connect or _connect,
            gpus=gpus,
            memory=memory,
        )
        self._adoption = Adoption(state, self._moves)
        self._admission = Admission(state, self._moves)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        """When it fires, by the event loop's clock: uvloop's handles for very short delays do not know."""
        self._ticking = False
        metrics.expect(state.models, [tier.label for tier in Tier])
        metrics.before_collecting(self._publish)

        # What the parts do for others is theirs to say.
        self.resolve, self.estimate_s, self.listen = state.resolve, state.estimate_s, state.listen
        self.lease, self.try_lease = self._admission.lease, self._admission.try_lease
        self.fallback = self._admission.fallback
        commands = self._commands = Commands(state, self._moves, self._admission)
        self.find, self.unused, self.until_unused = commands.find, commands.unused, commands.until_unused
        self.wake, self.step_down = commands.wake, commands.step_down
        self.pause, self.unpause = commands.pause, commands.unpause
        self.force_stop, self.drain, self.undrain = commands.force_stop, commands.drain, commands.undrain
        self.prewarm = Prewarm(state, self._moves, commands).prewarm
        renewals = Renewals(state, self._moves)
        self.changed, self.outdated = renewals.changed, renewals.outdated
        self.look_for_changes, self.renew = renewals.look_for_changes, renewals.renew
        self.room_beside = renewals.room_beside
        self.drill_due = Drills(state, commands, renewals, self._moves.faults).drill_due
        self.reconfigure = Reconfiguration(state, self._moves, renewals).reconfigure
        self.settled = self._moves.settled
        self.scrape_engines = self._moves.engine_scrape.scrape

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self._state.settings

    @property
    def ready(self) -> bool:
        """Whether new clients are welcome."""
        return self._state.ready

    @property
    def stopping(self) -> bool:
        """Whether the server is about to end."""
        return self._state.stopping

    # --- life ---

    async def open(self) -> None:
        """Open the runtimes, adopt the checkpoints that are still good, start what `min_ready` asks for.

        Raises HostError when a runtime cannot work here.
        """
        for runtime in self._state.runtimes.values():
            await self._state.open_runtime(runtime)
        for name, runtime in self._state.runtimes.items():
            await self._adoption.adopt(name, runtime)
        await self._moves.start_watching()
        self._state.advance(Phase.SERVING)
        self.tick()

    def begin_stop(self) -> None:
        """Not ready for new clients any more, but requests that come all the same are served until `close`.

        Nothing is begun that no request waits for.
        """
        self._state.advance(Phase.STOPPING)
        self._state.count_uses()
        self._state.give_up_commands()
        self._moves.give_way("the server is stopping")
        self._commands.let_go()
        self._state.tell()

    async def close(self, limit_s: float = _CLOSE_S) -> None:
        """End everything: waiters get an error, moves are cancelled, engines end.

        Checkpoints stay for the next start, and engines too where the runtime leaves them. Returns within `limit_s`;
        what has not ended by then is named in the log and left to the next start.
        """
        self._state.advance(Phase.CLOSED)
        self._state.count_uses()
        if self._timer is not None:
            self._timer.cancel()
        for model in self._state.models.values():
            model.fail_waiters(DrainingError("The server is shutting down.", retry_after_s=1.0))
        self._state.give_up_commands()
        self._moves.give_way("the server is stopping")
        self._state.written_off.close()
        clock = asyncio.get_running_loop().time
        end = clock() + limit_s
        # A third of the time for each: what moves, engines, runtimes; more for those that come later.
        await _ended_within(end - limit_s * 2 / 3 - clock(), self._moves.cancel())
        everyone = [(m, s) for m in self._state.everyone() for s in m.instances.values()]
        grace_s = max(0.0, end - limit_s * 2 / 5 - clock())
        ends = [asyncio.create_task(self._end(m, s, grace_s), name=f"end {s.id}") for m, s in everyone]
        await _ended_within(end - limit_s / 5 - clock(), ends)
        await _ended_within(end - clock(), [asyncio.create_task(r.close()) for r in self._state.runtimes.values()])

    async def _end(self, model: Model, instance: Instance, grace_s: float) -> None:
        """End an engine, by force after `grace_s`."""
        await self._moves.steps.unwatch(instance)
        if instance.client is not None:
            await instance.client.disconnect()
        if is_left(model, instance):
            log.info("%s left running, for the next warmpool to adopt", instance.id)
        elif instance.engine is not None:
            end = instance.engine.kill if instance.image.present else instance.engine.remove
            try:
                async with asyncio.timeout(grace_s):
                    await end()
            except TimeoutError:
                log.warning("%s did not end within %.1f s: ended by force", instance.id, grace_s)
                await instance.engine.kill()
        del model.instances[instance.id]

    # --- deciding ---

    def tick(self) -> None:
        """Decide anew and start what was decided."""
        if self._ticking or self._state.phase in (Phase.STARTING, Phase.CLOSED):
            return
        self._ticking = True
        try:
            self._state.count_uses()
            for model in [*self._state.live_view.changed]:
                self._admission.dispatch(model)
                for instance in model.instances.values():
                    instance.note_command()
            minute_s = self._state.note_time_of_day()
            plan = policy.decide(self._state.view(), self._state.clock())
            if self._state.coming and plan.presses():
                self._moves.give_way("a request needed its place")
                plan = policy.decide(self._state.view(), self._state.clock())
            for action in plan.actions:
                if not self._state.stopping or self._is_waited_for(action):
                    self._moves.begin(action)
            if minute_s is not None:
                plan.not_later_than(self._state.clock() + minute_s)
            self._set_timer(plan.deadline)
        finally:
            self._ticking = False
        self._state.tell()

    def _is_waited_for(self, action: Action) -> bool:
        return not isinstance(action, StepDown | Clone) and (
            not isinstance(action, Wake) or bool(self._state.models[action.model].queue)
        )

    def _tick_soon(self) -> None:
        """Decide within a moment; requests that end one after the other are one reason, not many."""
        if self._timer is None or self._timer_at > asyncio.get_running_loop().time() + _MOMENT_S:
            self._tick_in(_MOMENT_S)

    def _tick_in(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = loop.call_later(delay_s, self.tick), loop.time() + delay_s

    def _set_timer(self, deadline: float | None) -> None:
        if deadline is not None:
            self._tick_in(max(0.0, deadline - self._state.clock()))
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- seeing ---

    def take_gpu_time(self) -> Iterator[tuple[str, Taken]]:
        """By model's key, an instance each: who had the GPU since this was last asked."""
        times = self._state.gpu_times
        self._state.gpu_times = [entry for entry in times if not entry[1].ended]
        return ((key, time.take()) for key, time in times)

    def served_name(self, key: str) -> str:
        """What the engines of a model call it."""
        try:
            return next(m for m in self._state.everyone() if m.key == key).served_name
        except StopIteration:  # removed since its name was resolved
            raise ModelNotFoundError(key) from None

    @property
    def host_memory(self) -> Memory | None:
        """Where engines run, as it was last read; None where it plays no part."""
        return self._state.memory_accounting.memory

    def tier(self, key: str) -> Tier:
        """The tier that a request for the model would find."""
        return tier_found(self._state.models[key].instances.values())

    def offered(self, key: str) -> Offered | None:
        """What a request for the model could count on, if it came now; None where nothing is offered."""
        return offering.offered(self._state, key)

    def listed(self, key: str) -> dict[str, Any]:
        """What `/v1/models` says of a model beside its names."""
        return status.listed(self._state, key)

    def status(self) -> dict[str, Any]:
        """For `/admin/status`: models with tier and queue, instances with state, leases, last use and wake."""
        return self._status({key: status.model_status(self._state, key) for key in self._state.models})

    async def status_in_turns(self) -> dict[str, Any]:
        """The same, without holding the event loop: what it says of one model may be older than of the next."""
        models = {}
        async for key in in_turns([*self._state.models], _MODELS_A_TURN):
            if key in self._state.models:  # still
                models[key] = status.model_status(self._state, key)
        return self._status(models)

    def _status(self, models: dict[str, Any]) -> dict[str, Any]:
        return {**status.pool_status(self._state, models), "gpus": self._moves.gpus.status()}

    def _publish(self) -> Iterator[None]:
        return status.publish(self._state)


async def _ended_within(limit_s: float, tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for tasks, not for longer than that; say what failed and what goes on."""
    if tasks:
        await asyncio.wait(tasks, timeout=max(0.0, limit_s))
    for task in tasks:
        if not task.done():
            log.error("%s: it does not end, and is left to the next start", task.get_name())
            task.cancel()
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s", task.get_name(), error)


def _connect(engine: EngineProcess, served_name: str, model: ModelSettings) -> EngineClient:
    key = key_of(engine.key, model)
    return kinds.of(model).connect(
        engine.base_url,
        served_name,
        model,
        instance=engine.instance_id,
        api_key=key,
        response_timeout_s=model.response_timeout,
    )
