"""The bench of proxies measures what is there: its engine, its client, its arithmetic."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from loadtest import bench_proxy, proxy_load, proxy_peers
from loadtest.proxy_upstream import ANSWER, EVENT

if TYPE_CHECKING:
    from pathlib import Path

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
    message = proxy_load.request(proxy_peers.PATH, bench_proxy._ENDLESS)
    seen = proxy_load.streams(direct.port, message, count=20, settle_s=0.2, window_s=1.0, at=moments.append)
    assert moments == ["begin", "end"]
    assert (len(seen.first_byte_s), seen.ended) == (20, 0)
    # A hundred a second each; a machine with much else to do makes fewer, never more.
    assert 0 < seen.events <= 20 * 100 * seen.seconds * 1.2


def test_the_first_token_is_timed_on_a_kept_connection(direct: proxy_peers.Contender) -> None:
    message = proxy_load.request(proxy_peers.PATH, bench_proxy._TWO_TOKENS)
    assert len(proxy_load.first_bytes(direct.port, message, count=5)) == 5


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
    assert bench_proxy.middle([results["nginx"], figures(2000, 8.0, 0.1), figures(5000, 9.0, 0.2)]) == figures(
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
