"""What a host says of itself is read strictly, and what a later version adds is ignored."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxy.fleet import record
from proxy.fleet.record import Offer, Record, RecordError

GOOD: dict[str, Any] = {
    "v": 1, "host": "a", "boot": "b1", "seq": 3, "full": True, "url": "https://10.0.0.1:8443", "role": "host",
    "drain": False, "version": "0.2.0", "models": {"org/m": ["ready", 0, 4, 0, 0]},
}  # fmt: skip


def test_what_is_sent_is_what_is_read() -> None:
    sent = Record(1, "a", "b1", 3, True, "https://[::1]:8443", "host", False, "0.2", {"m": ["ready", 0, 4, 0, 0]})
    assert record.parse(sent.encoded()) == sent


def test_aliases_go_with_it() -> None:
    sent = Record(1, "a", "b1", 3, True, "https://a:1", "host", False, "", {}, {"other": "m"})
    assert record.parse(sent.encoded()) == sent
    assert record.parse(orjson.dumps(GOOD)).aliases == {}


def test_what_a_later_version_adds_is_ignored() -> None:
    found = record.parse(orjson.dumps({**GOOD, "images": {}, "models": {"org/m": ["ready", 0, 4, 0, 0, "new"]}}))
    raw = found.models["org/m"]
    assert raw is not None
    assert record.offer("org/m", raw) == Offer("ready", 0, 4, 0, 0)


def test_a_record_of_a_higher_version_is_known_by_its_head_only() -> None:
    found = record.parse(orjson.dumps({**GOOD, "v": 2, "models": "something else", "url": 7}))
    assert (found.host, found.version, found.usable, found.models) == ("a", 2, False, {})


@pytest.mark.parametrize(
    "change",
    [
        {"v": 0}, {"v": True}, {"v": "1"}, {"host": "A"}, {"host": "a.b"}, {"host": ""}, {"host": "a" * 64},
        {"boot": ""}, {"boot": "x y"}, {"seq": -1}, {"seq": 1.5}, {"seq": 1 << 60}, {"full": 1}, {"drain": None},
        {"role": "leader"}, {"url": "http://a:1"}, {"url": "https://a"}, {"url": "https://a:99999"},
        {"url": "https://u@a:1"}, {"url": "https://a:1/path"}, {"url": "https://a:1\r\nx"}, {"url": "https://:1"},
        {"models": []}, {"models": None}, {"aliases": []}, {"aliases": {"x": 1}}, {"aliases": {"": "m"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_as_it_should_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        record.parse(orjson.dumps(GOOD | change))


@pytest.mark.parametrize("missing", sorted(GOOD.keys() - {"version"}))
def test_every_field_is_needed(missing: str) -> None:
    with pytest.raises(RecordError):
        record.parse(orjson.dumps({name: value for name, value in GOOD.items() if name != missing}))


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000, b" " * (record.MOST_BYTES + 1)])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        record.parse(data)


@pytest.mark.parametrize("name", ["", "x" * 513])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RecordError):
        record.offer(name, ["ready", 0, 4, 0, 0])


@pytest.mark.parametrize(
    "value",
    [
        7, {}, [], ["ready", 0, 4, 0], [7, 0, 4, 0, 0], ["", 0, 4, 0, 0], ["é", 0, 4, 0, 0], ["ready", -1, 4, 0, 0],
        ["ready", 0.5, 4, 0, 0], ["ready", 0, True, 0, 0], ["ready", 0, 4, 0, 10**12], ["ready", 0, 4, None, 0],
    ],
    ids=str,
)  # fmt: skip
def test_an_offer_that_is_none_is_refused(value: list[Any]) -> None:
    with pytest.raises(RecordError):
        record.offer("m", value)
