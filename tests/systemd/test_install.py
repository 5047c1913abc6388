"""`warmpool install` and `uninstall`, and the units they write, as systemd reads them."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from proxy.cli.main import cli
from proxy.config.settings import Settings
from proxy.errors import HostError
from proxy.systemd import units
from proxy.telemetry import logs
from tests.support import PYTHON, ROOT

UNITS = (
    "mnt-checkpoint\\x2dram.mount", "podman.service.d/warmpool.conf", "podman.socket.d/warmpool.conf",
    "warmpool-doctor.service", "warmpool.service", "warmpool.socket",
)  # fmt: skip
MODEL = '[models.demo.process]\ncommand = ["engine", "{port}"]\n'
HAS_SYSTEMD = shutil.which("systemd-analyze") is not None


def settings(**tables: Any) -> Settings:
    return Settings(models={"demo": {"process": {"command": ["engine", "{port}"]}}}, **tables)


def run(root: Path, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(cli, [*arguments, "--root", str(root)])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for / with a configuration."""
    (tmp_path / "etc/warmpool").mkdir(parents=True)
    (tmp_path / "etc/warmpool/warmpool.toml").write_text(MODEL)
    return tmp_path


def installed(root: Path) -> list[str]:
    folder = root / "etc/systemd/system"
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def unit(root: Path, name: str) -> str:
    return (root / "etc/systemd/system" / name).read_text()


def test_it_says_what_it_would_do_and_does_nothing(root: Path) -> None:
    said = run(root, "install")
    assert "create     /etc/systemd/system/warmpool.service" in said
    assert "Nothing was done yet" in said
    assert installed(root) == []


def test_installing_twice_changes_nothing_and_uninstalling_leaves_the_configuration(root: Path) -> None:
    run(root, "install", "--yes")
    assert installed(root) == sorted(UNITS)
    assert {line.split()[0] for line in run(root, "install").splitlines()[:-1]} == {"unchanged"}
    assert "remove" in run(root, "uninstall")
    assert installed(root) == sorted(UNITS)
    run(root, "uninstall", "--yes")
    assert [str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()] == ["etc/warmpool/warmpool.toml"]
    assert "Nothing is installed" in run(root, "uninstall", "--yes")


def test_units_follow_the_configuration(root: Path) -> None:
    run(root, "install", "--yes")
    (root / "etc/warmpool/warmpool.toml").write_text(
        '[server]\nhost = "::1"\nport = 9000\n[pool]\ncheckpoint_dir = "/srv/images"\ncheckpoint_size = "200GiB"\n'
        + MODEL
    )
    run(root, "install", "--yes")
    assert "ListenStream=[::1]:9000" in unit(root, "warmpool.socket")
    assert "Options=size=200g,mode=0700,huge=within_size" in unit(root, "srv-images.mount")
    assert "Where=/srv/images\n" in unit(root, "srv-images.mount")
    assert "RequiresMountsFor=/var/lib/warmpool /srv/images\n" in unit(root, "warmpool.service")
    assert "mnt-checkpoint\\x2dram.mount" not in installed(root)


def test_an_upgrade_replaces_what_is_ours(root: Path) -> None:
    run(root, "install", "--yes")
    path = root / "etc/systemd/system/warmpool.socket"
    old = path.read_text().replace("NoDelay=yes\n", "")
    made = units.Installation(root)
    made.carry_out(made.steps({units.UNITS / "warmpool.socket": old.encode()}))
    assert "NoDelay" not in path.read_text()
    assert "replace    /etc/systemd/system/warmpool.socket" in run(root, "install", "--yes")
    assert "NoDelay" in path.read_text()


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_somebody_changed_stays_and_so_does_everything_else(root: Path, command: str) -> None:
    run(root, "install", "--yes")
    path = root / "etc/systemd/system/warmpool.service"
    path.write_text(path.read_text() + "# mine\n")
    (root / "etc/systemd/system/warmpool.socket").unlink()
    before = installed(root)
    assert "/etc/systemd/system/warmpool.service. Nothing was done" in run(root, command, "--yes", status=69)
    assert installed(root) == before
    assert path.read_text().endswith("# mine\n")


def test_a_file_that_was_there_before_is_not_ours(root: Path) -> None:
    folder = root / "etc/systemd/system"
    folder.mkdir(parents=True)
    (folder / "warmpool.socket").write_text("[Socket]\n")
    assert "not warmpool's any more" in run(root, "install", "--yes", status=69)


