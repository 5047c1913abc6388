"""A process that reads large bodies, so that the event loop does not: what of a body decides where it goes.

Usage: ``python -m proxy.server.forward.scan_process``, with standard input a SOCK_SEQPACKET socket of warmpool's. Each
job is a message (JSON) with a descriptor of the body, each result a message, with a descriptor of the new body where it
was changed; `proxy.server.forward.scanner` is the other side. It ends with its socket.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.errors import InvalidRequestError
from proxy.server.auth.prompt_tokens import prompt_tokens
from proxy.server.forward.json_edit import may_repeat, parsed, shaped
from proxy.server.forward.multipart import Form

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_BYTES: Final = 1 << 20
_MOST_TEXT: Final = 1000
"""No name is longer that anybody configures."""


def sent_body(body: bytes) -> int:
    """A new descriptor of a file in memory with the body. The caller closes it."""
    file = os.memfd_create("warmpool-body", os.MFD_CLOEXEC)
    try:
        rest = memoryview(body)
        while rest:
            rest = rest[os.write(file, rest) :]
    except BaseException:
        os.close(file)
        raise
    return file


def received_body(file: int) -> bytes:
    """The body that a descriptor has; closes it."""
    try:
        size, at, pieces = os.fstat(file).st_size, 0, list[bytes]()
        while at < size:
            pieces.append(os.pread(file, size - at, at))
            at += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(file)


def read_json(body: bytes, names: list[str], unified: list[str]) -> dict[str, Any]:
    """The fields of these names, whether one of `unified` may repeat, and what the request may cost in tokens."""
    fields = parsed(body)
    return {
        "fields": {name: _short(fields[name]) for name in names if name in fields},
        "repeated": may_repeat(body, unified),
        "tokens": prompt_tokens(fields),
    }


def _short(value: object) -> object:
    """As much of a value as is looked at."""
    if isinstance(value, str):
        return value[:_MOST_TEXT]
    return value if value is None or isinstance(value, bool | float | int) else []


def read_form(body: bytes, content_type: str) -> dict[str, Any]:
    """The text fields that decide where a form goes."""
    form = Form(content_type, body)
    texts = {name: form.text(name) for name in ("model", "stream")}
    return {"fields": {name: text[:_MOST_TEXT] for name, text in texts.items() if text is not None}}


def edit_json(body: bytes, **changes: Any) -> bytes:
    """See `shaped`."""
    return shaped(body, **changes)


def edit_form(body: bytes, content_type: str, name: str, value: str) -> bytes:
    """With another value of a text field."""
    return Form(content_type, body).with_text(name, value)


_JOBS: Final[dict[str, Callable[..., dict[str, Any] | bytes]]] = {
    "read_json": read_json,
    "read_form": read_form,
    "edit_json": edit_json,
    "edit_form": edit_form,
}


def _carried_out(job: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes | None]:
    try:
        result = _JOBS[job.pop("job")](body, **job)
    except InvalidRequestError as error:
        return {"refused": error.message, "param": error.param}, None
    return ({}, result) if isinstance(result, bytes) else (result, None)


def main() -> None:
    """Carry out jobs until there is nobody who gives any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # JSON has no cycles, and millions of values would be looked through for them again and again
    with contextlib.suppress(ConnectionError), socket.socket(fileno=os.dup(0)) as peer:
        while True:
            message, files, _, _ = socket.recv_fds(peer, MESSAGE_BYTES, 1)
            if not message:
                return
            facts, changed = _carried_out(orjson.loads(message), received_body(files[0]))
            if changed is None:
                peer.send(orjson.dumps(facts))
                continue
            file = sent_body(changed)
            socket.send_fds(peer, [orjson.dumps(facts)], [file])
            os.close(file)


if __name__ == "__main__":
    main()
