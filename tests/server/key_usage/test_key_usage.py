"""What holders of keys have used: counted, kept over restarts, shown, and limited by the day."""

from __future__ import annotations

import asyncio
import datetime as dt
import signal
import threading
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli.main import cli
from proxy.host import owned
from proxy.pool.gpu_time import Taken
from proxy.server.auth import api_keys
from proxy.server.key_usage import recorder
from proxy.server.key_usage.figures import Day, Figures, parse
from proxy.server.key_usage.files import UsageFiles
from proxy.server.key_usage.recorder import KeyUsage
from proxy.telemetry.metrics import Metrics
from tests.fakes import Clock
from tests.served import Proxy
from tests.server.auth.test_authorization import Keyed, keyed_of
from tests.server.test_http import ASK, error_of
from tests.support import PATIENCE_S, engine_model, get_json

if TYPE_CHECKING:
    from pathlib import Path

    from proxy.server.request_history import Ended

__all__ = ["keyed_of"]

NOON = dt.datetime(2026, 11, 29, 12, tzinfo=dt.UTC).timestamp()
DAY_S = 86400
USAGE = b'"usage":{"prompt_tokens":%d,"completion_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'


class Source:
    """Requests that have ended, and GPU time, as a test says."""

    def __init__(self) -> None:
        self.requests: list[Ended] = []
        self.times: list[tuple[str, Taken]] = []

    def ended(self, most: int) -> list[Ended]:
        found, self.requests = self.requests[:most], self.requests[most:]
        return found

    def gpu_time(self) -> list[tuple[str, Taken]]:
        found, self.times = self.times, []
        return found

    def ask(self, key: str | None, tokens: tuple[int, int, int] | None = None, **more: Any) -> None:
        said = b"" if tokens is None else USAGE % tokens
        base = {"model": "demo", "key": key, "status": 200, "usage": said, "events": 0, "metered": None}
        self.requests.append(cast("Ended", tuple({**base, **more}.values())))


def clock_at(unix_s: float) -> Clock:
    clock = Clock()
    clock.now = unix_s
    return clock


def usage_of(folder: Path, source: Source, clock: Clock, kept_days: int = 92) -> KeyUsage:
    return KeyUsage(Metrics(), source.ended, source.gpu_time, UsageFiles(folder / "usage"), kept_days, clock)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> Clock:
    return clock_at(NOON)


# --- counting ---


def test_tokens_are_as_the_engine_says_or_events_or_what_the_limits_count(
    tmp_path: Path, source: Source, clock: Clock
) -> None:
    usage = usage_of(tmp_path, source, clock)
    source.ask("ann", (10, 5, 4))
    source.ask("ann", events=7)  # a stream that does not say
    source.ask("bob", metered=(20, 33))  # of a key whose tokens are limited
    source.ask("bob", usage=b'"usage":{"input_tokens":9,"output_tokens":1}', metered=(20, 39))  # cut off
    source.ask("bob", (10, 5, 0), metered=(20, 15))
    source.ask("eve", (10, 5, 0), status=400)
    source.ask(None, (1, 2, 0))
    source.ask(None, (1, 2, 0), model="unknown")
    usage.count()
    assert usage.today("ann") == Figures(2, 10, 12, 4)
    assert usage.today("bob") == Figures(3, 20 + 9 + 10, 13 + 30 + 5, 0)
    assert usage.today("eve") == Figures(1)
    assert usage.today("") == Figures(1, 1, 2)


def test_metrics_have_the_names_of_keys_and_what_was_idle_is_nobodys(
    tmp_path: Path, source: Source, clock: Clock
) -> None:
    metrics = Metrics()
    usage = KeyUsage(metrics, source.ended, source.gpu_time, UsageFiles(tmp_path), 1, clock)
    source.ask("ann", (10, 5, 4))
    source.times = [("demo", Taken(30.0, 2.0, {"ann": 3.5}))]
    value = metrics.registry.get_sample_value

    def tokens(kind: str) -> float | None:
        return value("warmpool_tokens_total", {"model": "demo", "kind": kind, "key": "ann"})

    def gpu(kind: str, key: str) -> float | None:
        return value("warmpool_gpu_seconds_total", {"model": "demo", "kind": kind, "key": key})

    assert (tokens("prompt"), tokens("completion"), tokens("cached")) == (10, 5, 4), "they are counted when asked for"
    assert (gpu("busy", "ann"), gpu("busy", ""), gpu("idle", "")) == (3.5, 2.0, 30.0)
    assert usage.today("ann").gpu_seconds == 3.5
    assert usage.today("").idle_gpu_seconds == 30.0


