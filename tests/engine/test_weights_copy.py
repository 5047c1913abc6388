"""The copy of vLLM's weights: the extension itself, and the pool's use of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.engine_weights import Worker
from proxy.config.model import ModelSettings
from proxy.engine.kinds.vllm_inside import VllmInside
from proxy.errors import EngineError
from tests.fakes import Rig, settle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INSIDE = VllmInside()
EXTENSION = "proxy.engine.vllm_extension.warmpool_vllm.Worker"


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker with the extension, its weights in host memory, its copies in `tmp_path`."""
    monkeypatch.setenv("WARMPOOL_WEIGHTS", str(tmp_path))
    before = dict(sys.modules)
    yield Worker(EXTENSION)
    for name in ("torch", "vllm.device_allocator.cumem"):
        if name in before:
            sys.modules[name] = before[name]
        else:
            sys.modules.pop(name, None)


def test_every_byte_comes_back(worker: Worker, tmp_path: Path) -> None:
    saved = worker.call("warmpool_save_weights")
    assert saved["bytes"] == (256 << 10) + 17  # not the KV cache
    worker.lose()
    assert not worker.valid()
    assert worker.call("warmpool_load_weights")["bytes"] == saved["bytes"]
    assert worker.valid()
    assert {path.suffix for path in tmp_path.iterdir()} == {".weights", ".json"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.glob("*.weights"))


def test_a_second_copy_replaces_the_first_and_keeps_its_identity(worker: Worker, tmp_path: Path) -> None:
    worker.call("warmpool_save_weights")
    first = json.loads((tmp_path / "rank-0.json").read_text())
    worker.call("warmpool_save_weights")
    second = json.loads((tmp_path / "rank-0.json").read_text())
    assert first["id"] == second["id"]
    assert first["file"] != second["file"], "whoever has read the first note must not read half of the second copy"
    assert len([*tmp_path.iterdir()]) == 2


def test_each_rank_has_a_file_of_its_own(worker: Worker, tmp_path: Path) -> None:
    ranks = (0, 1, 10)
    worker.call("warmpool_save_weights")
    for rank in ranks:  # one after the other in one process: what they share is the folder
        worker._worker.rank = rank
        worker.call("warmpool_save_weights")
    assert {path.name.split("-")[1].partition(".")[0] for path in tmp_path.iterdir()} == {"0", "1", "10"}
    assert len([*tmp_path.iterdir()]) == 2 * len(ranks)
    for rank in ranks:
        worker._worker.rank = rank
        worker.lose()
        worker.call("warmpool_load_weights")
        assert worker.valid()


def test_a_copy_of_another_process_is_not_taken(worker: Worker) -> None:
    Worker(EXTENSION).call("warmpool_save_weights")
    worker.lose()
    assert "of another process" in worker.call("warmpool_load_weights")["error"]
    assert not worker.valid()


@pytest.mark.parametrize("harm", ["no note", "no data", "cut off", "garbage"])
def test_a_copy_that_is_gone_or_damaged_is_an_error(worker: Worker, tmp_path: Path, harm: str) -> None:
    worker.call("warmpool_save_weights")
    note, data = tmp_path / "rank-0.json", next(tmp_path.glob("*.weights"))
    match harm:
        case "no note":
            note.unlink()
        case "no data":
            data.unlink()
        case "cut off":
            data.write_bytes(data.read_bytes()[:-1])
        case _:
            note.write_text("{")
    assert "error" in worker.call("warmpool_load_weights")


