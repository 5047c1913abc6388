"""The section `runtime`: the runtimes that start engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from proxy.config.fields import Duration, Section

PortRange = Annotated[str, Field(pattern=r"^\d{1,5}-\d{1,5}$")]


class _Ports(Section):
    """Settings with a range of ports."""

    ports: PortRange

    @model_validator(mode="after")
    def _ports_are_a_range(self) -> Self:
        first, last = self.port_range()
        if not 1024 <= first <= last <= 65535:
            raise ValueError("ports must be FIRST-LAST with 1024 <= FIRST <= LAST <= 65535")
        return self

    def port_range(self) -> tuple[int, int]:
        """First and last port, both included."""
        first, last = self.ports.split("-")
        return int(first), int(last)


class ProcessRuntimeSettings(_Ports):
    """Engines as plain local processes."""

    ports: PortRange = Field(
        default="18100-18999",
        description="Loopback ports for engines. Outside the kernel's ephemeral range, or a restored engine may find "
        "its port taken.",
    )
    criu: str = Field(default="criu", description="The CRIU binary: a name in PATH, or a path.")
    stop_grace: Duration = Field(default=5.0, description="Time between SIGTERM and SIGKILL of an engine.")


class PodmanRuntimeSettings(_Ports):
    """Engines in podman containers (rootful)."""

    ports: PortRange = Field(
        default="19100-19999",
        description='Loopback ports for engines with network = "host", outside the kernel\'s ephemeral range.',
    )
    socket: Path = Field(
        default=Path("/run/podman/podman.sock"),
        description="podman's REST API. Where nobody listens there, warmpool starts `podman system service` itself.",
    )
    timeout: Duration = Field(
        default=20.0,
        gt=0,
        description="How long podman's service may take to answer, beside the time that the work of a call takes; then "
        "the call has failed. A service of warmpool's own that says nothing for as long is started again.",
    )
    stop_grace: Duration = Field(
        default=10.0, description="Time between SIGTERM and SIGKILL of an engine; whole seconds."
    )
    on_exit: Literal["keep", "stop"] = Field(
        default="keep",
        description="What becomes of running engines when warmpool ends: kept for the next one to adopt, or stopped.",
    )


class RuntimeSettings(Section):
    """The runtimes that start engines."""

    process: ProcessRuntimeSettings = ProcessRuntimeSettings()
    podman: PodmanRuntimeSettings = PodmanRuntimeSettings()
