"""What holders of keys use on one host counts on the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import pytest

from proxy.fleet.key_use import KeyUses, Use
from proxy.fleet.record import RecordError
from proxy.server.auth.rate_limit import Account
from tests.fleet.hosts import Hosts, until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Limits:
    """One host's accounts, by key."""

    def __init__(self, *keys: str) -> None:
        self.now = 0.0
        self.accounts = {key: Account() for key in keys}
        for account in self.accounts.values():
            account.set_limits(60, 6000, 2, self.now)

    def taken(self) -> dict[str, Use]:
        return {key: Use(*account.told(), account.running) for key, account in self.accounts.items()}

    def used_elsewhere(self, uses: Mapping[str, Use]) -> None:
        for key, use in uses.items():
            if key in self.accounts:
                self.accounts[key].used_elsewhere(use.requests, use.tokens, self.now)

    def running_elsewhere(self, running: Mapping[str, int]) -> None:
        for key, account in self.accounts.items():
            account.elsewhere = running.get(key, 0)


class Pair:
    """Two hosts, whose words are carried by the test."""

    def __init__(self) -> None:
        self.now = 100.0
        self.limits = {host: Limits("k") for host in "ab"}
        self.uses = {host: KeyUses(host, f"boot-{host}", self.limits[host], lambda: self.now) for host in "ab"}

    def account(self, host: str) -> Account:
        return self.limits[host].accounts["k"]

    def carry(self, source: str, target: str) -> bytes | None:
        message = self.uses[source].message()
        if message is not None:
            self.uses[target].take(source, message)
        return message


def test_what_is_used_on_one_host_is_missing_on_the_other() -> None:
    pair = Pair()
    for _ in range(2):
        assert pair.account("a").begin(0.0) is None
    pair.account("a").expect(1000, 0.0)
    pair.carry("a", "b")
    assert pair.account("b").headers(0.0)["x-ratelimit-remaining-requests"] == "58"
    assert pair.account("b").headers(0.0)["x-ratelimit-remaining-tokens"] == "5000"
    refusal = pair.account("b").begin(0.0)
    assert refusal is not None
    assert refusal.what == "requests at once"
    for expected in (1000, 0):
        pair.account("a").end(expected, 200, 0.0)
    pair.carry("a", "b")
    assert pair.account("b").headers(0.0)["x-ratelimit-remaining-tokens"] == "5600"
    assert pair.account("b").begin(0.0) is None


def test_nothing_is_said_where_nothing_is_used() -> None:
    pair = Pair()
    assert pair.carry("a", "b") is None
    pair.account("a").begin(0.0)
    assert pair.carry("a", "b") is not None
    assert pair.carry("a", "b") is not None  # it runs still
    pair.account("a").end(0, 0, 0.0)
    assert pair.carry("a", "b") is not None  # it has ended
    assert pair.carry("a", "b") is None


def test_a_message_that_comes_twice_or_late_counts_once() -> None:
    pair = Pair()
    messages = []
    for _ in range(2):
        pair.account("a").begin(0.0)
        messages.append(pair.uses["a"].message() or b"")
    for message in (messages[1], messages[1], messages[0]):
        pair.uses["b"].take("a", message)
    assert pair.account("b").headers(0.0)["x-ratelimit-remaining-requests"] == "59"


def test_what_runs_on_a_host_that_is_gone_is_forgotten() -> None:
    pair = Pair()
    for _ in range(2):
        pair.account("a").begin(0.0)
    pair.carry("a", "b")
    assert pair.account("b").elsewhere == 2
    pair.now += 6
    pair.uses["b"].message()
    assert pair.account("b").elsewhere == 0


GOOD: dict[str, Any] = {"v": 1, "host": "a", "boot": "x", "seq": 1, "keys": {"k": [1, 2, 3]}}


@pytest.mark.parametrize(
    "change",
    [
        {"host": "b"}, {"v": 2}, {"boot": 1}, {"seq": "1"}, {"keys": []}, {"keys": {"k": [1, 2]}}, {"keys": {"k": 7}},
        {"keys": {"k": [1, 2, 10**12]}}, {"keys": {"k": [1.5, 2, 3]}}, {"keys": {"x" * 100: [1, 2, 3]}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_as_it_should_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        Pair().uses["b"].take("a", orjson.dumps(GOOD | change))


async def test_a_key_that_is_limited_on_one_host_is_limited_on_all(tmp_path: Path) -> None:
    from proxy.server.auth import api_keys

    file = tmp_path / "keys.toml"
    id_, key, entry = api_keys.generate("alice", requests_per_minute=6)
    with api_keys.changing(file) as entries:
        entries[id_] = entry
    async with Hosts(tmp_path) as hosts:
        a, b = await hosts.host("a", keys_file=str(file)), await hosts.host("b", keys_file=str(file))
        await hosts.acquainted()
        headers = {"Authorization": f"Bearer {key}"}
        for _ in range(5):
            _, response = await a.ask(headers=headers)
            assert response.status == 200
        said = "warmpool.use.a"
        await until(lambda: sum(orjson.loads(d)["keys"][id_][0] for s, d in hosts.exchange.sent if s == said) == 5)
        statuses = [(await b.ask(headers=headers))[1].status for _ in range(4)]
        assert 429 in statuses
