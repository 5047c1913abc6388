"""Lines of the log: those of requests are written together, and look as every other line does."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.server.forward import access_log
from proxy.telemetry import logs


@pytest.fixture
def only_lines(monkeypatch: pytest.MonkeyPatch) -> list[logs.Lines]:
    """The handlers of the root logger, for a test to set."""
    handlers: list[logs.Lines] = []
    monkeypatch.setattr(logging.root, "handlers", handlers)
    return handlers


@pytest.mark.parametrize("format_", ["text", "journal"])
async def test_a_line_of_a_request_looks_as_one_of_a_record(format_: str, only_lines: list[logs.Lines]) -> None:
    stream = io.StringIO()
    lines = logs.Lines(stream, logs._formatter(format_))
    only_lines[:] = [lines]
    assert logs.lines_of_requests() is lines
    for _ in range(3):  # both may fall on two sides of a second
        second = int(time.time())
        lines.add("request_id=1 status=200")
        lines.flush()
        logging.getLogger("warmpool.request").warning("request_id=1 status=200")
        first, other = stream.getvalue().splitlines()
        if int(time.time()) == second:
            break
        stream.truncate(stream.seek(0))
    assert first == other.replace("WARNING", "INFO   ").replace("<4>", "<6>")


async def test_lines_are_written_at_the_end_of_a_turn_and_before_what_comes_after_them(
    only_lines: list[logs.Lines],
) -> None:
    stream = io.StringIO()
    lines = logs.Lines(stream, logging.Formatter("%(message)s"))
    only_lines[:] = [lines]
    lines.add("one")
    lines.add("two")
    assert stream.getvalue() == ""
    await asyncio.sleep(0)
    assert stream.getvalue() == "one\ntwo\n"
    lines.add("three")
    logging.getLogger("warmpool").warning("four")
    assert stream.getvalue() == "one\ntwo\nthree\nfour\n"
    lines.add("five")
    lines.flush()  # as at the end of the process
    assert stream.getvalue().endswith("four\nfive\n")
    await asyncio.sleep(0)
    stream.close()
    lines.add("six")
    await asyncio.sleep(0)  # nobody is told, and nothing fails


def test_without_a_loop_nothing_waits() -> None:
    stream = io.StringIO()
    lines = logs.Lines(stream, logging.Formatter("%(message)s"))
    lines.add("one")
    assert stream.getvalue() == "one\n"


def test_json_and_other_handlers_get_records(only_lines: list[logs.Lines]) -> None:
    only_lines[:] = [logs.Lines(io.StringIO(), logs._formatter("json"))]
    assert logs.lines_of_requests() is None
    only_lines[:] = [logs.Lines(io.StringIO(), logs._formatter("text"))] * 2
    assert logs.lines_of_requests() is None


@given(
    key=st.none() | st.sampled_from(["app"]),
    first_byte_s=st.none() | st.floats(0, 1e5),
    total_s=st.floats(0, 1e5),
    broken=st.none() | st.just("the connection ended"),
)
def test_the_short_way_to_a_line_comes_to_the_same_line(
    key: str | None, first_byte_s: float | None, total_s: float, broken: str | None
) -> None:
    facts: dict[str, Any] = {
        "request_id": "1", "path": "/v1/completions", "key": key, "model": "m", "status": 200, "instance": "m-1",
        "first_byte_s": first_byte_s, "total_s": total_s, "size": 7, "broken": broken,
    }  # fmt: skip
    assert access_log.ready_message(**facts) == access_log.message_of(
        access_log.facts(method="POST", tier="ready", **facts)
    )
