"""The exception tree, and the one place where an error becomes an OpenAI error envelope.

Three families, for three readers: `RequestError` is for the client of the proxy and carries everything an HTTP answer
needs; `EngineError` and `RuntimeFailure` are for the pool, which turns them into a colder tier or a `WakeFailed`;
`ConfigError` and `HostError` are for the operator.

The envelope is the one of OpenAI's API reference ("Error codes"), as vLLM answers it too::

    {"error": {"message": str, "type": str, "param": str | null, "code": str | null}}
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, ClassVar, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class WarmpoolError(Exception):
    """Base of everything this project raises on purpose."""


class ConfigError(WarmpoolError):
    """A configuration that cannot be used; `problems` has one line for each thing wrong with it.

    `lines`: where each is in the source, which is a file then.
    """

    def __init__(self, source: str, problems: Sequence[str], lines: Sequence[int | None] = ()) -> None:
        self.source = source
        self.problems = tuple(problems)
        self.lines = tuple(lines) or (None,) * len(self.problems)
        super().__init__(
            "\n".join(
                f"{source}: {problem}" if line is None else f"{source}:{line}: {problem}"
                for problem, line in zip(self.problems, self.lines, strict=True)
            )
        )


class HostError(WarmpoolError):
    """This host cannot do what the configuration asks for; the text says what is missing and how to get it."""


class IllegalTransitionError(WarmpoolError):
    """An event that an instance's state does not know; a bug in the pool, and nothing was changed."""


class Fault(enum.Enum):
    """What a failure says of the checkpoint that an engine came from, or was to come from."""

    HOST = "host"
    """Nothing: of what the host could not do, of time, of us."""
    IMAGE = "image"
    """Something is wrong with it, probably."""
    DAMAGE = "damage"
    """It is not what was written: a file is missing, or has another size or digest."""


class EngineError(WarmpoolError):
    """An engine answered wrongly, too late or not at all; `stage` names what was asked of it."""

    def __init__(self, stage: str, reason: str, *, fault: Fault = Fault.HOST) -> None:
        self.stage = stage
        self.reason = reason
        self.fault = fault
        super().__init__(f"{stage}: {reason}")


class NoRoomError(EngineError):
    """An engine lacks host memory for what was asked of it; it may have it later."""


class RuntimeFailure(WarmpoolError):  # noqa: N818 - "RuntimeError" is Python's own
    """A runtime could not carry out an operation.

    `alive` tells whether the engine is still there and as usable as before; when false, only `remove` helps.
    `leaked_bytes`: GPU memory that should have come free and did not, if that is the failure.
    """

    def __init__(
        self, operation: str, reason: str, *, alive: bool = False, leaked_bytes: int = 0, fault: Fault = Fault.HOST
    ) -> None:
        self.operation = operation
        self.reason = reason
        self.alive = alive
        self.leaked_bytes = leaked_bytes
        self.fault = fault
        super().__init__(f"{operation}: {reason}")


class OverdueError(RuntimeFailure):
    """A runtime gave no result in the time that an operation may take.

    `hangs`: nor did the operation end when it was given up. Nothing can be done with the instance until it does.
    """

    def __init__(self, operation: str, reason: str, *, hangs: bool) -> None:
        self.hangs = hangs
        super().__init__(operation, reason)


class PortTakenError(RuntimeFailure):
    """The port of an engine has gone to another program, which is sent nothing; its image is as good as before."""

    def __init__(self, operation: str, port: int, owner: str) -> None:
        super().__init__(operation, f"port {port} of the engine is listened on by {owner}")


def fault_of(error: BaseException) -> Fault:
    """What a failed restore says of the image; anything that is not known for it says nothing."""
    return error.fault if isinstance(error, EngineError | RuntimeFailure) else Fault.HOST


_LATER: Final = frozenset({429, 503})
"""These always say when to try again."""
RETRY: Final = {"Retry-After": "1"}
"""For a 503 that is no error's."""


class RequestError(WarmpoolError):
    """An answer to a client: HTTP status, OpenAI type and code, and when it is worth trying again.

    `message` is for clients: no path, command or address of this host, and no line of another program. `detail` has
    those, for operators: in the log (`str`) and in answers of the admin API.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None, detail: str = ""
    ) -> None:
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.detail = detail
        super().__init__(f"{message} ({detail})" if detail else message)

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, rounded up (RFC 9110, 10.2.3), where a later try makes sense."""
        if self.retry_after_s is None and self.status not in _LATER:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s or 0)))}

    def body(self, *, for_operator: bool = False, anthropic: bool = False) -> bytes:
        """The error envelope as JSON: OpenAI's, or Anthropic's."""
        if anthropic:
            return anthropic_envelope(self.message, status=self.status, code=self.code)
        return envelope(str(self) if for_operator else self.message, type_=self.type, param=self.param, code=self.code)


class InvalidRequestError(RequestError):
    """The request itself is wrong: not JSON, no model, a bad header."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class AuthenticationError(RequestError):
    """No key, or none that is known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        """With the challenge (RFC 9110, 11.6.1)."""
        return {"WWW-Authenticate": 'Bearer realm="warmpool"'}


class ForbiddenError(RequestError):
    """Not for this client, whatever it shows."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class ModelNotAllowedError(RequestError):
    """A model that the client's key is not good for."""

    status = 403
    type = "invalid_request_error"
    code = "model_not_allowed"


