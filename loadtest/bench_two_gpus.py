"""What each tier costs an engine that uses two GPUs, and what an image costs that is restored onto the other one.

``python -m loadtest.bench_two_gpus --config FILE`` (root, podman, CRIU, two GPUs, vLLM). All models of the file are
started at once: first token cold, asleep, suspended, from the checkpoint; the ladder of an engine on several GPUs is
what its trials leave of it, with the reasons. Then a model of one GPU is restored while its GPU is full, and two
instances of one (`max_instances = 2`) side by side. Every answer must be the one given before. Each result is a line
as soon as it is there, so that a run that is cut off still says something; a table for the documentation comes last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from loadtest.bench_gpu import NEVER, Sample, Server
from proxy.config.model import ModelSettings
from proxy.gpu.cuda import Gpus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Mapping

_MIB: Final = 1 << 20
_IDLE: Final = {**NEVER, "sleeping": "300ms", "suspended": "1h", "checkpointed": "2h"}
_MEASURED_S: Final = 7.0
"""By then the server has looked at the GPUs."""
_OTHERS_S: Final = 90.0
"""What is kept of the time for what follows the tours."""
_HOLDER: Final = """
import sys, torch
memory = torch.empty(int(sys.argv[2]), dtype=torch.uint8, device=f"cuda:{sys.argv[1]}")
number = torch.full((4,), 42, device=f"cuda:{sys.argv[1]}")
print("ready", flush=True)
for line in sys.stdin: print(int(number[0].item()), flush=True)
"""


class Commanded(Server):
    """`warmpool serve`, with commands."""

    async def command(self, model: str, command: str, **how: Any) -> str:
        """Give a command; what went wrong, if anything."""
        async with self.session.post(f"/admin/models/{model}/{command}", json=how) as response:
            answer = orjson.loads(await response.read())
            return "" if response.status in (200, 202) else str(answer.get("error", answer))[:300]

    async def entry(self, model: str) -> dict[str, Any]:
        """A model, as the status has it."""
        async with self.session.get("/admin/status") as response:
            found: dict[str, Any] = orjson.loads(await response.read())["models"][model]
            return found


class Bench:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        base = tomllib.loads(options.config.read_text())
        base.setdefault("server", {})["port"] = options.port
        for model in base["models"].values():
            model["idle"] = _IDLE
        self.base: dict[str, Any] = base
        self.models = {key: ModelSettings.model_validate(model) for key, model in base["models"].items()}
        self.began = time.monotonic()
        self.gpus = Gpus()
        self.answers: dict[str, str] = {}
        self.times: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.problems = 0

    # --- what is printed ---

    def say(self, model: str, phase: str, text: str) -> None:
        """A line, at once."""
        print(f"{time.monotonic() - self.began:6.1f} s  {model:<14} {phase:<14} {text}", flush=True)

    def problem(self, model: str, phase: str, text: str) -> None:
        """A line that counts."""
        self.problems += 1
        self.say(model, phase, f"PROBLEM {text}")

    async def used(self) -> str:
        """What is in use of each GPU."""
        return " ".join(f"gpu{gpu.index}={gpu.used_bytes // _MIB}MiB" for gpu in await self.gpus.memory())

    async def ask(self, server: Commanded, key: str, phase: str) -> Sample:
        """A request, its line and its figure."""
        sample = await server.ask(phase, self.models[key].name or key)
        known = self.answers.setdefault(key, sample.text)
        self.times[key, phase].append(sample.ttft_s)
        stages = " ".join(f"{name}={value:.0f}" for name, value in sample.stages_ms.items())
        same = "same answer" if sample.text == known else f"PROBLEM answered {sample.text!r}, not {known!r}"
        self.problems += sample.text != known
        found = f"found {sample.tier}, first token {sample.ttft_s:.3f} s, {same}"
        self.say(key, phase, f"{found}; {stages}; {await self.used()}")
        return sample

    def table(self) -> str:
        """Medians, for the documentation."""
        lines = ["| model | tier | n | first token, median | least | most |", "|---|---|---|---|---|---|"]
        for (key, phase), seconds in self.times.items():
            middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
            lines.append(f"| {key} | {phase} | {len(seconds)} | {middle:.3f} s | {least:.3f} | {most:.3f} |")
        return "\n".join(lines)

    # --- what is done ---

    async def tour(self, server: Commanded, key: str) -> None:
        """Down the ladder of one model and up again from each tier."""
        await self.ask(server, key, "cold")
        for _ in range(self.options.count):
            async with asyncio.timeout(20):
                await server.until(key, "sleeping")
            await self.ask(server, key, "sleeping")
        for command, state in (("suspend", "suspended"), ("checkpoint", "checkpointed")):
            for number in range(self.options.count):
                began = time.monotonic()
                wrong = await server.command(key, command)
                took_s, now = time.monotonic() - began, await server.state(key)
                if number == 0 or wrong or now != state:
                    self.say(key, state, f"{command}: {took_s:.2f} s, now {now}; {await self.used()}")
                if wrong or now != state:
                    self.problem(key, state, wrong or f"it is {now}")
                    for tier, reason in (await server.entry(key))["missing_tiers"].items():
                        self.say(key, state, f"left out: {tier}: {reason}")
                    break
                await self.ask(server, key, state)

    async def onto_the_other(self, server: Commanded, key: str) -> None:
        """Restore an image while the GPU that it was made on is full, and once more when it is empty."""
        need, home = await self._home(server, key)
        await server.command(key, "checkpoint")
        async with self._filled(home, leaving=need // 2):
            await self.ask(server, key, "other GPU")
            async with asyncio.timeout(20):
                await server.until(key, "sleeping")
            await self.ask(server, key, "asleep there")
            await server.command(key, "suspend")
            await self.ask(server, key, "suspended there")
            await server.command(key, "checkpoint")
        await asyncio.sleep(_MEASURED_S)
        await self.ask(server, key, "first GPU again")

    async def side_by_side(self, server: Commanded, key: str) -> None:
        """Restore two instances from one image, of which each GPU has room for one."""
        await server.command(key, "checkpoint")
        await self.ask(server, key, "alone")
        need, home = await self._home(server, key)
        await server.command(key, "checkpoint")
        async with self._filled(home, leaving=need + need // 2):
            for _ in range(self.options.count):
                await asyncio.gather(*(self.ask(server, key, "side by side") for _ in range(2)))
                rests = [(i["id"], i["state"], i["gpu_bytes"]) for i in (await server.entry(key))["instances"]]
                self.say(key, "side by side", str(rests))
                await server.command(key, "checkpoint")

    async def _home(self, server: Commanded, key: str) -> tuple[int, int]:
        """What the model needs of the GPU that it is on, and the index of that."""
        need: Mapping[str, int] = (await server.entry(key))["gpu_need_bytes"] or {}
        by_uuid = {gpu.uuid: gpu.index for gpu in await self.gpus.memory()}
        ((uuid, count),) = need.items()
        return count, by_uuid[uuid]

    @contextlib.asynccontextmanager
    async def _filled(self, index: int, *, leaving: int) -> AsyncIterator[None]:
        """Another program holds all of a GPU but so much."""
        gpu = next(gpu for gpu in await self.gpus.memory() if gpu.index == index)
        holder = await Holder.start(index, gpu.free_bytes - leaving - (600 << 20))
        try:
            await asyncio.sleep(_MEASURED_S)
            self.say("", "filled", await self.used())
            yield
        finally:
            await holder.end()

    async def driver(self) -> None:
        """Which GPUs the driver wants to be told of when a process moves: those that it uses, or all that it sees."""
        here = await self.gpus.memory()
        one, other = here[0].uuid, here[1].uuid
        for text, moves in (("all", {one: other, other: one}), ("the used one", {one: other})):
            holder = await Holder.start(0, 1 << 30)
            try:
                await self.gpus.suspend([holder.pid])
                await self.gpus.resume([holder.pid], moves)
                held = await self.gpus.held_by_gpu([holder.pid])
                where = {gpu.index: held.get(gpu.uuid, 0) // _MIB for gpu in here}
                self.say("driver", "move", f"told {text}: answers {await holder.ask()}, holds MiB by GPU {where}")
            except Exception as error:  # noqa: BLE001 - what it says is the result
                self.problem("driver", "move", f"told {text}: {error}")
            finally:
                await holder.end()

    async def _phase(self, model: str, phase: str, work: Coroutine[Any, Any, None], *, keep_s: float = 0.0) -> None:
        """One part; what fails is a line, and the others go on. `keep_s`: for those that follow."""
        left_s = self.options.limit - keep_s - (time.monotonic() - self.began)
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await work
        except TimeoutError as error:
            self.problem(model, phase, f"no result in time {error}".strip())
        except Exception as error:  # noqa: BLE001 - a part that fails must not lose the others' figures
            self.problem(model, phase, repr(error)[:400])

    async def run(self) -> int:
        """Everything; 1 where something went wrong."""
        reason = self.gpus.open()
        self.say("", "machine", reason or ", ".join(f"{g.index}: {g.name} {g.uuid}" for g in await self.gpus.memory()))
        two = len(await self.gpus.memory()) > 1
        narrow = [key for key, model in self.models.items() if model.gpus_an_engine == 1]
        async with Commanded(self.folder, self.base) as server:
            keep_s = _OTHERS_S if two and narrow else 0.0
            tours = [self._phase(key, "tour", self.tour(server, key), keep_s=keep_s) for key in self.models]
            await asyncio.gather(*tours, *([self._phase("driver", "move", self.driver())] if two else []))
            print(self.table(), flush=True)
            for key in self.models:  # asleep they hold some of the GPUs
                if await server.command(key, "checkpoint"):
                    await server.command(key, "stop", force=True)
            if not two:
                self.say("", "other GPU", f"not tried: {reason or 'there is one GPU'}")
            for key in narrow if two else []:
                if self.models[key].max_instances > 1:
                    await self._phase(key, "side by side", self.side_by_side(server, key))
                else:
                    await self._phase(key, "other GPU", self.onto_the_other(server, key))
        print(self.table(), flush=True)
        self.gpus.close()
        return 1 if self.problems else 0


class Holder:
    """A program that holds GPU memory, and a number in it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, index: int, count: int) -> Holder:
        """When it has its memory. Raises RuntimeError."""
        made = cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", _HOLDER, str(index), str(count),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            )
        )  # fmt: skip
        if await made._line() != "ready":
            await made.end()
            raise RuntimeError(f"GPU {index} could not be filled")
        return made

    async def _line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(60):
            return (await self._process.stdout.readline()).decode().strip()

    async def ask(self) -> int:
        """The number."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return int(await self._line())

    async def end(self) -> None:
        """Its memory comes free."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench_two_gpus", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML with the models")
    parser.add_argument("--out", type=Path, default=Path("bench-two-gpus"), help="folder for the server's log")
    parser.add_argument("--count", type=int, default=3, help="repetitions of each tier")
    parser.add_argument("--limit", type=float, default=280.0, help="seconds after which nothing new is waited for")
    parser.add_argument("--port", type=int, default=8097)
    raise SystemExit(asyncio.run(Bench(parser.parse_args()).run()))


if __name__ == "__main__":
    main()