async def test_a_day_ends_at_midnight_utc_and_is_kept_so_many_days(
    tmp_path: Path, source: Source, clock: Clock
) -> None:
    usage = usage_of(tmp_path, source, clock, kept_days=2)
    for tokens in (1, 2, 3):
        source.ask("ann", (tokens, 0, 0))
        usage.count()
        clock.now += DAY_S
    assert usage.today("ann") == Figures(), "a new day"
    assert usage.seconds_to_midnight() == DAY_S / 2
    source.ask("ann", (4, 0, 0))
    found = {row["day"]: row["prompt_tokens"] for row in await usage.rows(10)}
    assert found == {"2026-12-02": 4, "2026-12-01": 3, "2026-11-30": 2, "2026-11-29": 1}
    await usage.save()
    assert sorted(path.name for path in (tmp_path / "usage").iterdir()) == ["2026-12-01.json", "2026-12-02.json"]
    assert [row["prompt_tokens"] for row in await usage.rows(2)] == [4, 3]
    assert [row["prompt_tokens"] for row in await usage.rows(1)] == [4]


async def test_another_process_goes_on_where_one_ended(tmp_path: Path, source: Source, clock: Clock) -> None:
    for number in (1, 2, 3):
        usage = usage_of(tmp_path, source, clock)
        await usage.open()
        source.ask("ann", (10, 5, 1))
        source.times = [("demo", Taken(0.0, 0.0, {"ann": 0.5}))]
        await usage.close()
        assert usage.today("ann") == Figures(number, 10 * number, 5 * number, number, 0.5 * number)


