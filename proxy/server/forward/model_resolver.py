"""Which model a request is for, and what its engine gets to see of it.

A body goes on as the same bytes unless something has to change: an alias becomes the name that the engine knows, a
missing model is filled in, `models.NAME.parameters` apply, and only their bytes differ then. What was checked here is
what the engine reads: where a body could be read in two ways, both are made to say what was checked (JSON), or it is
refused (forms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import parse_qsl

from proxy.errors import InvalidRequestError, ModelNotFoundError, ResponseNotFoundError, RouteNotFoundError
from proxy.server.auth.prompt_tokens import Tokens
from proxy.server.forward.json_edit import names_one_model, parsed, shaped
from proxy.server.forward.multipart import Form
from proxy.server.forward.routes import ModelIn
from proxy.server.forward.scanner import LARGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy.config.model import ModelSettings, ParameterSettings
    from proxy.config.settings import Settings
    from proxy.server.forward.routes import Match, Route
    from proxy.server.forward.scanner import Scanner

    _Found: TypeAlias = tuple[str, str, ParameterSettings | None, ModelSettings | None]

_JSON: Final = ModelIn.JSON
"""For nearly every request: Python 3.11 takes longer for a member of an enumeration than for a call."""


@dataclass(slots=True)
class Address:
    """Where a request goes, and with what."""

    model: str
    """The model's key."""
    target: str
    """Path and query."""
    body: bytes
    settings: ModelSettings | None
    """The model's; None where only other hosts have it, and its name is its key here."""
    streams: bool = False
    """The client asked for server-sent events."""
    instance: str | None = None
    """The instance that should answer, if it can: it has what the request refers to."""
    near: bytes | None = None
    """What it has in common with others, where its model may have several instances."""
    asked: object = None
    """What is asked, as JSON has it; of a form its recording only. For who counts it, and let go of then."""

    @property
    def elsewhere(self) -> bool:
        """Only other hosts have the model."""
        return self.settings is None


