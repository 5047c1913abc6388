"""A lease of an instance of this host for a request, with all that the pool is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.pool.lease import Lease
    from proxy.server.forward.cycle import RequestCycle
    from proxy.server.forward.model_resolver import Address


async def lease_here(request: RequestCycle, address: Address) -> Lease:
    """A hold on an instance, once there is one. Raises as `Pool.lease` does."""
    return await request.service.pool.lease(
        request.served_name(),
        priority=request.caller.priority if request.caller is not None else 0,
        max_wait_s=request.head.max_wait_s,
        preferred=address.instance,
        near=address.near,
        streams=address.streams,
        size=len(address.body),
    )
