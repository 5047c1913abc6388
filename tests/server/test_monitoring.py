"""Metrics, and the dashboard and alert rules that are made of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.pool.instance import State
from proxy.tiers import Tier
from tests.server.test_http import ASK
from tests.support import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.front import Front

ALERTS = ROOT / "config" / "prometheus-alerts.yml"
DASHBOARD = ROOT / "config" / "grafana-dashboard.json"
ADDED_BY_PROMETHEUS = {"instance", "job"}
WORDS = {
    "model": {"demo", "unknown"},
    "tier": {tier.label for tier in Tier},
    "state": {state.value for state in State},
}
"""What the values of labels may be, for the model `demo`; others are checked by their shape."""


async def exposed(front: Front) -> dict[str, set[str]]:
    """Name of each sample → its labels; after a request, so that everything is there."""
    await front.post("/v1/completions", ASK)
    await front.post("/v1/completions", {**ASK, "stream": True})
    async with front.session.get("/metrics") as response:
        awake = await response.text()
    async with front.session.post("/admin/models/demo/stop", json={}) as response:
        assert response.status == 200
    front.metrics.gpu_memory.labels("0", "used").set(1)  # what needs a GPU, and what nobody provokes here
    front.metrics.instance_gpu.labels("demo").set(1)
    front.metrics.gpu_leaks.labels("demo")
    front.metrics.refused.labels("key")
    for of_operations in (front.metrics.overdue, front.metrics.hanging):
        of_operations.labels("restore")
    front.metrics.written_off.labels("demo").set(0)
    async with front.session.get("/metrics") as response:
        text = await response.text()
    found: dict[str, set[str]] = {}
    for family in [*text_string_to_metric_families(awake), *text_string_to_metric_families(text)]:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Where a PromQL expression stands, and the expression."""
    # Each is on one line, or folded below `expr: >` (YAML's), indented further.
    for found in re.finditer(r"expr: (>\n((?: {10}.*\n)+)|.*\n)", ALERTS.read_text()):
        yield ALERTS.name, found[2] or found[1]
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]


async def test_every_metric_and_label_that_is_asked_for_exists(front: Front) -> None:
    there = await exposed(front)
    asked = set()
    for where, query in queries():
        names = set(re.findall(r"\b(?:warmpool_|process_|vllm:)\w+", query))
        assert names or "up{" in query, f"{where}: no metric in {query}"
        for name in names:
            assert name in there, f"{where}: there is no metric {name}"
        asked |= names
        known = set().union(*(there[name] for name in names)) | ADDED_BY_PROMETHEUS | {"le"}
        plain = re.sub(r'"[^"]*"', '""', query)
        labels = set(re.findall(r"[{,]\s*(\w+)\s*[=!]~?", plain))
        for group in re.findall(r"\b(?:by|ignoring|on)\s*\(([^)]*)\)", plain):
            labels |= {label.strip() for label in group.split(",")}
        assert labels <= known, f"{where}: no label {labels - known} in {query}"
    ours = {name for name in there if name.startswith("warmpool_") and not name.endswith("_created")}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours} <= shown | UNSHOWN


UNSHOWN: set[str] = set()
"""Metrics that neither the dashboard nor an alert uses."""


async def test_names_and_labels_follow_the_conventions(front: Front) -> None:
    """prometheus.io/docs/practices/naming: a prefix, base units, `_total` for counters; bounded labels."""
    await front.post("/v1/completions", ASK)
    await front.post("/v1/completions", {**ASK, "model": "no-such-model"})
    await front.session.get("/nowhere")
    async with front.session.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("warmpool_"):
            assert family.name.startswith(("process_", "vllm:"))
            continue
        assert re.fullmatch(r"warmpool(_[a-z]+)+", family.name)
        assert family.documentation
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb", "_kb")), "base units"
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name.endswith(("_total", "_created"))
            for label, value in sample.labels.items():
                assert label in {"model", "tier", "state", "stage", "reason", "status", "le", "version"} | ALSO_BOUNDED
                if label in WORDS:
                    assert value in WORDS[label], (sample.name, label, value)
                elif label == "status":
                    assert re.fullmatch(r"[1-5]\d\d", value)


ALSO_BOUNDED = {"gpu", "kind", "key", "result"}
"""Further labels, whose values are words of this project or things that the configuration or the host has."""


async def test_what_seldom_happens_begins_at_0(front: Front) -> None:
    for tier in Tier:
        value = front.metrics.registry.get_sample_value(
            "warmpool_wake_failures_total", {"model": "demo", "tier": tier.label}
        )
        assert value == 0.0
    assert front.metrics.registry.get_sample_value("warmpool_engine_exits_total", {"model": "demo"}) == 0.0


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels: list[dict[str, Any]] = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text()))
    assert {name for name in used if not name.startswith("__")} <= variables


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool in PATH (of Debian's package prometheus)")
def test_promtool_finds_the_rules_good_and_they_fire_when_they_should() -> None:
    for arguments in (["check", "rules", str(ALERTS)], ["test", "rules", "tests/prometheus/alerts.test.yml"]):
        done = subprocess.run(["promtool", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
