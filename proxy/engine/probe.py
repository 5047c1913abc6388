"""What a running engine offers, as it says itself: `warmpool engine probe`.

Only questions are asked (GET), and requests without anything in them where an engine does not describe its routes, each
of which it refuses. Trying its sleep mode has to be wanted: its clients would notice.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson

from proxy.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_TIMEOUT_S: Final = 10.0
_TRY_S: Final = 120.0
_MOST_BYTES: Final = 32 << 20
_VERBS: Final = frozenset({"get", "post", "put", "patch", "delete"})
_METRIC: Final = re.compile(r"^# TYPE ([A-Za-z_:][A-Za-z0-9_:]*) (\w+)", re.MULTILINE)
_PREFIX: Final = re.compile(r"^([a-z]+)[:_]")
NO: Final = "no"
_VERSIONS: Final = (
    ("/version", ("version",)),
    ("/props", ("build_info",)),
    ("/get_server_info", ("version",)),
    ("/info", ("version",)),
)
"""Where engines say which one they are: vLLM and TensorRT-LLM, llama.cpp, SGLang, TGI."""


@dataclass(slots=True)
class Probed:
    """What was found: each fact in words, in the order in which they are shown; and the routes."""

    url: str
    facts: dict[str, str] = field(default_factory=dict)
    routes: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each route that it says it has, or that was found by asking."""


