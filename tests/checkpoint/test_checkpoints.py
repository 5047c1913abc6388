"""The store of images: what is half-written is never taken for whole."""

from __future__ import annotations

import asyncio
import io
import mmap
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.checkpoint.archive import SUFFIX
from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.files import MANIFEST
from proxy.checkpoint.manifest import FORMAT, Manifest, kind_of
from proxy.checkpoint.store import CRIU_FOLDER, CheckpointStore, next_to
from proxy.config.model import ModelSettings
from proxy.host import cpu
from proxy.host.facts import huge_pages_of
from proxy.pool import golden
from proxy.runtime.base import Tiers
from proxy.runtime.image_store import ImageStore
from proxy.tiers import Tier
from tests.fakes import FakeRuntime
from tests.support import examples, files_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy.checkpoint.archive import Compression


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    made = CheckpointStore(tmp_path / "images", 0, tmp_path / "archive")
    made.open()
    yield made
    made.close()


def manifest(name: str) -> Manifest:
    return Manifest(
        image=name, model="demo", runtime="fake", spec_digest="d", created_unix_s=time.time(), facts={"kernel": "k"},
        sleep_level=1, canary="c", private={"pid": 1}, details={"warmup": []},
    )  # fmt: skip


async def write(store: CheckpointStore, name: str, data: bytes = b"pages", *, beside: bool = False) -> Manifest:
    folder = store.begin(next_to(name) if beside else name, len(data))
    (folder / CRIU_FOLDER / "pages-1.img").write_bytes(data)
    (folder / "rootfs.tar").write_bytes(b"tar")
    return await store.commit(manifest(name), beside=beside)


async def test_what_was_written_is_read(store: CheckpointStore) -> None:
    written = await write(store, "demo-1")
    assert store.load("demo-1") == written
    assert written.total_bytes() == 8
    assert written.bytes_by_kind() == {
        "memory pages": 5, "GPU data": 0, "shared memory": 0, "filesystem diff": 3, "process state": 0,
    }  # fmt: skip
    assert written.details["bytes_by_kind"] == written.bytes_by_kind()
    assert store.names() == ["demo-1"]
    assert (store.root).stat().st_mode & 0o777 == 0o700
    assert store.path("demo-1").stat().st_mode & 0o777 == 0o700
    assert (store.path("demo-1") / "criu" / "pages-1.img").stat().st_mode & 0o777 == 0o600


async def test_holes_take_no_space(store: CheckpointStore) -> None:
    folder = store.begin("demo-1", 1)
    (folder / CRIU_FOLDER / "pages-1.img").write_bytes(b"x" * 4096)
    with (folder / "devshm.tar").open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(64 << 20)
    written = await store.commit(manifest("demo-1"))
    assert written.bytes_by_kind()["shared memory"] == 64 << 20
    assert written.space_by_kind()["shared memory"] < 1 << 20
    assert written.space_by_kind()["memory pages"] == 4096
    assert not any("shared memory" in text for text in golden.advice(written))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("criu/pages-12.img", "memory pages"),
        ("criu/core-7.img", "process state"),
        ("criu/ghost-file-1.img", "filesystem diff"),
        ("devshm.tar", "shared memory"),
        ("criu/cuda-state.img", "GPU data"),
    ],
)
def test_files_are_told_apart_by_what_they_hold(name: str, kind: str) -> None:
    assert kind_of(name) == kind


async def test_a_new_image_takes_the_place_of_the_old(store: CheckpointStore) -> None:
    await write(store, "demo-1", b"old")
    await write(store, "demo-1", b"newer")
    assert (store.path("demo-1") / "criu" / "pages-1.img").read_bytes() == b"newer"
    assert [p.name for p in files_in(store.root)] == ["demo-1"]


async def test_one_that_was_not_finished_is_no_image_and_is_swept(store: CheckpointStore) -> None:
    await write(store, "demo-1")
    store.begin("demo-2", 0)
    (store.root / "demo-3").mkdir()
    assert store.names() == ["demo-1"]
    assert store.sweep() == ["demo-2.partial"]
    assert store.names() == ["demo-1"]
    store.begin("demo-2", 0)
    store.abandon("demo-2")
    assert store.sweep() == []


