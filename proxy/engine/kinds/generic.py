"""Any other engine: it has what its model's configuration names, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.engine.client import DIGITS, EngineClient, excerpt
from proxy.errors import EngineError, Fault
from proxy.host import command

if TYPE_CHECKING:
    from typing import Unpack

    from proxy.config.calls import OrderSettings
    from proxy.config.engine import ReseedSettings, WarmupSettings
    from proxy.config.model import ModelSettings
    from proxy.engine.client import Place
    from proxy.engine.kinds.base import ClientOptions
    from proxy.telemetry.stages import Stages

_UNKNOWN: Final = "nothing is known of how to reseed this engine: set engine or reseed"
_LONGEST_ANSWER: Final = 4096
"""What is longer is remembered by its digest."""
_HEALTH_S: Final = 5.0
_SAMPLE: Final = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{[^}\n]*\})? +(\S+)", re.MULTILINE)
"""A line of Prometheus' text format."""


class Generic:
    """An engine of which the configuration says everything."""

    name = "generic"
    spec: Final = ()
    inside: Final = None

    def connect(
        self, base_url: str, served_name: str, model: ModelSettings, **options: Unpack[ClientOptions]
    ) -> EngineClient:
        """A client of one engine."""
        return GenericClient(base_url, served_name, model, **options)

    def reseed_gap(self, model: ModelSettings) -> str | None:
        """None where `reseed` names a way."""
        return reseed_gap(model.reseed)

    def reseeds(self, model: ModelSettings) -> bool:
        """Whether `reseed` names something to ask."""
        return model.reseed.asks


class GenericClient(EngineClient):
    """A client of one."""

    def __init__(self, base_url: str, served_name: str, model: ModelSettings, **options: Any) -> None:
        super().__init__(base_url, served_name, **options)
        self._model = model
        self._asleep: bool | None = None
        """As it was told last; None where it was told nothing yet."""

    # --- health ---

    async def healthy(self, path: str) -> bool:
        """Whether it serves: by its command, where it has one."""
        words = self._model.health.command
        if not words:
            return await super().healthy(path)
        return await self._status_of("health", words, _HEALTH_S) == 0

    async def wait_healthy(self, path: str, interval_s: float) -> None:
        """Return when it serves. Bounded by the caller's time-out."""
        if not self._model.health.command:
            await super().wait_healthy(path, interval_s)
            return
        while not await self.healthy(path):
            await asyncio.sleep(interval_s)

    async def loads(self, path: str) -> bool:
        """Whether it looks like one that is not up yet."""
        return not await self.healthy(path) if self._model.health.command else await super().loads(path)

    # --- the canary ---

    async def canary(self) -> str | None:
        """What it answers to its canary request."""
        if not self._model.canary_request.present:
            return await super().canary()
        return await self._answer("canary")

    async def warm_up(self, settings: WarmupSettings) -> list[dict[str, float]]:
        """The canary request, as often as warm-ups are wanted."""
        if not self._model.canary_request.present:
            return await super().warm_up(settings)
        figures = []
        for _ in range(settings.requests):
            began = time.perf_counter()
            await self._answer("warmup")
            took_s = round(time.perf_counter() - began, 4)
            figures.append({"ttft_s": took_s, "total_s": took_s, "tokens": 0})
        return figures

    async def generates(self) -> bool:
        """Whether the canary request is answered, as it should be or with an error of the engine's own."""
        asked = self._model.canary_request
        if not asked.present:
            return await super().generates()
        try:
            if asked.command:
                await self._answer("stall")
                return True
            status, _ = await self._call("stall", "POST", asked.path or "/", json=self._filled(asked.body))
        except EngineError:
            return False
        return not 400 <= status < 500

    async def _answer(self, stage: str) -> str:
        asked = self._model.canary_request
        async with self.limit(stage, asked.timeout):
            if asked.command:
                return _short((await run("canary_request", asked.command, self.place, stage=stage)).encode())
            path = asked.path or "/"
            status, body = await self._call(stage, "POST", path, json=self._filled(asked.body))
        if not 200 <= status < 300:
            raise EngineError(stage, f"POST {path} answered {status} {excerpt(body)}")
        if asked.answer is None:
            return _short(body)
        try:
            found = at(orjson.loads(body), asked.answer)
        except ValueError as error:
            raise EngineError(stage, f"POST {path} answered no {asked.answer}: {excerpt(body)}") from error
        return found if isinstance(found, str) else _short(orjson.dumps(found, option=orjson.OPT_SORT_KEYS))

    # --- sleep ---

    async def is_sleeping(self) -> bool | None:
        """Whether it sleeps; without a way to ask: as it was told last, and true where that was before our time."""
        if not self._model.sleep.present:
            return None
        asked = self._model.asleep
        if not asked.present:
            return self._asleep is not False
        if asked.command:
            status = await self._status_of("probe", asked.command, asked.timeout)
            if status not in (0, 1):
                raise EngineError("probe", f"asleep.command ended with status {status}, which is neither 0 nor 1")
            return status == 0
        path = asked.path or "/"
        async with self.limit("probe", asked.timeout):
            code, answer = await self.ask_json("probe", "GET", path)
        try:
            found = at(answer, asked.answer)
        except ValueError:
            found = None
        if code != 200 or not isinstance(found, bool):
            raise EngineError("probe", f"GET {path} answered {code}, and not true or false at {asked.answer!r}")
        return found

    async def sleep(self, level: int) -> None:
        """As `sleep` says."""
        self._asleep = None
        await self._order("sleep", self._model.sleep, level)
        self._asleep = True

    async def wake_up(self, level: int, stages: Stages, *, copied: bool = False) -> bool:  # noqa: ARG002 - a contract
        """As `wake_up` says."""
        with stages.measure("wake_up"):
            await self._order("wake_up", self._model.wake_up, level)
        self._asleep = False
        return True

    async def _order(self, stage: str, order: OrderSettings, level: int) -> None:
        if not order.present:
            raise EngineError(stage, f"the model's configuration has no `{stage}`")
        async with self.limit(stage, order.timeout):
            if order.command:
                await run(stage, order.command, self.place, level=level)
                return
            path = (order.path or "/").replace("{level}", str(level))
            body = self._filled(order.body, level) if order.method in ("POST", "PUT") else None
            status, said = await self._call(stage, order.method, path, json=body)
        if not 200 <= status < 300:
            raise EngineError(stage, f"{order.method} {path} answered {status} {excerpt(said)}", fault=Fault.IMAGE)

    # --- what it counts ---

    async def progress(self) -> dict[str, str]:
        """Its counters, by `tokens`."""
        asked = self._model.tokens
        if not asked.present:
            return await super().progress()
        try:
            async with self.limit("stall", asked.timeout):
                if asked.command:
                    text = await run("tokens", asked.command, self.place)
                else:
                    status, body = await self._call("stall", "GET", asked.path or "/metrics")
                    text = body.decode("utf-8", "replace") if status == 200 else ""
        except EngineError:
            return {}
        return {name + labels: value for name, labels, value in _SAMPLE.findall(text) if _counts(name, asked.names)}

    # --- randomness ---

    async def reseed_gap(self) -> str | None:
        """As far as the configuration says it."""
        return reseed_gap(self._model.reseed)

    async def reseed(self) -> str | None:
        """Begin its generators anew, in the way that `reseed` names."""
        return await reseed(self, self._model.reseed)

    # --- all of them ---

    async def _status_of(self, stage: str, words: list[str], seconds: float) -> int:
        async with self.limit(stage, seconds):
            try:
                status, _ = await command.run(*filled(words, self.place))
            except OSError as error:
                raise EngineError(stage, f"{words[0]}: {error.strerror or error}") from error
        return status

    def _filled(self, value: Any, level: int = 0) -> Any:
        """A body with the engine's name for the model in it, and the depth of its sleep."""
        if isinstance(value, dict):
            return {name: self._filled(each, level) for name, each in value.items()}
        if isinstance(value, list):
            return [self._filled(each, level) for each in value]
        if value == "{level}":
            return level
        return self.served_name if value == "{model}" else value


