"""Which requests may reach an engine: one table, and the only place where a path for an engine comes from.

The routes are those that vLLM offers to applications (vllm/entrypoints: openai, anthropic, cohere, pooling, generate,
speech_to_text, scale_out/render, serve/tokenize, serve/lora, serve/sagemaker). What is not in the table is refused
before anything else looks at it. A path counts in its exact spelling, and what is sent on is the table's own, never the
client's: no percent-encoding, dot segment, double slash or absolute URL can become another route on the way.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from proxy.config.extra_routes import covers
from proxy.errors import InvalidRequestError, MethodNotAllowedError, RouteNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiohttp.web import AbstractResource

    from proxy.config.extra_routes import Offered

    ExtraRoutes = Mapping[tuple[str, str], Offered]


class ModelIn(enum.Enum):
    """Where a request names its model."""

    JSON = "the field `model` of its JSON body"
    FORM = "the field `model` of its multipart form"
    QUERY = "`?model=`"
    RESPONSE = "the id in its path, or `?model=`"
    NOTHING = "nothing of it"


@dataclass(frozen=True, slots=True)
class Route:
    """One route of an engine that clients may use."""

    group: str
    """The key of `models.NAME.routes` that switches it."""
    method: str
    path: str
    """As the engine knows it; one segment may be `{id}`."""
    model_in: ModelIn
    streams: bool = False
    """Answers with server-sent events when the request has `stream`."""
    generates: bool = False
    """`models.NAME.parameters` apply to its body."""
    websocket: bool = False
    unnamed: bool = False
    """vLLM's own form of it names no model: where one is configured, it is meant."""
    stands_for: tuple[str, ...] = ()
    """The groups of what it can be asked for instead: a model offers it where it offers all of them."""
    offered_by: tuple[str, ...] | None = None
    """Of a route of the configuration's (`models.NAME.extra_routes`): the keys of the models that have it."""


def _table() -> Iterator[Route]:
    def post(group: str, *paths: str, streams: bool = False, generates: bool = False) -> Iterator[Route]:
        for path in paths:
            yield Route(group, "POST", path, ModelIn.JSON, streams, generates)

    def unnamed(group: str, method: str, path: str, model_in: ModelIn, **more: Any) -> Route:
        return Route(group, method, path, model_in, unnamed=True, **more)

    yield from post("chat", "/v1/chat/completions", streams=True, generates=True)
    yield from post("chat", "/v1/chat/completions/batch", "/v1/chat/completions/render", generates=True)
    yield from post("completions", "/v1/completions", streams=True, generates=True)
    yield from post("completions", "/v1/completions/render", generates=True)
    yield from post("responses", "/v1/responses", streams=True, generates=True)
    yield from post("responses", "/v1/responses/render", generates=True)
    yield unnamed("responses", "GET", "/v1/responses/{id}", ModelIn.RESPONSE)
    yield unnamed("responses", "POST", "/v1/responses/{id}/cancel", ModelIn.RESPONSE)
    yield from post("messages", "/v1/messages", streams=True, generates=True)
    yield from post("messages", "/v1/messages/count_tokens")
    yield from post("messages", "/v1/messages/render", generates=True)
    yield Route("audio", "POST", "/v1/audio/transcriptions", ModelIn.FORM, streams=True)
    yield Route("audio", "POST", "/v1/audio/translations", ModelIn.FORM, streams=True)
    yield unnamed("realtime", "GET", "/v1/realtime", ModelIn.QUERY, websocket=True)
    yield from post("embeddings", "/v1/embeddings", "/v2/embed")
    yield from post("rerank", "/rerank", "/v1/rerank", "/v2/rerank")
    yield from post("score", "/score", "/v1/score", "/generative_scoring")
    yield from post("classify", "/classify")
    yield from post("pooling", "/pooling")
    yield from post("tokenize", "/tokenize", "/detokenize")
    yield unnamed("tokenize", "GET", "/tokenizer_info", ModelIn.QUERY)
    yield from post("systemone", "/v1/systemone")
    yield unnamed(
        "invocations",
        "POST",
        "/invocations",
        ModelIn.JSON,
        streams=True,
        generates=True,
        stands_for=("chat", "completions", "embeddings", "rerank", "score", "classify", "pooling"),
    )
    yield unnamed("lora", "POST", "/v1/load_lora_adapter", ModelIn.QUERY)
    yield unnamed("lora", "POST", "/v1/unload_lora_adapter", ModelIn.QUERY)