async def test_a_crash_between_the_renames_loses_no_image(store: CheckpointStore) -> None:
    written = await write(store, "demo-1")
    store.path("demo-1").rename(store.root / "demo-1.old.partial")
    store.begin("demo-1", 0)
    store.sweep()
    assert store.load("demo-1") == written
    assert [p.name for p in files_in(store.root)] == ["demo-1"]


@pytest.mark.parametrize(
    "damage", ["missing", "short", "garbage", "other format", "other fields", "list", "renamed", "outside", "no digest"]
)
async def test_a_damaged_image_is_refused(store: CheckpointStore, damage: str) -> None:
    await write(store, "demo-1")
    folder = store.path("demo-1")
    text = (folder / MANIFEST).read_bytes()
    match damage:
        case "missing":
            (folder / "criu" / "pages-1.img").unlink()
        case "short":
            (folder / "criu" / "pages-1.img").write_bytes(b"pag")
        case "garbage":
            (folder / MANIFEST).write_bytes(b"{")
        case "other format":
            (folder / MANIFEST).write_bytes(text.replace(f'"format": {FORMAT}'.encode(), b'"format": 99'))
        case "other fields":
            (folder / MANIFEST).write_bytes(f'{{"format": {FORMAT}}}'.encode())
        case "list":
            (folder / MANIFEST).write_bytes(b"[]")
        case "renamed":
            (folder / MANIFEST).write_bytes(text.replace(b'"image": "demo-1"', b'"image": "demo-2"'))
        case "outside":
            (folder / MANIFEST).write_bytes(text.replace(b"criu/pages-1.img", b"../../etc/passwd"))
        case "no digest":
            (folder / MANIFEST).write_bytes(text.replace(b'"criu/pages-1.img": 5', b'"criu/pages-2.img": 5'))
    with pytest.raises(StoreError, match="demo-1"):
        store.load("demo-1")


async def test_a_changed_byte_is_found_by_verify(store: CheckpointStore) -> None:
    await write(store, "demo-1")
    await store.verify("demo-1")
    (store.path("demo-1") / "criu" / "pages-1.img").write_bytes(b"pagex")
    store.load("demo-1")
    with pytest.raises(StoreError, match=r"pages-1.img: its content is not what was written"):
        await store.verify("demo-1")


async def test_an_image_that_does_not_fit_is_not_begun_and_harms_no_other(store: CheckpointStore) -> None:
    await write(store, "demo-1")
    with pytest.raises(StoreError, match="needs about .* are free beyond the reserve"):
        store.begin("demo-1", 1 << 60)
    assert store.sweep() == []
    store.load("demo-1")


async def test_removing_removes_everything_and_can_be_repeated(store: CheckpointStore) -> None:
    await write(store, "demo-1")
    store.quarantine("demo-1")
    await write(store, "demo-1")
    store.begin("demo-1", 0)
    await store.remove("demo-1")
    await store.remove("demo-1")
    assert files_in(store.root) == []


async def test_a_quarantined_image_is_none_and_gives_way_when_space_is_needed(store: CheckpointStore) -> None:
    await write(store, "demo-1", b"x" * 4096)
    store.quarantine("demo-1")
    store.quarantine("demo-1")
    assert (store.names(), store.quarantined(), store.sweep()) == ([], ["demo-1"], [])
    with pytest.raises(StoreError):
        store.begin("demo-2", 1 << 60)
    assert store.quarantined() == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="checkpoint_dir .*file/images"):
        CheckpointStore(tmp_path / "file" / "images", 0).open()


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
async def test_an_export_is_imported_elsewhere(
    store: CheckpointStore, tmp_path: Path, compression: Compression
) -> None:
    data = os.urandom(5 << 20)
    written = await write(store, "demo", data)
    file = tmp_path / f"export{SUFFIX[compression]}"
    await store.export("demo", file, compression)
    assert file.stat().st_mode & 0o777 == 0o600
    other = CheckpointStore(tmp_path / "other", 0)
    other.open()
    assert await other.import_(file) == written
    await other.verify("demo")
    assert (other.path("demo") / "criu" / "pages-1.img").read_bytes() == data
    assert other.path("demo").stat().st_mode & 0o777 == 0o700
    other.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "missing"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
