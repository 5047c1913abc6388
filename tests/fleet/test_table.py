"""What is known of hosts, whatever the network does to their words."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.record import Offer, Record, RecordError
from proxy.fleet.sent import Sent
from proxy.fleet.table import HINT_S, STALE_S, Table, Taken

READY: list[Any] = ["ready", 0, 4, 0, 0]
COLD: list[Any] = ["checkpointed", 1500, 8, 0, 0]


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def said(seq: int, models: dict[str, Any], **more: Any) -> Record:
    fields: dict[str, Any] = {
        "version": 1, "host": "b", "boot": "x", "full": True, "url": "https://h:1", "role": "host", "drain": False,
        "release": "",
    }  # fmt: skip
    return Record(seq=seq, models=models, **(fields | more))


def known(table: Table) -> dict[str, dict[str, Any]]:
    """Host → model → offer, found by host and by model alike."""
    by_host = {h: {m: list(c.offer) for m, c in table.offers_of(h).items()} for h in table.hosts}
    for host, models in by_host.items():
        for model, value in models.items():
            assert [list(c.offer) for c in table.offers(model) if c.host.name == host] == [value]
    for model in table.models():
        assert all(model in by_host[c.host.name] for c in table.offers(model))
    return by_host


def test_changes_are_applied_in_their_order() -> None:
    table = Table(Clock())
    assert table.take(said(1, {"m": COLD, "n": COLD})) is Taken.NEW
    assert table.take(said(2, {"m": READY}, full=False)) is Taken.NEW
    assert table.take(said(3, {"n": None}, full=False)) is Taken.NEW
    assert known(table) == {"b": {"m": READY}}
    assert table.take(said(2, {"m": COLD}, full=False)) is Taken.OLD
    assert known(table) == {"b": {"m": READY}}


def test_a_gap_changes_nothing_until_everything_is_said_again() -> None:
    table = Table(Clock())
    assert table.take(said(0, {"m": READY}, full=False)) is Taken.GAP
    assert table.take(said(1, {"m": COLD})) is Taken.NEW
    assert table.take(said(3, {"m": READY}, full=False)) is Taken.GAP
    assert known(table) == {"b": {"m": COLD}}
    assert table.take(said(4, {"m": READY})) is Taken.NEW
    assert known(table) == {"b": {"m": READY}}


def test_a_new_process_begins_anew_and_an_older_one_that_speaks_again_is_noticed() -> None:
    table = Table(Clock())
    table.take(said(7, {"m": READY}))
    assert table.take(said(1, {"m": COLD}, boot="y")) is Taken.NEW
    assert known(table) == {"b": {"m": COLD}}
    assert table.take(said(2, {"m": READY}, boot="z", full=False)) is Taken.GAP
    assert table.take(said(8, {"m": READY})) is Taken.TWICE


def test_an_unreadable_offer_changes_nothing() -> None:
    table = Table(Clock())
    table.take(said(1, {"m": READY}))
    with pytest.raises(RecordError):
        table.take(said(2, {"n": READY, "m": ["ready"]}))
    with pytest.raises(RecordError):
        table.take(said(2, {"m": None}))
    assert known(table) == {"b": {"m": READY}}
    assert table.take(said(2, {"m": COLD}, full=False)) is Taken.NEW


def test_a_higher_version_is_shown_and_not_used() -> None:
    table = Table(Clock())
    table.take(said(1, {"m": READY}))
    assert table.take(said(2, {}, version=2)) is Taken.NEWER_VERSION
    assert table.hosts["b"].version == 2
    assert not table.knows("m")
    assert table.take(said(1, {"m": READY}, boot="back")) is Taken.NEW
    assert table.knows("m")


def test_a_host_ages_by_this_clock_and_longer_while_nobody_can_be_heard() -> None:
    clock = Clock()
    table = Table(clock)
    table.take(said(1, {"m": READY}))
    clock.now += STALE_S
    assert table.knows("m")
    clock.now += 0.1
    assert not table.knows("m")
    table.deaf()
    assert table.knows("m")
    clock.now += HINT_S - STALE_S - 0.2
    assert table.knows("m")
    table.hears()
    clock.now += 0.01
    assert table.knows("m")
    clock.now += STALE_S
    assert not table.knows("m")


def test_a_draining_host_is_not_asked() -> None:
    table = Table(Clock())
    table.take(said(1, {"m": READY}))
    table.take(said(2, {}, full=False, drain=True))
    assert not table.knows("m")
    table.take(said(3, {}, full=False))
    assert table.knows("m")


def test_an_unreachable_host_rests_longer_each_time_until_it_answers() -> None:
    clock = Clock()
    table = Table(clock)
    seq, rests = 0, []
    for _ in range(7):
        seq += 1
        table.take(said(seq, {"m": READY}))
        assert table.hosts["b"].usable_seen >= table.oldest
        rests.append(table.unreachable("b"))
        assert table.unreachable("b") >= rests[-1]  # another at the same time
        assert [each.host.name for each in table.resting("m")] == ["b"]
        assert table.hosts["b"].usable_seen < table.oldest
        clock.now += rests[-1] + 0.01
    assert rests == [1, 2, 4, 8, 16, 30, 30]
    table.reached("b")
    table.take(said(seq + 1, {"m": READY}))
    assert table.unreachable("b") == 1


def test_what_a_host_says_to_a_request_holds_until_its_next_word() -> None:
    table = Table(Clock())
    table.take(said(1, {"m": READY}))
    table.correct("b", "m", Offer("checkpointed", 9000, 0, 5, 0))
    assert known(table) == {"b": {"m": ["checkpointed", 9000, 0, 5, 0]}}
    table.take(said(2, {"m": READY}))
    assert known(table) == {"b": {"m": READY}}
    table.correct("b", "m", None)
    assert known(table) == {"b": {}}
    table.take(said(3, {"m": READY}))
    assert known(table) == {"b": {"m": READY}}


def test_a_host_that_is_long_gone_is_forgotten() -> None:
    clock = Clock()
    table = Table(clock)
    table.take(said(1, {"m": READY}))
    clock.now += 11 * HINT_S
    table.forget_old()
    assert not table.hosts
    assert not table.offers("m")


def test_a_model_is_found_by_the_aliases_of_hosts_that_are_there() -> None:
    clock = Clock()
    table = Table(clock)
    table.take(said(1, {"m": READY}, aliases={"x": "m", "y": "gone"}))
    table.take(said(1, {"n": READY}, host="a", aliases={"x": "n"}))
    assert (table.name_of("m"), table.name_of("x"), table.name_of("y"), table.name_of("z")) == ("m", "n", None, None)
    table.take(said(2, {"n": COLD}, host="a", full=False))
    assert table.name_of("x") == "n"
    table.take(said(3, {"n": COLD}, host="a"))
    assert table.name_of("x") == "m"
    clock.now += STALE_S + 1
    assert table.name_of("x") is None


def test_what_did_not_change_is_not_read_again() -> None:
    table = Table(Clock())
    models = {f"m{n}": [*COLD] for n in range(100)}
    table.take(said(1, models))
    before = dict(table.offers_of("b"))
    table.take(said(2, {name: [*offer] for name, offer in models.items()} | {"m7": READY}))
    changed = [name for name, found in table.offers_of("b").items() if found is not before[name]]
    assert changed == ["m7"]


def test_what_was_sent_counts_until_the_next_word() -> None:
    table, sent = Table(Clock()), Sent()
    table.take(said(1, {"m": READY}))
    host = table.hosts["b"]
    sent.note("m", host)
    sent.note("m", host)
    assert sent.to("m") == {"b": 2}
    assert not sent.to("n")
    table.take(said(2, {"m": READY}))
    assert not sent.to("m")
    sent.note("m", host)
    assert sent.to("m") == {"b": 1}
    sent.refused("m", host)
    assert sent.to("m")["b"] > 10**9


MODELS = st.dictionaries(st.sampled_from(["m", "n", "o"]), st.sampled_from([READY, COLD]))


@given(
    steps=st.lists(st.tuples(st.booleans(), MODELS, st.booleans()), min_size=1, max_size=20),
    seed=st.integers(0, 1 << 30),
    lost=st.floats(0, 0.9),
)
def test_in_any_order_with_losses_and_repetitions_the_table_ends_the_same(
    steps: list[tuple[bool, dict[str, Any], bool]], seed: int, lost: float
) -> None:
    """At any time it is what the host once was, and after its last full word what it is."""
    rng = random.Random(seed)
    state: dict[str, Any] = {}
    drain = False
    boot, seq = 0, 0
    messages: list[Record] = []
    was: list[dict[str, Any]] = [{}]
    for restarts, models, changes_drain in steps:
        boot, seq = (boot + 1, 0) if restarts else (boot, seq + 1)
        drain = drain != changes_drain
        full = restarts or rng.random() < 0.3
        delta: dict[str, Any] = {m: models.get(m) for m in {*models, *state} if models.get(m) != state.get(m)}
        state = dict(models)
        was.append(state)
        said_now = state if full else delta
        messages.append(said(seq, dict(said_now), full=full, drain=drain, boot=f"b{boot}"))
    last = said(seq + 1, dict(state), drain=drain, boot=f"b{boot}")
    sent = [m for m in messages if rng.random() >= lost]
    sent += rng.sample(sent, len(sent) // 2)
    rng.shuffle(sent)
    table = Table(Clock())
    for message in sent:
        table.take(message)
        assert known(table).get("b", {}) in was
    table.take(last)
    assert known(table)["b"] == state
    assert table.hosts["b"].drain is drain
