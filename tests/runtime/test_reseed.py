"""Fresh randomness after a restore: what runs inside the engine, who asks for it, and that answers do differ."""

from __future__ import annotations

import random
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.engine_weights import Worker
from proxy.config.model import ModelSettings
from proxy.engine import kinds
from proxy.engine.kinds.vllm_inside import VllmInside
from proxy.errors import RuntimeFailure
from proxy.runtime.podman import container
from proxy.runtime.process import engine as process
from proxy.tiers import Tier
from tests.fakes import Rig, settle
from tests.served import Proxy
from tests.support import engine_model, get_json, why_no_criu

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
    from pathlib import Path

INSIDE = VllmInside()
EXTENSION = "proxy.engine.vllm_extension.warmpool_vllm.Worker"
IDLE = {"sleeping": "10s", "suspended": "20s", "checkpointed": "30s"}
QUICK = {"sleeping": "200ms", "suspended": "400ms", "checkpointed": "600ms"}
SAMPLED = {"temperature": 1, "max_tokens": 16, "ignore_eos": True}


# --- inside the engine ---


@pytest.fixture
def worker() -> Iterator[Callable[[], Worker]]:
    """Makes workers with the extension; what they stand in for, and this process's generator, are put back."""
    before, state = dict(sys.modules), random.getstate()
    yield lambda: Worker(EXTENSION)
    random.setstate(state)
    for name in ("torch", "numpy", "vllm.device_allocator.cumem"):
        if name in before:
            sys.modules[name] = before[name]
        else:
            sys.modules.pop(name, None)


def test_workers_that_are_told_the_same_draw_the_same_and_no_longer_what_they_did(worker: Any) -> None:
    one, another = worker(), worker()
    assert one.draw() == another.draw(), "as after two restores"
    drawn = []
    for each in (one, another):
        each._stand_in()  # one process has one torch, two workers here
        assert each.call("warmpool_reseed", "digits")["reseeded"][:2] == ["random", "ssl"]
        drawn.append((each.draw(), random.random()))
    assert drawn[0] == drawn[1], "workers of tensor parallelism sample side by side"
    one._stand_in()
    one.call("warmpool_reseed", "other digits")
    assert one.draw() != drawn[0][0]
    assert random.random() != drawn[0][1]


def test_engines_of_data_parallelism_draw_differently(worker: Any) -> None:
    drawn = []
    for attribute in ("data_parallel_index", "data_parallel_rank"):
        for rank in (0, 1):
            one = worker()
            config = types.SimpleNamespace(parallel_config=types.SimpleNamespace(**{attribute: rank}))
            one._worker.vllm_config = config
            one.call("warmpool_reseed", "digits")
            drawn.append(one.draw())
    assert drawn[0] != drawn[1]
    assert drawn[:2] == drawn[2:]


def test_numpy_and_torch_are_told_where_they_are_loaded(worker: Any) -> None:
    one = worker()
    seeds: dict[str, Any] = {}
    numpy: Any = types.ModuleType("numpy")
    numpy.random = types.SimpleNamespace(seed=lambda numbers: seeds.update(numpy=numbers))
    sys.modules["numpy"] = numpy
    sys.modules["torch"].manual_seed = lambda number: seeds.update(torch=number)  # type: ignore[attr-defined]
    assert one.call("warmpool_reseed", "digits")["reseeded"] == ["random", "ssl", "numpy", "torch"]
    assert all(0 <= number < 1 << 32 for number in seeds["numpy"])
    assert 0 <= seeds["torch"] < 1 << 64


def test_a_worker_that_cannot_be_reseeded_says_so_and_lives(worker: Any) -> None:
    one = worker()

    def fail(_: int) -> None:
        raise RuntimeError("an illegal memory access")

    sys.modules["torch"].manual_seed = fail  # type: ignore[attr-defined]
    assert "illegal memory access" in one.call("warmpool_reseed", "digits")["error"]


# --- what an engine is ---


def _podman(**keys: Any) -> dict[str, Any]:
    return {"podman": {"image": "localhost/engine", "command": ["--port", "{port}"], **keys}}


def _process(*words: str) -> dict[str, Any]:
    return {"process": {"command": [*words, "{port}"]}}


