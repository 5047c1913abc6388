"""Pages of zeros left out of CRIU's images: the arithmetic on made-up images, and memory that CRIU restores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.checkpoint import criu_images, zero_pages
from proxy.checkpoint.zero_pages import PAGE_BYTES, leave_out_zeros
from tests.support import why_no_criu

if TYPE_CHECKING:
    from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
ANONYMOUS, FILE = 1 | 1 << 9, 1 | 1 << 6
PRESENT, LAZY, PARENT = 4, 2, 1
Range = tuple[int, int, int]


def message(*fields: tuple[int, int | bytes]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += criu_images._varint(number << 3 | 2) + criu_images._varint(len(value)) + value
        else:
            out += criu_images._varint(number << 3) + criu_images._varint(value)
    return out


def image(magic: int, *messages: bytes) -> bytes:
    return struct.pack("<II", 0x54564319, magic) + b"".join(struct.pack("<I", len(m)) + m for m in messages)


def pagemap(pages_id: int, ranges: list[Range], *, wide: bool = True) -> bytes:
    entries = [
        message((1, address), (2, 0), (4, flags), (5, count)) if wide else message((1, address), (2, count), (4, flags))
        for address, count, flags in ranges
    ]
    return image(0x56084025, message((1, pages_id)), *entries)


def mm(mappings: list[tuple[int, int, int]]) -> bytes:
    vmas = [
        (14, message((1, start), (2, end), (3, 0), (4, 0), (5, 3), (6, 0x22), (7, status), (8, 1)))
        for start, end, status in mappings
    ]
    return image(0x57492820, message((1, 4096), (12, 1), *vmas))


def write(folder: Path, ranges: list[Range], pages: bytes, mappings: list[tuple[int, int, int]]) -> None:
    (folder / "pagemap-7.img").write_bytes(pagemap(3, ranges))
    (folder / "mm-7.img").write_bytes(mm(mappings))
    (folder / "pages-3.img").write_bytes(pages)


def memory_of(folder: Path, table: str = "pagemap-7.img", pages: str = "pages-3.img") -> dict[int, bytes]:
    """Address of each page that is in an image, and its content; pages of zeros left out."""
    content = (folder / pages).read_bytes()
    found, at = {}, 0
    for each in map(zero_pages._range_of, criu_images.read(folder / table, 0x56084025)[1:]):
        for n in range(each.pages):
            if any(page := content[at : at + PAGE_BYTES]):
                found[each.address + n * PAGE_BYTES] = page
            at += PAGE_BYTES
    assert at == len(content)
    return found


def run(folder: Path) -> tuple[int, dict[str, str]]:
    return leave_out_zeros(folder, threading.Event())


def page(fill: int) -> bytes:
    return bytes([fill]) * PAGE_BYTES


def test_runs_of_zero_pages_go_and_the_rest_stays_where_it_was(tmp_path: Path) -> None:
    start = 0x7F0000000000
    content = page(1) + bytes(1000 * PAGE_BYTES) + page(2) + bytes(15 * PAGE_BYTES) + page(3) + bytes(500 * PAGE_BYTES)
    write(tmp_path, [(start, 1518, PRESENT | LAZY)], content, [(start, start + (4 << 30), ANONYMOUS)])
    before = memory_of(tmp_path)
    dropped, digests = run(tmp_path)
    assert dropped == 1500 * PAGE_BYTES
    assert list(digests) == ["pages-3.img"]
    assert memory_of(tmp_path) == before
    ranges = [zero_pages._range_of(m) for m in criu_images.read(tmp_path / "pagemap-7.img", 0x56084025)[1:]]
    assert [(r.address - start, r.pages) for r in ranges] == [(0, 1), (1001 * PAGE_BYTES, 17)]
    assert {r.flags for r in ranges} == {PRESENT | LAZY}
    assert not list(tmp_path.glob("*.partial"))
    assert run(tmp_path) == (0, {}), "nothing is left to do"


def test_zeros_over_a_files_content_stay(tmp_path: Path) -> None:
    start, size = 0x10000, 600
    write(tmp_path, [(start, 2 * size, PRESENT)], bytes(2 * size * PAGE_BYTES), [
        (start, start + size * PAGE_BYTES, FILE),
        (start + size * PAGE_BYTES, start + (2 * size - 1) * PAGE_BYTES, ANONYMOUS),
    ])  # fmt: skip
    assert run(tmp_path)[0] == (size - 1) * PAGE_BYTES
    (first, last) = [zero_pages._range_of(m) for m in criu_images.read(tmp_path / "pagemap-7.img", 0x56084025)[1:]]
    assert (first.address, first.pages) == (start, size)
    assert (last.address, last.pages) == (start + (2 * size - 1) * PAGE_BYTES, 1)


def test_shared_memory_has_no_mappings_to_ask(tmp_path: Path) -> None:
    (tmp_path / "pagemap-shmem-12.img").write_bytes(pagemap(9, [(0, 300, PRESENT), (1 << 20, 2, PRESENT)], wide=False))
    (tmp_path / "pages-9.img").write_bytes(bytes(299 * PAGE_BYTES) + page(5) + page(6) + bytes(PAGE_BYTES))
    before = memory_of(tmp_path, "pagemap-shmem-12.img", "pages-9.img")
    assert run(tmp_path)[0] == 299 * PAGE_BYTES
    assert memory_of(tmp_path, "pagemap-shmem-12.img", "pages-9.img") == before
    assert message((1, 299 * PAGE_BYTES), (2, 1), (4, PRESENT)) in (tmp_path / "pagemap-shmem-12.img").read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda f: (f / "mm-7.img").unlink(), id="no mappings"),
        pytest.param(lambda f: (f / "mm-7.img").write_bytes(b"MM"), id="mappings cut off"),
        pytest.param(lambda f: (f / "pages-3.img").write_bytes(bytes(PAGE_BYTES)), id="pages missing"),
        pytest.param(lambda f: (f / "pages-3.img").unlink(), id="no pages"),
        pytest.param(lambda f: (f / "pagemap-7.img").write_bytes(b""), id="empty"),
        pytest.param(
            lambda f: (f / "pagemap-7.img").write_bytes((f / "pagemap-7.img").read_bytes()[:-3]), id="ranges cut off"
        ),
        pytest.param(
            lambda f: (f / "pagemap-7.img").write_bytes(pagemap(3, [(0, 300, PRESENT), (1 << 22, 300, PARENT)])),
            id="pages of a dump before",
        ),
        pytest.param(
            lambda f: (f / "pagemap-8.img").write_bytes((f / "pagemap-7.img").read_bytes()), id="pages of two processes"
        ),
        pytest.param(
            lambda f: (f / "pagemap-7.img").write_bytes(
                image(0x56084025, message((1, 3)), message((1, 0), (2, 600), (4, PRESENT), (6, 1)))
            ),
            id="a field of a later version",
        ),
        pytest.param(
            lambda f: (f / "pagemap-7.img").write_bytes(image(0x1234, (f / "pagemap-7.img").read_bytes()[12:])),
            id="another kind of file",
        ),
    ],
)
def test_what_is_not_known_is_left_alone(tmp_path: Path, spoil: object) -> None:
    write(tmp_path, [(0, 600, PRESENT)], bytes(600 * PAGE_BYTES), [(0, 600 * PAGE_BYTES, ANONYMOUS)])
    assert callable(spoil)
    spoil(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert run(tmp_path) == (0, {})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_it_can_be_stopped(tmp_path: Path) -> None:
    write(tmp_path, [(0, 601, PRESENT)], bytes(600 * PAGE_BYTES) + page(1), [(0, 1 << 40, ANONYMOUS)])
    stop = threading.Event()
    stop.set()
    with pytest.raises(OSError, match="cancelled"):
        leave_out_zeros(tmp_path, stop)
    assert (tmp_path / "pages-3.img").stat().st_size == 601 * PAGE_BYTES
    assert not list(tmp_path.glob("*.partial"))


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.booleans(), st.booleans()), min_size=1, max_size=30)
)
def test_any_memory_is_the_same_afterwards(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int, bool, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("image")
    address, ranges, mappings, content = 0x400000, [], [], b""
    for gap, count, filled, anonymous in [*parts, (0, 300, False, True)]:
        address += gap * PAGE_BYTES
        end = address + count * PAGE_BYTES
        ranges.append((address, count, PRESENT))
        mappings.append((address, end, ANONYMOUS if anonymous else FILE))
        content += page(1 if filled else 0) * count
        address = end
    write(folder, ranges, content, mappings)
    before = memory_of(folder)
    dropped, _ = run(folder)
    assert memory_of(folder) == before
    zeros_over_files = {
        start + n * PAGE_BYTES
        for (start, count, _), (_, _, filled, anonymous) in zip(ranges, parts, strict=False)
        for n in range(count)
        if not filled and not anonymous
    }
    still = set()
    for each in map(zero_pages._range_of, criu_images.read(folder / "pagemap-7.img", 0x56084025)[1:]):
        still |= {each.address + n * PAGE_BYTES for n in range(each.pages)}
    assert zeros_over_files <= still
    assert dropped in (0, len(content) - (folder / "pages-3.img").stat().st_size)


PROGRAM = textwrap.dedent(
    """
    import hashlib, mmap, os, signal, sys, time
    out, file = sys.argv[1:]
    MIB = 1 << 20
    private = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.write(bytes(64 * MIB))                      # touched, and zero
    for at in range(0, 64, 16):
        private[at * MIB + 5] = 7
    shared = mmap.mmap(-1, 16 * MIB)
    shared.write(bytes(16 * MIB))
    shared[3 * MIB] = 9
    with open(file, "rb") as f:
        over = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    over[MIB : 3 * MIB] = bytes(2 * MIB)                # zeros over the content of a file
    common = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    common.write(b"x" * 8 * MIB)
    child = os.fork()
    if child == 0:
        common[2 * MIB : 5 * MIB] = bytes(3 * MIB)      # zeros where the parent has something
    name = out + (".child" if child == 0 else ".parent")

    def tell(*_):
        digests = [hashlib.sha256(m[:]).hexdigest() for m in (private, shared, over, common)]
        with open(name + ".new", "w") as f:
            f.write("\\n".join(digests))
        os.rename(name + ".new", name)

    signal.signal(signal.SIGUSR1, tell)
    tell()
    while True:
        time.sleep(0.05)
    """
)


@pytest.mark.skipif(why_no_criu() is not None, reason=str(why_no_criu()))
def test_memory_that_criu_restores_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"y" * (4 << 20))
    images = tmp_path / "images"
    images.mkdir()
    out = tmp_path / "out"
    names = [tmp_path / "out.parent", tmp_path / "out.child"]
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", PROGRAM, str(out), str(file)], start_new_session=True, env=environment,
        cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    criu = ["criu", "--images-dir", str(images), "--log-file", "log"]
    restored: int | None = None
    try:
        before = [_when_there(name) for name in names]
        subprocess.run([*criu, "dump", "--tree", str(process.pid)], check=True, capture_output=True)
        process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:  # a zombie that nobody waits for keeps the number of the group
                os.waitpid(-process.pid, 0)
        size = sum(p.stat().st_size for p in images.glob("pages-*.img"))
        dropped, _ = leave_out_zeros(images, threading.Event())
        assert dropped > 70 << 20
        assert sum(p.stat().st_size for p in images.glob("pages-*.img")) == size - dropped
        for name in names:
            name.unlink()
        pid_file = tmp_path / "pid"
        subprocess.run(
            [*criu, "restore", "--restore-detached", "--pidfile", str(pid_file)], check=True, capture_output=True
        )
        restored = int(pid_file.read_text())
        os.killpg(restored, signal.SIGUSR1)
        assert [_when_there(name) for name in names] == before
    finally:
        for pid in (process.pid, restored):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        if restored is not None:
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-restored, 0)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _when_there(path: Path) -> str:
    for _ in range(1200):
        if path.exists():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")
