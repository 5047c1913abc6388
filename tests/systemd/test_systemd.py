"""warmpool under a real systemd: installed, restarted, killed, hung, reloaded, uninstalled."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w

from tests.podman_bench import engine_image
from tests.support import PYTHON, ROOT, why_no_criu
from tests.systemd.test_restart import LATE, QUEUED, STREAMS
from tests.systemd_machine import Machine, engine, why_no_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.podman,
    pytest.mark.xdist_group("systemd"),  # one machine for all
    pytest.mark.timeout(300),
    pytest.mark.skipif(why_no_machine() is not None, reason=why_no_machine() or ""),
]

CONFIG = "/etc/warmpool/warmpool.toml"
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


def settings(model: dict[str, Any], **tables: Any) -> str:
    """The file for a model `demo`."""
    pool = {"checkpoint_size": "256MiB", "checkpoint_reserve": "1MiB"}
    model = {"max_concurrency": STREAMS, "health": {"interval": "20ms"}, "idle": AWAKE, **model}
    return tomli_w.dumps({"pool": pool, "models": {"demo": model}, **tables})


PROCESS = {"process": {"command": ["{python}", "-m", "loadtest.engine", *engine()], "cwd": str(ROOT)}}
QUICK = {"sleeping": "200ms", "suspended": "400ms", "checkpointed": "600ms"}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One with warmpool installed and started, its engine a process."""
    made = Machine(tmp_path_factory.mktemp("machine"))
    try:
        state = made.booted()
        if state not in ("running", "degraded"):
            pytest.skip(f"systemd does not come up in a container here: {state}")
        made.write(CONFIG, settings(PROCESS))
        made.warmpool("install", "--yes", "--start")
        yield made
    finally:
        made.close()


def restarts(machine: Machine) -> int:
    return int(machine.property("warmpool.service", "NRestarts"))


def test_it_is_ready_when_systemctl_returns_and_says_so(machine: Machine) -> None:
    assert machine.property("warmpool.service", "StatusText") == "serving 1 models"
    assert machine.property("warmpool-doctor.service", "Result") == "success"
    assert re.search(r"^tmpfs .*256M", machine.run("df", "-h", "/mnt/checkpoint-ram"), re.MULTILINE)
    assert machine.inside("ask")["status"] == 200


@pytest.mark.skipif(why_no_criu() is not None, reason=why_no_criu() or "")
def test_an_engine_is_checkpointed_and_restored_inside_the_unit(machine: Machine) -> None:
    machine.write(CONFIG, settings({**PROCESS, "idle": QUICK}))
    machine.run("systemctl", "reload", "warmpool.service")
    machine.inside("ask")
    machine.inside("until", "checkpointed")
    asked = machine.inside("ask")
    assert (asked["status"], asked["tier"]) == (200, "checkpointed")
    assert "ready from checkpointed" in machine.journal("warmpool.service")
    machine.write(CONFIG, settings(PROCESS))
    machine.run("systemctl", "reload", "warmpool.service")


def test_restart_in_the_middle_of_streams_and_a_queue_loses_nothing(machine: Machine) -> None:
    assert machine.inside("restart") == {"streams": STREAMS, "answers": QUEUED + LATE, "status": 0}


def test_kill_9_is_mended_by_a_restart(machine: Machine) -> None:
    before = restarts(machine)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "warmpool.service")
    assert machine.inside("ask")["status"] == 200
    assert restarts(machine) == before + 1