class Addressing:
    """Finds the model of a request.

    `settings` returns the configuration in force; `made_by` the model and the instance that made a response, by its id;
    `scanner` reads large bodies. `elsewhere`: the name of the model that another host calls so.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        made_by: Callable[[str], tuple[str, str] | None] | None = None,
        scanner: Scanner | None = None,
        elsewhere: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self._elsewhere = elsewhere
        self._scanner = scanner
        self._settings = settings
        self._made_by = made_by or (lambda _: None)
        self._resolved_of: Settings | None = None
        self._resolved: dict[tuple[str, str], _Found] = {}
        """(name, group of routes) → what `_resolve` found, as long as the configuration is `_resolved_of`."""

    def find(self, match: Match, content_type: str, body: bytes) -> Address:
        """The address of a request whose route was found.

        Raises InvalidRequestError, ModelNotFoundError, or RouteNotFoundError where the model does not offer the route.
        """
        if match.route.model_in is not _JSON:
            return self._find_elsewhere(match, content_type, body)
        fields = parsed(body)
        name = fields.get("model")
        key, engine_name, parameters, settings = self._resolve(match, name)
        renamed = name != engine_name and not _stays_unnamed(match, name)
        if renamed or parameters is not None or not names_one_model(body):
            changes, removed, checked = _changes(match, fields, name, engine_name, parameters)
            body = shaped(body, changes, removed, checked, named=isinstance(name, str))
        streams = match.route.streams and fields.get("stream") is True
        instance = self._instance(key, fields) if match.route.group == "responses" else None
        return Address(key, match.target, body, settings, streams, instance, None, fields)

    def _find_elsewhere(self, match: Match, content_type: str, body: bytes) -> Address:
        where = match.route.model_in
        if where is ModelIn.FORM:
            return self._form(match, content_type, body)
        return self._query(match, body) if where is ModelIn.QUERY else self._response(match, body)

    async def found(self, match: Match, content_type: str, body: bytes) -> Address:
        """The same for a body of any size; others are served meanwhile. Raises NoCapacityError too."""
        if len(body) > LARGE and self._scanner is not None:
            if match.route.model_in is ModelIn.JSON:
                return await self._large_json(self._scanner, match, body)
            if match.route.model_in is ModelIn.FORM:
                return await self._large_form(self._scanner, match, content_type, body)
        return self.find(match, content_type, body)

    async def _large_json(self, scanner: Scanner, match: Match, body: bytes) -> Address:
        names = self._parameters()
        found = await scanner.facts(
            "read_json", body, names=["model", "stream", "previous_response_id", *names], unified=["model", *names]
        )
        fields: dict[str, Any] = found["fields"]
        name = fields.get("model")
        key, engine_name, parameters, settings = self._resolve(match, name)
        changes, removed, checked = _changes(match, fields, name, engine_name, parameters)
        if changes or removed or found["repeated"]:
            body = await scanner.changed(
                "edit_json", body, values=changes, removed=removed, unified=checked, named=isinstance(name, str)
            )
        streams = match.route.streams and fields.get("stream") is True
        instance = self._instance(key, fields) if match.route.group == "responses" else None
        return Address(key, match.target, body, settings, streams, instance, asked=Tokens(found["tokens"]))

    async def _large_form(self, scanner: Scanner, match: Match, content_type: str, body: bytes) -> Address:
        fields: dict[str, str] = (await scanner.facts("read_form", body, content_type=content_type))["fields"]
        key, engine_name, settings = self._form_plan(match, fields.get("model"))
        if fields.get("model") != engine_name and not _stays_unnamed(match, fields.get("model")):
            body = await scanner.changed("edit_form", body, content_type=content_type, name="model", value=engine_name)
        return _form_address(match, key, body, settings, fields.get("stream"))

    def _parameters(self) -> list[str]:
        """The names of all parameters that some model shapes."""
        return sorted({name for model in self._settings().models.values() for name in model.parameters.names()})

    def _form(self, match: Match, content_type: str, body: bytes) -> Address:
        form = Form(content_type, body)
        name = form.text("model")
        key, engine_name, settings = self._form_plan(match, name)
        if name != engine_name and not _stays_unnamed(match, name):
            body = form.with_text("model", engine_name)
        return _form_address(match, key, body, settings, form.text("stream"))

    def _form_plan(self, match: Match, name: str | None) -> tuple[str, str, ModelSettings | None]:
        if name == "" and match.deployment is None:
            raise InvalidRequestError("`model` must not be empty.", param="model")
        key, engine_name, _, settings = self._resolve(match, name)
        return key, engine_name, settings

    def _query(self, match: Match, body: bytes) -> Address:
        key, _, _, settings = self._resolve(match, _model_of_query(match.target))
        return Address(key, match.target, body, settings)

    def _response(self, match: Match, body: bytes) -> Address:
        made_by = self._made_by(match.id or "")
        name = made_by[0] if made_by is not None else _model_of_query(match.target)
        if name is None and self._only(match) is None:
            raise ResponseNotFoundError(match.id or "")
        key, _, _, settings = self._resolve(match, name)
        return Address(key, match.target, body, settings, instance=made_by[1] if made_by is not None else None)

    def _instance(self, key: str, fields: dict[str, Any]) -> str | None:
        """The one that made the response which a request refers to."""
        earlier = fields.get("previous_response_id")
        made_by = self._made_by(earlier) if isinstance(earlier, str) else None
        return made_by[1] if made_by is not None and self._settings().names().get(made_by[0]) == key else None

    def _only(self, match: Match) -> str | None:
        """The model that a request means which names none."""
        settings = self._settings()
        if match.route.offered_by is not None and len(offering := _offering(settings, match.route)) == 1:
            return settings.served_name(offering[0])
        if settings.server.default_model is None and match.route.unnamed and len(settings.models) == 1:
            return settings.served_name(next(iter(settings.models)))
        return settings.server.default_model

    def _resolve(self, match: Match, name: object) -> _Found:
        """What there is of the model that a request names, in its path or as `name`.

        Key, the name that the engine knows, what is to be done to parameters, the model's settings.
        """
        settings = self._settings()
        if settings is not self._resolved_of:
            self._resolved_of, self._resolved = settings, {}
        name = match.deployment or name
        if type(name) is str and (found := self._resolved.get((name, match.route.group))) is not None:
            return found
        return self._learn(match, name, settings)

    def _learn(self, match: Match, name: object, settings: Settings) -> _Found:
        if name is not None and (not isinstance(name, str) or not name):
            raise InvalidRequestError("`model` must be a string that is not empty.", param="model")
        if match.route.offered_by is not None and not _offering(settings, match.route):
            # Heads are remembered: the configuration may have changed since its route was found.
            raise RouteNotFoundError(f"There is no route {match.route.method} {match.target.partition('?')[0]}.")
        name = self._only(match) if name is None else name
        if name is None:
            raise InvalidRequestError(f"The request must name a model: {match.route.model_in.value}.", param="model")
        try:
            key = settings.key_of(name)
        except ModelNotFoundError:
            served = self._elsewhere(name)
            if served is None:
                raise
            return served, name, None, None  # what is to be done to parameters is known there
        model = settings.models[key]
        if not _offers(settings, key, match.route):
            raise RouteNotFoundError(
                f"The model {name!r} does not offer {match.route.method} {match.route.path} here.", param="model"
            )
        engine_name = name if name in model.adapters else settings.served_name(key)
        found = key, engine_name, model.parameters if model.parameters.present else None, model
        self._resolved[name, match.route.group] = found  # not what anybody may call it: what the configuration has
        return found


def _stays_unnamed(match: Match, name: object) -> bool:
    """Whether the engine gets a request without a model as it came: routes of the configuration may know no model."""
    return name is None and match.route.offered_by is not None and match.deployment is None


def _offering(settings: Settings, route: Route) -> tuple[str, ...]:
    """The models that have a route of the configuration's now."""
    found = settings.extra_routes.get((route.method, route.path))
    return found.keys if found is not None else ()


