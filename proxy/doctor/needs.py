"""What the configuration asks of the host, and what the checks have to go on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import orjson

from proxy.config.pool import PoolSettings
from proxy.config.runtime import RuntimeSettings
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from proxy.config.engine import PodmanEngineSettings
    from proxy.config.model import ModelSettings
    from proxy.config.settings import Settings
    from proxy.doctor.view import Host, Ran


@dataclass(frozen=True, slots=True)
class Needs:
    """A configuration, or, without one, what it takes to checkpoint engines in podman."""

    pool: PoolSettings
    runtime: RuntimeSettings
    models: Mapping[str, ModelSettings]
    configured: bool

    @staticmethod
    def of(settings: Settings | None) -> Needs:
        """Of these settings; None where there is no configuration."""
        if settings is None:
            return Needs(PoolSettings(), RuntimeSettings(), {}, configured=False)
        return Needs(settings.pool, settings.runtime, settings.models, configured=True)

    @property
    def podman(self) -> Mapping[str, PodmanEngineSettings]:
        """The engines in containers, by the model's key."""
        return {key: model.podman for key, model in self.models.items() if model.podman is not None}

    @property
    def uses_podman(self) -> bool:
        """Whether engines run in podman."""
        return not self.configured or bool(self.podman)

    def is_checkpointed(self, key: str) -> bool:
        """Whether engines of a model are ever checkpointed."""
        return not {Tier.CHECKPOINTED, Tier.ARCHIVED}.isdisjoint(self.models[key].idle.timetable())

    @property
    def checkpoints(self) -> bool:
        """Whether any engine is ever checkpointed."""
        return not self.configured or any(map(self.is_checkpointed, self.models))

    @property
    def runtime_name(self) -> Literal["podman", "process"]:
        """The runtime that a test of checkpointing has to use."""
        return "podman" if "podman" in self._checkpointing() else "process"

    def _checkpointing(self) -> set[str]:
        """The runtimes that have engines to checkpoint."""
        if not self.configured:
            return {"podman"}
        return {model.runtime for key, model in self.models.items() if self.is_checkpointed(key)}

    def criu_programs(self) -> dict[str, list[str]]:
        """Each CRIU that is used, and the keys of the models that named it (none: it is the common one)."""
        programs: dict[str, list[str]] = {}
        if "podman" in self._checkpointing():
            programs["criu"] = []
        if "process" in self._checkpointing():
            programs.setdefault(self.runtime.process.criu, [])
        for key, engine in self.podman.items():
            if engine.criu.program is not None and self.is_checkpointed(key):
                programs.setdefault(str(engine.criu.program), []).append(key)
        return programs

    def gpu_models(self) -> dict[str, list[str]]:
        """The models that name NVIDIA devices, and which."""
        named = {key: [d for d in engine.devices if "nvidia" in d] for key, engine in self.podman.items()}
        return {key: devices for key, devices in named.items() if devices}

    def state_dir(self) -> Path:
        """`pool.state_dir`, from the root."""
        return self.pool.state_dir.absolute()


@dataclass(frozen=True, slots=True)
class PodmanFacts:
    """What `podman info` says; empty texts where it does not say."""

    reason: str = ""
    """Why there is nothing; empty when podman answered."""
    version: str = ""
    runtime: str = ""
    runtime_version: str = ""
    cgroup_version: str = ""
    rootless: bool = False
    seccomp: bool = True
    seccomp_profile: str = ""
    network_backend: str = ""
    netavark: str = ""
    """Its path."""

    @staticmethod
    def of(ran: Ran) -> PodmanFacts:
        """From the output of `podman info --format json`, which may have warnings before the JSON."""
        if ran.status != 0:
            return PodmanFacts(reason=ran.reason())
        try:
            answer = orjson.loads(ran.output[max(0, ran.output.find("{")) :])
        except orjson.JSONDecodeError:
            return PodmanFacts(reason=f"podman info does not answer JSON: {ran.reason()}")
        return PodmanFacts(
            version=_text(answer, "version", "Version"),
            runtime=_text(answer, "host", "ociRuntime", "name"),
            runtime_version=_text(answer, "host", "ociRuntime", "version"),
            cgroup_version=_text(answer, "host", "cgroupVersion"),
            rootless=_at(answer, "host", "security", "rootless") is True,
            seccomp=_at(answer, "host", "security", "seccompEnabled") is not False,
            seccomp_profile=_text(answer, "host", "security", "seccompProfilePath"),
            network_backend=_text(answer, "host", "networkBackend"),
            netavark=_text(answer, "host", "networkBackendInfo", "path"),
        )


def _at(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: Any, *path: str) -> str:
    found = _at(value, *path)
    return found if isinstance(found, str) else ""


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a check may look at."""

    needs: Needs
    host: Host
    podman: PodmanFacts = field(default_factory=PodmanFacts)
