"""Pages of zeros taken out of CRIU's images.

CRIU dumps every page that a process has touched. A good part can be zeros: of the GPU memory that CUDA copies into a
process before the dump, 0.8 GB of 0.95 GB with vLLM on an H100. Anonymous memory that is in no image is zero after a
restore, so such pages need not be there, and cost no time and no tmpfs.

The format (images/pagemap.proto, mm.proto, vma.proto of CRIU 4.2): a pagemap file has the number of the pages file,
then ranges of addresses. The pages themselves stand one after the other in the pages file. Which memory is anonymous
is in the process's `mm` file. Whatever differs from that is left as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

from proxy.checkpoint import criu_images
from proxy.checkpoint.criu_images import UnknownFormatError, encoded, fields
from proxy.host import owned

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

PAGE_BYTES: Final = 4096

# Flags of a range (criu/include/pagemap.h), and of a mapping (criu/include/image.h).
_LAZY: Final = 1 << 1
_PRESENT: Final = 1 << 2
_REGULAR: Final = 1 << 0
_STACK: Final = 1 << 1
_HEAP: Final = 1 << 5
_ANONYMOUS_PRIVATE: Final = 1 << 9
_PLAIN: Final = _REGULAR | _STACK | _HEAP | _ANONYMOUS_PRIVATE

_SHORTEST_RUN: Final = 16
"""Pages; fewer in a row would cost CRIU more in ranges than they save."""
_LEAST_PAGES: Final = 256
"""A file with fewer pages of zeros to leave out is not written again."""
_CHUNK_BYTES: Final = 4 << 20
_THREADS: Final = 4
_ZEROS: Final = bytes(PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class _Range:
    """Pages in a row: the address of the first, how many, and what else the image says of them."""

    address: int
    pages: int
    flags: int
    wide: bool
    """Whether their number stands in the field for large numbers, as CRIU writes it since 4.1."""

    def part(self, first: int, pages: int) -> _Range:
        return _Range(self.address + first * PAGE_BYTES, pages, self.flags, self.wide)

    def message(self) -> bytes:
        values = [(1, self.address), (2, 0 if self.wide else self.pages), (4, self.flags)]
        return encoded([*values, (5, self.pages)] if self.wide else values)


def leave_out_zeros(folder: Path, stop: threading.Event) -> tuple[int, dict[str, str]]:
    """Write the images in a folder without their runs of zero pages.

    Returns how many bytes are gone, and the SHA-256 of each pages file that was written, by name. A file of another
    format, or for whose new version there is no space, stays as it was. Raises OSError when `stop` is set.
    """
    users: dict[str, list[Path]] = {}
    for pagemap in sorted(folder.glob("pagemap-*.img")):
        with contextlib.suppress(UnknownFormatError):
            users.setdefault(_pages_name(pagemap), []).append(pagemap)
    of = {name: maps[0] for name, maps in users.items() if len(maps) == 1 and (folder / name).is_file()}

    def rewrite(name: str) -> tuple[int, str | None]:
        with contextlib.suppress(UnknownFormatError):
            return _rewritten(of[name], folder / name, stop)
        return 0, None

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="zeros") as threads:
        done = dict(zip(of, threads.map(rewrite, of), strict=True))
    return sum(pages for pages, _ in done.values()) * PAGE_BYTES, {n: d for n, (_, d) in done.items() if d is not None}


def _pages_name(pagemap: Path) -> str:
    number = dict(fields(criu_images.read(pagemap, criu_images.PAGEMAP_MAGIC)[0])).get(1)
    if not isinstance(number, int):
        raise UnknownFormatError
    return f"pages-{number}.img"


def _rewritten(pagemap: Path, pages: Path, stop: threading.Event) -> tuple[int, str | None]:
    """How many pages were left out, and the digest of the new pages file; None if nothing was changed."""
    head, *messages = criu_images.read(pagemap, criu_images.PAGEMAP_MAGIC)
    ranges = [_range_of(message) for message in messages]
    size = pages.stat().st_size
    if size != sum(r.pages for r in ranges) * PAGE_BYTES or size == 0:
        raise UnknownFormatError
    with pages.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        kept = list(_kept(ranges, content, _anonymous(pagemap), stop))
        dropped = size // PAGE_BYTES - sum(r.pages for _, r in kept)
        if dropped < _LEAST_PAGES or not kept:
            return 0, None
        try:
            # Whoever reads the folder between these two sees a half; nobody does before it is an image.
            with owned.replacing(pages) as out, owned.replacing(pagemap) as table:
                digest = _write_pages(out, content, kept, stop)
                criu_images.write(table, criu_images.PAGEMAP_MAGIC, (head, *(r.message() for _, r in kept)))
        except OSError:
            if stop.is_set():
                raise
            return 0, None
    return dropped, digest


def _write_pages(out: IO[bytes], content: mmap.mmap, kept: Sequence[tuple[int, _Range]], stop: threading.Event) -> str:
    digest = hashlib.sha256()
    # With its size known from the start, it gets huge pages on a tmpfs with huge=within_size.
    os.posix_fallocate(out.fileno(), 0, sum(r.pages for _, r in kept) * PAGE_BYTES)
    for start, end in _joined((at * PAGE_BYTES, (at + r.pages) * PAGE_BYTES) for at, r in kept):
        for at in range(start, end, _CHUNK_BYTES):
            if stop.is_set():
                raise OSError("cancelled")
            chunk = content[at : min(at + _CHUNK_BYTES, end)]
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Spans in order, those that touch made one."""
    begun: tuple[int, int] | None = None
    for start, end in spans:
        if begun is None:
            begun = start, end
        elif begun[1] == start:
            begun = begun[0], end
        else:
            yield begun
            begun = start, end
    if begun is not None:
        yield begun


