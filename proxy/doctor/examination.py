"""All checks, the repairs that are safe, and the self-test, in the order in which they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from proxy.doctor import containers, dumps, gpus, memory, network, selftest
from proxy.doctor.named_files import named_files
from proxy.doctor.needs import Needs, PodmanFacts, Situation
from proxy.doctor.randomness import randomness
from proxy.doctor.report import Check, exit_status
from proxy.doctor.several_gpus import several_gpus
from proxy.errors import WarmpoolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from proxy.config.settings import Settings
    from proxy.doctor.selftest import MakeRuntime
    from proxy.doctor.view import Host

    Examine = Callable[[Situation], Awaitable[list[Check]]]


async def _user(it: Situation) -> list[Check]:
    if it.host.uid() == 0:
        return [Check("user", "ok", "root")]
    if it.needs.checkpoints or it.needs.uses_podman:
        return [Check("user", "fail", f"user {it.host.uid()}; checkpoints need root", "run warmpool and this as root")]
    return [Check("user", "ok", f"user {it.host.uid()}")]


_CHECKS: Final[tuple[Examine, ...]] = (
    _user,
    containers.podman,
    containers.socket,
    containers.runtime,
    containers.images,
    containers.others,
    network.tables,
    network.networks,
    network.bridge_addresses,
    dumps.programs,
    dumps.kernel,
    dumps.configuration,
    dumps.tools,
    containers.io_uring,
    memory.images,
    memory.huge_pages,
    memory.pinned_memory,
    memory.folders,
    memory.limits,
    gpus.nvidia,
    several_gpus,
    named_files,
    randomness,
)


_GROUNDWORK: Final = frozenset({"user", "podman", "runtime, cgroups", "CRIU", "tar"})
"""Rows that tell all there is to tell when they fail; the self-test could only repeat them."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The rows, and the last of them."""

    checks: Sequence[Check]
    self_test: Check

    def exit_status(self) -> int:
        """1 when the configured models could not be checkpointed, else 0."""
        return exit_status([*self.checks, self.self_test])


async def diagnose(
    settings: Settings | None, host: Host, make: MakeRuntime, *, fix: bool, tell: Callable[[str], None]
) -> Diagnosis:
    """Examine the host, fix what is safe to fix if `fix`, and try a checkpoint.

    `tell` is given what is about to be changed, before it is. `settings` is None where there is no configuration.
    """
    checks = await examine(settings, host)
    if fix and await repair(checks, tell):
        checks = await examine(settings, host)
    needs = Needs.of(settings)
    blocking = [c.name for c in checks if c.status == "fail" and c.name in _GROUNDWORK]
    if not needs.checkpoints:
        result = Check(selftest.NAME, "skip", "no model is ever checkpointed")
    elif blocking:
        result = Check(selftest.NAME, "skip", f"not tried; fix first: {', '.join(blocking)}")
    else:
        result = await selftest.self_test(host, needs, make)
    return Diagnosis(checks, result)


async def examine(settings: Settings | None, host: Host, checks: Sequence[Examine] = _CHECKS) -> list[Check]:
    """The rows of all checks, or of these. Raises nothing: a check that breaks becomes a row."""
    needs = Needs.of(settings)
    podman = PodmanFacts()
    if needs.uses_podman and host.which("podman"):
        podman = PodmanFacts.of(await host.run("podman", "info", "--format", "json"))
    it = Situation(needs, host, podman)
    return [row for check in checks for row in await _examined(check, it)]


async def _examined(check: Examine, it: Situation) -> list[Check]:
    try:
        return await check(it)
    except Exception as error:  # noqa: BLE001 - a host in disorder is what this command is for
        name = f"{check.__module__.rpartition('.')[2]} {check.__name__}"
        return [Check(name, "warn", f"could not be examined: {error!r}", "please report this")]


async def repair(checks: Iterable[Check], tell: Callable[[str], None]) -> int:
    """Make the repairs of these checks, each announced before; how many were tried."""
    repairs = [check.repair for check in checks if check.repair is not None]
    for wanted in repairs:
        tell(wanted.what)
        try:
            await wanted.make()
        except (OSError, WarmpoolError) as error:
            tell(f"  failed: {error}")
        else:
            tell("  done")
    return len(repairs)
