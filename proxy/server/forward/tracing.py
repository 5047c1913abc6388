"""Traces by OpenTelemetry: a span for each request, and below it the wake with its stages and the engine's part.

The extra `otel` brings the SDK; it is imported when `tracing.endpoint` is set, and nothing here costs
anything otherwise. Spans carry what the log line has, never a prompt or an answer. Names follow OpenTelemetry's
semantic conventions for HTTP, and `gen_ai` those for generative AI, where these have one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from proxy.config.masking import MASK
from proxy.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

    from proxy.config.tracing import TracingSettings
    from proxy.pool.lease import Lease

CONTEXT_FIELDS: Final = frozenset({b"traceparent", b"tracestate"})
"""What carries the context from hop to hop (W3C Trace Context)."""
_FLUSH_S: Final = 2.0


def start(settings: TracingSettings) -> Tracing | None:
    """What traces requests, or None where no endpoint is set. Raises HostError without the extra."""
    if settings.endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise HostError(f"tracing.endpoint needs the extra otel (make install EXTRAS=otel): {error}") from error
    _keep_out_of_the_log(urlsplit(settings.endpoint).query)
    return Tracing(settings, OTLPSpanExporter(endpoint=settings.endpoint))


def _keep_out_of_the_log(query: str) -> None:
    """The exporter tells what it could not reach, query and all, where a collector may want its key."""
    if not query:
        return

    def mask(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(query, MASK), ()
        record.exc_info = record.exc_text = None
        return True

    for name in ("opentelemetry.exporter.otlp.proto.http.trace_exporter", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(mask)


class Tracing:
    """Makes spans and hands them to `exporter`, from a thread of the SDK's."""

    def __init__(self, settings: TracingSettings, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        from proxy import __version__

        # It warns of a malformed `tracestate` by quoting it.
        logging.getLogger("opentelemetry.trace").setLevel(logging.CRITICAL)
        resource = Resource.create({"service.name": settings.service_name, "service.version": __version__})
        provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(settings.sample), resource=resource, shutdown_on_exit=False
        )
        self._exporter = exporter
        self._processor = BatchSpanProcessor(exporter)
        provider.add_span_processor(self._processor)
        self._tracer: Tracer = provider.get_tracer("warmpool", __version__)

    def request(self, method: str, route: str, headers: Mapping[str, str]) -> Trace:
        """Begin the span of a request, as a child of the one that its headers name."""
        return Trace(self._tracer, method, route, headers)

    async def close(self, _: object = None) -> None:
        """Send what is left, within a few seconds; for `on_cleanup`."""
        try:
            async with asyncio.timeout(_FLUSH_S):  # its own limit is not kept (opentelemetry-python#4568)
                await asyncio.to_thread(self._processor.force_flush)
        except TimeoutError:
            pass
        self._exporter.shutdown()  # ends an export that is being tried again
        await asyncio.to_thread(self._processor.shutdown)


class Trace:
    """The spans of one request; `end` must be called."""

    __slots__ = ("_engine", "_request", "_shown", "_tracer")

    def __init__(self, tracer: Tracer, method: str, route: str, headers: Mapping[str, str]) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        self._tracer = tracer
        self._request: Span = tracer.start_span(
            f"{method} {route}",
            TraceContextTextMapPropagator().extract(carrier),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "url.path": route},
        )
        self._engine: Span | None = None
        self._shown: object = None

    def asks(self, lease: Lease) -> Sequence[tuple[bytes, bytes]]:
        """A lease was granted, and its engine is asked now; the header fields to ask it with."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._answered("another engine was asked")
        if lease.wake is not None and lease.wake is not self._shown:
            self._shown = lease.wake
            self._show_wake(lease)
        here = set_span_in_context(self._request)
        attributes = {"warmpool.instance": lease.instance_id}
        self._engine = self._tracer.start_span("engine", here, SpanKind.CLIENT, attributes)
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self._engine))
        return [(name.encode(), value.encode()) for name, value in carrier.items()]

    def _show_wake(self, lease: Lease) -> None:
        """The wake as it was, which may have begun before the request came."""
        from opentelemetry.trace import set_span_in_context

        wake = lease.wake
        assert wake is not None  # noqa: S101 - looked at before
        began_s = wake.at_unix_s - wake.seconds
        attributes = {
            "warmpool.instance": lease.instance_id,
            "warmpool.tier": wake.found.label,
            "warmpool.woken_from": wake.reached_from.label,
        }
        here = set_span_in_context(self._request)
        span = self._tracer.start_span("wake", here, attributes=attributes, start_time=_ns(began_s))
        below = set_span_in_context(span)
        for name, seconds in wake.stages.items():
            at_s = began_s + wake.starts.get(name, 0.0)
            self._tracer.start_span(name, below, start_time=_ns(at_s)).end(_ns(at_s + seconds))
        span.end(_ns(wake.at_unix_s))

    def _answered(self, failure: str | None = None) -> None:
        span, self._engine = self._engine, None
        if span is not None:
            if failure is not None:
                _fail(span, failure)
            span.end()

    def end(self, facts: Mapping[str, Any], of_engine: Mapping[str, Any]) -> None:
        """The request is over; `facts` as in its log line, and attributes for the span of the engine."""
        status = facts["status"]
        broken = facts.get("broken")
        if self._engine is not None:
            self._engine.set_attributes(dict(of_engine))
        self._answered(broken)
        attributes = {
            "http.response.status_code": status,
            "http.response.body.size": facts.get("bytes"),
            "warmpool.model": facts.get("model"),
            "warmpool.tier": facts.get("tier"),
            "warmpool.instance": facts.get("instance"),
            "warmpool.request_id": facts.get("request_id"),
            "warmpool.first_byte_ms": facts.get("first_byte_ms"),
        }
        self._request.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if broken is not None or status >= 500:
            _fail(self._request, broken or f"status {status}")
        self._request.end()


def _fail(span: Span, reason: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, reason))


def _ns(unix_s: float) -> int:
    """Nanoseconds, as OpenTelemetry counts; `time.time` in seconds is good to a microsecond."""
    return round(unix_s * 1e6) * 1000
