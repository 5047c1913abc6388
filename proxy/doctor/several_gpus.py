"""Check of engines that use several GPUs: how they are set up, and what came of their trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proxy.doctor.report import Check
from proxy.runtime.ladder_probes import FILE, LadderProbes
from proxy.tiers import Tier

if TYPE_CHECKING:
    from proxy.config.model import ModelSettings
    from proxy.doctor.needs import Situation

ENVIRONMENT: Final = {
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
}
"""With these vLLM 0.20.2 came back from a suspend on two GPUs, driver 580; without the first two it did not."""
OPTION: Final = "--disable-custom-all-reduce"


async def several_gpus(it: Situation) -> list[Check]:
    """No row where no model uses several."""
    name, models = "several GPUs", it.needs.models
    probes = LadderProbes(it.host.path(it.needs.state_dir() / FILE))
    probes.load()
    left_out = {key: probes.missing(key) for key in models}
    tried = [
        f"models.{key}: without {', '.join(tier.label for tier in tiers)}: {next(iter(tiers.values()))}"
        for key, tiers in left_out.items()
        if tiers
    ]
    wide = {key: model for key, model in models.items() if model.gpus_an_engine > 1}
    missing = {
        key: lacking
        for key, model in wide.items()
        if not left_out[key] and not model.idle.timetable().keys().isdisjoint({Tier.SUSPENDED, Tier.CHECKPOINTED})
        if (lacking := _lacking(model))
    }
    fix = "\n".join(
        f'models.{key}: {" ".join(_lacking(models[key]))}, or idle.suspended and idle.checkpointed = "never"'
        for key in (*missing, *(key for key, tiers in left_out.items() if tiers))
        if _lacking(models[key])
    )
    if tried:
        return [Check(name, "warn", "; ".join(tried), fix or "warmpool checkpoint create MODEL tries it again")]
    if missing:
        text = "; ".join(f"models.{key} without {', '.join(lacking)}" for key, lacking in missing.items())
        return [Check(name, "warn", f"with driver 580 an engine may not come back from a suspend; {text}", fix)]
    if wide:
        text = ", ".join(f"models.{key} on {model.gpus_an_engine}" for key, model in wide.items())
        return [Check(name, "ok", f"{text}: whether it comes back is tried before its suspends are relied on")]
    return []


def _lacking(model: ModelSettings) -> list[str]:
    """The settings that it does not have."""
    table = model.podman or model.process
    assert table is not None  # noqa: S101 - a model has one
    given = {name: value.get_secret_value() for name, value in table.env.items()}
    lacking = [f"{name}={value}" for name, value in ENVIRONMENT.items() if given.get(name) != value]
    return lacking if model.names_option(OPTION) else [*lacking, OPTION]
