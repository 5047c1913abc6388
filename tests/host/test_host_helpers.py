"""Helpers that read what the kernel and programs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config.values import short_size
from proxy.host import capabilities, mounts, owned
from proxy.host.command import version_in

MOUNTINFO = (
    "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw,errors=remount-ro\n"
    "a line that means nothing\n"
    "23 21 0:21 / /mnt/a\\040b rw - tmpfs tmpfs rw,size=1g,huge=within_size\n"
    "24 21 0:22 /below /mnt/a\\040b ro - tmpfs tmpfs rw\n"
)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("runc version 1.1.5+ds1\ncommit: 1.2", (1, 1, 5)),
        ("Version: 4.2", (4, 2)),
        ("crun version 1.26.1.dirty", (1, 26, 1)),
        ("none", ()),
    ],
)
def test_the_version_in_what_a_program_says(text: str, version: tuple[int, ...]) -> None:
    assert version_in(text) == version


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 10, "1 KiB"), (1010 << 20, "1010 MiB"), (5 << 40, "5 TiB"),
     (4350000000, "4.05 GiB")],
)  # fmt: skip
def test_sizes_for_people_have_three_digits_or_no_fraction(count: int, text: str) -> None:
    assert short_size(count) == text


def test_a_path_is_on_the_deepest_and_latest_mount() -> None:
    found = mounts.holding(Path("/mnt/a b/x"), mounts.parse(MOUNTINFO))
    assert found == mounts.Mount("/below", "/mnt/a b", "tmpfs", frozenset({"ro", "rw"}))
    assert [mount.option("huge") for mount in mounts.parse(MOUNTINFO)] == [None, "within_size", None]
    above = mounts.holding(Path("/mnt/a"), mounts.parse(MOUNTINFO))
    assert above is not None
    assert above.point == "/"
    assert mounts.holding(Path("/x"), []) is None


def test_capabilities_are_read_from_the_effective_set() -> None:
    assert capabilities.has(24, "CapInh:\t0\nCapEff:\t0000000001000000\n")
    assert not capabilities.has(23, "CapEff:\t0000000001000000\n")
    assert not capabilities.has(24, "nothing")


def test_only_plain_files_are_opened_and_links_only_on_request(tmp_path: Path) -> None:
    plain, link = tmp_path / "plain", tmp_path / "link"
    plain.write_bytes(b"text")
    link.symlink_to(plain)
    with owned.open_plain(link, follow=True) as file:
        assert file.read() == b"text"
    for path in (link, tmp_path, Path("/dev/null"), tmp_path / "missing"):
        with pytest.raises(OSError, match=r"symbolic links|directory|plain file"):
            owned.open_plain(path)
