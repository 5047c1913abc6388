"""Check of whether engines get fresh randomness after a restore."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.doctor.report import Check
from proxy.engine import kinds

if TYPE_CHECKING:
    from proxy.doctor.needs import Situation


async def randomness(it: Situation) -> list[Check]:
    """As far as the configuration says it; the engine has the last word, in the log and the status."""
    name = "randomness"
    keys = [key for key in it.needs.models if it.needs.is_checkpointed(key)]
    if not keys:
        return [Check(name, "skip", "no model is ever checkpointed")]
    models = [(key, it.needs.models[key]) for key in keys]
    gaps = {key: gap for key, model in models if (gap := kinds.of(model).reseed_gap(model)) is not None}
    if not gaps:
        return [Check(name, "ok", "engines draw new random numbers after a restore")]
    text = "; ".join(f"models.{key}: {gap}" for key, gap in gaps.items())
    fix = "\n".join(f"set models.{key}.engine, or models.{key}.reseed" for key in gaps)
    return [Check(name, "warn", f"without a seed, answers repeat after each restore: {text}", fix)]
