"""Changes to the text of a JSON object that leave every other byte of it as it came.

Writing an object anew would lose what a reader has no room for: integers beyond 64 bits, names that occur twice, the
way a number is spelled. So the pairs of the outermost object are found in the text, and only theirs is changed.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from proxy.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_MOST_PAIRS: Final = 5000
"""A step of Python each: an object with more of them would hold the event loop."""
_MARK: Final = codecs.BOM_UTF8[:1]
_SPACE: Final = re.compile(r"[ \t\r\n]*")
# Python's scanner says where a value ends, and is written in C; what it makes of numbers is of no use here.
_SCAN: Final = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode
_STRING: Final = re.compile(rb'[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*")')
_SPELLED: Final = re.compile(rb"\\u00(?:3[0-9]|[4-7][0-9a-fA-F])")
"""A letter, digit or underscore written as an escape: nobody does without a reason."""


@dataclass(frozen=True, slots=True)
class _Pair:
    name: str
    begins: int
    """Where its name does."""
    value_begins: int
    value_ends: int


def parsed(body: bytes) -> dict[str, Any]:
    """The object of a body. Raises InvalidRequestError for what is none."""
    try:
        # vLLM's server reads over such a mark, as `json.loads` of bytes does.
        fields = orjson.loads(body if body[:1] != _MARK else body.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"The body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise InvalidRequestError("The body must be a JSON object.")
    return fields


def may_repeat(body: bytes, names: Collection[str]) -> bool:
    """Whether the text of an object may have one of the names more than once; quickly, and without saying where."""
    return any(body.count(b'"%b"' % name.encode()) > 1 for name in names) or _spelled(body)


def names_one_model(body: bytes) -> bool:
    """Whether the text of an object surely has the name `model` at most once, as nearly every one; quicker still."""
    return body.count(b'"model"') < 2 and (b"\\" not in body or b"\\u00" not in body)


def replaced(body: bytes, name: str, value: str) -> bytes:
    """The body with another string in the pair `name` of the outermost object, which has a string there.

    For a name that may not repeat: the only text like it is that pair's. Many times faster than `edited`.
    """
    match = _STRING.match(body, body.index(b'"%b"' % name.encode()) + len(name.encode()) + 2)
    assert match is not None  # noqa: S101 - there is one
    return body[: match.start(1)] + orjson.dumps(value) + body[match.end() :]


def shaped(
    body: bytes, values: Mapping[str, Any], removed: Collection[str], unified: Collection[str], *, named: bool
) -> bytes:
    """The body as its engine gets it, by the quickest way; as `edited` makes it. `named`: it has a string `model`."""
    repeated = may_repeat(body, unified)
    if named and values.keys() == {"model"} and not removed and not repeated:
        return replaced(body, "model", values["model"])
    if values or removed or repeated:
        return edited(body, values, removed, unified)
    return body


def edited(body: bytes, values: Mapping[str, Any], removed: Collection[str], unified: Collection[str]) -> bytes:
    """The body, one valid JSON object, with pairs of the outermost object changed.

    `values` are put in place of what there is, or first; `removed` are taken out. Where a name of `unified` occurs more
    than once, each gets the last value, which is the one that was checked: parsers differ in which of them counts.
    Raises InvalidRequestError for what nobody would send: thousands of pairs, or values nested a thousand deep.
    """
    if body.startswith(codecs.BOM_UTF8):
        return codecs.BOM_UTF8 + edited(body.removeprefix(codecs.BOM_UTF8), values, removed, unified)
    pairs = list(_pairs(body))
    last = {pair.name: body[pair.value_begins : pair.value_ends] for pair in pairs}
    texts = {name: last[name] for name in unified if name in last}
    texts |= {name: orjson.dumps(value) for name, value in values.items()}
    out = [b",".join(orjson.dumps(name) + b":" + texts[name] for name in values if name not in last)]
    for index, pair in enumerate(pairs):
        if pair.name in removed:
            continue
        if any(out):
            out.append(body[pairs[index - 1].value_ends : pair.begins] if index else b",")
        out.append(body[pair.begins : pair.value_begins])
        out.append(texts.get(pair.name) or body[pair.value_begins : pair.value_ends])
    begins = pairs[0].begins if pairs else body.index(b"{") + 1
    ends = pairs[-1].value_ends if pairs else body.rindex(b"}")
    return b"".join([body[:begins], *out, body[ends:]])


def _pairs(body: bytes) -> Iterator[_Pair]:
    text = body.decode("latin-1")  # one character a byte, and what structures JSON is ASCII
    at = _after_space(text, _after_space(text, 0) + 1)
    for _ in range(_MOST_PAIRS):
        if text[at] == "}":
            return
        try:
            _, name_ends = _SCAN(text, at)
            value_begins = _after_space(text, _after_space(text, name_ends) + 1)
            _, value_ends = _SCAN(text, value_begins)
        except RecursionError:
            raise InvalidRequestError("The body is nested too deep.") from None
        yield _Pair(orjson.loads(body[at:name_ends]), at, value_begins, value_ends)
        at = _after_space(text, value_ends)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    raise InvalidRequestError(f"The body has more than {_MOST_PAIRS} fields.")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # noqa: S101 - it matches nothing too
    return match.end()


def _spelled(body: bytes) -> bool:
    # The first is many times faster than the second, and enough for a body that is one large picture.
    return b"\\" in body and b"\\u00" in body and _SPELLED.search(body) is not None
