"""What is counted and logged of each request that was let in, at its end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from proxy.server.forward import gen_ai
from proxy.server.safe_logging import method_of
from proxy.telemetry.logs import lines_of_requests
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.pool.lease import Lease
    from proxy.server.forward.cycle import RequestCycle

log: Final = logging.getLogger("warmpool.request")


def account(request: RequestCycle, lease: Lease | None, status: int) -> None:
    """Count a request that has ended, and write its line; `lease`: its first one."""
    now = time.perf_counter()
    request.service.history.ended(request, lease, status, now)
    trace = request.trace
    if trace is None and (not log.isEnabledFor(logging.INFO) or _is_summed_up(request, lease, status)):
        return
    answer = request.answer
    first_byte_at = answer.first_byte_at if answer is not None else None
    said: dict[str, Any] = {
        "request_id": request.request_id,
        "path": request.head.path_for_log,
        "key": request.caller.name if request.caller is not None else None,
        "model": request.model,
        "status": status,
        "instance": lease.instance_id if lease is not None else None,
        "first_byte_s": None if first_byte_at is None else first_byte_at - request.began,
        "total_s": now - request.began,
        "size": answer.size if answer is not None else 0,
        "broken": request.broken,
    }
    lines = lines_of_requests()
    found_ready = lease is not None and lease.found is Tier.READY
    if lines is not None and trace is None and found_ready and request.method == "POST":
        lines.add(ready_message(**said))
        return
    tier = lease.found.label if lease is not None else None
    fields = facts(method=method_of(request.method), tier=tier, **said)
    if trace is not None:
        trace.end(fields, gen_ai.attributes(request))
    write(fields)


def _is_summed_up(request: RequestCycle, lease: Lease | None, status: int) -> bool:
    """Whether the log says so already of this address: refused, or left, without an instance, by who has no key."""
    if lease is not None or request.caller is not None or not 400 <= status < 500:
        return False
    reason = request.refused_as if status != 499 else "left"
    return not request.service.auth.refusals.first(request.connection.host, reason or str(status))


def facts(
    *,
    request_id: str,
    method: str,
    path: str,
    key: str | None,
    model: str,
    status: int,
    tier: str | None,
    instance: str | None,
    first_byte_s: float | None,
    total_s: float,
    size: int,
    broken: str | None,
) -> dict[str, Any]:
    """What the line says."""
    fields = {
        "request_id": request_id,
        "method": method,
        "path": path,
        "key": key,
        "model": model,
        "status": status,
        "tier": tier,
        "instance": instance,
        "first_byte_ms": _ms(first_byte_s),
        "total_ms": _ms(total_s),
        "bytes": size,
        "broken": broken,
    }
    return {name: value for name, value in fields.items() if value is not None}


def message_of(fields: dict[str, Any]) -> str:
    """The facts, for people."""
    return " ".join([f"{name}={value}" for name, value in fields.items()])


def ready_message(
    *,
    request_id: str,
    path: str,
    key: str | None,
    model: str,
    status: int,
    instance: str,
    first_byte_s: float | None,
    total_s: float,
    size: int,
    broken: str | None,
) -> str:
    """`message_of(facts)` of a POST that found its instance ready, for a third of the time."""
    whose = f" key={key}" if key is not None else ""
    first = f" first_byte_ms={first_byte_s * 1000:.1f}" if first_byte_s is not None else ""
    end = f" broken={broken}" if broken is not None else ""
    return (
        f"request_id={request_id} method=POST path={path}{whose} model={model} status={status} tier=ready "
        f"instance={instance}{first} total_ms={total_s * 1000:.1f} bytes={size}{end}"
    )


def write(fields: dict[str, Any]) -> None:
    """Write the line."""
    message = message_of(fields)
    lines = lines_of_requests()
    if lines is not None:
        lines.add(message)
    else:
        log.info(message, extra=fields)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
