"""What would make a checkpoint fail is found before an engine is started for it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
import tomli_w

from tests.podman_bench import why_no_podman
from tests.served import Proxy
from tests.support import ENGINE_PORTS, PATIENCE_S, PYTHON, ROOT, engine_model, why_no_criu

if TYPE_CHECKING:
    from pathlib import Path

    from tests.podman_host import Host


criu = pytest.mark.criu
needs_criu = pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
FOREIGN = """
set -e
mkdir "$0/up" "$0/work"
mount -t overlay none -o lowerdir=/etc,upperdir="$0/up",workdir="$0/work" /etc
mkdir -p /etc/criu
echo "$1" > /etc/criu/default.conf
shift
exec "$@"
"""
"""A file of somebody else's, in a mount namespace of its own."""
SMALL = """
set -e
mount -t tmpfs -o size=128m,mode=0700 none "$0"
"$@" || exit 2
exec "$@"
"""
"""The command twice, on a tmpfs that has room for one image only."""


def configured(folder: Path, images: Path) -> list[str]:
    """The command that makes the golden checkpoint of a process."""
    pool = {"state_dir": str(folder / "state"), "checkpoint_dir": str(images)}
    settings = {
        "pool": pool,
        "runtime": {"process": {"ports": ENGINE_PORTS}},
        "models": {"demo": engine_model("--memory", "64MiB", golden_sleep_level=1)},
    }
    (folder / "warmpool.toml").write_text(tomli_w.dumps(settings))
    return [PYTHON, "-m", "proxy", "checkpoint", "create", "demo", "-c", str(folder / "warmpool.toml")]


def in_namespace(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip


def starts(folder: Path) -> int:
    """How many engines of a folder were started."""
    logs = folder / "state" / "logs"
    return sum(path.read_text().count("listening on") for path in logs.iterdir()) if logs.is_dir() else 0


@criu
@needs_criu
def test_a_criu_configuration_of_somebody_elses_that_would_undo_ours_is_found(tmp_path: Path, images: Path) -> None:
    mounts = images / "mounts"
    mounts.mkdir()
    (images / "store").mkdir(mode=0o700)
    command = configured(tmp_path, images / "store")
    done = in_namespace(FOREIGN, str(mounts), "leave-running", *command)
    assert done.returncode == 1, done.stderr
    assert "/etc/criu/default.conf:1: leave-running: an engine goes on after its dump" in done.stderr
    assert "sed -i 1d /etc/criu/default.conf" in done.stderr
    assert starts(tmp_path) == 0


@criu
@needs_criu
def test_a_tmpfs_without_room_for_a_second_image_is_found(tmp_path: Path, images: Path) -> None:
    store = images / "store"
    store.mkdir(mode=0o700)
    command = configured(tmp_path, store)
    text = (tmp_path / "warmpool.toml").read_text()
    (tmp_path / "warmpool.toml").write_text(text.replace("[pool]", '[pool]\ncheckpoint_reserve = "1MiB"'))
    done = in_namespace(SMALL, str(store), *command)
    assert done.returncode == 1, done.stderr
    assert "nothing was started, for its checkpoint would not fit: the one that is there takes" in done.stderr
    assert starts(tmp_path) == 1


@pytest.mark.podman
@pytest.mark.skipif(why_no_podman() is not None, reason=str(why_no_podman()))
def test_a_script_that_is_only_run_at_the_dump_is_missed_before(host: Host) -> None:
    scripts = {"criu": {"action_scripts": {"pre-dump": "/no/such/script"}}}
    done = host.command("create", "demo", settings=host.settings(podman_keys=scripts))
    assert done.returncode == 1
    assert "models.demo.podman.criu.action_scripts.pre-dump: there is no /no/such/script" in done.stderr
    assert host.containers() == []
    assert starts(host.folder / "warmpool") == 0


async def test_a_server_says_at_start_and_reload_what_will_keep_checkpoints_from_being_written(
    tmp_path: Path,
) -> None:
    model = engine_model(api_key_file=str(tmp_path / "none"))
    proxy = await Proxy(tmp_path / "warmpool", settings={"models": {"demo": model}}).listening()
    try:
        said = f"checkpoints will fail: files of engines: models.demo.api_key_file: there is no {tmp_path}/none"
        for times in (1, 2):
            async with asyncio.timeout(PATIENCE_S):
                while proxy.log.read_text().count(said) < times:
                    await asyncio.sleep(0.02)
            proxy.process.send_signal(signal.SIGHUP)
    finally:
        proxy.process.terminate()
        await proxy.ended()
