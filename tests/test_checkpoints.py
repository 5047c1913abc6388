"""The store of images: what is half-written is never taken for whole."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from proxy.checkpoints import MANIFEST, CheckpointStore, Manifest, StoreError, measure

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path / "images", 0)
    made.open()
    return made


def manifest(store: CheckpointStore, name: str) -> Manifest:
    return Manifest(
        instance=name, model="demo", spec_digest="d", created_unix_s=time.time(), kernel="k", criu="4.2", pid=1,
        port=2, sleep_level=1, canary="c", bytes_by_file=measure(store.root / f"{name}.partial"),
    )  # fmt: skip


def write(store: CheckpointStore, name: str, data: bytes = b"pages") -> Manifest:
    folder = store.begin(name, len(data))
    (folder / "pages-1.img").write_bytes(data)
    written = manifest(store, name)
    store.commit(name, written)
    return written


def test_what_was_written_is_read(store: CheckpointStore) -> None:
    written = write(store, "demo-1")
    assert store.load("demo-1") == written
    assert written.total_bytes() == 5
    assert store.names() == ["demo-1"]
    assert (store.root).stat().st_mode & 0o777 == 0o700
    assert store.path("demo-1").stat().st_mode & 0o777 == 0o700


def test_a_new_image_takes_the_place_of_the_old(store: CheckpointStore) -> None:
    write(store, "demo-1", b"old")
    write(store, "demo-1", b"newer")
    assert (store.path("demo-1") / "pages-1.img").read_bytes() == b"newer"
    assert [p.name for p in store.root.iterdir()] == ["demo-1"]


def test_one_that_was_not_finished_is_no_image_and_is_swept(store: CheckpointStore) -> None:
    write(store, "demo-1")
    store.begin("demo-2", 0)
    (store.root / "demo-3").mkdir()
    assert store.names() == ["demo-1"]
    assert sorted(store.sweep()) == ["demo-2.partial", "demo-3"]
    assert store.names() == ["demo-1"]
    store.begin("demo-2", 0)
    store.abandon("demo-2")
    assert store.sweep() == []


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "other format", "other fields", "list"])
def test_a_damaged_image_is_refused(store: CheckpointStore, damage: str) -> None:
    written = write(store, "demo-1")
    folder = store.path("demo-1")
    match damage:
        case "missing":
            (folder / "pages-1.img").unlink()
        case "short":
            (folder / "pages-1.img").write_bytes(b"pag")
        case "garbage":
            (folder / MANIFEST).write_bytes(b"{")
        case "other format":
            (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes().replace(b'"format": 1', b'"format": 99'))
        case "other fields":
            (folder / MANIFEST).write_bytes(b'{"format": 1}')
        case "list":
            (folder / MANIFEST).write_bytes(b"[]")
    with pytest.raises(StoreError, match="demo-1"):
        store.load("demo-1")
    assert replace(written) == written


def test_an_image_that_does_not_fit_is_not_begun(store: CheckpointStore) -> None:
    with pytest.raises(StoreError, match="needs about .* are free beyond the reserve"):
        store.begin("demo-1", 1 << 60)
    assert store.sweep() == []


async def test_removing_removes_everything_and_can_be_repeated(store: CheckpointStore) -> None:
    write(store, "demo-1")
    store.begin("demo-1", 0)
    await store.remove("demo-1")
    await store.remove("demo-1")
    assert list(store.root.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="checkpoint_dir .*file/images"):
        CheckpointStore(tmp_path / "file" / "images", 0).open()