@pytest.mark.parametrize(
    ("entry", "vllm"),
    [
        (_process("vllm", "serve", "--port"), True),
        (_process("/opt/venv/bin/vllm", "serve", "--port"), True),
        (_process("{python}", "-m", "vllm.entrypoints.openai.api_server", "--port"), True),
        (_process("{python}", "-m", "loadtest.engine", "--port"), False),
        (_podman(), False),
        (_podman(image="docker.io/vllm/vllm-openai:v0.20.2"), True),
        (_podman(image="docker.io/vllm/vllm-openai:v0.20.2", entrypoint=["/bin/other"]), False),
        (_podman(entrypoint=["vllm", "serve"]), True),
        (_podman(image="docker.io/vllm/other"), False),
        ({**_podman(), "engine": "vllm"}, True),
        ({**_podman(entrypoint=["vllm", "serve"]), "engine": "generic"}, False),
        ({**_podman(), "weights_copy": True}, True),
        ({**_podman(entrypoint=["vllm", "serve"]), "reseed": {"path": "/reseed"}}, False),
    ],
)
def test_an_engine_is_vllm_where_the_configuration_says_or_shows_it(entry: dict[str, Any], vllm: bool) -> None:
    assert ModelSettings(**entry).engine_kind == ("vllm" if vllm else entry.get("engine", "unstated"))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"engine": "vllm", "reseed": {"path": "/reseed"}}, "reseed is for engines that are not vLLM"),
        ({"engine": "generic", "weights_copy": True}, "weights_copy needs vLLM"),
        ({"engine": "sglang"}, "'vllm' or 'generic'"),
        ({"reseed": {"path": "http://elsewhere/"}}, "pattern"),
        ({"reseed": {"command": []}}, "at least 1 item"),
        ({"reseed": {"command": ["x", "{secret}"]}}, "{secret} is not one of"),
        ({"reseed": {"path": "/a", "timeout": "0s"}}, "greater than 0"),
        ({"reseed": {"path": "/a", "timeout": "1h"}}, "less than or equal to 600"),
    ],
)
def test_settings_that_make_no_sense_are_refused(entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelSettings(**_process("x"), **entry)


@pytest.mark.parametrize("option", ["--worker-extension-cls", "--worker_extension_cls=mine.Extension"])
def test_a_worker_extension_of_the_users_own_stays_the_only_one(option: str) -> None:
    model = ModelSettings(**_process("vllm", "serve", option, "--port"))
    assert INSIDE.arguments(model) == ("--middleware", "warmpool_vllm.Frontend")
    with pytest.raises(ValueError, match="weights_copy needs warmpool's own worker extension"):
        ModelSettings(**_process("vllm", "serve", option, "--port"), weights_copy=True)


def test_an_engine_with_the_code_of_another_version_in_it_is_outdated() -> None:
    vllm, other = ModelSettings(**_process("vllm")), ModelSettings(**_process("x"))
    assert kinds.upgraded(vllm, kinds.extension(vllm)) is None
    assert kinds.upgraded(other, None) is None
    assert all(kinds.upgraded(vllm, has) is not None for has in ("0" * 64, None))
    generic = ModelSettings(**_process("vllm"), engine="generic")
    assert process.spec_digest("a", vllm) != process.spec_digest("a", generic)
    contained = [ModelSettings(**_podman(), engine=engine) for engine in ("vllm", "generic")]
    assert len({container.spec_digest("a", model) for model in contained}) == 2


# --- the pool ---


@pytest.fixture
async def rig_of() -> AsyncIterator[Callable[..., Coroutine[Any, Any, Rig]]]:
    rigs: list[Rig] = []

    async def make(**entry: Any) -> Rig:
        rig = Rig({"demo": {"idle": IDLE, "engine": "vllm", **entry}}, shares_images=True)
        rigs.append(rig)
        await rig.pool.open()
        return rig

    yield make
    for rig in rigs:
        await rig.pool.close()


async def restored(rig: Rig) -> Any:
    """Bring demo-1 to its checkpoint and back; the lease of the request."""
    (await rig.pool.lease("demo")).release()
    for _ in range(3):
        await rig.pass_time(10)
    await rig.until(demo_1="checkpointed")
    lease = await rig.pool.lease("demo")
    lease.release()
    await settle()
    return lease


async def test_every_restore_begins_the_generators_anew_before_a_request_is_let_in(rig_of: Any) -> None:
    rig: Rig = await rig_of()
    entropies: set[bytes] = set()
    for _ in range(3):
        lease = await restored(rig)
        assert lease.found is Tier.CHECKPOINTED
        assert "reseed" in lease.wake.stages
        entropies.add(rig.runtime.processes["demo-1"].entropy or b"")
    assert len(entropies) == 3
    assert all(len(bytes.fromhex(e.decode())) == 32 for e in entropies)
    assert rig.runtime.calls["reseed"] == 3, "not when it starts, and not when it only slept or stood still"
    assert rig.pool.status()["models"]["demo"]["repeats_randomness"] is None


async def test_an_engine_that_goes_on_where_it_stood_is_not_reseeded(rig_of: Any) -> None:
    rig: Rig = await rig_of()
    for rest in (10, 20):
        (await rig.pool.lease("demo")).release()
        await rig.pass_time(rest)
        await settle()
    (await rig.pool.lease("demo")).release()
    assert (rig.runtime.calls["resume"], rig.runtime.calls["reseed"]) == (1, 0)


async def test_an_engine_that_cannot_be_reseeded_does_not_serve(rig_of: Any) -> None:
    rig: Rig = await rig_of()
    await restored(rig)
    for _ in range(3):
        await rig.pass_time(10)
    rig.runtime.failures["reseed"] = [RuntimeFailure("reseed", "a worker: out of memory")]
    async with await rig.pool.lease("demo") as lease:
        assert lease.wake is not None
        assert lease.wake.reached_from is Tier.STOPPED
    assert rig.runtime.processes["demo-1"].boot == 2, "a new engine"


async def test_what_cannot_be_reseeded_is_said_once_and_shown(rig_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    rig: Rig = await rig_of(process={"command": ["vllm", "--worker-extension-cls=x.Y", "{port}"]})
    rig.runtime.reseed_gap = "its workers have the extension x.Y, not warmpool's"
    await restored(rig)
    await restored(rig)
    said = [r.message for r in caplog.records if "answers repeat after each restore" in r.message]
    assert len(said) <= 2
    assert "worker extension of its own (--worker-extension-cls=x.Y)" in said[0]
    assert rig.runtime.calls["reseed"] == 2, "its API server all the same"
    assert "x.Y" in rig.pool.status()["models"]["demo"]["repeats_randomness"]


async def test_a_generic_engine_of_which_nothing_is_known_is_named(
    rig_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rig: Rig = await rig_of(engine="generic")
    lease = await restored(rig)
    assert "reseed" not in lease.wake.stages
    assert "nothing is known of how to reseed this engine" in caplog.text
    assert rig.pool.status()["models"]["demo"]["repeats_randomness"] is not None


async def test_a_restored_engine_that_is_adopted_is_reseeded_before_it_serves(rig_of: Any) -> None:
    before: Rig = await rig_of(canary="never")
    before.runtime.leaves = True
    await restored(before)
    rig = Rig({"demo": {"idle": IDLE, "engine": "vllm", "canary": "never"}}, shares_images=True)
    rig.runtime.inherit(before.runtime, keep=True)
    await before.pool.close()
    rig.runtime.processes["demo-1"].entropy = b""  # as where the first one had ended before it could
    await rig.pool.open()
    (await rig.pool.lease("demo")).release()
    assert rig.runtime.processes["demo-1"].entropy
    await rig.pool.close()


# --- real engines ---


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Coroutine[Any, Any, Proxy]]]:
    """Starts a proxy with a model `demo`; ends it afterwards."""
    proxies: list[Proxy] = []

    async def serve_(**entry: Any) -> Proxy:
        proxies.append(Proxy(tmp_path / "warmpool", settings={"models": {"demo": engine_model(idle=QUICK, **entry)}}))
        return await proxies[-1].listening()

    yield serve_
    for proxy in proxies:
        proxy.process.terminate()
        await proxy.ended()


async def sampled(proxy: Proxy, **more: Any) -> list[str]:
    """The first answers after a restore, at temperature 1."""
    await proxy.until("checkpointed")
    tier, text = await proxy.ask(**SAMPLED, **more)
    assert tier == "checkpointed"
    return [text, (await proxy.ask(**SAMPLED, **more))[1]]


RESEED = "import sys, urllib.request as u; u.urlopen('http://%s:%s/debug/reseed' % (*sys.argv[1:],), sys.stdin.buffer.read())"  # noqa: E501
WAYS: dict[str, dict[str, Any]] = {
    "vllm": {"engine": "vllm"},
    "path": {"reseed": {"path": "/debug/reseed"}},
    "command": {"reseed": {"command": [sys.executable, "-c", RESEED, "{host}", "{port}"]}},
}


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
@pytest.mark.parametrize("way", WAYS)
async def test_the_first_answers_after_two_restores_differ(serve: Any, way: str) -> None:
    proxy: Proxy = await serve(**WAYS[way])
    _, greedy = await proxy.ask()
    first, second = await sampled(proxy), await sampled(proxy)
    assert len({*first, *second}) == 4
    assert await sampled(proxy, seed=7) == await sampled(proxy, seed=7), "a client's own seed decides"
    await proxy.until("checkpointed")
    assert (await proxy.ask())[1] == greedy
    assert "answers repeat" not in proxy.log.read_text()


@pytest.mark.criu
@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
async def test_an_engine_that_is_not_reseeded_repeats_its_answers_and_that_is_said(serve: Any) -> None:
    proxy: Proxy = await serve()
    await proxy.ask()
    assert await sampled(proxy) == await sampled(proxy)
    assert "demo-1: without a seed of the client's, its answers repeat after each restore" in proxy.log.read_text()
    status = await get_json(f"{proxy.url}/admin/status")
    assert "set engine or reseed" in status["models"]["demo"]["repeats_randomness"]
