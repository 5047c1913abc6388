"""The last word on a host: a tiny engine is started, checkpointed and restored, and has to remember where it was.

It goes through warmpool's own runtime, with state and images in a folder of its own that is deleted afterwards, so
that nothing of a warmpool that runs on this host is touched. For podman a container image is made of a shell and its
libraries: no registry is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import secrets
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from proxy.checkpoint.files import MANIFEST
from proxy.checkpoint.store import CheckpointStore
from proxy.config.engine import CriuSettings
from proxy.config.model import ModelSettings
from proxy.doctor.report import Check
from proxy.errors import HostError, RuntimeFailure, WarmpoolError
from proxy.host import owned
from proxy.runtime.base import ImageFacts
from proxy.runtime.podman import container
from proxy.runtime.state_dir import Claim
from proxy.telemetry.stages import Stages
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from proxy.doctor.needs import Needs
    from proxy.doctor.view import Host
    from proxy.runtime.base import EngineProcess, Runtime

    MakeRuntime: TypeAlias = Callable[[str, Claim, CheckpointStore], Runtime]
    """From the name of a runtime, where its state is and where its images go."""

NAME: Final = "self-test"
_INSTANCE: Final = "selftest-1"
_TIMEOUT_S: Final = 120.0
_PATIENCE_S: Final = 20.0
_TICKS: Final = 3
"""How often the engine has to count before its checkpoint, and again after it."""
_COUNTER: Final = (
    "read -r run </proc/sys/kernel/random/uuid; n=0; while :; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; "
    'n=$((n+1)); echo "tick $run $n"; done'
)
"""Counts in memory; the run's name tells a restored engine from one that was started again.

It starts no program between two counts: a shell does that by vfork(2), and where the child is frozen before it began,
CRIU waits 10 s for its parent and gives up.
"""
_TICK: Final = re.compile(r"\btick ([0-9a-f-]{36}) (\d+)$", re.MULTILINE)
_HOST_CRIU_CONFIG: Final = Path("/etc/criu/default.conf")
_FOLDERS: Final = ("dev", "etc", "proc", "run", "sys", "tmp")


class _TestError(WarmpoolError):
    """The engine did not do what it should; the text says what."""


async def self_test(host: Host, needs: Needs, make: MakeRuntime) -> Check:
    """A checkpoint and restore of a tiny engine: which stages it went through, or at which it failed."""
    stages = Stages()
    kind = needs.runtime_name
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await _test(host, needs, make, stages)
    except TimeoutError:
        return _failed(kind, stages, f"no end after {_TIMEOUT_S:.0f} s")
    except (WarmpoolError, OSError) as error:
        return _failed(kind, stages, str(error))
    what = "container" if kind == "podman" else "process tree"
    return Check(NAME, "ok", f"a {what} was checkpointed and restored", stages_s=stages.seconds)


def _failed(kind: str, stages: Stages, reason: str) -> Check:
    last = next(reversed(stages.seconds), "preparing")
    commands = "podman info; criu check --all" if kind == "podman" else "criu check --all"
    fix = f"fix the rows above; else report this with the output of: {commands}"
    return Check(NAME, "fail", f"{last}: {' '.join(reason.split())}", fix, stages_s=stages.seconds)


async def _test(host: Host, needs: Needs, make: MakeRuntime, stages: Stages) -> None:
    folder = _folder(needs.pool.checkpoint_dir.absolute())
    owned.claim(folder)
    try:
        claim = Claim(folder / "state")
        store = CheckpointStore(folder / "images", 0)
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_kept(host.path(_HOST_CRIU_CONFIG)))
            runtime = make(needs.runtime_name, claim, store)
            if needs.runtime_name == "podman":
                with stages.measure("image"):
                    image = await stack.enter_async_context(_image(host, claim.owner))
                model = _container_model(image, needs)
            else:
                model = ModelSettings(process=_process(folder))
            with stages.measure("open"):
                await runtime.open()
            stack.push_async_callback(runtime.close)
            if Tier.CHECKPOINTED not in runtime.tiers().offered:
                raise HostError(runtime.tiers().missing.get(Tier.CHECKPOINTED, "this runtime cannot checkpoint"))
            await _round_trip(runtime, model, claim.log_path(_INSTANCE), stages)
    finally:
        owned.delete_root(folder)


def _folder(images: Path) -> Path:
    """A folder of our own: with the images, if there is a place for them yet.

    To the store it is an image half-written, so that it neither keeps a warmpool from starting nor outlives that if
    we are killed.
    """
    if not images.is_dir():
        return Path(tempfile.mkdtemp(prefix="warmpool-selftest-"))
    folder = CheckpointStore(images, 0).partial(f"selftest-{secrets.token_hex(4)}")
    folder.mkdir(mode=0o700)
    (folder / MANIFEST).touch(mode=0o600)
    return folder


async def _round_trip(runtime: Runtime, model: ModelSettings, log: Path, stages: Stages) -> None:
    with stages.measure("start"):
        engine = await runtime.start(_INSTANCE, "selftest", model)
    try:
        with stages.measure("start"):
            run, _ = await _counted(log, "", _TICKS)
        with stages.measure("checkpoint"):
            await engine.checkpoint(ImageFacts(sleep_level=0, canary=None), Stages())
        before = await _last(log)
        with stages.measure("restore"):
            await engine.restore(Stages())
            after_run, after = await _counted(log, run, (before[1] if before else 0) + _TICKS)
        if after_run != run or before is None or after < before[1]:
            raise _TestError("the engine started again instead of going on")
    except BaseException:
        with contextlib.suppress(RuntimeFailure):
            await _remove(runtime, engine)
        raise
    with stages.measure("remove"):
        await _remove(runtime, engine)


async def _remove(runtime: Runtime, engine: EngineProcess) -> None:
    await engine.kill()
    await runtime.images.discard(engine)
    await engine.remove()


async def _counted(log: Path, run: str, at_least: int) -> tuple[str, int]:
    """The engine's run and count, once it has come this far or is another run than `run`."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                last = await _last(log)
                if last is not None and (last[1] >= at_least or (run and last[0] != run)):
                    return last
                await asyncio.sleep(0.01)
    except TimeoutError:
        last_words = await _tail(log)
        raise _TestError(f"the engine does not count; its log ends with: {last_words}") from None


