"""What pauses cost with the real vLLM on a GPU, and whether answers are the same.

``python -m loadtest.bench_pause --config FILE --out FOLDER``. FILE has two models (podman's or processes') with
`weights_copy`, vLLM's sleep mode and its development mode, and room for answers of `--tokens`. Four parts:

- `single`: one long answer at a time of the first model, paused and unpaused by command on its way; every text must be
  the one that was given undisturbed.
- `batch`: the same with `--streams` answers at once. Batches round differently from run to run, so the texts are
  compared and counted, and only lengths must be right.
- `turns`: one model may be awake. `--streams` answers of the first go on without end, the second is asked every 2 s;
  once with pauses, and once (`policy = "fifo"`) without, where it waits for the longest answer.
- `many`: `--many` pauses of one answer after another; memory of GPU and host must stay flat.

Prints a table and writes every sample to bench-pause.json.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import time
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
import tomli_w

from loadtest.bench_gpu import NEVER, Server, creep, gpu_bytes, machine

if TYPE_CHECKING:
    from collections.abc import Coroutine

BETWEEN_S: Final = 2.0
"""How often the second model is asked."""
STILL_S: Final = 1.0
"""How long a pause by command lasts."""


@dataclass
class Stream:
    """One answer: when each token came, and what they said."""

    number: int
    at: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    failure: str = ""

    async def run(self, server: Server, model: str, tokens: int) -> Stream:
        """Ask for it and take it."""
        body = {
            "model": model, "prompt": f"Story number {self.number}. Once upon a time", "max_tokens": tokens,
            "temperature": 0, "stream": True, "ignore_eos": True,
        }  # fmt: skip
        ended = False
        try:
            async with server.session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    self.failure = f"{response.status} {(await response.text())[:300]}"
                    return self
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        choices = orjson.loads(line[6:]).get("choices") or [{}]
                        self.at.append(time.perf_counter())
                        self.text.append(choices[0].get("text", ""))
                    ended = ended or line.startswith(b"data: [DONE]")
        except Exception as error:  # noqa: BLE001 - whatever broke it is what is to be reported
            self.failure = repr(error)
        if not ended:
            self.failure = self.failure or "it ended without [DONE]"
        return self

    @property
    def gap_s(self) -> float:
        """The longest time between two tokens."""
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)


@dataclass
class Sample:
    """One pause by command."""

    part: str
    streams: int
    off_s: float
    """From the command to the answer that everything stands still."""
    back_s: float
    """From the command to go on to the next token of any stream."""
    same: int
    """How many texts were those that were given undisturbed."""
    moved: bool
    """Whether a token came while they stood still."""
    paused_gpu_bytes: int
    gpu_bytes: int
    host_bytes: int


@dataclass
class Report:
    """Everything that was seen."""

    machine: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)
    turns: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class PauseBench:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base: dict[str, Any] = tomllib.loads(options.config.read_text())
        self.base.setdefault("server", {})["port"] = options.port
        self.keys = list(self.base["models"])[:2]
        if len(self.keys) < 2:
            raise SystemExit(f"{options.config}: two models are needed")
        self.report = Report(machine())
        self.undisturbed: dict[int, str] = {}

    def _settings(self, policy: str) -> dict[str, Any]:
        idle = {**NEVER, "suspended": "1h"}
        models = {key: {**self.base["models"][key], "weights_copy": True, "idle": idle} for key in self.keys}
        pool = {**self.base.get("pool", {}), "max_awake": 1, "quantum": self.options.quantum, "policy": policy}
        return {**self.base, "models": models, "pool": pool}

    def _name(self, key: str) -> str:
        return str(self.base["models"][key].get("name", key))

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)
        print(f"PROBLEM {text}", flush=True)

    async def _command(self, server: Server, command: str) -> float:
        began = time.perf_counter()
        async with server.session.post(f"/admin/models/{self.keys[0]}/{command}", json={}) as response:
            if response.status != 200:
                raise RuntimeError(f"{command}: {response.status} {await response.text()}")
        return time.perf_counter() - began

    async def _host_bytes(self, server: Server) -> int:
        async with server.session.get("/admin/status") as response:
            instances = orjson.loads(await response.read())["models"][self.keys[0]]["instances"]
        return sum(int(instance["host_bytes"] or 0) for instance in instances)

    async def _answers(self, server: Server, count: int) -> list[Stream]:
        model, tokens = self._name(self.keys[0]), self.options.tokens
        return list(await asyncio.gather(*(Stream(n).run(server, model, tokens) for n in range(count))))

    async def by_command(self, server: Server, part: str, streams: int) -> None:
        """One pause of so many answers."""
        model, tokens = self._name(self.keys[0]), self.options.tokens
        made = [Stream(n) for n in range(streams)]
        tasks = [asyncio.create_task(stream.run(server, model, tokens)) for stream in made]
        async with asyncio.timeout(300):
            while min(len(stream.at) for stream in made) < tokens // 6 and not any(task.done() for task in tasks):
                await asyncio.sleep(0.002)
        off_s = await self._command(server, "pause")
        still = [len(stream.at) for stream in made]
        used = gpu_bytes()
        await asyncio.sleep(STILL_S)
        moved = [len(stream.at) for stream in made] != still
        began = time.perf_counter()
        await self._command(server, "unpause")
        await asyncio.gather(*tasks)
        first = min((stream.at[n] for stream, n in zip(made, still, strict=True) if len(stream.at) > n), default=began)
        same = sum("".join(stream.text) == self.undisturbed[stream.number] for stream in made)
        sample = Sample(
            part, streams, off_s, first - began, same, moved, used, gpu_bytes(), await self._host_bytes(server)
        )
        self.report.samples.append(sample)
        for stream in made:
            if stream.failure or len(stream.text) != tokens:
                self._problem(f"{part}: stream {stream.number}: {len(stream.text)} tokens {stream.failure}")
        if moved:
            self._problem(f"{part}: a token came while everything stood still")
        if streams == 1 and same != 1:
            self._problem(f"{part}: the text is another one")
        print(
            f"{part:<8} {streams:3d} streams: off {off_s:.3f} s, back {sample.back_s:.3f} s, {same} the same, "
            f"GPU {used >> 20} MiB paused, {sample.gpu_bytes >> 20} awake, host {sample.host_bytes >> 20} MiB",
            flush=True,
        )

    async def commands(self, server: Server) -> None:
        """The parts `single`, `many` and `batch`."""
        options = self.options
        alone = [await Stream(0).run(server, self._name(self.keys[0]), options.tokens) for _ in range(2)]
        self.undisturbed[0] = "".join(alone[0].text)
        if "".join(alone[1].text) != self.undisturbed[0]:
            self._problem("single answers differ without a pause")
        for part, count in (("single", options.count), ("many", options.many)):
            for number in range(count if part in options.parts else 0):
                await self.by_command(server, part, 1)
                if number % 10 == 0:
                    self.write()
        if "batch" in options.parts:
            for stream in await self._answers(server, options.streams):
                self.undisturbed[stream.number] = "".join(stream.text)
            again = await self._answers(server, options.streams)
            same = sum("".join(s.text) == self.undisturbed[s.number] for s in again)
            print(f"batch: {same} of {options.streams} the same without a pause", flush=True)
            for _ in range(options.count):
                await self.by_command(server, "batch", options.streams)

    async def _use(self, server: Server, policy: str) -> None:
        """Have the running server take turns in another way."""
        seen = len(server.log.read_text())
        server.config.write_text(tomli_w.dumps(self._settings(policy)))
        server.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(30):
            while "pool.policy" not in server.log.read_text()[seen:]:
                await asyncio.sleep(0.05)

    async def turns(self, server: Server, policy: str) -> None:
        """Both models, of which one may be awake."""
        options = self.options
        found: list[float] = []
        first, second = (self._name(key) for key in self.keys)
        done: list[Stream] = []
        ends = asyncio.Event()

        async def endless(number: int) -> None:
            while not ends.is_set():
                done.append(await Stream(number).run(server, first, options.long_tokens))

        running = [asyncio.create_task(endless(n)) for n in range(options.streams)]
        await asyncio.sleep(BETWEEN_S)
        for _ in range(options.asks):
            began = time.perf_counter()
            answer = await Stream(99).run(server, second, 16)
            if answer.failure:
                self._problem(f"{policy}: the second model: {answer.failure}")
            else:
                found.append(answer.at[0] - began)
            await asyncio.sleep(max(0.0, BETWEEN_S - (time.perf_counter() - began)))
        ends.set()
        await asyncio.gather(*running)
        for stream in done:
            if stream.failure or len(stream.text) != options.long_tokens:
                self._problem(f"{policy}: a long answer: {len(stream.text)} tokens {stream.failure}")
        gaps = sorted(stream.gap_s for stream in done)
        self.report.turns[policy] = {
            "ttft_s": found, "ttft_p50_s": statistics.median(found) if found else None, "long_answers": len(done),
            "gap_p50_s": statistics.median(gaps) if gaps else None, "longest_gap_s": gaps[-1] if gaps else None,
        }  # fmt: skip

    async def run(self) -> int:
        """All parts that were asked for, on one server; what fails is noted, and the next one is tried."""
        async with Server(self.folder, self._settings("turns")) as server:
            for key in reversed(self.keys):
                began = time.perf_counter()
                if failure := (await Stream(0).run(server, self._name(key), 8)).failure:
                    raise SystemExit(f"{key}: {failure}")
                print(f"{key}: up after {time.perf_counter() - began:.1f} s", flush=True)
            await self._part("by command", self.commands(server))
            for policy in ("turns", "fifo") if "turns" in self.options.parts else ():
                if policy == "fifo":
                    await self._part("another policy", self._use(server, policy))
                await self._part(policy, self.turns(server, policy))
        print(self.table())
        return 1 if self.report.problems else 0

    async def _part(self, name: str, part: Coroutine[Any, Any, None]) -> None:
        print(f"--- {name}", flush=True)
        try:
            await part
        except Exception as error:  # noqa: BLE001 - a part that fails must not lose the others' figures
            self._problem(f"{name}: {error!r}")
        self.write()

    def write(self) -> None:
        """The JSON file."""
        (self.folder / "bench-pause.json").write_bytes(orjson.dumps(asdict(self.report), option=orjson.OPT_INDENT_2))

    def table(self) -> str:
        """Medians, for people."""
        lines = [
            "| part | n | off the GPU | back to the next token | the same | GPU paused |",
            "|---|---|---|---|---|---|",
        ]
        for part in ("single", "batch", "many"):
            mine = [sample for sample in self.report.samples if sample.part == part]
            if not mine:
                continue
            off = statistics.median(sample.off_s for sample in mine)
            back = statistics.median(sample.back_s for sample in mine)
            same, of = sum(s.same for s in mine), sum(s.streams for s in mine)
            paused = statistics.median(sample.paused_gpu_bytes for sample in mine)
            lines.append(
                f"| {part} | {len(mine)} | {off:.3f} s | {back:.3f} s | {same} of {of} | {paused / 2**20:.0f} MiB |"
            )
            if part == "many" and len(mine) > 20:
                gpu = creep([sample.gpu_bytes for sample in mine]) / 2**20
                host = creep([sample.host_bytes for sample in mine]) / 2**20
                lines.append(f"a pause adds {gpu:+.3f} MiB on the GPU, {host:+.3f} MiB in host memory")
        for policy, found in self.report.turns.items():
            if found["ttft_s"]:
                lines.append(
                    f"{policy}: the second model's first token p50 {found['ttft_p50_s']:.2f} s, most "
                    f"{max(found['ttft_s']):.2f} s; {found['long_answers']} long answers, longest gap "
                    f"{found['longest_gap_s']:.2f} s"
                )
        return "\n".join([*lines, *(f"PROBLEM {text}" for text in self.report.problems)])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_pause", description=__doc__)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="TOML with two models")
    add("--out", type=Path, default=Path("bench-pause"), help="folder for logs and the JSON file")
    add(
        "--parts", nargs="+", choices=["single", "batch", "turns", "many"], default=["single", "batch", "turns", "many"]
    )
    add("--count", type=int, default=9, help="pauses of `single` and of `batch`")
    add("--many", type=int, default=100, help="pauses of `many`")
    add("--tokens", type=int, default=600, help="of each answer that is paused")
    add("--long-tokens", type=int, default=2000, help="of each answer of `turns`")
    add("--streams", type=int, default=8)
    add("--asks", type=int, default=10, help="how often the second model is asked in `turns`")
    add("--quantum", default="1s")
    add("--port", type=int, default=8097)
    raise SystemExit(asyncio.run(PauseBench(parser.parse_args()).run()))


if __name__ == "__main__":
    main()
