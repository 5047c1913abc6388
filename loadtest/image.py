"""The load-test engine as a container image, made of this very interpreter: no registry, no network.

``python -m loadtest.image [NAME]`` (root; needs podman). The image holds the interpreter with its standard library,
what `loadtest.engine` imports, and the shared libraries these need; its entry point is the engine. Nothing is done when
an image of the same content is there.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NAME: Final = "localhost/warmpool-engine"
APP: Final = "/app"
PACKAGES: Final = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "attr", "attrs", "frozenlist", "idna", "multidict", "orjson",
    "propcache", "typing_extensions", "yarl",
)  # fmt: skip
LEFT_OUT: Final = frozenset(
    {"__pycache__", "config-3", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
     "tkinter", "turtledemo"}
)  # fmt: skip
FOLDERS: Final = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin")
LABEL: Final = "io.warmpool.content"


def python() -> Path:
    """The interpreter's own file, outside any virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def files() -> dict[str, Path]:
    """Path in the image → file on this host."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    found = {str(p): p for p in _below(standard_library)}
    found |= {str(p): p for p in _below(standard_library / "lib-dynload")}
    found[str(python())] = python()
    for name in PACKAGES:
        origin = Path(str(importlib.import_module(name).__file__))
        if origin.name == "__init__.py":
            found |= {f"{APP}/{name}/{p.relative_to(origin.parent)}": p for p in _below(origin.parent)}
        else:
            found[f"{APP}/{origin.name}"] = origin
    here = Path(__file__).parent
    found |= {f"{APP}/loadtest/{p.name}": p for p in here.glob("*.py")}
    found |= {str(p): p for p in _libraries(found.values())}
    return found


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if path.is_file() and not LEFT_OUT & set(inside) and not any(p.startswith("config-3") for p in inside):
            yield path


def _libraries(programs: Iterable[Path]) -> Iterator[Path]:
    """The shared libraries these load, by the paths the loader finds them under."""
    binaries = [str(p) for p in programs if ".so" in p.suffixes or p == python()]
    printed = subprocess.run(["ldd", *binaries], check=False, capture_output=True, text=True).stdout
    for match in sorted(set(re.findall(r"(?:=> |^\s*)(/\S+)(?= \(0x)", printed, re.MULTILINE))):
        yield Path(match)


def digest(contents: dict[str, Path]) -> str:
    """Of all paths and contents."""
    total = hashlib.sha256()
    for name, path in sorted(contents.items()):
        total.update(f"{name}\0{path.stat().st_size}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _write(target: Path, contents: dict[str, Path]) -> None:
    with tarfile.open(target, "w") as tar:
        for folder in FOLDERS:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            tar.addfile(entry)
        for name in ("bin", "lib", "lib64", "sbin"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(entry)
        for name, text in (("etc/passwd", "root:x:0:0::/root:/bin/sh\n"), ("etc/group", "root:x:0:\n")):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o644
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name, path in sorted(contents.items()):
            inside = re.sub(r"^(lib64|lib|bin|sbin)/", r"usr/\1/", name.lstrip("/"))
            entry = tarfile.TarInfo(inside)
            entry.size, entry.mode = path.stat().st_size, stat.S_IMODE(path.stat().st_mode)
            with path.open("rb") as file:
                tar.addfile(entry, file)


def build(name: str = NAME) -> str:
    """Make the image unless it is there; its name. Raises CalledProcessError when podman refuses."""
    contents = files()
    content = digest(contents)
    known = subprocess.run(
        ["podman", "image", "inspect", "--format", f'{{{{index .Labels "{LABEL}"}}}}', name],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if known.stdout.strip() == content:
        return name
    with tempfile.NamedTemporaryFile(suffix=".tar") as tar:
        _write(Path(tar.name), contents)
        changes = (
            f'ENTRYPOINT ["{python()}", "-m", "loadtest.engine"]',
            f"ENV PYTHONPATH={APP}",
            "ENV PYTHONUNBUFFERED=1",
            f"LABEL {LABEL}={content}",
        )
        subprocess.run(
            ["podman", "import", "--quiet", *(f"--change={change}" for change in changes), tar.name, name],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return name


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("loadtest.image: run as root: the image goes to the podman of root")
    print(build(*sys.argv[1:2]))
