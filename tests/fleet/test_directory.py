"""What hosts say to one another, over a bus within the test and over a real NATS."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import orjson
import pytest

from proxy.config.fleet import FleetSettings, NatsSettings
from proxy.errors import ConfigError
from proxy.fleet.directory import Directory
from proxy.fleet.nats_bus import NatsBus
from proxy.fleet.own_record import OwnRecord
from proxy.fleet.record import Offer
from proxy.fleet.table import Table
from proxy.fleet.tls import client_context
from tests.fleet import certificates
from tests.fleet.memory_bus import Exchange, MemoryBus
from tests.fleet.nats_server import NatsServer, needs_nats
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from proxy.fleet.bus import Bus

READY, COLD = Offer("ready", 0, 4, 0, 0), Offer("checkpointed", 1500, 8, 0, 0)


class Host:
    """One directory, and what its host offers."""

    def __init__(self, name: str, bus: Bus) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.bus = bus
        self.offers: dict[str, Offer] = {"m": COLD}
        self.drain = False
        self.counted: list[str] = []
        self.table = Table(loop.time)
        self.own = OwnRecord(name, f"https://{name}:1", "host", "1")
        self.directory = Directory(
            "t", self.own, self.table, bus, offers=self._read, draining=lambda: self.drain,
            count=self.counted.append, clock=loop.time,
        )  # fmt: skip

    async def _read(self) -> dict[str, Offer]:
        return dict(self.offers)

    def offer(self, **offers: Offer) -> None:
        self.offers |= offers
        self.directory.note_change()

    def knows(self, other: Host) -> dict[str, Offer] | None:
        if other.name not in self.table.hosts:
            return None
        return {model: found.offer for model, found in self.table.offers_of(other.name).items()}


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def hosts(*made: Host) -> AsyncIterator[None]:
    for host in made:
        host.directory.open()
    try:
        yield
    finally:
        for host in made:
            await host.directory.close()


async def test_hosts_learn_of_one_another_and_of_changes() -> None:
    exchange = Exchange()
    a, b = Host("a", MemoryBus(exchange)), Host("b", MemoryBus(exchange))
    async with hosts(a, b):
        await until(lambda: a.knows(b) == {"m": COLD} and b.knows(a) == {"m": COLD})
        b.offer(m=READY, n=COLD)
        await until(lambda: a.knows(b) == {"m": READY, "n": COLD})
        b.drain = True
        b.directory.note_change()
        await until(lambda: a.table.hosts["b"].drain)
    assert a.table.hosts["b"].drain
    assert set(a.counted) == {"new"}


async def test_a_change_is_sent_alone_and_nothing_where_nothing_changed() -> None:
    exchange = Exchange()
    a, b = Host("a", MemoryBus(exchange)), Host("b", MemoryBus(exchange))
    async with hosts(a, b):
        b.offers = {f"m{n}": COLD for n in range(50)}
        await until(lambda: len(a.knows(b) or ()) == 50)
        del exchange.sent[:]
        b.directory.note_change()
        b.offer(m7=READY)
        await until(lambda: (a.knows(b) or {})["m7"] == READY)
    said = [orjson.loads(data) for subject, data in exchange.sent if subject == "t.state.b"]
    deltas = [each["models"] for each in said if not each["full"]]
    assert deltas in ([{"m7": [*READY]}], [])  # a full one may have come first


async def test_what_was_lost_is_asked_for_again() -> None:
    exchange = Exchange()
    a, b = Host("a", MemoryBus(exchange)), Host("b", MemoryBus(exchange))
    async with hosts(a, b):
        await until(lambda: a.knows(b) == {"m": COLD})
        exchange.lose = lambda subject, _: subject == "t.state.b"
        before = len(exchange.sent)
        b.offer(m=READY)
        await until(lambda: any(s == "t.state.b" for s, _ in exchange.sent[before:]))
        exchange.lose = lambda subject, data: subject == "t.state.b" and orjson.loads(data)["full"] and not asked
        asked: list[bool] = []
        b.offer(n=COLD)
        await until(lambda: any(s == "t.again.b" for s, _ in exchange.sent))
        asked.append(True)
        await until(lambda: a.knows(b) == {"m": READY, "n": COLD})
    assert "gap" in a.counted


async def test_a_record_under_another_hosts_name_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange()
    a, b = Host("a", MemoryBus(exchange)), Host("b", MemoryBus(exchange))
    async with hosts(a, b):
        await until(lambda: a.knows(b) == {"m": COLD})
        forged = OwnRecord("b", "https://evil:1", "host", "").everything({"m": READY}, drain=False)
        exchange.deliver(None, "t.state.c", forged.encoded())
        exchange.deliver(None, "t.state.b", b"{")
        exchange.deliver(None, "t.state.b", b"\xff" * 100)
        assert a.knows(b) == {"m": COLD}
        assert a.table.hosts["b"].url == "https://b:1"
        assert "c" not in a.table.hosts
    assert {"forged", "unreadable"} <= set(a.counted)
    assert "another host's name" in caplog.text


async def test_two_processes_of_one_name_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange()
    a, twin = Host("a", MemoryBus(exchange)), Host("a", MemoryBus(exchange))
    async with hosts(a, twin):
        await until(lambda: "twice" in a.counted)
    assert "another process publishes as a" in caplog.text
    assert not a.table.hosts


async def test_losing_the_bus_loses_freshness_only() -> None:
    exchange = Exchange()
    bus = MemoryBus(exchange)
    a, b = Host("a", bus), Host("b", MemoryBus(exchange))
    async with hosts(a, b):
        await until(lambda: a.knows(b) == {"m": COLD})
        bus.disconnect()
        b.offer(m=READY)
        assert a.table.knows("m")
        assert a.knows(b) == {"m": COLD}
        bus.connect()
        await until(lambda: a.knows(b) == {"m": READY})


@pytest.mark.skipif(importlib.util.find_spec("nats") is None, reason="there is no nats-py here")
def test_a_password_that_cannot_be_read_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    for file in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            NatsBus(NatsSettings(servers=["nats://127.0.0.1:1"], password_file=file), "a", None)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="others may read it"):
        NatsBus(NatsSettings(servers=["nats://127.0.0.1:1"], password_file=tmp_path / "empty"), "a", None)
    (tmp_path / "empty").chmod(0o600)
    with pytest.raises(ConfigError, match="is empty"):
        NatsBus(NatsSettings(servers=["nats://127.0.0.1:1"], password_file=tmp_path / "empty"), "a", None)


@needs_nats
async def test_over_a_real_nats_which_ends_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = NatsServer(tmp_path)
    settings = NatsSettings(servers=[f"nats://127.0.0.1:{server.port}"])
    a, b = Host("a", NatsBus(settings, "a", None)), Host("b", NatsBus(settings, "b", None))
    async with hosts(a, b):
        await until(lambda: "no NATS server can be used" in caplog.text)
        assert not a.directory.connected
        await server.start()
        try:
            await until(lambda: a.knows(b) == {"m": COLD} and b.knows(a) == {"m": COLD})
            b.offer(m=READY)
            await until(lambda: a.knows(b) == {"m": READY})
            server.stop()
            await until(lambda: not a.directory.connected and not b.directory.connected)
            assert a.table.knows("m")
            b.offer(m=COLD)
            await server.start()
            await until(lambda: a.knows(b) == {"m": COLD})
        finally:
            server.stop()


@needs_nats
async def test_with_users_a_host_can_speak_for_itself_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = await NatsServer(tmp_path, f"authorization {{users: [{_user('a')}, {_user('b')}]}}").start()
    settings = {}
    for name in "ab":
        file = tmp_path / name
        file.write_text(f"pw-{name}\n")
        file.chmod(0o600)
        settings[name] = NatsSettings(servers=[f"nats://127.0.0.1:{server.port}"], password_file=file)
    a, b = Host("a", NatsBus(settings["a"], "a", None)), Host("b", NatsBus(settings["b"], "b", None))
    try:
        async with hosts(a, b):
            await until(lambda: a.knows(b) == {"m": COLD} and b.knows(a) == {"m": COLD})
            forged = OwnRecord("a", "https://evil:1", "host", "").everything({"m": READY}, drain=False)
            await b.bus.publish("t.state.a", forged.encoded())
            await until(lambda: "permissions violation" in caplog.text.lower())
            assert "twice" not in a.counted
    finally:
        server.stop()


@needs_nats
async def test_over_tls_a_host_shows_its_certificate_to_nats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "authority"
    ca = certificates.authority(folder)
    certificate, key = certificates.certificate(folder, "nats", name="IP:127.0.0.1")
    tls = f'tls {{cert_file: "{certificate}", key_file: "{key}", ca_file: "{ca}", verify: true, timeout: 30}}'
    server = await NatsServer(tmp_path, tls).start()
    settings = NatsSettings(servers=[f"tls://127.0.0.1:{server.port}"])

    def bus(name: str, folder: Path) -> NatsBus:
        own, own_key = certificates.certificate(folder, name)
        fleet = FleetSettings(host=name, url="https://h:1", certificate=own, key=own_key, ca=ca, nats=settings)
        return NatsBus(settings, name, client_context(fleet))

    other = tmp_path / "other"
    certificates.authority(other)
    a, b, stranger = (Host(n, bus(n, f)) for n, f in (("a", folder), ("b", folder), ("c", other)))
    try:
        async with hosts(a, b, stranger):
            await until(lambda: a.knows(b) == {"m": COLD} and b.knows(a) == {"m": COLD})
            await until(lambda: "no NATS server can be used" in caplog.text)
            assert "c" not in a.table.hosts
    finally:
        server.stop()


def _user(name: str) -> str:
    """One that may publish its own state, as a line of nats-server's configuration."""
    publish = f'["t.state.{name}", "t.again.*", "t.hello"]'
    subscribe = f'["t.state.*", "t.again.{name}", "t.hello"]'
    return f'{{user: {name}, password: "pw-{name}", permissions: {{publish: {publish}, subscribe: {subscribe}}}}}'
