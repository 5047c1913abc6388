"""A line that starts an engine turned into a model's table: `vllm serve`, `podman run`, `docker run`, another server's.

warmpool chooses the address, so `--host` and `--port` of the line are replaced; the name that clients use stays. What
the line asks for and warmpool has no setting for is an error, since an engine without it would be another one. What
only says how to start it (`--rm`, `-d`, `--restart`) is left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

from proxy.config.document import ENGINE_TABLES
from proxy.config.import_env import WARMPOOL_ENV
from proxy.errors import WarmpoolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_MAX_KEY: Final = 48
_API_SERVER: Final = "vllm.entrypoints.openai.api_server"
_NAME_OPTIONS: Final = ("--served-model-name", "--alias", "--model", "--model-path", "--model-id")
_UNITS: Final[Mapping[str, str]] = {"": "B", "b": "B", "k": "KiB", "m": "MiB", "g": "GiB", "t": "TiB"}

_IGNORED_FLAGS: Final = frozenset(
    {"--detach", "--interactive", "--tty", "--rm", "--init", "--replace", "--quiet", "--publish-all", "--sig-proxy",
     "--no-healthcheck", "--oom-kill-disable"}
)  # fmt: skip
_IGNORED: Final = frozenset(
    {"--restart", "--pull", "--label", "--hostname", "--log-driver", "--log-opt", "--cidfile", "--pidfile",
     "--conmon-pidfile", "--stop-timeout", "--stop-signal", "--health-cmd", "--health-interval", "--health-retries",
     "--health-start-period", "--health-timeout", "--platform", "--annotation", "--tz", "--cgroups"}
)  # fmt: skip
_TAKEN: Final = frozenset(
    {"--name", "--volume", "--mount", "--env", "--env-file", "--publish", "--device", "--gpus", "--runtime",
     "--shm-size", "--memory", "--ulimit", "--pids-limit", "--security-opt", "--network", "--ipc", "--entrypoint"}
)  # fmt: skip
_SHORT: Final[Mapping[str, str]] = {
    "-v": "--volume", "-e": "--env", "-p": "--publish", "-m": "--memory", "-l": "--label", "-h": "--hostname",
    "--net": "--network",
}  # fmt: skip
_SHORT_FLAGS: Final = re.compile(r"-[ditqP]+")


class LineError(WarmpoolError):
    """A line that cannot be turned into a model; the text says why."""


@dataclass(slots=True)
class EngineLine:
    """What a line says."""

    table: dict[str, Any] = field(default_factory=dict)
    """The model's table of the configuration."""
    key_hint: str = ""
    """What the key may be made of."""
    notes: list[str] = field(default_factory=list)
    """What became of parts of the line, for the one who wrote it."""

    @property
    def engine(self) -> dict[str, Any]:
        """Its table `process` or `podman`."""
        found: dict[str, Any] = next(self.table[name] for name in ENGINE_TABLES if name in self.table)
        return found


def parse(line: Sequence[str], *, environment: Mapping[str, str], folder: Path, gpu: bool) -> EngineLine:
    """The model that a command line starts; `folder`: where it is written, `gpu`: whether this host has an NVIDIA one.

    Raises LineError.
    """
    words = list(line)
    assigned: dict[str, str] = {}
    while words and (words[0] in ("sudo", "env", "exec", "nohup") or _ASSIGNMENT.fullmatch(words[0])):
        if "=" in words[0]:
            name, _, value = words[0].partition("=")
            assigned[name] = value
        del words[0]
    if not words:
        raise LineError("there is no command in it: give the line that starts the engine after --")
    program = PurePath(words[0]).name
    if program in ("podman", "docker"):
        if assigned:
            raise LineError(
                f"{', '.join(assigned)} would be set for {program} only: give variables to the engine by --env"
            )
        words = words[2:] if words[1:2] == ["container"] else words[1:]
        if words[:1] != ["run"]:
            raise LineError(f"only `{program} run` starts an engine, not `{' '.join([program, *words[:1]])}`")
        return _container(words[1:], program, environment, folder)
    return _process(words, assigned, folder, gpu=gpu)


def key_of(name: str) -> str:
    """A valid key of a model, made of a name."""
    key = re.sub(r"[^a-z0-9]+", "_", name.rstrip("/").rpartition("/")[2].lower()).strip("_") or "model"
    return (key if key[0].isalpha() else f"m_{key}")[:_MAX_KEY].rstrip("_")


# --- a local process ---


