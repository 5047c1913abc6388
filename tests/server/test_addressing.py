"""Which model a request is for, and what its engine gets to see."""

from __future__ import annotations

import gc
import json
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.settings import Settings
from proxy.errors import InvalidRequestError, ModelNotFoundError, RequestError, ResponseNotFoundError
from proxy.server.forward.json_edit import edited
from proxy.server.forward.model_resolver import Address, Addressing
from proxy.server.forward.multipart import Form
from proxy.server.forward.routes import find
from tests.fakes import model_settings

if TYPE_CHECKING:
    from collections.abc import Callable

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
def test_every_one_of_repeated_names_says_what_was_checked(body: bytes) -> None:
    found = address(body)
    written = json.loads(found.body, object_pairs_hook=list)
    assert [value for name, value in written if name == "model"] == ["org/A"] * 2
    assert [name for name, _ in written] == [name for name, _ in json.loads(body, object_pairs_hook=list)]


ODD = (
    b'"seed":123456789012345678901234567890, "x" :-0.10e+01,"x":{"model":"b","y":1,"y":2},"model_":"model"\r\n,\t"t":'
    b'"\\ud83d\\ude00\\u0041 \\"model\\": \xc3\xa9"'
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"gpt",%b}', b'{"model":"org/A",%b}'),
        (b' {%b , "model" : "gpt" } ', b' {%b , "model" : "org/A" } '),
        (b'{"model":null,%b,"model":"gpt"}', b'{"model":"org/A",%b,"model":"org/A"}'),
        (b'{"model":{"a":["}"]},%b,"mod\\u0065l":"gpt"}', b'{"model":"org/A",%b,"mod\\u0065l":"org/A"}'),
        (b'{"model":"b",%b,"model":"org/A"}', b'{"model":"org/A",%b,"model":"org/A"}'),
        (b"{%b}", b'{"model":"org/A",%b}'),
    ],
)
def test_only_the_bytes_of_the_name_change(before: bytes, after: bytes) -> None:
    assert address(before % ODD, default="gpt").body == after % ODD


@pytest.mark.parametrize(
    "body",
    [
        b'{"y":{"m":"\\"model\\": \\\\"},"seed":123456789012345678901234567890 , "model" : %b,"x":1,"x":2}',
        b'{"model":%b}',
    ],
)
@pytest.mark.parametrize("name", [b'"gpt"', b'"g\\u0070t"', b'"\\u0067pt"'])
def test_a_name_that_occurs_once_is_replaced_where_it_is(body: bytes, name: bytes) -> None:
    assert address(body % name).body == body % b'"org/A"'


def test_parameters_change_their_own_bytes_only() -> None:
    before = (
        b'{"logit_bias":{"a":[1]}, %b,"n":5 ,"n": 9,"logit_bias":{},"model":"b","temperature":null, "logit_bias":3}'
    )
    after = b'{"max_tokens":100, %b,"n":2 ,"n": 2,"model":"b","temperature":0.5}'
    assert address(before % ODD).body == after % ODD
    assert address(b'{"logit_bias":1,"temperature":1,"model":"b","max_tokens":1}').body == (
        b'{"temperature":1,"model":"b","max_tokens":1}'
    )


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":null,"x":' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"model":"gpt",' + b",".join(b'"x%d":1' % n for n in range(6000)) + b',"model":"gpt"}',
    ],
    ids=["deep", "wide"],
)
def test_what_is_too_deep_or_too_wide_for_an_edit_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        address(body, default="gpt")


