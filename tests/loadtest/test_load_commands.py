"""Every command of the load tests, small, with real proxies and engines."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from click.testing import CliRunner

from loadtest import checkpoint_images, results, serving, trace
from loadtest.commands import cli
from proxy.runtime.state_dir import Claim
from tests.forked import LOADTESTS
from tests.loadtest.test_results import SAMPLE
from tests.podman_bench import why_no_podman
from tests.served import Proxy
from tests.support import PATIENCE_S, ROOT, engine_model, processes_with, why_no_criu

if TYPE_CHECKING:
    from pathlib import Path

ENGINE = (
    "--runtime",
    "process",
    "--memory",
    "8MiB",
    "--load",
    "0.05",
    "--ttft",
    "0.002",
    "--tokens-per-second",
    "1000",
)
criu = pytest.mark.skipif(why_no_criu() is not None, reason=why_no_criu() or "")
podman = pytest.mark.skipif(why_no_podman() is not None, reason=why_no_podman() or "")


def loadtest(*arguments: str, status: int = 0, folder: Path | None = None) -> str:
    """What a command prints, its own folders below `folder`; it must end with `status`."""
    done = LOADTESTS.run(arguments, {**os.environ, "TMPDIR": str(folder or "/tmp")})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def ran(out: Path, *arguments: str) -> results.Result:
    """What a command measured. Nothing of it may be left."""
    folder = out.with_name(f"{out.name}-folder")
    folder.mkdir()
    printed = loadtest(*arguments, "--out", str(out), folder=folder)
    assert str(out) in printed
    found = results.read(out)
    assert found.complete
    assert found.command == arguments[0]
    assert list(folder.iterdir()) == []
    assert processes_with(str(folder)) == []
    return found


def containers_of(kept: Path) -> list[str]:
    """Those that go with images that were kept."""
    owned = f"--filter=label=io.warmpool.owner={Claim(kept / 'state').owner}"
    return subprocess.run(["podman", "ps", "-aq", owned], check=True, capture_output=True, text=True).stdout.split()


def test_baseline_takes_a_cold_start_apart(tmp_path: Path) -> None:
    found = ran(tmp_path / "r", "baseline", *ENGINE, "-n", "2")
    assert found.series() == ["stopped"]
    assert len(found.values("stopped")) == 2
    assert found.counts == {"lost": 0, "different_answers": 0, "other_tier": 0}
    for sample in found.samples:
        assert {"start", "load", "warmup", "canary", "wake"} <= set(sample["stages_s"])
        assert sample["values"]["ttft_s"] > sample["stages_s"]["wake"] > sample["stages_s"]["load"]


def test_restore_finds_each_tier(tmp_path: Path) -> None:
    found = ran(
        tmp_path / "r", "restore", *ENGINE, "-n", "2", "--cold", "1", "--tier", "sleeping", "--tier", "suspended"
    )
    for tier in ("sleeping", "suspended"):
        assert [s["tier"] for s in found.samples if s["series"] == tier] == [tier] * 2
    assert found.counts == {"lost": 0, "different_answers": 0, "other_tier": 0}


def test_a_tier_that_does_not_come_is_a_note(tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    config.write_text(tomli_w.dumps({"models": {"a": engine_model("--no-sleep-mode")}}))
    tiers = ("--cold", "0", "-n", "1", "--tier", "sleeping", "--tier", "suspended")
    found = ran(tmp_path / "r", "restore", "--config", str(config), *tiers)
    assert found.series() == ["stopped", "suspended"]
    assert found.notes[0].startswith("sleeping: a stays ready: its engine has no such tier")


@criu
@pytest.mark.criu
def test_a_step_that_failed_is_said_and_not_waited_for(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text('#!/bin/sh\n[ "$1" = dump ] && { echo "Error: no dump today" >&2; exit 1; }\nexec criu "$@"\n')
    criu.chmod(0o755)
    found = ran(
        tmp_path / "r", "restore-flags", *ENGINE, "-n", "1", "--only", "CRIU", "--criu", str(criu),
        "--compression", "none",
    )  # fmt: skip
    assert found.series() == ["default", "default, again", "export and import, none"]
    assert found.notes[0].startswith(f"CRIU {criu}: demo stays sleeping: demo-1 cannot go to checkpointed, and stays: ")


@criu
@pytest.mark.criu
def test_restore_from_a_checkpoint(tmp_path: Path) -> None:
    found = ran(
        tmp_path / "r", "restore", *ENGINE, "-n", "2", "--cold", "1", "--tier", "checkpointed", "--sleep-level", "1"
    )
    restored = [s for s in found.samples if s["series"] == "checkpointed"]
    assert [s["tier"] for s in restored] == ["checkpointed"] * 2
    # Its weights are in the image.
    assert all("criu" in s["stages_s"] for s in restored)
    assert all(not {"canary", "reload_weights"} & set(s["stages_s"]) for s in restored)
    assert ["canary" in s["stages_s"] for s in found.samples if s["series"] == "checkpointed, first"] == [True]


@podman
@pytest.mark.podman
def test_restore_and_flags_in_containers(tmp_path: Path) -> None:
    engine = ("--runtime", "podman", *ENGINE[2:])
    keep = ("--keep", str(tmp_path / "kept"), "--cold", "0", "-n", "1", "--tier", "checkpointed")
    found = ran(tmp_path / "k1", "restore", *engine, *keep)
    assert "stopped" in found.series()
    (restored,) = (s for s in found.samples if s["series"] == "checkpointed")
    assert {"podman", "criu"} <= set(restored["stages_s"])
    assert containers_of(tmp_path / "kept")
    assert ran(tmp_path / "k2", "restore", *engine, *keep).series() == ["checkpointed, first", "checkpointed"]
    loadtest("discard", str(tmp_path / "kept"))
    assert not containers_of(tmp_path / "kept")
    found = ran(tmp_path / "f", "restore-flags", *engine, "-n", "1", "--only", "file_locks", "--compression", "zstd")
    assert found.series() == ["default", "file_locks = false", "default, again", "export and import, zstd"]
    assert found.notes == ["fewer than 10 samples: default (1), file_locks = false (1), default, again (1)"]


def test_burst_asks_in_one_moment(tmp_path: Path) -> None:
    found = ran(
        tmp_path / "r", "burst", *ENGINE, "--size", "1", "--size", "12", "--rounds", "1",
        "--tier", "ready", "--tier", "stopped",
    )  # fmt: skip
    assert len(found.values("ready, 12 at once")) == len(found.values("stopped, 12 at once")) == 12
    # One wake for all of them.
    woken = {s["stages_s"]["wake"] for s in found.samples if s["series"] == "stopped, 12 at once"}
    assert len(woken) == 1
    assert found.states


def test_trace_loses_nothing(tmp_path: Path) -> None:
    found = ran(tmp_path / "r", "trace", str(SAMPLE), *ENGINE, "--speed", "8", "--models", "3", "--max-awake", "2",
                "--switch-after", "200ms")  # fmt: skip
    assert found.counts["sent"] == found.counts["answered"] == 60
    assert found.counts["lost"] == found.counts["short"] == 0
    assert 0 < found.counts["ttft_p50_s"] <= found.counts["ttft_p99_s"] <= found.counts["ttft_most_s"]
    assert 0 <= found.counts["gap_p50_s"] <= found.counts["gap_most_s"]  # several may come at once
    assert found.counts["tokens_each_second"] > 0
    assert sum(1 for s in found.samples if "ttft_s" in s["values"]) == 60
    assert {s["model"] for s in found.samples} == {"model_1", "model_2", "model_3"}
    assert all(sum(state == "ready" for m in s["models"].values() for state in m["instances"].values()) <= 2
               for s in found.states)  # fmt: skip


async def test_trace_through_a_proxy_that_runs(tmp_path: Path) -> None:
    proxy = Proxy(tmp_path / "p", settings={"models": {"demo": engine_model("--max-model-len", "16384")}})
    await proxy.listening()
    try:
        options = ("--speed", "20", "--url", proxy.url, "--names", "demo,demo")
        # Three models in the trace and one here.
        assert "--models 3" in loadtest("trace", str(SAMPLE), *options[:4], "--names", "demo", status=2)
        plain = tmp_path / "plain.csv"
        plain.write_text("\n".join(line.rpartition(",")[0] for line in SAMPLE.read_text().splitlines()[:20]) + "\n")
        found = ran(tmp_path / "r", "trace", str(plain), *options)
        assert found.counts["answered"] == 19
        assert "--names" in loadtest("trace", str(plain), "--url", proxy.url, status=2)
    finally:
        proxy.process.terminate()
        await proxy.ended()


def test_soak_passes_the_tiers_and_leaks_nothing(tmp_path: Path) -> None:
    found = ran(tmp_path / "r", "soak", *ENGINE, "--models", "2", "--time", "5s")
    assert found.counts["lost"] == found.counts["different_answers"] == found.counts["open after"] == 0
    assert len({s["tier"] for s in found.samples}) > 1
    answered = sum(count for name, count in found.counts.items() if name.startswith("found "))
    assert answered == len(found.samples) == found.counts["sent"]
    phases = sum(count for name, count in found.counts.items() if name.startswith("left "))
    assert phases == found.counts["left"] > 0
    assert found.counts["ended_s"] > 0


@criu
@pytest.mark.criu
def test_checkpoint_and_analyze(tmp_path: Path) -> None:
    found = ran(tmp_path / "c", "checkpoint", *ENGINE, "-n", "1", "--level", "2", "--level", "0")
    assert found.series() == ["asleep, level 2", "awake"]
    # What was put away before is not in the image.
    assert found.values("awake", "image_bytes")[0] > found.values("asleep, level 2", "image_bytes")[0]
    found = ran(tmp_path / "a", "analyze", *ENGINE)
    (image,) = found.samples
    assert image["values"]["image_bytes"] >= image["values"]["memory_pages_bytes"] > 0
    assert sum(image["pages_by_file"].values()) * 4096 == image["values"]["memory_pages_bytes"]
    assert any("zstd" in note for note in found.notes)


def test_calibrate(tmp_path: Path) -> None:
    found = ran(tmp_path / "r", "calibrate", "--streams", "50", "--per-second", "100")
    assert len(found.values("client", "error_s")) == 50
    assert found.counts["most_open"] == 50


def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "r"
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", "baseline", *ENGINE, "-n", "1000", "--out", str(out)],
        env={**os.environ, "TMPDIR": str(tmp_path)}, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as run:  # fmt: skip
        ends = time.monotonic() + PATIENCE_S
        while not out.exists() or b'"sample"' not in out.read_bytes():
            assert time.monotonic() < ends
            time.sleep(0.05)
        run.terminate()
        assert run.wait(PATIENCE_S) != 0
    assert list(tmp_path.iterdir()) == [out]
    assert processes_with(str(tmp_path)) == []
    assert not results.read(out).complete


def test_models_of_ones_own(tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    models = {"first": engine_model(), "second": engine_model(name="org/Second-7B", idle={"sleeping": "1h"})}
    config.write_text(tomli_w.dumps({"models": models, "server": {"port": 9}}))
    found = ran(tmp_path / "r", "baseline", "--config", str(config), "--model", "second", "-n", "1")
    assert [s["model"] for s in found.samples] == ["second"]
    assert found.counts["lost"] == 0
    assert found.options["model"] == "second"


def test_a_load_format_goes_into_the_command(tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    command = ["vllm", "serve", "--load-format", "auto", "--port", "{port}"]
    config.write_text(tomli_w.dumps({"models": {"a": {"process": {"command": command}}}}))
    setup = serving.Setup(config=config)
    with serving.folders() as where:
        made = checkpoint_images.configure(setup, checkpoint_images.Variant(1, "safetensors"), where)
        written = tomllib.loads(made.read_text())
        with pytest.raises(serving.ServeError, match="loads no files"):
            checkpoint_images.configure(serving.Setup(), checkpoint_images.Variant(2, "auto"), where)
    model = written["models"]["a"]
    assert model["process"]["command"] == ["vllm", "serve", "--load-format", "safetensors", "--port", "{port}"]
    assert model["golden_sleep_level"] == 1


async def test_the_engine_of_the_load_tests_gets_fresh_random_numbers(tmp_path: Path) -> None:
    setup = serving.Setup(engine=serving.Engine(memory="8MiB", load_s=0.05))
    with setup.folders(tmp_path) as where:
        async with serving.serving(setup.settings({"checkpointed": "1h"}), where) as served:
            await served.ask("demo", "fresh")
            log = served.log.read_text()
    assert "ready" in log
    assert "its answers repeat" not in log


def vllm_config(tmp_path: Path, **entry: Any) -> serving.Setup:
    config = tmp_path / "vllm.toml"
    command = ["/model", "--max-model-len", "512", "--enable-sleep-mode", "--load-format=auto", "--port", "{port}"]
    engine = {"image": "vllm-openai", "command": command, "env": {"VLLM_SERVER_DEV_MODE": "1", "A": "b"}}
    config.write_text(tomli_w.dumps({"models": {"a": {"podman": engine, **entry}, "b": {"podman": engine}}}))
    return serving.Setup(config=config, keep=tmp_path)


def test_ways_to_make_an_image(tmp_path: Path) -> None:
    setup = vllm_config(tmp_path, weights_copy=True)
    with serving.folders() as where:
        made = {
            level: tomllib.loads(
                checkpoint_images.configure(setup, checkpoint_images.Variant(level, "auto"), where).read_text()
            )["models"]["a"]
            for level in (0, 1, 2)
        }
    assert made[0]["podman"]["command"] == [
        "/model",
        "--max-model-len",
        "512",
        "--port",
        "{port}",
        "--load-format",
        "auto",
    ]
    assert made[0]["podman"]["env"] == {"A": "b"}
    assert made[1]["podman"]["env"] == {"A": "b", "VLLM_SERVER_DEV_MODE": "1"}
    # A copy of the weights beside an image that holds them is refused by the configuration.
    assert [made[level]["weights_copy"] for level in (0, 1, 2)] == [True, False, True]
    own = [
        checkpoint_images.Variant(2),
        checkpoint_images.Variant(1),
        checkpoint_images.Variant(0),
        checkpoint_images.Variant(2, "auto"),
    ]
    assert [checkpoint_images.is_own(setup, variant, "a") for variant in own] == [True, False, False, False]
    setup = dataclasses.replace(setup, model="b")
    assert [checkpoint_images.is_own(setup, variant, "b") for variant in own] == [True, True, False, False]


def test_gpu_state_is_a_part_of_the_memory_pages() -> None:
    held = {"ready": {"GPU-1": 3 << 30, "GPU-2": 1 << 30}}
    report = {"memory_bytes": {"anonymous": 5, "GPU state": 1 << 20}, "gpu_bytes": held}
    known = {"on_the_GPU.ready_bytes": 4 << 30, "copied_from_the_GPU_bytes": 1 << 20}
    made = checkpoint_images.beside(report, 3 << 20)
    assert made == known | {"memory_pages.GPU_state_bytes": 1 << 20, "memory_pages.else_bytes": 2 << 20}
    # Zeros that were left out may be of either part.
    report["zero_bytes_left_out"] = 4096
    assert checkpoint_images.beside(report, 3 << 20) == known | {"zeros_left_out_bytes": 4096}
    assert checkpoint_images.beside({"memory_bytes": {"anonymous": 5}, "gpu_bytes": {}}, 3 << 20) == {}


def test_a_trace_fits_the_engines_of_a_configuration(tmp_path: Path) -> None:
    setup = vllm_config(tmp_path)
    assert setup.count(None, 6) == 2
    assert setup.count(1, 6) == 1
    assert serving.Setup().count(None, 6) == 6
    assert setup.is_vllm("a")
    assert trace.limits(setup, ["a", "b"]) == (383, 128)
    assert trace.limits(serving.Setup(), ["demo"]) == (100_000, 100_000)
    how = trace.Replay(most_prompt_tokens=3, most_tokens=5, by_id=True)
    rows = [trace.Row(0.0, 2, 9), trace.Row(1.0, 10, 4)]
    first, second = trace.requests(rows, ["a", "a"], {"a": "a"}, how)
    assert first.body["prompt"] == [100, 200]
    assert second.body["prompt"] == [101, 200, 200]
    assert trace.shortened(rows, how) == "1 of 2 prompts were shortened to 3 tokens, 1 answers to 5"
    assert trace.shortened(rows, trace.Replay()) is None


@criu
@pytest.mark.criu
def test_an_image_that_was_kept_is_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    keep = ("--keep", str(folder))
    checkpointed = ("--tier", "checkpointed", "--tier", "ready", "--cold", "0", "-n", "1")
    found = ran(tmp_path / "1", "restore", *ENGINE, *keep, *checkpointed)
    assert found.series() == ["stopped", "checkpointed, first", "checkpointed", "ready"]
    found = ran(tmp_path / "2", "restore", *ENGINE, *keep, *checkpointed)
    assert found.series() == ["checkpointed, first", "checkpointed", "ready"]
    found = ran(tmp_path / "3", "burst", *ENGINE, *keep, "--size", "2", "--rounds", "1", "--tier", "suspended")
    assert found.series() == ["checkpointed, first", "suspended, 2 at once"]
    assert "at level 2; keep another" in loadtest("analyze", *ENGINE, *keep, "--sleep-level", "1", status=2)
    flags = ("--only", "none of them", "--compression", "zstd")
    found = ran(tmp_path / "4", "restore-flags", *ENGINE, *keep, "-n", "1", *flags)
    assert found.series() == ["default", "default, again", "export and import, zstd"]
    found = ran(tmp_path / "5", "soak", *ENGINE, *keep, "--models", "1", "--time", "1s")
    assert found.counts["lost"] == 0
    ran(tmp_path / "6", "analyze", *ENGINE, *keep)
    (made,) = folder.glob("images/*/manifest.json")
    made_at = made.stat().st_mtime_ns
    ran(tmp_path / "7", "checkpoint", *ENGINE, *keep, "-n", "1")
    assert made.stat().st_mtime_ns > made_at
    loadtest("discard", str(folder))
    assert not folder.exists()
    assert "nothing was kept" in loadtest("discard", str(tmp_path), status=2)


def test_proxy_is_the_benchmark_of_the_proxy() -> None:
    assert "--quick" in loadtest("proxy", "--help")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("baseline", "--config", "no-such-file.toml"), "no-such-file.toml"),
        (("baseline", "--config", "config/embedded.toml", "--model", "other"), "no model 'other'"),
        (("trace", "README.md"), "no column TIMESTAMP"),
        (("report", "README.md"), "not a file of results"),
        (("trace", str(SAMPLE), "--length", "10"), "a duration needs a unit"),
        (("trace", str(SAMPLE), "--idle", "never"), "a tier and a time"),
        (("trace", str(SAMPLE), "--speed", "0"), "0.0 is not in the range x>0"),
        (("soak", "--memory", "much"), "'much': a size is a number with"),
        (("burst", "--size", "0"), "0 is not in the range x>=1"),
        (("nonsense",), "No such command"),
    ],
)
def test_what_cannot_be_run_is_a_line_and_status_2(arguments: tuple[str, ...], reason: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.output
    assert reason in done.output
    assert "Traceback" not in done.output
