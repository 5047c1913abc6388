"""The bench of proxies measures what is there: its engine, its client, its arithmetic."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zstandard

from loadtest import bench_proxy, proxy_beside, proxy_figures, proxy_load, proxy_peers, proxy_stalls
from loadtest.proxy_upstream import ANSWER, EVENT

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    (os.cpu_count() or 1) < 2 or shutil.which("taskset") is None, reason="two cores and taskset are needed"
)


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("bench")
    with proxy_peers.running("direct", folder / "direct", folder / "peers") as contender:
        yield contender


QUESTION = proxy_load.request(proxy_peers.PATH, proxy_peers.QUESTION)


def test_short_answers_are_timed_from_the_moment_they_were_due(direct: proxy_peers.Contender) -> None:
    result = proxy_load.paced(direct.port, QUESTION, connections=4, rate=200, seconds=0.5)
    assert result.failed == 0
    assert 50 < len(result.latencies_s) < 200
    assert min(result.latencies_s) > 0


def test_events_of_streams_are_counted_within_the_window(direct: proxy_peers.Contender) -> None:
    moments: list[str] = []
    message = proxy_load.request(proxy_peers.PATH, proxy_figures.ENDLESS)
    seen = proxy_load.streams(direct.port, message, count=20, settle_s=0.2, window_s=1.0, at=moments.append)
    assert moments == ["begin", "end"]
    assert (len(seen.first_byte_s), seen.ended) == (20, 0)
    # A hundred a second each; a machine with much else to do makes fewer, never more.
    assert 0 < seen.events <= 20 * 100 * seen.seconds * 1.2


def test_the_first_token_is_timed_on_a_kept_connection(direct: proxy_peers.Contender) -> None:
    message = proxy_load.request(proxy_peers.PATH, proxy_figures.TWO_TOKENS)
    assert len(proxy_load.first_tokens(direct.port, message, count=5)) == 5


def test_those_who_waited_are_counted(direct: proxy_peers.Contender) -> None:
    called: list[str] = []
    seen = proxy_load.waiting(
        direct.port, QUESTION, count=50, settled=lambda: called.append("settled"), release=lambda: called.append("go")
    )
    assert called == ["settled", "go"]
    assert (seen.sent, seen.answered, seen.refused) == (50, 50, 0)


def test_a_whole_answer_is_told_from_a_part() -> None:
    sized = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(EVENT), EVENT)
    for answer in (sized, chunked):
        assert proxy_load.whole(answer)
        assert not any(proxy_load.whole(answer[:n]) for n in range(len(answer)))


def test_ratios_and_table_take_what_was_measured() -> None:
    def figures(rate: float, cpu: float, p50: float) -> dict[str, Any]:
        return {
            "short": {"32": {"requests_per_s": rate}, "1": {"p50_ms": p50}},
            "streams": {"200": {"cpu_us_per_chunk": cpu}},
        }

    results: dict[str, Any] = {
        "warmpool": figures(1000, 12.0, 0.5),
        "nginx": figures(4000, 10.0, 0.3),
    }
    assert proxy_figures.middle([results["nginx"], figures(2000, 8.0, 0.1), figures(5000, 9.0, 0.2)]) == figures(
        4000, 9.0, 0.2
    )
    assert bench_proxy.ratios(results) == {
        "requests/s at 32 connections, warmpool : nginx": 0.25,
        "CPU a chunk at 200 streams, warmpool : nginx": 1.2,
        "p50 added at 1 connection, warmpool - nginx, ms": 0.2,
    }
    assert [column.header for column in bench_proxy.table(results).columns] == ["", "warmpool", "nginx"]


def test_a_peer_that_cannot_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(proxy_peers.UnavailableError, match="there is no no-such-program"):
        proxy_peers._from_apt("no-such-program", "no-such-package")


def test_cpu_time_is_that_of_the_process_and_of_threads_that_ended() -> None:
    own = proxy_peers.Contender("", "", 0, [psutil.Process()])
    before, spent = own.cpu_s(), time.process_time()
    while time.process_time() - spent < 0.05:
        pass
    thread = threading.Thread(target=lambda: sum(range(1_000_000)))
    thread.start()
    thread.join()
    assert own.cpu_s() - before == pytest.approx(time.process_time() - spent, abs=0.02)
    assert proxy_peers._cpu_s(1 << 22) == 0.0


def test_a_large_body_is_taken_without_holding_up_the_engine(direct: proxy_peers.Contender) -> None:
    """Its answer comes after its last byte; so does that of one behind it on the same connection."""
    large = proxy_load.request(proxy_peers.PATH, proxy_peers.QUESTION + b" " * (3 << 20))
    with socket.create_connection(("127.0.0.1", direct.port), timeout=30) as wire:
        for last in (large, large + QUESTION):
            wire.sendall(last[:-1])
            wire.settimeout(0.1)
            answer = b""
            with pytest.raises(TimeoutError):
                while True:
                    answer += wire.recv(1 << 16)
            assert answer.count(b"200 OK") == (0 if last == large else 1)
            wire.settimeout(30)
            wire.sendall(last[-1:])
            answer = b""
            while not proxy_load.whole(answer):
                answer += wire.recv(1 << 16)


@pytest.mark.parametrize("shape", proxy_stalls.SHAPES)
def test_bodies_have_their_size_and_are_what_they_say(shape: str) -> None:
    size = 100_000
    head, _, body = proxy_stalls.message(shape, size).partition(b"\r\n\r\n")
    if length := re.search(rb"Content-Length: (\d+)", head):
        assert int(length[1]) == len(body)
    else:
        body = b"".join(part.partition(b"\r\n")[2] for part in body.split(b"\r\n1000\r\n"))
    if shape == "zstd":
        body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
    if shape in proxy_stalls.JSON or shape == "zstd":
        assert size * 0.98 < len(body) <= size
        if shape != "deep arrays":  # Python's own parser has a limit
            assert json.loads(body)["model"] == "bench"
    elif shape == "multipart":
        assert len(body) == size


def test_stalls_are_seen_beside_a_control(
    direct: proxy_peers.Contender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_stalls, "STREAMS", 4)
    monkeypatch.setattr(proxy_stalls, "SHAPES", ("numbers", "unicode"))
    found = proxy_stalls.measure(direct, tmp_path, quick=True, say=lambda _: None)
    assert {shape: one["statuses"] for shape, one in found["shapes"].items()} == {
        "numbers": ["200"],
        "unicode": ["200"],
    }
    assert found["ended"] == 0
    assert all(found[name]["n"] > 0 for name in ("control", "past", "loaded"))
    assert found["p99_above_ms"] == pytest.approx(found["loaded"]["p99_ms"] - found["control"]["p99_ms"], abs=0.02)
    assert len(proxy_stalls.table({"direct": found}).rows) == 2 + 4


def a_pair(rate: float, cpu: float, behind: float) -> dict[str, Any]:
    return {
        "short": {"requests_per_s": rate, "cpu_us_per_request": cpu},
        "waiting": {"kib_each": 16.0, "cpu_us_behind_wake": behind, "cpu_us_ready": 100.0},
    }


def test_ratios_are_medians_of_the_pairs_with_their_spread() -> None:
    pairs = [{"other": a_pair(1000, 30.0, 150.0), "this": a_pair(rate, 33.0, 210.0)} for rate in (900, 990, 2000)]
    rows = {row["figure"]: row for row in proxy_beside.ratios(pairs)}
    rate = rows["requests/s at 32 connections"]
    assert (rate["ratio"], rate["least"], rate["most"], rate["kept"]) == (0.99, 0.9, 2.0, True)
    assert (rows["- CPU for each, µs"]["ratio"], rows["- CPU for each, µs"]["kept"]) == (1.1, None)
    assert rows["memory of a request that waits, KiB"]["kept"] is True
    behind = rows["CPU behind one wake : ready"]
    assert (behind["other"], behind["this"], behind["kept"]) == (1.5, 2.1, False)
    assert "CPU a chunk at 200 streams, µs" not in rows


def test_only_keys_that_the_other_checkout_knows_are_written() -> None:
    known = proxy_peers.HERE.keys()
    assert {"server.port", "pool.max_queue", "models.*.process.command", "models.*.idle.sleeping"} <= known
    settings = {"server": {"port": 1, "new": 2}, "models": {"bench": {"canary": "never", "idle": {"other": "never"}}}}
    assert proxy_peers.known_settings(settings, known) == (
        {"server": {"port": 1}, "models": {"bench": {"canary": "never", "idle": {}}}},
        ["server.new", "models.*.idle.other"],
    )


def test_another_checkout_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(proxy_peers.UnavailableError, match=r"no checkout of warmpool: there is no proxy/__main__\.py"):
        proxy_peers.Checkout.at(tmp_path, None)
    with pytest.raises(proxy_peers.UnavailableError, match="--beside-python"):
        proxy_peers.Checkout.at(proxy_peers.ROOT, tmp_path / "python")
    assert proxy_peers.Checkout.at(proxy_peers.ROOT, Path(sys.executable)) == proxy_peers.HERE


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--only", "apache"], "there is no apache"),
        (["--beside", "x", "--only", "nginx"], "there is no nginx"),
        (["--rounds", "0"], "at least 1"),
        (["--beside", "x", "--add"], "--add"),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_proxy", *options])
    with pytest.raises(SystemExit):
        bench_proxy.main()
    assert problem in capsys.readouterr().err


def test_a_checkout_beside_itself(tmp_path: Path) -> None:
    """Two proxies of this checkout, one pair: what waits for a wake and what finds the engine ready are measured."""
    options = argparse.Namespace(
        beside=proxy_peers.ROOT, beside_python=Path(sys.executable), peers=tmp_path, rounds=1, quick=True
    )
    said: list[str] = []
    say: Callable[[str], None] = said.append
    report = proxy_beside.measure(options, ("waiting",), tmp_path / "it", say)
    for name in ("other", "this"):
        waited = report["pairs"][0][name]["waiting"]
        assert (waited["answered"], waited["refused"]) == (100, 0)
    assert [row["figure"] for row in report["ratios"]][-1] == "CPU behind one wake : ready"
    assert all(row["this"] > 0 for row in report["ratios"])
    assert said[0].startswith("pair 1 of 1: memory of a request that waits")
