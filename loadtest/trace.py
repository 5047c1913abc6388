"""`trace`: requests as somebody's users sent them, replayed through the proxy over several models.

The format is that of the public Azure LLM inference traces (github.com/Azure/AzurePublicDataset,
AzureLLMInferenceTrace_conv.csv and _code.csv, 2023, CC BY 4.0): `TIMESTAMP` (UTC), `ContextTokens`, `GeneratedTokens`,
and in a trace of one's own, where there are several models, `Model`.
"""

from __future__ import annotations

import csv
import itertools
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from loadtest.results import TTFT
from loadtest.serving import ServeError, completion, learn_versions, serving
from loadtest.stats import percentile
from loadtest.timeline import recorded_timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from loadtest.client import Client, Outcome, Request
    from loadtest.display import Display
    from loadtest.results import Writer
    from loadtest.serving import Setup

COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
WORD: Final = "be "
"""A token for most tokenizers; three bytes, which the load-test engine counts as one."""
_MOMENT: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?")


class TraceError(Exception):
    """A trace that cannot be used; the text says which line and why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace; `at_s` counts from its first one."""

    at_s: float
    prompt_tokens: int
    tokens: int
    model: str = ""


def read(path: Path) -> list[Row]:
    """All rows, in the order of their time. Raises TraceError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (lines.fieldnames or ())]
            if missing:
                raise TraceError(f"{path}: no column {', '.join(missing)}; a trace has {', '.join(COLUMNS)}")
            rows = [_row(path, lines.line_num, line) for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}") from error
    if not rows:
        raise TraceError(f"{path}: there is no request in it")
    rows.sort(key=lambda row: row.at_s)
    first_s = rows[0].at_s
    return [Row(row.at_s - first_s, row.prompt_tokens, row.tokens, row.model) for row in rows]


def _row(path: Path, number: int, line: Mapping[str, str | None]) -> Row:
    moment, prompt, generated = (str(line[name] or "").strip() for name in COLUMNS)
    found = _MOMENT.fullmatch(moment)
    if found is None:
        raise TraceError(f"{path}: line {number}: {moment!r} is not a TIMESTAMP as 2023-11-16 18:15:46.6805900")
    for name, value in (("ContextTokens", prompt), ("GeneratedTokens", generated)):
        if not value.isdecimal():
            raise TraceError(f"{path}: line {number}: {name} is {value!r}, not a number")
    try:
        second = datetime(*(int(part) for part in found.groups()[:6]), tzinfo=UTC)  # type: ignore[misc,arg-type]
    except ValueError as error:
        raise TraceError(f"{path}: line {number}: {moment}: {error}") from error
    at_s = second.timestamp() + float(f"0.{found[7] or 0}")
    return Row(at_s, int(prompt), int(generated), (line.get("Model") or "").strip())


def part(rows: Sequence[Row], begin_s: float, length_s: float | None) -> list[Row]:
    """Those from `begin_s` on, for `length_s`, with times from its begin. Raises TraceError when there are none."""
    end_s = float("inf") if length_s is None else begin_s + length_s
    found = [
        Row(row.at_s - begin_s, row.prompt_tokens, row.tokens, row.model) for row in rows if begin_s <= row.at_s < end_s
    ]
    if not found:
        raise TraceError(f"the trace is {rows[-1].at_s:.0f} s long; there is no request in the part that was asked for")
    return found


def models_of(rows: Sequence[Row], keys: Sequence[str], skew: float) -> list[str]:
    """The model of each row: by the trace's own names where it has some, else drawn, some used much and some seldom.

    Drawn by Zipf's law (the n-th has 1/n**skew of the first's share), the same ones each time. Names of a trace are
    mapped to `keys` in the order of their frequency. Raises TraceError when there are more names than keys.
    """
    named = Counter(row.model for row in rows if row.model)
    if named:
        if len(named) > len(keys):
            raise TraceError(f"the trace names {len(named)} models and {len(keys)} are served: --models {len(named)}")
        by_name = dict(zip([name for name, _ in named.most_common()], keys, strict=False))
        return [by_name.get(row.model, keys[0]) for row in rows]
    draw = random.Random(0)
    return draw.choices(keys, weights=[1 / number**skew for number in range(1, len(keys) + 1)], k=len(rows))


@dataclass(frozen=True, slots=True)
class Replay:
    """How a trace is replayed."""

    speed: float = 1.0
    late_s: float = 10.0
    """A first token after this is late."""
    skew: float = 3.0
    """How unequal the models' shares are, where the trace names none."""
    most_prompt_tokens: int = 100_000
    most_tokens: int = 100_000
    by_id: bool = False
    """Prompts are lists of token ids, exactly as many as the trace says whatever the tokenizer; no two begin alike."""


def requests(rows: Sequence[Row], models: Sequence[str], names: Mapping[str, str], how: Replay) -> Iterator[Request]:
    """What is sent, and when."""
    for number, (row, key) in enumerate(zip(rows, models, strict=True)):
        prompt = _prompt(number, max(1, min(row.prompt_tokens, how.most_prompt_tokens)), how)
        tokens = max(1, min(row.tokens, how.most_tokens))
        request = completion(
            names[key], row.at_s / how.speed, key, prompt=prompt, max_tokens=tokens, model=key, wanted=tokens
        )
        request.body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        yield request


def _prompt(number: int, tokens: int, how: Replay) -> str | list[int]:
    # Ids from 100 on: below are, in many vocabularies, marks and single bytes.
    return [100 + number % 100, *[200] * (tokens - 1)] if how.by_id else WORD * tokens


