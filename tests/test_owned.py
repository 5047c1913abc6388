"""Folders that are warmpool's alone, and that nothing is destroyed outside of them. Attackers are real: another uid."""

from __future__ import annotations

import ast
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proxy import owned
from proxy.owned import NotOwnedError
from proxy.runtime import bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, so it needs root")


def as_nobody(work: Callable[[], object]) -> None:
    """Run `work` in a child with the rights of another local user."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - pytest must not go on in the child
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that every user may write to, as /dev/shm, below folders that every user can enter."""
    folder = Path("/dev/shm") / f"warmpool-test-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder
    owned.register(folder)
    owned.empty(folder)
    folder.rmdir()
    owned.release(folder)


# --- whose a folder is ---


def test_a_folder_is_made_for_its_owner_alone_in_a_sticky_one(shared: Path) -> None:
    owned.claim(shared / "warmpool" / "images")
    assert (shared / "warmpool").stat().st_mode & 0o7777 == 0o700
    assert (shared / "warmpool" / "images").stat().st_mode & 0o7777 == 0o700


@needs_root
def test_a_folder_that_another_user_made_first_is_refused(shared: Path) -> None:
    as_nobody(lambda: (shared / "images").mkdir())
    with pytest.raises(NotOwnedError, match="belongs to user 65534"):
        owned.claim(shared / "images")


@needs_root
def test_a_folder_below_one_of_another_user_is_refused(shared: Path) -> None:
    as_nobody(lambda: (shared / "theirs").mkdir(mode=0o777))
    with pytest.raises(NotOwnedError, match="above it belongs to user 65534, who could replace it"):
        owned.claim(shared / "theirs" / "images")
    assert not (shared / "theirs" / "images").exists()


@needs_root
def test_a_link_of_another_user_is_not_followed_on_the_way(shared: Path, tmp_path: Path) -> None:
    as_nobody(lambda: (shared / "images").symlink_to(tmp_path))
    with pytest.raises(NotOwnedError, match="is a link of user 65534"):
        owned.claim(shared / "images")


def test_a_link_of_its_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    owned.claim(tmp_path / "link" / "images")
    assert (tmp_path / "real" / "images").is_dir()
    (tmp_path / "real" / "images" / "file").touch()
    owned.unlink(tmp_path / "link" / "images" / "file")
    assert not (tmp_path / "real" / "images" / "file").exists()


def test_a_ring_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Not a directory|symbolic links"):
        owned.claim(tmp_path / "a")


def test_a_folder_in_one_that_all_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all").chmod(0o777)
    with pytest.raises(NotOwnedError, match="others may write to .*/all above it"):
        owned.claim(tmp_path / "all" / "images")


