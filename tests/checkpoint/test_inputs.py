"""The files that an engine has read: which count, and when they are others."""

from __future__ import annotations

import os
import shutil
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from proxy.checkpoint import inputs
from proxy.checkpoint.inputs import Reader
from proxy.checkpoint.manifest import Inputs
from proxy.config.model import ModelSettings

if TYPE_CHECKING:
    from pathlib import Path


def contained(*command: str, volumes: list[dict[str, Any]], **keys: Any) -> ModelSettings:
    return ModelSettings(podman={"image": "x", "command": ["--port", "{port}", *command], "volumes": volumes, **keys})


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with two models and a template."""
    for name in ("a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
        (tmp_path / "models" / name / "model.safetensors").write_bytes(
            (2).to_bytes(8, "little") + b"{}" + os.urandom(17 << 20)
        )
    (tmp_path / "template.jinja").write_text("hello")
    return tmp_path


def volume(source: Path, target: str, **keys: Any) -> dict[str, Any]:
    return {"source": str(source), "target": target, **keys}


def noted(model: ModelSettings, since: float | None = None) -> Inputs:
    return inputs.note(model, time.time() + 1 if since is None else since)


def names(model: ModelSettings, shop: Path) -> set[str]:
    return {path.removeprefix(f"{shop}/") for path in noted(model).files}


A = {"models/a/config.json", "models/a/model.safetensors"}
B = {"models/b/config.json", "models/b/model.safetensors"}


def test_what_the_command_names_counts_and_nothing_else_of_its_volume(shop: Path) -> None:
    models = volume(shop / "models", "/models")
    assert names(contained("--model", "/models/a", volumes=[models]), shop) == A
    assert names(contained("--model=/models/b", volumes=[models]), shop) == B
    lora = '{"name": "x", "path": "/models/b"}'
    assert names(contained("--model", "/models/a", "--lora-modules", lora, volumes=[models]), shop) == A | B
    assert names(contained(volumes=[models], env={"MODEL": "/models/a"}), shop) == A


def test_a_read_only_volume_of_which_nothing_is_named_counts_whole(shop: Path) -> None:
    assert names(contained("--model", "org/a", volumes=[volume(shop / "models", "/cache")]), shop) == A | B
    template = volume(shop / "template.jinja", "/t.jinja")
    assert names(contained(volumes=[template]), shop) == {"template.jinja"}


def test_what_the_engine_may_write_to_counts_only_by_name(shop: Path) -> None:
    cache = volume(shop, "/cache", writable=True)
    assert names(contained("--download-dir", "/cache", volumes=[cache]), shop) == set()
    assert names(contained("--chat-template", "/cache/template.jinja", volumes=[cache]), shop) == {"template.jinja"}
    assert names(contained("--model", "/cache/models/a", volumes=[cache]), shop) == A


def test_of_a_process_the_files_and_models_in_its_command_count(shop: Path) -> None:
    command = ["serve", f"{shop}/models/a", f"--chat-template={shop}/template.jinja", "--cache", str(shop), "{port}"]
    model = ModelSettings(process={"command": command}, weights=[str(shop / "models" / "b")])
    assert names(model, shop) == {*A, *B, "template.jinja"}


def test_names_that_are_no_text_are_passed_over(shop: Path) -> None:
    (shop / "models" / "a" / os.fsdecode(b"caf\xe9.json")).touch()
    (shop / "models" / "a" / "caf\u00e9.json").touch()
    found = names(contained("--model", "/m/a", volumes=[volume(shop / "models", "/m")]), shop)
    assert found == {*A, "models/a/caf\u00e9.json"}


def test_work_is_bounded(shop: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(inputs, "MAX_FILES", 3)
    assert names(contained(volumes=[volume(shop / "models", "/cache")]), shop) == set()
    assert "edits there are not seen" in caplog.text
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        read.append(count)
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    noted(contained("--model", "/m/a", volumes=[volume(shop / "models", "/m")]))
    assert 0 < sum(read) < 2 << 20, "of 17 MiB"


async def is_edited(reader: Reader, before: Inputs) -> bool:
    # What is kept in a manifest is JSON.
    return await reader.edited(Inputs.model_validate_json(before.model_dump_json())) is not None


@pytest.fixture
def before(shop: Path) -> Inputs:
    return noted(contained("--model", "/m/a", volumes=[volume(shop / "models", "/m")]))


async def test_the_same_files_are_the_same_also_as_copies(shop: Path, before: Inputs) -> None:
    reader = Reader()
    assert not await is_edited(reader, before)
    for path in (shop / "models" / "a").iterdir():
        path.touch()
        os.utime(path, (1, 1))
    assert not await is_edited(reader, before)
    shutil.copytree(shop / "models", shop / "copy")
    shutil.rmtree(shop / "models")
    (shop / "copy").rename(shop / "models")  # as on another host, or a tmpfs that was filled again
    assert not await is_edited(reader, before)
    assert not await is_edited(reader, before), "what it remembers"


@pytest.mark.parametrize(
    ("name", "offset", "weights"),
    [("config.json", 0, False), ("model.safetensors", 9, True), ("model.safetensors", 17 << 20, True)],
)
async def test_an_edit_counts_even_one_that_keeps_size_and_mtime(
    shop: Path, before: Inputs, name: str, offset: int, weights: bool
) -> None:
    reader = Reader()
    path = shop / "models" / "a" / name
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(min(offset, status.st_size - 2))
        file.write(b"!!")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    edited = await reader.edited(before)
    assert edited is not None
    assert edited.reason == f"{path} was edited after the engine was started"
    assert edited.weights is weights


async def test_a_file_more_or_less_in_a_models_folder_counts(shop: Path, before: Inputs) -> None:
    reader = Reader()
    (shop / "models" / "a" / ".lock").touch()
    assert not await is_edited(reader, before)
    more = shop / "models" / "a" / "chat_template.jinja"
    more.touch()
    assert await is_edited(reader, before)
    more.unlink()
    assert not await is_edited(reader, before)
    (shop / "models" / "a" / "config.json").unlink()
    assert await is_edited(reader, before)


async def test_what_cannot_be_looked_at_says_nothing(shop: Path, before: Inputs) -> None:
    shutil.rmtree(shop / "models")
    assert not await is_edited(Reader(), before)


async def test_one_written_after_the_start_counts_as_edited(shop: Path) -> None:
    model = contained("--model", "/m/a", volumes=[volume(shop / "models", "/m")])
    assert await is_edited(Reader(), noted(model, time.time() - 3600))


async def test_a_filesystem_that_does_not_answer_is_given_up(before: Inputs) -> None:
    reader = Reader(limit_s=0.05)
    gate = threading.Event()
    reader._compare = lambda _: gate.wait()  # type: ignore[method-assign, assignment, return-value]
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await reader.edited(before)
    gate.set()
