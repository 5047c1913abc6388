"""The manifest of a checkpoint image: what has to be known to restore it, and to refuse it where it would not work.

What is read was on a disk or came from another machine, so every field has a type and a bound. A field that is added
has one too; with a default, manifests of earlier versions stay readable, without one `FORMAT` is raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from proxy.errors import WarmpoolError
from proxy.host.cpu import Cpu

FORMAT: Final = 3
LIMIT_BYTES: Final = 16 << 20
"""The largest file that is read as a manifest."""
NAME: Final = "manifest.json"

MAX_INPUTS: Final = 2000
"""How many files that an engine has read are noted."""

_STRICT: Final = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ManifestError(WarmpoolError):
    """What was read is not a manifest that this version can use."""


class OtherFormatError(ManifestError):
    """It is the manifest of another version."""


def _relative(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name or name in (".", NAME):
        raise ValueError("a file's name is a path below the image's folder")
    return name


Name = Annotated[str, Field(min_length=1, max_length=200)]
ImageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}(\.next)?$")]
"""That of its folder, so neither a path nor another one of the store's own names."""
FileName = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_relative)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Integer = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Text = Annotated[str, Field(max_length=16 << 10)]
Pid = Annotated[int, Field(ge=1, le=1 << 22)]
Port = Annotated[int, Field(ge=1, le=65535)]

Count = Annotated[int, Field(ge=0, lt=1 << 64)]
InputPath = Annotated[str, Field(min_length=1, max_length=4096, pattern="^/")]

Figures = Annotated[Mapping[Name, Seconds], Field(max_length=1000)]
Sizes = Annotated[Mapping[Name, Bytes], Field(max_length=1000)]


class Gpu(BaseModel):
    """A GPU of the host where an image was made."""

    model_config = _STRICT

    uuid: Name
    name: Name
    total_bytes: Bytes
    used: bool
    """Whether the engine held memory of it."""


class Private(BaseModel):
    """The runtime's own."""

    model_config = _STRICT

    pid: Pid | None = None
    """Of the process tree's leader, which CRIU restores it with."""
    port: Port | None = None
    cuda: bool | None = None
    """Its CUDA state was in host memory when it was dumped."""
    gpus: Annotated[list[Gpu], Field(max_length=64)] | None = None
    """All of the host; None where it is not known which it used."""
    host_port: Port | None = None
    """Of a container on the host's network."""
    abstract_sockets: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=10_000)] | None = None


class Details(BaseModel):
    """For people: engine arguments, warm-up figures, timings, what filled the memory.

    `gpu` is for GPU accounting, `max_model_len` for the list of models.
    """

    model_config = _STRICT

    warmup: Annotated[list[Figures], Field(max_length=100_000)] | None = None
    making_s: Figures | None = None
    stages_s: Figures | None = None
    weights_copy_bytes: Bytes | None = None
    repeats_randomness: Annotated[str, Field(max_length=1000)] | None = None
    """Why engines restored from it draw the same random numbers, if they do."""
    max_model_len: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    """How many tokens a prompt with its answer may have, as the engine said."""
    gpu: Annotated[Mapping[Name, Sizes], Field(max_length=10)] | None = None
    engine: Annotated[Mapping[Name, Any], Field(max_length=1000)] | None = None
    memory: Sizes | None = None
    criu_us: (
        Annotated[Mapping[Name, Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]], Field(max_length=1000)] | None
    ) = None
    bytes_by_kind: Sizes | None = None
    holes_by_kind: Sizes | None = None
    zero_bytes_left_out: Bytes | None = None


