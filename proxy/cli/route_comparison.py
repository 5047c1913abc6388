"""The allow-list of routes beside what an engine says it serves (its `/openapi.json`)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import click
import orjson

from proxy.config.extra_routes import MANAGEMENT
from proxy.engine.probe import whole
from proxy.errors import HostError
from proxy.server.forward.routes import ROUTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TIMEOUT_S: Final = 10.0
_VERBS: Final = frozenset({"get", "post", "put", "patch", "delete"})

OWN: Final = frozenset(
    {("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"), ("GET", "/version"), ("GET", "/v1/models"),
     ("GET", "/metrics")}
)  # fmt: skip
"""What warmpool answers itself."""
REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (*MANAGEMENT["vLLM"], "/fault_tolerance/apply", "/fault_tolerance/status", "/adapters/{adapter_name}"),
        "the engine's management",
    ),
    **dict.fromkeys(
        ("/inference/v1/generate", "/inference/v1/abort_requests", "/v1/chat/completions/derender",
         "/v1/completions/derender", "/cohere/v2/chat/render"),
        "a half of an engine that is split over several servers",
    ),
    "/cohere/v2/chat": "an API of its own, with other errors than OpenAI's",
}  # fmt: skip
"""What is never forwarded, and why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Routes, each as (method, path)."""

    forwarded: tuple[tuple[str, str], ...]
    own: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    new: tuple[tuple[str, str], ...]
    """Not known here, and so refused."""
    lacking: tuple[tuple[str, str], ...]
    """On the allow-list, and not served by this engine: clients get its 404."""


def compare(described: Any) -> Comparison:
    """What an engine's OpenAPI document names, told apart. Raises ValueError where it is no such document."""
    served = {*_served(described)}
    listed = {(route.method, _plain(route.path)) for route in ROUTES if not route.websocket}
    known = {_plain(path) for path in REFUSED}
    refused = {(method, path) for method, path in served if path in known}
    return Comparison(
        forwarded=_sorted(served & listed),
        own=_sorted(served & OWN),
        refused=_sorted(refused),
        new=_sorted(served - listed - OWN - refused),
        lacking=_sorted(listed - served),
    )


def _served(described: Any) -> Iterator[tuple[str, str]]:
    paths = described.get("paths") if isinstance(described, dict) else None
    if not isinstance(paths, dict) or not all(isinstance(verbs, dict) for verbs in paths.values()):
        raise ValueError("no OpenAPI document: it has no object `paths`")
    for path, verbs in paths.items():
        for verb in verbs.keys() & _VERBS:
            yield verb.upper(), _plain(path)


def _plain(path: str) -> str:
    """The path with all its variable parts called alike."""
    return "/".join("{id}" if part.startswith("{") else part for part in path.split("/"))


def _sorted(routes: set[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(routes, key=lambda route: (route[1], route[0])))


async def _described_by(engine: str) -> Any:
    url = f"{engine.rstrip('/')}/openapi.json"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(_TIMEOUT_S)) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise HostError(f"{url} answers {response.status}; vLLM has it unless --disable-fastapi-docs is set")
            return orjson.loads(await whole(response))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise HostError(f"{url} cannot be read: {str(error) or type(error).__name__}") from error
    except ValueError as error:
        raise HostError(f"{url} is not JSON") from error


def show(engine: str | None) -> bool:
    """Print the list, or the comparison with an engine; whether that serves nothing new. Raises HostError."""
    if engine is None:
        for route in ROUTES:
            click.echo(f"{route.group:<12} {route.method:<5} {route.path}")
        return True
    try:
        found = compare(asyncio.run(_described_by(engine)))
    except ValueError as error:
        raise HostError(f"{engine}: {error}") from error
    reasons = {_plain(path): reason for path, reason in REFUSED.items()}
    for method, path in found.forwarded:
        click.echo(f"{'forwarded':<10} {method:<5} {path}")
    for method, path in found.own:
        click.echo(f"{'own':<10} {method:<5} {path}  (warmpool answers it)")
    for method, path in found.refused:
        click.echo(f"{'refused':<10} {method:<5} {path}  ({reasons[path]})")
    for method, path in found.lacking:
        click.echo(f"{'lacking':<10} {method:<5} {path}  (this engine does not serve it)")
    for method, path in found.new:
        click.echo(f"{'new':<10} {method:<5} {path}  (warmpool does not know it: refused)")
    click.echo(f"{len(found.new)} new" if found.new else "nothing new")
    return not found.new
