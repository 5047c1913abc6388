"""Header fields on their way through: which go on to an engine, and which to a client."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from proxy.config.values import parse_duration
from proxy.engine import http1
from proxy.errors import InvalidRequestError
from proxy.fleet.peers import PeerLease
from proxy.server.auth.browser_origin import contained

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from proxy.pool.instance import WakeRecord
    from proxy.pool.lease import Lease

    Fields = list[tuple[bytes, bytes]]

# RFC 9110, 7.6.1, and what belongs to one connection or one hop by nature.
_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate te trailer transfer-encoding upgrade".split()
)
# Credentials are for this proxy. The body was decoded while it was read, and its length may change.
NOT_TO_ENGINE: Final = _HOP_BY_HOP | {
    b"authorization", b"proxy-authorization", b"cookie", b"x-api-key", b"api-key",
    b"host", b"content-length", b"content-encoding", b"expect", b"x-warmpool-max-wait", b"x-warmpool-keep-alive",
    b"x-request-id",
    # What hosts of a fleet tell one another of a request; from anybody else it means nothing.
    b"x-warmpool-from", b"x-warmpool-hop", b"x-warmpool-key", b"x-warmpool-priority", b"x-warmpool-expected-wait",
    # What another proxy said of the client is not proven, and no engine's business; nor is the page it came from.
    b"forwarded", b"via", b"x-real-ip", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto",
    b"x-forwarded-port", b"x-forwarded-server", b"x-forwarded-prefix", b"x-forwarded-by", b"origin", b"referer",
    # SageMaker's would name another adapter than the one that was checked, or a session.
    b"x-amzn-sagemaker-adapter-identifier", b"x-amzn-sagemaker-adapter-alias", b"x-amzn-sagemaker-session-id",
    b"x-amzn-sagemaker-new-session-id", b"x-amzn-sagemaker-closed-session-id",
    b"access-control-request-method", b"access-control-request-headers",
}  # fmt: skip
# Whether a page may read an answer is this proxy's to say, and `Location` would show the engine's address.
NOT_TO_CLIENT: Final = _HOP_BY_HOP | {
    b"server", b"date", b"set-cookie", b"content-length", b"x-request-id", b"location", b"alt-svc",
    b"strict-transport-security", b"access-control-allow-origin", b"access-control-allow-credentials",
    b"access-control-allow-methods", b"access-control-allow-headers", b"access-control-expose-headers",
    b"access-control-max-age", b"x-warmpool-tier", b"x-warmpool-instance", b"server-timing",
    b"x-warmpool-host", b"x-warmpool-offer",
}  # fmt: skip
_OF_STREAMS: Final = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)
_NUMBER: Final = re.compile(r"\d+(\.\d+)?")


def passed_on(fields: Sequence[tuple[bytes, bytes]], left_out: frozenset[bytes]) -> Fields:
    """The header fields without `left_out` and without those that `Connection` names."""
    if named := http1.connection_options(fields):
        left_out |= named
    return [field for field in fields if field[0].lower() not in left_out]


def answer_fields(fields: Sequence[tuple[bytes, bytes]]) -> Fields:
    """What goes on to the client of an engine's header fields."""
    return _unbuffered(contained(passed_on(fields, NOT_TO_CLIENT)))


def is_event_stream(fields: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether an answer with these fields is server-sent events."""
    kinds = [value for name, value in fields if name.lower() == b"content-type"]
    return [kind.partition(b";")[0].strip().lower() for kind in kinds] == [b"text/event-stream"]


def _unbuffered(fields: Fields) -> Fields:
    """The fields, for events with those that keep what is between from storing them or holding them back."""
    if not is_event_stream(fields):
        return fields
    names = {name.lower() for name, _ in fields}
    return fields + [field for field in _OF_STREAMS if field[0] not in names]


class _LastWake:
    wake: WakeRecord | None = None
    timing = ""


def server_timing(lease: Lease) -> bytes:
    """How long a request waited (W3C Server Timing, milliseconds)."""
    if isinstance(lease, PeerLease):
        return lease.timing
    if lease.wake is not _LastWake.wake:  # many wait for the same one
        _LastWake.wake, _LastWake.timing = lease.wake, _timing_of(lease.wake)
    return f"queue;dur={lease.queue_s * 1000:.1f}{_LastWake.timing}".encode("ascii")


def _timing_of(wake: WakeRecord | None) -> str:
    if wake is None:
        return ""
    stages = "".join([f", {name};dur={value * 1000:.1f}" for name, value in wake.stages.items()])
    return f", wake;dur={wake.seconds * 1000:.1f}{stages}"


def max_wait_s(headers: Mapping[str, str]) -> float | None:
    """`x-warmpool-max-wait`: seconds, or a duration as in the configuration. Raises InvalidRequestError."""
    text = headers.get("x-warmpool-max-wait")
    if text is None:
        return None
    try:
        return float(text) if _NUMBER.fullmatch(text) else parse_duration(text)
    except ValueError:
        raise InvalidRequestError('x-warmpool-max-wait is seconds ("2.5") or a duration ("500ms", "1m30s").') from None


def keep_alive_s(headers: Mapping[str, str]) -> float | None:
    """`x-warmpool-keep-alive`: seconds, or a duration as in the configuration. Raises InvalidRequestError."""
    text = headers.get("x-warmpool-keep-alive")
    if text is None:
        return None
    try:
        return float(text) if _NUMBER.fullmatch(text) else parse_duration(text)
    except ValueError:
        raise InvalidRequestError('x-warmpool-keep-alive is seconds ("0") or a duration ("30m").') from None
