"""Who wants to see the body of an answer: each is given every piece of it until it returns True."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from proxy.server.forward.first_token import FirstToken

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.server.forward.cycle import RequestCycle

    Watcher: TypeAlias = Callable[[bytes], object]


def watchers_of(request: RequestCycle, token_came: Callable[[], None] | None) -> list[Watcher]:
    """Those of a request; `token_came` is called for the first token of an answer that is a stream."""
    found: list[Watcher] = []
    if request.head.makes_response and request.lease is not None:
        found.append(request.service.response_ids.reader(request.served_name(), request.lease.instance_id).feed)
    if request.answer is not None and request.answer.heartbeat is not None:
        found.append(request.answer.heartbeat.feed)
    if request.caller is not None and request.caller.meter is not None:
        found.append(request.caller.meter.feed)
    if token_came is not None:
        found.append(_until_token(FirstToken(request.group), token_came))
    return found


def _until_token(first: FirstToken, came: Callable[[], None]) -> Watcher:
    def look(data: bytes) -> bool:
        if first.feed(data):
            came()
            return True
        return False

    return look
