"""Which host a request goes to; a pure decision.

Here, if it would be served at once. Else among the offers that are about as cheap as the cheapest: of ready ones two at
random, and the one with more room; of cold ones the highest in the order that all hosts agree on, so that a model that
nobody has is woken once. Where nobody has room, in the shorter one of two queues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from proxy.fleet.record import Offer
    from proxy.fleet.table import Candidate

_NEAR_MS: Final = 50.0
_NEAR_SHARE: Final = 0.1
"""Offers are about as cheap when they are within the larger of the two."""
MOST_TRIES: Final = 5
"""Hosts that are asked before a request waits at the best of them; simulated: three leave twice the wait at one second
of staleness.
"""
_SPREAD: Final = 4
_WORSE: Final = 2.0
_WORSE_MS: Final = 250.0
"""How much longer than expected, the larger of the two, a request may have to wait where it was sent."""


class Draw(Protocol):
    """A random number below `most`."""

    def __call__(self, most: int, /) -> int: ...


def choose(
    offers: Collection[Candidate],
    *,
    oldest: float,
    rank: Callable[[str], int],
    draw: Draw,
    here: Candidate | None = None,
    sent: Mapping[str, int] | None = None,
    avoid: Collection[str] = (),
    most_wait_ms: float | None = None,
) -> Candidate | None:
    """The offer to take, of those of the others and the one of this host; None where none is good enough.

    `oldest`: hosts that were heard of before that are stale. `rank`: the place of a host for this model. `sent`: how
    many requests for it went to each host since its last word. `avoid`: hosts that did not want it.
    """
    if here is not None and here.is_ready and here.room > 0:
        return here
    found = [each for each in offers if each.host.usable_seen >= oldest]
    if here is not None:
        found.append(here)
    if avoid:
        found = [each for each in found if each.host.name not in avoid]
    if most_wait_ms is not None:
        found = [each for each in found if each.offer.wait_ms <= most_wait_ms]
    if not found:
        return None
    sent = sent or {}
    with_room = [each for each in found if each.room > 0]
    if sent:
        with_room = [each for each in with_room if each.room > sent.get(each.host.name, 0)]
    if not with_room:
        return _shorter_queue(_cheapest(found), sent, draw)
    near = _cheapest(with_room)
    ready = [each for each in near if each.is_ready]
    if ready:
        return _more_room(ready, sent, draw)
    if len(near) == 1:
        return near[0]
    if not avoid:
        return max(near, key=lambda each: rank(each.host.name))
    # Others overflow as well just now: the more hosts were full, the more the rest is spread.
    near.sort(key=lambda each: rank(each.host.name), reverse=True)
    return near[draw(min(len(near), _SPREAD ** len(avoid)))]


def takes(present: Offer, expected_wait_ms: float) -> bool:
    """Whether a host should take a request that came to it since it was to wait there only so long."""
    return present.wait_ms <= max(expected_wait_ms * _WORSE, expected_wait_ms + _WORSE_MS)


def _cheapest(offers: Sequence[Candidate]) -> list[Candidate]:
    """Those that are about as cheap as the cheapest one."""
    least = min([each.price_ms for each in offers])
    most = least + max(_NEAR_MS, least * _NEAR_SHARE)
    return [each for each in offers if each.price_ms <= most]


def _more_room(offers: Sequence[Candidate], sent: Mapping[str, int], draw: Draw) -> Candidate:
    one, other = _two(offers, draw)
    left = one.room - sent.get(one.host.name, 0)
    return one if left >= other.room - sent.get(other.host.name, 0) else other


def _shorter_queue(offers: Sequence[Candidate], sent: Mapping[str, int], draw: Draw) -> Candidate:
    one, other = _two(offers, draw)
    waiting = one.offer.queue - one.room + sent.get(one.host.name, 0)
    return one if waiting <= other.offer.queue - other.room + sent.get(other.host.name, 0) else other


def _two(offers: Sequence[Candidate], draw: Draw) -> tuple[Candidate, Candidate]:
    """Two at random, different ones where there are two."""
    count = len(offers)
    first = draw(count)
    second = draw(count - 1) if count > 1 else first
    return offers[first], offers[second + 1 if second >= first and count > 1 else second]
