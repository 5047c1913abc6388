"""What can be asked of an engine that is not vLLM: by a request to it, or by a command on this host."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from proxy.config.fields import Duration, Section

PLACE_FIELDS: Final = ("host", "port", "model", "instance")
"""What is replaced in the words of a command: where the engine is, and its names."""
_POINTER: Final = r"^(/[^/]*)*$"

Path = Annotated[str, Field(pattern=r"^/[!-~]*$", max_length=200)]
Command = Annotated[list[str], Field(max_length=100)]
Timeout = Annotated[Duration, Field(gt=0, le=600)]
Pointer = Annotated[str, Field(pattern=_POINTER, max_length=200)]
"""Where something is in a JSON document (RFC 6901): "/data/0/embedding"; "" is all of it."""


def check_command(command: list[str], known: tuple[str, ...] = PLACE_FIELDS) -> None:
    """Raises ValueError for a field that is not known."""
    for argument in command:
        for name in re.findall(r"\{(\w*)\}", argument):
            if name not in known:
                raise ValueError(f"command: {{{name}}} is not one of {', '.join(f'{{{k}}}' for k in known)}")


class _Call(Section):
    @model_validator(mode="after")
    def _one_way(self) -> _Call:
        command, path = getattr(self, "command", []), getattr(self, "path", None)
        if command and path is not None:
            raise ValueError("path and command exclude each other: keep one of them")
        if not command and path is None:
            rest = {name for name in type(self).model_fields if name not in ("path", "command", "names")}
            if any(getattr(self, name) != type(self).model_fields[name].default for name in rest):
                raise ValueError("neither a path nor a command: set one of them")
        check_command(command, (*PLACE_FIELDS, "level") if isinstance(self, OrderSettings) else PLACE_FIELDS)
        return self

    @property
    def present(self) -> bool:
        """Whether there is a way."""
        return any(getattr(self, name, None) for name in ("path", "command", "names"))


class OrderSettings(_Call):
    """Something that an engine is told to do: `sleep`, `wake_up`.

    {level} is the depth of the sleep, 1 or 2 (`golden_sleep_level`), in the path, the command, and as a string of the
    body, where it becomes a number.
    """

    path: Path | None = Field(
        default=None, description="Path of the engine that is asked; any answer 2xx is a yes.", examples=["/sleep"]
    )
    method: Literal["GET", "POST", "PUT", "DELETE"] = Field(default="POST", description="How it is asked.")
    body: dict[str, Any] = Field(default={}, description="The body of a POST or PUT, sent as JSON.")
    command: Command = Field(
        default=[],
        description="Program and arguments instead, run on this host as warmpool's user; it ends with status 0: "
        '["/usr/local/bin/tell", "{host}", "{port}"]. {host} and {port} are the engine\'s, {model} and {instance} its '
        "names.",
    )
    timeout: Timeout = Field(default=60.0, description="How long it may take.")


class AsleepSettings(_Call):
    """How it is known whether an engine sleeps that a new warmpool finds running.

    Without, such an engine is taken to be asleep, and woken.
    """

    path: Path | None = Field(
        default=None, description="Path of a GET; it answers with JSON.", examples=["/is_sleeping"]
    )
    answer: Pointer = Field(default="/is_sleeping", description="Where in that true or false stands.")
    command: Command = Field(
        default=[],
        description="A command instead; its status is 0 for an engine that sleeps, 1 for one that is awake.",
    )
    timeout: Timeout = Field(default=5.0, description="How long it may take.")


class CanaryRequestSettings(_Call):
    """A request that the engine always answers alike, for one that has no /v1/completions.

    It warms the engine up, is the canary, and is how an engine that seems to stand still is tried.
    """

    path: Path | None = Field(default=None, description="Path of a POST to the engine.", examples=["/v1/embeddings"])
    body: dict[str, Any] = Field(
        default={},
        description='Its body, sent as JSON; the string "{model}" becomes the name that the engine knows.',
    )
    answer: Pointer | None = Field(
        default=None,
        description='What of the answer has to be the same, in JSON: "/data/0/embedding". Without: all of its bytes.',
        examples=["/data/0/embedding"],
    )
    command: Command = Field(
        default=[],
        description="A command instead; what it prints has to be the same.",
    )
    timeout: Timeout = Field(default=60.0, description="How long it may take.")


class TokensSettings(_Call):
    """Counters of the engine's work, which say that it does not stand still.

    Without, its /metrics are looked through for counters like vLLM's, SGLang's and llama.cpp's.
    """

    path: Path | None = Field(
        default=None,
        description="Path of a GET; it answers in Prometheus' text format. Without a command: /metrics.",
        examples=["/metrics"],
    )
    command: Command = Field(
        default=[],
        description="A command instead, that prints lines of the same format.",
    )
    names: list[Annotated[str, Field(pattern=r"^[A-Za-z_:][A-Za-z0-9_:]*$")]] = Field(
        default=[],
        description="The metrics that count, whatever their labels; without: those like vllm:generation_tokens_total.",
        examples=[["tgi_request_count", "tgi_request_generated_tokens_sum"]],
    )
    timeout: Timeout = Field(default=5.0, description="How long it may take.")