# --- which pages stay ---


def _kept(
    ranges: Iterable[_Range], content: mmap.mmap, anonymous: Sequence[tuple[int, int]] | None, stop: threading.Event
) -> Iterator[tuple[int, _Range]]:
    """What stays of the ranges, each with the number of its first page in the pages file."""
    at = 0
    for each in ranges:
        if stop.is_set():
            raise OSError("cancelled")
        done = 0
        for first, end in _within(each, anonymous):
            for start, stop_at in _zero_runs(content, at + first, at + end):
                if start - at > done:
                    yield at + done, each.part(done, start - at - done)
                done = stop_at - at
        if each.pages > done:
            yield at + done, each.part(done, each.pages - done)
        at += each.pages


def _within(each: _Range, anonymous: Sequence[tuple[int, int]] | None) -> Iterator[tuple[int, int]]:
    """The parts of a range, in pages, that lie in anonymous memory; None is all of it."""
    if anonymous is None:
        yield 0, each.pages
        return
    last = each.address + each.pages * PAGE_BYTES
    for start, end in anonymous:
        low, high = max(start, each.address), min(end, last)
        if low < high:
            yield (low - each.address) // PAGE_BYTES, (high - each.address) // PAGE_BYTES


def _zero_runs(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of zero pages of at least _SHORTEST_RUN within pages start to end, as first and end."""
    page = start
    floor = start
    while page < end:
        # A run that is long enough has a page at every _SHORTEST_RUNth place.
        if not _is_zero(content, page):
            page += _SHORTEST_RUN
            continue
        first = page
        while first > floor and _is_zero(content, first - 1):
            first -= 1
        after = page + 1
        while after < end and _is_zero(content, after):
            after += 1
        if after - first >= _SHORTEST_RUN:
            yield first, after
        floor = after
        page = after


def _is_zero(content: mmap.mmap, page: int) -> bool:
    at = page * PAGE_BYTES
    return content[at : at + PAGE_BYTES] == _ZEROS


def _anonymous(pagemap: Path) -> list[tuple[int, int]] | None:
    """The anonymous memory of a pagemap's process, first and end addresses in order; None: it is all anonymous."""
    if re.fullmatch(r"pagemap-shmem-\d+\.img", pagemap.name):
        return None  # memory shared by processes, with no file: holes in it are zero
    if not re.fullmatch(r"pagemap-\d+\.img", pagemap.name):
        raise UnknownFormatError
    (mm,) = criu_images.read(pagemap.with_name(pagemap.name.replace("pagemap", "mm")), criu_images.MM_MAGIC)
    found = []
    for number, value in fields(mm):
        if number == 14 and isinstance(value, bytes):
            mapping = dict(fields(value))
            start, end, status = (mapping.get(n) for n in (1, 2, 7))
            if not isinstance(start, int) or not isinstance(end, int) or not isinstance(status, int):
                raise UnknownFormatError
            if status & _ANONYMOUS_PRIVATE and not status & ~_PLAIN:
                found.append((start, end))
    return sorted(found)


def _range_of(message: bytes) -> _Range:
    found = dict(fields(message))
    address, flags = found.get(1), found.get(4, _PRESENT)
    wide = 5 in found
    pages = found.get(5 if wide else 2)
    known = set(found) <= {1, 2, 3, 4, 5} and not found.get(3)
    if not known or not isinstance(address, int) or not isinstance(pages, int) or not isinstance(flags, int):
        raise UnknownFormatError
    # Pages that are in the image of a dump before, or nowhere, are not told apart from others here.
    if not flags & _PRESENT or flags & ~(_PRESENT | _LAZY) or address % PAGE_BYTES:
        raise UnknownFormatError
    return _Range(address, pages, flags, wide)
