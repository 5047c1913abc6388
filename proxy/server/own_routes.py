"""What applications and load balancers ask of a server and what is answered here, so that no engine is woken for it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import orjson

import proxy
from proxy.errors import RETRY, MethodNotAllowedError, ModelNotFoundError
from proxy.server.http_answer import JSON
from proxy.server.safe_logging import UNKNOWN_PATH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from proxy.fleet.fleet import Fleet
    from proxy.pool.pool import Pool
    from proxy.server.auth.caller import Caller
    from proxy.server.http_request import RequestHead

    Answer = tuple[int, Mapping[str, str], bytes]
    """Status, header fields, body."""

_MODEL: Final = "/v1/models/"
_LOOKS: Final = ("GET", "HEAD")
_TO_PAGE: Final = {"Location": "admin/", "Cache-Control": "no-store", "Vary": "Accept"}
_ADMIN: Final = re.compile(r"/(?:admin|metrics)(?=/|$)")


class OwnRoutes:
    """`/v1/models`, `/version`, `/ping`, `/health` and `/ready`; and `/`, from where a browser is led to the page."""

    def __init__(self, pool: Pool, fleet: Fleet | None = None) -> None:
        self._pool = pool
        self._fleet = fleet
        self._created = int(time.time())
        self._routes: dict[str, Callable[[Caller | None], Answer]] = {
            "/v1/models": self._models,
            "/version": lambda _: _json({"version": proxy.__version__}),  # engines may be of several, and asleep
            "/ping": self._ping,
            "/health": lambda _: _json({"status": "ok"}),  # as long as the event loop turns
            "/ready": self._ready,
        }

    def answer(self, head: RequestHead, caller: Caller | None) -> Answer | None:
        """The answer, or None where it is another's route.

        Raises MethodNotAllowedError or ModelNotFoundError.
        """
        path = head.path
        if self.leads_to_page(head):
            return 302, _TO_PAGE, b""
        route = self._routes.get(path)
        is_model = route is None and path.startswith(_MODEL) and len(path) > len(_MODEL)
        if route is None and not is_model:
            return None
        if head.method not in _LOOKS and not (path == "/ping" and head.method == "POST"):
            raise MethodNotAllowedError(path, [*_LOOKS, *(["POST"] if path == "/ping" else [])])
        return route(caller) if route is not None else self._model_named(unquote(path.removeprefix(_MODEL)), caller)

    def leads_to_page(self, head: RequestHead) -> bool:
        """Whether a browser asks for `/`, and the status page is on this port. To programs `/` is no route."""
        return (
            head.path == "/"
            and head.method in _LOOKS
            and "text/html" in head.headers.get("Accept", "")
            and self._pool.settings.server.admin.is_on_port
        )

    def path_for_log(self, path: str) -> str:
        """A path without what a client chooses in it."""
        if path in self._routes or path == "/":
            return path
        if path.startswith(_MODEL):
            return _MODEL + "{id}"
        found = _ADMIN.match(path)
        return found[0] if found is not None else UNKNOWN_PATH

    def _models(self, caller: Caller | None) -> Answer:
        """Every name that the client may use."""
        settings = self._pool.settings
        models = {key: self._pool.listed(key) for key in settings.models if caller is None or caller.may_use(key)}
        names = settings.names()
        data = [self._model(n, key, models[key]) for n, key in names.items() if key in models]
        if self._fleet is not None:
            elsewhere = sorted({*self._fleet.models()} - names.keys())
            there = [(n, self._fleet.name_of(n) or n) for n in elsewhere]
            data += [self._model_elsewhere(n) for n, served in there if caller is None or caller.may_use(served)]
        return _json({"object": "list", "data": data})

    def _model_named(self, name: str, caller: Caller | None) -> Answer:
        """One of them."""
        if self._fleet is not None and name not in self._pool.settings.names():
            served = self._fleet.name_of(name)
            if served is not None and (caller is None or caller.may_use(served)):
                return _json(self._model_elsewhere(name))
        key = self._pool.settings.key_of(name)
        if caller is not None and not caller.may_use(key):
            raise ModelNotFoundError(name)
        return _json(self._model(name, key, self._pool.listed(key)))

    def _model(self, name: str, key: str, state: dict[str, Any]) -> dict[str, Any]:
        settings = self._pool.settings
        served = settings.served_name(key)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "warmpool",
            "root": served,
            "parent": served if name in settings.models[key].adapters else None,
            **state,
        }

    def _model_elsewhere(self, name: str) -> dict[str, Any]:
        """One that other hosts have."""
        served = (self._fleet.name_of(name) if self._fleet is not None else None) or name
        said = {"id": name, "object": "model", "created": self._created, "owned_by": "warmpool", "root": served}
        return {**said, "parent": None, **(self._fleet.listed(served) if self._fleet is not None else {})}

    def _ping(self, _: Caller | None) -> Answer:
        """200 when requests are admitted, as SageMaker asks for it; engines are woken by requests, not by questions."""
        return (200, {}, b"") if self._pool.ready else (503, RETRY, b"")

    def _ready(self, _: Caller | None) -> Answer:
        """200 when requests are admitted, 503 while starting and draining."""
        ready = self._pool.ready
        status, headers, body = _json({"ready": ready})
        return (status, headers, body) if ready else (503, {**headers, **RETRY}, body)


def _json(value: object) -> Answer:
    return 200, JSON, orjson.dumps(value)