async def test_a_damaged_export_is_refused_and_leaves_the_store_as_it_was(
    store: CheckpointStore, tmp_path: Path, compression: Compression, damage: str
) -> None:
    await write(store, "demo", os.urandom(1 << 20))
    file = tmp_path / "export"
    await store.export("demo", file, compression)
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            content = content[: len(content) // 2]
        case "flipped":
            content[len(content) // 2] ^= 1
        case "text":
            content = bytearray(b"hello" * 1000)
        case "empty":
            content = bytearray()
    file.write_bytes(content)
    if damage == "missing":
        file.unlink()
    before = store.load("demo")
    with pytest.raises(StoreError, match="export"):
        await store.import_(file)
    assert store.load("demo") == before
    await store.verify("demo")
    assert [p.name for p in files_in(store.root)] == ["demo"]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "criu/extra.img"])
async def test_an_export_with_a_file_that_the_manifest_does_not_name_is_refused(
    store: CheckpointStore, tmp_path: Path, name: str
) -> None:
    await write(store, "demo")
    file = tmp_path / "export.tar"
    await store.export("demo", file, "none")
    with tarfile.open(file, "a") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    await store.remove("demo")
    with pytest.raises(StoreError, match="not in the manifest"):
        await store.import_(file)
    assert files_in(store.root) == []
    assert not (tmp_path / "evil").exists()


async def test_an_export_under_a_bad_name_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    await write(store, "demo")
    file = tmp_path / "export.tar"
    await store.export("demo", file, "none")
    file.write_bytes(file.read_bytes().replace(b'"image": "demo"', b'"image": "../d"'))
    with pytest.raises(StoreError, match="not a usable image: its manifest: image: "):
        await store.import_(file)
    await store.export("demo", file, "none")
    with pytest.raises(StoreError, match="holds the image"):
        await store.import_(file, "other")


async def crafted(store: CheckpointStore, file: Path, size: int, *, head: tarfile.TarInfo | None = None) -> None:
    """An export whose manifest says 5 bytes of a file that has `size`, with another entry before it."""
    await write(store, "demo")
    text = (store.path("demo") / MANIFEST).read_bytes()
    await store.remove("demo")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(text)
        tar.addfile(info, io.BytesIO(text))
        if head is not None:
            tar.addfile(head)
        info = tarfile.TarInfo("criu/pages-1.img")
        info.size = size
        tar.addfile(info, cast("IO[bytes]", Zeros()))
    file.write_bytes(zstandard.compress(out.getvalue()))


class Zeros:
    """As many as somebody reads."""

    def read(self, size: int) -> bytes:
        return bytes(size)


async def test_an_import_writes_nothing_of_a_file_that_is_larger_than_declared(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "small.tar.zst"
    await crafted(store, file, 80 << 20)
    assert file.stat().st_size < 64 << 10
    written = []
    monkeypatch.setattr(os, "posix_fallocate", lambda *given: written.append(given))
    with pytest.raises(StoreError, match=r"criu/pages-1.img has 83886080 bytes, the manifest says 5"):
        await store.import_(file)
    assert written == []
    assert files_in(store.root) == []


async def test_an_import_reads_no_more_than_the_manifest_accounts_for(store: CheckpointStore, tmp_path: Path) -> None:
    file = tmp_path / "small.tar.zst"
    head = tarfile.TarInfo("x")
    head.pax_headers = {"comment": "x" * (64 << 20)}
    await crafted(store, file, 5, head=head)
    assert file.stat().st_size < 64 << 10
    with pytest.raises(StoreError, match="larger than its manifest says"):
        await store.import_(file)
    assert files_in(store.root) == []


async def test_an_import_is_given_up_when_others_take_the_space(store: CheckpointStore, tmp_path: Path) -> None:
    await write(store, "demo", os.urandom(8 << 20))
    await store.export("demo", tmp_path / "out.tar", "none")
    asked = iter([1 << 40, 1 << 40, -1])
    store.free_bytes = lambda: next(asked, -1)  # type: ignore[method-assign] # as when somebody fills the disk
    with pytest.raises(StoreError, match="no space left beyond the reserve; the import was given up"):
        await store.import_(tmp_path / "out.tar")
    store.load("demo")
    assert [p.name for p in files_in(store.root)] == ["demo"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image", 5), ("model", None), ("runtime", ["fake"]), ("spec_digest", {"a": 1}), ("created_unix_s", "now"),
        ("created_unix_s", 1e300), ("facts", ["kernel"]), ("facts", {"kernel": 6}), ("sleep_level", "1"),
        ("sleep_level", 7), ("canary", 3), ("private", []), ("private", {"pid": "1"}), ("private", {"pid": -1}),
        ("private", {"port": 1 << 40}), ("private", {"abstract_sockets": 5}), ("private", {"other": 1}),
        ("details", "text"), ("details", {"gpu": [1]}), ("details", {"memory": {"heap": "1"}}),
        ("details", {"holes_by_kind": 3}), ("details", {"warmup": [{"ttft_s": None}]}), ("bytes_by_file", []),
        ("bytes_by_file", {"a": -1}), ("bytes_by_file", {"a": 1 << 60}), ("bytes_by_file", {"a\0b": 1}),
        ("sha256_by_file", {"a": 1}), ("format", "3"), ("surprise", 1),
    ],
)  # fmt: skip
async def test_a_manifest_of_wrong_types_is_an_error_of_the_store(
    store: CheckpointStore, key: str, value: object
) -> None:
    await write(store, "demo")
    path = store.path("demo") / MANIFEST
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), key: value}))
    with pytest.raises(StoreError, match="not a usable image: its manifest: "):
        store.load("demo")