async def test_a_clock_that_is_set_back_loses_nothing(tmp_path: Path, source: Source, clock: Clock) -> None:
    usage = usage_of(tmp_path, source, clock)
    await usage.open()
    for offset_s in (0, 10 * DAY_S, 0, 10 * DAY_S):
        clock.now = NOON + offset_s
        source.ask("ann", (10, 0, 0))
        usage.count()
        await usage.save()
    await usage.close()
    rows = {row["day"]: row["prompt_tokens"] for row in await usage.rows(20)}
    assert rows == {"2026-12-09": 20, "2026-11-29": 20}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version":2,"rows":[]}',
        b'{"version":1,"rows":[{"key":"ann"}]}',
        orjson.dumps({"version": 1, "rows": [Day(dt.date(2026, 1, 1), {("a", "b"): Figures(-1)}).as_rows()[0]]}),
    ],
)
async def test_a_damaged_file_is_set_aside_and_counting_goes_on(
    tmp_path: Path, source: Source, clock: Clock, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "usage"
    folder.mkdir(mode=0o700)
    (folder / "2026-11-29.json").write_bytes(content)
    usage = usage_of(tmp_path, source, clock)
    await usage.open()
    source.ask("ann", (10, 5, 0))
    await usage.close()
    assert "is damaged" in caplog.text
    assert (folder / "2026-11-29.damaged").read_bytes() == content
    assert parse(dt.date(2026, 11, 29), (folder / "2026-11-29.json").read_bytes()).at("ann", "demo").tokens == 15


async def test_a_file_that_cannot_be_read_now_is_not_written_over(
    tmp_path: Path, source: Source, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = usage_of(tmp_path, source, clock)
    await first.open()
    source.ask("ann", (10, 0, 0))
    await first.close()
    usage = usage_of(tmp_path, source, clock)
    with monkeypatch.context() as patch:
        patch.setattr(owned, "read_plain", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        await usage.open()
        source.ask("ann", (5, 0, 0))
        usage.count()
        await usage.save()
    assert "Input/output error" in caplog.text
    await usage.close()
    assert [row["prompt_tokens"] for row in await usage.rows(1)] == [15]
    assert (
        parse(dt.date(2026, 11, 29), (tmp_path / "usage" / "2026-11-29.json").read_bytes()).at("ann", "demo").tokens
        == 15
    )


async def test_a_file_system_that_hangs_holds_nobody(
    tmp_path: Path, source: Source, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "_FILES_S", 0.05)
    hangs = threading.Event()
    monkeypatch.setattr(owned, "read_plain", lambda *_: hangs.wait(PATIENCE_S) and b"")
    usage = usage_of(tmp_path, source, clock)
    await usage.open()
    source.ask("ann", (5, 0, 0))
    assert usage.today("ann").tokens == 5
    await usage.close()
    hangs.set()
    assert "the file system does not answer" in caplog.text


COUNTS = st.integers(0, 10**15)
NAMES = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=20)


@given(
    st.dictionaries(
        st.tuples(st.one_of(st.just(""), NAMES), NAMES),
        st.builds(Figures, COUNTS, COUNTS, COUNTS, COUNTS, st.just(1.5), st.just(0.25)),
        max_size=20,
    )
)
def test_what_is_written_is_what_is_read(rows: dict[tuple[str, str], Figures]) -> None:
    day = Day(dt.date(2026, 11, 29), rows)
    assert parse(day.date, day.dump()).rows == rows


@given(st.binary(max_size=200))
def test_whatever_a_file_has_is_read_or_refused(content: bytes) -> None:
    try:
        parse(dt.date(2026, 11, 29), content)
    except ValueError:
        return


# --- through the whole proxy ---


@pytest.fixture
async def budgeted(keyed_of: Any) -> Keyed:
    one: Keyed = await keyed_of({"ann": {"tokens_per_day": 30}, "bob": {}, "gus": {"gpu_seconds_per_day": 1}}, admin={})
    return one


async def used(keyed: Keyed, query: str = "") -> dict[str, Any]:
    found: dict[str, Any] = await get_json(f"{keyed.front.url}/admin/usage{query}")
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_and_gpu_time_are_the_keys(budgeted: Keyed, stream: bool) -> None:
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response, _ = await budgeted.ask("bob", max_tokens=7, ignore_eos=True, **more)
    assert response.status == 200
    rows = {row["key"]: row for row in (await used(budgeted))["rows"]}
    assert (rows["bob"]["model"], rows["bob"]["requests"], rows["bob"]["completion_tokens"]) == ("demo", 1, 7)
    assert rows["bob"]["prompt_tokens"] > 0
    assert rows["bob"]["gpu_seconds"] >= 0
    assert rows[None]["requests"] == 0
    assert rows[None]["idle_gpu_seconds"] > 0, "the start"
    assert budgeted.front.sample("warmpool_tokens_total", model="demo", kind="completion", key="bob") == 7
    assert budgeted.front.sample("warmpool_gpu_seconds_total", model="demo", kind="busy", key="bob") > 0
    assert [row["key"] for row in (await used(budgeted, "?key=bob&days=3"))["rows"]] == ["bob"]


async def test_a_key_over_its_tokens_waits_for_midnight_and_others_do_not(budgeted: Keyed) -> None:
    front = budgeted.front
    for _ in range(2):  # the second begins with some left, and is finished
        response, _ = await budgeted.ask("ann", max_tokens=20, ignore_eos=True)
        assert response.status == 200
    response, answer = await budgeted.ask("ann")
    error = error_of(answer)
    assert (response.status, error["code"]) == (429, "insufficient_quota")
    assert "30 tokens" in error["message"]
    assert 0 < int(response.headers["Retry-After"]) <= DAY_S
    response, answer = await front.post(
        "/v1/messages", {"model": "demo", "max_tokens": 5, "messages": []}, headers=budgeted["ann"]
    )
    assert (response.status, orjson.loads(answer)["error"]["type"]) == (429, "rate_limit_error"), "Anthropic's"
    async with front.session.get("/v1/models", headers=budgeted["ann"]) as looked:
        assert looked.status == 200, "who only looks uses nothing"
    response, _ = await budgeted.ask("bob")
    assert response.status == 200
    assert front.sample("warmpool_refused_total", reason="budget") == 2
    (budget,) = (await used(budgeted, "?key=ann"))["budgets"].values()
    assert (budget["tokens_per_day"], budget["gpu_seconds_per_day"]) == (30, None)
    assert budget["tokens_today"] >= 40

    front.auth.reload()
    assert (await budgeted.ask("ann"))[0].status == 429, "a reload forgives nothing"
    budgeted.change("ann", tokens_per_day=1000)
    front.auth.reload()
    assert (await budgeted.ask("ann"))[0].status == 200


async def test_streams_that_say_nothing_cost_as_much_of_a_budget(budgeted: Keyed) -> None:
    statuses = []
    for _ in range(4):
        response, _ = await budgeted.ask("ann", max_tokens=20, ignore_eos=True, stream=True)
        statuses.append(response.status)
    assert (statuses[0], statuses[2:]) == (200, [429, 429])


async def test_a_key_over_its_gpu_time_is_refused_while_its_stream_runs_on(budgeted: Keyed) -> None:
    held = {**ASK, "stream": True, "vllm_xargs": {"fault": "hold_mid_stream"}}
    running = asyncio.create_task(budgeted.front.post("/v1/completions", held, headers=budgeted["gus"]))
    async with asyncio.timeout(PATIENCE_S):
        while (await used(budgeted, "?key=gus"))["budgets"]["gus"]["gpu_seconds_today"] < 1:
            await asyncio.sleep(0.05)
        response, answer = await budgeted.ask("gus")
        assert (response.status, error_of(answer)["code"]) == (429, "insufficient_quota")
        await budgeted.front.release()
        assert (await running)[0].status == 200


async def test_what_is_asked_of_usage_is_checked(budgeted: Keyed) -> None:
    for query in ("?days=0", "?days=x", "?days=99999", "?model=demo"):
        async with budgeted.front.session.get(f"/admin/usage{query}") as response:
            assert response.status == 400, query
    async with budgeted.front.session.get("/admin/usage", headers={"X-Forwarded-For": "1.2.3.4"}) as response:
        assert response.status == 403


def keyed_proxy(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings with a key `ann` of 30 tokens a day, and what shows it."""
    folder.mkdir(exist_ok=True)
    with api_keys.changing(folder / "keys.toml") as entries:
        id_, key, entries[id_] = api_keys.generate("ann", tokens_per_day=30)
    settings = {"models": {"demo": engine_model()}, "server": {"keys_file": str(folder / "keys.toml")}}
    return settings, {"Authorization": f"Bearer {key}"}


async def test_usage_survives_a_restart_and_kill_9_but_for_the_last_seconds(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    settings, headers = keyed_proxy(folder)
    ask = {**ASK, "max_tokens": 20, "ignore_eos": True}

    async def answered(proxy: Proxy) -> int:
        async with proxy.session.post("/v1/completions", json=ask, headers=headers) as response:
            await response.read()
            return response.status

    first = await Proxy(folder, settings=settings).listening()
    assert await answered(first) == 200
    first.process.send_signal(signal.SIGTERM)
    await first.ended()
    second = await Proxy(folder, settings=settings).listening()
    before = (await get_json(f"{second.url}/admin/usage"))["rows"]
    assert next(row for row in before if row["key"] == "ann")["completion_tokens"] == 20
    assert await answered(second) == 200
    assert await answered(second) == 429, "those before the restart count"
    files = folder / "state" / "usage"
    async with asyncio.timeout(PATIENCE_S):
        while not any(b'"completion_tokens":40' in path.read_bytes() for path in files.glob("*.json")):
            await asyncio.sleep(0.1)
    second.process.send_signal(signal.SIGKILL)
    await second.ended()
    third = await Proxy(folder, settings=settings).listening()
    assert await answered(third) == 429
    result = await asyncio.to_thread(run, "--url", third.url)
    lines = result.output.splitlines()
    assert lines[0].split() == ["KEY", "MODEL", "REQUESTS", "PROMPT", "CACHED", "ANSWER", "GPU", "IDLE"]
    assert any(line.split()[:3] == ["ann", "demo", "2"] for line in lines)
    assert any(line.startswith("ann: ") and "of 30 tokens today" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)
    as_json = orjson.loads((await asyncio.to_thread(run, "ann", "--days", "2", "--json", "--url", third.url)).output)
    assert {row["key"] for row in as_json["rows"]} == {"ann"}
    third.process.send_signal(signal.SIGTERM)
    await third.ended()


def run(*words: str) -> Any:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(cli, ["key", "usage", *words])
    assert result.exit_code == 0, result.output
    return result
