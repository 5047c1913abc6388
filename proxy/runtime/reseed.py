"""Fresh randomness for an engine that came back from a checkpoint.

An image holds the generators of random numbers as they were, so every restore from it, and every clone, would draw the
same: without a seed of the client's, the same first answers. So before a restored engine serves it begins them anew,
with digits from this host's kernel: vLLM by what warmpool runs inside it (proxy/engine/vllm_extension), others in the
way that `models.NAME.reseed` names.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Final

from proxy.engine.vllm_extension.warmpool_vllm.frontend import PATH
from proxy.errors import EngineError
from proxy.host import command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from proxy.config.model import ModelSettings
    from proxy.engine.client import EngineClient
    from proxy.runtime.base import EngineProcess

STAGE: Final = "reseed"
_VLLM_S: Final = 30.0
"""How long vLLM's workers may take, some of whose memory is touched for the first time since the restore."""
_DIGITS: Final = 32


def gap(model: ModelSettings) -> str | None:
    """Why engines of a model repeat random numbers after a restore, as far as the configuration says it."""
    if model.is_vllm:
        option = model.own_worker_extension
        return None if option is None else f"its command has a worker extension of its own ({option})"
    return None if model.reseed.present else "nothing is known of how to reseed this engine: set engine or reseed"


def possible(model: ModelSettings) -> bool:
    """Whether there is something that a restored engine can be asked for."""
    return model.is_vllm or model.reseed.present


async def asked_gap(client: EngineClient, model: ModelSettings) -> str | None:
    """The same as `gap`, of an engine that runs. Raises EngineError."""
    if not model.is_vllm or gap(model) is not None:
        return gap(model)
    async with _limit(_VLLM_S):
        status, answer = await client.ask_json(STAGE, "GET", PATH)
    return _reason(status, answer)


async def reseed(client: EngineClient, engine: EngineProcess, model: ModelSettings, name: str) -> str | None:
    """Begin the generators of a running engine anew; why that could not be had, or not of all, where that is so.

    `name` is what clients call the model. Raises EngineError when it should have worked and did not.
    """
    digits = secrets.token_hex(_DIGITS)
    if model.is_vllm:
        async with _limit(_VLLM_S):
            status, answer = await client.ask_json(STAGE, "POST", PATH, digits.encode())
        return _reason(status, answer)
    way = model.reseed
    if way.path is not None:
        async with _limit(way.timeout):
            status, _ = await client.ask_json(STAGE, "POST", way.path, digits.encode())
        if status == 404:
            return f"it has no {way.path} (reseed.path)"
        if status not in (200, 204):
            raise EngineError(STAGE, f"POST {way.path} answered {status}")
    if way.command is not None:
        values = {"host": engine.host, "port": str(engine.port), "model": name, "instance": engine.instance_id}
        async with _limit(way.timeout):
            await _run([_filled(word, values) for word in way.command], digits)
    return gap(model)


@contextlib.asynccontextmanager
async def _limit(seconds: float) -> AsyncIterator[None]:
    """Raises EngineError when the time is over."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise EngineError(STAGE, f"no answer within {seconds:g} s") from error


async def _run(words: list[str], digits: str) -> None:
    try:
        status, output = await command.run(*words, given=digits.encode())
    except OSError as error:
        raise EngineError(STAGE, f"reseed.command: {words[0]}: {error.strerror or error}") from error
    if status:
        said = output.strip().splitlines() or ["no word on why"]
        raise EngineError(STAGE, f"reseed.command ended with status {status}: {said[-1][:300]}")


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word


def _reason(status: int, answer: object) -> str | None:
    """What vLLM's answer says of its workers. Raises EngineError."""
    if status in (404, 405):
        return "it did not take the arguments that warmpool added to its command: is that vLLM's own?"
    if status != 200 or not isinstance(answer, dict):
        said = answer.get("error") if isinstance(answer, dict) else None
        raise EngineError(STAGE, f"{PATH} answered {status}: {str(said)[:300]}")
    reason = answer.get("reason")
    return str(reason)[:300] if reason is not None else None
