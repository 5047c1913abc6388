"""The `.env` of the scripts this project grew from, turned into a configuration.

The file is read as a shell reads it, as far as it only assigns: ``KEY=VALUE``, ``export``, quotes, comments, and
references to keys set earlier in it. Everything else is an error with its line, since a value other than the shell's
would be worse. (Not python-dotenv: it tells bad lines to the log only, does not know ``$NAME``, takes references within
single quotes, and fills what is missing from the environment.)

A key that is not set has the default of the scripts' own setup (github.com/chopratejas/gpu-checkpoint-benchmarks,
setup.sh), so that the engine starts as it did. docs/import-env.md has the table of keys.
"""

from __future__ import annotations

import os
import re
import textwrap
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import tomli_w
from pydantic import ValidationError

from proxy.config.explain import explain
from proxy.config.settings import Settings
from proxy.config.values import format_duration
from proxy.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

DEFAULTS: Final[Mapping[str, str]] = {
    "MAX_MODEL_LEN": "4096",
    "GPU_MEMORY_UTIL": "0.90",
    "VLLM_IMAGE": "docker.io/vllm/vllm-openai:latest",
    "API_PORT": "8000",
    "CHECKPOINT_DIR": "/mnt/checkpoint-ram",
    "NVIDIA_LIBS_PATH": "/opt/nvidia-libs",
    "MODELS_CACHE": "/models",
    "WARMUP_REQUESTS": "5",
    "HEALTH_CHECK_TIMEOUT": "300",
}
"""What the scripts take where the file says nothing."""

NOT_CARRIED: Final[Mapping[str, str]] = {
    "CKPT_PATH": "warmpool keeps an image for each model in pool.checkpoint_dir; "
    "`warmpool checkpoint export` writes one to a file",
    "RESULTS_DIR": "warmpool writes no result files; its measurements are at /metrics and /admin/status",
}
"""Keys without a place in the configuration, and why."""

TOKENS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Secrets that vLLM itself reads, to download models."""

KNOWN: Final = frozenset({"MODEL_ID", "CONT_NAME", *DEFAULTS, *NOT_CARRIED, *TOKENS})

WARMPOOL_ENV: Final[Mapping[str, str]] = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_MQ_MAX_CHUNK_BYTES_MB": "1",
}
"""What the scripts' vLLM was not told, and what makes it fit for sleep and checkpoints in a container."""

_CACHE: Final = "/root/.cache/huggingface"
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(^|_)KEY(_|$)")
_MAX_NAME: Final = 200
_MAX_KEY: Final = 48


@dataclass(frozen=True, slots=True)
class Converted:
    """A configuration, and what the reader of the file should know."""

    toml: str
    """It loads."""
    warnings: tuple[str, ...]
    """One line for each assignment without effect, with its line number."""


def convert(path: Path) -> Converted:
    """The configuration that does what the scripts did with this `.env`.

    Raises ConfigError with every problem found: lines that are not plain assignments, values that cannot be used, a
    missing MODEL_ID.
    """
    found: set[_Problem] = set()
    entries, broken = _parse(_read(path), found)
    values = _Values(entries, broken, found)
    toml = _render(path, values)
    problems = [f"line {line}: {text}" if line else text for line, text in sorted(found)] or _why_not(toml)
    if problems:
        raise ConfigError(str(path), problems)
    return Converted(toml, tuple(values.warnings()))