def _private(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return Private.model_validate(value).model_dump(exclude_none=True)


def _details(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return Details.model_validate(value).model_dump(exclude_none=True)


class Stamp(BaseModel):
    """What differs in any file that was written since, on one host: size, times in ns, where it lies."""

    model_config = _STRICT

    size: Bytes
    mtime_ns: Integer
    ctime_ns: Integer
    inode: Count
    device: Count


class FileNote(BaseModel):
    """A file as an engine read it."""

    model_config = _STRICT

    stamp: Stamp
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    """Of its content, or of its size and samples of it; empty where it was written after the engine's start."""
    whole: bool


class Inputs(BaseModel):
    """What an engine has read, by path on the host."""

    model_config = _STRICT

    files: Annotated[Mapping[InputPath, FileNote], Field(max_length=MAX_INPUTS)] = {}
    folders: Annotated[list[InputPath], Field(max_length=MAX_INPUTS)] = []
    """Those in which a file that is new counts too."""


class Manifest(BaseModel):
    """What has to be known of an image."""

    model_config = _STRICT

    image: ImageName
    """The name of its folder."""
    model: Name
    runtime: Name
    spec_digest: Name
    """Of everything that shaped the engine (command, environment, container image); another digest, another engine."""
    created_unix_s: Seconds
    facts: Annotated[Mapping[Name, Text], Field(max_length=100)]
    """What must be the same where it is restored: kernel, versions, GPU."""
    cpu: Cpu | None = None
    """What can do at least the same where it is restored."""
    extension: Digest | None = None
    """Of the code of warmpool's that runs inside the engine, and so is in its memory; None where there is none."""
    sleep_level: Literal[0, 1, 2]
    canary: Annotated[str, Field(max_length=1 << 20)] | None
    private: Annotated[Mapping[str, Any], AfterValidator(_private)]
    """See `Private`."""
    details: Annotated[Mapping[str, Any], AfterValidator(_details)]
    """See `Details`."""
    inputs: Inputs = Inputs()
    """The files that the engine has read."""
    bytes_by_file: Annotated[Mapping[FileName, Bytes], Field(max_length=100_000)] = {}
    sha256_by_file: Annotated[Mapping[FileName, Digest], Field(max_length=100_000)] = {}
    format: Literal[3] = FORMAT

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if set(self.bytes_by_file) != set(self.sha256_by_file):
            raise ValueError("sizes and digests are not of the same files")
        if self.runtime == "process" and not {"pid", "port"} <= set(self.private):
            raise ValueError("an image of the runtime process has a pid and a port")
        return self

    def total_bytes(self) -> int:
        """The size of the image."""
        return sum(self.bytes_by_file.values())

    def bytes_by_kind(self) -> dict[str, int]:
        """Its size by what the bytes are: memory pages, GPU data, shared memory, filesystem diff, process state."""
        return by_kind(self.bytes_by_file)

    def space_by_kind(self) -> dict[str, int]:
        """`bytes_by_kind`, without the holes of sparse files: what an image takes where it was made."""
        holes: Mapping[str, int] = self.details.get("holes_by_kind") or {}
        return {kind: size - holes.get(kind, 0) for kind, size in self.bytes_by_kind().items()}

    def differences(self, facts: Mapping[str, str], cpu: Cpu) -> list[str]:
        """In which way a host is not like the one it was taken on, one line each."""
        others = [
            f"{name} was {old}, is {facts.get(name, 'missing')} here"
            for name, old in self.facts.items()
            if facts.get(name) != old
        ]
        return others + (self.cpu.differences(cpu) if self.cpu is not None else [])

    def completed(
        self, sizes: Mapping[str, int], digests: Mapping[str, str], details: Mapping[str, Any], cpu: Cpu
    ) -> Manifest:
        """This one with its files, further details and the CPU. Raises ManifestError where that is over a bound."""
        found = {"bytes_by_file": sizes, "sha256_by_file": digests, "details": {**self.details, **details}, "cpu": cpu}
        try:
            return Manifest.model_validate({**self.model_dump(), **found})
        except ValidationError as error:
            raise ManifestError(_first(error)) from None

    def as_bytes(self) -> bytes:
        """What is in its file."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2)


def parse(data: bytes) -> Manifest:
    """A manifest that was written by `as_bytes`. Raises ManifestError with what is wrong first."""
    try:
        raw = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ManifestError(f"its manifest is not JSON: {error}") from None
    written = raw.get("format") if isinstance(raw, dict) else None
    if type(written) is int and written != FORMAT:
        raise OtherFormatError(f"its manifest has format {written}, this version reads {FORMAT}")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ManifestError(f"its manifest: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first of its problems, without what was read: it may be long."""
    problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part)[:80] for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def by_kind(bytes_by_file: Mapping[str, int]) -> dict[str, int]:
    """The sizes of an image's files by `kind_of`."""
    sizes = dict.fromkeys(("memory pages", "GPU data", "shared memory", "filesystem diff", "process state"), 0)
    for name, size in bytes_by_file.items():
        sizes[kind_of(name)] += size
    return sizes


def kind_of(name: str) -> str:
    """What a file of an image holds (criu.org/Images)."""
    base = name.rpartition("/")[2]
    if base.startswith("pages-"):
        return "memory pages"
    if base.startswith(("amdgpu-", "cuda-", "nvidia-")):
        return "GPU data"
    if base.startswith("devshm"):
        return "shared memory"
    if base.startswith(("rootfs", "ghost-file", "tmpfs-", "remap")):
        return "filesystem diff"
    return "process state"
