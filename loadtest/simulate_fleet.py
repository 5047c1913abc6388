"""Many hosts in virtual time: which one each request goes to, by the same `choose` as the proxy, and by others.

A host has places for engines, and models that are checkpointed until they are asked for. It publishes what it offers
every so often; whoever chooses knows what was published, and nothing newer. Its own state a host knows.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from proxy.fleet.choice import MOST_TRIES, choose, takes
from proxy.fleet.record import VERSION, Offer, Record
from proxy.fleet.sent import Sent
from proxy.fleet.table import READY, Candidate, HostEntry, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

Chooser: TypeAlias = Literal["random", "greedy", "ours"]
CHOOSERS: Final[Sequence[Chooser]] = ("random", "greedy", "ours")
_COLD: Final = "checkpointed"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated; times in seconds."""

    hosts: int = 200
    models: int = 100
    rate: float = 400.0
    length_s: float = 60.0
    stale_s: float = 1.0
    """How often a host publishes."""
    places: int = 2
    """Engines that a host can have awake at once."""
    concurrency: int = 8
    """Requests of one engine at once."""
    wake_s: float = 1.5
    """From a checkpoint to ready."""
    serve_s: float = 3.0
    """A request's time in its engine, on the average."""
    most_wait_s: float = 30.0
    skew: float = 1.0
    """The n-th model is asked for 1/n**skew as often as the first."""
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    waits_s: list[float] = field(default_factory=list)
    wakes: int = 0
    evictions: int = 0
    refused: int = 0
    hops: int = 0
    turned_away: int = 0
    """Times a host would not take what was sent to it."""

    def as_json(self) -> dict[str, Any]:
        """Figures."""
        waits = sorted(self.waits_s)
        return {
            "requests": len(waits) + self.refused,
            "mean_s": sum(waits) / len(waits) if waits else None,
            "p99_s": waits[min(len(waits) - 1, math.ceil(len(waits) * 0.99) - 1)] if waits else None,
            "wakes": self.wakes,
            "evictions": self.evictions,
            "refused": self.refused,
            "hops": self.hops,
            "turned_away": self.turned_away,
        }


@dataclass(slots=True)
class _Engine:
    ready_at: float
    running: int = 0
    idle_since: float = 0.0


class _Host:
    """One host: its engines by model, and who waits for them."""

    def __init__(self, name: str, scenario: Scenario) -> None:
        self.entry = HostEntry(name)
        self.engines: dict[str, _Engine] = {}
        self.queues: dict[str, deque[float]] = {}
        self._scenario = scenario
        self.seq = 0
        self.sent = Sent()

    def evictable(self, now: float) -> str | None:
        """The idle model that was used least recently."""
        idle = [(e.idle_since, model) for model, e in self.engines.items() if not e.running and e.ready_at <= now]
        return min(idle)[1] if idle else None

    def offer(self, model: str, now: float) -> Offer:
        """What it offers just now."""
        s = self._scenario
        engine, queue = self.engines.get(model), len(self.queues.get(model, ()))
        if engine is not None:
            room = max(0, s.concurrency - engine.running - queue)
            if engine.ready_at <= now and room:
                return Offer(READY, 0, room, queue, 0)
            behind_s = 0.0 if room else (queue + 1) * s.serve_s / s.concurrency
            wait_s = max(0.0, engine.ready_at - now) + behind_s
            tier = READY if engine.ready_at <= now else _COLD
            return Offer(tier, int(wait_s * 1000), room, queue, 0)
        hurt_s, wait_s = 0.0, s.wake_s
        if len(self.engines) >= s.places:
            if self.evictable(now) is not None:
                hurt_s = s.wake_s
            else:
                wait_s += s.serve_s
        wait_s += queue * s.serve_s / s.concurrency
        return Offer(_COLD, int(wait_s * 1000), max(0, s.concurrency - queue), queue, int(hurt_s * 1000))