def test_one_that_hangs_is_ended_by_the_watchdog_and_clients_wait(machine: Machine) -> None:
    machine.write("/etc/systemd/system/warmpool.service.d/quick.conf", "[Service]\nWatchdogSec=2\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "warmpool.service")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "warmpool.service")
    assert machine.inside("ask")["status"] == 200
    assert restarts(machine) == 1
    assert "Watchdog timeout" in machine.journal("warmpool.service")
    drop_in = machine.root / "etc/systemd/system/warmpool.service.d/quick.conf"
    drop_in.unlink()
    with contextlib.suppress(OSError):  # something of the installation's is in it
        drop_in.parent.rmdir()
    machine.run("systemctl", "daemon-reload")


def test_reload_takes_a_good_file_and_refuses_a_bad_one(machine: Machine) -> None:
    machine.write(CONFIG, settings({**PROCESS, "aliases": ["second"]}))
    machine.run("systemctl", "reload", "warmpool.service")
    assert "adjusted demo" in machine.property("warmpool.service", "StatusText")
    machine.write(CONFIG, settings({**PROCESS, "nonsense": 1}))
    machine.fails("systemctl", "reload", "warmpool.service")
    assert "models.demo.nonsense: unknown key" in machine.journal("warmpool.service")
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=HUP", "warmpool.service")
    assert machine.inside("ask")["status"] == 200
    assert "reload: nothing was changed" in machine.journal("warmpool.service", "--priority=err")
    machine.write(CONFIG, settings(PROCESS))
    machine.run("systemctl", "reload", "warmpool.service")


def test_the_exposure_is_what_the_documentation_says(machine: Machine) -> None:
    report = machine.run("systemd-analyze", "security", "--no-pager", "warmpool.service")
    found = re.search(r"Overall exposure level for warmpool.service: ([\d.]+)", report)
    assert found
    assert float(found[1]) <= 8.5


def test_containers_outlive_warmpool_under_systemd_and_are_adopted(machine: Machine) -> None:
    podman = {"podman": {"image": engine_image(), "command": [*engine()]}}
    machine.write(CONFIG, settings(podman))
    assert "containers.conf" in machine.warmpool("install", "--yes", "--start")
    asked = machine.inside("ask")
    assert asked["status"] == 200, asked
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "warmpool.service")
    assert machine.inside("ask")["tier"] == "ready"
    machine.run("systemctl", "restart", "warmpool.service")
    assert machine.inside("ask")["tier"] == "ready"
    assert machine.journal("warmpool.service").count("demo-1 adopted: ready") == 2
    assert len(machine.run("podman", "ps", "--quiet").split()) == 1
    if why_no_criu() is not None:
        return
    machine.write(CONFIG, settings({**podman, "idle": QUICK}))
    machine.run("systemctl", "reload", "warmpool.service")
    machine.inside("until", "checkpointed")
    assert machine.inside("ask")["tier"] == "checkpointed"
    report = machine.run("systemd-analyze", "security", "--no-pager", "warmpool.service")
    found = re.search(r"Overall exposure level for warmpool.service: ([\d.]+)", report)
    assert found
    assert float(found[1]) <= 5.5


def test_a_service_unmounts_what_podman_mounted_outside_its_own_namespace(machine: Machine) -> None:
    machine.run("sh", "-c", "mkdir -p /mnt/left && mount -t tmpfs left /mnt/left")
    code = "import asyncio; from proxy.runtime.podman import abandoned; asyncio.run(abandoned.unmount('/mnt/left'))"
    limits = [f"--property={p}" for p in ("ProtectSystem=full", "NoNewPrivileges=yes", "RestrictNamespaces=mnt")]
    machine.run(
        "systemd-run", "--wait", "--pipe", "--quiet", *limits, f"--working-directory={ROOT}", PYTHON, "-c", code
    )
    assert "/mnt/left" not in machine.run("cat", "/proc/1/mountinfo")


def test_uninstalling_leaves_the_configuration_and_the_state(machine: Machine) -> None:
    said = machine.warmpool("uninstall", "--yes")
    assert "Kept: /etc/warmpool" in said
    assert machine.property("warmpool.service", "LoadState") == "not-found"
    assert (machine.root / "etc/warmpool/warmpool.toml").exists()
    assert (machine.root / "var/lib/warmpool").is_dir()
    assert machine.run("ls", "/etc/systemd/system").count("warmpool") == 0