def _offers(settings: Settings, key: str, route: Route) -> bool:
    if route.offered_by is not None:
        return key in _offering(settings, route)
    model = settings.models[key]
    return all(getattr(model.routes, group) for group in (route.group, *route.stands_for))


def _changes(
    match: Match, fields: dict[str, Any], name: object, engine_name: str, parameters: ParameterSettings | None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """What an engine gets to see of a body otherwise than it came; for `shaped`: values, removed, unified."""
    changes: dict[str, Any] = {} if name == engine_name or _stays_unnamed(match, name) else {"model": engine_name}
    removed, checked = list[str](), ["model"]
    if parameters is not None and match.route.generates:
        limited, removed = _limited(fields, parameters)
        changes |= limited
        checked += parameters.names()
    return changes, removed, checked


def _form_address(match: Match, key: str, body: bytes, settings: ModelSettings | None, stream: str | None) -> Address:
    streams = (stream or "").lower() in {"true", "1", "on", "yes", "y", "t"}
    return Address(key, match.target, body, settings, match.route.streams and streams, asked={"type": "audio"})


def _model_of_query(target: str) -> str | None:
    names = [value for name, value in parse_qsl(target.partition("?")[2], keep_blank_values=True) if name == "model"]
    if len(names) > 1:
        raise InvalidRequestError("The query names more than one model.", param="model")
    if names == [""]:
        raise InvalidRequestError("`model` must not be empty.", param="model")
    return names[0] if names else None


def _limited(fields: dict[str, Any], parameters: ParameterSettings) -> tuple[dict[str, Any], list[str]]:
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