class Simulation:
    """One run."""

    def __init__(self, scenario: Scenario, chooser: Chooser) -> None:
        self._s = scenario
        self._chooser = chooser
        self._random = random.Random(scenario.seed)
        self._arrivals = random.Random(scenario.seed)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._table = Table(lambda: self._now)
        self._hosts = [_Host(f"h{n}", scenario) for n in range(scenario.hosts)]
        self._by_name = {host.entry.name: host for host in self._hosts}
        self._models = [f"m{n}" for n in range(scenario.models)]
        self._weights = list(itertools.accumulate(1 / n**scenario.skew for n in range(1, scenario.models + 1)))
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """All of it."""
        for host in self._hosts:
            self._publish(host, again=False)
            self._after(self._random.random() * self._s.stale_s, self._publisher(host))
        self._after(self._arrivals.expovariate(self._s.rate), self._arrive)
        end_s = self._s.length_s + 20 * self._s.most_wait_s
        while self._events and self._events[0][0] < end_s:
            self._now, _, do = heapq.heappop(self._events)
            do()
        return self.outcome

    def _after(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + delay_s, next(self._count), do))

    # --- what is known ---

    def _publisher(self, host: _Host) -> Callable[[], None]:
        return lambda: self._publish(host, again=True)

    def _publish(self, host: _Host, *, again: bool) -> None:
        common: list[Any] | None = None
        offers: dict[str, list[Any] | None] = {}
        for model in self._models:
            if model in host.engines or host.queues.get(model):
                offers[model] = host.offer(model, self._now).encoded()
            else:
                common = common or host.offer(model, self._now).encoded()
                offers[model] = common
        host.seq += 1
        name = host.entry.name
        self._table.take(Record(VERSION, name, "b", host.seq, True, "https://h:1", "host", False, "", offers))
        if again and self._now < self._s.length_s:
            self._after(self._s.stale_s, self._publisher(host))

    # --- requests ---

    def _arrive(self) -> None:
        if self._now >= self._s.length_s:
            return
        self._after(self._arrivals.expovariate(self._s.rate), self._arrive)
        origin = self._arrivals.choice(self._hosts)
        (model,) = self._arrivals.choices(self._models, cum_weights=self._weights)
        self._send(origin, model)

    def _send(self, origin: _Host, model: str) -> None:
        most_ms = self._s.most_wait_s * 1000
        refusals: dict[str, int] = {}
        for _ in range(MOST_TRIES):
            chosen = self._choose(origin, model, refusals)
            if chosen is None:
                break
            target = self._by_name[chosen.host.name]
            present = target.offer(model, self._now)
            if self._goes(origin, target, model) or takes(present, chosen.offer.wait_ms):
                self._queue(target, model)
                return
            self.outcome.turned_away += 1
            if self._chooser == "ours":
                origin.sent.refused(model, self._table.hosts[target.entry.name])
            refusals[target.entry.name] = present.price_ms
        best = min(refusals, key=refusals.__getitem__, default=None)
        if best is None or self._by_name[best].offer(model, self._now).wait_ms > most_ms:
            self.outcome.refused += 1
            return
        self._goes(origin, self._by_name[best], model)
        self._queue(self._by_name[best], model)

    def _goes(self, origin: _Host, target: _Host, model: str) -> bool:
        """Whether it stays here."""
        if target is origin:
            return True
        self.outcome.hops += 1
        origin.sent.note(model, self._table.hosts[target.entry.name])
        return False

    def _choose(self, origin: _Host, model: str, avoid: Collection[str]) -> Candidate | None:
        here = Candidate(origin.entry, origin.offer(model, self._now))
        own = origin.entry.name
        offers = [each for each in self._table.offers(model) if each.host.name != own]
        if self._chooser == "ours":
            return choose(
                offers, oldest=-math.inf, rank=lambda host: self._table.rank(model, host), draw=self._random.randrange,
                here=None if own in avoid else here, sent=origin.sent.to(model), avoid=avoid,
                most_wait_ms=self._s.most_wait_s * 1000,
            )  # fmt: skip
        good = [
            e for e in [here, *offers] if e.host.name not in avoid and e.offer.wait_ms <= self._s.most_wait_s * 1000
        ]
        if not good:
            return None
        if self._chooser == "random":
            return self._random.choice(good)
        if here.offer.tier == READY and here.offer.room:
            return here
        return min(good, key=lambda each: (each.price_ms, each.host.name))

    # --- hosts ---

    def _queue(self, host: _Host, model: str) -> None:
        host.queues.setdefault(model, deque()).append(self._now)
        self._serve(host, model)
        self._wake(host, model)

    def _serve(self, host: _Host, model: str) -> None:
        engine, queue = host.engines.get(model), host.queues.get(model)
        while engine is not None and queue and engine.ready_at <= self._now and engine.running < self._s.concurrency:
            self.outcome.waits_s.append(self._now - queue.popleft())
            engine.running += 1
            self._after(self._random.expovariate(1 / self._s.serve_s), lambda: self._ended(host, model, engine))

    def _ended(self, host: _Host, model: str, engine: _Engine) -> None:
        engine.running -= 1
        engine.idle_since = self._now
        self._serve(host, model)
        if not engine.running:
            for waiting in [m for m, queue in host.queues.items() if queue and m not in host.engines]:
                self._wake(host, waiting)

    def _wake(self, host: _Host, model: str) -> None:
        if not host.queues.get(model) or model in host.engines:
            return
        if len(host.engines) >= self._s.places:
            victim = host.evictable(self._now)
            if victim is None:
                return
            del host.engines[victim]
            self.outcome.evictions += 1
        host.engines[model] = _Engine(self._now + self._s.wake_s, idle_since=self._now)
        self.outcome.wakes += 1
        self._after(self._s.wake_s, lambda: self._serve(host, model))


def simulate(scenario: Scenario, chooser: Chooser) -> Outcome:
    """One run of a scenario by one way to choose."""
    return Simulation(scenario, chooser).run()
