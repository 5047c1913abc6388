"""API keys: a file of salted hashes, and what each key may do.

A key is ``wp_ID_SECRET``; SECRET is 32 random bytes. The file has SHA-256 of a salt and the key. A slow hash such as
scrypt makes guessing expensive where secrets can be guessed; 256 random bits cannot, at any speed, and the check is
made with every request: it takes about 3 µs. ID finds the entry, so that the work does not grow with the number of
keys, and the digests are compared in constant time; a key whose ID is unknown takes the same way.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import tomlkit
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from proxy.config.explain import sentence
from proxy.errors import ConfigError
from proxy.host import private_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

PREFIX: Final = "wp_"
TOKEN_MIN_LENGTH: Final = 32
PRIORITIES: Final = {"low": -1, "normal": 0, "high": 1}
_KEY = re.compile(r"wp_([a-z2-7]{8})_[A-Za-z0-9_-]{43}")
_HEAD = "# Written by `warmpool key`. Limits may be edited; they are in force after SIGHUP.\n\n"

PerMinute = Annotated[int, Field(ge=1)]
PerDay = Annotated[int, Field(ge=1, le=10**15)]


class Entry(BaseModel):
    """One key of the file: what it is known by and what it may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$")]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    models: list[str] | None = None
    """Names of models; None: all."""
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    tokens_per_day: PerDay | None = None
    gpu_seconds_per_day: PerDay | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    priority: Literal["low", "normal", "high"] = "normal"

    @property
    def has_budget(self) -> bool:
        """Whether what it may use in a day is limited."""
        return self.tokens_per_day is not None or self.gpu_seconds_per_day is not None

    def matches(self, key: str) -> bool:
        """Whether this is the entry of `key`; in constant time."""
        return hmac.compare_digest(_digest(self.salt, key), self.sha256)


_NO_SECRET_CHARACTERS: Final = 12
"""No key or token is so short."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: dict[Annotated[str, Field(pattern=r"^[a-z2-7]{8}$")], Entry] = {}


_NOBODY = Entry(name="nobody", salt="0" * 32, sha256="0" * 64, created=dt.datetime(2000, 1, 1, tzinfo=dt.UTC))


class Keys:
    """The entries of a file, by id."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)

    def find(self, key: str) -> tuple[str, Entry] | None:
        """Id and entry of a key, whether expired or not; None for one that is not in the file."""
        match = _KEY.fullmatch(key)
        id_ = match[1] if match is not None else ""
        entry = self._entries.get(id_, _NOBODY)
        return (id_, entry) if entry.matches(key) and entry is not _NOBODY else None

    def entries(self) -> Mapping[str, Entry]:
        """All, in the order of the file."""
        return self._entries


def read(path: Path) -> Keys:
    """The keys of a file. Raises ConfigError with every problem: its mode, its owner, its syntax, each key."""
    text = private_files.read(path, "set the mode with chmod 600, or make it with `warmpool key new`")
    try:
        return Keys(_File.model_validate(tomllib.loads(text)).keys)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), [f"is not TOML: {error}"]) from None
    except ValidationError as error:
        # No value, and no long name that is none of ours: either may be a secret in the wrong place.
        raise ConfigError(
            str(path), [f"{'.'.join(map(_name_in, e['loc'])) or '(whole file)'}: {sentence(e)}" for e in error.errors()]
        ) from None


def _name_in(part: int | str) -> str:
    text = str(part)
    return text if text in Entry.model_fields or len(text) <= _NO_SECRET_CHARACTERS else "…"


def read_token(path: Path) -> bytes:
    """The admin token of a file. Raises ConfigError."""
    token = private_files.read(path, "set the mode with chmod 600, or make it with `warmpool key admin-token`").strip()
    if len(token) < TOKEN_MIN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            str(path),
            [f"must have one word of {TOKEN_MIN_LENGTH} or more characters; `warmpool key admin-token` makes one"],
        )
    return token.encode()


def generate(name: str, **limits: Any) -> tuple[str, str, Entry]:
    """A new key: its id, the key itself, which nothing keeps, and the entry for the file.

    `limits` are fields of `Entry`. Raises pydantic's ValidationError.
    """
    id_ = base64.b32encode(secrets.token_bytes(5)).decode().lower()
    key = f"{PREFIX}{id_}_{secrets.token_urlsafe(32)}"
    salt = secrets.token_hex(16)
    created = dt.datetime.now(dt.UTC).replace(microsecond=0)
    return id_, key, Entry(name=name, salt=salt, sha256=_digest(salt, key), created=created, **limits)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[dict[str, Entry]]:
    """The entries of a file to change, by id; written when the block ends without an error, mode 0600 if it is new.

    One at a time over all processes; a reader sees the old file or the new one. Raises ConfigError.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(str(path), [f"{path.parent}: {error.strerror}"]) from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = dict(read(path).entries()) if path.exists() else {}
        entries = dict(before)
        yield entries
        text = path.read_text(encoding="utf-8") if before or path.exists() else _HEAD
        private_files.write(path, _changed(text, before, entries))
    finally:
        os.close(folder)


def _changed(text: str, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> str:
    """The file's text with entries added, replaced and taken out; all else stays as it was written, comments too."""
    document = tomlkit.parse(text)
    keys = document.setdefault("keys", tomlkit.table(is_super_table=True))
    for id_ in before.keys() - after.keys():
        del keys[id_]
    for id_, entry in after.items():
        if before.get(id_) != entry:
            keys[id_] = entry.model_dump(exclude_none=True)
    return tomlkit.dumps(document)


def _digest(salt: str, key: str) -> str:
    # What a client shows as a key need not be UTF-8.
    return hashlib.sha256(salt.encode() + key.encode("utf-8", "surrogateescape")).hexdigest()