def test_a_configuration_that_cannot_be_used_installs_nothing(root: Path) -> None:
    (root / "etc/warmpool/warmpool.toml").write_text("[models]\n")
    assert "cannot be used" in run(root, "install", "--yes", status=78)
    (root / "etc/warmpool/warmpool.toml").unlink()
    assert "cannot be read" in run(root, "install", "--yes", status=78)


@pytest.mark.parametrize(
    ("tables", "said"),
    [({"server": {"port": 0}}, "server.port is 0"), ({"pool": {"checkpoint_dir": "images"}}, "an absolute path")],
)
def test_what_is_no_service_is_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(HostError, match=said):
        units.units(settings(**tables), Path("/x/bin/warmpool"))


@pytest.mark.parametrize(
    "pool", [{"checkpoint_size": "0"}, {"checkpoint_dir": "/dev/shm/warmpool"}, {"checkpoint_dir": "/run/warmpool"}]
)
def test_no_tmpfs_is_mounted_where_none_is_wanted_or_one_is(pool: dict[str, Any]) -> None:
    assert not [p for p in units.units(settings(pool=pool), Path("/x/warmpool")) if p.suffix == ".mount"]


def test_seccomp_filters_only_where_no_engine_is_checkpointed_below_them(root: Path) -> None:
    run(root, "install", "--yes")
    assert "warmpool.service.d/containers.conf" not in installed(root)
    (root / "etc/warmpool/warmpool.toml").write_text('[models.a.podman]\nimage = "x"\ncommand = ["{port}"]\n')
    run(root, "install", "--yes")
    assert "SystemCallFilter=" in unit(root, "warmpool.service.d/containers.conf")
    (root / "etc/warmpool/warmpool.toml").write_text(MODEL)
    run(root, "install", "--yes")
    assert not (root / "etc/systemd/system/warmpool.service.d").exists()


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="no systemd-escape")
@pytest.mark.parametrize("path", ["/mnt/checkpoint-ram", "/srv/a b/ü", "/.hidden/x", "/srv/images", "/a/.b/c_d:e.f"])
def test_mount_units_are_named_as_systemd_wants(path: str) -> None:
    done = subprocess.run(["systemd-escape", "-p", "--suffix=mount", path], capture_output=True, text=True, check=True)
    assert units.mount_unit(Path(path)) == done.stdout.strip()


@pytest.mark.skipif(not HAS_SYSTEMD, reason="no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    program = tmp_path / "bin/warmpool"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    made = units.units(settings(), program)
    containers = Settings(models={"demo": {"podman": {"image": "x", "command": ["{port}"]}}})
    made |= units.units(containers, program)
    for path, content in made.items():
        target = tmp_path / path.name if path.suffix != ".conf" else tmp_path / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    names = [str(tmp_path / p.name) for p in made if p.suffix != ".conf"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False
    )
    # podman.socket need not be installed here, and other units of this host may have faults of their own.
    ours = [line for line in done.stderr.splitlines() if re.search(r"warmpool|mnt-", line)]
    assert ours == []


def test_the_record_of_what_is_installed_must_be_readable(root: Path) -> None:
    (root / "etc/warmpool/.installed.json").write_text("[")
    assert ".installed.json" in run(root, "install", "--yes", status=69)


def test_the_units_are_in_the_wheel(tmp_path: Path) -> None:
    build = [
        PYTHON,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    if subprocess.run([PYTHON, "-c", "import hatchling"], check=False, capture_output=True).returncode:
        pytest.skip("no hatchling here")
    subprocess.run(build, check=True, capture_output=True)
    names = subprocess.run(
        [PYTHON, "-m", "zipfile", "-l", str(next(tmp_path.glob("*.whl")))], check=True, capture_output=True, text=True
    ).stdout
    for name in (*UNITS[1:], "checkpoints.mount", "warmpool.service.d/containers.conf"):
        assert f"proxy/systemd/units/{name}" in names


def test_journal_lines_have_a_priority_each(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = logs.JournalFormatter("%(message)s")

    def formatted(level: int, text: str) -> str:
        return formatter.format(logging.LogRecord("x", level, "", 0, text, None, None))

    assert formatted(logging.INFO, "good") == "<6>good"
    assert formatted(logging.ERROR, "bad\nworse") == "<3>bad\n<3>worse"
    assert formatted(logging.WARNING, "") == "<4>"