def _process(words: list[str], assigned: Mapping[str, str], folder: Path, *, gpu: bool) -> EngineLine:
    found = EngineLine()
    engine: dict[str, Any] = {}
    found.table["process"] = engine
    _engine_words(found, engine, words, "", dict(assigned), gpu=gpu)
    if any(word[:1] not in ("-", "/", "{") and (folder / word).exists() for word in engine["command"]):
        engine["cwd"] = str(folder)
    weights = Path(found.key_hint)
    if weights.is_absolute() and any(weights.glob("*.safetensors")):
        found.table["weights"] = [str(weights)]
    return found


def _engine_words(
    found: EngineLine, engine: dict[str, Any], words: list[str], image: str, env: dict[str, str], *, gpu: bool
) -> None:
    """Fill in name, command and environment from the words that the engine gets."""
    head, rest = _split(words)
    vllm = bool(head) or "vllm" in PurePath(image).name or PurePath(image).name.startswith("vllm")
    options = _Options(rest)
    if "--uds" in options:
        raise LineError("--uds: warmpool reaches engines by a port; leave it out")
    command = _vllm(found, options, env, gpu=gpu) if vllm else _other(found, options)
    engine["command"] = [*head, *command]
    if env:
        engine["env"] = env


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words up to the arguments of vLLM's server, and these; nothing and all of them where it is not named."""
    for index, word in enumerate(words):
        if PurePath(word).name == "vllm":
            if list(words[index + 1 : index + 2]) != ["serve"]:
                raise LineError("of vLLM only `vllm serve` is a server")
            return list(words[: index + 2]), list(words[index + 2 :])
        if word == _API_SERVER:
            return list(words[: index + 1]), list(words[index + 1 :])
    return [], list(words)


def _vllm(found: EngineLine, options: _Options, env: dict[str, str], *, gpu: bool) -> list[str]:
    names = options.take_all("--served-model-name")
    options.take("--host")
    port, key = options.take("--port"), options.take("--api-key") or env.get("VLLM_API_KEY")
    first = options.words[0] if options.words and not options.words[0].startswith("-") else None
    model = first or options.value("--model")
    if not model:
        raise LineError("which model? vLLM's line names it behind `serve`, or by --model")
    found.key_hint = model
    _name(found, names or [model])
    several = options.value("--tensor-parallel-size") or "1"
    if several.isdecimal() and int(several) > 1:
        found.table.setdefault("gpus", [*range(int(several))])
    if key:
        found.table["api_key"] = env["VLLM_API_KEY"] = key
        found.notes.append("the engine's API key stays between warmpool and it; clients do not need it")
    if port:
        found.notes.append(f"port {port} is not used: clients reach the model at warmpool's")
    words = [*options.words, "--served-model-name", "{model}", "--host", "{host}", "--port", "{port}"]
    if gpu and "--enable-sleep-mode" not in options:
        words.append("--enable-sleep-mode")
        found.notes.append("added --enable-sleep-mode: asleep, it gives the GPU's memory back within a second")
    fit = WARMPOOL_ENV if "podman" in found.table else {"VLLM_SERVER_DEV_MODE": "1"}
    for name, value in fit.items():
        if gpu or name != "VLLM_SERVER_DEV_MODE":
            env.setdefault(name, value)
    return words


def _other(found: EngineLine, options: _Options) -> list[str]:
    if "--port" not in options:
        raise LineError(
            "no --port in it: warmpool has to tell the engine where to listen. A line of `vllm serve`, `podman run` or "
            "`docker run`, or of another server with --port, is needed"
        )
    name = next((value for option in _NAME_OPTIONS if (value := options.value(option))), None)
    if name is None:
        raise LineError(f"what is the model called? None of {', '.join(_NAME_OPTIONS)} is in it")
    options.replace("--port", "{port}")
    options.replace("--host", "{host}")
    found.key_hint = name
    found.table["engine"] = "generic"
    _name(found, [name])
    return options.words


def _name(found: EngineLine, names: Sequence[str]) -> None:
    found.table = {"name": names[0], **({"aliases": [*names[1:]]} if names[1:] else {}), **found.table}


