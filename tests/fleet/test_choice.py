"""Which host a request goes to."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.choice import choose, takes
from proxy.fleet.record import Offer
from proxy.fleet.table import HOP_MS, Candidate, HostEntry, rendezvous

if TYPE_CHECKING:
    from collections.abc import Sequence


def offered(host: str, tier: str = "ready", wait_ms: int = 0, room: int = 4, **more: int) -> Candidate:
    entry = HostEntry(host)
    entry.usable_seen = 100.0
    made = Offer(tier, wait_ms, room, more.get("queue", 0), more.get("hurt_ms", 0))
    return Candidate(entry, made, None, 0.0 if host == "here" else HOP_MS)


def chosen(offers: Sequence[Candidate], seed: int = 0, **more: Any) -> str | None:
    rng = random.Random(seed)
    found = choose(
        offers, **{"oldest": 50.0, "rank": lambda host: rendezvous("m", host), "draw": rng.randrange, **more}
    )
    return found.host.name if found is not None else None


def all_chosen(offers: Sequence[Candidate], **more: Any) -> Counter[str | None]:
    return Counter(chosen(offers, seed, **more) for seed in range(200))


def test_here_if_it_is_ready_here() -> None:
    assert chosen([offered("b", room=100)], here=offered("here", room=1)) == "here"
    assert chosen([offered("b")], here=offered("here", room=0, wait_ms=900)) == "b"


def test_a_ready_one_elsewhere_before_a_cold_one_here() -> None:
    assert chosen([offered("b")], here=offered("here", "checkpointed", 1500)) == "b"


def test_of_ready_ones_the_one_with_more_room_wins_of_two_and_all_are_used() -> None:
    offers = [offered(f"h{n}", room=n + 1) for n in range(4)]
    counts = all_chosen(offers)
    assert set(counts) == {"h1", "h2", "h3"}  # of any two h0 is the fuller
    assert counts["h3"] > counts["h2"] > counts["h1"]


def test_what_was_sent_since_takes_room() -> None:
    offers = [offered("b", room=2), offered("c", room=1)]
    assert chosen(offers, sent={"b": 2}) == "c"
    assert chosen(offers, sent={"b": 2, "c": 1}) in ("b", "c")


def test_cold_ones_are_chosen_alike_everywhere() -> None:
    names = [f"h{n}" for n in range(50)]
    offers = [offered(name, "checkpointed", 1500) for name in names]
    first = max(names, key=lambda host: rendezvous("m", host))
    assert all_chosen(offers) == {first: 200}
    random.Random(1).shuffle(offers)
    assert chosen(offers) == first
    assert chosen([each for each in offers if each.host.name != first]) != first


def test_after_a_refusal_it_goes_elsewhere_and_is_spread() -> None:
    names = sorted((f"h{n}" for n in range(20)), key=lambda host: rendezvous("m", host), reverse=True)
    offers = [offered(name, "checkpointed", 1500) for name in names]
    counts = all_chosen(offers, avoid={names[0]})
    assert set(counts) == set(names[1:5])


def test_a_dearer_one_only_when_it_is_about_as_cheap() -> None:
    cheap, near, dear = offered("a", wait_ms=0), offered("b", wait_ms=40), offered("c", wait_ms=60)
    assert set(all_chosen([cheap, near, dear])) == {"a", "b"}
    offers = [
        offered("a", "checkpointed", 10_000),
        offered("b", "checkpointed", 10_900),
        offered("c", "stopped", 12_000),
    ]
    assert chosen(offers) in ("a", "b")


def test_what_others_lose_counts() -> None:
    assert chosen([offered("a", "checkpointed", 1500, hurt_ms=5000), offered("b", "checkpointed", 2500)]) == "b"


def test_stale_ones_and_those_that_did_not_want_it_are_left_out() -> None:
    stale = offered("a")
    stale.host.usable_seen = 10.0
    assert chosen([stale]) is None
    assert chosen([stale, offered("b", "stopped", 60_000)]) == "b"
    assert chosen([offered("b"), offered("c")], avoid={"b"}) == "c"
    assert chosen([offered("b")], avoid={"b"}) is None


def test_none_within_the_time_it_would_wait() -> None:
    assert chosen([offered("a", "stopped", 60_000)], most_wait_ms=5000) is None
    assert chosen([offered("a", "checkpointed", 1500)], most_wait_ms=5000) == "a"
    assert chosen([], here=offered("here", "stopped", 60_000), most_wait_ms=5000) is None


def test_where_nobody_has_room_the_shorter_queue_of_two() -> None:
    long, short = offered("a", room=0, wait_ms=900, queue=9), offered("b", room=0, wait_ms=900, queue=1)
    assert all_chosen([long, short]) == {"b": 200}


@pytest.mark.parametrize(
    ("expected_ms", "present_ms", "taken"),
    [(0, 0, True), (0, 250, True), (0, 251, False), (2000, 4000, True), (2000, 4001, False)],
)
def test_a_host_takes_what_has_not_become_much_dearer(expected_ms: int, present_ms: int, taken: bool) -> None:
    assert takes(Offer("ready", present_ms, 1, 0, 0), expected_ms) is taken


OFFERS = st.lists(
    st.tuples(
        st.sampled_from(["ready", "sleeping", "checkpointed", "stopped"]),
        st.integers(0, 100_000), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5000), st.booleans(),
    ),
    max_size=12,
)  # fmt: skip


@given(
    found=OFFERS,
    here=OFFERS,
    most=st.none() | st.integers(0, 100_000),
    avoided=st.sets(st.integers(0, 12)),
    seed=st.integers(0, 99),
)
def test_what_is_chosen_may_be_chosen(
    found: list[Any], here: list[Any], most: int | None, avoided: set[int], seed: int
) -> None:
    offers = []
    for n, (tier, wait_ms, room, queue, hurt_ms, stale) in enumerate(found):
        each = offered(f"h{n}", tier, wait_ms, room, queue=queue, hurt_ms=hurt_ms)
        each.host.usable_seen = 0.0 if stale else 100.0
        offers.append(each)
    own = offered("here", here[0][0], here[0][1], here[0][2], queue=here[0][3]) if here else None
    avoid = {f"h{n}" for n in avoided}
    rng = random.Random(seed)
    got = choose(
        offers, oldest=50.0, rank=lambda host: rendezvous("m", host), draw=rng.randrange, here=own, avoid=avoid,
        most_wait_ms=most,
    )  # fmt: skip
    good = [
        each
        for each in [*offers, *([own] if own is not None else [])]
        if each.host.usable_seen >= 50.0
        and each.host.name not in avoid
        and (most is None or each.offer.wait_ms <= most)
    ]
    if own is not None and own.is_ready and own.room:
        assert got is own
    elif not good:
        assert got is None
    else:
        assert got in good
        roomy = [each for each in good if each.room]
        assert got is not None
        least = min(e.price_ms for e in roomy or good)
        assert got.price_ms <= least + max(50.0, least * 0.1)
        assert got.room or not roomy