def test_without_a_folder_or_space_nothing_is_left(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert "No space left" in worker.call("warmpool_save_weights")["error"]
    assert not [*tmp_path.iterdir()]
    monkeypatch.delenv("WARMPOOL_WEIGHTS")
    assert "WARMPOOL_WEIGHTS is not set" in worker.call("warmpool_save_weights")["error"]


def test_a_failing_copy_to_the_gpu_is_an_error(worker: Worker) -> None:
    worker.call("warmpool_save_weights")

    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    sys.modules["vllm.device_allocator.cumem"].libcudart.cudaMemcpy = fail
    assert "illegal memory access" in worker.call("warmpool_load_weights")["error"]


def test_what_runs_inside_vllm_stands_on_its_own(tmp_path: Path) -> None:
    folder = INSIDE.folder(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["warmpool_vllm"]
    program = "import sys, warmpool_vllm as w; print(w.Worker, w.Frontend, {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert not {"proxy", "vllm", "torch", "numpy"} & set(re.findall(r"'(\w+)'", done.stdout.partition("{")[2]))
    assert INSIDE.folder(tmp_path) == folder
    assert INSIDE.environment("/ext", "/copies", {"PYTHONPATH": "/site"}) == {
        "PYTHONPATH": "/ext:/site",
        "WARMPOOL_WEIGHTS": "/copies",
    }
    assert INSIDE.environment("/ext", None, {}) == {"PYTHONPATH": "/ext"}


# --- the pool ---

IDLE = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}


async def rig_with(**entry: Any) -> Rig:
    rig = Rig({"demo": {"idle": IDLE, "weights_copy": True, **entry}}, shares_images=True)
    await rig.pool.open()
    return rig


async def step_down_and_ask(rig: Rig, seconds: float) -> dict[str, float]:
    """The stages of the wake that follows."""
    await rig.pass_time(seconds)
    lease = await rig.pool.lease("demo")
    lease.release()
    await settle()
    assert lease.wake is not None
    return dict(lease.wake.stages)


async def test_the_copy_is_written_before_the_golden_checkpoint_and_used_after_it() -> None:
    rig = await rig_with(sleep_level=2)
    (await rig.pool.lease("demo")).release()
    await rig.pass_time(10)
    assert rig.runtime.calls["save_weights"] == 1
    assert rig.runtime.processes["demo-1"].sleep_level == 2
    await rig.pass_time(10)
    stages = await step_down_and_ask(rig, 10)
    assert "load_weights" in stages
    assert "reload_weights" not in stages
    stages = await step_down_and_ask(rig, 10)
    assert "load_weights" in stages, "asleep at level 2, as sleep_level says"
    assert rig.runtime.calls["save_weights"] == 1
    await rig.pool.close()


async def test_engines_sleep_at_level_1_unless_told_otherwise() -> None:
    rig = await rig_with()
    (await rig.pool.lease("demo")).release()
    await rig.pass_time(30)
    await rig.until(demo_1="checkpointed")
    assert "load_weights" in await step_down_and_ask(rig, 1)
    await rig.pass_time(10)
    assert rig.runtime.processes["demo-1"].sleep_level == 1
    await rig.pool.close()


async def test_a_copy_that_was_lost_is_written_again_when_the_engine_is_idle() -> None:
    rig = await rig_with(sleep_level=2)
    (await rig.pool.lease("demo")).release()
    await rig.pass_time(30)
    await rig.until(demo_1="checkpointed")
    rig.runtime.copies.clear()
    assert "reload_weights" in await step_down_and_ask(rig, 1)
    assert rig.runtime.calls["save_weights"] == 1
    assert "load_weights" in await step_down_and_ask(rig, 10)
    assert rig.runtime.calls["save_weights"] == 2
    await rig.pool.close()


@pytest.mark.parametrize("fits", [True, False])
async def test_a_restored_engine_that_is_adopted_goes_on_with_the_copy(fits: bool) -> None:
    before = await rig_with(sleep_level=2)
    before.runtime.leaves = True
    (await before.pool.lease("demo")).release()
    await before.pass_time(30)
    await before.until(demo_1="checkpointed")
    (await before.pool.lease("demo")).release()
    await before.pool.close()
    rig = Rig({"demo": {"idle": IDLE, "weights_copy": True, "sleep_level": 2}}, shares_images=True)
    rig.runtime.inherit(before.runtime, keep=True)
    rig.runtime.copies = before.runtime.copies if fits else set()
    await rig.pool.open()
    await rig.until(demo_1="ready")
    await rig.pass_time(10)
    assert rig.runtime.processes["demo-1"].sleep_level == 2
    assert ("reload_weights" in await step_down_and_ask(rig, 0)) is not fits
    assert "load_weights" in await step_down_and_ask(rig, 10)
    assert rig.runtime.calls["save_weights"] == (0 if fits else 1)
    await rig.pool.close()


async def test_an_engine_that_cannot_write_a_copy_works_without() -> None:
    rig = await rig_with(sleep_level=2)
    rig.runtime.failures["save_weights"] = [EngineError("save_weights", "no space")]
    (await rig.pool.lease("demo")).release()
    await rig.pass_time(30)
    await rig.until(demo_1="checkpointed")
    assert "reload_weights" in await step_down_and_ask(rig, 1)
    await rig.pool.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sleep_level": 2}, "needs weights_copy"),
        ({"weights_copy": True, "golden_sleep_level": 1}, "needs golden_sleep_level = 2"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelSettings(process={"command": ["x", "{port}"]}, **settings)
