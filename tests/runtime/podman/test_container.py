"""What podman is told: the specification of a container, from settings alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxy.config.engine import CriuSettings
from proxy.config.model import ModelSettings
from proxy.host.files import write_if_other
from proxy.runtime.podman import container

PLAIN = {"image": "localhost/x", "command": ["--port", "{port}", "--host", "{host}", "--name", "{model}"]}


def model(*, name: str | None = None, **podman: Any) -> ModelSettings:
    return ModelSettings(name=name, podman={**PLAIN, **podman})


def specification(settings: ModelSettings, host_port: int | None = None) -> dict[str, Any]:
    return container.specification(
        name="c", image="0123", key="demo", model=settings, host_port=host_port, labels={"owner": "o"},
        environment={"MARK": "m"}, criu_config=Path("/run/c.conf"), seccomp=Path("/run/s.json"), log=Path("/run/c.log"),
        log_size=1 << 20,
    )  # fmt: skip


def test_the_least_a_container_gets() -> None:
    spec = specification(model(name="org/Demo"))
    assert spec["image"] == "0123", "by its id: what the name means may change at any time"
    assert spec["command"] == ["--port", "8000", "--host", "0.0.0.0", "--name", "org/Demo"]
    assert spec["netns"] == {"nsmode": "bridge"}
    assert "portmappings" not in spec
    assert spec["privileged"] is False
    assert spec["devices"] == []
    assert spec["labels"] == {"io.warmpool.owner": "o"}
    assert spec["annotations"] == {"org.criu.config": "/run/c.conf"}
    assert spec["seccomp_profile_path"] == "/run/s.json"
    assert spec["env"] == {"MARK": "m"}
    assert spec["resource_limits"] == {"pids": {"limit": -1}}
    assert (spec["restart_policy"], spec["healthconfig"]) == ("no", {"Test": ["NONE"]})


def test_every_setting_is_passed_on() -> None:
    spec = specification(
        model(
            entrypoint=["vllm", "serve"],
            env={"HF_TOKEN": "secret"},
            volumes=[
                {"source": "/srv/models", "target": "/models"},
                {"source": "cache", "target": "/root/.cache", "writable": True},
            ],
            devices=["nvidia.com/gpu=0", "/dev/nvidiactl"],
            shm_size="8GiB",
            ulimits={"memlock": "-1:-1", "nofile": "65536", "nproc": "4096:8192"},
            pids_limit=1000,
            memory_limit="64GiB",
            privileged=True,
            security_options=["label=disable", "apparmor=unconfined", "no-new-privileges", "unmask=/proc/acpi:/sys"],
            network="mine",
            container_port=9000,
        )
    )
    assert spec["entrypoint"] == ["vllm", "serve"]
    assert spec["command"][1] == "9000"
    assert spec["env"]["HF_TOKEN"] == "secret"
    assert spec["mounts"] == [
        {"Type": "bind", "Source": "/srv/models", "Destination": "/models", "Options": ["rbind", "ro"]}
    ]
    assert spec["volumes"] == [{"Name": "cache", "Dest": "/root/.cache", "Options": ["rw"]}]
    assert spec["devices"] == [{"path": "nvidia.com/gpu=0"}, {"path": "/dev/nvidiactl"}]
    assert spec["shm_size"] == 8 << 30
    limits = {limit["type"]: (limit["soft"], limit["hard"]) for limit in spec["r_limits"]}
    assert limits["memlock"] == (-1, -1)
    assert limits["nofile"] == (65536, 65536)
    assert limits["nproc"] == (4096, 8192)
    assert spec["resource_limits"] == {"pids": {"limit": 1000}, "memory": {"limit": 64 << 30}}
    assert spec["privileged"] is True
    assert spec["selinux_opts"] == ["disable"]
    assert spec["apparmor_profile"] == "unconfined"
    assert spec["no_new_privileges"] is True
    assert spec["unmask"] == ["/proc/acpi", "/sys"]
    assert spec["Networks"] == {"mine": {}}


def test_on_the_hosts_network_an_engine_listens_on_loopback_at_a_port_of_its_own() -> None:
    spec = specification(model(network="host"), host_port=19105)
    assert spec["netns"] == {"nsmode": "host"}
    assert spec["command"][:4] == ["--port", "19105", "--host", "127.0.0.1"]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"command": ["--port", "{port}", "--more"]}, True),
        ({"image": "localhost/y"}, True),
        ({"env": {"A": "b"}}, True),
        ({"shm_size": "1GiB"}, True),
        ({"criu": {"ghost_limit": "1GiB"}}, False),
        ({}, False),
    ],
)
def test_another_engine_has_another_digest_and_how_it_is_dumped_does_not_matter(
    change: dict[str, Any], differs: bool
) -> None:
    assert (container.spec_digest("demo", model(**change)) != container.spec_digest("demo", model())) is differs


def test_criu_is_told_what_podman_cannot_pass() -> None:
    assert container.criu_options(CriuSettings(), None).splitlines()[1:] == [
        "tcp-close", "file-locks", "link-remap", "ghost-limit 4294967296", "network-lock skip",
    ]  # fmt: skip
    other = CriuSettings(
        tcp_established=True, tcp_close=False, file_locks=False, link_remap=False, ghost_limit="1MiB",
        network_lock="nftables", options=["lsm-profile apparmor:x"],
    )  # fmt: skip
    assert container.criu_options(other, Path("/run/actions")).splitlines()[1:] == [
        "tcp-established", "ghost-limit 1048576", "network-lock nftables", "action-script /run/actions",
        "lsm-profile apparmor:x",
    ]  # fmt: skip


def test_the_action_dispatcher_runs_the_script_of_the_point_it_is_at(tmp_path: Path) -> None:
    (tmp_path / "it's").write_text('#!/bin/sh\necho "mine $CRTOOLS_SCRIPT_ACTION"\n')
    (tmp_path / "it's").chmod(0o755)
    script = tmp_path / "dispatch"
    script.write_text(container.action_dispatcher({"pre-dump": tmp_path / "it's"}))
    for point, said in (("pre-dump", "mine pre-dump\n"), ("post-dump", "")):
        done = subprocess.run(
            ["sh", str(script)], env={"CRTOOLS_SCRIPT_ACTION": point}, capture_output=True, text=True, check=True
        )
        assert done.stdout == said


def test_the_runtime_wrapper_finds_the_criu_of_a_container(tmp_path: Path) -> None:
    (tmp_path / "abc").mkdir()
    (tmp_path / "abc" / "criu").write_text("#!/bin/sh\necho mine\n")
    (tmp_path / "abc" / "criu").chmod(0o755)
    (tmp_path / "runc").write_text("#!/bin/sh\ncriu 2>/dev/null || echo theirs\n")
    (tmp_path / "runc").chmod(0o755)
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(container.runtime_wrapper(str(tmp_path / "runc"), tmp_path))
    for id_, said in (("abc", "mine\n"), ("other", "theirs\n")):
        done = subprocess.run(
            ["/bin/sh", str(wrapper), "restore", "--bundle", "b", id_],
            env={"PATH": "/nowhere"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == said


@pytest.mark.parametrize("privileged", [False, True])
def test_no_profile_that_allows_io_uring_is_used(tmp_path: Path, privileged: bool) -> None:
    default = tmp_path / "default.json"
    allowed = {"names": ["read", *container.IO_URING], "action": "SCMP_ACT_ALLOW"}
    default.write_bytes(orjson.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [allowed]}))
    engine = container.engine_of(model(privileged=privileged))
    path = container.seccomp_profile(engine, tmp_path / "made", default)
    assert path is not None
    profile = orjson.loads(path.read_bytes())
    for call in profile["syscalls"]:
        assert call["action"] != "SCMP_ACT_ALLOW" or not {*container.IO_URING} & {*call["names"]}
    refused = [c for c in profile["syscalls"] if c["action"] == "SCMP_ACT_ERRNO" and c.get("errnoRet") == 38]
    assert refused[0]["names"] == [*container.IO_URING]
    assert path.stat().st_mode & 0o777 == 0o600


def test_podmans_own_profile_is_left_alone_where_it_forbids_io_uring(tmp_path: Path) -> None:
    default = tmp_path / "default.json"
    default.write_bytes(orjson.dumps({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}))
    assert container.seccomp_profile(container.engine_of(model()), tmp_path, default) is None
    assert container.seccomp_profile(container.engine_of(model()), tmp_path, tmp_path / "none") is None
    mine = model(seccomp="/etc/mine.json")
    assert container.seccomp_profile(container.engine_of(mine), tmp_path, default) == Path("/etc/mine.json")


def test_a_file_is_written_once(tmp_path: Path) -> None:
    path = write_if_other(tmp_path / "a" / "file", b"x", mode=0o700)
    before = path.stat()
    assert before.st_mode & 0o777 == 0o700
    write_if_other(path, b"x")
    assert path.stat().st_ino == before.st_ino
    write_if_other(path, b"y")
    assert path.read_bytes() == b"y"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