async def test_a_manifest_that_is_no_plain_file_is_an_error_of_the_store(
    store: CheckpointStore, tmp_path: Path
) -> None:
    await write(store, "demo")
    path = store.path("demo") / MANIFEST
    content = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="is not a plain file"):
        store.load("demo")
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic links"):
        store.load("demo")


async def test_an_image_over_the_bounds_is_not_written(store: CheckpointStore) -> None:
    folder = store.begin("demo", 0)
    (folder / CRIU_FOLDER / ("x" * 200)).mkdir()
    (folder / CRIU_FOLDER / ("x" * 200) / "\udcff").write_bytes(b"")
    with pytest.raises(StoreError, match="demo.partial: "):
        await store.commit(manifest("demo"))
    assert store.names() == []


async def test_an_archive_that_cannot_be_read_is_written_anew(store: CheckpointStore) -> None:
    written = await write(store, "demo")
    (await store.put_into_archive("demo")).write_bytes(b"damaged")
    images = Images(store)
    await images.copy_to_archive(FakeRuntime(shares_images=True).engine("demo-1", "demo"))
    assert await store.archived_manifest("demo") == written


class Images(ImageStore):
    """Those of a runtime that does nothing else."""

    def __init__(self, store: CheckpointStore) -> None:
        super().__init__(store, "fake", shared=True)
        self.tiers = Tiers(frozenset({Tier.CHECKPOINTED, Tier.ARCHIVED}))

    async def _facts_for(self, model: ModelSettings, manifest: Manifest) -> dict[str, str]:
        return {"kernel": "k"}

    def _digest(self, key: str, model: ModelSettings) -> str:
        return "d"


async def test_manifests_that_cannot_be_read_keep_no_other_image_from_being_found(store: CheckpointStore) -> None:
    models = {"demo": ModelSettings(process={"command": ["engine", "{port}"]})}
    for name in ("old", "wrong", "demo"):
        await write(store, name)
    for name, changed in (("old", {"format": 2}), ("wrong", {"private": {"pid": "1"}})):
        path = store.path(name) / MANIFEST
        path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), **changed}))
    assert list(await Images(store).fitting(models)) == ["demo"]
    assert store.quarantined() == ["wrong"]
    assert store.names() == ["demo", "old"]


@pytest.mark.parametrize(
    ("taken_on", "said"),
    [
        ({}, None),
        ({"flags": []}, None),
        ({"model": "another one with the same instructions"}, None),
        ({"frame_bytes": 1}, None),
        ({"flags": [*cpu.here().flags, "avx99", "amx_99"]}, f"is {cpu.here().model} here, which lacks amx_99, avx99"),
        ({"vendor": "GenuineOther"}, f"CPU vendor was GenuineOther, is {cpu.here().vendor} here"),
        ({"frame_bytes": 1 << 20}, f"took 1048576 bytes, have {cpu.here().frame_bytes} here"),
    ],
)
async def test_an_image_fits_a_cpu_that_can_do_what_its_own_could(
    store: CheckpointStore, taken_on: dict[str, object], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"demo": ModelSettings(process={"command": ["engine", "{port}"]})}
    written = await write(store, "demo")
    assert written.cpu == cpu.here()
    path = store.path("demo") / MANIFEST
    content = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps({**content, "cpu": {**content["cpu"], **taken_on}}))
    assert list(await Images(store).fitting(models)) == ([] if said else ["demo"])
    assert said is None or said in caplog.text
    assert store.names() == ["demo"], "it is kept, since the other CPU may come back"


