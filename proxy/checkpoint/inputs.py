"""The files that an engine reads when it starts: which they are, and whether they are still what it has read.

Which files count cannot be seen from outside: a chat template is open for a millisecond, weights are unmapped when they
are on the GPU. So it is what the configuration shows to the engine; docs/checkpoints.md has the rules, and why.
Size, times and inode say quickly, on the host where a file was noted, that it is the same. Where they differ, its
content decides, so that exports, other hosts and a tmpfs that was filled again keep their images.

Work is bounded: `MAX_FILES` files, `WHOLE_BYTES` of them read whole, samples of the others, in a thread that is given
up after `LIMIT_S`, since a network filesystem may never answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from proxy.checkpoint.manifest import MAX_INPUTS, FileNote, Inputs, Stamp
from proxy.host import daemon_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from proxy.config.model import ModelSettings

log = logging.getLogger("warmpool.inputs")

T = TypeVar("T")

MAX_FILES: Final = MAX_INPUTS
WHOLE_BYTES: Final = 256 << 20
"""Of all files together, the smallest first; `LARGE_BYTES` of one."""
LARGE_BYTES: Final = 16 << 20
LIMIT_S: Final = 120.0
_SAMPLES: Final = 16
_BLOCK_BYTES: Final = 64 << 10
_HEADER_BYTES: Final = 4 << 20
"""Read of a safetensors file's header, which may be longer (github.com/huggingface/safetensors)."""
_WEIGHTS: Final = frozenset({".safetensors", ".gguf", ".bin", ".pt", ".pth"})
_PATH: Final = re.compile(r"(?:^|(?<=[=,:;\"'\s\[]))/[^=,:;\"'\s\]]+")


@dataclass(frozen=True, slots=True)
class Edited:
    """What of it is no longer the same."""

    reason: str
    weights: bool
    """They are files that an engine which dropped its weights would read again."""


# --- which files ---


def _named(texts: Iterable[str]) -> Iterator[Path]:
    """The absolute paths in the arguments of a command, or in variables: also in ``--option=/path`` and JSON."""
    for text in texts:
        for match in _PATH.finditer(text):
            yield Path(os.path.normpath(match.group()))


def _on_host(path: Path, volumes: Mapping[Path, Path]) -> Path | None:
    """Where a path in a container lies on the host, if it is on a volume: target → source."""
    targets = [target for target in volumes if path.is_relative_to(target)]
    if not targets:
        return None
    target = max(targets, key=lambda t: len(t.parts))
    return volumes[target] / path.relative_to(target)


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model, and not anything: caches and download folders change all the time."""
    try:
        return any(path.name == "config.json" or path.suffix in _WEIGHTS for path in folder.iterdir())
    except OSError:
        return False


def _roots(model: ModelSettings) -> tuple[list[Path], list[Path]]:
    """Files and folders that count by name; and folders of read-only volumes of which no part was named."""
    named, rest = [Path(folder) for folder in model.weights], []
    if model.podman is not None:
        engine = model.podman
        words = [*engine.command, *(engine.entrypoint or ()), *(v.get_secret_value() for v in engine.env.values())]
        volumes = {v.target: Path(v.source) for v in engine.volumes if v.source.startswith("/")}
        found = [p for path in _named(words) if (p := _on_host(path, volumes)) is not None]
        named += [p for p in found if p.is_file() or _is_model(p)]
        read_only = [Path(v.source) for v in engine.volumes if v.source.startswith("/") and not v.writable]
        named += [source for source in read_only if source.is_file()]
        rest = [s for s in read_only if s.is_dir() and not any(p.is_relative_to(s) for p in named)]
    elif model.process is not None:
        words = [*model.process.command, *(v.get_secret_value() for v in model.process.env.values())]
        named += [path for path in _named(words) if path.is_file() or _is_model(path)]
    return sorted(set(named)), sorted(set(rest))


def _below(root: Path) -> Iterator[Path]:
    """The regular files of a tree, links to them among them, without what is hidden."""
    if root.is_file():
        yield root
        return
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and _is_text(name) and path.is_file():
                yield path


def _is_text(name: str) -> bool:
    """Whether a name can be in a manifest: a file's may be any bytes."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _listed(roots: Iterable[Path], limit: int) -> list[Path] | None:
    """All files of these trees, or None where there are more than `limit`."""
    found: dict[Path, None] = {}
    for root in roots:
        for path in _below(root):
            found[path] = None
            if len(found) > limit:
                return None
    return list(found)


# --- what is in them ---


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{path} is no file any more")
    return Stamp(
        size=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns, inode=status.st_ino,
        device=status.st_dev,
    )  # fmt: skip


