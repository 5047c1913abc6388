"""Commands of operators: wake, pause, unpause, suspend, checkpoint, stop, drain, undrain.

Each is decided at once and carried out behind; the answer waits for the end unless told otherwise. No command but
`stop` with `force` cuts off an answer that is being given, and a client that leaves does not take its command back.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from proxy.config.fields import Duration
from proxy.errors import InvalidRequestError, MediaTypeError, RouteNotFoundError, WarmpoolError
from proxy.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping

    from proxy.pool.command import Command
    from proxy.pool.pool import Pool

log = logging.getLogger("warmpool.admin")

B = TypeVar("B", bound=BaseModel)

DOWN: Final[Mapping[str, Tier]] = {
    "suspend": Tier.SUSPENDED,
    "checkpoint": Tier.CHECKPOINTED,
    "stop": Tier.STOPPED,
}
"""The commands that send instances down, and how far."""
FOR_MODELS: Final = ("wake", "pause", "unpause", *DOWN, "drain", "undrain")


class _Body(BaseModel):
    """What a command may say beside itself; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    wait: bool = True


class _Nothing(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Wake(_Body):
    keep_alive: Duration | None = None


class _Pause(_Body):
    instance: str | None = None


class _Down(_Pause):
    when_busy: Literal["refuse", "wait"] = "refuse"


class _Stop(_Down):
    golden_checkpoint: Literal["keep", "discard"] = "keep"
    force: bool = False


class CommandHandlers:
    """The handlers of `/admin/models/{model}/{command}`, `/admin/drain` and `/admin/undrain`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._tasks: set[asyncio.Task[None]] = set()

    async def for_model(self, request: web.Request) -> web.StreamResponse:
        """One command to one model."""
        command = request.match_info["command"]
        if command not in FOR_MODELS:
            raise RouteNotFoundError(f"There is no command {command!r}; there are: {', '.join(FOR_MODELS)}.")
        key = self._pool.find(request.match_info["model"])
        if command in DOWN:
            return await self._down(request, key, command)
        if command in ("pause", "unpause"):
            return await self._pause(request, key, command)
        if command == "wake":
            wake = await _body(request, _Wake)
            return await self._wake(key, wait=wake.wait, keep_s=wake.keep_alive)
        body = await _body(request, _Body)
        return await self._drain_or_undrain(key, command, wait=body.wait)

    async def drain(self, request: web.Request) -> web.StreamResponse:
        """Let the whole server take no new requests."""
        return await self._drain_or_undrain(None, "drain", wait=(await _body(request, _Body)).wait)

    async def undrain(self, request: web.Request) -> web.StreamResponse:
        """Take that back."""
        return await self._drain_or_undrain(None, "undrain", wait=(await _body(request, _Body)).wait)

    async def _wake(self, key: str, *, wait: bool, keep_s: float | None) -> web.Response:
        if not wait:
            self._spawn(f"wake {key}", self._pool.wake(key, keep_s=keep_s))
            await asyncio.sleep(0)  # it has begun, so that a status asked for now says so
            return _answer({"model": key, "command": "wake", "done": False})
        instance, found, record = await self._pool.wake(key, keep_s=keep_s)
        wake = None if record is None else {"seconds": record.seconds, "stages": dict(record.stages)}
        facts = {"instance": instance, "found": found.label, "wake": wake}
        return _answer({"model": key, "command": "wake", "done": True, **facts})

    async def _pause(self, request: web.Request, key: str, command: str) -> web.Response:
        body = await _body(request, _Pause)
        ask = self._pool.pause if command == "pause" else self._pool.unpause
        instances = [
            {"id": instance.id, "state": instance.state.value}
            for instance in await ask(key, instance_id=body.instance, wait=body.wait)
        ]
        moving = {"pausing", "unpausing", "paused" if command == "unpause" else "pausing"}
        done = not any(instance["state"] in moving for instance in instances)
        return _answer({"model": key, "command": command, "done": done, "instances": instances})

    async def _down(self, request: web.Request, key: str, command: str) -> web.Response:
        body = await _body(request, _Stop if command == "stop" else _Down)
        discard = isinstance(body, _Stop) and body.golden_checkpoint == "discard"
        if isinstance(body, _Stop) and body.force:
            given = self._pool.force_stop(key, instance_id=body.instance, discard=discard)
        else:
            given = self._pool.step_down(
                key, DOWN[command], instance_id=body.instance, wait=body.when_busy == "wait", discard=discard
            )
        if body.wait:
            for one in given:
                await one.carried_out()
        done = not any(one.open for one in given)
        instances = [_command_status(one) for one in given]
        return _answer({"model": key, "command": command, "done": done, "instances": instances})

    async def _drain_or_undrain(self, key: str | None, command: str, *, wait: bool) -> web.Response:
        if command == "undrain":
            self._pool.undrain(key)
            return _answer({"model": key, "command": command, "done": True})
        self._pool.drain(key)
        if wait:
            await self._pool.until_unused(key)
        return _answer({"model": key, "command": command, "done": self._pool.unused(key)})

    def _spawn(self, name: str, work: Coroutine[Any, Any, object]) -> None:
        async def carry_out() -> None:
            try:
                await work
            except WarmpoolError as error:
                log.warning("command %s: %s", name, error)

        task = asyncio.create_task(carry_out(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, _: object = None) -> None:
        """Give up on the wakes that nobody waits for; for `on_shutdown`."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _command_status(command: Command) -> dict[str, Any]:
    return {
        "id": command.instance_id,
        "found": command.found.label,
        "to": max(command.found, command.to).label,  # one that is colder already stays there
        "done": not command.open,
    }


def _answer(facts: dict[str, Any]) -> web.Response:
    status = 200 if facts["done"] else 202
    return web.Response(body=orjson.dumps(facts), status=status, content_type="application/json")


async def read_body(request: web.Request) -> None:
    """The body of a command that has no fields. Raises as `_body` does."""
    await _body(request, _Nothing)


async def _body(request: web.Request, shape: type[B]) -> B:
    """The body, an object or nothing. Raises InvalidRequestError or MediaTypeError."""
    # A page of another site can send a form, but not this content type without being asked for leave (CORS).
    if request.content_type != "application/json":
        raise MediaTypeError("A command needs the header `Content-Type: application/json`; its body may be `{}`.")
    try:
        fields = orjson.loads(await request.read() or b"{}")
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not JSON: {error}.") from error
    try:
        return shape.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or None
        known = ", ".join(shape.model_fields)
        raise InvalidRequestError(f"{name or 'The body'}: {first['msg']}. Fields: {known}.", param=name) from None
