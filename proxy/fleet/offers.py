"""What this host offers, from its pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.fleet.record import Offer
from proxy.host.turns import in_turns

if TYPE_CHECKING:
    from proxy.pool.offering import Offered
    from proxy.pool.pool import Pool

_MODELS_A_TURN: Final = 20
_MOST: Final = 10**9


def offer_of(found: Offered) -> Offer:
    """As it is published."""
    return Offer(
        found.tier.label, _whole(found.wait_s * 1000), _whole(found.room), _whole(found.queue),
        _whole(found.hurt_s * 1000),
    )  # fmt: skip


def present(pool: Pool, model: str) -> Offer | None:
    """What it offers just now for the model of this name; None where nothing is offered."""
    key = pool.settings.names().get(model)
    found = pool.offered(key) if key is not None else None
    return offer_of(found) if found is not None else None


async def all_offers(pool: Pool) -> dict[str, Offer]:
    """All that it offers, by the models' names, without holding the event loop."""
    offers: dict[str, Offer] = {}
    async for key in in_turns([*pool.settings.models], _MODELS_A_TURN):
        found = pool.offered(key)
        if found is not None:
            offers[pool.settings.served_name(key)] = offer_of(found)
    return offers


def aliases(pool: Pool) -> dict[str, str]:
    """Other names of the models here, and of what adapters make of them."""
    settings = pool.settings
    named = {name: settings.served_name(key) for name, key in settings.names().items()}
    return {name: served for name, served in named.items() if name != served}


def _whole(number: float) -> int:
    return min(_MOST, max(0, round(number)))
