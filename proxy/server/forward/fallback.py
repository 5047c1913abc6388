"""Another model that answers instead of the one that was asked for (`models.NAME.fallback`)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from proxy.errors import NoMemoryError, RequestError, WakeFailedError
from proxy.server.forward.routes import ModelIn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from proxy.server.auth.caller import Caller
    from proxy.server.forward.model_resolver import Address
    from proxy.server.http_request import RequestHead
    from proxy.server.service import Service

log: Final = logging.getLogger("warmpool")

FIELD: Final = b"x-warmpool-fallback"
"""Says in an answer which model gave it."""
_NAMED_IN_BODY: Final = (ModelIn.JSON, ModelIn.FORM)


async def instead(
    service: Service, head: RequestHead, asked: Address, caller: Caller | None, wait: Callable[[], Awaitable[None]]
) -> Address | None:
    """Where to go instead of waiting (`wait`) for the model that was asked for; None: it was had. Raises as `wait`."""
    found = await address(service, head, asked, caller)
    if found is not None:
        return found
    try:
        await wait()
    except (WakeFailedError, NoMemoryError):
        found = await address(service, head, asked, caller, failed=True)
        if found is None:
            raise
    return found


async def address(
    service: Service, head: RequestHead, asked: Address, caller: Caller | None, *, failed: bool = False
) -> Address | None:
    """The address of the model that is to answer instead, if one should, can and its caller may use it.

    `failed`: the one that was asked for could not be had.
    """
    match = head.match
    other = service.pool.fallback(asked.model, failed=failed)
    if other is None or match is None or asked.instance is not None or match.route.model_in not in _NAMED_IN_BODY:
        return None
    if caller is not None and not caller.may_use(other):
        return None
    try:
        named = replace(match, deployment=service.pool.served_name(other))
        found = await service.addressing.found(named, head.content_type, asked.body)
    except RequestError as error:
        log.info("%s cannot answer for %s: %s", other, asked.model, type(error).__name__)
        return None
    service.metrics.fallbacks.labels(asked.model).inc()
    return found
