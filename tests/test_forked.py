"""Engines that are forked are, from outside, what the runtime would have started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from proxy.checkpoint.store import CheckpointStore
from proxy.config.runtime import ProcessRuntimeSettings
from proxy.host import processes
from proxy.runtime.process.runtime import ProcessRuntime
from proxy.runtime.state_dir import Claim
from tests.forked import ForkingRuntime
from tests.support import ENGINE_PORTS, ROOT, engine_settings, get_json, until_healthy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", [ProcessRuntime, ForkingRuntime])
async def test_a_forked_engine_is_a_child_with_a_session_a_mark_and_a_log(kind: Any, tmp_path: Path) -> None:
    claim = Claim(tmp_path / "state")
    runtime = kind(
        ProcessRuntimeSettings(ports=ENGINE_PORTS), claim=claim, store=CheckpointStore(tmp_path / "images", 0)
    )
    await runtime.open()
    started = await runtime.start("demo-1", "demo", engine_settings("--processes", "2"))
    await until_healthy(started.base_url)
    state = await get_json(f"{started.base_url}/debug/state")
    pid, (child,) = state["pid"], state["children"]
    engine = psutil.Process(pid)
    assert (engine.ppid(), os.getsid(pid), os.getsid(child)) == (os.getpid(), pid, pid)
    assert engine.environ()[processes.MARK] == psutil.Process(child).environ()[processes.MARK]
    assert {*processes.marked(f"{claim.owner}:demo-1;")} == {pid, child}
    assert engine.cwd() == str(ROOT)
    assert "listening on" in "".join(await started.log_tail())
    await started.remove()
    await runtime.close()
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(child)
