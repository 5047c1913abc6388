"""The section `tracing`: traces of requests by OpenTelemetry."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from proxy.config.fields import Section


class TracingSettings(Section):
    """Traces of requests by OpenTelemetry; needs the extra `otel`."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[!-~]+$")] | None = Field(
        default=None,
        description="Where spans go: OTLP over HTTP with protobuf. Without, there are none.",
        examples=["http://127.0.0.1:4318/v1/traces"],
    )
    sample: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=1.0,
        description="The share of requests to trace. One that comes with a `traceparent` is traced if its caller says "
        "so.",
    )
    service_name: str = Field(default="warmpool", min_length=1, description="What traces call this server.")
