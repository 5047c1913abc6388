"""Folders that are warmpool's alone, and that nothing is destroyed outside of them. Attackers are real: another uid."""

from __future__ import annotations

import ast
import os
import shutil
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from proxy.checkpoint.errors import StoreError
from proxy.checkpoint.store import CheckpointStore
from proxy.config.pool import PoolSettings
from proxy.config.server import AdminSettings
from proxy.errors import HostError
from proxy.host import owned
from proxy.host.owned import NotOwnedError
from proxy.pool.usage import Usage
from proxy.runtime.podman import bundle
from proxy.runtime.process import unlinked_files
from proxy.runtime.state_dir import Claim, of_earlier_version
from proxy.server import listeners
from tests.support import ROOT

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
    for _ in range(2):
        with pytest.raises(NotOwnedError, match="belongs to user 65534"):
            owned.claim(shared / "images", [".lock"])
        assert (shared / "images").stat().st_mode & 0o777 == 0o700, "nobody can add more"


# --- the attacks of a local user with a shell, on what uses such folders ---


@needs_root
def test_a_checkpoint_dir_that_another_user_made_first_is_not_used(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root's")

    def plant() -> None:
        (shared / "warmpool").mkdir()
        (shared / "warmpool" / ".lock").symlink_to(tmp_path / "shadow")

    as_nobody(plant)
    with pytest.raises(StoreError, match=r"checkpoint_dir .*/warmpool: belongs to user 65534"):
        CheckpointStore(shared / "warmpool", 0).open()
    assert (tmp_path / "shadow").read_text() == "root's"


@needs_root
async def test_what_was_planted_in_a_checkpoint_dir_is_not_restored_from(shared: Path) -> None:
    (shared / "warmpool").mkdir(mode=0o777)
    (shared / "warmpool").chmod(0o777)

    def plant() -> None:
        (shared / "warmpool" / "demo").mkdir()
        (shared / "warmpool" / "demo" / "manifest.json").write_text("{}")

    as_nobody(plant)
    with pytest.raises(StoreError, match="demo: belongs to user 65534, who could write to"):
        CheckpointStore(shared / "warmpool", 0).open()


@needs_root
def test_an_archive_dir_of_another_user_is_no_archive(shared: Path, tmp_path: Path) -> None:
    as_nobody(lambda: (shared / "archive").mkdir())
    store = CheckpointStore(tmp_path / "images", 0, shared / "archive")
    store.open()
    assert store.archive is None
    assert "archive: belongs to user 65534" in (store.archive_refused or "")
    store.close()


@needs_root
def test_a_state_dir_that_another_user_made_first_is_not_used(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root's")

    def plant() -> None:
        (shared / "state" / "logs").mkdir(parents=True)
        (shared / "state" / "lock").symlink_to(tmp_path / "shadow")

    as_nobody(plant)
    with pytest.raises(HostError, match=r"state_dir .*/state: belongs to user 65534"):
        Claim(shared / "state").acquire()
    assert (tmp_path / "shadow").read_text() == "root's"


def test_a_state_dir_of_ours_is_tightened_and_a_planted_lock_or_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root's")
    (tmp_path / "state" / "logs").mkdir(parents=True)
    (tmp_path / "state").chmod(0o755)
    claim = Claim(tmp_path / "state")
    claim.acquire()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "logs").stat().st_mode & 0o777 == 0o700
    claim.log_path("demo-1").symlink_to(tmp_path / "shadow")
    with pytest.raises(HostError, match=r"demo-1\.log"):
        claim.open_log("demo-1")
    claim.release()
    (tmp_path / "state" / "lock").unlink()
    (tmp_path / "state" / "lock").symlink_to(tmp_path / "shadow")
    with pytest.raises(HostError, match="state_dir"):
        claim.acquire()
    assert (tmp_path / "shadow").read_text() == "root's"


@needs_root
def test_the_admin_socket_is_not_made_where_others_could_exchange_it(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all").chmod(0o777)
    with pytest.raises(HostError, match="others may write to"):
        listeners.admin_socket(AdminSettings(socket=tmp_path / "all" / "admin.sock"))


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": 0o4755}, {"mode": 0o2755}, {"mode": "0600"}, {"path": "/etc/passwd"}, {"path": "link_remap.1"},
        {"uid": -1}, {"gid": 1 << 40}, {"names": ["../../etc/cron.d/evil"]}, {"names": "x"}, {"more": 1},
    ],
)  # fmt: skip
def test_an_index_of_links_makes_no_setuid_file_and_nothing_elsewhere(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    entry = {"path": str(tmp_path / "link_remap.7"), "mode": 0o600, "uid": os.getuid(), "gid": 0, "names": ["name"]}
    (tmp_path / "image" / "links").mkdir(parents=True)
    (tmp_path / "image" / "links" / "0").write_text("#!/bin/sh")
    index = tmp_path / "image" / "links" / "index.json"
    index.write_bytes(orjson.dumps([entry]))
    assert unlinked_files.put_back(tmp_path / "image") == [tmp_path / "link_remap.7"]
    assert (tmp_path / "name").stat().st_mode & 0o7777 == 0o600
    (tmp_path / "link_remap.7").unlink()
    index.write_bytes(orjson.dumps([{**entry, **changed}]))
    with pytest.raises(StoreError, match="not an index of links"):
        unlinked_files.put_back(tmp_path / "image")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "name"]


