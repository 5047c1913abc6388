"""Which model a request is for, and what its engine gets to see."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config import Settings
from proxy.errors import InvalidRequestError, ModelNotFoundError, RequestError
from proxy.web.addressing import Address, Addressing
from proxy.web.form import Form
from proxy.web.routes import find
from tests.fakes import model_settings

PARAMETERS = {
    "defaults": {"temperature": 0.5, "max_tokens": 100},
    "caps": {"max_tokens": 200, "n": 2},
    "remove": ["logit_bias"],
}


def settings(default: str | None = None) -> Settings:
    return Settings(
        server={"default_model": default},
        models={
            "a": model_settings(name="org/A", aliases=["gpt"], adapters=["sql-lora"]),
            "b": model_settings(parameters=PARAMETERS),
        },
    )


def address(
    body: bytes | dict[str, Any],
    path: str = "/v1/completions",
    *,
    method: str = "POST",
    query: str = "",
    default: str | None = None,
    content_type: str = "application/json",
    made: dict[str, tuple[str, str]] | None = None,
) -> Address:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    config = settings(default)
    return Addressing(lambda: config, (made or {}).get).find(find(method, path, query), content_type, raw)


# --- JSON ---


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"org/A"}',
        b'  { "prompt" : "\\u00e9\\u003cbr\\u003e \xc3\xa9", "model":\n"org/A" , "x": 1.0e0 } ',
        b'{"messages":[{"content":"\\"model\\": \\"b\\""}],"model":"org/A"}',
        b'{"tools":[{"model":{"type":"string"},"stream":1}],"model":"org/A","stream":true}',
        b'{"seed":123456789012345678901234567890,"model":"org/A"}',
        b'{"model":"sql-lora"}',
    ],
)
def test_bytes_are_untouched_when_nothing_has_to_change(body: bytes) -> None:
    found = address(body)
    assert found.body is body or found.body == body
    assert found.model == "a"


def test_an_alias_becomes_the_name_that_the_engine_knows() -> None:
    found = address({"x": [1, 2], "model": "gpt"})
    assert (found.model, orjson.loads(found.body)) == ("a", {"x": [1, 2], "model": "org/A"})


@pytest.mark.parametrize("body", [b"{}", b'{"model": null}'])
def test_the_default_model_fills_in(body: bytes) -> None:
    found = address(body, default="gpt")
    assert (found.model, orjson.loads(found.body)) == ("a", {"model": "org/A"})
    with pytest.raises(InvalidRequestError) as refused:
        address(body)
    assert refused.value.param == "model"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"b","model":"org/A"}',
        b'{"model":"org/A","x":{"model":"y"},"model":"org/A"}',
        b'{"mod\\u0065l":"b","model":"org/A"}',
        b'{"\\u006d\\u006f\\u0064\\u0065\\u006c":"b","model":"org/A"}',
    ],
)
def test_repeated_names_are_written_anew_as_they_were_checked(body: bytes) -> None:
    found = address(body)
    written = json.loads(found.body, object_pairs_hook=list)
    names = [name for name, _ in written]
    assert len(names) == len(set(names))
    assert dict(written)["model"] == "org/A"


def test_an_escaped_name_is_still_the_name() -> None:
    assert address(b'{"\\u006dodel":"org/A"}').model == "a"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"3", b'"x"', b"{", b'{"model":"org/A"', b'\xff\xfe{\x00', '{"model":"org/A"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"model":"org/A"}', b'{"model":"org/A","x":"\xff"}', b'{"model":"org/A","x":"\\ud800"}',
        b'{"model":"org/A","x":NaN}', b'{"model":"org/A",}', b'{"model":["org/A"]}', b'{"model":""}', b'{"model":7}',
        b'{"model":"org/A"}{"model":"b"}', b'{"model":"org/A"}\x00', b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_parsers_may_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        address(body)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError):
        address({"model": "c"})


@given(st.dictionaries(st.sampled_from(["model", "mode", "stream", "x"]), st.text(max_size=5)), st.booleans())
def test_what_was_checked_is_what_any_parser_reads(fields: dict[str, str], ascii_only: bool) -> None:
    pairs = [("model", "b"), *fields.items(), ("model", "org/A")]
    body = (
        "{" + ",".join(f"{json.dumps(k, ensure_ascii=ascii_only)}:{json.dumps(v)}" for k, v in pairs) + "}"
    ).encode()
    try:
        found = address(body)
    except RequestError:
        return
    first_wins: dict[str, Any] = {}
    for name, value in json.loads(found.body, object_pairs_hook=list):
        first_wins.setdefault(name, value)
    assert first_wins["model"] == "org/A"


# --- parameters ---


def test_parameters_of_a_model_apply() -> None:
    shaped = orjson.loads(address({"model": "b", "n": 5, "logit_bias": {"1": 2}, "temperature": None}).body)
    assert shaped == {"model": "b", "n": 2, "temperature": 0.5, "max_tokens": 100}
    body = b'{"model":"b", "temperature":1, "max_tokens":200}'
    assert address(body).body == body, "within the caps and with every default: as it is"
    body = b'{"model":"b", "prompt":"x", "temperature":0, "max_tokens":1e9}'
    assert orjson.loads(address(body).body)["max_tokens"] == 200


@pytest.mark.parametrize("value", ["500", True, [1], {}])
def test_a_cap_is_not_passed_by_another_type(value: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        address({"model": "b", "max_tokens": value})
    assert refused.value.param == "max_tokens"


def test_a_repeated_parameter_is_what_was_checked() -> None:
    shaped = address(b'{"model":"b","temperature":1,"max_tokens":100000,"max_tokens":10}').body
    assert b"100000" not in shaped


def test_parameters_are_for_text_only() -> None:
    body = b'{"model":"b","input":"x"}'
    assert address(body, "/v1/embeddings").body == body


@pytest.mark.parametrize(
    ("path", "body", "streams"),
    [
        ("/v1/chat/completions", {"stream": True}, True),
        ("/v1/messages", {"stream": True}, True),
        ("/v1/chat/completions", {"stream": 1}, False),
        ("/v1/chat/completions", {}, False),
        ("/v1/embeddings", {"stream": True}, False),
    ],
)
def test_who_waits_for_a_stream(path: str, body: dict[str, Any], streams: bool) -> None:
    assert address({"model": "org/A", **body}, path).streams is streams


# --- forms ---

TYPE = "multipart/form-data; boundary=XX"


def part(name: str, value: bytes, more: bytes = b"") -> bytes:
    return b'--XX\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), more, value)


FILE = part("file", bytes(range(256)) * 40 + b"\r\n--X\r\n--", b'; filename="a.wav"\r\nContent-Type: audio/wav')
END = b"--XX--\r\n"
AUDIO = "/v1/audio/transcriptions"


def upload(body: bytes, content_type: str = TYPE, **more: Any) -> Address:
    return address(body, AUDIO, content_type=content_type, **more)


def test_the_model_of_a_form() -> None:
    body = FILE + part("model", b"org/A") + part("stream", b"true") + END
    found = upload(body)
    assert (found.model, found.body, found.streams) == ("a", body, True)
    assert not upload(part("model", b"org/A") + part("stream", b"false") + FILE + END).streams


@pytest.mark.parametrize("order", [0, 1])
def test_an_alias_in_a_form_changes_nothing_else(order: int) -> None:
    fields = [part("model", b"gpt"), FILE]
    found = upload(fields[order] + fields[1 - order] + END)
    wanted = [part("model", b"org/A"), FILE]
    assert found.body == wanted[order] + wanted[1 - order] + END


def test_a_form_without_a_model_gets_the_default() -> None:
    assert upload(FILE + END, default="gpt").body == part("model", b"org/A") + FILE + END
    with pytest.raises(InvalidRequestError):
        upload(FILE + END)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", TYPE),
        (b"{}", "application/json"),
        (part("model", b"org/A") + END, "multipart/form-data"),
        (part("model", b"org/A") + END, "multipart/mixed; boundary=XX"),
        (part("model", b"org/A") + END, TYPE + "; charset=utf-16"),
        (part("model", b"org/A") + part("model", b"b") + END, TYPE),
        (part("model", b"org/A") + part("Model", b"b")[:-2], TYPE),
        (part("model", b"org/A", b'; filename="m"') + END, TYPE),
        (part("model", b"org/A", b"\r\nContent-Transfer-Encoding: base64") + END, TYPE),
        (part("model", b"org/A") + b"--XX \r\n" + END, TYPE),
        (part("model", b"org/A") + b"--XXX\r\n" + END, TYPE),
        (b"preamble\r\n" + part("model", b"org/A") + END, TYPE),
        (part("model", b"org/A") + END + part("model", b"b") + END, TYPE),
        (part("model", b"") + END, TYPE),
        (part("model", b"\xff") + END, TYPE),
        (b"--XX\r\n\r\norg/A\r\n" + END, TYPE),
        (b"--XX\r\nContent-Disposition: form-data\r\n\r\norg/A\r\n" + END, TYPE),
        (b"--XX\r\nno header at all\r\n\r\n" + END, TYPE),
        (b"".join(part("x", b"") for _ in range(1001)) + part("model", b"org/A") + END, TYPE),
        (part("model", b"org/A") + END, "multipart/form-data; boundary=" + "X" * 2000),
    ],
)
def test_a_form_that_parsers_may_read_differently_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequestError):
        upload(body, content_type)


@given(st.lists(st.tuples(st.sampled_from(["file", "x", "prompt"]), st.binary(max_size=80)), max_size=5), st.data())
async def test_forms_of_a_real_client_are_read(fields: list[tuple[str, bytes]], data: st.DataObject) -> None:
    form = aiohttp.FormData(default_to_multipart=True)
    at = data.draw(st.integers(0, len(fields)))
    for index, (name, content) in enumerate(fields):
        if index == at:
            form.add_field("model", "org/A")
        form.add_field(name, content, filename="f.bin")
    if at == len(fields):
        form.add_field("model", "org/A")
    payload = form()
    body = bytearray()

    class Sink:
        async def write(self, chunk: bytes) -> None:
            body.extend(chunk)

    await payload.write(Sink())  # type: ignore[arg-type]
    read = Form(payload.headers["Content-Type"], bytes(body))
    assert read.text("model") == "org/A"
    assert Form(payload.headers["Content-Type"], read.with_text("model", "other")).text("model") == "other"


# --- query and path ---


def test_the_model_of_a_query() -> None:
    assert address(b"", "/tokenizer_info", method="GET", query="model=gpt&x=1").model == "a"
    assert address(b"", "/tokenizer_info", method="GET", default="b").model == "b"
    for query in ("", "model=", "model=gpt&model=b", "model=gpt&mod%65l=b"):
        with pytest.raises(InvalidRequestError):
            address(b"", "/tokenizer_info", method="GET", query=query)


def test_a_response_is_found_by_its_id() -> None:
    made = {"resp_1": ("b", "b-2")}
    found = address(b"", "/v1/responses/resp_1", method="GET", made=made)
    assert (found.model, found.instance, found.target) == ("b", "b-2", "/v1/responses/resp_1")
    found = address(b"", "/v1/responses/resp_9/cancel", made=made, query="model=gpt")
    assert (found.model, found.instance) == ("a", None)
    with pytest.raises(InvalidRequestError, match="not known here"):
        address(b"", "/v1/responses/resp_9", method="GET", made=made)


def test_a_response_that_follows_another_goes_where_that_was_made() -> None:
    made = {"resp_1": ("b", "b-2")}
    found = address({"model": "b", "input": "x", "previous_response_id": "resp_1"}, "/v1/responses", made=made)
    assert found.instance == "b-2"
    found = address({"model": "gpt", "input": "x", "previous_response_id": "resp_1"}, "/v1/responses", made=made)
    assert found.instance is None, "another model was asked for"
