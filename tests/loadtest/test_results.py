"""The load tests' figures: statistics, files, comparisons, where the time went, traces, the page."""

from __future__ import annotations

import random
import re
import statistics
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hdrh.histogram import HdrHistogram

from loadtest import attribution, compare_runs, machine, results, stats, tables, trace
from loadtest.client import Outcome
from loadtest.commands import cli
from loadtest.ladder import Checks
from loadtest.report import page, pictures
from loadtest.report.figures import figures
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = ROOT / "tests" / "data" / "trace.csv"


def lognormal(count: int, seed: int = 0, shift: float = 0.0) -> list[float]:
    draw = random.Random(seed)
    return [draw.lognormvariate(shift, 0.3) for _ in range(count)]


# --- statistics ---


@pytest.mark.parametrize("count", [1, 2, 10, 11, 80])
def test_the_interval_is_that_of_a_plain_bootstrap(count: int) -> None:
    values = lognormal(count)
    draw = random.Random(1)
    plain = sorted(statistics.median(draw.choices(values, k=count)) for _ in range(4000))
    made = stats.summary(values)
    assert made is not None
    ordered = sorted(values)
    # Both draw at random: the ends are the same or neighbours among the samples.
    spread = (ordered[-1] - ordered[0]) / max(4, count / 4) if count > 11 else 0.0
    assert made.low == pytest.approx(plain[100], abs=spread)
    assert made.high == pytest.approx(plain[3899], abs=spread)
    assert made.low <= made.median == statistics.median(values) <= made.high


def test_outliers_are_counted_and_kept() -> None:
    made = stats.summary([1.0] * 5 + [1.1] * 5 + [9.0])
    assert made is not None
    assert made.outliers == (9.0,)
    assert made.most == 9.0
    assert made.n == 11


def test_percentiles_are_nearest_ranks() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [stats.percentile(ordered, p) for p in (1, 50, 99, 99.9, 100)] == [1, 50, 99, 100, 100]
    assert stats.percentile([7.0], 50) == 7.0


def test_a_ratio_has_an_interval() -> None:
    same = stats.ratio(lognormal(40, 1), lognormal(40, 2))
    slower = stats.ratio(lognormal(40, 1), lognormal(40, 2, shift=0.5))
    assert same is not None
    assert slower is not None
    assert same.low < 1 < same.high
    assert slower.low > 1
    assert stats.ratio([], [1.0]) is None


def test_a_histogram_can_be_read_by_other_tools() -> None:
    made = stats.histogram([0.001] * 99 + [2.0])
    assert made.count == 100
    assert made.at_s(50) == pytest.approx(0.001, rel=0.01)
    assert HdrHistogram.decode(made.encoded()).get_max_value() == pytest.approx(2_000_000, rel=0.01)


# --- files ---


def outcome(ttft_s: float = 0.25, tier: str = "checkpointed", error: str | None = None) -> Outcome:
    timing = "queue;dur=1.0, wake;dur=200.0, restore;dur=150.0, podman;dur=90.0, criu;dur=50.0, health;dur=30.0"
    made = Outcome("series", {"model": "demo"}, 0, connect_s=0.001, headers_s=0.2, ttft_s=ttft_s, end_s=ttft_s + 1)
    made.headers = {"x-warmpool-tier": tier, "server-timing": timing if tier != "ready" else "queue;dur=0.0"}
    made.error, made.status = error, 200
    made.token_s.extend([ttft_s, ttft_s + 0.1, ttft_s + 0.4])
    return made


def run_file(path: Path, command: str, series: dict[str, list[float]], **options: Any) -> Path:
    with results.Writer(path, command, options) as writer:
        for name, values in series.items():
            for value in values:
                writer.outcome(outcome(value, name.split(",")[0]), name)
        writer.state({"demo": {"queue": 2, "leases": 1, "instances": {"demo-1": "ready"}}})
        writer.state({"demo": {"queue": 0, "leases": 0, "instances": {}}})
        writer.note("a note with <b>markup</b>")
        writer.count(lost=0)
        writer.close()
    return path


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = run_file(tmp_path / "a.jsonl", "restore", {"ready": [0.02] * 12, "stopped": [5.0] * 3}, count=12)
    found = results.read(path)
    assert found.complete
    assert found.options == {"count": 12}
    assert found.values("ready") == [0.02] * 12
    assert found.series() == ["ready", "stopped"]
    assert found.machine["cores"]
    assert found.versions["warmpool"]
    assert "fewer than 10 samples: stopped (3)" in found.notes
    assert found.samples[0]["values"]["gap_most_s"] == pytest.approx(0.3)
    assert found.samples[-1]["stages_s"]["criu"] == 0.05