class _Options:
    """Arguments of a server: `--name value`, `--name=value`; `_` is as good as `-`, as for vLLM."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    def _at(self, option: str) -> int | None:
        for index, word in enumerate(self.words):
            if word.startswith("--") and word.partition("=")[0].replace("_", "-") == option:
                return index
        return None

    def __contains__(self, option: str) -> bool:
        return self._at(option) is not None

    def value(self, option: str) -> str | None:
        """What it is set to, if it is."""
        if (index := self._at(option)) is None:
            return None
        name, equals, value = self.words[index].partition("=")
        if equals:
            return value
        if index + 1 == len(self.words) or self.words[index + 1].startswith("--"):
            raise LineError(f"{name} has no value")
        return self.words[index + 1]

    def take(self, option: str) -> str | None:
        """What it is set to; it is gone then."""
        value = self.value(option)
        if (index := self._at(option)) is not None:
            del self.words[index : index + (1 if "=" in self.words[index] else 2)]
        return value

    def take_all(self, option: str) -> list[str]:
        """The same of one that has several values, one behind another."""
        value, index = self.value(option), self._at(option)
        if value is None or index is None:
            return []
        if "=" in self.words[index]:
            del self.words[index]
            return [value]
        end = index + 1
        while end < len(self.words) and not self.words[end].startswith("-"):
            end += 1
        taken = self.words[index + 1 : end]
        del self.words[index:end]
        return taken

    def replace(self, option: str, value: str) -> None:
        """Set it to another value, where it is set."""
        if (index := self._at(option)) is None:
            return
        self.value(option)
        name, equals, _ = self.words[index].partition("=")
        if equals:
            self.words[index] = f"{name}={value}"
        else:
            self.words[index + 1] = value


# --- a container ---


def _container(words: list[str], program: str, environment: Mapping[str, str], folder: Path) -> EngineLine:
    given, image, arguments = _run_options(words, program)
    found = EngineLine()
    engine: dict[str, Any] = {"image": _full_name(image) if program == "docker" else image}
    found.table["podman"] = engine
    if "--privileged" in given:
        engine["privileged"] = True
    devices = [
        *given.get("--device", ()),
        *(device for text in given.get("--gpus", ()) for device in _gpus(text, found)),
    ]
    if "nvidia" in given.get("--runtime", ()) and not devices:
        devices = ["nvidia.com/gpu=all"]
    if devices:
        engine["devices"] = devices
    entrypoint = given.get("--entrypoint")
    if entrypoint:
        engine["entrypoint"] = _entrypoint(entrypoint[-1])
    env = _variables(given, environment, found, folder)
    gpu = engine.get("privileged", False) or any("nvidia" in device for device in devices)
    ports = [text.rpartition(":")[2].partition("/")[0] for text in given.get("--publish", ())]
    inside = _Options(arguments).value("--port") or (ports[0] if ports else None)
    if inside is not None:
        if not inside.isdecimal():
            raise LineError(f"{inside} is no port")
        engine["container_port"] = int(inside)
    _engine_words(found, engine, [*engine.get("entrypoint", ()), *arguments], image, env, gpu=gpu)
    if "entrypoint" in engine:
        del engine["command"][: len(engine["entrypoint"])]
    _limits(given, engine, found)
    if volumes := [_volume(text, folder) for text in given.get("--volume", ())] + [
        _mounted(text, folder) for text in given.get("--mount", ())
    ]:
        engine["volumes"] = volumes
    found.key_hint = (given.get("--name") or [found.key_hint])[-1]
    return found


def _run_options(words: Sequence[str], program: str) -> tuple[dict[str, list[str]], str, list[str]]:
    """The options of `podman run` with their values, the image, and what follows it."""
    given: dict[str, list[str]] = {}
    index = 0
    while index < len(words) and words[index].startswith("-"):
        word = words[index]
        index += 1
        if _SHORT_FLAGS.fullmatch(word):
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--") and len(name) > 2 and name[:2] in _SHORT:  # -p8000:8000
            name, equals, value = word[:2], "=", word[2:].removeprefix("=")
        name = _SHORT.get(name, name)
        if name in _IGNORED_FLAGS:
            continue
        if name == "--privileged":
            if value != "false":
                given[name] = []
            continue
        if name not in _IGNORED | _TAKEN:
            raise LineError(
                f"{name}: warmpool has no setting for it; leave it out, or put it into a container image of your own"
            )
        if not equals:
            if index == len(words):
                raise LineError(f"{name} has no value")
            value = words[index]
            index += 1
        given.setdefault(name, []).append(value)
    if index == len(words):
        raise LineError(f"`{program} run` names no container image")
    return given, words[index], [*words[index + 1 :]]


def _full_name(image: str) -> str:
    """As docker understands it: what names no registry is of Docker Hub."""
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return image
    return f"docker.io/{image}" if slash else f"docker.io/library/{image}"


def _gpus(text: str, found: EngineLine) -> list[str]:
    text = text.strip('"')
    if text == "all":
        return ["nvidia.com/gpu=all"]
    if text.isdecimal() and int(text):
        numbers = [str(number) for number in range(int(text))]
    elif text.startswith("device="):
        numbers = text.removeprefix("device=").split(",")
    else:
        raise LineError(f'--gpus {text}: all, a number or "device=0,1" is understood')
    if all(number.isdecimal() for number in numbers) and numbers != ["0"]:
        found.table["gpus"] = [int(number) for number in numbers]
    return [f"nvidia.com/gpu={number}" for number in numbers]


def _entrypoint(text: str) -> list[str]:
    if text.startswith("["):
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise LineError("--entrypoint: a program, or a JSON list of texts")
        return words
    return [text] if text else []


def _variables(
    given: Mapping[str, list[str]], environment: Mapping[str, str], found: EngineLine, folder: Path
) -> dict[str, str]:
    texts: list[str] = []
    for name in given.get("--env-file", ()):
        try:
            lines = (folder / name).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LineError(f"--env-file {name}: cannot be read: {error}") from None
        texts += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    env: dict[str, str] = {}
    for text in [*texts, *given.get("--env", ())]:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise LineError(f"--env: {name!r} is no name of a variable")
        if equals:
            env[name] = value
        elif name in environment:
            env[name] = f"{{env:{name}}}"
            found.notes.append(f"{name} is taken from warmpool's own environment, which has to have it")
        else:
            found.notes.append(f"{name} is not set here, and so not for the engine")
    return env


def _limits(given: Mapping[str, list[str]], engine: dict[str, Any], found: EngineLine) -> None:
    for option, key in (("--shm-size", "shm_size"), ("--memory", "memory_limit")):
        if option in given:
            engine[key] = _size(option, given[option][-1])
    if "host" in given.get("--ipc", ()):
        engine.setdefault("shm_size", "8GiB")
        found.notes.append(f"--ipc host: an engine's shared memory is its own here, {engine['shm_size']} at most")
    if "--ulimit" in given:
        engine["ulimits"] = {name: limit for name, _, limit in (text.partition("=") for text in given["--ulimit"])}
    if "--pids-limit" in given:
        limit = given["--pids-limit"][-1]
        if not re.fullmatch(r"-1|[0-9]+", limit):
            raise LineError(f"--pids-limit {limit}: a number is needed")
        engine["pids_limit"] = int(limit) or -1
    if "--network" in given:
        engine["network"] = given["--network"][-1]
    further = []
    for text in given.get("--security-opt", ()):
        name, _, value = text.partition("=")
        if name != "seccomp":
            further.append(text)
        elif value.startswith("/"):
            engine["seccomp"] = value
        else:
            found.notes.append(f"--security-opt {text}: left out; io_uring is forbidden, which a checkpoint needs")
    if further:
        engine["security_options"] = further


def _size(option: str, text: str) -> str:
    """podman's sizes, which are powers of 1024, in ours."""
    match = re.fullmatch(r"(\d+)([bkmgt]?)(?:i?b)?", text.lower())
    if match is None:
        raise LineError(f"{option} {text}: a size such as 8g is needed")
    return f"{match[1]}{_UNITS[match[2]]}"


