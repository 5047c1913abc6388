"""Engines' own metrics as they are passed on: read strictly, and no counter goes back."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from proxy.telemetry.engine_metrics import MOST_BYTES, EngineCounts, EngineMetrics, Scrape, Series, parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VLLM = b"""# HELP python_info Python platform information
# TYPE python_info gauge
python_info{version="3.12"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 2.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="demo"} 17.0
# HELP vllm:prompt_tokens_created Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="demo"} 1.7640288e+09
# HELP vllm:time_to_first_token_seconds Histogram of time to first token in seconds.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.01",model_name="demo"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="demo"} 3.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="demo"} 3.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="demo"} 0.5
"""
PREFIXES = ["vllm:"]
TOKENS = ("vllm:tokens", "vllm:tokens_total", ())


def text_of(metrics: EngineMetrics) -> str:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode()


def samples_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_what_vllm_says_is_passed_on_with_model_and_instance() -> None:
    metrics = EngineMetrics()
    metrics.of("demo", "demo-1").take(1, parse(VLLM, PREFIXES), {})
    text = text_of(metrics)
    assert 'vllm:prompt_tokens_total{engine="0",instance="demo-1",model="demo",model_name="demo"} 17.0' in text
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in text
    assert "# HELP vllm:num_requests_running Number of requests in model execution batches." in text
    assert "python_info" not in text
    assert "_created" not in text
    assert re.findall(r'le="([^"]+)"', text) == ["0.01", "+Inf"], "in the engine's order"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool in PATH (of Debian's package prometheus)")
def test_promtool_reads_it() -> None:
    metrics = EngineMetrics()
    for instance in ("demo-1", "demo-2"):
        metrics.of("demo", instance).take(1, parse(VLLM, PREFIXES), {})
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text_of(metrics), capture_output=True, text=True, check=False
    )
    problems = [line for line in done.stderr.splitlines() if "metric names should not contain ':'" not in line]
    assert problems == [], "vLLM's names have a colon, which is for recording rules"


def test_an_engines_own_labels_of_these_names_are_renamed() -> None:
    metrics = EngineMetrics()
    metrics.of("demo", "demo-1").take(1, parse(b'vllm:x{model="theirs",instance="9"} 1\n', PREFIXES), {})
    ((name, labels),) = samples_of(text_of(metrics))
    assert (name, dict(labels)) == (
        "vllm:x",
        {"model": "demo", "instance": "demo-1", "exported_model": "theirs", "exported_instance": "9"},
    )


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe",
        b"vllm:x{ 1\n",
        b"vllm:x one\n",
        b'vllm:x{a="' + b"y" * 5000 + b'"} 1\n',
        b"".join(b'vllm:x{a="%d"} 1\n' % n for n in range(5001)),
        b"vllm:x 1\n" * 20_000,
        b"#" * MOST_BYTES,
    ],
    ids=["bytes", "open", "word", "long", "series", "lines", "size"],
)
def test_what_cannot_be_used_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        parse(body, PREFIXES)


@given(st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), max_size=8))
def test_whatever_an_engine_writes_is_read_or_refused(lines: Sequence[bytes]) -> None:
    for body in (b"\n".join(lines), b"\n".join(b"vllm:" + line for line in lines)):
        try:
            scrape = parse(body, PREFIXES)
        except ValueError:
            continue
        metrics = EngineMetrics()
        metrics.of("demo", "demo-1").take(1, scrape, {})
        assert all(s[0].startswith("vllm:") for s in samples_of(text_of(metrics)))


def test_nobody_says_what_warmpool_says() -> None:
    body = b"warmpool_requests_total 9\nprocess_cpu_seconds_total 9\nwar 1\n"
    assert {series[1] for series in parse(body, ["w", "p"]).gauges} == {"war"}


def test_two_names_that_look_the_same_are_one() -> None:
    metrics = EngineMetrics()
    metrics.of("a", "a-1").take(1, parse(b"# TYPE vllm:x_total counter\nvllm:x_total 1\n", PREFIXES), {})
    metrics.of("b", "b-1").take(2, parse(b"# TYPE vllm:x_total gauge\nvllm:x_total 1\n", PREFIXES), {})
    metrics.of("c", "c-1").take(3, parse(b"# TYPE vllm:x gauge\nvllm:x 1\n", PREFIXES), {})
    assert text_of(metrics).count("# TYPE vllm:x_total") == 1


# --- counters ---


def said(tokens: float) -> Scrape:
    return parse(b"# TYPE vllm:tokens_total counter\nvllm:tokens_total %r\n" % tokens, PREFIXES)


def shown(counts: EngineCounts) -> Mapping[Series, float]:
    return counts.shown[1]


def test_a_restored_engine_counts_on_from_where_the_one_before_ended() -> None:
    counts = EngineCounts()
    counts.take(1, said(50), {})
    counts.take(1, said(1000), {})
    counts.take(2, said(60), {TOKENS: 50})  # its checkpoint was written at 50
    assert shown(counts)[TOKENS] == 1010
    counts.take(2, said(90), {TOKENS: 50})
    assert shown(counts)[TOKENS] == 1040
    counts.take(3, said(2000), {TOKENS: 50})
    assert shown(counts)[TOKENS] == 1040 + 1950, "more than before, and yet another engine"
    counts.take(4, said(5), {})  # started anew
    assert shown(counts)[TOKENS] == 2995
    counts.take(4, said(2), {})  # by itself
    assert shown(counts)[TOKENS] == 2997


def test_a_clone_has_not_counted_what_is_in_the_golden_checkpoint() -> None:
    clone = EngineCounts()
    clone.take(7, said(1003), {TOKENS: 1000})
    assert shown(clone)[TOKENS] == 3


RUNS = st.lists(
    st.tuples(
        st.booleans(),
        st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e6), max_size=3),
        st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(0, 1e6), max_size=3), max_size=5),
    ),
    max_size=6,
)


@given(RUNS)
def test_no_counter_ever_goes_back(
    runs: Sequence[tuple[bool, Mapping[str, float], Sequence[Mapping[str, float]]]],
) -> None:
    counts = EngineCounts()
    before: dict[Series, float] = {}
    for number, (restored, began, scrapes) in enumerate(runs):
        for scrape in scrapes:
            body = b"# TYPE vllm:x_total counter\n" + b"".join(
                b'vllm:x_total{k="%b"} %r\n' % (name.encode(), value) for name, value in scrape.items()
            )
            base: dict[Series, float] = {
                ("vllm:x", "vllm:x_total", (("k", name),)): value for name, value in began.items()
            }
            counts.take(number, parse(body, PREFIXES), base if restored else {})
            now = dict(shown(counts))
            for series, value in before.items():
                assert now[series] >= value, series
            before = dict(now)
        counts.stands_still()


def test_an_engine_that_makes_up_labels_takes_no_more_memory() -> None:
    counts = EngineCounts()
    for number in range(0, 60_000, 3000):
        body = b"# TYPE vllm:x_total counter\n" + b"".join(
            b'vllm:x_total{k="%d"} 1\n' % n for n in range(number, number + 3000)
        )
        counts.take(1, parse(body, PREFIXES), {})
        assert len(shown(counts)) <= 16_000


def test_gauges_are_true_or_not_there() -> None:
    counts = EngineCounts()
    counts.take(1, parse(VLLM, PREFIXES), {})
    before = len(shown(counts))
    counts.stands_still()
    assert before - len(shown(counts)) == 1, "how many run is not known of one that sleeps, what it has counted is"