@needs_root
def test_links_replace_no_file_of_another_owner(shared: Path, tmp_path: Path) -> None:
    as_nobody(lambda: (shared / "theirs").write_text("theirs"))
    entry = {"path": str(shared / "link_remap.7"), "mode": 0o600, "uid": 0, "gid": 0, "names": ["theirs"]}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "0").write_text("ours")
    (tmp_path / "links" / "index.json").write_bytes(orjson.dumps([entry]))
    with pytest.raises(FileExistsError):
        unlinked_files.put_back(tmp_path)
    assert (shared / "theirs").read_text() == "theirs"


# --- folders that a cleaner removes ---


def test_a_state_dir_that_a_cleaner_removed_is_made_again_and_locked(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "state")
    claim.acquire()
    for gone in (tmp_path / "state" / "logs", tmp_path / "state"):
        shutil.rmtree(gone)
        claim.ensure()
        os.close(claim.open_log("demo-1"))
        with pytest.raises(HostError, match="another warmpool uses"):
            Claim(tmp_path / "state").acquire()
    claim.release()


async def test_a_checkpoint_dir_that_a_cleaner_removed_is_made_again_and_locked(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "images", 0)
    store.open()
    shutil.rmtree(store.root)
    store.begin("demo", 0)
    assert store.weights("demo").is_dir()
    with pytest.raises(StoreError, match="another warmpool uses it"):
        CheckpointStore(tmp_path / "images", 0).open()
    store.close()


def test_the_state_folder_of_an_earlier_version_is_found_and_named(tmp_path: Path) -> None:
    assert of_earlier_version(tmp_path / "state", tmp_path) is None
    earlier = Claim(tmp_path / "run")
    earlier.acquire()
    earlier.release()
    said = of_earlier_version(tmp_path / "state", tmp_path)
    assert said is not None
    assert f'pool.state_dir = "{tmp_path}/run"' in said
    assert earlier.owner in said
    assert of_earlier_version(tmp_path / "run", tmp_path) is None


def test_the_default_state_dir_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert PoolSettings().state_dir == Path("/var/lib/warmpool")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert PoolSettings().state_dir == Path("/home/alice/.local/state/warmpool")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/alice/state")
    assert PoolSettings().state_dir == Path("/home/alice/state/warmpool")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/of-systemd:/var/lib/other")
    assert PoolSettings().state_dir == Path("/var/lib/of-systemd")


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


def test_counts_that_are_a_pipe_or_a_link_are_not_waited_for_nor_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('{"demo": [5, 0]}')
    for plant in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "other")):
        (tmp_path / "usage.json").unlink(missing_ok=True)
        plant(tmp_path / "usage.json")
        usage = Usage(tmp_path / "usage.json")
        usage.load()
        assert usage.ranking() == []


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


PROXY = ROOT / "proxy"
DESTRUCTIVE = frozenset({"rmtree", "unlink", "rmdir", "removedirs", "rename", "renames"})
EXEMPT = {
    "host/owned.py": "is the place for it",
    "systemd/units.py": "removes only files whose digest it has noted when it wrote them",
    "engine/vllm_extension/warmpool_vllm/weights.py": "runs in vLLM's process, in the folder that it was given",
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
        destroys = name in DESTRUCTIVE or (of_a_module and name in {"remove", "replace", "move", "truncate"})
        assert not destroys, f"{path}:{node.lineno}: {name} belongs into proxy/host/owned.py"
        one_argument = name == "replace" and len(node.args) == 1 and not node.keywords
        assert of_a_module or not one_argument, f"{path}:{node.lineno}: a file is replaced by owned.replacing"
