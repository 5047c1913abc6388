"""What a host says of itself: all that it offers, or what has changed since its last word. Read strictly.

`{v, host, boot, seq, full, url, role, drain, version, models: {name: [tier, wait_ms, room, queue, hurt_ms]},
aliases: {alias: name}}`

`boot` is another one with every start of its process, `seq` counts what it sent since; there is no time of the day in
it. In what is not `full`, a model that is null is offered no more, and there are no aliases. Fields that are not known
here are ignored, and so
is what follows in the list of an offer: a version adds fields only, and keeps the old ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import orjson

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION: Final = 1
"""Of records. One of a higher version is shown, and not used."""
MOST_BYTES: Final = 1 << 20
"""Of one message; what NATS takes by default."""
MOST_MODELS: Final = 10_000
_MOST: Final = 10**9
"""Of every number in an offer: eleven days, in milliseconds."""
_NAME_BYTES: Final = 512
HOST: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""A host's name: a label of the domain name system, so that it fits into a subject and a certificate."""
_BOOT: Final = re.compile(r"[0-9a-zA-Z_-]{1,64}")

Role: TypeAlias = Literal["host", "gateway"]


class RecordError(ValueError):
    """What came is no record; says why, and quotes nothing of it."""


class Offer(NamedTuple):
    """What a host would do for a request for one of its models. It sets its own price."""

    tier: str
    """The label of the tier that the request would find."""
    wait_ms: int
    """How long it would wait: queue, wake, and making room."""
    room: int
    """How many such requests it takes at that price."""
    queue: int
    """How many wait."""
    hurt_ms: int
    """What others lose by it."""

    @property
    def price_ms(self) -> int:
        """What counts when offers are compared."""
        return self.wait_ms + self.hurt_ms

    def encoded(self) -> list[Any]:
        """As in a record."""
        return list(self)


@dataclass(frozen=True, slots=True)
class Record:
    """One message of a host's."""

    version: int
    host: str
    boot: str
    seq: int
    full: bool
    url: str
    role: Role
    drain: bool
    release: str
    """The warmpool that sent it; to be shown."""
    models: Mapping[str, list[Any] | None]
    """As they came; `offer` reads one."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of the host's models."""

    @property
    def usable(self) -> bool:
        """Whether it is of a version that is known here."""
        return self.version <= VERSION

    def encoded(self) -> bytes:
        """As it is sent."""
        said = {
            "v": self.version, "host": self.host, "boot": self.boot, "seq": self.seq, "full": self.full,
            "url": self.url, "role": self.role, "drain": self.drain, "version": self.release, "models": self.models,
        }  # fmt: skip
        return orjson.dumps({**said, "aliases": self.aliases} if self.aliases else said)


def parse(data: bytes) -> Record:
    """A message. Raises RecordError."""
    if len(data) > MOST_BYTES:
        raise RecordError(f"over {MOST_BYTES} bytes")
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise RecordError("not JSON") from None
    if not isinstance(found, dict):
        raise RecordError("no object")
    version = _count(found, "v")
    if version < 1:
        raise RecordError("no version")
    record = Record(
        version=version,
        host=_text(found, "host", HOST),
        boot=_text(found, "boot", _BOOT),
        seq=_count(found, "seq"),
        full=_flag(found, "full"),
        url="",
        role="host",
        drain=False,
        release=str(found.get("version", ""))[:40],
        models={},
    )
    if not record.usable:
        return record
    role = found.get("role")
    if role not in ("host", "gateway"):
        raise RecordError("role is neither host nor gateway")
    return Record(
        record.version, record.host, record.boot, record.seq, record.full,
        _url(found.get("url")), role, _flag(found, "drain"), record.release, _models(found.get("models")),
        _aliases(found.get("aliases", {})),
    )  # fmt: skip


def offer(name: str, value: list[Any]) -> Offer:
    """One offer of a record, for the model of this name. Raises RecordError."""
    if not 0 < len(name) <= _NAME_BYTES:
        raise RecordError("a model without a name, or with too long a one")
    if type(value) is not list:
        raise RecordError("an offer that is no list")
    try:
        tier, wait_ms, room, queue, hurt_ms = value[:5]
    except ValueError:
        raise RecordError("an offer with too few values") from None
    if type(tier) is not str or not 0 < len(tier) <= 32 or not tier.isascii():
        raise RecordError("an offer without a tier")
    for number in (wait_ms, room, queue, hurt_ms):
        if type(number) is not int or not 0 <= number <= _MOST:
            raise RecordError("an offer with a number out of its range")
    return Offer(tier, wait_ms, room, queue, hurt_ms)


def _models(found: object) -> Mapping[str, list[Any] | None]:
    if not isinstance(found, dict) or len(found) > MOST_MODELS:
        raise RecordError("no table of models, or too large a one")
    return found


def _aliases(found: object) -> Mapping[str, str]:
    if not isinstance(found, dict) or len(found) > MOST_MODELS:
        raise RecordError("no table of aliases, or too large a one")
    for alias, name in found.items():
        if type(name) is not str or not 0 < len(name) <= _NAME_BYTES or not 0 < len(alias) <= _NAME_BYTES:
            raise RecordError("an alias that is no name")
    return found


def _url(found: object) -> str:
    if not isinstance(found, str) or len(found) > 300 or not found.isascii() or not found.isprintable():
        raise RecordError("no url")
    try:
        parts = urlsplit(found)
        usable = parts.scheme == "https" and parts.hostname and parts.port and parts.netloc == found[8:]
    except ValueError:
        usable = False
    if not usable or "@" in found:
        raise RecordError("the url is not https://HOST:PORT")
    return found


def _count(found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise RecordError(f"{name} is no count")
    return value


def _flag(found: dict[str, Any], name: str) -> bool:
    value = found.get(name)
    if type(value) is not bool:
        raise RecordError(f"{name} is neither true nor false")
    return value


def _text(found: dict[str, Any], name: str, shape: re.Pattern[str]) -> str:
    value = found.get(name)
    if type(value) is not str or not shape.fullmatch(value):
        raise RecordError(f"{name} is not what it may be")
    return value