def limits(setup: Setup, keys: Sequence[str]) -> tuple[int, int]:
    """How long prompts and answers may be: 3/4 and 1/4 of the least `--max-model-len` among a user's engines."""
    found = [int(text) for key in keys if (text := _option(setup.command(key), "--max-model-len")).isdecimal()]
    if not found:
        return Replay().most_prompt_tokens, Replay().most_tokens
    tokens = max(1, min(found) // 4)
    return max(1, min(found) - tokens - 1), tokens


def _option(command: Sequence[str], name: str) -> str:
    for part, following in itertools.zip_longest(command, command[1:], fillvalue=""):
        if part == name:
            return following
        if part.startswith(f"{name}="):
            return part.partition("=")[2]
    return ""


def shortened(rows: Sequence[Row], how: Replay) -> str | None:
    """What of the trace is not replayed as it is, in a sentence."""
    prompts = sum(row.prompt_tokens > how.most_prompt_tokens for row in rows)
    answers = sum(row.tokens > how.most_tokens for row in rows)
    if not prompts and not answers:
        return None
    return (
        f"{prompts} of {len(rows)} prompts were shortened to {how.most_prompt_tokens} tokens, {answers} answers to "
        f"{how.most_tokens}"
    )


def timetable(speed: float) -> dict[str, str]:
    """An idle timetable in which a model's gaps of some seconds matter, as fast as the replay is."""
    steps_s = {"sleeping": 2.0, "suspended": 5.0, "checkpointed": 10.0}
    return {tier: f"{max(50, round(1000 * seconds / speed))}ms" for tier, seconds in steps_s.items()}


def with_room(setup: Setup, tokens: int, *, pauses: bool = False) -> Setup:
    """With a load-test engine that takes requests of so many tokens, and can be paused if that is wanted."""
    longest = max(setup.engine.max_model_len, tokens + 16)
    return replace(setup, engine=replace(setup.engine, max_model_len=longest, pauses=pauses))


@dataclass(slots=True)
class Account:
    """What became of the requests."""

    sent: int = 0
    answered: int = 0
    lost: int = 0
    short: int = 0
    late: int = 0
    tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """The longest silence within each answer: what a pause puts into it."""

    def look_at(self, outcome: Outcome, late_s: float) -> None:
        """Count one; a whole answer has all the tokens that were asked for."""
        self.sent += 1
        if not outcome.ok or outcome.ttft_s is None:
            self.lost += 1
            return
        self.answered += 1
        self.short += outcome.tokens != outcome.tags["wanted"]
        self.late += outcome.ttft_s > late_s
        self.tokens += outcome.tokens
        self.ttft_s.append(outcome.ttft_s)
        if len(outcome.token_s) > 1:
            self.gaps_s.append(max(b - a for a, b in itertools.pairwise(outcome.token_s)))

    def times(self, took_s: float) -> dict[str, float]:
        """Of all answers together, whatever they found."""
        found = {"tokens_each_second": round(self.tokens / took_s, 1)}
        for name, values in (("ttft", sorted(self.ttft_s)), ("gap", sorted(self.gaps_s))):
            if values:
                found |= {f"{name}_p{p}_s": round(percentile(values, p), 3) for p in (50, 99)}
                found[f"{name}_most_s"] = round(values[-1], 3)
        return found


async def replay(
    client: Client, planned: Iterable[Request], total: int, how: Replay, writer: Writer, display: Display
) -> Account:
    """Send everything at its moment, and write down what became of it."""
    account = Account()
    lates: list[float] = []
    async with recorded_timeline(client, writer) as latest:

        def done(outcome: Outcome) -> None:
            account.look_at(outcome, how.late_s)
            lates.append(outcome.late_s)
            # By the tier found: that is what the times depend on.
            writer.outcome(outcome, outcome.tier or ("lost" if not outcome.ok else "answered"))
            display.update(account.sent, total, **_figures(account, client, latest, writer))

        began = time.monotonic()
        await client.run(planned, done)
        took_s = time.monotonic() - began
    writer.count(
        sent=account.sent,
        answered=account.answered,
        lost=account.lost,
        short=account.short,
        late=account.late,
        late_after_s=how.late_s,
        speed=how.speed,
        client_late_most_s=round(max(lates), 6),
        **account.times(took_s),
    )
    return account


def _figures(
    account: Account, client: Client, latest: Mapping[str, dict[str, object]], writer: Writer
) -> dict[str, str]:
    last = writer.result.samples[-1]
    states = Counter(state for m in latest.values() for state in m["instances"].values())  # type: ignore[attr-defined]
    return {
        "lost": str(account.lost),
        "open": str(len(client.open)),
        "last": f"{last['values'].get(TTFT, 0) * 1000:.0f} ms, {last['series']}",
        "instances": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
    }


async def run(
    setup: Setup, rows: Sequence[Row], count: int, idle: Mapping[str, str], how: Replay, writer: Writer,
    display: Display, *, pool: Mapping[str, Any],
) -> Account:  # fmt: skip
    """Replay through a proxy of its own, over `count` models with an idle timetable. Raises TraceError, ServeError."""
    keys = setup.keys(count)
    names = {key: setup.name(key) for key in keys}
    models = models_of(rows, keys, how.skew)
    display.phase("serving")
    with setup.folders() as where:
        settings = setup.settings(idle, count=count, pool=pool)
        async with serving(settings, where) as served:
            display.phase(f"{len(rows)} requests over {count} model{'s' * (count > 1)}")
            account = await replay(served.client, requests(rows, models, names, how), len(rows), how, writer, display)
            await learn_versions(setup, where, writer)
            status = await served.status()
            left = sum(model["queue"] + sum(i["leases"] for i in model["instances"]) for model in status.values())
            if left:
                raise ServeError(f"{left} requests are still open at the proxy after the last answer")
    return account