def _volume(text: str, folder: Path) -> str:
    source, colon, rest = text.partition(":")
    if not colon:
        raise LineError(f"--volume {text}: a volume without a source is lost with its container; name a folder")
    if source.startswith("~"):
        source = str(Path(source).expanduser())
    if source.startswith("."):
        source = str((folder / source).resolve())
    return f"{source}:{rest}"


def _mounted(text: str, folder: Path) -> str:
    parts = {name: value for name, _, value in (part.partition("=") for part in text.split(","))}
    source, target = (
        parts.get("source", parts.get("src")),
        parts.get("target", parts.get("destination", parts.get("dst"))),
    )
    if parts.get("type", "volume") not in ("bind", "volume") or not source or not target:
        raise LineError(f"--mount {text}: only type=bind and type=volume with source and target are understood")
    known = {"type", "source", "src", "target", "destination", "dst", "ro", "readonly", "z", "Z", "relabel"}
    if unknown := sorted(parts.keys() - known):
        raise LineError(f"--mount {text}: {unknown[0]} is not understood")
    options = ["ro"] * any(parts.get(name, "false") != "false" for name in ("ro", "readonly"))
    options += [name for name in ("z", "Z") if name in parts]
    options += (
        [{"shared": "z", "private": "Z"}[parts["relabel"]]] if parts.get("relabel") in ("shared", "private") else []
    )
    volume = _volume(f"{source}:{target}", folder)
    return f"{volume}:{','.join(options)}" if options else volume
