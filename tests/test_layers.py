"""Each module imports from lower layers only, and only cli.py names concrete runtimes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "proxy"

LAYERS: dict[str, int] = {
    "proxy": -1,
    "proxy.errors": 0,
    "proxy.owned": 0,
    "proxy.turns": -1,
    "proxy.metrics": 0,
    "proxy.overdue": 1,
    "proxy.last_resort": 0,
    "proxy.daemon_thread": 0,
    "proxy.service": 1,
    "proxy.cpu": 0,
    "proxy.manifest": 1,
    "proxy.http1": 0,
    "proxy.upstream": 1,
    "proxy.masking": 0,
    "proxy.logs": 0,
    "proxy.install": 3,
    "proxy.reload": 3,
    "proxy.usage": 3,
    "proxy.rebuild": 9,
    "proxy.renewal": 9,
    "proxy.install_commands": 8,
    "proxy.instance": 1,
    "proxy.wake_failure": 2,
    "proxy.config": 2,
    "proxy.gpu_ledger": 2,
    "proxy.engine": 3,
    "proxy.engine_key": 3,
    "proxy.reference": 3,
    "proxy.reference_page": 4,
    "proxy.checkpoints": 3,
    "proxy.policy": 3,
    "proxy.ledger": 4,
    "proxy.runtime": 3,
    "proxy.cgroups": -1,
    "proxy.host": 0,
    "proxy.memory_ledger": 3,
    "proxy.memory_watch": 6,
    "proxy.criu_images": 0,
    "proxy.criu_pages": 1,
    "proxy.runtime.links": 4,
    "proxy.runtime.listeners": 5,
    "proxy.runtime.bridges": 4,
    "proxy.runtime.log_size": 4,
    "proxy.gpu": 1,
    "proxy.weights": 1,
    "proxy.inputs": 3,
    "proxy.importenv": 3,
    "proxy.runtime.launch": 4,
    "proxy.runtime.processes": 4,
    "proxy.runtime.claim": 4,
    "proxy.runtime.command": 3,
    "proxy.runtime.criu": 4,
    "proxy.runtime.ports": 4,
    "proxy.runtime.namespaces": 4,
    "proxy.runtime.bundle": 4,
    "proxy.runtime.leftovers": 4,
    "proxy.runtime.podman_api": 5,
    "proxy.runtime.podman_service": 4,
    "proxy.runtime.base": 4,
    "proxy.runtime.log_tail": 5,
    "proxy.runtime.cuda": 4,
    "proxy.inside": -1,
    "proxy.inside.warmpool_vllm": 1,
    "proxy.inside.warmpool_vllm.frontend": 0,
    "proxy.inside.warmpool_vllm.randomness": 0,
    "proxy.inside.warmpool_vllm.weights": 0,
    "proxy.reseed": 5,
    "proxy.runtime.files": 3,
    "proxy.runtime.inside": 4,
    "proxy.runtime.guard": 5,
    "proxy.runtime.bounded": 5,
    "proxy.runtime.orphan_reaper": 5,
    "proxy.runtime.container": 5,
    "proxy.runtime.images": 5,
    "proxy.runtime.strays": 6,
    "proxy.runtime.process": 7,
    "proxy.runtime.podman": 7,
    "proxy.doctor": 0,
    "proxy.doctor.report": 0,
    "proxy.doctor.view": 0,
    "proxy.doctor.needs": 3,
    "proxy.doctor.containers": 7,
    "proxy.doctor.network": 5,
    "proxy.doctor.gpus": 4,
    "proxy.doctor.memory": 4,
    "proxy.doctor.dumps": 8,
    "proxy.doctor.selftest": 8,
    "proxy.doctor.examination": 9,
    "proxy.doctor.named_files": 4,
    "proxy.doctor.randomness": 6,
    "proxy.doctor.preflight": 10,
    "proxy.golden": 7,
    "proxy.checkpoint_commands": 11,
    "proxy.control": 3,
    "proxy.status_table": 8,
    "proxy.control_commands": 9,
    "proxy.tracing": 7,
    "proxy.slots": 5,
    "proxy.written_off": 6,
    "proxy.gpu_watch": 6,
    "proxy.stalls": 6,
    "proxy.pool_status": 6,
    "proxy.steps": 7,
    "proxy.pool": 8,
    "proxy.web": 6,
    "proxy.keys": 1,
    "proxy.line": 0,
    "proxy.key_commands": 3,
    "proxy.prompt_tokens": 0,
    "proxy.meter": 1,
    "proxy.quota": 0,
    "proxy.web.caller": 6,
    "proxy.web.tls": 7,
    "proxy.web.listen": 7,
    "proxy.web.handed": 7,
    "proxy.web.traffic": 7,
    "proxy.web.guard": 8,
    "proxy.web.guard_pages": 7,
    "proxy.web.guard_cors": 9,
    "proxy.web.guard_protocol": 7,
    "proxy.web.routes": 7,
    "proxy.route_check": 8,
    "proxy.web.form": 7,
    "proxy.web.json_edit": 7,
    "proxy.web.request_id": 8,
    "proxy.web.response_ids": 7,
    "proxy.web.heartbeat": 7,
    "proxy.web.local": 9,
    "proxy.web.addressing": 8,
    "proxy.web.answer": 6,
    "proxy.web.faults": 6,
    "proxy.web.refusals": 6,
    "proxy.web.relay": 9,
    "proxy.web.realtime": 10,
    "proxy.web.front": 10,
    "proxy.web.admin": 9,
    "proxy.web.admin_events": 9,
    "proxy.web.admin_orders": 9,
    "proxy.web.page": 9,
    "proxy.web.admin_routes": 10,
    "proxy.web.app": 11,
    "proxy.web.serving": 12,
    "proxy.cli": 13,
    "proxy.__main__": 14,
}
"""The layers of docs/architecture.md, with the order inside a layer where modules of one layer use each other."""


def name_of(path: Path) -> str:
    parts = ("proxy", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """The modules of this project that a module imports, for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if path.relative_to(ROOT).parts[0] == "inside" and node.level == 1:
                continue  # its package has another name where it runs
            assert node.level == 0, f"{path}: relative import"
            found |= {full if (full := f"{node.module}.{a.name}") in LAYERS else node.module for a in node.names}
    return {name for name in found if name.split(".")[0] == "proxy"}


MODULES = sorted(ROOT.rglob("*.py"))


def test_every_module_has_a_layer() -> None:
    assert {name_of(path) for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    name = name_of(path)
    for imported in imports_of(path):
        assert LAYERS[imported] < LAYERS[name], f"{name} imports {imported} from a layer that is not below it"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_names_concrete_runtimes(path: Path) -> None:
    concrete = {"proxy.runtime.process", "proxy.runtime.podman"}
    if name_of(path) != "proxy.cli":
        assert not imports_of(path) & concrete


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_project_does_not_import_its_tests_or_load_tests(path: Path) -> None:
    names = {n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.split(".")[0] in {"tests", "loadtest"}}