def test_the_cpu_of_several_processors_is_what_all_have(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\n"
        "flags\t\t: fpu avx avx2 amx_tile pti\n\nprocessor\t: 1\nflags\t\t: fpu avx avx2 pti\n\n"
    )
    found = cpu.read(tmp_path / "cpuinfo", tmp_path / "missing")
    assert found == cpu.Cpu(vendor="GenuineIntel", model="Xeon (6-143)", flags=["avx", "avx2", "fpu"], frame_bytes=0)
    (tmp_path / "cpuinfo").write_text("CPU implementer\t: 0x41\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n")
    assert cpu.read(tmp_path / "cpuinfo", tmp_path / "missing").flags == ["asimd", "fp"]
    assert cpu.read(tmp_path / "missing", tmp_path / "missing").flags == []


def test_the_cpu_of_this_host_is_read() -> None:
    found = cpu.here()
    assert found.vendor
    assert found.flags
    assert found.frame_bytes > 1000 or os.uname().machine != "x86_64"


async def test_the_archive_gives_back_what_was_put_there(store: CheckpointStore) -> None:
    written = await write(store, "demo", b"x" * (1 << 20))
    path = await store.put_into_archive("demo")
    assert path.stat().st_size < 1 << 19
    assert store.archived() == ["demo"]
    await store.remove("demo")
    assert await store.archived_manifest("demo") == written
    assert await store.take_from_archive("demo") == written
    assert await store.verify("demo") == written
    assert store.archived() == ["demo"]


async def test_without_an_archive_folder_archiving_says_which_key_is_missing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "images", 0)
    store.open()
    await write(store, "demo")
    with pytest.raises(StoreError, match=r"pool.archive_dir"):
        await store.put_into_archive("demo")
    assert store.archived() == []
    store.close()


async def test_a_cancelled_export_leaves_nothing_behind(store: CheckpointStore, tmp_path: Path) -> None:
    await write(store, "demo", os.urandom(32 << 20))
    exporting = asyncio.create_task(store.export("demo", tmp_path / "out.tar.gz", "gzip"))
    while not list(tmp_path.glob(".out.tar.gz.*.partial")):
        await asyncio.sleep(0)
    exporting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exporting
    assert [p.name for p in files_in(tmp_path)] == ["images"]


@given(st.binary(max_size=2000))
@settings(max_examples=examples(30))
def test_whatever_a_file_holds_importing_it_is_an_error_of_the_store(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "images", 0)
        store.open()
        file = Path(folder) / "file"
        for head in (b"", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"):
            file.write_bytes(head + content)
            with pytest.raises(StoreError):
                asyncio.run(store.import_(file))
        assert files_in(store.root) == []
        store.close()


async def test_an_image_beside_another_takes_its_place_with_its_weights(store: CheckpointStore) -> None:
    await write(store, "demo")
    (store.weights("demo") / "0").write_bytes(b"old")
    await write(store, "demo", b"new", beside=True)
    (store.weights(next_to("demo")) / "0").write_bytes(b"new")
    assert store.names() == ["demo"]
    store.promote("demo")
    assert (await store.verify("demo")).image == "demo"
    assert (store.path("demo") / "criu/pages-1.img").read_bytes() == b"new"
    assert (store.weights("demo") / "0").read_bytes() == b"new"
    assert not store.path(next_to("demo")).exists()
    store.promote("demo")
    assert (store.path("demo") / "criu/pages-1.img").read_bytes() == b"new", "there is none any more"


async def test_an_image_that_was_still_beside_another_at_a_crash_is_removed(store: CheckpointStore) -> None:
    await write(store, "demo")
    await write(store, "demo", beside=True)
    (store.weights(next_to("demo")) / "0").write_bytes(b"new")
    assert set(store.sweep()) == {"demo.next", "0"}
    assert store.names() == ["demo"]


async def test_a_damaged_image_takes_nobodys_place(store: CheckpointStore) -> None:
    await write(store, "demo")
    await write(store, "demo", beside=True)
    next(p for p in store.path(next_to("demo")).rglob("*.img")).unlink()
    with pytest.raises(StoreError):
        store.promote("demo")
    assert (await store.verify("demo")).image == "demo"


async def test_a_refused_image_stays_until_its_space_is_needed(store: CheckpointStore) -> None:
    await write(store, "old", b"x" * 4096)
    store.refuse("old")
    store.begin("demo", 4096)
    assert store.names() == ["old"]
    with pytest.raises(StoreError):
        store.begin("demo", 1 << 60)
    assert store.names() == []


def test_two_stores_cannot_have_one_folder_open(store: CheckpointStore, tmp_path: Path) -> None:
    other = CheckpointStore(tmp_path / "images", 0)
    with pytest.raises(StoreError, match="another warmpool uses it"):
        other.open()
    store.open()
    store.close()
    with pytest.raises(StoreError):
        other.open()
    store.close()
    other.open()
    other.close()


def test_a_folder_with_files_of_others_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "images" / "overlay-containers").mkdir(parents=True)
    before = (tmp_path / "images").stat().st_mode
    with pytest.raises(StoreError, match="is for others too"):
        CheckpointStore(tmp_path / "images", 0).open()
    assert (tmp_path / "images").stat().st_mode == before


