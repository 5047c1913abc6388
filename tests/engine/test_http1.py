"""Answers of engines, read without I/O: what is accepted, what is refused, and that cuts make no difference."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.engine import http1

OK = b"HTTP/1.1 200 OK\r\n"


def head(*lines: bytes, method: str = "POST", status: bytes = OK) -> http1.Head:
    return http1.parse_head(status + b"".join(line + b"\r\n" for line in lines) + b"\r\n", method)


@pytest.mark.parametrize(
    ("lines", "length", "keeps_alive"),
    [
        ([b"Content-Length: 5"], 5, True),
        ([b"content-length:5"], 5, True),
        ([b"Content-Length: \t 5 \t"], 5, True),
        ([b"Content-Length: 0"], 0, True),
        ([b"Transfer-Encoding: chunked"], http1.CHUNKED, True),
        ([b"transfer-encoding: CHUNKED"], http1.CHUNKED, True),
        ([], http1.UNTIL_CLOSE, False),
        ([b"Content-Length: 5", b"Connection: close"], 5, False),
        ([b"Content-Length: 5", b"Connection: Keep-Alive, Close"], 5, False),
        ([b"Content-Length: 5", b"Connection: close", b"CONNECTION:keep-alive"], 5, False),
    ],
)
def test_framing(lines: list[bytes], length: int, keeps_alive: bool) -> None:
    read = head(*lines)
    assert (read.length, read.keeps_alive) == (length, keeps_alive)


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [("HEAD", b"200", 0), ("POST", b"204", 0), ("GET", b"304", 0), ("GET", b"205", 7), ("POST", b"500", 7)],
)
def test_some_answers_have_no_body_whatever_they_say(method: str, status: bytes, length: int) -> None:
    assert head(b"Content-Length: 7", method=method, status=b"HTTP/1.1 %b X\r\n" % status).length == length


@pytest.mark.parametrize(
    ("status", "keeps_alive"),
    [(b"HTTP/1.0 200 OK\r\n", False), (b"HTTP/1.1 200\r\n", True), (b"HTTP/1.1 200 \r\n", True)],
)
def test_status_lines(status: bytes, keeps_alive: bool) -> None:
    assert head(b"Content-Length: 5", status=status).keeps_alive is keeps_alive


def test_header_fields_are_kept_as_they_are() -> None:
    fields = [(b"X-A", b"1"), (b"x-a", b"2 \xe4 \xff"), (b"Empty", b""), (b"Content-Length", b"0")]
    assert head(*(b"%b: %b" % field for field in fields)).fields == fields


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\n\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"http/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 O\x00K\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\n\r\n",
        OK + b" folded: 1\r\n\r\n",
        OK + b"A: 1\r\n folded\r\n\r\n",
        OK + b"A : 1\r\n\r\n",
        OK + b": 1\r\n\r\n",
        OK + b"A\r\n\r\n",
        OK + b"A: 1\nB: 2\r\n\r\n",
        OK + b"A: 1\rB: 2\r\n\r\n",
        OK + b"A: \x00\r\n\r\n",
        OK + b"A: 1\x7f\r\n\r\n",
        OK + b"A\xe4: 1\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
        OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        OK + b"Content-Length: 5, 5\r\n\r\n",
        OK + b"Content-Length: +5\r\n\r\n",
        OK + b"Content-Length: 0x5\r\n\r\n",
        OK + b"Content-Length: 5_0\r\n\r\n",
        OK + b"Content-Length: \r\n\r\n",
        OK + b"Content-Length: 9999999999999999999999\r\n\r\n",
        OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        OK + b"Transfer-Encoding: identity\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(raw: bytes) -> None:
    with pytest.raises(http1.ProtocolError):
        http1.parse_head(raw, "POST")


def test_a_head_without_an_end_is_not_waited_for_for_ever() -> None:
    assert http1.head_end(OK) == -1
    with pytest.raises(http1.ProtocolError):
        http1.head_end(OK + b"A: " + b"x" * http1.HEAD_LIMIT)


_NAME = st.sampled_from([b"Content-Length", b"transfer-encoding", b"Connection", b"X-A", b"A B", b"", b"X\xe4"])
_VALUE = st.one_of(st.sampled_from([b"5", b"chunked", b"close", b"5, 5", b"0"]), st.binary(max_size=6))
_LINE = st.tuples(_NAME, st.sampled_from([b": ", b":", b" :", b"", b":\t"]), _VALUE, st.sampled_from([b"\r\n", b"\n"]))


@given(st.lists(_LINE, max_size=4), st.sampled_from([OK, b"HTTP/1.0 200 \r\n", b"HTTP/1.1 404\r\n"]))
def test_whatever_is_accepted_h11_reads_in_the_same_way(
    lines: list[tuple[bytes, bytes, bytes, bytes]], status: bytes
) -> None:
    raw = status + b"".join(map(b"".join, lines)) + b"\r\n"
    try:
        read = http1.parse_head(raw, "POST")
    except http1.ProtocolError:
        return
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(raw)
    event = connection.next_event()
    assert isinstance(event, h11.Response)
    assert event.status_code == read.status
    assert event.headers.raw_items() == read.fields
    if read.length > 1000:
        return
    if read.length > 0:
        connection.receive_data(b"x" * read.length)
        data = connection.next_event()
        assert isinstance(data, h11.Data)
        assert len(data.data) == read.length
        assert isinstance(connection.next_event(), h11.EndOfMessage)
        return
    connection.receive_data(b"0\r\n\r\n" if read.length == http1.CHUNKED else b"")
    assert isinstance(connection.next_event(), h11.EndOfMessage)


# --- bodies ---


def fed(body: http1.Body, pieces: list[bytes]) -> bytes:
    return body.begin() + b"".join(body.feed(piece) for piece in pieces)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


_CHUNK = st.tuples(st.binary(min_size=1, max_size=40), st.sampled_from([b"", b";a=b", b' ; q="x"', b"0", b"UP"]))


def chunked(chunks: list[tuple[bytes, bytes]], trailers: list[tuple[bytes, bytes]]) -> bytes:
    out = []
    for data, style in chunks:
        size = b"%X" % len(data) if style == b"UP" else b"%x" % len(data)
        out.append((b"0" + size if style == b"0" else size + style.removeprefix(b"UP")) + b"\r\n" + data + b"\r\n")
    return b"".join(out) + b"0\r\n" + b"".join(b"%b: %b\r\n" % t for t in trailers) + b"\r\n"


@given(
    st.lists(_CHUNK, max_size=6),
    st.lists(st.sampled_from([(b"x-sum", b"1"), (b"Set-Cookie", b"a=b"), (b"X-Two", b"")]), max_size=3),
    st.lists(st.integers(0, 1000), max_size=12),
    st.booleans(),
)
def test_chunks_are_the_same_wherever_they_are_cut(
    chunks: list[tuple[bytes, bytes]], trailers: list[tuple[bytes, bytes]], at: list[int], framed: bool
) -> None:
    raw = chunked(chunks, trailers)
    body = http1.ChunkedBody(http1.CHUNKED, framed=framed, drop_trailer=frozenset({b"set-cookie"}))
    out = fed(body, cut(raw, at))
    payload = b"".join(data for data, _ in chunks)
    assert (body.done, body.excess, body.payload_bytes) == (True, False, len(payload))
    if framed:
        kept = [t for t in trailers if t[0] != b"Set-Cookie"]
        assert out == chunked([(data, b"") for data, _ in chunks], kept)
    else:
        assert out == payload
    assert body.feed(b"x") == b""
    assert body.excess


@given(st.binary(max_size=60), st.lists(st.integers(0, 1000), max_size=6), st.booleans(), st.booleans())
def test_bodies_with_a_length_or_with_an_end_are_the_same_wherever_they_are_cut(
    payload: bytes, at: list[int], framed: bool, sized: bool
) -> None:
    length = len(payload) if sized else http1.UNTIL_CLOSE
    body = http1.SizedBody(length, framed=framed) if sized else http1.EndlessBody(length, framed=framed)
    out = fed(body, cut(payload, at))
    if not sized:
        assert not body.done
        out += body.close()
    assert body.done
    if framed:
        again = http1.ChunkedBody(http1.CHUNKED, framed=False)
        out = again.feed(out)
        assert again.done
        assert not again.excess
    assert out == payload


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n",
        b"-5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b"5_0\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5\nhello\r\n",
        b"5\r\nhello\n",
        b"5\r\nhello!\r\n",
        b"5\r\nhellox\r\n",
        b"5\r\nhello\rx",
        b"10000000000000000\r\n",
        b"5;\x00\r\nhello\r\n",
        b"5 x\r\nhello\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\nA : 1\r\n\r\n",
        b"0\r\n folded\r\n\r\n",
        b"0\nA: 1\r\n\r\n",
        b"0\r\n\n",
        b"1" * 5000,
        b"0\r\n" + b"A: %b\r\n" % (b"x" * 4000) * 20,
    ],
)
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_chunks_that_could_be_read_in_two_ways_are_refused(raw: bytes, piece: int) -> None:
    body = http1.ChunkedBody(http1.CHUNKED, framed=True)
    with pytest.raises(http1.ProtocolError):
        for at in range(0, len(raw), piece):
            body.feed(raw[at : at + piece])


def test_an_end_before_the_end_is_an_error() -> None:
    for body in (http1.ChunkedBody(http1.CHUNKED, framed=True), http1.SizedBody(5, framed=False)):
        body.feed(b"4")
        with pytest.raises(http1.ProtocolError, match="within the body"):
            body.close()


def test_connection_options_name_what_belongs_to_one_hop() -> None:
    fields = [(b"Connection", b"close, X-Hop"), (b"X-Hop", b"1"), (b"connection", b" other ")]
    assert http1.connection_options(fields) == {b"close", b"x-hop", b"other"}
