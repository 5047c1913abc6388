"""Traces: what a collector gets by OTLP, what the engine gets, and that nothing is there when it is off."""

from __future__ import annotations

import gzip
import re
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from proxy.config.tracing import TracingSettings
from proxy.errors import HostError
from proxy.server.forward import tracing
from tests.front import Front
from tests.server.test_http import ASK
from tests.support import PYTHON, ROOT, engine_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

SECRET = "nobody-may-see-this"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Span:
    """What a test wants to know of one."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    failed: str | None


@dataclass
class Collector:
    """An OTLP receiver."""

    spans: list[Span] = field(default_factory=list)
    service: str = ""
    calls: int = 0

    async def take(self, request: web.Request) -> web.Response:
        self.calls += 1
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        message = ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            self.service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                self.spans += [
                    Span(
                        s.name, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex(), s.kind,
                        s.start_time_unix_nano, s.end_time_unix_nano, _values(s.attributes),
                        s.status.message if s.status.code == 2 else None,
                    )
                    for s in scope.spans
                ]  # fmt: skip
        return web.Response(body=b"", content_type="application/x-protobuf")

    def named(self, name: str) -> list[Span]:
        found = [span for span in self.spans if span.name == name]
        assert found, f"{self.calls} calls, spans {[span.name for span in self.spans]}"
        return found

    def below(self, parent: Span) -> list[Span]:
        return sorted((s for s in self.spans if s.parent == parent.id), key=lambda s: s.began_ns)


def _values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


@pytest.fixture
async def collected(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Collector]]]:
    """Runs requests against a front that traces, closes it, and gives what the collector got."""
    collector = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", collector.take)
    server = TestServer(app)
    await server.start_server()

    async def run(work: Callable[[Front], Coroutine[Any, Any, None]], **settings: Any) -> Collector:
        endpoint = str(server.make_url("/v1/traces"))
        front = Front(tmp_path, {"demo": engine_model()}, tracing={"endpoint": endpoint, **settings})
        await front.open()
        try:
            await work(front)
        finally:
            await front.close()
        return collector

    yield run
    await server.close()


async def test_a_request_is_a_span_with_the_wake_its_stages_and_the_engine_below(collected: Any) -> None:
    passed_on: list[str] = []

    async def work(front: Front) -> None:
        headers = {"traceparent": CALLER, "tracestate": "vendor=1", "x-request-id": "abc-1"}
        response, _ = await front.post("/v1/completions", ASK, headers=headers)
        assert response.status == 200
        passed_on.append((await front.engine_state())["last_traceparent"])
        await front.post("/v1/completions", ASK)

    got = await collected(work, service_name="pool-1")
    assert got.service == "pool-1"
    first, second = got.named("POST /v1/completions")
    assert (first.trace, first.parent, first.kind) == (CALLER[3:35], CALLER[36:52], 2)
    assert first.attributes["http.response.status_code"] == 200
    assert first.attributes["warmpool.tier"] == "stopped"
    assert first.attributes["warmpool.request_id"] == "abc-1"
    assert first.failed is None
    wake, engine = got.below(first)
    assert (wake.name, engine.name, engine.kind) == ("wake", "engine", 3)
    assert wake.attributes["warmpool.woken_from"] == "stopped"
    stages = got.below(wake)
    assert [stage.name for stage in stages][:3] == ["start", "load", "warmup"]
    for stage in stages:
        assert wake.began_ns - 1_000_000 <= stage.began_ns <= stage.ended_ns <= wake.ended_ns + 1_000_000
    assert first.began_ns <= engine.began_ns <= engine.ended_ns <= first.ended_ns
    assert passed_on == [f"00-{first.trace}-{engine.id}-01"], "the engine's spans belong below ours"
    assert second.trace != first.trace
    assert [span.name for span in got.below(second)] == ["engine"]
    text = repr(got.spans)
    assert "Hello" not in text, "no prompt"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engines_span_says_by_the_conventions_what_it_did_and_never_what_was_said(
    collected: Any, stream: bool
) -> None:
    """https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans."""
    answers: list[str] = []

    async def work(front: Front) -> None:
        body = {"model": "demo", "max_tokens": 5, "ignore_eos": True, "messages": [{"role": "user", "content": SECRET}]}
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        _, answer = await front.post("/v1/chat/completions", {**body, **more})
        answers.append(answer.decode())
        await front.post("/v1/completions", ASK)
        await front.post("/tokenize", {"model": "demo", "prompt": SECRET})

    got = await collected(work)
    chat, completion, tokenize = (span.attributes for span in got.named("engine"))
    usage = re.findall(r'"usage": *({"prompt_tokens"[^}]*})', answers[0])[-1]
    assert chat["gen_ai.usage.input_tokens"] == orjson.loads(usage)["prompt_tokens"]
    assert chat["gen_ai.usage.output_tokens"] == 5
    assert (chat["gen_ai.operation.name"], chat["gen_ai.provider.name"]) == ("chat", "openai")
    assert (chat["gen_ai.request.model"], chat["gen_ai.response.model"]) == ("demo", "demo")
    assert [reason.string_value for reason in chat["gen_ai.response.finish_reasons"].values] == ["length"]
    assert completion["gen_ai.operation.name"] == "text_completion"
    assert not [name for name in tokenize if name.startswith("gen_ai")]
    request = got.named("POST /v1/chat/completions")[0]
    assert not [name for name in request.attributes if name.startswith("gen_ai")], "each token once"
    assert SECRET not in repr(got.spans)


async def test_failures_are_marked(collected: Any) -> None:
    async def work(front: Front) -> None:
        await front.post("/v1/completions", {**ASK, "model": "none"})
        await front.post("/v1/completions", ASK)
        front.pool.drain("demo")
        await front.post("/v1/completions", ASK)

    refused, served, closed = (await collected(work)).named("POST /v1/completions")
    assert (refused.attributes["http.response.status_code"], refused.failed) == (404, None)
    assert served.failed is None
    assert (closed.attributes["http.response.status_code"], closed.failed) == (503, "status 503")


async def test_a_callers_choice_counts_before_the_share(collected: Any) -> None:
    async def work(front: Front) -> None:
        await front.post("/v1/completions", ASK)
        await front.post("/v1/completions", ASK, headers={"traceparent": CALLER})
        await front.post("/v1/completions", ASK, headers={"traceparent": CALLER[:-2] + "00"})

    assert [span.trace for span in (await collected(work, sample=0)).named("POST /v1/completions")] == [CALLER[3:35]]


async def test_a_collector_that_is_not_there_harms_no_request(tmp_path: Path) -> None:
    front = Front(tmp_path, {"demo": engine_model()}, tracing={"endpoint": "http://127.0.0.1:9/v1/traces"})
    await front.open()
    assert (await front.post("/v1/completions", ASK))[0].status == 200
    await front.close()


async def test_a_collector_that_is_not_there_brings_no_key_of_it_into_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = "http://user:hunter2@127.0.0.1:9/v1/traces?api-key=hunter3"
    front = Front(tmp_path, {"demo": engine_model()}, tracing={"endpoint": endpoint})
    await front.open()
    response, _ = await front.post("/v1/completions", ASK)
    assert response.status == 200
    await front.close()
    assert "Max retries exceeded" in caplog.text
    assert "hunter" not in caplog.text


async def test_what_a_client_sends_as_context_is_not_logged_and_its_path_is_no_attribute(
    collected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(front: Front) -> None:
        for state in ("my-secret", "my secret=1", "MY-SECRET=1,a=1,a=2"):
            async with front.session.get(
                "/v1/responses/resp_secret?model=demo", headers={"traceparent": CALLER, "tracestate": state}
            ) as response:
                assert response.status == 404

    found = await collected(work)
    assert found.named("GET /v1/responses/{id}")[0].attributes["url.path"] == "/v1/responses/{id}"
    assert "secret" not in caplog.text.lower()


async def test_off_the_context_passes_through_as_it_is(front: Front) -> None:
    await front.post("/v1/completions", ASK, headers={"traceparent": CALLER})
    assert (await front.engine_state())["last_traceparent"] == CALLER


def test_off_nothing_is_imported() -> None:
    code = "import sys, proxy.cli.run_server; print([m for m in sys.modules if m.startswith('opentelemetry')])"
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert tracing.start(TracingSettings()) is None


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(HostError, match="make install EXTRAS=otel"):
        tracing.start(TracingSettings(endpoint="http://127.0.0.1:4318/v1/traces"))
