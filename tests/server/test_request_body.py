"""Bodies in content codings, and JSON that begins with a byte order mark."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import json
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import zstandard

from proxy.errors import BodyTooLargeError, InvalidRequestError
from proxy.server.request_body import decoded
from tests.scripted import QUESTION, Scripted, answer_of, post
from tests.server.test_http import error_of

if TYPE_CHECKING:
    from collections.abc import Callable

CODED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip of two members": ("x-gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "deflate": ("Deflate", zlib.compress),
    "deflate without its header": ("deflate", lambda data: zlib.compress(data, wbits=-15)),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress),
    "zstd without its length": ("zstd", lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data)),
    "zstd of two frames": (
        "zstd",
        lambda data: zstandard.compress(data[:9]) + zstandard.compress(data[9:]),
    ),
    "nothing": ("identity, ", lambda data: data),
}


@pytest.mark.parametrize("coding", CODED)
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_coded_body_reaches_the_engine_decoded(coding: str, *, chunked: bool) -> None:
    name, encode = CODED[coding]
    data = encode(QUESTION)
    request = post(data, f"Content-Encoding: {name}", "Connection: close")
    if chunked:
        length = b"Content-Length: %d" % len(data)
        request = request.replace(length, b"Transfer-Encoding: chunked").removesuffix(data)
        request += b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (5, data[:5], len(data) - 5, data[5:])
    async with Scripted() as proxy:
        status, _, _, _ = answer_of(await proxy.ask(request))
        assert status == 200
        [(head, body)] = proxy.peers[0].requests
        assert body == QUESTION
        assert b"content-encoding" not in head.lower()


@pytest.mark.parametrize("name", ["br", "gzip, gzip", "br, gzip", "compress", "none", "*"])
async def test_a_coding_that_is_not_known_is_refused_with_those_that_are(name: str) -> None:
    head = post(QUESTION, f"Content-Encoding: {name}", "Connection: close", "Expect: 100-continue")
    async with Scripted() as proxy:
        status, fields, body, _ = answer_of(await proxy.ask(head.removesuffix(QUESTION)))  # and before it is sent
        assert (status, fields["accept-encoding"]) == (415, "gzip, x-gzip, deflate, zstd, identity")
        assert error_of(body)["code"] == "unsupported_content_encoding"
        assert proxy.peers == []


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
async def test_what_is_not_coded_as_it_says_is_refused(coding: str) -> None:
    good = CODED[coding][1](QUESTION)
    async with Scripted() as proxy:
        for data in (QUESTION, good[:-6], good + b"x", b"\x00"):
            raw = await proxy.ask(post(data, f"Content-Encoding: {coding}", "Connection: close"))
            assert answer_of(raw)[0] == 400, data


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
async def test_a_bomb_is_bounded_while_it_is_decoded(coding: str) -> None:
    bomb = CODED[coding][1](bytes(64 << 20))
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLargeError):
            await decoded(bomb, coding, 1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
async def test_others_are_served_while_a_body_is_decoded(coding: str) -> None:
    size = 8 << 20
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert len(await decoded(CODED[coding][1](bytes(size)), coding, size)) == size
    task.cancel()
    assert turns >= 30


async def test_nothing_of_a_damaged_body_is_taken() -> None:
    damaged = bytearray(gzip.compress(QUESTION))
    damaged[-8] ^= 1  # its checksum
    with pytest.raises(InvalidRequestError):
        await decoded(bytes(damaged), "gzip", 1 << 20)


@pytest.mark.parametrize("above", [False, True])
async def test_a_byte_order_mark_is_read_over_and_goes_on(*, above: bool) -> None:
    body = codecs.BOM_UTF8 + QUESTION
    assert json.loads(body) == orjson.loads(QUESTION), "as vLLM's server reads it"
    more = ["TE: trailers"] if above else []
    async with Scripted(aliases=["alias"]) as proxy:
        await proxy.ask(post(QUESTION, "Connection: close"))
        for sent, came in (
            (body, body),
            (body.replace(b"demo", b"alias"), body),
            # edited, since the name is there twice
            (body.replace(b'{"model"', b'{"model":"x","model"'), body.replace(b'{"model"', b'{"model":"demo","model"')),
        ):
            status, *_ = answer_of(await proxy.ask(post(sent, "Connection: close", *more)))
            assert status == 200
            assert proxy.peers[-1].requests[-1][1] == came


async def test_a_mark_alone_is_no_json() -> None:
    async with Scripted() as proxy:
        answers: list[Any] = [
            answer_of(await proxy.ask(post(codecs.BOM_UTF8 + rest, "Connection: close")))
            for rest in (b"", codecs.BOM_UTF8 + QUESTION)
        ]
        assert [status for status, *_ in answers] == [400, 400]
