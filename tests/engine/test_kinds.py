"""The contract of engines with the load-test engine, as each kind; and what a generic engine is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy.config.model import ModelSettings
from proxy.engine import kinds
from proxy.engine.kinds.table import KINDS
from proxy.engine.vllm_extension import warmpool_vllm
from proxy.errors import EngineError
from proxy.telemetry.stages import Stages
from tests.engine.test_engine import start
from tests.engine_contract import EngineContract, Subject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["start"]

INSIDE = ("--worker-extension-cls", "warmpool_vllm.Worker", "--middleware", "warmpool_vllm.Frontend")
ASK = (
    "import sys, urllib.request as u, urllib.error as e\n"
    "try: print(u.urlopen(u.Request('http://%s:%s%s' % (*sys.argv[1:4],), method=sys.argv[4])).read().decode())\n"
    "except e.URLError as x: sys.exit(str(x))"
)
ASLEEP = ASK.replace("print(", "sys.exit('true' not in ").replace(".decode())", ".decode())")


def asked(path: str, method: str = "GET", text: str = ASK) -> list[str]:
    """The words of a command that asks an engine."""
    return [sys.executable, "-c", text, "{host}", "{port}", path, method]


REQUEST = {"model": "{model}", "prompt": "One, two,", "max_tokens": 8, "temperature": 0, "seed": 0}
CALLS: dict[str, Any] = {
    "sleep": {"path": "/sleep?level=1"},
    "wake_up": {"path": "/wake_up"},
    "asleep": {"path": "/is_sleeping"},
    "canary_request": {"path": "/v1/completions", "body": REQUEST, "answer": "/choices/0/text"},
    "tokens": {"path": "/metrics"},
    "reseed": {"path": "/debug/reseed"},
}
COMMANDS: dict[str, Any] = {
    "health": {"command": asked("/health")},
    "sleep": {"command": asked("/sleep?level={level}", "POST")},
    "wake_up": {"command": asked("/wake_up", "POST")},
    "asleep": {"command": asked("/is_sleeping", text=ASLEEP)},
    "canary_request": {"command": asked("/v1/models")},
    "tokens": {"command": asked("/metrics"), "names": ["vllm:request_success_total"]},
    "reseed": {"command": asked("/debug/reseed", "POST")},
}
SUBJECTS: dict[str, tuple[dict[str, Any], tuple[str, ...], set[str]]] = {
    "vllm": ({"engine": "vllm"}, ("--sleep-mode", *INSIDE), {"canary", "sleep", "reseed", "tokens", "pause"}),
    "vllm without its sleep mode": ({"engine": "vllm"}, INSIDE, {"canary", "reseed", "tokens"}),
    "unstated": ({}, ("--sleep-mode",), {"canary", "sleep", "tokens"}),
    "unstated, with a way": ({"reseed": {"path": "/debug/reseed"}}, ("--faults",), {"canary", "reseed", "tokens"}),
    "generic, of which nothing is said": ({"engine": "generic"}, ("--sleep-mode",), {"canary", "tokens"}),
    "generic, by requests": (CALLS, ("--sleep-mode", "--faults"), {"canary", "sleep", "reseed", "tokens"}),
    "generic, without a way to ask": (
        {**CALLS, "asleep": {}}, ("--sleep-mode", "--faults"), {"canary", "sleep", "reseed", "tokens"},
    ),
}  # fmt: skip


def model_of(entry: dict[str, Any]) -> ModelSettings:
    return ModelSettings(process={"command": ["engine", "{port}"]}, **entry)


class TestKinds(EngineContract):
    @pytest.fixture(params=SUBJECTS)
    async def subject(
        self, request: pytest.FixtureRequest, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Subject]:
        entry, options, has = SUBJECTS[request.param]
        monkeypatch.setenv("WARMPOOL_WEIGHTS", str(tmp_path))
        monkeypatch.setenv("PYTHONPATH", str(Path(warmpool_vllm.__file__).parent.parent))
        async with Subject((await start(*options)).url, "demo", model_of(entry), frozenset(has)) as subject:
            yield subject


@pytest.fixture
async def by_commands(start: Any) -> AsyncIterator[Subject]:
    engine = await start("--sleep-mode", "--faults")
    async with Subject(engine.url, "demo", model_of(COMMANDS), frozenset({"sleep", "canary"})) as subject:
        yield subject


async def test_all_of_it_can_be_commands(by_commands: Subject) -> None:
    client = by_commands.client
    assert await client.healthy("/health")
    assert "demo" in (await client.canary() or "")
    await client.sleep(2)
    assert await client.is_sleeping() is True
    await client.wake_up(2, Stages())
    assert await client.is_sleeping() is False
    assert await client.generates()
    await client.complete("warmup", "x", 1)
    assert all(name.startswith("vllm:request_success_total") for name in await client.progress())
    assert await client.progress()
    assert await client.reseed() is None


async def test_a_command_that_fails_says_what_it_said(by_commands: Subject) -> None:
    gone = kinds.of(by_commands.model).connect(
        "http://127.0.0.1:1", "demo", by_commands.model, instance="demo-1", api_key=None
    )
    with pytest.raises(EngineError, match=r"sleep\.command ended with status 1: .*refused"):
        await gone.sleep(1)
    with pytest.raises(EngineError, match=r"canary_request\.command ended with status 1"):
        await gone.canary()
    assert not await gone.healthy("/health")
    assert not await gone.generates()
    assert await gone.progress() == {}


async def test_what_it_answers_otherwise_is_an_error(start: Any) -> None:
    engine = await start("--sleep-mode")
    wrong: dict[str, Any] = {
        "sleep": {"path": "/no-such-path"},
        "wake_up": {"path": "/wake_up"},
        "asleep": {"path": "/v1/models", "answer": "/data/0/id"},
        "canary_request": {"path": "/v1/completions", "body": REQUEST, "answer": "/choices/1/text"},
    }
    async with Subject(engine.url, "demo", model_of(wrong), frozenset()) as subject:
        with pytest.raises(EngineError, match="POST /no-such-path answered 404"):
            await subject.client.sleep(1)
        with pytest.raises(EngineError, match="not true or false at '/data/0/id'"):
            await subject.client.is_sleeping()
        with pytest.raises(EngineError, match="answered no /choices/1/text"):
            await subject.client.canary()


async def test_a_long_answer_and_one_that_is_no_text_are_remembered_by_their_digest(start: Any) -> None:
    engine = await start()
    body = {"model": "{model}", "input": "x" * 50}
    answers = []
    for answer in ("/data/0/embedding", "/model"):
        request = {"path": "/v1/embeddings", "body": body, "answer": answer}
        async with Subject(engine.url, "demo", model_of({"canary_request": request}), frozenset()) as subject:
            answers.append(await subject.client.canary() or "")
    assert answers[0].startswith(("[", "sha256:"))
    assert answers[1] == "demo"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"engine": "vllm", "sleep": {"path": "/a"}, "wake_up": {"path": "/b"}}, "sleep is for engines that are not"),
        ({"engine": "vllm", "health": {"command": ["x"]}}, "health.command is for engines that are not vLLM"),
        ({"sleep": {"path": "/a"}}, "sleep needs wake_up"),
        ({"wake_up": {"path": "/a"}}, "wake_up needs sleep"),
        ({"asleep": {"path": "/a"}}, "asleep needs sleep"),
        ({"sleep": {"path": "/a", "command": ["x"]}, "wake_up": {"path": "/b"}}, "exclude each other"),
        ({"sleep": {"method": "PUT"}, "wake_up": {"path": "/b"}}, "neither a path nor a command"),
        ({"sleep": {"path": "http://elsewhere"}, "wake_up": {"path": "/b"}}, "pattern"),
        ({"sleep": {"command": ["x", "{levle}"]}, "wake_up": {"path": "/b"}}, "{levle} is not one of"),
        ({"canary_request": {"command": ["x", "{level}"]}}, "{level} is not one of"),
        ({"canary_request": {"path": "/a", "answer": "data"}}, "pattern"),
        ({"tokens": {"names": ["a b"]}}, "pattern"),
        ({"weights_copy": True, "tokens": {"path": "/metrics"}}, "weights_copy needs vLLM"),
        ({"sleep": {"path": "/a", "timeout": "0s"}, "wake_up": {"path": "/b"}}, "greater than 0"),
    ],
)
def test_calls_that_make_no_sense_are_refused(entry: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        model_of(entry)


def test_there_is_a_kind_for_all_that_the_configuration_calls_one() -> None:
    entries: list[dict[str, Any]] = [{"engine": "vllm"}, {"engine": "generic"}, {}, CALLS]
    assert [model_of(entry).engine_kind for entry in entries] == ["vllm", "generic", "unstated", "generic"]
    assert KINDS.keys() == {"vllm", "generic", "unstated"}
    assert {name: kind.name for name, kind in KINDS.items()} == {name: name for name in KINDS}