def test_a_folder_of_ours_that_others_may_enter_is_tightened(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    owned.claim(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    (tmp_path / "state" / "lock").touch()
    (tmp_path / "state").chmod(0o750)
    owned.claim(tmp_path / "state", ["lock"])
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_not_known_as_warmpools_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir(mode=0o755)
    (tmp_path / "etc" / "passwd").touch()
    with pytest.raises(NotOwnedError, match="is for others too"):
        owned.claim(tmp_path / "etc", ["lock"])
    with pytest.raises(NotOwnedError, match="is for others too"):
        owned.claim(Path("/dev/shm"), ["lock"])
    assert (tmp_path / "etc").stat().st_mode & 0o777 == 0o755


@needs_root
def test_what_another_user_put_into_a_folder_that_was_open_is_not_taken_over(shared: Path) -> None:
    (shared / "images").mkdir()
    (shared / "images").chmod(0o777)
    (shared / "images" / ".lock").touch()
    as_nobody(lambda: (shared / "images" / "demo").mkdir())
    with pytest.raises(NotOwnedError, match="belongs to user 65534"):
        owned.claim(shared / "images", [".lock"])


# --- what may be destroyed ---


def test_nothing_is_destroyed_outside_of_owned_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owned.claim(tmp_path / "ours")
    (tmp_path / "theirs" / "checkpoint").mkdir(parents=True)
    (tmp_path / "theirs" / "file").touch()
    (tmp_path / "ours" / "out").symlink_to(tmp_path / "theirs")
    monkeypatch.chdir(tmp_path / "theirs")
    for path in (
        Path("checkpoint"),
        Path(),
        Path("/"),
        tmp_path / "theirs" / "checkpoint",
        tmp_path / "ours",
        tmp_path / "ours" / ".." / "theirs" / "file",
        tmp_path / "ours" / "out" / "file",
        tmp_path / "ours" / "out" / "checkpoint",
    ):
        for destroy in (owned.unlink, owned.delete_tree):
            with pytest.raises((NotOwnedError, NotADirectoryError)):
                destroy(path)
    with pytest.raises(NotOwnedError):
        owned.empty(Path("checkpoint"))
    with pytest.raises(NotOwnedError):
        owned.rename(tmp_path / "theirs" / "file", tmp_path / "ours" / "file")
    with pytest.raises(NotOwnedError):
        owned.delete_root(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "checkpoint").is_dir()
    assert (tmp_path / "theirs" / "file").exists()


def test_a_container_without_a_folder_costs_nobody_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotOwnedError):
        bundle.link(Path(), tmp_path / "image")
    assert (tmp_path / "checkpoint").is_dir()


def test_a_tree_with_links_out_of_it_is_deleted_without_what_they_lead_to(tmp_path: Path) -> None:
    owned.claim(tmp_path / "ours")
    (tmp_path / "precious").write_text("kept")
    tree = tmp_path / "ours" / "demo" / "deep"
    tree.mkdir(parents=True)
    (tree / "out").symlink_to(tmp_path)
    (tmp_path / "ours" / "link").symlink_to(tmp_path)
    owned.delete_tree(tmp_path / "ours" / "demo")
    owned.delete_tree(tmp_path / "ours" / "link")
    owned.delete_tree(tmp_path / "ours" / "missing")
    assert [*(tmp_path / "ours").iterdir()] == []
    assert (tmp_path / "precious").read_text() == "kept"


@needs_root
def test_an_owned_folder_that_was_exchanged_for_a_link_is_not_followed(shared: Path, tmp_path: Path) -> None:
    owned.claim(shared / "images")
    (shared / "images").rmdir()
    (tmp_path / "demo").mkdir()
    as_nobody(lambda: (shared / "images").symlink_to(tmp_path))
    with pytest.raises(NotOwnedError):
        owned.delete_tree(shared / "images" / "demo")
    assert (tmp_path / "demo").is_dir()


@needs_root
def test_a_planted_lock_is_neither_followed_nor_truncated(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root's")
    owned.claim(shared / "images")
    (shared / "images" / ".lock").symlink_to(tmp_path / "shadow")
    with pytest.raises(OSError, match="symbolic links"):
        owned.open_file(shared / "images" / ".lock", os.O_RDWR | os.O_CREAT)
    assert (tmp_path / "shadow").read_text() == "root's"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    with owned.replacing(tmp_path / "file", 0o640) as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "other").read_text() == "other"
    with pytest.raises(KeyError), owned.replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]
    assert (tmp_path / "file").read_text() == "new"


PROXY = Path(__file__).parent.parent / "proxy"
DESTRUCTIVE = frozenset({"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "truncate"})
EXEMPT = {
    "owned.py": "is the place for it",
    "install.py": "removes only files whose digest it has noted when it wrote them",
    "inside/warmpool_vllm/weights.py": "runs in vLLM's process, in the folder that it was given",
    "doctor/selftest.py": "puts CRIU's configuration back as it was",
}


@pytest.mark.parametrize("path", sorted(PROXY.rglob("*.py")), ids=lambda p: str(p.relative_to(PROXY)))
def test_only_one_module_destroys_anything(path: Path) -> None:
    """What is called `remove` on an object of ours, or `replace` of a text or a date, is not of the kind."""
    if str(path.relative_to(PROXY)) in EXEMPT:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, value = node.func.attr, node.func.value
        if isinstance(value, ast.Name) and value.id == "owned":
            continue
        of_a_module = isinstance(value, ast.Name) and value.id in ("os", "shutil")
        destroys = name in DESTRUCTIVE or (of_a_module and name in {"remove", "replace", "move"})
        assert not destroys, f"{path}:{node.lineno}: {name} belongs into proxy/owned.py"
        one_argument = name == "replace" and len(node.args) == 1 and not node.keywords
        assert of_a_module or not one_argument, f"{path}:{node.lineno}: a file is replaced by owned.replacing"
