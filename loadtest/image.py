"""The load-test engine as a container image, made of this very interpreter: no registry, no network.

``python -m loadtest.image [NAME]`` (root; needs podman). The image holds the interpreter with its standard library,
what `loadtest.engine` imports, and the shared libraries these need, with the bytecode of what is imported: else each
container compiles it anew and writes it into its own files, which then are in its checkpoints. Its entry point is the
engine. Nothing is done when an image of the same content is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import re
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping

NAME: Final = "localhost/warmpool-engine"
APP: Final = "/app"
PACKAGES: Final = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "attr", "attrs", "frozenlist", "idna", "multidict", "orjson",
    "propcache", "typing_extensions", "yarl",
)  # fmt: skip
ENGINE: Final = ("__init__.py", *sorted(p.name for p in Path(__file__).parent.glob("engine*.py")))
LEFT_OUT: Final = frozenset(
    {"__pycache__", "config-3", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
     "tkinter", "turtledemo"}
)  # fmt: skip
FOLDERS: Final = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin")
MERGED: Final = ("bin", "lib", "lib64", "sbin")
"""Links into usr, as Debian has them."""
LABEL: Final = "io.warmpool.content"


def python() -> Path:
    """The interpreter's own file, outside any virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def files() -> dict[str, Path]:
    """Path in the image → file on this host."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    found = {str(p): p for p in below(standard_library)}
    found[str(python())] = python()
    for name in PACKAGES:
        origin = Path(str(importlib.import_module(name).__file__))
        if origin.name == "__init__.py":
            found |= {f"{APP}/{name}/{p.relative_to(origin.parent)}": p for p in below(origin.parent)}
        else:
            found[f"{APP}/{origin.name}"] = origin
    here = Path(__file__).parent
    found |= {f"{APP}/loadtest/{name}": here / name for name in ENGINE}
    found |= {str(p): p for p in libraries(p for p in found.values() if ".so" in p.suffixes or p == python())}
    return found


def below(folder: Path, left_out: Container[str] = LEFT_OUT) -> Iterator[Path]:
    """The files of a tree, without what is below a folder, or is a file, of a name that is left out."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if not any(p in left_out or p.startswith("config-3") for p in inside) and path.is_file():
            yield path


def libraries(binaries: Iterable[Path]) -> Iterator[Path]:
    """The shared libraries these load, by the paths the loader finds them under."""
    printed = subprocess.run(["ldd", *map(str, binaries)], check=False, capture_output=True, text=True).stdout
    for match in sorted(set(re.findall(r"(?:=> |^\s*)(/\S+)(?= \(0x)", printed, re.MULTILINE))):
        yield Path(match)


def digest(contents: dict[str, Path]) -> str:
    """Of all paths and contents."""
    total = hashlib.sha256()
    for name, path in sorted(contents.items()):
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _write(stream: IO[bytes], contents: Mapping[str, Path], links: Mapping[str, str], texts: Mapping[str, str]) -> None:
    with tarfile.open(fileobj=stream, mode="w|", bufsize=1 << 20) as tar:
        for folder in FOLDERS:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        for name, target in {**{name: f"usr/{name}" for name in MERGED}, **links}.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
        users = {"etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/group": "root:x:0:\n"}
        for name, text in {**users, **texts}.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size, entry.mode = len(text), 0o755 if text.startswith("#!") else 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name, path in sorted(contents.items()):
            entry = tarfile.TarInfo(re.sub(rf"^({'|'.join(MERGED)})/", r"usr/\1/", name.lstrip("/")))
            status = path.stat()
            entry.size, entry.mode = status.st_size, stat.S_IMODE(status.st_mode)
            entry.mtime = int(status.st_mtime)  # compiled Python is valid for a source of this time
            with path.open("rb") as file:
                tar.addfile(entry, file)


def import_image(
    name: str,
    content: str,
    contents: Mapping[str, Path],
    changes: Iterable[str],
    *,
    links: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> bool:
    """Make the image `name` unless it is there with the label `content`; whether it was made.

    `contents`: path in the image → file here; `links`: path → target; `texts`: path → content, a program if it begins
    with ``#!``. Raises CalledProcessError when podman refuses.
    """
    inspect = ["podman", "image", "inspect", "--format", f'{{{{.Id}}}} {{{{index .Labels "{LABEL}"}}}}', name]
    known = subprocess.run(inspect, check=False, capture_output=True, text=True).stdout.split()
    if known[1:] == [content]:
        return False
    options = [f"--change={change}" for change in (*changes, f"LABEL {LABEL}={content}")]
    command = ["podman", "import", "--quiet", *options, "-", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as podman:
        assert podman.stdin is not None
        # What podman says of its own end is more than a broken pipe.
        with contextlib.suppress(BrokenPipeError), podman.stdin:
            _write(podman.stdin, contents, links or {}, texts or {})
    if podman.returncode:
        raise subprocess.CalledProcessError(podman.returncode, command)
    if known:
        # The one that had the name before; it stays where a container uses it.
        subprocess.run(["podman", "rmi", known[0]], check=False, capture_output=True)
    return True


def bytecode(contents: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Path in the image → file below `folder`: what an engine that starts imports, compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(
        [sys.executable, "-m", "loadtest.engine", "--help"], check=True, stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent, env={**environment, "PYTHONPYCACHEPREFIX": str(folder)},
    )  # fmt: skip
    found = {}
    for name, source in contents.items():
        if source.suffix == ".py":
            file = f"{source.stem}.{sys.implementation.cache_tag}.pyc"
            made = folder / source.parent.relative_to("/") / file
            if made.exists():
                found[f"{name.rpartition('/')[0]}/__pycache__/{file}"] = made
    return found


def build(name: str = NAME) -> str:
    """Make the engine's image unless it is there; its name. Raises CalledProcessError when podman refuses."""
    contents = files()
    changes = (
        f'ENTRYPOINT ["{python()}", "-m", "loadtest.engine"]',
        f"ENV PYTHONPATH={APP}",
        "ENV PYTHONUNBUFFERED=1",
        "ENV PYTHONDONTWRITEBYTECODE=1",
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = {**contents, **bytecode(contents, Path(folder))}
        import_image(name, digest({**contents, "loadtest/image.py": Path(__file__)}), whole, changes)
    return name


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("loadtest.image: run as root: the image goes to the podman of root")
    print(build(*sys.argv[1:2]))