def _digest(path: Path, *, whole: bool) -> str:
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        if whole:
            while block := os.read(descriptor, 1 << 20):
                digest.update(block)
            return digest.hexdigest()
        digest.update(size.to_bytes(8, "little"))
        if path.suffix == ".safetensors":
            header = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            digest.update(os.pread(descriptor, min(8 + header, _HEADER_BYTES), 0))
        for number in range(_SAMPLES):
            offset = number * max(0, size - _BLOCK_BYTES) // (_SAMPLES - 1)
            digest.update(os.pread(descriptor, _BLOCK_BYTES, offset))
        return digest.hexdigest()
    finally:
        os.close(descriptor)


def note(model: ModelSettings, since_unix_s: float) -> Inputs:
    """The files of an engine that was started at `since_unix_s`; blocks while it reads them.

    One that was written after that may have been read before or after it: it counts as edited.
    """
    named, rest = _roots(model)
    paths = _listed(named, MAX_FILES)
    if paths is None:
        log.warning("%s: over %d files: edits there are not seen", ", ".join(map(str, named)), MAX_FILES)
        named, paths = [], []
    for volume in rest:
        more = _listed([volume], MAX_FILES - len(paths))
        if more is None:
            log.info("%s: over %d files, and none named in the command: edits there are not seen", volume, MAX_FILES)
        else:
            paths += more
    files: dict[str, FileNote] = {}
    left = WHOLE_BYTES
    for stamp, path in sorted(_stamped(paths), key=lambda entry: (entry[0].size, entry[1])):
        whole = stamp.size <= min(LARGE_BYTES, left)
        left -= stamp.size if whole else 0
        try:
            content = "" if stamp.ctime_ns > since_unix_s * 1e9 else _digest(path, whole=whole)
        except OSError as error:
            log.warning("%s cannot be read: %s: edits of it are not seen", path, error.strerror)
            continue
        files[str(path)] = FileNote(stamp=stamp, sha256=content, whole=whole)
    return Inputs(files=files, folders=[str(p) for p in named if p.is_dir()])


def _stamped(paths: Iterable[Path]) -> Iterator[tuple[Stamp, Path]]:
    for path in paths:
        try:
            yield _stamp(path), path
        except OSError as error:
            log.warning("%s cannot be read: %s: edits of it are not seen", path, error.strerror)


class Reader:
    """Compares what was noted with what is there, one look at a time; remembers which content it has read."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._read: dict[tuple[str, str], tuple[Stamp, bool]] = {}
        """(path, digest) → as it was when last read, and whether it had that digest."""
        self._turn = asyncio.Lock()
        self._busy = False
        """A thread reads, one that was left behind perhaps."""

    async def note(self, model: ModelSettings, since_unix_s: float) -> Inputs:
        """See `note`. Raises OSError, of which TimeoutError is one."""
        return await self._in_thread(lambda: note(model, since_unix_s))

    async def edited(self, inputs: Inputs) -> Edited | None:
        """In which way files are others than those that were read. Raises OSError, of which TimeoutError is one.

        What cannot be read now says nothing, nor does a file that is gone with its folder, as after an unmount.
        """
        return await self._in_thread(lambda: self._compare(inputs)) if inputs.files else None

    def _compare(self, inputs: Inputs) -> Edited | None:
        changed = [path for path, noted in inputs.files.items() if not self._is_same(path, noted)]
        there = _listed(map(Path, inputs.folders), MAX_FILES) or []
        changed += [str(path) for path in there if str(path) not in inputs.files]
        if not changed:
            return None
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        reason = f"{changed[0]}{more} was edited after the engine was started"
        return Edited(reason, weights=any(Path(path).suffix in _WEIGHTS for path in changed))

    def _is_same(self, path: str, noted: FileNote) -> bool:
        if not noted.sha256:
            return False
        try:
            now = _stamp(Path(path))
            if now == noted.stamp:
                return True
            if now.size != noted.stamp.size:
                return False
            known = self._read.get((path, noted.sha256))
            if known is None or known[0] != now:
                known = now, _digest(Path(path), whole=noted.whole) == noted.sha256
                self._read[path, noted.sha256] = known
        except FileNotFoundError:
            return not Path(path).parent.is_dir()
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error.strerror)
            return True
        return known[1]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """The result of `work` in a thread of its own, which is left behind when it takes too long."""
        async with self._turn:
            if self._busy:
                raise TimeoutError("files that were to be read before have still not been")
            return await self._begin(work)

    async def _begin(self, work: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return work()
            finally:
                self._busy = False

        self._busy = True
        return await daemon_thread.run(run, self._limit_s, "inputs")