@pytest.mark.parametrize("deep", [300, 1000])
def test_an_alias_in_a_deep_body_is_replaced(deep: int) -> None:
    body = b'{"model":"%b","x":' + b"[" * deep + b"]" * deep + b"}"
    assert address(body.replace(b"%b", b"gpt")).body == body.replace(b"%b", b"org/A")


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=6)
    | st.sampled_from(["model", '"model"', "gpt", "\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "n", "x", '"']), inner),
    max_leaves=6,
)
_NAMES = st.sampled_from(["model", "n", "max_tokens", "logit_bias", "temperature", "x", "é", '"model"', "\\"])


@given(st.lists(st.tuples(_NAMES, _VALUES), max_size=6), st.data())
def test_an_edit_is_what_it_says_for_every_reader(pairs: list[tuple[str, Any]], data: st.DataObject) -> None:
    space = st.sampled_from(["", " ", "\n", "\t "])
    names = [json.dumps(name, ensure_ascii=data.draw(st.booleans())) for name, _ in pairs]
    texts = [f"{data.draw(space)}{name}{data.draw(space)}:" for name in names]
    body = ("{" + ",".join(t + json.dumps(value) for t, (_, value) in zip(texts, pairs, strict=True)) + "}").encode()
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return  # it has what is no UTF-8
    written = edited(body, {"model": "m", "n": 2}, ["logit_bias"], ["model", "n", "max_tokens"])
    tokens = [value for name, value in pairs if name == "max_tokens"]
    wanted = [
        (name, {"model": "m", "n": 2, "max_tokens": tokens[-1] if tokens else None}.get(name, value))
        for name, value in pairs
        if name != "logit_bias"
    ]
    missing = [(name, value) for name, value in (("model", "m"), ("n", 2)) if name not in dict(pairs)]
    read: list[list[tuple[str, Any]]] = []

    def note(found: list[tuple[str, Any]]) -> dict[str, Any]:
        read.append(found)
        return dict(found)

    json.loads(written, object_pairs_hook=note)
    assert read[-1] == missing + wanted, "the outermost comes last"


def _cpu_s(work: Callable[[bytes], object], body: bytes) -> float:
    gc.disable()
    try:
        began = time.process_time()
        work(body)
        return time.process_time() - began
    finally:
        gc.enable()


def test_a_second_name_costs_no_more_than_reading_the_body() -> None:
    """By the processor's time, against reading the same body: large bodies of every shape."""
    for piece in (b'{"model":"x"},', b"[],", b'"",', b"1,", b'"model",', b'"' + b"A" * 100_000 + b'",'):
        size = 512 << 10 if len(piece) < 100 else 4 << 20  # long strings are read within no time
        body = b'{"model":"b","x":[' + piece * (size // len(piece)) + b'1],"model":"gpt"}'
        reading, finding = (
            min(_cpu_s(orjson.loads, body) for _ in range(3)),
            min(_cpu_s(address, body) for _ in range(3)),
        )
        assert finding < 10 * reading, piece[:20]
        found = address(body)
        assert found.body == body.replace(b'{"model":"b"', b'{"model":"org/A"', 1)[: -len(b'"gpt"}')] + b'"org/A"}'


def test_an_escaped_name_is_still_the_name() -> None:
    assert address(b'{"\\u006dodel":"org/A"}').model == "a"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"3", b'"x"', b"{", b'{"model":"org/A"', b'\xff\xfe{\x00', '{"model":"org/A"}'.encode("utf-16"),
        b'\xef\xbb\xbf\xef\xbb\xbf{"model":"org/A"}',
        b'{"model":"org/A","x":"\xff"}', b'{"model":"org/A","x":"\\ud800"}',
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


# As Apache HttpClient 4.5 sends it (MultipartEntityBuilder, strict mode, addTextBody and addBinaryBody).
APACHE_TYPE = "multipart/form-data; boundary=Wq8f-3cXyfQ2_ev0zUz3cXyfQ2"
APACHE = (
    b'--Wq8f-3cXyfQ2_ev0zUz3cXyfQ2\r\nContent-Disposition: form-data; name="model"\r\n'
    b"Content-Type: text/plain; charset=ISO-8859-1\r\nContent-Transfer-Encoding: 8bit\r\n\r\n%b\r\n"
    b'--Wq8f-3cXyfQ2_ev0zUz3cXyfQ2\r\nContent-Disposition: form-data; name="file"; filename="speech.wav"\r\n'
    b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary\r\n\r\nRIFF\x00\xff\r\n"
    b"--Wq8f-3cXyfQ2_ev0zUz3cXyfQ2--\r\n"
)
# As Retrofit 2 sends it with OkHttp 4 (@Multipart, @Part RequestBody, @Part MultipartBody.Part).
RETROFIT_TYPE = "multipart/form-data; boundary=5f0a1f0c-3c9b-4a0e-9a5e-0d0f3d2a7c11"
RETROFIT = (
    b'--5f0a1f0c-3c9b-4a0e-9a5e-0d0f3d2a7c11\r\nContent-Disposition: form-data; name="model"\r\n'
    b"Content-Transfer-Encoding: binary\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 5\r\n\r\n%b\r\n"
    b'--5f0a1f0c-3c9b-4a0e-9a5e-0d0f3d2a7c11\r\nContent-Disposition: form-data; name="file"; filename="a.m4a"\r\n'
    b"Content-Type: audio/mp4\r\nContent-Length: 6\r\n\r\n\x00\x00ftyp\r\n"
    b"--5f0a1f0c-3c9b-4a0e-9a5e-0d0f3d2a7c11--\r\n"
)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (APACHE, APACHE_TYPE),
        (APACHE, APACHE_TYPE.replace(";", "; charset=ISO-8859-1;", 1)),
        (APACHE.replace(b"8bit", b"7bit"), APACHE_TYPE + '; charset="US-ASCII"'),
        (RETROFIT, RETROFIT_TYPE),
        (b"\r\n" + RETROFIT, RETROFIT_TYPE),
        (b"\r\n\r\n" + APACHE + b"\r\n", APACHE_TYPE),
        (APACHE + b"\r\n\r\n", APACHE_TYPE + "; charset=windows-1252"),
    ],
)
def test_forms_of_old_clients_are_read_and_only_the_name_changes(body: bytes, content_type: str) -> None:
    sent = body % b"org/A"
    found = upload(sent, content_type)
    assert (found.model, found.body) == ("a", sent)
    assert upload(body % b"gpt", content_type).body == sent
    without = body.replace(b'name="model"', b'name="other"') % b"x"
    read = Form(content_type, upload(without, content_type, default="gpt").body)
    assert (read.text("model"), read.text("other")) == ("org/A", "x")


