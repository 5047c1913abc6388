"""A file with what was measured: a line of JSON for the run, one for each sample, one for the summary.

| kind | fields |
|---|---|
| `run` | `schema`, `command`, `options`, `began`, `machine`, `versions`, `title` |
| `sample` | `series`, `values` (name → number; `_s`: seconds, `_bytes`: bytes), and what else is known: `tier`, … |
| `note` | `text`; the summary has all of them |
| `versions` | `versions`: of what was seen later, such as the engine's |
| `state` | `at_s` (since the run began), `models`: what the proxy said of itself, whenever it had changed |
| `summary` | `series` → value's name → median and the rest, `counts`, `notes`, `hdr` |

A sample is written when it is there; a run that was cut short is a file without a summary, and can be read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self

import orjson

from loadtest import machine, stats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from loadtest.client import Outcome

SCHEMA: Final = 1
TTFT: Final = "ttft_s"
_HDR_FROM: Final = 100
"""Samples from which on a distribution is worth keeping as a histogram."""


class ResultError(Exception):
    """A file that holds no results; the text says which and why."""


@dataclass(slots=True)
class Result:
    """One run, as read from its file or while it is made."""

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    began: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    """The run came to its end."""

    def values(self, series: str, name: str = TTFT) -> list[float]:
        """The measurements of a series."""
        return [s["values"][name] for s in self.samples if s["series"] == series and name in s["values"]]

    def series(self) -> list[str]:
        """All of them, in the order in which they began."""
        return list(dict.fromkeys(s["series"] for s in self.samples))

    def names(self, series: str) -> list[str]:
        """Of the measurements in a series."""
        return list(dict.fromkeys(n for s in self.samples if s["series"] == series for n in s["values"]))

    def summaries(self) -> dict[str, dict[str, stats.Summary]]:
        """Series → measurement → summary; computed here, not taken from the file."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for sample in self.samples:
            for name, value in sample["values"].items():
                found[sample["series"]][name].append(value)
        return {
            series: {name: made for name, values in names.items() if (made := stats.summary(values)) is not None}
            for series, names in found.items()
        }


class Writer:
    """Writes a file while a run goes on; use it with `with`."""

    def __init__(self, path: Path | None, command: str, options: Mapping[str, Any], title: str = "") -> None:
        self.path = path
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        self.began_ns = time.monotonic_ns()
        began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.result = Result(command, plain, title, began, machine.machine(), machine.versions())
        self._file: IO[bytes] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        run = {n: getattr(self.result, n) for n in ("command", "options", "title", "began", "machine", "versions")}
        self._line({"kind": "run", "schema": SCHEMA, **run})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _line(self, fields: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()

    def sample(self, series: str, values: Mapping[str, float], **known: Any) -> None:
        """Keep one sample."""
        made = {"series": series, "values": {n: round(v, 7) for n, v in values.items()}, **known}
        self.result.samples.append(made)
        self._line({"kind": "sample", **made})

    def outcome(self, outcome: Outcome, series: str = "", **known: Any) -> None:
        """Keep what became of a request."""
        at_s = round((outcome.due_ns - self.began_ns) / 1e9, 6)
        self.sample(series or outcome.series, measured(outcome), at_s=at_s, **facts(outcome), **known)

    def state(self, models: Mapping[str, Any]) -> None:
        """Keep what the proxy says of itself now."""
        made = {"at_s": round((time.monotonic_ns() - self.began_ns) / 1e9, 4), "models": models}
        self.result.states.append(made)
        self._line({"kind": "state", **made})

    def learn(self, versions: Mapping[str, str]) -> None:
        """Versions that were not known when the run began."""
        new = {name: value for name, value in versions.items() if self.result.versions.get(name) != value}
        if new:
            self.result.versions.update(new)
            self._line({"kind": "versions", "versions": new})

    def note(self, text: str) -> None:
        """Something the reader of the figures has to know."""
        self.result.notes.append(text)
        self._line({"kind": "note", "text": text})

    def count(self, **counts: float) -> None:
        """Numbers of the whole run."""
        self.result.counts.update(counts)

    def close(self) -> Result:
        """Write the summary: the run is complete."""
        result = self.result
        result.complete = True
        summaries = result.summaries()
        few = [
            f"{s} ({m[TTFT].n})" for s, m in summaries.items() if TTFT in m and not m[TTFT].enough and "first" not in s
        ]
        if few:
            result.notes.append(f"fewer than {stats.FEWEST} samples: {', '.join(few)}")
        self._line(
            {
                "kind": "summary",
                "series": {s: {n: asdict(v) for n, v in names.items()} for s, names in summaries.items()},
                "counts": result.counts,
                "notes": result.notes,
                "hdr": {
                    series: stats.histogram(result.values(series)).encoded()
                    for series, names in summaries.items()
                    if TTFT in names and names[TTFT].n >= _HDR_FROM
                },
            }
        )
        return result


def measured(outcome: Outcome) -> dict[str, float]:
    """The times of an outcome that are known."""
    times = {
        "wake_s": outcome.stages_s.get("wake"),
        "late_s": outcome.late_s,
        "connect_s": outcome.connect_s,
        "headers_s": outcome.headers_s,
        TTFT: outcome.ttft_s,
        "total_s": outcome.end_s,
    }
    if len(outcome.token_s) > 1:
        gaps = sorted(b - a for a, b in zip(outcome.token_s, outcome.token_s[1:], strict=False))
        times["gap_s"] = gaps[len(gaps) // 2]
        times["gap_most_s"] = gaps[-1]
    return {name: value for name, value in times.items() if value is not None}


def facts(outcome: Outcome) -> dict[str, Any]:
    """What else is known of an outcome."""
    known: dict[str, Any] = {
        "status": outcome.status,
        "tier": outcome.tier,
        "instance": outcome.headers.get("x-warmpool-instance", ""),
        "stages_s": outcome.stages_s,
        "tokens": outcome.tokens,
        "error": outcome.error,
        **outcome.tags,
    }
    return {name: value for name, value in known.items() if value not in ("", None, {})}


def read(path: Path) -> Result:
    """A file. Raises ResultError."""
    result: Result | None = None
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            fields = orjson.loads(line)
            kind = fields.pop("kind")
            if kind == "run":
                if fields.pop("schema") != SCHEMA:
                    raise ResultError(f"{path}: written by another version of the load tests")
                result = Result(**fields)
            elif result is None:
                raise ResultError(f"{path}: line {number}: the first line must be the run's")
            elif kind == "sample":
                result.samples.append(fields)
            elif kind == "note":
                result.notes.append(fields["text"])
            elif kind == "versions":
                result.versions.update(fields["versions"])
            elif kind == "state":
                result.states.append(fields)
            elif kind == "summary":
                result.counts, result.notes, result.complete = fields["counts"], fields["notes"], True
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from error
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: not a file of results: {error!r}") from error
    if result is None:
        raise ResultError(f"{path}: no results in it")
    return result