def _counts(name: str, names: list[str]) -> bool:
    return name in names if names else name.endswith("_total") and ("token" in name or "request" in name)


def _short(answer: bytes) -> str:
    if len(answer) > _LONGEST_ANSWER:
        return f"sha256:{hashlib.sha256(answer).hexdigest()}"
    try:
        return answer.decode()
    except UnicodeDecodeError:
        return f"sha256:{hashlib.sha256(answer).hexdigest()}"


def at(document: object, pointer: str) -> Any:
    """What stands in a JSON document at a pointer (RFC 6901). Raises ValueError where nothing does."""
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(document, dict) and name in document:
            document = document[name]
        elif isinstance(document, list) and name.isascii() and name.isdigit() and int(name) < len(document):
            document = document[int(name)]
        else:
            raise ValueError(f"there is nothing at {pointer!r}")
    return document


def reseed_gap(way: ReseedSettings) -> str | None:
    """Why engines repeat random numbers after a restore."""
    return None if way.present else _UNKNOWN


async def reseed(client: EngineClient, way: ReseedSettings) -> str | None:
    """Begin the generators of an engine anew; why that could not be had, where that is so. Raises EngineError."""
    digits = secrets.token_hex(DIGITS)
    if way.path is not None:
        async with client.limit("reseed", way.timeout):
            status, _ = await client.ask_json("reseed", "POST", way.path, digits.encode())
        if status == 404:
            return f"it has no {way.path} (reseed.path)"
        if status not in (200, 204):
            raise EngineError("reseed", f"POST {way.path} answered {status}")
    if way.command is not None:
        async with client.limit("reseed", way.timeout):
            await run("reseed", way.command, client.place, given=digits.encode())
    return reseed_gap(way)


async def run(
    key: str, words: list[str], place: Place, *, given: bytes = b"", level: int = 0, stage: str | None = None
) -> str:
    """What the command of a key of the configuration prints, run for an engine. Raises EngineError where it fails."""
    try:
        status, output = await command.run(*filled(words, place, level), given=given)
    except OSError as error:
        raise EngineError(stage or key, f"{key}.command: {words[0]}: {error.strerror or error}") from error
    if status:
        said = output.strip().splitlines() or ["no word on why"]
        raise EngineError(stage or key, f"{key}.command ended with status {status}: {said[-1][:300]}")
    return output


def filled(words: list[str], place: Place, level: int = 0) -> list[str]:
    """The words of a command for an engine."""
    values = {
        "host": place.host, "port": str(place.port), "model": place.model, "instance": place.instance,
        "level": str(level),
    }  # fmt: skip
    return [_with(word, values) for word in words]


def _with(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace("{" + name + "}", value)
    return word