def test_a_forms_charset_is_that_of_its_names_and_values() -> None:
    form = Form(TYPE + "; charset=iso-8859-1", part("model", b"caf\xe9") + END)
    assert form.text("model") == "café"
    assert form.with_text("model", "é") == part("model", b"\xe9") + END
    with pytest.raises(InvalidRequestError, match="lacks letters"):
        form.with_text("model", "→")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", TYPE),
        (b"{}", "application/json"),
        (part("model", b"org/A") + END, "multipart/form-data"),
        (part("model", b"org/A") + END, "multipart/mixed; boundary=XX"),
        (part("model", b"org/A") + END, "multipart/form-data; boundary=YY; boundary=XX"),
        (part("model", b"org/A") + END, "multipart/form-data; boundary=YY: x; Boundary=XX"),
        (part("model", b"org/A") + END, TYPE + "; charset=utf-16"),
        (part("model", b"org/A") + END, TYPE + "; charset=utf-7"),
        (part("model", b"org/A") + END, TYPE + "; charset=iso-8859-99"),
        (b"\n" + part("model", b"org/A") + END, TYPE),
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


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tokenizer_info"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/v1/realtime"),
        ("GET", "/v1/responses/resp_1"),
        ("POST", "/invocations"),
    ],
)
def test_a_route_that_names_its_model_nowhere_means_the_only_one(method: str, path: str) -> None:
    one = Settings(models={"a": model_settings(name="org/A", routes={"lora": True})})
    found = Addressing(lambda: one).find(find(method, path), "", b'{"prompt":"x"}')
    assert found.model == "a"
    if path == "/invocations":
        assert orjson.loads(found.body) == {"prompt": "x", "model": "org/A"}
    with pytest.raises(InvalidRequestError):
        Addressing(lambda: one).find(find("POST", "/v1/completions"), "", b'{"prompt":"x"}')
    with pytest.raises((InvalidRequestError, ResponseNotFoundError)):
        Addressing(settings).find(find(method, path), "", b"{}")


def test_a_response_is_found_by_its_id() -> None:
    made = {"resp_1": ("b", "b-2")}
    found = address(b"", "/v1/responses/resp_1", method="GET", made=made)
    assert (found.model, found.instance, found.target) == ("b", "b-2", "/v1/responses/resp_1")
    found = address(b"", "/v1/responses/resp_9/cancel", made=made, query="model=gpt")
    assert (found.model, found.instance) == ("a", None)
    with pytest.raises(ResponseNotFoundError, match=r"^Response with id 'resp_9' not found\.$") as unknown:
        address(b"", "/v1/responses/resp_9", method="GET", made=made)
    assert (unknown.value.status, unknown.value.param) == (404, "response_id")


def test_a_response_that_follows_another_goes_where_that_was_made() -> None:
    made = {"resp_1": ("b", "b-2")}
    found = address({"model": "b", "input": "x", "previous_response_id": "resp_1"}, "/v1/responses", made=made)
    assert found.instance == "b-2"
    found = address({"model": "gpt", "input": "x", "previous_response_id": "resp_1"}, "/v1/responses", made=made)
    assert found.instance is None, "another model was asked for"
