"""Which model a request is for, and what its engine gets to see of it.

A body goes on as the same bytes unless something has to change: an alias becomes the name that the engine knows, a
missing model is filled in, `models.NAME.parameters` apply. What was checked here is what the engine reads: where a body
could be read in two ways, it is written anew from what was checked (JSON) or refused (forms).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import orjson

from proxy.errors import InvalidRequestError, RouteNotFoundError
from proxy.web.form import Form
from proxy.web.routes import ModelIn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from proxy.config import ParameterSettings, Settings
    from proxy.web.routes import Match

_SPELLED: Final = re.compile(rb"\\u00(?:3[0-9]|[4-7][0-9a-fA-F])")
"""A letter, digit or underscore written as an escape: nobody does without a reason."""


@dataclass(slots=True)
class Address:
    """Where a request goes, and with what."""

    model: str
    """The model's key."""
    target: str
    """Path and query."""
    body: bytes
    streams: bool = False
    """The client asked for server-sent events."""
    instance: str | None = None
    """The instance that should answer, if it can: it has what the request refers to."""


class Addressing:
    """Finds the model of a request.

    `settings` returns the configuration in force; `made_by` the model and the instance that made a response, by its id.
    """

    def __init__(
        self, settings: Callable[[], Settings], made_by: Callable[[str], tuple[str, str] | None] | None = None
    ) -> None:
        self._settings = settings
        self._made_by = made_by or (lambda _: None)
        self._resolved_of: Settings | None = None
        self._resolved: dict[tuple[str | None, str], tuple[str, str, ParameterSettings | None]] = {}
        """(name, group of routes) → what `_resolve` found, as long as the configuration is `_resolved_of`."""

    def find(self, match: Match, content_type: str, body: bytes) -> Address:
        """The address of a request whose route was found.

        Raises InvalidRequestError, ModelNotFoundError, or RouteNotFoundError where the model does not offer the route.
        """
        match match.route.model_in:
            case ModelIn.JSON:
                return self.find_json(match, body)
            case ModelIn.FORM:
                return self._form(match, content_type, body)
            case ModelIn.QUERY:
                return self._query(match, body)
            case ModelIn.RESPONSE:
                return self._response(match, body)

    def find_json(self, match: Match, body: bytes) -> Address:
        """The address of a request whose route has its model in JSON. Raises as `find` does."""
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"The body is not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise InvalidRequestError("The body must be a JSON object.")
        name = fields.get("model")
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidRequestError("`model` must be a string that is not empty.", param="model")
        key, engine_name, parameters = self._resolve(match, name)
        wanted = fields if name == engine_name else {**fields, "model": engine_name}
        route = match.route
        if parameters is not None and route.generates:
            wanted = _shaped(wanted, parameters)
            if wanted is not fields or _ambiguous(body, ["model", *parameters.names()]):
                body = orjson.dumps(wanted)
        elif wanted is not fields or (
            # Nearly always neither is the case, and there is no doubt.
            (b"\\" in body or body.count(b'"model"') > 1) and _ambiguous(body, ["model"])
        ):
            body = orjson.dumps(wanted)
        instance = None
        if route.group == "responses" and isinstance(earlier := fields.get("previous_response_id"), str):
            instance = self._instance(earlier, key)
        return Address(key, match.target, body, route.streams and fields.get("stream") is True, instance)

    def _form(self, match: Match, content_type: str, body: bytes) -> Address:
        form = Form(content_type, body)
        name = form.text("model")
        if name == "":
            raise InvalidRequestError("`model` must not be empty.", param="model")
        key, engine_name, _ = self._resolve(match, name)
        if name != engine_name:
            body = form.with_text("model", engine_name)
        streams = (form.text("stream") or "").lower() in {"true", "1", "on", "yes", "y", "t"}
        return Address(key, match.target, body, streams=match.route.streams and streams)

    def _query(self, match: Match, body: bytes) -> Address:
        key, _, _ = self._resolve(match, _model_of_query(match.target))
        return Address(key, match.target, body)

    def _response(self, match: Match, body: bytes) -> Address:
        made_by = self._made_by(match.id or "")
        key, _, _ = self._resolve(
            match,
            made_by[0] if made_by is not None else _model_of_query(match.target),
            missing=f"The response {match.id!r} is not known here. Say which model made it: ?model=NAME.",
        )
        return Address(key, match.target, body, instance=made_by[1] if made_by is not None else None)

    def _instance(self, response_id: str, key: str) -> str | None:
        made_by = self._made_by(response_id)
        return made_by[1] if made_by is not None and self._settings().names().get(made_by[0]) == key else None

    def _resolve(self, match: Match, name: str | None, missing: str = "") -> tuple[str, str, ParameterSettings | None]:
        """Key, the name that the engine knows, and what is to be done to parameters, of the model called `name`."""
        settings = self._settings()
        if settings is not self._resolved_of:
            self._resolved_of, self._resolved = settings, {}
        asked = name, match.route.group
        if (found := self._resolved.get(asked)) is not None:
            return found
        if name is None:
            name = settings.server.default_model
        if name is None:
            raise InvalidRequestError(
                missing or f"The request must name a model: {match.route.model_in.value}.", param="model"
            )
        key = settings.key_of(name)
        model = settings.models[key]
        if not getattr(model.routes, match.route.group):
            raise RouteNotFoundError(
                f"The model {name!r} does not offer {match.route.method} {match.route.path} here.", param="model"
            )
        engine_name = name if name in model.adapters else settings.served_name(key)
        found = key, engine_name, model.parameters if model.parameters.present else None
        self._resolved[asked] = found  # not what anybody may call it: what the configuration has
        return found


def _model_of_query(target: str) -> str | None:
    names = [value for name, value in parse_qsl(target.partition("?")[2], keep_blank_values=True) if name == "model"]
    if len(names) > 1:
        raise InvalidRequestError("The query names more than one model.", param="model")
    if names == [""]:
        raise InvalidRequestError("`model` must not be empty.", param="model")
    return names[0] if names else None


def _shaped(fields: dict[str, Any], parameters: ParameterSettings) -> dict[str, Any]:
    """The fields with defaults, caps and removals applied; the same object when there is nothing to do."""
    changes: dict[str, Any] = {name: value for name, value in parameters.defaults.items() if fields.get(name) is None}
    for name, cap in parameters.caps.items():
        value = changes.get(name, fields.get(name))
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequestError(f"`{name}` must be a number.", param=name)
        if value > cap:
            changes[name] = cap
    removed = [name for name in parameters.remove if name in fields]
    if not changes and not removed:
        return fields
    return {name: value for name, value in {**fields, **changes}.items() if name not in removed}


def _ambiguous(body: bytes, names: Iterable[str]) -> bool:
    """Whether one of the names may occur more than once in the object: parsers differ in which of them counts."""
    if all(body.count(b'"%s"' % name.encode()) < 2 for name in names) and not _spelled(body):
        return False
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        found[:] = [name for name, _ in pairs]  # the outermost object comes last

    try:
        json.loads(body, object_pairs_hook=note)
    except (ValueError, RecursionError):
        return True
    return any(found.count(name) > 1 for name in names)


def _spelled(body: bytes) -> bool:
    # The first is many times faster than the second, and enough for a body that is one large picture.
    return b"\\" in body and b"\\u00" in body and _SPELLED.search(body) is not None