ROUTES: Final = tuple(_table())
"""Everything that is forwarded. Not here, and so refused: an engine's management (`/sleep`, `/wake_up`,
`/collective_rpc`, `/pause`, `/resume`, `/update_weights`, `/reset_*`, `/server_info`, the profiler,
`/scale_elastic_ep`), its `/metrics` and `/load`; `proxy.cli.route_comparison` names them and says why."""

_ID: Final = r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}"
_DEPLOYMENT: Final = re.compile(
    r"/openai/deployments/([^/]{1,600})/(chat/completions|completions|embeddings|audio/transcriptions|audio/translations)"
)
"""Azure OpenAI's paths (learn.microsoft.com, azure/ai-services/openai/reference)."""
_QUERY: Final = re.compile(r"[!-~]*")


def pattern(route: Route) -> str:
    """The path as aiohttp's router takes it."""
    return route.path.replace("{id}", f"{{id:{_ID}}}")


_EXACT: Final = {(r.method, r.path): r for r in ROUTES if "{id}" not in r.path}
_WITH_ID: Final = [
    (r.method, re.compile(re.escape(r.path).replace(r"\{id\}", f"({_ID})")), r) for r in ROUTES if "{id}" in r.path
]


_MODEL_IN: Final = {
    "json": ModelIn.JSON, "form": ModelIn.FORM, "query": ModelIn.QUERY, "nothing": ModelIn.NOTHING,
}  # fmt: skip
_NAMES: Final = frozenset({"id", "model"})
"""The parts of warmpool's own paths that clients name, and so may have to percent-encode."""


def speaks_anthropic(path: str) -> bool:
    """Whether the clients of a path expect errors in Anthropic's envelope."""
    return path.startswith("/v1/messages") and path in ("/v1/messages", "/v1/messages/count_tokens")


def spelled_as(resource: AbstractResource | None, target: str) -> bool:
    """Whether a request's target, as it came, has the path of the resource that was found letter by letter."""
    if resource is None:
        return True
    path = target.partition("?")[0]
    return path == resource.canonical or _spelling(resource.canonical).fullmatch(path) is not None


@functools.cache
def _spelling(canonical: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", canonical)
    return re.compile(
        "".join(
            re.escape(part) if not n % 2 else "[^#]+" if part in _NAMES else r"[^/%#]+" for n, part in enumerate(parts)
        )
    )


def _extra(method: str, path: str, extra: ExtraRoutes) -> Route | None:
    found = extra.get((method, path))
    if found is None or found.route.path.endswith("*"):
        found = next((each for (verb, star), each in extra.items() if verb == method and covers(star, path)), None)
    if found is None:
        return None
    route = found.route
    return Route(
        f"{method} {route.path}", method, route.path, _MODEL_IN[route.model_in], streams=route.streams,
        unnamed=True, offered_by=found.keys,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Match:
    """A route that was asked for."""

    route: Route
    target: str
    """Path and query to ask the engine for."""
    id: str | None = None
    deployment: str | None = None
    """The model's name, where the path has it: whatever the body says."""


def find(method: str, path: str, query: str = "", *, azure: bool = False, extra: ExtraRoutes | None = None) -> Match:
    """The route that `method`, the path as the client spelled it and the raw query name; `azure`: by its paths too.

    `extra`: those of the configuration.

    Raises RouteNotFoundError, MethodNotAllowedError, or InvalidRequestError for a query with odd characters.
    """
    if not _QUERY.fullmatch(query) or "#" in query:
        raise InvalidRequestError("The query has characters that must be percent-encoded.")
    if azure and (found := _DEPLOYMENT.fullmatch(path)) is not None:
        known = _EXACT.get(("POST", f"/v1/{found[2]}"))
        if known is not None and method != "POST":
            raise MethodNotAllowedError(path, ["POST"])
        if known is not None:
            return Match(known, known.path, deployment=unquote(found[1]))  # api-version is Azure's own
    route, id_ = _EXACT.get((method, path)), None
    if route is None:
        route, id_ = next(
            ((r, m[1]) for verb, regex, r in _WITH_ID if verb == method and (m := regex.fullmatch(path))), (None, None)
        )
    if route is None and extra:
        route = _extra(method, path, extra)
    if route is None:
        allowed = sorted(
            {r.method for r in ROUTES if r.path == path}
            | {v for v, regex, _ in _WITH_ID if regex.fullmatch(path)}
            | {verb for verb, each in extra or () if covers(each, path) or (path == each and "*" not in each)}
        )
        if allowed:
            raise MethodNotAllowedError(path, allowed)
        raise RouteNotFoundError(f"There is no route {method} {path}.")
    return Match(route, f"{path}?{query}" if query else path, id_)