def test_versions_that_are_learned_late_are_in_the_file(tmp_path: Path) -> None:
    with results.Writer(tmp_path / "r", "restore", {}) as writer:
        writer.learn({"vllm": "0.20.2"})
        writer.learn({"vllm": "0.20.2"})
        writer.close()
    assert (tmp_path / "r").read_bytes().count(b'"kind":"versions"') == 1
    found = results.read(tmp_path / "r")
    assert found.versions["vllm"] == "0.20.2"
    assert "vllm 0.20.2" in tables.head(found)


def test_what_an_engine_is_made_of_is_read_from_its_process(tmp_path: Path) -> None:
    site = tmp_path / "opt/site"
    (site / "torch").mkdir(parents=True)
    (site / "vllm").mkdir()
    (site / "torch/version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    (site / "vllm/_version.py").write_text("__version__: str\n__version__ = version = '0.20.2'\n")
    maps = (
        "7f00-7f01 r-xp 00000000 00:1f 12 /opt/other/torch/lib/libc10.so\n"
        "7f02-7f03 r-xp 00000000 00:1f 13 /opt/site/torch/lib/libtorch_cpu.so\n"
        "7f04-7f05 r-xp 00000000 00:1f 14 /opt/site/vllm/_C.abi3.so\n"
    )
    assert machine.loaded(maps, tmp_path) == {"vllm": "0.20.2", "torch": "2.11.0+cu130", "CUDA of torch": "13.0"}
    (site / "torch/version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert machine.loaded(maps, tmp_path) == {"vllm": "0.20.2", "torch": "2.13.0+cpu"}
    assert machine.loaded("", tmp_path) == {}


class Nvml:
    """What is asked of pynvml."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    nvmlShutdown = nvmlInit  # noqa: N815

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCount": 1, "nvmlDeviceGetHandleByIndex": "card", "nvmlDeviceGetName": b"NVIDIA H100",
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 << 30), "nvmlSystemGetCudaDriverVersion": 12080,
            "nvmlSystemGetDriverVersion": "570.86.15",
        }  # fmt: skip
        return lambda *_: answers[name]


def test_gpus_are_known_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert machine.gpus() == {
        "gpu": "NVIDIA H100, 81920 MiB",
        "NVIDIA driver": "570.86.15",
        "CUDA of the driver": "12.8",
    }


def test_gpus_are_known_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    program = tmp_path / "nvidia-smi"
    row = "580.159.03, NVIDIA H100 80GB HBM3, 81559 MiB"
    program.write_text(
        '#!/bin/sh\ncase "$1" in --query) echo "CUDA Version                 : 13.0";;\n'
        f'*) printf "{row}\\n{row}\\n";; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    machine.output.cache_clear()
    try:
        assert machine.gpus() == {
            "gpu": "2 x NVIDIA H100 80GB HBM3, 81559 MiB",
            "NVIDIA driver": "580.159.03",
            "CUDA of the driver": "13.0",
        }
    finally:
        machine.output.cache_clear()


def test_answers_that_differ_count_where_nothing_else_was_computed() -> None:
    checks = Checks()
    for text, alone in (("a", True), ("b", False), ("a", False), ("c", True)):
        one = outcome()
        one.text = text
        checks.look_at(one, "demo", "checkpointed", alone=alone)
    assert (checks.different, checks.in_batches, checks.lost, checks.other_tier) == (1, 1, 0, 0)
    writer = results.Writer(None, "burst", {})
    assert not checks.into(writer)
    assert "1 answers to requests that came together" in writer.result.notes[0]


def test_few_samples_tell_no_difference(tmp_path: Path) -> None:
    path = run_file(tmp_path / "r", "restore-flags", {"default": [0.3] * 10, "a": [0.4] * 9, "b": [0.4] * 10})
    columns = [list(column.cells) for column in tables.against(results.read(path), "default").columns]
    assert columns[0] == ["a", "b"]
    assert columns[3] == ["fewer than 10 samples", "slower"]


def test_gpu_state_is_drawn_in_place_of_a_part_of_the_pages(tmp_path: Path) -> None:
    with results.Writer(tmp_path / "r", "checkpoint", {}) as writer:
        gpu = {"memory_pages.GPU_state_bytes": 1 << 30, "memory_pages.else_bytes": 3 << 30}
        writer.sample("asleep", {"image_bytes": 4 << 30, "memory_pages_bytes": 4 << 30, **gpu})
        writer.sample("awake", {"image_bytes": 2 << 30, "memory_pages_bytes": 2 << 30})
        writer.close()
    found = results.read(tmp_path / "r")
    (drawn,) = figures(found)
    svg = drawn.draw(800).svg("")
    assert "GPU state, in memory pages: 1 GiB" in svg
    assert svg.count("memory pages: ") == 3
    assert "4 GiB" in svg
    console = tables.console()
    with console.capture() as said:
        console.print(tables.values(found))
    assert "memory pages: GPU state" in said.get()


def test_notes_of_a_run_that_was_cut_short_are_there(tmp_path: Path) -> None:
    with results.Writer(tmp_path / "r", "restore", {}) as writer:
        writer.note("archived: no archive")
    assert results.read(tmp_path / "r").notes == ["archived: no archive"]
    with results.Writer(tmp_path / "r", "restore", {}) as writer:
        writer.note("archived: no archive")
        writer.close()
    assert results.read(tmp_path / "r").notes == ["archived: no archive"]


def test_a_run_that_was_cut_short_can_be_read(tmp_path: Path) -> None:
    path = run_file(tmp_path / "a.jsonl", "restore", {"ready": [0.02]})
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:2]))
    found = results.read(path)
    assert not found.complete
    assert found.values("ready") == [0.02]
    assert "cut short" in page.render([found])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no results"),
        ("hello", "not a file of results"),
        ('{"kind": "sample"}', "first line"),
        ('{"kind": "run", "schema": 99}', "another version"),
        ("[1]", "not a file of results"),
    ],
)
def test_what_is_no_file_of_results_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "x"
    path.write_text(content)
    with pytest.raises(results.ResultError, match=reason):
        results.read(path)
    with pytest.raises(results.ResultError, match="No such file"):
        results.read(tmp_path / "missing")


# --- comparing ---


@pytest.mark.parametrize(
    ("shift", "status", "word"), [(0.0, 0, "no clear difference"), (0.6, 1, "regression"), (-0.6, 0, "faster")]
)
def test_compare_ends_with_the_status_of_what_it_found(tmp_path: Path, shift: float, status: int, word: str) -> None:
    base = run_file(tmp_path / "a", "restore", {"ready": lognormal(40, 1)})
    other = run_file(tmp_path / "b", "restore", {"ready": lognormal(40, 2, shift)}, count=3)
    done = CliRunner().invoke(cli, ["compare", str(base), str(other)])
    assert done.exit_code == status, done.output
    assert word in done.output
    assert "not the same: count: none | 3" in done.output


def test_a_regression_is_beyond_the_bound_and_not_by_chance(tmp_path: Path) -> None:
    base = results.read(run_file(tmp_path / "a", "restore", {"ready": [1.0] * 20}))
    other = results.read(run_file(tmp_path / "b", "restore", {"ready": [1.08] * 20}))
    (found, *_) = compare_runs.compare(base, other)
    assert not found.regressed(1.10)
    assert found.verdict(1.10) == "slower, within the bound"
    assert found.regressed(1.05)


def test_a_few_samples_are_no_regression(tmp_path: Path) -> None:
    base = results.read(run_file(tmp_path / "a", "restore", {"ready": [1.0] * 20}))
    other = results.read(run_file(tmp_path / "b", "restore", {"ready": [5.0] * 9}))
    (found, *_) = compare_runs.compare(base, other)
    assert not found.regressed(1.10)
    assert found.verdict(1.10) == "fewer than 10 samples"


def test_compare_says_when_there_is_nothing_to_compare(tmp_path: Path) -> None:
    base = run_file(tmp_path / "a", "restore", {"ready": [1.0]})
    other = run_file(tmp_path / "b", "restore", {"sleeping": [1.0]})
    done = CliRunner().invoke(cli, ["compare", str(base), str(other)])
    assert done.exit_code == 2
    assert "no series in common" in done.output


# --- where the time went ---


def sample(ttft_s: float, **stages_s: float) -> dict[str, Any]:
    return {
        "series": "x",
        "tier": "checkpointed",
        "values": {"ttft_s": ttft_s, "connect_s": 0.01},
        "stages_s": stages_s,
    }


def test_the_parts_of_a_request_are_all_of_its_time() -> None:
    whole = sample(1.0, queue=0.1, wake=0.8, restore=0.6, podman=0.2, criu=0.3, health=0.1)
    parts = attribution.parts(whole, 0.02)
    assert sum(parts.values()) == pytest.approx(1.0)
    assert parts["queue"] == pytest.approx(0.1)
    assert parts["podman"] == pytest.approx(0.2)
    assert parts["restore"] == pytest.approx(0.1)
    assert parts["wake"] == pytest.approx(0.1)
    assert parts["first token"] == pytest.approx(0.09)


def test_one_that_joined_a_wake_waited_for_its_end_only() -> None:
    joined = sample(0.33, queue=0.0, wake=0.8, restore=0.6, podman=0.2, criu=0.4, health=0.2)
    parts = attribution.parts(joined, 0.02)
    assert sum(parts.values()) == pytest.approx(0.33)
    assert "podman" not in parts
    assert parts["criu"] == pytest.approx(0.1)
    assert parts["health"] == pytest.approx(0.2)
    assert parts["first token"] == pytest.approx(0.02)


def test_where_all_the_time_went() -> None:
    found = attribution.where([sample(1.0, wake=0.9, restore=0.9), sample(0.5, queue=0.4)])
    assert found["checkpointed"]["queue"] == pytest.approx(0.4)
    assert sum(found["checkpointed"].values()) == pytest.approx(1.5)


def test_a_stage_is_named_whether_it_is_known_or_not() -> None:
    found = dict(attribution.median_stages([sample(1.0, wake=0.9, load_weights=0.2, brand_new=0.3)]))
    assert found["load_weights"] == pytest.approx(0.2)
    assert found["brand_new"] == pytest.approx(0.3)
    assert sum(found.values()) == pytest.approx(1.0)
    # Every stage of the way up is known; these are of the making of a checkpoint and of pauses.
    others = {"weights", "sleep", "checkpoint", "pause", "unpause", "save_cache", "load_cache"}
    source = "".join((ROOT / "proxy" / name).read_text() for name in ("pool/transitions.py", "engine/client.py"))
    assert set(re.findall(r'stages\.measure\("(\w+)"\)', source)) - others <= set(attribution.ORDER)


# --- traces ---


def test_a_trace_is_read() -> None:
    rows = trace.read(SAMPLE)
    assert len(rows) == 60
    assert rows[0].at_s == 0
    assert rows == sorted(rows, key=lambda row: row.at_s)
    assert {row.model for row in rows} == {"chat-large", "chat-small", "code"}
    later = trace.part(rows, 5.0, 5.0)
    assert 0 < len(later) < 60
    assert 0 <= later[0].at_s < later[-1].at_s < 5.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "line 2: 'yesterday'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,x,1\n", "line 2: ContextTokens is 'x'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:46.6,1,1\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,1\n", "line 2: GeneratedTokens is ''"),
    ],
)
def test_a_trace_that_cannot_be_used_says_where(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(trace.TraceError, match=reason):
        trace.read(path)


def test_times_have_the_digits_of_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_text(f"{head}2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n")
    rows = trace.read(path)
    assert [row.tokens for row in rows] == [44, 109]
    assert rows[1].at_s == pytest.approx(4.314579, abs=1e-6)


def test_rows_are_dealt_to_models() -> None:
    rows = trace.read(SAMPLE)
    named = trace.models_of(rows, ["a", "b", "c"], 1.0)
    assert {row.model for row, key in zip(rows, named, strict=True) if key == "a"} == {"chat-large"}
    with pytest.raises(trace.TraceError, match="--models 3"):
        trace.models_of(rows, ["a", "b"], 1.0)
    nameless = [trace.Row(r.at_s, r.prompt_tokens, r.tokens) for r in rows] * 20
    drawn = trace.models_of(nameless, ["a", "b", "c"], 2.0)
    assert drawn == trace.models_of(nameless, ["a", "b", "c"], 2.0)
    assert drawn.count("a") > drawn.count("b") > drawn.count("c") > 0
    with pytest.raises(trace.TraceError, match="s long"):
        trace.part(rows, 1e6, None)


# --- the page ---


class Seen(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "data", "xlink:href", "srcset"):
                self.references.append(str(value))


TIERS = {"ready": lognormal(120, 1, -4), "checkpointed": lognormal(12, 2, -1), "stopped": lognormal(10, 3, 1.5)}


def test_the_page_needs_nothing_else_and_shows_what_there_is(tmp_path: Path) -> None:
    files = [
        run_file(tmp_path / "a", "restore", TIERS, tiers="<all>"),
        run_file(tmp_path / "b", "trace", TIERS),
        run_file(tmp_path / "c", "restore-flags", {"default": [0.3] * 10, "keep = false": [0.4] * 10}),
    ]
    html_file = tmp_path / "page.html"
    done = CliRunner().invoke(cli, ["report", *map(str, files), "--html", str(html_file)])
    assert done.exit_code == 0, done.output
    text = html_file.read_text()
    seen = Seen()
    seen.feed(text)
    # Links within the page only, and nothing to load.
    assert set(seen.references) == {"#run-1", "#run-2", "#run-3"}
    assert not re.search(r"@import|url\(", text)
    assert set(seen.ids) >= {"run-1", "run-2", "run-3", "theme"}
    assert "<b>markup</b>" not in text
    assert "prefers-color-scheme: dark" in text
    for title in ("Cold against warm", "Waterfall: checkpointed", "Where the time", "Timeline", "Percentiles"):
        assert title in text
    # Each figure once for a desk and once for a phone.
    assert seen.tags.count("svg") == 2 * sum(len(figures(results.read(path))) for path in files)


def test_every_colour_that_is_used_is_there(tmp_path: Path) -> None:
    path = run_file(tmp_path / "a", "restore", TIERS)
    text = page.render([results.read(path)])
    defined = set(re.findall(r"(--[\w-]+):", page.STYLE.read_text()))
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= defined
    assert {f"--{name}" for name in attribution.ORDER if name not in ("wake", "first token")} <= defined


@pytest.mark.parametrize("width", [340.0, 860.0])
def test_nothing_is_drawn_outside_of_a_figure(tmp_path: Path, width: float) -> None:
    found = [results.read(run_file(tmp_path / name, name, TIERS)) for name in ("restore", "trace")]
    for result in found:
        for figure in figures(result):
            drawing = figure.draw(width)
            text = drawing.svg("x")
            for x, length in re.findall(r'<rect x="([-\d.]+)" y="[-\d.]+" width="([-\d.]+)"', text):
                assert float(x) >= -0.6
                assert float(x) + float(length) <= width + 0.6, figure.name


def test_a_figure_can_be_a_picture(tmp_path: Path) -> None:
    try:
        pictures.browser()
    except results.ResultError as error:
        pytest.skip(str(error))
    found = results.read(run_file(tmp_path / "a", "restore", {"ready": [0.02] * 10}))
    (path, *_) = pictures.draw([found], tmp_path / "png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(results.ResultError, match="no-such-browser"):
        list(pictures.draw([found], tmp_path / "png", "no-such-browser"))


@pytest.mark.parametrize("command", sorted(set(cli.commands) - {"proxy"}))
def test_every_command_says_what_it_takes(command: str) -> None:
    done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0
    assert f"loadtest {command}" in (ROOT / "docs" / "loadtest.md").read_text()


def test_quantities_have_their_units() -> None:
    shown = [tables.quantity(n, v) for n, v in (("a_s", 12.34), ("a_s", 1.234), ("a_s", 0.0123), ("a_s", 4e-5))]
    assert shown == ["12.3 s", "1.23 s", "12.3 ms", "40 µs"]
    assert tables.quantity("a_bytes", 3 << 20) == "3 MiB"
