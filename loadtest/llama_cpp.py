"""llama.cpp's server for the CPU: an environment, a small model and a container image, made here.

``python -m loadtest.llama_cpp [--folder FOLDER] [--image NAME]``: the image needs root and podman, and is left out
without. Half a minute, 250 MB of disk; what is there already is not made again. No container registry and no model hub
is asked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadtest import image
from loadtest.vllm_cpu import look

if TYPE_CHECKING:
    from loadtest.vllm_cpu import Environment

VERSION: Final = "2026.10.11549"
"""Of the wheel; its last part is llama.cpp's own."""
REQUIREMENTS: Final = (f"xllamacpp=={VERSION}", "gguf==0.19.0")
FOLDER: Final = Path("/var/tmp/warmpool-llama-cpp")
IMAGE: Final = "localhost/warmpool-llama-cpp"
SERVER: Final = "llama_cpp_server.py"
MODEL: Final = "model.gguf"
_APP: Final = "/opt/llama-cpp"
_HERE: Final = Path(__file__).parent


def say(what: str) -> None:
    """Tell the user."""
    print(f"llama-cpp: {what}", flush=True)


def environment(venv: Path) -> Environment:
    """The environment with the wheel, installed where it is not. Raises CalledProcessError when pip fails."""
    known = look(venv)
    if known is not None and (known.packages / f"xllamacpp-{VERSION}.dist-info").is_dir():
        say(f"llama.cpp {VERSION} is in {venv}")
        return known
    say(f"installing {', '.join(REQUIREMENTS)} into {venv}")
    shutil.rmtree(venv, ignore_errors=True)
    venv.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([image.python(), "-m", "venv", venv], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "install", "--only-binary", ":all:", *REQUIREMENTS], check=True)
    made = look(venv)
    assert made is not None
    return made


def model(venv: Path, path: Path) -> None:
    """Make the model unless it is there."""
    if path.exists():
        say(f"the model is in {path}")
        return
    say(f"making a model with random weights in {path}")
    beside = path.with_name(path.name + ".partial")
    subprocess.run([venv / "bin/python", "-P", _HERE / "llama_cpp_model.py", beside], check=True)
    beside.rename(path)


def build(made: Environment, path: Path, name: str) -> None:
    """Make the container image, with the model in it, unless one of the same content is there."""
    contents = {str(p): p for p in image.below(made.standard_library)}
    package = made.packages / "xllamacpp"
    contents |= {f"{_APP}/xllamacpp/{p.relative_to(package)}": p for p in image.below(package)}
    contents |= {f"{_APP}/{SERVER}": _HERE / SERVER, f"{_APP}/{MODEL}": path, str(made.interpreter): made.interpreter}
    # The wheel has some libraries beside itself.
    beside = made.packages / "xllamacpp.libs"
    contents |= {f"{_APP}/xllamacpp.libs/{p.name}": p for p in image.below(beside)}
    loaded = image.libraries([made.interpreter, *(p for p in contents.values() if ".so" in p.suffixes)])
    contents |= {str(p): p for p in loaded if not p.is_relative_to(made.packages)}
    changes = (
        f'ENTRYPOINT ["{made.interpreter}", "-P", "{_APP}/{SERVER}", "--model", "{_APP}/{MODEL}"]',
        f"ENV PYTHONPATH={_APP}",
        "ENV PYTHONUNBUFFERED=1",
    )
    if image.import_image(name, image.digest(contents), contents, changes):
        say(f"made {name}")
    else:
        say(f"{name} is there")


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.llama_cpp", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it is put (default: %(default)s)")
    parser.add_argument("--image", default=IMAGE, help="the container image (default: %(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    try:
        made = environment(folder / "venv")
        model(folder / "venv", folder / MODEL)
        if os.geteuid() == 0 and shutil.which("podman") is not None:
            build(made, folder / MODEL, arguments.image)
        else:
            say("no image: that takes root and podman (make host)")
    except subprocess.CalledProcessError as error:
        sys.exit(f"llama-cpp: {error}")
    say("ready: warmpool serve --config config/llama-cpp.toml")


if __name__ == "__main__":
    main()