async def _last(log: Path) -> tuple[str, int] | None:
    try:
        ticks = _TICK.findall(await _text(log))
    except OSError:
        return None
    return (ticks[-1][0], int(ticks[-1][1])) if ticks else None


async def _tail(log: Path) -> str:
    try:
        lines = (await _text(log)).splitlines()
    except OSError as error:
        return f"({error.strerror})"
    return lines[-1] if lines else "(nothing)"


async def _text(log: Path) -> str:
    # In one call of a thread: a cancelled `aiofiles.open` leaves behind the file that its thread has just opened.
    return await asyncio.to_thread(log.read_text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Put a file back as it was: warmpool writes this one for a crun that has no configuration per container."""
    before = path.read_bytes() if path.is_file() else b""
    try:
        yield
    finally:
        after = path.read_bytes() if path.is_file() else b""
        if after != before and after.startswith(b"# Written by warmpool"):
            if before:
                path.write_bytes(before)
            else:
                path.unlink()


# --- the engine ---


def _process(folder: Path) -> dict[str, Any]:
    return {"command": ["sh", "-c", _COUNTER, "{port}"], "cwd": str(folder)}


def _container_model(image: str, needs: Needs) -> ModelSettings:
    """With the network and the CRIU options of the configured models, where they have any."""
    networks = {engine.network for engine in needs.podman.values()}
    criu = next((e.criu for key, e in needs.podman.items() if needs.is_checkpointed(key)), CriuSettings())
    table = {
        "image": image,
        "entrypoint": ["/bin/sh"],
        "command": ["-c", _COUNTER, "{port}"],
        "env": {"PATH": "/bin"},
        "network": "host" if networks == {"host"} else "bridge",
        "criu": criu.model_dump(exclude={"program", "action_scripts"}),
    }
    return ModelSettings.model_validate({"podman": table})


@contextlib.asynccontextmanager
async def _image(host: Host, owner: str) -> AsyncIterator[str]:
    """A container image with a shell; removed afterwards, with every container of `owner`."""
    name = f"localhost/warmpool-selftest:{owner}"
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(await _tarball(host))
        file.flush()
        ran = await host.run("podman", "import", "--quiet", file.name, name)
    if ran.status != 0:
        raise _TestError(f"podman import: {ran.reason()}")
    try:
        yield name
    finally:
        left = await host.run("podman", "ps", "--all", "--quiet", "--filter", f"label={container.LABEL}owner={owner}")
        for identifier in left.output.split() if left.status == 0 else ():
            await host.run("podman", "rm", "--force", "--time", "0", identifier)
        await host.run("podman", "rmi", "--force", name)


async def _tarball(host: Host) -> bytes:
    """A root filesystem: a shell below /bin, and what it is linked to where it looks for it."""
    path = host.which("sh")
    if path is None:
        raise _TestError("no program sh in PATH")
    files = {"bin/sh": Path(path)}
    files |= {library.lstrip("/"): Path(library) for library in await _libraries(host, path)}
    return await asyncio.to_thread(_pack, files)


async def _libraries(host: Host, program: str) -> list[str]:
    """The shared libraries of a program, its loader included; nothing for one that has none."""
    ran = await host.run("ldd", program)
    if ran.status is None:
        raise _TestError(ran.reason())
    return re.findall(r"(?:^|=>)\s*(/\S+)\s+\(0x", ran.output, re.MULTILINE)


def _pack(files: dict[str, Path]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name in _FOLDERS:
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, path in files.items():
            content = path.read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()
