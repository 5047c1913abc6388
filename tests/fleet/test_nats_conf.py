"""The configuration of nats-server that a command writes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from proxy.cli.fleet import fleet
from proxy.config.fleet import FleetSettings, NatsSettings
from proxy.fleet.nats_bus import NatsBus
from proxy.fleet.tls import client_context
from tests.fleet import certificates
from tests.fleet.nats_server import PROGRAM, NatsServer, needs_nats
from tests.fleet.test_directory import COLD, Host, hosts, until

if TYPE_CHECKING:
    from pathlib import Path


def written(folder: Path, *options: str) -> str:
    done = CliRunner().invoke(fleet, ["nats", "a", "b", "--folder", str(folder), *options])
    assert done.exit_code == 0, done.output
    return (folder / "nats.conf").read_text()


@needs_nats
async def test_hosts_speak_by_it_with_their_passwords_and_for_themselves_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "authority"
    ca = certificates.authority(folder)
    certificate, key = certificates.certificate(folder, "nats", name="IP:127.0.0.1")
    text = written(tmp_path / "nats", "--certificate", str(certificate), "--key", str(key), "--subject", "t")
    server = NatsServer(tmp_path, "".join(line for line in text.splitlines(keepends=True) if "listen:" not in line))
    await server.start()

    def bus(name: str) -> NatsBus:
        own, own_key = certificates.certificate(folder, name)
        nats = NatsSettings(
            servers=[f"tls://127.0.0.1:{server.port}"], password_file=tmp_path / "nats" / f"{name}.password"
        )
        found = FleetSettings(host=name, url="https://h:1", certificate=own, key=own_key, ca=ca, nats=nats)
        return NatsBus(nats, name, client_context(found))

    a, b = Host("a", bus("a")), Host("b", bus("b"))
    try:
        async with hosts(a, b):
            await until(lambda: a.knows(b) == {"m": COLD} and b.knows(a) == {"m": COLD})
            assert "permissions violation" not in caplog.text.lower()
            await a.bus.publish("t.state.b", b"")
            await until(lambda: "permissions violation" in caplog.text.lower())
    finally:
        server.stop()


@needs_nats
def test_nats_server_takes_it_with_a_cluster_too(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    ca = certificates.authority(folder)
    certificate, key = certificates.certificate(folder, "nats", name="IP:127.0.0.1")
    routes = ["--route", "10.0.0.1:6222", "--route", "10.0.0.2:6222"]
    text = written(tmp_path / "nats", "--certificate", str(certificate), "--key", str(key), "--ca", str(ca), *routes)
    assert 'routes: ["tls://10.0.0.1:6222", "tls://10.0.0.2:6222"]' in text
    assert PROGRAM is not None
    done = subprocess.run(
        [PROGRAM, "-t", "-c", str(tmp_path / "nats" / "nats.conf")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_overwritten_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    text = written(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    done = CliRunner().invoke(fleet, ["nats", "a", "--folder", str(tmp_path)])
    assert done.exit_code != 0
    assert (tmp_path / "nats.conf").read_text() == text


@pytest.mark.parametrize("names", [["A"], ["a", "a"], ["a b"], []])
def test_names_that_are_none_are_refused(tmp_path: Path, names: list[str]) -> None:
    done = CliRunner().invoke(fleet, ["nats", *names, "--folder", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert not (tmp_path / "x").exists()
