"""Which model a request is for, and what its engine gets to see of it.

A body goes on as the same bytes unless something has to change: an alias becomes the name that the engine knows, a
missing model is filled in, `models.NAME.parameters` apply, and only their bytes differ then. What was checked here is
what the engine reads: where a body could be read in two ways, both are made to say what was checked (JSON), or it is
refused (forms).
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import orjson

from proxy.errors import InvalidRequestError, ResponseNotFoundError, RouteNotFoundError
from proxy.server.forward.json_edit import edited, may_repeat, replaced
from proxy.server.forward.multipart import Form
from proxy.server.forward.routes import ModelIn

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.config.model import ParameterSettings
    from proxy.config.settings import Settings
    from proxy.server.forward.routes import Match


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
    asked: object = None
    """What is asked, as JSON has it; of a form its recording only. For who counts it, and let go of then."""


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
        marked = body.startswith(codecs.BOM_UTF8)  # vLLM's server reads over it, as `json.loads` of bytes does
        try:
            fields = orjson.loads(memoryview(body)[len(codecs.BOM_UTF8) :] if marked else body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"The body is not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise InvalidRequestError("The body must be a JSON object.")
        name = fields.get("model")
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidRequestError("`model` must be a string that is not empty.", param="model")
        key, engine_name, parameters = self._resolve(match, name)
        route = match.route
        changes: dict[str, Any] = {} if name == engine_name else {"model": engine_name}
        removed, checked = list[str](), ["model"]
        if parameters is not None and route.generates:
            shaped, removed = _shaped(fields, parameters)
            changes |= shaped
            checked += parameters.names()
        repeated = may_repeat(body, checked)
        if name and changes.keys() == {"model"} and not removed and not repeated:
            body = replaced(body, "model", engine_name)
        elif changes or removed or repeated:
            text = body.removeprefix(codecs.BOM_UTF8)
            body = body[: len(body) - len(text)] + edited(text, changes, removed, checked)
        instance = None
        if route.group == "responses" and isinstance(earlier := fields.get("previous_response_id"), str):
            instance = self._instance(earlier, key)
        return Address(key, match.target, body, route.streams and fields.get("stream") is True, instance, fields)

    def _form(self, match: Match, content_type: str, body: bytes) -> Address:
        form = Form(content_type, body)
        name = form.text("model")
        if name == "":
            raise InvalidRequestError("`model` must not be empty.", param="model")
        key, engine_name, _ = self._resolve(match, name)
        if name != engine_name:
            body = form.with_text("model", engine_name)
        streams = (form.text("stream") or "").lower() in {"true", "1", "on", "yes", "y", "t"}
        return Address(key, match.target, body, streams=match.route.streams and streams, asked={"type": "audio"})

    def _query(self, match: Match, body: bytes) -> Address:
        key, _, _ = self._resolve(match, _model_of_query(match.target))
        return Address(key, match.target, body)

    def _response(self, match: Match, body: bytes) -> Address:
        made_by = self._made_by(match.id or "")
        name = made_by[0] if made_by is not None else _model_of_query(match.target)
        if name is None and self._only(match) is None:
            raise ResponseNotFoundError(match.id or "")
        key, _, _ = self._resolve(match, name)
        return Address(key, match.target, body, instance=made_by[1] if made_by is not None else None)

    def _instance(self, response_id: str, key: str) -> str | None:
        made_by = self._made_by(response_id)
        return made_by[1] if made_by is not None and self._settings().names().get(made_by[0]) == key else None

    def _only(self, match: Match) -> str | None:
        """The model that a request means which names none."""
        settings = self._settings()
        if settings.server.default_model is None and match.route.unnamed and len(settings.models) == 1:
            return settings.served_name(next(iter(settings.models)))
        return settings.server.default_model

    def _resolve(self, match: Match, name: str | None) -> tuple[str, str, ParameterSettings | None]:
        """Key, the name that the engine knows, and what is to be done to parameters, of the model called `name`."""
        settings = self._settings()
        if settings is not self._resolved_of:
            self._resolved_of, self._resolved = settings, {}
        if name is None:
            name = self._only(match)
        asked = name, match.route.group
        if (found := self._resolved.get(asked)) is not None:
            return found
        if name is None:
            raise InvalidRequestError(f"The request must name a model: {match.route.model_in.value}.", param="model")
        key = settings.key_of(name)
        model = settings.models[key]
        if not all(getattr(model.routes, group) for group in (match.route.group, *match.route.stands_for)):
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


def _shaped(fields: dict[str, Any], parameters: ParameterSettings) -> tuple[dict[str, Any], list[str]]:
    """What defaults and caps change, and the names of what is removed."""
    changes: dict[str, Any] = {name: value for name, value in parameters.defaults.items() if fields.get(name) is None}
    for name, cap in parameters.caps.items():
        value = changes.get(name, fields.get(name))
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequestError(f"`{name}` must be a number.", param=name)
        if value > cap:
            changes[name] = cap
    return changes, [name for name in parameters.remove if name in fields]
