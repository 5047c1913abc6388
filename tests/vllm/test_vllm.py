"""The real vLLM on the CPU, in containers, through `warmpool serve` and `warmpool checkpoint` (`make test-vllm`).

One engine is started cold for all tests that do not need one of their own; they run in the order they stand in, and
each of them alone too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp
import anthropic
import openai
import orjson
import pytest
import pytest_asyncio
import tomli_w
from prometheus_client.parser import text_string_to_metric_families

from loadtest.bench_vllm_cpu import Served, served
from loadtest.vllm_cpu import FOLDER, IMAGE
from proxy.runtime.state_dir import Claim
from tests.podman_bench import podman, tmpfs_folder, why_no_podman
from tests.served import ASK, Proxy
from tests.support import PYTHON, ROOT, files_in, get_json
from tests.vllm.bench_serve import bench_serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

log = logging.getLogger("tests.vllm")

MODEL = Path(os.environ.get("VLLM_CPU_MODEL", FOLDER / "model"))
PATIENCE_S = 240.0
"""For a cold start on a machine with much else to do."""
RESTORES = 5
OWN_PART_MS = 50.0
"""What the proxy may add to a restore: all but podman, CRIU and the engine."""

QUICK = {"sleeping": "300ms", "suspended": "600ms", "checkpointed": "900ms"}
AWAKE = {"sleeping": "never", "suspended": "never", "checkpointed": "never"}


def why_no_vllm() -> str | None:
    """None where the tests can run, else the reason to skip."""
    if (reason := why_no_podman()) is not None:
        return reason
    image = subprocess.run(["podman", "image", "exists", IMAGE], check=False)
    return None if MODEL.is_dir() and image.returncode == 0 else "no image or no model (make vllm-cpu)"


pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.asyncio(loop_scope="module"),
]

images = pytest.fixture(tmpfs_folder, scope="module")


@dataclass(frozen=True)
class First:
    """What one request met: tier found, seconds to the first token, stages of the wake in milliseconds, the text."""

    tier: str
    ttft_s: float
    stages_ms: dict[str, float]
    text: str


@dataclass(frozen=True)
class Cold:
    """The cold start that the tests share, and what came after it."""

    first: First
    warm_s: float
    """To the first token of the same engine when it is ready, the median."""
    served: Served
    """What the engine had done when it was checkpointed."""
    connection_ended: bool
    """Whether a client's own open connection was ended by the dump."""


