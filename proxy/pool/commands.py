"""What operators ask for: wake, step down, stop, drain and undrain."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from proxy.errors import CommandFailedError, ConflictError, DrainingError, InstanceNotFoundError
from proxy.pool.command import Command
from proxy.pool.instance import Instance, State, WakeRecord
from proxy.pool.model_view import STANDING_STILL, commanded_step, view_of
from proxy.pool.state import Phase
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy.pool.admission import Admission
    from proxy.pool.instance_moves import Moves
    from proxy.pool.model import Model
    from proxy.pool.state import PoolState

log = logging.getLogger("warmpool.pool")


class Commands:
    """Operators' commands to instances and models."""

    def __init__(self, state: PoolState, moves: Moves, admission: Admission) -> None:
        self._state, self._moves, self._admission = state, moves, admission

    def find(self, name: str) -> str:
        """The key of the model that an operator calls `name`: its key, or what clients call it.

        Raises ModelNotFoundError.
        """
        return name if name in self._state.models else self._state.resolve(name)

    async def wake(self, key: str, *, keep_s: float | None = None) -> tuple[str, Tier, WakeRecord | None]:
        """Have an instance of a model ready: its id, the tier that was found, the wake if there was one.

        A request that asks for nothing: it joins a wake that is under way, makes room, and fails as any other.
        Instances that an earlier command took out of use serve again. `keep_s`: for how long it is to stay ready, used
        or not; nobody else's limit counts. Raises what `lease` does.
        """
        model = self._state.models[key]
        model.end_back_off()
        surplus = len(model.instances) > model.settings.max_instances  # they go because the configuration says so
        for instance in model.instances.values() if not surplus else ():
            if instance.command is not None and instance.state in (State.RETIRING, State.WAKING):
                instance.end_command("a command to wake came after it")
            instance.let_go()
        self._moves.tick()
        ready = next((i for i in model.instances.values() if i.state is State.READY), None)
        if ready is not None and self._state.ready:
            self._keep(ready, keep_s)
            return ready.id, Tier.READY, None
        async with await self._admission.lease(model.served_name, counts=False) as lease:
            self._keep(model.instances.get(lease.instance_id), keep_s)
            return lease.instance_id, lease.found, lease.wake

    def _keep(self, instance: Instance | None, keep_s: float | None) -> None:
        if instance is not None and keep_s:
            instance.keep_ready(self._state.clock() + keep_s)
            self._moves.tick()

    def step_down(
        self, key: str, to: Tier, *, instance_id: str | None = None, wait: bool = False, discard: bool = False
    ) -> list[Command]:
        """Send the instances of a model, or one of them, down to a tier or the next colder one that they have.

        Never cuts an answer off: with requests about, it is refused, or with `wait` the instance takes no new ones and
        goes after its last. Those that are there already have a command that has come true. `discard`: a golden
        checkpoint goes too, with the last instance.
        Raises InstanceNotFoundError, ConflictError or DrainingError, with nothing changed.
        """
        if self._state.phase is not Phase.SERVING:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        model = self._state.models[key]
        instances = [instance for instance in model.instances.values() if instance_id in (None, instance.id)]
        if instance_id is not None and not instances:
            raise self._not_found(model, instance_id)
        goals = {instance.id: self._goal(model, instance, to) for instance in instances}
        moving = [instance for instance in instances if _to_move(instance, goals[instance.id])]
        if moving:
            self._refuse_if_in_the_way(model, moving, wait=wait)
        if discard and to is Tier.STOPPED and instance_id is None:
            model.discarding = bool(model.instances)
            self._moves.withdraw(key, "the model was stopped")
        given = []
        for instance in instances:
            command = instance.command
            goal = goals[instance.id]
            if command is None or command.to < goal:
                command = Command(instance.id, _height(instance), goal)
                instance.give(command)
            given.append(command)
        self._moves.tick()
        return given

    def force_stop(self, key: str, *, instance_id: str | None = None, discard: bool = False) -> list[Command]:
        """End the instances of a model, or one of them, at once and whatever they do: answers are cut off.

        One that cannot be ended is written off, which fails its command. `discard`: a golden checkpoint goes too.
        Raises InstanceNotFoundError or DrainingError, with nothing changed.
        """
        if self._state.phase is not Phase.SERVING:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        self._moves.withdraw(key, "an operator stopped the model by force")
        instances = [(m, s) for m in self._state.everyone() if m.key == key for s in m.instances.values()]
        chosen = [(m, s) for m, s in instances if instance_id in (None, s.id)]
        if instance_id is not None and not chosen:
            raise self._not_found(self._state.models[key], instance_id)
        given = []
        for model, instance in chosen:
            given.append(Command(instance.id, _height(instance), Tier.STOPPED))
            instance.give(given[-1])
            if discard and model.runtime.shares_images and instance_id is None and instance.image.present:
                instance.discard_image()
            self._moves.force(model, instance)
        self._moves.tick()
        return given

    @staticmethod
    def _not_found(model: Model, instance_id: str) -> InstanceNotFoundError:
        there = ", ".join(model.instances) or "none"
        return InstanceNotFoundError(f"{model.key!r} has no instance {instance_id!r}; there are: {there}.")

    def _goal(self, model: Model, instance: Instance, to: Tier) -> Tier:
        """The tier that a command means for an instance. Raises ConflictError when it has none."""
        if _height(instance) >= to:
            return to
        goal = commanded_step(view_of(instance), to, model.view())
        if goal is None:
            missing = model.tiers().missing
            reason = next((missing[t] for t in (to, Tier.CHECKPOINTED) if t in missing), None)
            reason = reason or "this engine failed to go there before; one that is started anew may"
            raise ConflictError(f"{instance.id} has no tier {to.label}, nor a colder one but stopped: {reason}.")
        return goal

    def _refuse_if_in_the_way(self, model: Model, moving: Sequence[Instance], *, wait: bool) -> None:
        """Raise ConflictError if something is in the way of a command to go down."""
        if model.settings.min_ready and not model.draining:
            raise ConflictError(
                f"min_ready keeps {model.settings.min_ready} of {model.served_name!r} ready: drain the model first."
            )
        if wait:
            return
        busy = [f"{s.id} is answering {s.leases}" for s in moving if s.leases]
        if busy:
            raise ConflictError(f'{"; ".join(busy)} requests. With "when_busy": "wait" it goes after the last.')
        if waiting := sum(not w.granted.done() for w in model.queue):
            raise ConflictError(
                f'{waiting} requests wait for {model.served_name!r} and would wake it again. With "when_busy": "wait" '
                f"it goes after them."
            )

    async def pause(self, key: str, *, instance_id: str | None = None, wait: bool = True) -> list[Instance]:
        """Have the running requests of a model's instances, or of one, stand still until `unpause`; those instances.

        Nobody's answer is cut off; new requests wait, or get another instance. Raises InstanceNotFoundError,
        ConflictError (nothing runs, or an engine cannot pause), CommandFailedError or DrainingError.
        """
        await self._until_settled(self._chosen(key, instance_id, (State.PAUSING, State.UNPAUSING)))
        busy = self._chosen(key, instance_id, (State.READY, State.RETIRING, State.PAUSED))
        model = self._state.models[key]
        busy = [i for i in busy if i.leases or i.state is State.PAUSED]
        if not busy:
            raise ConflictError(f"No request runs on {instance_id or model.served_name!r}: there is nothing to pause.")
        cannot = [i.id for i in busy if i.state is not State.PAUSED and not i.can_pause]
        if cannot:
            raise ConflictError(
                f"{', '.join(cannot)} cannot be paused: that takes vLLM 0.20 or later in its development mode with "
                f"sleep mode, and weights_copy."
            )
        for instance in busy:
            instance.hold()
            if instance.state in (State.READY, State.RETIRING):
                self._moves.pauses.pause(model, instance, "an operator's command")
        self._moves.tick()
        if wait:
            await self._until_settled(busy)
            if failed := [i.id for i in busy if i.state is not State.PAUSED and not i.can_pause]:
                raise CommandFailedError(f"{', '.join(failed)} could not be paused; the log says why.")
        return busy

    async def unpause(self, key: str, *, instance_id: str | None = None, wait: bool = True) -> list[Instance]:
        """Have the requests of paused instances go on, as soon as there is room; those instances.

        Raises InstanceNotFoundError, CommandFailedError (one did not come back) or DrainingError.
        """
        paused = self._chosen(key, instance_id, tuple(STANDING_STILL))
        before = {instance.id: instance.generation for instance in paused}
        for instance in paused:
            instance.let_go()
        self._moves.tick()
        if wait:
            await self._until_settled(paused, (*STANDING_STILL,))
            if broken := [i.id for i in paused if i.generation != before[i.id]]:
                raise CommandFailedError(f"{', '.join(broken)} did not go on, and is replaced; the log says why.")
        return paused

    def let_go(self) -> None:
        """The server shuts down: what stands still goes on, so that it comes to its end."""
        held = [i for m in self._state.everyone() for i in m.instances.values() if i.on_hold]
        for instance in held:
            instance.let_go()
        if held:
            self._moves.tick()

    def _chosen(self, key: str, instance_id: str | None, states: Sequence[State]) -> list[Instance]:
        if self._state.phase is not Phase.SERVING:
            raise DrainingError("The server is starting or shutting down.", retry_after_s=1.0)
        model = self._state.models[key]
        if instance_id is not None and instance_id not in model.instances:
            raise self._not_found(model, instance_id)
        return [i for i in model.instances.values() if instance_id in (None, i.id) and i.state in states]

    async def _until_settled(
        self, instances: Sequence[Instance], moving: Sequence[State] = (State.PAUSING, State.UNPAUSING)
    ) -> None:
        """Return when none of them is in such a state, or the server is about to end."""
        changed = asyncio.Event()
        silence = self._state.listen(changed.set)
        try:
            while any(i.state in moving for i in instances) and not self._state.stopping:
                changed.clear()
                await changed.wait()
        finally:
            silence()

    def drain(self, key: str | None = None) -> None:
        """Admit nothing new, for one model or at all, until `undrain`; what runs or waits goes on."""
        self._set_draining(key, draining=True)
        log.info("%s: draining", key or "all models")

    def undrain(self, key: str | None = None) -> None:
        """Take `drain` back."""
        for model in self._state.models.values() if key is None else (self._state.models[key],):
            model.end_back_off()
        self._set_draining(key, draining=False)
        log.info("%s: takes requests again", key or "all models")

    def _set_draining(self, key: str | None, *, draining: bool) -> None:
        if key is None:
            self._state.draining = draining
        else:
            self._state.models[key].draining = draining
        self._moves.tick()

    def unused(self, key: str | None = None) -> bool:
        """Whether no request runs or waits, for one model or at all."""
        models = [model for name, model in self._state.models.items() if key in (None, name)]
        return not any(m.queue or any(i.leases for i in m.instances.values()) for m in models)

    async def until_unused(self, key: str | None = None) -> None:
        """Return when no request runs or waits, for one model or at all, or the server is about to end."""
        changed = asyncio.Event()
        silence = self._state.listen(changed.set)
        try:
            while not self.unused(key) and not self._state.stopping:
                changed.clear()
                await changed.wait()
        finally:
            silence()


def _height(instance: Instance) -> Tier:
    """The tier that an instance is on, or will be when the move under way has ended."""
    return Tier.READY if instance.state is State.WAKING else instance.tier


def _to_move(instance: Instance, goal: Tier) -> bool:
    """Whether a command to go to `goal` asks something new of an instance."""
    return _height(instance) < goal and (instance.command is None or instance.command.to < goal)
