"""What was tried of engines that use several GPUs: whether they come back from a suspend, and from their image.

Whether they do is a matter of the driver and of how their ranks reach each other, so nothing relies on it before it was
tried once. What came of it is kept over restarts, for the very engine that it was tried with.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from proxy.host import owned
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

log = logging.getLogger("warmpool.runtime")

FILE: Final = "gpu-probes.json"
"""In the state folder."""
_LIMIT_BYTES: Final = 1 << 20
_NEEDS: Final = {Tier.SUSPENDED: Tier.SUSPENDED, Tier.CHECKPOINTED: Tier.CHECKPOINTED, Tier.ARCHIVED: Tier.CHECKPOINTED}
"""Tier → what has to be possible for it, beside all that is before."""


class _Saved(BaseModel):
    """One model in the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    engine: Annotated[str, Field(max_length=200)]
    results: Annotated[dict[str, Annotated[str, Field(max_length=2000)]], Field(max_length=10)]


_FORM: Final = TypeAdapter(Annotated[dict[str, _Saved], Field(max_length=10_000)])


@dataclass(slots=True)
class _Results:
    engine: str
    """The fingerprint of the engine that it was tried with."""
    tiers: dict[Tier, str] = field(default_factory=dict)
    """Why an engine does not come back from there; empty where it does."""


class LadderProbes:
    """By model. In memory where there is no `path`; a file that cannot be used counts as none."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._results: dict[str, _Results] = {}

    def load(self) -> None:
        """Take over what was saved."""
        if self._path is None:
            return
        try:
            saved = _FORM.validate_json(owned.read_plain(self._path, _LIMIT_BYTES))
            self._results = {
                key: _Results(entry.engine, {Tier[name.upper()]: reason for name, reason in entry.results.items()})
                for key, entry in saved.items()
            }
        except FileNotFoundError:
            return
        except (OSError, ValidationError, KeyError) as error:
            log.warning("%s: %s; what it says is tried again", self._path, type(error).__name__)

    def missing(self, key: str) -> Mapping[Tier, str]:
        """The tiers that a model's engines do not come back from, and why."""
        found = self._results.get(key)
        if found is None:
            return {}
        suspended = found.tiers.get(Tier.SUSPENDED, "")
        reasons = {tier: suspended or found.tiers.get(needed, "") for tier, needed in _NEEDS.items()}
        return {tier: reason for tier, reason in reasons.items() if reason}

    def known(self, key: str, engine: str, tier: Tier) -> bool:
        """Whether it was tried with this engine."""
        found = self._results.get(key)
        return found is not None and found.engine == engine and tier in found.tiers

    async def started(self, key: str, engine: str) -> None:
        """An engine was started: what was tried with another one says nothing about it."""
        found = self._results.get(key)
        if found is not None and found.engine != engine:
            await self.forget(key)

    async def note(self, key: str, engine: str, tier: Tier, reason: str = "") -> None:
        """Keep what came of it; `reason`: why it does not come back."""
        found = self._results.get(key)
        if found is None or found.engine != engine:
            found = self._results[key] = _Results(engine)
        found.tiers[tier] = reason[:2000]
        await asyncio.to_thread(self._save, self._as_bytes())

    async def forget(self, key: str) -> None:
        """It is tried again."""
        if self._results.pop(key, None) is not None:
            await asyncio.to_thread(self._save, self._as_bytes())

    def _as_bytes(self) -> bytes:
        saved = {
            key: _Saved(engine=found.engine, results={tier.label: reason for tier, reason in found.tiers.items()})
            for key, found in self._results.items()
        }
        return _FORM.dump_json(saved)

    def _save(self, content: bytes) -> None:
        if self._path is None:
            return
        try:
            if not self._path.parent.is_dir():
                owned.claim(self._path.parent)  # a cleaner removed it
            with owned.replacing(self._path) as file:
                file.write(content)
        except OSError as error:
            log.warning("%s: %s", self._path, error.strerror)