class Prober:
    """Asks one engine."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._session: aiohttp.ClientSession

    async def probe(self, listed: Iterable[tuple[str, str]], *, sleep: bool = False) -> Probed:
        """What it offers; `listed`: the routes that it is asked for where it does not describe its own.

        `sleep`: put it to sleep at each level, wake it, and compare its answers. Raises HostError where nobody answers.
        """
        timeout = aiohttp.ClientTimeout(_TIMEOUT_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as self._session:
            found = Probed(self._url)
            status, models = await self._json("GET", "/v1/models")
            if status == 401:
                raise HostError(f"{self._url} asks for an API key: --api-key-file")
            health, _ = await self._ask("GET", "/health")
            found.facts["engine"] = await self._who(models)
            found.facts["models"] = _models(models)
            found.facts["/health"] = str(health)
            described = await self._described()
            found.routes = described or [route for route in listed if await self._has(*route)]
            has = {*found.routes}
            found.facts["describes its routes"] = "/openapi.json" if described else NO
            await self._management(found.facts, has, described=bool(described))
            found.facts["metrics"] = await self._metrics()
            if sleep:
                await self._try_levels(found.facts)
            return found

    async def _management(self, facts: dict[str, str], has: set[tuple[str, str]], *, described: bool) -> None:
        asleep, paused = [await self._flag(path, name) for path, name in _FLAGS]
        facts["sleep mode"] = NO if asleep is None else f"yes, {'asleep' if asleep else 'awake'} (/is_sleeping)"
        facts["sleep levels"] = NO if asleep is None else "1 and 2 by /sleep?level=, not tried (--try)"
        facts["pause, resume"] = NO if paused is None else f"yes, {'paused' if paused else 'running'} (/is_paused)"
        rpc = ("POST", "/collective_rpc") in has
        if not described:
            # A path that is there for another method only.
            rpc = (await self._ask("GET", "/collective_rpc"))[0] == 405
        facts["collective_rpc"] = "yes" if rpc else NO
        status, said = await self._json("GET", "/warmpool/reseed")
        inside = isinstance(said, dict) and status == 200
        facts["warmpool's extension"] = NO if not inside else str(said.get("reason") or "yes")

    async def _who(self, models: Any) -> str:
        version = ""
        for path, names in _VERSIONS:
            _, said = await self._json("GET", path)
            values = [said[name] for name in names if isinstance(said, dict) and isinstance(said.get(name), str)]
            if values:
                version = values[0]
                break
        owners = sorted({str(entry.get("owned_by")) for entry in _entries(models) if entry.get("owned_by")})
        return " ".join(filter(None, (", ".join(owners), version))) or "it does not say"

    async def _flag(self, path: str, name: str) -> bool | None:
        status, said = await self._json("GET", path)
        value = said.get(name) if status == 200 and isinstance(said, dict) else None
        return value if isinstance(value, bool) else None

    async def _described(self) -> list[tuple[str, str]]:
        # vLLM puts it together when it is asked for the first time.
        timeout = aiohttp.ClientTimeout(_TRY_S)
        status, document = await self._json("GET", "/openapi.json", timeout=timeout)
        paths = document.get("paths") if status == 200 and isinstance(document, dict) else None
        if not isinstance(paths, dict):
            return []
        return sorted(
            ((verb.upper(), path) for path, verbs in paths.items() if isinstance(verbs, dict)
             for verb in verbs.keys() & _VERBS),
            key=lambda route: (route[1], route[0]),
        )  # fmt: skip

    async def _has(self, method: str, path: str) -> bool:
        """Whether it knows a path; a body without anything in it is refused by whoever does."""
        if "{" in path or method not in ("GET", "POST"):
            return False
        status, _ = await self._ask(method, path, data=b"{}" if method == "POST" else None)
        return status not in (404, 405, 501)

    async def _metrics(self) -> str:
        status, body = await self._ask("GET", "/metrics")
        kinds = _METRIC.findall(body.decode("utf-8", "replace")) if status == 200 else []
        if not kinds:
            return NO
        prefixes = sorted({found[1] for name, _ in kinds if (found := _PREFIX.match(name)) is not None})
        tokens = sorted(name for name, kind in kinds if kind == "counter" and "token" in name)
        return f"{len(kinds)} ({', '.join(prefixes)}); tokens: {', '.join(tokens) or 'none'}"

    async def _try_levels(self, facts: dict[str, str]) -> None:
        if facts["sleep mode"] == NO:
            return
        found = []
        before = await self._answer()
        for level in (1, 2):
            steps: list[tuple[str, str, dict[str, str] | None]] = [
                ("POST", f"/sleep?level={level}", None),
                ("POST", "/wake_up?tags=weights", None),
            ]
            steps += [("POST", "/collective_rpc", {"method": "reload_weights"})] * (level == 2)
            steps += [("POST", "/wake_up?tags=kv_cache", None)]
            for method, path, body in steps:
                status, _ = await self._ask(
                    method, path, data=orjson.dumps(body) if body else None, timeout=aiohttp.ClientTimeout(_TRY_S)
                )
                if status != 200:
                    found.append(f"{level}: {path} answered {status}")
                    break
            else:
                same = await self._answer() == before
                found.append(f"{level}: {'the same answer afterwards' if same else 'ANOTHER ANSWER afterwards'}")
        facts["sleep levels"] = "; ".join(found)

    async def _answer(self) -> str | None:
        _, models = await self._json("GET", "/v1/models")
        name = next((entry.get("id") for entry in _entries(models)), None)
        request = {"model": name, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0, "seed": 0}
        _, said = await self._json("POST", "/v1/completions", data=orjson.dumps(request))
        try:
            return str(said["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            return None

    async def _json(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        status, body = await self._ask(method, path, **options)
        try:
            return status, orjson.loads(body)
        except orjson.JSONDecodeError:
            return status, None

    async def _ask(self, method: str, path: str, **options: Any) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} if options.get("data") is not None else {}
        try:
            async with self._session.request(
                method, self._url + path, headers=headers, allow_redirects=False, **options
            ) as response:
                return response.status, await whole(response)
        except aiohttp.ClientConnectorError as error:
            raise HostError(f"{self._url}: {error}") from error
        except aiohttp.InvalidURL as error:
            raise HostError(f"{self._url} is no URL of an engine") from error
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:  # noqa: UP041 - on Python 3.11 they are one
            return 0, (str(error) or type(error).__name__).encode()


async def whole(response: aiohttp.ClientResponse) -> bytes:
    """The body; raises aiohttp.ClientPayloadError for one that has no end. (`read(n)` is content with less.)"""
    pieces, size = list[bytes](), 0
    async for piece in response.content.iter_chunked(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > _MOST_BYTES:
            raise aiohttp.ClientPayloadError(f"more than {_MOST_BYTES >> 20} MiB")
    return b"".join(pieces)


_FLAGS: Final[tuple[tuple[str, str], ...]] = (("/is_sleeping", "is_sleeping"), ("/is_paused", "is_paused"))


def _entries(models: Any) -> list[Mapping[str, Any]]:
    data = models.get("data") if isinstance(models, dict) else None
    return [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []


def _models(models: Any) -> str:
    said = []
    for entry in _entries(models):
        length = entry.get("max_model_len")
        said.append(f"{entry.get('id')}" + (f" ({length} tokens)" if isinstance(length, int) else ""))
    return ", ".join(said) or NO