def test_a_folder_for_everybody_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(0o1777)
    with pytest.raises(StoreError, match="is for others too"):
        CheckpointStore(tmp_path / "images", 0).open()


# --- huge pages ---

LARGE = os.urandom(1 << 20) * 65


def _pmd_mapped_kib(path: Path) -> int:
    """How much of a file's mapping is in huge pages (proc(5), smaps)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: 1 << 12]) > 0
        smaps = Path("/proc/self/smaps").read_text()
        (mapping,) = re.findall(
            rf"^\S+ \S+ \S+ \S+ \S+ +{re.escape(str(path))}\n(?:(?!^\S+-).*\n)*", smaps, re.MULTILINE
        )
        return int(re.findall(r"ShmemPmdMapped: +(\d+) kB", mapping)[0])


@pytest.fixture
def within_size(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that takes huge pages within the size of a file."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m,mode=0700,huge=within_size", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs with huge=within_size cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_large_files_get_huge_pages_and_small_ones_do_not(within_size: Path, tmp_path: Path) -> None:
    store = CheckpointStore(within_size / "images", 0, tmp_path / "archive")
    store.open()
    written = await write(store, "demo-1", LARGE)
    pages = store.path("demo-1") / CRIU_FOLDER / "pages-1.img"
    assert pages.read_bytes() == LARGE
    assert pages.stat().st_mode & 0o777 == 0o600
    assert await store.verify("demo-1") == written
    assert _pmd_mapped_kib(pages) >= 32 << 10
    assert shutil.disk_usage(within_size).used < len(LARGE) + (8 << 20)
    await store.put_into_archive("demo-1")
    await store.remove("demo-1")
    await store.take_from_archive("demo-1")
    assert _pmd_mapped_kib(pages) >= 32 << 10
    store.close()


async def test_without_space_for_a_second_copy_a_file_stays_as_it_is(within_size: Path) -> None:
    store = CheckpointStore(within_size / "images", 0)
    store.open()
    (within_size / "other").write_bytes(bytes(300 << 20))
    await write(store, "demo-1", LARGE)
    await store.verify("demo-1")
    assert not [*within_size.rglob("*.partial")]
    store.close()


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/dev/shm/x", "never"), ("/mnt/a b/x", "within_size"), ("/mnt/other", ""), ("/mnt/a b/disk/x", "")],
)
def test_what_a_tmpfs_does_with_huge_pages(tmp_path: Path, path: str, expected: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
        "22 21 0:20 / /dev/shm rw,nosuid - tmpfs tmpfs rw\n"
        "23 21 0:21 / /mnt/a\\040b rw - tmpfs tmpfs rw,size=1g,huge=within_size\n"
        "24 23 8:2 / /mnt/a\\040b/disk rw - xfs /dev/sdb rw\n"
    )
    assert huge_pages_of(Path(path), mounts) == expected
