"""Routes of engines that are not on warmpool's own list, for clients: `models.NAME.extra_routes`.

What is refused here would give clients an engine's management, or hide a route of warmpool's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, Field

from proxy.config.fields import Section

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy.config.model import ModelSettings

_SEGMENT: Final = r"[A-Za-z0-9_][A-Za-z0-9_.~-]*"
_PATH: Final = re.compile(rf"(?:/{_SEGMENT})+(?:/\*)?")
_ANY: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.~-]{0,199}")
"""What stands for `*`: one segment of a path, which begins with no dot."""

OWN: Final = frozenset(
    {"/admin", "/metrics", "/health", "/ready", "/version", "/ping", "/v1/models", "/openai", "/fleet"}
)
"""What warmpool answers itself, and all below it."""
LISTED: Final = frozenset(
    {
        "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/completions",
        "/v1/completions/render", "/v1/responses", "/v1/responses/render", "/v1/responses/{id}",
        "/v1/responses/{id}/cancel", "/v1/messages", "/v1/messages/count_tokens", "/v1/messages/render",
        "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime", "/v1/embeddings", "/v2/embed",
        "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/generative_scoring", "/classify", "/pooling",
        "/tokenize", "/detokenize", "/tokenizer_info", "/v1/systemone", "/invocations", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)  # fmt: skip
"""What is on warmpool's own list (proxy/server/forward/routes.py), and switched by `routes`."""
MANAGEMENT: Final[Mapping[str, frozenset[str]]] = {
    "vLLM": frozenset(
        {
            "/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused", "/release_kv_cache_memory",
            "/collective_rpc", "/abort_requests", "/server_info", "/load", "/kv_event_sources", "/start_profile",
            "/stop_profile", "/get_world_size", "/weight_info", "/weight_checker", "/update_weights",
            "/update_weight_version", "/start_weight_update", "/start_draft_weight_update", "/finish_weight_update",
            "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/reset_prefix_cache",
            "/reset_mm_cache", "/reset_encoder_cache", "/scale_elastic_ep", "/is_scaling_elastic_ep",
            "/fault_tolerance", "/adapters", "/inference/v1",
        }
    ),
    "SGLang": frozenset(
        {
            "/release_memory_occupation", "/resume_memory_occupation", "/flush_cache", "/clear_hicache_storage_backend",
            "/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_distributed",
            "/init_weights_update_group", "/destroy_weights_update_group", "/get_weights_by_name", "/abort_request",
            "/pause_generation", "/continue_generation", "/set_internal_state", "/get_server_info", "/get_load",
            "/configure_logging", "/freeze_gc", "/slow_down", "/open_session", "/close_session", "/load_lora_adapter",
            "/unload_lora_adapter", "/start_expert_distribution_record", "/stop_expert_distribution_record",
            "/dump_expert_distribution_record", "/set_trace_level",
        }
    ),
    "llama.cpp": frozenset({"/slots", "/props", "/models", "/lora-adapters", "/tools", "/mcp", "/cors-proxy"}),
    "TensorRT-LLM": frozenset(
        {"/release_memory", "/resume_memory", "/kv_cache_events", "/perf_metrics", "/prometheus"}
    ),
    "Triton and others": frozenset(
        {"/v2/repository", "/shutdown", "/unload", "/debug", "/control", "/manage", "/management", "/docs", "/redoc",
         "/openapi.json", "/warmpool"}
    ),
}  # fmt: skip
"""Paths of engines that change or show more than an answer, and all below them."""


def _checked_path(path: str) -> str:
    if not _PATH.fullmatch(path) or len(path) > 200:
        raise ValueError(
            f"{path!r} is no path of segments of letters, digits, `_`, `-`, `.` and `~` that begin with no dot, the "
            "last of which may be `*`"
        )
    if path.count("/") < 2 and path.endswith("*"):
        raise ValueError("/* would be every route of the engine: name them")
    for name in OWN:
        if _meets(path, name):
            raise ValueError(f"{name} is warmpool's own")
    for listed in LISTED:
        if path == listed or covers(path, listed.replace("{id}", "x")):
            raise ValueError(f"{listed} is on warmpool's own list: models.NAME.routes switches it")
    for engine, names in MANAGEMENT.items():
        for name in names:
            if _meets(path, name):
                raise ValueError(f"{name} is management, as of {engine}: clients must not reach it")
    return path


def _meets(path: str, name: str) -> bool:
    """Whether one of the two is, or lies below, what the other one is."""
    path = path.lower()
    return path == name or path.startswith(f"{name}/") or covers(path, name)


def covers(path: str, other: str) -> bool:
    """Whether a path with a `*` stands for another one."""
    begin, star, _ = path.partition("*")
    return bool(star) and other.startswith(begin) and _ANY.fullmatch(other[len(begin) :]) is not None


class ExtraRouteSettings(Section):
    """A route of the engine that clients may use, beside those of `routes`."""

    path: Annotated[str, AfterValidator(_checked_path)] = Field(
        description="As the engine knows it; `*` as the last segment stands for any one.",
        examples=["/v1/audio/speech", "/v1/images/*"],
    )
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = Field(default="POST", description="How it is asked.")
    model_in: Literal["json", "form", "query", "nothing"] = Field(
        default="json",
        description="Where a request names its model: the field `model` of its JSON body or of its form, `?model=`, or "
        "nowhere. One that names none is for the only model that offers the route, else for server.default_model.",
    )
    streams: bool = Field(
        default=False, description="It answers with server-sent events when the request has `stream`."
    )


@dataclass(frozen=True, slots=True)
class Offered:
    """A route that models offer, and which of them."""

    route: ExtraRouteSettings
    keys: tuple[str, ...]


def offered(models: Mapping[str, ModelSettings]) -> Mapping[tuple[str, str], Offered]:
    """(method, path) → what is offered there. Raises ValueError where models do not agree."""
    found: dict[tuple[str, str], Offered] = {}
    for key, model in models.items():
        for route in model.extra_routes:
            at = route.method, route.path
            before = found.get(at)
            if before is not None and before.route != route:
                raise ValueError(
                    f"models.{key}.extra_routes: {route.method} {route.path} differs from that of "
                    f"models.{before.keys[0]} in model_in or streams"
                )
            found[at] = Offered(route, (*(before.keys if before is not None else ()), key))
    stars = [at for at in found if at[1].endswith("*")]
    for method, path in found:
        for verb, star in stars:
            if verb == method and path != star and covers(star, path):
                raise ValueError(f"extra_routes: {method} {path} is among those of {star}: keep one of them")
    return found