def write_new(path: Path, toml: str) -> None:
    """Write a configuration to a file of mode 0600, which must not exist. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
        file.write(toml)


# --- the file ---


@dataclass(frozen=True, slots=True)
class Entry:
    """One assignment."""

    name: str
    value: str
    line: int


_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*"
_BLANK: Final = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\n|\Z)")
_KEY: Final = re.compile(rf"[ \t]*(?:export[ \t]+)?({_NAME})=")
_SPACED: Final = re.compile(rf"[ \t]*(?:export[ \t]+)?{_NAME}[ \t]+=")
_END: Final = re.compile(r"(?:[ \t]+#[^\n]*|[ \t]*)(?:\n|\Z)")
_PLAIN: Final = re.compile(r"""[^\s'"\\$`;&|<>(){~]+""")
_SINGLE: Final = re.compile(r"'([^']*)'")
_DOUBLE: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_REFERENCE: Final = re.compile(rf"\$(?:({_NAME})|\{{({_NAME})\}})")
_LONE_DOLLAR: Final = re.compile(r"\$(?=[\s%+,./:=\]^}]|\Z)")
_LONE_DOLLAR_IN_QUOTES: Final = re.compile(r"\$(?=[\s'\\%+,./:=\]^}~]|\Z)")


_Problem: TypeAlias = tuple[int, str]
"""The line where it is, or 0, and what it is."""


class _LineError(Exception):
    """What is wrong with an assignment."""


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError(str(path), ["is not UTF-8 text"]) from None
    if "\0" in text:
        raise ConfigError(str(path), ["is not text: it has a NUL byte"])
    return text


def _parse(text: str, problems: set[_Problem]) -> tuple[list[Entry], set[str]]:
    """The assignments in order, and the names whose value could not be read."""
    entries: list[Entry] = []
    known: dict[str, str] = {}
    broken: set[str] = set()
    at, line = 0, 1
    while at < len(text):
        began = at
        if blank := _BLANK.match(text, at):
            at = blank.end()
        elif key := _KEY.match(text, at):
            try:
                known[key[1]], at = _value(text, key.end(), known, broken)
                entries.append(Entry(key[1], known[key[1]], line))
                broken.discard(key[1])
            except _LineError as error:
                problems.add((line, f"{key[1]}: {error}"))
                broken.add(key[1])
                at = _next_line(text, at)
        else:
            hint = ": no spaces around =" if _SPACED.match(text, at) else ""
            problems.add((line, f"is not KEY=VALUE{hint}"))
            at = _next_line(text, at)
        line += text.count("\n", began, at)
    return entries, broken


def _next_line(text: str, at: int) -> int:
    return text.find("\n", at) + 1 or len(text)


def _value(text: str, at: int, known: Mapping[str, str], broken: Collection[str]) -> tuple[str, int]:
    """The value that begins at `at`, and where the next line begins."""
    parts: list[str] = []
    while True:
        if end := _END.match(text, at):
            return "".join(parts), end.end()
        if match := _PLAIN.match(text, at):
            parts.append(match[0])
        elif match := _SINGLE.match(text, at):
            parts.append(match[1])
        elif match := _DOUBLE.match(text, at):
            parts.append(_in_double_quotes(match[1], known, broken))
        elif match := _ESCAPED.match(text, at):
            parts.append("" if match[1] == "\n" else match[1])
        else:
            part, at = _dollar(text, at, known, broken)
            parts.append(part)
            continue
        at = match.end()


def _in_double_quotes(text: str, known: Mapping[str, str], broken: Collection[str]) -> str:
    """What is left of a double-quoted text: a backslash escapes only what is special there (POSIX, 2.2.3)."""
    parts: list[str] = []
    at = 0
    while at < len(text):
        if lone := _LONE_DOLLAR_IN_QUOTES.match(text, at):
            parts.append("$")
            at = lone.end()
        elif text[at] in "$`":
            part, at = _dollar(text, at, known, broken)
            parts.append(part)
        elif text[at] == "\\" and text[at + 1] in '$`"\\\n':
            parts.append(text[at + 1].strip("\n"))
            at += 2
        else:
            parts.append(text[at])
            at += 1
    return "".join(parts)


def _dollar(text: str, at: int, known: Mapping[str, str], broken: Collection[str]) -> tuple[str, int]:
    """A reference's value and where it ends, or the reason why there is none."""
    if match := _REFERENCE.match(text, at):
        name = match[1] or match[2]
        if name not in known and name not in broken:
            raise _LineError(f"${{{name}}} is not set earlier in this file; write its value")
        return known.get(name, ""), match.end()
    if match := _LONE_DOLLAR.match(text, at):
        return "$", match.end()
    raise _LineError(_why_not_a_value(text[at : at + 2]))


def _why_not_a_value(start: str) -> str:
    match start[0]:
        case "'" | '"':
            return "the quote is not closed"
        case "`":
            return "a command is not carried out; write what it prints"
        case "$" if start == "$(":
            return "a command is not carried out; write what it prints"
        case "$":
            return "of references only ${NAME} and $NAME are understood; write the value"
        case "\\":
            return "ends in a backslash"
        case "~":
            return "~ is not expanded; write the whole path"
        case c if c.isspace():
            return "there is more after the value; put a value with spaces in quotes"
        case c:
            return f"{c} needs quotes"


# --- the values ---


@dataclass(slots=True)
class _Values:
    """The values by key, checked; what is wrong with one goes to `problems`, and a stand-in is returned."""

    entries: list[Entry]
    broken: set[str]
    problems: set[_Problem]
    _set: dict[str, Entry] = field(init=False)

    def __post_init__(self) -> None:
        # As in a shell the last one counts; one that is empty counts as not set.
        self._set = {e.name: e for e in self.entries}
        self._set = {n: e for n, e in self._set.items() if e.value.strip() and n not in self.broken}

    def entry(self, name: str) -> Entry | None:
        return self._set.get(name)

    def origin(self, name: str) -> str:
        """Where its value comes from, for a comment."""
        entry = self.entry(name)
        return f"{name}, line {entry.line}" if entry else f"{name} is not set: the scripts' default"

    def unknown(self) -> list[Entry]:
        """What the scripts do not know, every assignment of it, in the file's order."""
        return [e for e in self.entries if e.name not in KNOWN]

    def warnings(self) -> Iterator[str]:
        """What has no effect, one line each."""
        last = {e.name: e for e in self.entries}
        for e in self.entries:
            if e.name not in KNOWN:
                yield f"line {e.line}: {e.name} is not known; kept as a comment only"
            elif e is not last[e.name]:
                yield f"line {e.line}: {e.name} is set again in line {last[e.name].line}, which counts"

    def secrets(self) -> list[str]:
        """The names of those that others must not read."""
        return sorted({e.name for e in self.entries if e.name in TOKENS or _SECRET.search(e.name.upper())})

    def text(self, name: str) -> str:
        entry = self.entry(name)
        return entry.value.strip() if entry else DEFAULTS.get(name, "")

    def wrong(self, name: str, what: str) -> None:
        entry = self.entry(name)
        assert entry is not None  # noqa: S101 - the defaults are right
        self.problems.add((entry.line, f"{name}: {entry.value!r} {what}"))

    def model_id(self) -> str:
        value = self.text("MODEL_ID")
        if not value:
            if "MODEL_ID" not in self.broken:
                self.problems.add((0, "MODEL_ID is required: the model to serve, such as Qwen/Qwen2-1.5B-Instruct"))
            return "missing"
        if len(value) > _MAX_NAME:
            self.wrong("MODEL_ID", f"is longer than {_MAX_NAME} characters")
        elif not re.fullmatch(r"[^\s{}-][^\s{}]*", value) or not value.isprintable():
            self.wrong("MODEL_ID", "is not the name or path of a model")
        return value

    def image(self) -> str:
        value = self.text("VLLM_IMAGE")
        if re.search(r"\s", value) or not value.isprintable():
            self.wrong("VLLM_IMAGE", "is not the name of a container image")
        return value

    def whole(self, name: str, first: int, last: int) -> int:
        value = self.text(name)
        if not re.fullmatch(r"[0-9]{1,12}", value) or not first <= int(value) <= last:
            self.wrong(name, f"is not a whole number from {first} to {last}")
            return first
        return int(value)

    def fraction(self, name: str) -> str:
        """As it was written."""
        value = self.text(name)
        if not re.fullmatch(r"[0-9]{0,3}(\.[0-9]{1,9})?", value) or not 0 < float(value or 0) <= 1:
            self.wrong(name, "is not a number over 0 and up to 1")
        return value

    def folder(self, name: str) -> str:
        value = self.text(name)
        if not value.startswith("/"):
            self.wrong(name, "is not an absolute path")
        return value.rstrip("/") or "/"

    def model_key(self, model_id: str) -> str:
        """A valid key of a model, like the container's name or else the last part of the model's."""
        name = self.text("CONT_NAME") or model_id.rstrip("/").rpartition("/")[2]
        key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "model"
        return (key if key[0].isalpha() else f"m_{key}")[:_MAX_KEY]


# --- the configuration ---


def _render(path: Path, values: _Values) -> str:
    model_id = values.model_id()
    key = values.model_key(model_id)
    lines = [
        *_head(path, values),
        *_server(values),
        *_pool(values),
        *_model(values, key, model_id),
        *_podman(values, key, model_id),
        *_environment(values, key),
    ]
    return "\n".join(lines) + "\n"


def _head(path: Path, values: _Values) -> Iterator[str]:
    name = _toml(os.fsencode(path.name).decode("utf-8", "replace"))
    yield from _comment(f"Made by `warmpool config import-env` of {name}; comments name the line a value comes from.")
    yield from _comment("docs/import-env.md has the table of keys; config/gpu-load.toml says what the container needs.")
    if secrets := values.secrets():
        yield "#"
        yield from _comment(f"Keep this file to yourself (mode 0600): it holds {', '.join(secrets)}.")
    left_out = [entry for key in NOT_CARRIED if (entry := values.entry(key))]
    if left_out:
        yield from ("#", "# Not carried over:")
        for entry in left_out:
            yield from _comment(f"- {entry.name}, line {entry.line}: {NOT_CARRIED[entry.name]}.")
    if unknown := values.unknown():
        yield from ("#", "# WARNING: not known here, so without effect, and kept as comments only:")
        yield from (f"# - line {e.line}: {_assignment(e.name, e.value)}" for e in unknown)


def _server(values: _Values) -> Iterator[str]:
    yield from ("", "[server]")
    yield from _comment(f"{values.origin('API_PORT')}. Clients reached vLLM there, and reach warmpool there now.")
    yield _assignment("port", values.whole("API_PORT", 1, 65535))
    yield from _comment(
        "The scripts' port was open to the network; this one is not, before you choose another address."
    )
    yield _assignment("host", "127.0.0.1")


def _pool(values: _Values) -> Iterator[str]:
    yield from ("", "[pool]")
    yield from _comment(
        f"{values.origin('CHECKPOINT_DIR')}. A folder of its own in it, since warmpool makes it private and deletes "
        "folders there that are no images."
    )
    yield _assignment("checkpoint_dir", values.folder("CHECKPOINT_DIR").rstrip("/") + "/warmpool")


def _model(values: _Values, key: str, model_id: str) -> Iterator[str]:
    yield ""
    if entry := values.entry("CONT_NAME"):
        name = _toml(entry.value)
        yield from _comment(
            f"The key is {name} (CONT_NAME, line {entry.line}) made valid; containers are warmpool's own."
        )
    yield f"[models.{key}]"
    yield from _comment(f"{values.origin('MODEL_ID')}. Clients call it by this name, as before.")
    yield _assignment("name", model_id)
    yield from _comment(f"{values.origin('HEALTH_CHECK_TIMEOUT')}, in seconds.")
    yield _assignment("start_timeout", format_duration(values.whole("HEALTH_CHECK_TIMEOUT", 1, 999_999)))
    yield from ("", f"[models.{key}.warmup]")
    yield from _comment(f"{values.origin('WARMUP_REQUESTS')}.")
    yield _assignment("requests", values.whole("WARMUP_REQUESTS", 0, 999_999))


def _podman(values: _Values, key: str, model_id: str) -> Iterator[str]:
    yield from ("", f"[models.{key}.podman]")
    yield from _comment(f"{values.origin('VLLM_IMAGE')}. warmpool pulls nothing: `podman pull` it first.")
    yield _assignment("image", values.image())
    yield from _comment("What an image starts by itself depends on its version; this works with all of them.")
    yield f"entrypoint = {_list(['vllm', 'serve'])}"
    yield from _command(values, model_id)
    yield from _comment("With `privileged` all devices are there; those named count where it is false.")
    yield _assignment("privileged", True)
    yield f"devices = {_list(['/dev/nvidia0', '/dev/nvidiactl', '/dev/nvidia-uvm'])}"
    yield f"security_options = {_list(['label=disable'])}"
    yield _assignment("shm_size", "8GiB")
    yield from _volumes(values)


def _command(values: _Values, model_id: str) -> Iterator[str]:
    length = str(values.whole("MAX_MODEL_LEN", 1, 999_999_999))
    share = values.fraction("GPU_MEMORY_UTIL")
    yield "command = ["
    yield f"    {_toml(model_id)},  # {values.origin('MODEL_ID')}"
    yield '    "--served-model-name", "{model}",'
    yield '    "--host", "{host}", "--port", "{port}",  # chosen by warmpool'
    yield f'    "--max-model-len", {_toml(length)},  # {values.origin("MAX_MODEL_LEN")}'
    yield "    # --kv-cache-memory-bytes with a number of bytes instead keeps images small."
    yield f'    "--gpu-memory-utilization", {_toml(share)},  # {values.origin("GPU_MEMORY_UTIL")}'
    yield '    "--enforce-eager",  # not needed with driver 580; the first token comes faster without'
    yield '    "--load-format", "safetensors",  # keeps the weights in the page cache, where a wake finds them'
    yield '    "--trust-remote-code",  # runs code that comes with the model: leave it out unless yours needs it'
    yield '    "--enable-sleep-mode",  # new: the tiers of warmpool begin with it'
    yield "]"


def _volumes(values: _Values) -> Iterator[str]:
    libraries, cache = values.folder("NVIDIA_LIBS_PATH"), values.folder("MODELS_CACHE")
    yield "volumes = ["
    yield f"    # {values.origin('NVIDIA_LIBS_PATH')}. Neither it nor LD_LIBRARY_PATH is needed with a CDI device"
    yield "    # (nvidia.com/gpu=0), which brings the driver's libraries along."
    yield f"    {{ source = {_toml(libraries)}, target = {_toml(libraries)} }},"
    yield f"    # {values.origin('MODELS_CACHE')}. Writable, for downloads."
    yield f"    {{ source = {_toml(cache)}, target = {_toml(_CACHE)}, writable = true }},"
    yield "]"


def _environment(values: _Values, key: str) -> Iterator[str]:
    yield from ("", f"[models.{key}.podman.env]")
    yield _assignment("LD_LIBRARY_PATH", values.folder("NVIDIA_LIBS_PATH"))
    yield from _comment("New: the endpoints for sleep; sockets on loopback, which every restore has; smaller images.")
    yield from (_assignment(name, value) for name, value in WARMPOOL_ENV.items())
    for name in TOKENS:
        if entry := values.entry(name):
            yield from _comment(f"{values.origin(name)}.")
            yield _assignment(name, entry.value)


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False):
        yield f"# {line}"


def _assignment(name: str, value: str | int | bool) -> str:
    return tomli_w.dumps({name: value}).rstrip("\n")


def _toml(text: str) -> str:
    return _assignment("_", text).removeprefix("_ = ")


def _list(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(_toml, texts))}]"


class _FileOnly(Settings):
    """Settings without the environment, which may be another one when the file is used."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _why_not(toml: str) -> list[str]:
    """Why a text is not a configuration, one line each; nothing where it is one."""
    try:
        _FileOnly(**tomllib.loads(toml))
    except ValidationError as error:
        return [explain(e).text for e in error.errors()]
    return []