class RateLimitError(RequestError):
    """The client's key has used up what it may; `extra`: headers that say what is left."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, extra: Mapping[str, str]) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.extra = extra

    def headers(self) -> dict[str, str]:
        """With what is left."""
        return {**super().headers(), **self.extra}


class BudgetError(RateLimitError):
    """The client's key has used up what it may in a day."""

    code = "insufficient_quota"  # OpenAI's, by which clients know that asking again soon is of no use


class SlowUploadError(RequestError):
    """The body did not come in time; the connection ends."""

    status = 408
    type = "invalid_request_error"
    code = "upload_too_slow"


class RouteNotFoundError(RequestError):
    """A path that is not on the allow-list."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowedError(RequestError):
    """A path that is on the allow-list, with a method that is not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, path: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{path} takes {self.allowed} only.")

    def headers(self) -> dict[str, str]:
        """With the methods that it takes (RFC 9110, 15.5.6)."""
        return {"Allow": self.allowed}


class UpgradeRequiredError(RequestError):
    """A request for a WebSocket that is no handshake, or not of a version that is spoken here."""

    status = 426
    type = "invalid_request_error"
    code = "upgrade_required"

    def headers(self) -> dict[str, str]:
        """With the protocol (RFC 9110, 15.5.22) and its version (RFC 6455, 4.4)."""
        return {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}


class ModelNotFoundError(RequestError):
    """A model that the configuration does not have."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {model!r} does not exist. GET /v1/models lists those that do.", param="model")


class NotHereError(RequestError):
    """To another host of the fleet: this one will not serve its request now; `offer` is what it offers instead."""

    status = 409
    type = "server_error"
    code = "not_here"

    def __init__(self, offer: str) -> None:
        super().__init__("This host would have the request wait longer than it was sent for.")
        self.offer = offer

    def headers(self) -> dict[str, str]:
        """With the offer."""
        return {"X-Warmpool-Offer": self.offer}


class NoHostError(RequestError):
    """No host of the fleet would serve the request in the time that it would wait."""

    status = 503
    code = "no_host"


class ResponseNotFoundError(RequestError):
    """A response that nobody here is known to have made, in vLLM's words (`_make_not_found_error`)."""

    status = 404
    type = "invalid_request_error"
    code = "response_not_found"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{response_id}' not found.", param="response_id")


class InstanceNotFoundError(RequestError):
    """An instance that a model does not have."""

    status = 404
    type = "invalid_request_error"
    code = "instance_not_found"


class RequestNotFoundError(RequestError):
    """No such request waits or runs."""

    status = 404
    type = "invalid_request_error"
    code = "request_not_found"


class RequestCancelledError(RequestError):
    """An operator has ended it. With a status that clients do not try again."""

    status = 410
    type = "invalid_request_error"
    code = "request_cancelled"


class ConflictError(RequestError):
    """A command that cannot be carried out as things are; the text says what is in its way."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class CommandFailedError(RequestError):
    """A command that was begun and could not be carried out; the engine serves on, or was cleared away."""

    status = 500
    code = "command_failed"


class MediaTypeError(RequestError):
    """A body of a kind that a route does not take."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class ContentCodingError(RequestError):
    """A body in a content coding that is not decoded here."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"

    def __init__(self, accepted: Iterable[str]) -> None:
        self.accepted = ", ".join([*accepted, "identity"])
        super().__init__(f"A body may be in one of these content codings: {self.accepted}.")

    def headers(self) -> dict[str, str]:
        """With those that are (RFC 9110, 15.5.16)."""
        return {"Accept-Encoding": self.accepted}


class BodyTooLargeError(RequestError):
    """A request body over the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class QueueFullError(RequestError):
    """Too many requests wait already."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class NoCapacityError(RequestError):
    """No instance became free in the time a request may wait."""

    status = 503
    code = "no_capacity"


class NoMemoryError(RequestError):
    """There is not enough host memory for another engine, and nobody who could give it up."""

    status = 503
    code = "insufficient_memory"


class MaxWaitError(RequestError):
    """An instance is not to be had within the time that the client would wait."""

    status = 503
    code = "max_wait_exceeded"


class WakeFailedError(RequestError):
    """Every tier down to a cold start was tried, and none gave a working engine."""

    status = 503
    code = "wake_failed"


class DrainingError(RequestError):
    """The proxy is shutting down and admits nothing new."""

    status = 503
    code = "draining"


class UpstreamError(RequestError):
    """The engine broke before it answered."""

    status = 502
    code = "upstream_failed"


class EngineFailedError(RequestError):
    """The engine's own error would have shown what is no client's business."""

    status = 500
    code = "engine_error"


def envelope(message: str, *, type_: str, param: str | None = None, code: str | None = None) -> bytes:
    """One OpenAI error envelope as JSON."""
    return orjson.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}})


_ANTHROPIC_TYPES: Final = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def anthropic_envelope(message: str, *, status: int, code: str | None = None) -> bytes:
    """The same in the envelope of Anthropic's API, whose clients choose their exception by `type`."""
    type_ = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return orjson.dumps({"type": "error", "error": {"type": type_, "message": message, "code": code}})


def sse_error(body: bytes) -> bytes:
    """An error envelope as the last event of a stream, in the shape that OpenAI's and Anthropic's clients raise."""
    return b"event: error\ndata: " + orjson.dumps({"type": "error", **orjson.loads(body)}) + b"\n\n"