class Host:
    """The example configuration with a model `demo`, one proxy after the other."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder, self.images = folder, images
        self.owner = Claim(folder / "state").owner
        self.environment: dict[str, str] = {}
        """Of engines, beside the example's."""
        self.proxy: Proxy | None = None
        self.client = openai.AsyncOpenAI(api_key="none", max_retries=0, timeout=PATIENCE_S)

    def settings(self, **entry: Any) -> dict[str, Any]:
        example = tomllib.loads((ROOT / "config" / "vllm-cpu.toml").read_text())
        tiny = example["models"]["tiny"]
        tiny["podman"]["env"] |= self.environment
        (volume,) = tiny["podman"]["volumes"]
        volume["source"] = str(MODEL)
        pool = {"state_dir": str(self.folder / "state"), "checkpoint_dir": str(self.images)}
        quick = {"idle": QUICK, "max_concurrency": 1}
        return {"pool": pool, "models": {"demo": {**tiny, **quick, **entry}}}

    async def serve(self, **entry: Any) -> Proxy:
        """A new proxy, in place of one that runs; engines that run are left to it."""
        await self.end(signal.SIGTERM)
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        self.proxy = await Proxy(self.folder, settings=self.settings(**entry)).listening()
        self.client.base_url = f"{self.proxy.url}/v1"
        return self.proxy

    async def serving(self) -> Proxy:
        """The proxy that runs, or a new one."""
        return self.proxy or await self.serve()

    async def end(self, how: signal.Signals) -> None:
        if self.proxy is not None:
            proxy, self.proxy = self.proxy, None
            await proxy.session.close()
            proxy.process.send_signal(how)
            await asyncio.to_thread(proxy.process.wait, PATIENCE_S)

    def command(self, *arguments: str, status: int = 0) -> str:
        """What `warmpool checkpoint …` prints, with this configuration."""
        path = self.folder / "command.toml"
        path.write_text(tomli_w.dumps(self.settings()))
        done = subprocess.run(
            [PYTHON, "-m", "proxy", "checkpoint", *arguments, "-c", str(path)],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == status, done.stderr + done.stdout
        return done.stdout + (done.stderr if status else "")

    async def ask(self) -> First:
        """A streamed completion at temperature 0, with the `openai` package."""
        began = time.perf_counter()
        raw = await self.client.completions.with_raw_response.create(**ASK, stream=True)  # type: ignore[call-overload]
        ttft_s, text = 0.0, ""
        async for chunk in raw.parse():
            ttft_s = ttft_s or time.perf_counter() - began
            text += "".join(choice.text for choice in chunk.choices)
        stages_ms = {n: float(v) for n, v in re.findall(r"(\w+);dur=([\d.]+)", raw.headers["server-timing"])}
        return First(raw.headers["x-warmpool-tier"], ttft_s, stages_ms, text)

    async def until_checkpointed(self) -> None:
        """Return when nothing runs and both instances can be restored."""
        assert self.proxy is not None
        async with asyncio.timeout(PATIENCE_S):
            while list((await self.proxy.states()).values()) != ["checkpointed"] * 2:
                await asyncio.sleep(0.02)

    def addresses(self) -> list[str]:
        """Of the engines that run."""
        ids = podman("ps", "--quiet", "--filter", f"label=io.warmpool.owner={self.owner}").split()
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return podman("inspect", "--format", form, *ids).split() if ids else []

    async def served(self) -> Served:
        """What the one engine that runs has done."""
        (address,) = self.addresses()
        return await served(f"{address}:8000")

    def clear(self) -> None:
        if self.proxy is not None:
            self.proxy.process.kill()
            self.proxy.process.wait()
        if left := podman("ps", "--all", "--quiet", "--filter", f"label=io.warmpool.owner={self.owner}").split():
            podman("rm", "--force", "--time", "0", *left)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(tmp_path_factory: pytest.TempPathFactory, images: Path) -> AsyncIterator[Host]:
    if (reason := why_no_vllm()) is not None:
        pytest.skip(reason)
    made = Host(tmp_path_factory.mktemp("warmpool"), images)
    yield made
    await made.client.close()
    await made.end(signal.SIGTERM)
    made.clear()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cold(host: Host) -> Cold:
    """A cold start and the checkpoint after it."""
    await host.serve()
    first = await host.ask()
    warm = [await host.ask() for _ in range(5)]
    assert {(w.tier, w.text) for w in warm} == {("ready", first.text)}
    with _kept_alive(host.addresses()[0]) as connection:
        done = await host.served()
        await host.until_checkpointed()
        ended = await asyncio.to_thread(_has_ended, connection)
    return Cold(first, median(w.ttft_s for w in warm), done, ended)


@contextlib.contextmanager
def _kept_alive(address: str) -> Iterator[socket.socket]:
    """A connection to an engine that stays open after a request, as a client of its own would have."""
    with socket.create_connection((address, 8000), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        yield connection


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other end is no more: it says so, or nothing comes back any more."""
    connection.settimeout(2)
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection.recv(1000) == b""
    except OSError:
        return True


async def test_a_cold_start_answers_and_is_checkpointed(host: Host, cold: Cold) -> None:
    assert cold.first.tier == "stopped"
    assert cold.first.text
    assert {"start", "load", "warmup", "canary"} <= cold.first.stages_ms.keys()
    assert host.addresses() == [], "no engine runs"
    (row,) = orjson.loads(host.command("ls", "--json"))
    assert (row["image"], row["model"], row["where"]) == ("demo", "demo", "tmpfs")
    manifest = orjson.loads(host.command("inspect", "demo"))
    assert manifest["bytes_by_kind"]["memory pages"] > 256 << 20
    # The engine's processes hide their environment; all of them count nevertheless.
    assert sum(manifest["details"]["memory"].values()) > manifest["bytes_by_kind"]["memory pages"] / 2


async def test_a_clients_open_connection_does_not_keep_an_engine_from_its_checkpoint(cold: Cold) -> None:
    assert cold.connection_ended


async def test_the_first_token_after_a_restore_takes_a_tenth_of_a_cold_start(host: Host, cold: Cold) -> None:
    proxy = await host.serving()
    firsts, own_ms = [], []
    for _ in range(RESTORES):
        await host.until_checkpointed()
        first = await host.ask()
        assert (first.tier, first.text) == ("checkpointed", cold.first.text)
        firsts.append(first)
        done = await host.served()
        log.info("%s %s", first, done)
        if done.requests == cold.served.requests + 1:  # no canary beside it
            engine_ms = (done.ttft_s - cold.served.ttft_s) * 1000
            others_ms = sum(first.stages_ms.get(s, 0) for s in ("podman", "criu", "health", "wake_up", "reseed"))
            own_ms.append(first.ttft_s * 1000 - engine_ms - others_ms)
    wakes = [i["last_wake"] for i in (await get_json(f"{proxy.url}/admin/status"))["models"]["demo"]["instances"]]
    assert {wake["from"] for wake in wakes if wake} == {"checkpointed"}
    ttft_s = [f.ttft_s for f in firsts]
    figures = f"cold {cold.first.ttft_s:.2f} s, warm {cold.warm_s * 1000:.0f} ms, restored {_list(ttft_s, 's')}"
    log.info("%s, the proxy's own part %s", figures, _list(own_ms, "ms"))
    assert median(ttft_s) <= cold.first.ttft_s / 10, figures
    assert len(own_ms) >= RESTORES - 1
    assert median(own_ms) < OWN_PART_MS, own_ms


async def test_its_own_metrics_are_passed_on_and_never_go_back_over_restores(host: Host, cold: Cold) -> None:
    proxy = await host.serving()
    before: dict[tuple[str, ...], float] = {}
    for _ in range(3):
        await host.until_checkpointed()
        await host.ask()
        await host.until_checkpointed()  # by then they were asked once more
        async with proxy.session.get("/metrics") as response:
            families = [*text_string_to_metric_families(await response.text())]
        now = {
            (s.name, *sorted(f"{name}={value}" for name, value in s.labels.items())): s.value
            for family in families
            if family.type in ("counter", "histogram")
            for s in family.samples
            if s.name.startswith("vllm:")
        }
        assert len(now) > 100
        assert {key: (value, now.get(key)) for key, value in before.items() if now.get(key, -1.0) < value} == {}
        if before:
            more = sum(v - before.get(k, 0.0) for k, v in now.items() if k[0] == "vllm:generation_tokens_total")
            assert more >= 8, "what `ASK` asks for"
        before = now
    failures = [s.value for f in families if f.name == "warmpool_engine_scrape_failures" for s in f.samples]
    assert sum(v for v in failures if v < 1e9) == 0


def _list(values: list[float], unit: str) -> str:
    return f"{', '.join(f'{v:.3g}' for v in values)} {unit}"


async def test_chat_with_the_openai_package(host: Host, cold: Cold) -> None:
    await host.serving()
    await host.until_checkpointed()
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]

    async def whole() -> str | None:
        answer = await host.client.chat.completions.create(
            model="demo", messages=messages, max_tokens=16, temperature=0
        )
        assert answer.usage is not None
        return answer.choices[0].message.content

    text = await whole()
    stream = await host.client.chat.completions.create(
        model="demo", messages=messages, max_tokens=16, temperature=0, stream=True
    )
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text
    await host.until_checkpointed()
    assert await whole() == text, "after another restore"


async def test_its_other_apis_are_reached(host: Host, cold: Cold) -> None:
    proxy = await host.serve(idle=AWAKE)
    messages = [{"role": "user", "content": "Hello"}]
    chat = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0}
    for path, body, wanted in (
        ("/v1/chat/completions/batch", {**chat, "messages": [messages] * 2}, "choices"),
        ("/v1/messages/count_tokens", {"model": "demo", "messages": messages}, "input_tokens"),
        ("/tokenize", {"model": "demo", "prompt": "Hello"}, "tokens"),
    ):
        async with proxy.session.post(path, json=body) as response:
            text = await response.text()
            assert response.status == 200, (path, text)
            assert f'"{wanted}"' in text, (path, text)
    async with proxy.session.post("/v1/chat/completions/render", json=chat) as response:
        text = await response.text()
        # Off unless vLLM has --enable-scale-out; either is its own answer.
        assert response.status == 200 or "scale-out" in text, text
    whole = await host.client.chat.completions.create(**chat)  # type: ignore[call-overload]
    made = await host.client.responses.create(model="demo", input="Hello", max_output_tokens=8, temperature=0)
    assert made.id.startswith("resp_")
    events = await host.client.responses.create(
        model="demo", input="Hello", max_output_tokens=8, temperature=0, stream=True
    )
    kinds = [event.type async for event in events]
    assert kinds[0] == "response.created"
    with pytest.raises(openai.NotFoundError, match=made.id):
        await host.client.responses.retrieve(made.id)  # it keeps none unless VLLM_ENABLE_RESPONSES_API_STORE is set
    async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="none", max_retries=0) as claude:
        said = await claude.messages.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, extra_body={"temperature": 0}
        )
        assert isinstance(said.content[0], anthropic.types.TextBlock)
        assert said.content[0].text == whole.choices[0].message.content
        async with claude.messages.stream(
            model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, extra_body={"temperature": 0}
        ) as stream:
            assert "".join([piece async for piece in stream.text_stream]) == said.content[0].text
    async with proxy.session.post("/invocations", json={k: v for k, v in chat.items() if k != "model"}) as response:
        assert response.status == 200, await response.text()
    for path in ("/sleep", "/collective_rpc", "/reset_prefix_cache", "/server_info"):
        async with proxy.session.post(path, json=chat) as response:
            assert response.status == 404, path
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await proxy.session.ws_connect("/v1/realtime?model=demo")
    assert refused.value.status == 404, "a model for text has none"


async def test_vllms_own_load_generator_is_answered_out_of_a_checkpoint(host: Host, cold: Cold, tmp_path: Path) -> None:
    proxy = await host.serve()
    await host.until_checkpointed()
    result = await bench_serve(proxy.url, tmp_path, "--num-prompts", "12", "--max-concurrency", "4")
    log.info("vllm bench serve: median TTFT %.0f ms, P99 %.0f ms", result["median_ttft_ms"], result["p99_ttft_ms"])
    assert (result["completed"], result["failed"]) == (12, 0)


async def test_two_clones_answer_side_by_side_and_share_the_image(host: Host, cold: Cold) -> None:
    await host.serving()
    await host.until_checkpointed()
    proxy = await host.serve(idle=AWAKE)
    blocks = _blocks(host.images)
    for tier in ("checkpointed", "ready"):
        answers = await asyncio.gather(proxy.ask(), proxy.ask())
        assert {*answers} == {(tier, cold.first.text)}
        await proxy.until_all(2, "ready")  # the other one may come up after both were answered
    assert len(set(host.addresses())) == 2
    assert _blocks(host.images) == blocks, "one image for both"


async def test_two_restores_and_two_clones_draw_differently_without_a_seed(host: Host, cold: Cold) -> None:
    await host.serve()
    sampled = {"temperature": 1, "max_tokens": 24, "ignore_eos": True}
    texts: list[str] = []
    seeded: set[str] = set()
    wakes: list[Any] = []
    for _ in range(2):
        await host.until_checkpointed()
        proxy = await host.serve(idle=AWAKE)
        answers = await asyncio.gather(proxy.ask(**sampled), proxy.ask(**sampled))
        await proxy.until_all(2, "ready")
        texts += [text for _, text in (*answers, await proxy.ask(**sampled))]
        seeded.add((await proxy.ask(**sampled, seed=7))[1])
        assert (await host.ask()).text == cold.first.text
        status = (await get_json(f"{proxy.url}/admin/status"))["models"]["demo"]
        wakes += [i["last_wake"]["stages"] for i in status["instances"]]
        await host.serve()
    log.info("%s", texts)
    assert len({*texts}) == 6
    assert len(seeded) == 1, "a client's own seed decides"
    log.info("reseed: %s", _list([stages["reseed"] * 1000 for stages in wakes], "ms"))
    assert status["repeats_randomness"] is None


def _blocks(folder: Path) -> int:
    return sum(path.stat().st_blocks for path in folder.rglob("*"))


async def test_a_new_proxy_adopts_checkpoints_and_running_engines(host: Host, cold: Cold) -> None:
    await host.serving()
    await host.serve(idle=AWAKE)
    await host.ask()
    before = host.addresses()
    await host.end(signal.SIGKILL)
    proxy = await host.serve(idle=AWAKE)
    async with asyncio.timeout(PATIENCE_S):
        while "waking" in (await proxy.states()).values():  # they repeat their canary first
            await asyncio.sleep(0.02)
    first = await host.ask()
    assert (first.tier, first.text) == ("ready", cold.first.text)
    assert host.addresses() == before
    await host.serve()
    await host.until_checkpointed()
    await host.end(signal.SIGKILL)
    await host.serve()
    first = await host.ask()
    assert (first.tier, first.text) == ("checkpointed", cold.first.text)


async def test_an_image_is_verified_exported_and_imported(host: Host, cold: Cold, tmp_path: Path) -> None:
    await host.end(signal.SIGTERM)
    assert "demo: good" in host.command("verify", "demo")
    file = tmp_path / "demo.tar.zst"
    host.command("export", "demo", str(file))
    assert file.stat().st_size < sum(p.stat().st_size for p in host.images.rglob("*") if p.is_file()) / 2
    host.command("rm", "demo")
    assert files_in(host.images) == []
    host.command("import", str(file))
    file.unlink()
    assert "demo: good" in host.command("verify", "demo")


async def test_a_corrupted_image_is_refused_and_costs_a_cold_start(host: Host, cold: Cold) -> None:
    await host.serve()
    await host.until_checkpointed()
    core = next(host.images.glob("demo/criu/core-*.img"))
    core.write_bytes(os.urandom(core.stat().st_size))
    assert "its content is not what was written" in host.command("verify", "demo", "--digests-only", status=1)
    first = await host.ask()
    assert (first.tier, first.text) == ("checkpointed", cold.first.text)
    assert host.proxy is not None
    assert (await host.proxy.instance())["last_wake"]["from"] == "stopped"
    assert [*host.images.glob("demo.quarantined*")], "it is set aside"


async def test_create_makes_a_proven_image_that_serves_the_first_request(host: Host, cold: Cold) -> None:
    await host.end(signal.SIGTERM)
    # With the endpoints of a sleep mode, which this vLLM answers.
    host.environment["VLLM_SERVER_DEV_MODE"] = "1"
    report = orjson.loads(host.command("create", "demo", "--json"))
    assert report["canary_checked"]
    assert {"start", "load", "warmup", "canary", "sleep", "checkpoint"} <= report["making_s"].keys()
    assert {"restore", "criu", "podman", "wake_up", "reseed", "canary"} <= report["proof_s"].keys()
    assert report["warmup"][0]["tokens"] == 8
    assert host.addresses() == []
    await host.serve()
    first = await host.ask()
    assert (first.tier, first.text) == ("checkpointed", cold.first.text)
