"""The requests of clients: those that wait or run, and the last that have ended. Never what was asked or answered.

Nothing is done here while a request runs: what runs is found on the connections when somebody looks. One that ends
leaves a tuple; what metrics say of it is counted for many together, at the latest when somebody reads them.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from proxy.errors import RequestNotFoundError
from proxy.server.key_usage.token_figures import said

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from proxy.pool.lease import Lease
    from proxy.server.connection import ClientConnection
    from proxy.server.forward.cycle import RequestCycle
    from proxy.telemetry.metrics import Metrics

KEPT: Final = 500
_MOST_UNCOUNTED: Final = 200_000
"""They are counted every second."""
_NEW: Final = 256
"""So many are entered together."""
_MODEL_AND_STATUS: Final = itemgetter(4, 7)
LIVE: Final = ("uploading", "waiting", "running", "paused")
STATES: Final = (*LIVE, "ended")


Ended = tuple[str, str | None, int, bytes, int, tuple[int, int] | None]
"""What usage is counted from, of one that has ended: model, key's name, status, what its engine said of tokens, the
events of its stream; and, where the key's tokens are limited, what was expected of the prompt, and what all of it cost
by that count."""
_OF_USAGE: Final = itemgetter(4, 5, 7, 13, 14, 16)


class RequestHistory:
    """What `/admin/requests` shows."""

    def __init__(self, connections: Iterable[ClientConnection], metrics: Metrics) -> None:
        self._connections = connections
        self._metrics = metrics
        self._ended: deque[tuple[Any, ...]] = deque(maxlen=KEPT)
        self._new: list[tuple[Any, ...]] = []
        """The last of those, which nobody knows of yet: they are entered when there are many, or somebody looks."""
        self._uncounted: deque[tuple[Any, ...]] = deque(maxlen=_MOST_UNCOUNTED)
        metrics.before_reading(self._enter)

    def ended(self, request: RequestCycle, lease: Lease | None, status: int, ended: float) -> None:
        """One more has ended, at this reading of `time.perf_counter`."""
        answer, caller = request.answer, request.caller
        found, instance = (None, None) if lease is None else (lease.found.label, lease.instance_id)
        if answer is not None:
            at, first_token, usage, events = answer.first_byte_at, answer.first_token_at, answer.usage, answer.events
        else:
            at, first_token, usage, events = None, None, b"", 0
        self._new.append((
            request.began, ended, request.request_id, request.head.path_for_log, request.model,
            caller.name if caller is not None else None, request.connection.host, status,
            found, instance, request.waited_s, at, first_token, usage, events, request.broken,
            caller.metered if caller is not None and answer is not None else None,
            request.head.only_looks or request.connection.peers is not None,
        ))  # fmt: skip
        if len(self._new) >= _NEW:
            self._enter()

    def _enter(self) -> None:
        new, self._new = self._new, []
        self._ended += new
        # Who reads a stored answer again uses nothing; what another host was asked counts there.
        self._uncounted += [entry for entry in new if not entry[17]]
        metrics = self._metrics
        for (model, status), count in Counter(map(_MODEL_AND_STATUS, new)).items():
            metrics.count_request(model, status, count)
        first_bytes: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for began, _, _, _, model, _, _, status, tier, _, _, first_byte, first_token, _, _, _, _, _ in new:
            if tier is not None and first_byte is not None and status < 400:
                first_bytes[model, tier].append(first_byte - began)
                if first_token is not None:
                    metrics.observe_ttft(model, tier, first_token - began)
        for (model, tier), times in first_bytes.items():
            metrics.observe_first_bytes(model, tier, times)

    def uncounted(self, most: int) -> list[Ended]:
        """The next of those that have ended, each once; empty when there are no more."""
        self._enter()
        entries = [self._uncounted.popleft() for _ in range(min(most, len(self._uncounted)))]
        return [*map(_OF_USAGE, entries)]

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them: those that are there, the newest first, and then those that have ended, likewise."""
        self._enter()
        now = time.perf_counter()
        offset_s = time.time() - now
        there = [c.cycle for c in self._connections if c.cycle is not None and c.cycle.is_listed]
        for cycle in sorted(there, key=lambda c: -c.began):
            yield _live(cycle, now, offset_s)
        for entry in reversed(self._ended):
            yield _past(entry, offset_s)

    def cancel(self, request_id: str) -> None:
        """End one that waits or runs. Raises RequestNotFoundError."""
        found = [c.cycle for c in self._connections if c.cycle is not None and c.cycle.request_id == request_id]
        if not any(cycle.is_listed for cycle in found):
            raise RequestNotFoundError(f"No request {request_id!r} waits or runs.")
        for cycle in found:
            cycle.cancel()


def _live(cycle: RequestCycle, now: float, offset_s: float) -> dict[str, Any]:
    lease, answer, caller = cycle.first_lease, cycle.answer, cycle.caller
    held = cycle.lease
    if held is not None:
        state = "paused" if held.paused else "running"
    else:
        state = "uploading" if cycle.is_uploading else "waiting"
    events = answer.events if answer is not None else 0
    first_at = answer.first_token_at or answer.first_byte_at if answer is not None else None
    waited_s = cycle.waited_s if held is not None else now - cycle.began
    return {
        "id": cycle.request_id,
        "state": state,
        "at_unix_s": round(cycle.began + offset_s, 3),
        "path": cycle.head.path_for_log,
        "model": cycle.model,
        "key": caller.name if caller is not None else None,
        "host": cycle.connection.host,
        "status": None,
        "tier": lease.found.label if lease is not None else None,
        "instance": held.instance_id if held is not None else None,
        "wait_s": round(waited_s, 4),
        "ttft_s": None if first_at is None else round(first_at - cycle.began, 4),
        "total_s": round(now - cycle.began, 4),
        "prompt_tokens": None,
        "completion_tokens": events or None,
        "tokens_per_s": _rate(events, first_at, now),
        "broken": None,
    }


def _past(entry: tuple[Any, ...], offset_s: float) -> dict[str, Any]:
    (
        began, ended, id_, path, model, key, host, status, tier, instance, waited_s, first_byte, first_token, usage,
        events, broken, _, _,
    ) = entry  # fmt: skip
    asked, answered, _ = said(usage)
    answered = answered if answered is not None else events or None
    return {
        "id": id_,
        "state": "ended",
        "at_unix_s": round(began + offset_s, 3),
        "path": path,
        "model": model,
        "key": key,
        "host": host,
        "status": status,
        "tier": tier,
        "instance": instance,
        "wait_s": round(waited_s, 4),
        "ttft_s": _since(began, first_token or first_byte),
        "total_s": round(ended - began, 4),
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "tokens_per_s": _rate(answered, first_token, ended),
        "broken": broken,
    }


def _since(began: float, at: float | None) -> float | None:
    return None if at is None else round(at - began, 4)


def _rate(tokens: int | None, first: float | None, last: float) -> float | None:
    """Tokens a second behind the first one, of a stream."""
    if tokens is None or tokens < 2 or first is None or last <= first:
        return None
    return round((tokens - 1) / (last - first), 2)
