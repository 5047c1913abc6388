"""What a span says of a request to a model, by OpenTelemetry's semantic conventions for generative AI.

Those of version 1.37 and later (`gen_ai.provider.name` instead of `gen_ai.system`). Counts, names and reasons: never a
prompt or an answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from proxy.engine.kinds import table
from proxy.server.key_usage.token_figures import said

if TYPE_CHECKING:
    from proxy.config.model import ModelSettings
    from proxy.server.forward.answer import EngineAnswer
    from proxy.server.forward.cycle import RequestCycle

_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}
_LIKE_OPENAI: Final = "openai"
"""As the conventions have it where only the API is known."""
# A quote inside a JSON string is escaped, so generated text cannot look like these.
_MODEL: Final = re.compile(rb'"model"\s*:\s*"([^"\\]{1,200})"')
_REASON: Final = re.compile(rb'"(?:finish_reason|stop_reason)"\s*:\s*"([a-z_]{1,40})"')
_MOST_REASONS: Final = 16


def attributes(request: RequestCycle) -> dict[str, Any]:
    """Of a request whose engine was asked; empty for one that is no such operation."""
    operation = _OPERATIONS.get(request.head.path_for_log)
    settings = request.service.pool.settings
    model = settings.models.get(request.model)
    if operation is None or model is None or request.first_lease is None:
        return {}
    found = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _provider(model),
        "gen_ai.request.model": settings.served_name(request.model),
    }
    if (answer := request.answer) is not None and answer.begun:
        found |= _of(answer)
    return found


def _provider(model: ModelSettings) -> str:
    name = table.of(model).name
    return name if name == "vllm" else _LIKE_OPENAI


def _of(answer: EngineAnswer) -> dict[str, Any]:
    tokens = said(answer.usage)
    model = _MODEL.search(answer.beginning)
    reasons = [reason.decode() for reason in _REASON.findall(answer.ending)]
    found = {
        "gen_ai.response.model": model[1].decode("utf-8", "replace") if model is not None else None,
        "gen_ai.response.finish_reasons": reasons[:_MOST_REASONS] or None,
        "gen_ai.usage.input_tokens": tokens.prompt,
        "gen_ai.usage.output_tokens": tokens.completion,
        "gen_ai.usage.cache_read.input_tokens": tokens.cached,
    }
    return {name: value for name, value in found.items() if value is not None}
