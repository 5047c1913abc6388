"""The real pool on the fake runtime, in virtual time: nothing is lost, and it never says what is not so.

Requests, clients that leave, engines that die, operations that fail anywhere or never end, commands, reloads, restarts.
Long: POOL_EXAMPLES=2000 (`make test-model`). hypothesis prints the steps that fail, and how to repeat them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from proxy.config.settings import Settings
from proxy.errors import CommandFailedError, EngineError, Fault, RequestError, RuntimeFailure
from proxy.pool.instance import AWAKE, MOVING, State
from proxy.pool.renewal_schedule import keep_current
from proxy.pool.state import Phase
from proxy.pool.usage import Usage
from proxy.runtime.base import Outdated
from proxy.tiers import Tier
from tests.fake_cuda import GIB
from tests.fakes import Rig, model_settings
from tests.virtual_time import VirtualTimeLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from proxy.pool.instance import Instance
    from proxy.pool.lease import Lease

pytestmark = pytest.mark.timeout(1800)
"""A failure is made smaller first, which takes a while."""

TAKES_S: Final = {
    "start": 2.0, "health": 20.0, "warmup": 0.5, "canary": 0.2, "sleep": 0.2, "wake_up": 0.1, "suspend": 0.4,
    "resume": 0.3, "checkpoint": 3.0, "restore": 1.0, "clone": 0.1, "kill": 0.2, "remove": 0.3, "discard_image": 0.1,
    "pause": 0.2, "unpause": 0.2, "save_weights": 1.0, "load_weights": 0.3, "reload_weights": 2.0, "reseed": 0.01,
    "archive_image": 5.0, "unarchive_image": 4.0, "verify_image": 0.5, "quarantine_image": 0.1, "copy_to_archive": 5.0,
}  # fmt: skip
"""Operations of the runtime, its images and its engines, each of which may fail or hang."""
IDLE: Final = {"sleeping": "5s", "suspended": "20s", "checkpointed": "60s", "archived": "300s", "stopped": "1h"}
QUEUE_S: Final = 120.0
CLOSE_S: Final = 60.0
STEP_S: Final = 0.5
GOES_ON_WITHIN_S: Final = 1800.0
"""From the end of all faults until every model serves: limits of what was under way, and the rest between starts."""
GROUNDS: Final[dict[str, Callable[[str], Exception]]] = {
    "failed": lambda op: RuntimeFailure(op, "it did not work"),
    "failed without harm": lambda op: RuntimeFailure(op, "not now", alive=True),
    "image": lambda op: RuntimeFailure(op, "wrong magic", fault=Fault.IMAGE),
    "damage": lambda op: RuntimeFailure(op, "a file is missing", fault=Fault.DAMAGE),
    "engine": lambda op: EngineError(op, "HTTP 500"),
    "full": lambda _: OSError(errno.ENOSPC, "No space left on device"),
    "unexpected": lambda op: ValueError(f"{op}: nobody thought of this"),
}


@dataclass
class Client:
    """One request, and what becomes of it."""

    key: str
    since: float
    lease: Lease | None = None
    outcome: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def holds(self) -> Instance | None:
        """The engine that answers it."""
        lease = self.lease
        if lease is None or lease._instance.generation != lease.generation:
            return None
        return lease._instance


@dataclass
class World:
    """What outlasts a warmpool: its engines and images, and the configuration on disk."""

    rig: Rig
    models: dict[str, dict[str, Any]]
    options: dict[str, Any]
    clients: list[Client] = field(default_factory=list)
    commands: list[asyncio.Task[None]] = field(default_factory=list)


class PoolMachine(RuleBasedStateMachine):
    """Random events, each followed by a random time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.world: World | None = None
        logging.getLogger("warmpool").setLevel(logging.CRITICAL)

    # --- helpers ---

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(work)

    @property
    def it(self) -> World:
        assert self.world is not None
        return self.world

    def key(self, number: int) -> str:
        keys = [*self.it.rig.settings.models]
        return keys[number % len(keys)]

    def instances(self) -> list[Instance]:
        return [i for m in self.it.rig.pool._state.everyone() for i in m.instances.values()]

    def rig_of(self, models: dict[str, Any], options: dict[str, Any], before: Rig | None = None) -> Rig:
        rig = Rig(models, clock=self.loop.time, **options)
        rig.runtime.takes_s = TAKES_S
        rig.runtime.leaves = self.leaves
        rig.runtime.can_pause = self.pauses
        if before is not None:
            rig.runtime.inherit(before.runtime, keep=True)
            rig.runtime.copies = before.runtime.copies
            rig.nvml.held = before.nvml.held
        return rig

    async def request(self, client: Client, hold_s: float, **how: Any) -> None:
        pool = self.it.rig.pool
        try:
            client.lease = await pool.lease(client.key, **how)
        except RequestError as error:
            client.outcome = f"refused: {error.code}"
            assert self.loop.time() - client.since <= QUEUE_S + 1.0, "nobody waits for longer than was said"
            return
        except asyncio.CancelledError:
            client.outcome = "left"
            raise
        try:
            client.lease.await_token()
            while hold_s > 0:
                await asyncio.sleep(STEP_S)
                if client.holds is None:
                    client.outcome = "broke off"
                    return
                if not client.lease.paused:
                    client.lease.token_came()
                    hold_s -= STEP_S
            client.outcome = "served"
        except asyncio.CancelledError:
            client.outcome = "left"
            raise
        finally:
            client.lease.release()
            client.lease = None

    def ask(self, key: str, hold_s: float, **how: Any) -> Client:
        client = Client(key, self.loop.time())
        client.task = self.loop.create_task(self.request(client, hold_s, **how))
        self.it.clients.append(client)
        return client

    def command(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """An operator's, which may be refused and must come to an end."""
        self.it.commands.append(self.loop.create_task(_quietly(work())))
        self.do(asyncio.sleep(0))

    # --- events ---

    @initialize(
        models=st.integers(1, 3),
        shares=st.booleans(),
        limit=st.sampled_from(["none", "one place", "two places", "memory"]),
        pauses=st.booleans(),
        leaves=st.booleans(),
        instances=st.integers(1, 3),
        concurrency=st.integers(1, 4),
        min_ready=st.sampled_from([0, 0, 0, 1]),
        level=st.integers(1, 2),
        policy=st.sampled_from(["turns", "turns", "fifo", "lru"]),
    )
    def begin(
        self, models: int, shares: bool, limit: str, pauses: bool, leaves: bool, instances: int, concurrency: int,
        min_ready: int, level: int, policy: str,
    ) -> None:  # fmt: skip
        self.pauses, self.leaves = pauses, leaves
        entry = {
            "idle": IDLE, "max_instances": instances, "max_concurrency": concurrency, "queue_timeout": f"{QUEUE_S:g}s",
            "max_wait": "10s", "sleep_level": level if pauses else 1, "weights_copy": pauses, "start_timeout": "100s",
            "wake_timeout": "30s", "checkpoint_timeout": "60s", "health": {"interval": "1s"},
        }  # fmt: skip
        entries = {
            f"m{n}": {**entry, "min_ready": min_ready if n == 0 and limit != "one place" else 0} for n in range(models)
        }
        options: dict[str, Any] = {"shares_images": shares, "policy": policy, "quantum": "1s", "switch_after": "2s"}
        options["max_awake"] = {"one place": 1, "two places": 2}.get(limit, 0)
        if limit == "memory":
            entries = {key: {**e, "gpu_memory": "30GiB"} for key, e in entries.items()}
            options["takes"] = dict.fromkeys(entries, (30 * GIB, 2 * GIB))
        self.world = World(self.rig_of(entries, options), entries, options)
        self.do(self.opened(self.world.rig))

    @rule(
        number=st.integers(0, 2),
        count=st.integers(1, 6),
        hold_s=st.floats(0.0, 30.0),
        priority=st.integers(-1, 1),
        max_wait_s=st.sampled_from([None, None, 5.0, 60.0]),
        prefers=st.booleans(),
        near=st.sampled_from([None, b"a", b"b"]),
    )
    def requests_come(
        self, number: int, count: int, hold_s: float, priority: int, max_wait_s: float | None, prefers: bool,
        near: bytes | None,
    ) -> None:  # fmt: skip
        key = self.key(number)
        preferred = f"{key}-1" if prefers else None
        for _ in range(count):
            self.ask(key, hold_s, priority=priority, max_wait_s=max_wait_s, preferred=preferred, near=near)
        self.do(asyncio.sleep(0))

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.do(asyncio.sleep(seconds))

    @rule(which=st.integers(0, 30))
    def a_client_leaves(self, which: int) -> None:
        under_way = [c for c in self.it.clients if c.task is not None and not c.task.done()]
        if under_way:
            task = under_way[which % len(under_way)].task
            assert task is not None
            task.cancel()

    @rule(which=st.integers(0, 10))
    def an_engine_dies(self, which: int) -> None:
        runtime = self.it.rig.runtime
        if runtime.processes:
            ids = [*runtime.processes]
            instance_id = ids[which % len(ids)]
            runtime.kill(instance_id)
            runtime.engines[instance_id].measure()

    @rule(which=st.integers(0, 10))
    def an_engine_answers_no_more(self, which: int) -> None:
        processes = [*self.it.rig.runtime.processes.values()]
        if processes:
            processes[which % len(processes)].healthy = False
        suspects = [c.lease for c in self.it.clients if c.lease is not None]
        if suspects:
            self.do(suspects[which % len(suspects)].suspect())

    @rule(operation=st.sampled_from(sorted(TAKES_S)), why=st.sampled_from(sorted(GROUNDS)), times=st.integers(1, 3))
    def an_operation_will_fail(self, operation: str, why: str, times: int) -> None:
        failures = self.it.rig.runtime.failures.setdefault(operation, [])
        failures += [GROUNDS[why](operation) for _ in range(times)]

    @rule(operation=st.sampled_from(sorted(TAKES_S)))
    def an_operation_will_hang(self, operation: str) -> None:
        self.it.rig.runtime.hanging.add(operation)

    @precondition(lambda self: self.world is not None and self.it.rig.runtime.hanging)
    @rule()
    def what_hung_answers(self) -> None:
        self.end_of_hanging()

    def end_of_hanging(self) -> None:
        runtime = self.it.rig.runtime
        runtime.hanging.clear()
        runtime.answers.set()
        runtime.answers = asyncio.Event()

    @rule(
        number=st.integers(0, 2),
        what=st.sampled_from(["wake", "pause", "unpause", "drain", "undrain", "drain all", "undrain all", "stop"]),
        wait=st.booleans(),
        to=st.sampled_from([Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED, Tier.STOPPED]),
    )
    def a_command_comes(self, number: int, what: str, wait: bool, to: Tier) -> None:
        pool, key = self.it.rig.pool, self.key(number)
        match what:
            case "wake":
                self.command(lambda: pool.wake(key, keep_s=60.0 if wait else None))
            case "pause":
                self.command(lambda: pool.pause(key, wait=wait))
            case "unpause":
                self.command(lambda: pool.unpause(key, wait=wait))
            case "stop":
                self.command(lambda: _at_once(lambda: pool.force_stop(key, discard=wait)))
            case _:
                name, _, everything = what.partition(" ")
                self.command(lambda: _at_once(lambda: getattr(pool, name)(None if everything else key)))

    @rule(
        number=st.integers(0, 2),
        wait=st.booleans(),
        to=st.sampled_from([Tier.SLEEPING, Tier.SUSPENDED, Tier.CHECKPOINTED, Tier.ARCHIVED, Tier.STOPPED]),
        discard=st.booleans(),
    )
    def a_command_to_step_down_comes(self, number: int, wait: bool, to: Tier, discard: bool) -> None:
        pool, key = self.it.rig.pool, self.key(number)
        self.command(lambda: _at_once(lambda: pool.step_down(key, to, wait=wait, discard=discard)))

    @rule(
        number=st.integers(0, 2),
        what=st.sampled_from(["fewer", "more", "engine", "remove", "add"]),
    )
    def the_configuration_changes(self, number: int, what: str) -> None:
        models = {key: dict(entry) for key, entry in self.it.models.items()}
        key = [*models][number % len(models)]
        match what:
            case "fewer":
                models[key]["max_instances"] = 1
            case "more":
                models[key]["max_instances"] = 3
            case "engine":
                models[key]["process"] = {"command": [f"engine-{self.loop.time():.3f}", "{port}"]}
            case "remove" if len(models) > 1:
                del models[key]
            case _:
                models["m9"] = {**models[key], "min_ready": 0}
                if "takes" in self.it.options:
                    self.it.options["takes"]["m9"] = self.it.options["takes"][key]
                    self.it.rig.runtime.takes = self.it.options["takes"]
        wanted = {key: model_settings(**entry) for key, entry in models.items()}
        settings = Settings(models=wanted, pool=self.it.rig.settings.pool.model_dump(exclude_unset=True))
        world, pool = self.it, self.it.rig.pool

        async def reload() -> None:
            await pool.reconfigure(settings)
            if world.rig.pool is pool:
                world.models, world.rig.settings = models, settings

        self.command(reload)

    @rule(number=st.integers(0, 2), usable=st.booleans())
    def an_engine_is_outdated(self, number: int, usable: bool) -> None:
        """As by another container image of that name; engines that are started from now on are of the new one."""
        runtime, key = self.it.rig.runtime, self.key(number)
        outdated = Outdated(f"the container image is another one since {self.loop.time():.3f}", usable)
        runtime.changes[key] = outdated
        self.command(self.it.rig.pool.look_for_changes)

        def renewed() -> None:
            if runtime.changes.get(key) is outdated:
                del runtime.changes[key]

        self.loop.call_later(1.0, renewed)

    @rule(after_s=st.sampled_from([0.0, 0.5, 5.0]))
    def warmpool_starts_anew(self, after_s: float) -> None:
        """In order, as by systemd; what runs is left to the next one if the runtime can."""
        self.do(self.restart(after_s))

    @rule()
    def warmpool_is_killed(self) -> None:
        """What runs goes on, or ends with it; half of what was under way is done."""
        self.do(self.crash())

    async def crash(self) -> None:
        world, old = self.it, self.it.rig
        runtime = old.runtime
        heir = self.rig_of(world.models, world.options, old)
        heir.runtime.images.there = dict(runtime.images.there)
        exited = asyncio.get_running_loop().create_future
        heir.runtime.processes = {
            instance_id: replace(process, exited=exited())
            for instance_id, process in runtime.processes.items()
            if self.leaves
        }
        heir.nvml.held = {port: held for port, held in old.nvml.held.items() if port in self.ports_of(heir)}
        old.pool._state.advance(Phase.CLOSED)
        await self.abandon()
        world.clients.clear()
        world.commands.clear()
        world.rig = heir
        await self.opened(heir)

    def ports_of(self, rig: Rig) -> set[int]:
        return {rig.runtime.engines[instance_id].port for instance_id in rig.runtime.processes}

    async def opened(self, rig: Rig) -> None:
        await rig.pool.open()
        self.keeper = asyncio.create_task(keep_current(rig.pool, Usage(), clock=self.loop.time))

    async def restart(self, after_s: float) -> None:
        world, old = self.it, self.it.rig
        old.pool.begin_stop()
        await asyncio.sleep(after_s)
        self.keeper.cancel()
        await self.close(old)
        for client in world.clients:
            if client.task is not None:
                client.task.cancel()
        await asyncio.gather(*(c.task for c in world.clients if c.task is not None), return_exceptions=True)
        await asyncio.gather(*world.commands)
        old.runtime.hanging.clear()
        old.runtime.answers.set()
        old.runtime.failures.clear()
        await asyncio.sleep(0)
        world.clients.clear()
        world.commands.clear()
        world.rig = self.rig_of(world.models, world.options, old)
        await self.opened(world.rig)

    async def close(self, rig: Rig) -> None:
        began = self.loop.time()
        await rig.pool.close(CLOSE_S)
        assert self.loop.time() - began <= CLOSE_S + 0.1, "closing has a bound"

    # --- what always holds ---

    @invariant()
    def what_always_holds(self) -> None:
        """Once everybody has seen what has just happened."""
        if self.world is not None:
            self.do(asyncio.sleep(0.001))
            self.every_lease_is_one_of_a_client()
            self.every_waiter_is_one_of_a_client()
            self.what_moves_is_moved_by_somebody()
            self.a_state_says_what_is_so()
            self.places_and_memory_are_enough()
        assert self.loop.errors == []

    def every_lease_is_one_of_a_client(self) -> None:
        leases = [c for c in self.it.clients if c.lease is not None]
        assert self.it.rig.pool.status()["leases"] == len(leases)
        for instance in self.instances():
            mine = sum(c.holds is instance for c in leases)
            assert instance.leases == mine, instance
            most = self.it.rig.pool._state.home(instance).settings.max_concurrency
            assert mine <= most, instance

    def every_waiter_is_one_of_a_client(self) -> None:
        state = self.it.rig.pool._state
        waiting = sum(len(m.queue) for m in state.everyone())
        without = [c for c in self.it.clients if c.lease is None and c.task is not None and not c.task.done()]
        commanded = sum(not c.done() for c in self.it.commands)
        assert waiting == state.queued.total()
        assert waiting <= len(without) + commanded
        assert len(without) <= waiting, "whoever waits is in a queue"

    def what_moves_is_moved_by_somebody(self) -> None:
        for instance in self.instances():
            if instance.state in MOVING:
                assert instance.task is not None, instance
                assert not instance.task.done(), instance

    def a_state_says_what_is_so(self) -> None:
        runtime = self.it.rig.runtime
        for instance in self.instances():
            process = runtime.processes.get(instance.id)
            if instance.state in (State.READY, State.RETIRING):
                assert process is not None, instance
                assert (process.frozen, process.sleep_level, process.paused) == (False, 0, False), instance
            elif instance.state is State.PAUSED:
                assert process is not None, instance
                assert process.paused, instance
            elif instance.state is State.SLEEPING:
                assert process is not None, instance
                assert process.sleep_level > 0, instance
            elif instance.state is State.SUSPENDED:
                assert process is not None, instance
                assert process.frozen, instance
            elif instance.state in (State.CHECKPOINTED, State.ARCHIVED):
                assert process is None, instance
                assert instance.engine is not None
                image = runtime.images.there.get(instance.engine.image)
                assert image is not None, instance
                assert image.archived == (instance.state is State.ARCHIVED), instance

    def places_and_memory_are_enough(self) -> None:
        rig = self.it.rig
        most = self.it.options["max_awake"]
        # One that wakes may still wait for another one's place.
        running = {k for k, p in rig.runtime.processes.items() if not (p.frozen or p.sleep_level or p.paused)}
        awake = [i for i in self.instances() if i.state in AWAKE and i.id in running]
        assert not most or len(awake) <= most, awake
        assert sum(rig.nvml.held.values()) <= 80 * GIB, self.instances()

    # --- in the end ---

    def teardown(self) -> None:
        """No more faults: whoever is about comes to an end, every model serves again, and nothing is left."""
        try:
            if self.world is not None:
                self.do(self.end())
            assert self.loop.errors == []
        finally:
            self.do(self.abandon())
            self.loop.close()
            logging.getLogger("warmpool").setLevel(logging.NOTSET)

    async def abandon(self) -> None:
        """Leave no task, whatever has failed."""
        if self.world is not None:
            self.end_of_hanging()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def end(self) -> None:
        world, pool = self.it, self.it.rig.pool
        world.rig.runtime.failures.clear()
        self.end_of_hanging()
        for process in world.rig.runtime.processes.values():
            process.healthy = True
        pool.undrain()
        for key in [*world.rig.settings.models]:
            pool.undrain(key)
            self.it.commands.append(self.loop.create_task(_quietly(pool.unpause(key, wait=False))))
        tasks = [*(c.task for c in world.clients if c.task is not None), *world.commands]
        _, late = await asyncio.wait(tasks, timeout=GOES_ON_WITHIN_S)
        assert not late, [c for c in world.clients if c.task in late]
        for task in tasks:
            assert task.cancelled() or task.exception() is None, task.exception()
        outcomes = {c.outcome for c in world.clients}
        assert "" not in outcomes
        for key in [*world.rig.settings.models]:
            await self.serves(key)
        async with asyncio.timeout(GOES_ON_WITHIN_S):
            while pool.status()["written_off"]:
                await asyncio.sleep(5.0)
        self.keeper.cancel()
        await self.close(world.rig)
        assert world.rig.states() == {}
        if not self.leaves:
            assert world.rig.runtime.processes == {}
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    async def serves(self, key: str) -> None:
        """A model that failed may rest first; then it answers."""
        end = self.loop.time() + GOES_ON_WITHIN_S
        while True:
            client = Client(key, self.loop.time())
            await self.request(client, 0.0)
            if client.outcome == "served":
                return
            assert self.loop.time() < end, (key, client.outcome, self.it.rig.pool.status())
            await asyncio.sleep(5.0)


async def _at_once(work: Callable[[], Any]) -> None:
    work()


async def _quietly(work: Awaitable[Any]) -> None:
    with contextlib.suppress(RequestError, CommandFailedError):
        await work


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=int(os.environ.get("POOL_EXAMPLES", "40")),
    stateful_step_count=int(os.environ.get("POOL_STEPS", "25")),
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
