"""`warmpool serve` that ends, as by kill -9, at one point of a checkpoint or a restore; for tests.

    python -m tests.crashing POINT[#COUNT] serve …

POINT is ``before:NAME`` or ``after:NAME``, with a name from `POINTS`; COUNT says at which of its calls (1).
``during:NAME`` is a moment in which the OCI runtime that the step started is at work.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import signal
import sys
from typing import Any

import psutil

from proxy.checkpoint import archive, store
from proxy.checkpoint.store import CheckpointStore
from proxy.cli import main as cli
from proxy.engine.kinds.vllm import VllmClient
from proxy.runtime.podman import abandoned, bundle
from proxy.runtime.podman.engine import PodmanEngine
from proxy.runtime.podman.maker import Maker
from proxy.runtime.podman.runtime import PodmanRuntime

POINTS = {
    "sleep": (VllmClient, "sleep"),
    "begin": (CheckpointStore, "begin"),
    "dump": (PodmanEngine, "_dump"),
    "collect": (PodmanEngine, "_collect"),
    "manifest": (store, "write_manifest"),
    "commit": (CheckpointStore, "commit"),
    "clone": (PodmanRuntime, "clone"),
    "link": (bundle, "link_image"),
    "restore": (PodmanEngine, "_bring_up"),
    "wake_up": (VllmClient, "wake_up"),
    "export": (CheckpointStore, "export"),
    "import": (CheckpointStore, "import_"),
    "pack": (archive, "Stoppable"),
    "create": (Maker, "make"),
}


def end() -> None:
    """As `kill -9`."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(when: str, name: str, count: int) -> None:
    """Have the program end at this point."""
    owner, attribute = POINTS[name]
    real = getattr(owner, attribute)
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += 1
        return calls == count

    if inspect.iscoroutinefunction(real):

        @functools.wraps(real)
        async def asynchronous(*arguments: Any, **options: Any) -> Any:
            now = due()
            if now and when == "before":
                end()
            if now and when == "during":
                asyncio.get_running_loop().run_in_executor(None, _end_with_helper)
            result = await real(*arguments, **options)
            if now:
                end()
            return result

        setattr(owner, attribute, asynchronous)
        return

    @functools.wraps(real)
    def synchronous(*arguments: Any, **options: Any) -> Any:
        now = due()
        if now and when == "before":
            end()
        result = real(*arguments, **options)
        if now:
            end()
        return result

    setattr(owner, attribute, synchronous)


def _end_with_helper() -> None:
    """End once CRIU is at work."""
    while True:
        for helper in abandoned.helpers():
            with contextlib.suppress(psutil.Error):
                if any(child.name() == "criu" for child in helper.children(recursive=True)):
                    end()


if __name__ == "__main__":
    point, _, nth = sys.argv.pop(1).partition("#")
    moment, _, step = point.partition(":")
    arm(moment, step, int(nth or 1))
    cli.main()
