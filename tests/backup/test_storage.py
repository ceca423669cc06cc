"""The store shows an object whole or not at all, to its owner alone, and never replaces one."""

import fcntl
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from backend.backup.storage import LocalStore
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    UnavailableError,
)

ROOT: Final = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> LocalStore:
    return LocalStore(str(folder))


@pytest.fixture
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def _write(store: LocalStore, name: str, data: bytes) -> None:
    with store.create(name) as file:
        file.write(data)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_what_is_written_is_read_back(store: LocalStore) -> None:
    _write(store, "a.hfb", b"some bytes")
    with store.open("a.hfb") as file:
        assert file.read() == b"some bytes"
    assert store.read("a.hfb", 4) == b"some"
    assert store.size("a.hfb") == 10


def test_an_object_has_no_name_before_its_block_ends(store: LocalStore, folder: Path) -> None:
    with store.create("a.hfb") as file:
        file.write(b"half")
        file.flush()
        assert len(list(folder.iterdir())) == 1
        assert store.names("", "") == []
        assert not (folder / "a.hfb").exists()
        with pytest.raises(NotFoundError), store.open("a.hfb"):
            pass
    assert [left.name for left in folder.iterdir()] == ["a.hfb"]


def test_a_failed_write_leaves_nothing(store: LocalStore, folder: Path) -> None:
    class Broken(Exception):  # noqa: N818 - stands for any exception
        pass

    def fail() -> None:
        with store.create("a.hfb") as file:
            file.write(b"half")
            raise Broken

    with pytest.raises(Broken):
        fail()
    assert list(folder.iterdir()) == []


def test_an_object_is_never_replaced(store: LocalStore, folder: Path) -> None:
    _write(store, "a.hfb", b"first")
    with pytest.raises(ConflictError):
        _write(store, "a.hfb", b"second")
    assert store.read("a.hfb", 100) == b"first"
    assert [left.name for left in folder.iterdir()] == ["a.hfb"]


def test_of_many_writers_of_one_name_exactly_one_wins(store: LocalStore, folder: Path) -> None:
    refused: list[ConflictError] = []
    together = threading.Barrier(6)

    def write(number: int) -> None:
        together.wait(timeout=60)
        try:
            _write(store, "a.hfb", str(number).encode() * 1000)
        except ConflictError as err:
            refused.append(err)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(refused) == 5
    assert len(set(store.read("a.hfb", 10_000))) == 1
    assert store.size("a.hfb") == 1000
    assert [left.name for left in folder.iterdir()] == ["a.hfb"]


def test_a_store_is_made_at_its_first_write_and_not_before(store: LocalStore, folder: Path) -> None:
    assert store.names("", "") == []
    assert not folder.exists()
    _write(store, "a.hfb", b"data")
    assert store.names("", "") == ["a.hfb"]


def test_a_store_that_something_else_has_replaced_is_unavailable(
    store: LocalStore, folder: Path
) -> None:
    folder.write_text("a file")
    with pytest.raises(UnavailableError):
        _write(store, "a.hfb", b"data")
    with pytest.raises(UnavailableError):
        store.replace("a.hfb", b"data")
    with pytest.raises(UnavailableError):
        store.names("", "")
    assert folder.read_text() == "a file"


@pytest.mark.usefixtures("_no_umask")
def test_only_the_owner_may_read_whatever_the_umask(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "store"))
    with store.create("a.hfb") as file:
        file.write(b"data")
        (partial,) = (tmp_path / "store").iterdir()
        assert _mode(partial) == 0o600
    assert _mode(tmp_path / "store") == 0o700
    assert _mode(tmp_path / "store" / "a.hfb") == 0o600


@pytest.mark.usefixtures("_no_umask")
def test_folders_made_on_the_way_are_the_owners_alone(tmp_path: Path) -> None:
    _write(LocalStore(str(tmp_path / "above" / "store")), "a.hfb", b"data")
    assert _mode(tmp_path / "above") & 0o022 == 0, "others could put another store in its place"
    assert _mode(tmp_path / "above" / "store") == 0o700


def _link(path: Path) -> None:
    secret = path.with_name("elsewhere")
    secret.write_bytes(b"not a backup")
    path.symlink_to(secret)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


@pytest.mark.parametrize("put", [_link, _pipe, _folder, _device, _socket])
def test_only_a_plain_file_is_read_and_nothing_blocks(
    store: LocalStore, folder: Path, put: Callable[[Path], None]
) -> None:
    folder.mkdir()
    put(folder / "a.hfb")
    for attempt in (store.size, lambda name: store.read(name, 10)):
        with pytest.raises(BackupDamagedError):
            attempt("a.hfb")
    with pytest.raises(ConflictError):
        _write(store, "a.hfb", b"data")


NO_NAMES = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    ".partial-1",
    "a\n",
    "a\x00b",
    "A.hfb",
    "%2e%2e",
    "a" * 122,
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_a_path_names_nothing(store: LocalStore, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotFoundError), store.open(name):
        pass
    with pytest.raises(NotFoundError):
        store.delete(name)
    with pytest.raises(NotFoundError):
        _write(store, name, b"data")
    assert sorted(tmp_path.rglob("*")) == before


def test_names_are_sorted_and_chosen_by_both_ends(store: LocalStore) -> None:
    for name in ("b.x", "a.x", "a.y"):
        _write(store, name, b"")
    assert store.names("", ".x") == ["a.x", "b.x"]
    assert store.names("a", "") == ["a.x", "a.y"]


def test_deleting_twice_is_no_error(store: LocalStore) -> None:
    _write(store, "a.hfb", b"data")
    store.delete("a.hfb")
    store.delete("a.hfb")
    with pytest.raises(NotFoundError):
        store.size("a.hfb")


def test_sweeping_removes_what_killed_writers_left_and_nothing_else(
    store: LocalStore, folder: Path
) -> None:
    _write(store, "a.hfb", b"whole")
    for number in range(2):
        (folder / f".partial-{number}").write_bytes(b"half")
    assert store.sweep() == 2
    assert [left.name for left in folder.iterdir()] == ["a.hfb"]
    assert store.sweep() == 0


def test_sweeping_spares_what_a_living_process_writes_and_not_once_it_was_killed(
    store: LocalStore, folder: Path
) -> None:
    program = (
        "import sys, time; from backend.backup.storage import LocalStore\n"
        "with LocalStore(sys.argv[1]).create('a.hfb') as file:\n"
        "    file.write(b'half'); file.flush(); print('at it', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, folder], cwd=ROOT, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"at it\n"
        assert store.sweep() == 0
        (partial,) = folder.iterdir()
        assert partial.read_bytes() == b"half"
        writer.kill()
    assert store.sweep() == 1
    assert list(folder.iterdir()) == []


def test_a_sweep_that_comes_before_the_writers_lock_costs_it_nothing(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    swept: list[int] = []

    def late(file: int, how: int) -> None:
        if not swept:
            swept.append(0)
            swept.append(LocalStore(str(folder)).sweep())
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with store.create("a") as file:
        file.write(b"1")
    assert swept == [0, 1]
    with store.open("a") as file:
        assert file.read() == b"1"
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_sweeping_spares_a_writer_of_its_own_process_which_then_ends_well(
    store: LocalStore, folder: Path
) -> None:
    with store.create("a.hfb") as file:
        file.write(b"da")
        assert LocalStore(str(folder)).sweep() == 0
        file.write(b"ta")
    assert store.read("a.hfb", 10) == b"data"


def test_replacing_makes_the_folder_and_leaves_the_old_or_the_new_one(
    store: LocalStore, folder: Path
) -> None:
    store.replace("a.key", b"old")
    assert _mode(folder) == 0o700
    assert store.read("a.key", 10) == b"old"
    with (folder / "a.key").open("rb") as reader:
        store.replace("a.key", b"new")
        assert reader.read() == b"old", "who reads it already has the old one, whole"
    assert store.read("a.key", 10) == b"new"
    assert [(left.name, _mode(left)) for left in folder.iterdir()] == [("a.key", 0o600)]


def test_replacing_a_link_leaves_alone_what_it_leads_to(store: LocalStore, folder: Path) -> None:
    folder.mkdir()
    _link(folder / "a.key")
    store.replace("a.key", b"new")
    assert store.read("a.key", 10) == b"new"
    assert (folder / "elsewhere").read_bytes() == b"not a backup"


def test_a_copy_of_what_is_not_there_leaves_nothing(store: LocalStore, folder: Path) -> None:
    copy = LocalStore(f"{folder}-copy")
    _write(store, "a.hfb", b"data")
    copy.copy_from("a.hfb", store)
    assert copy.read("a.hfb", 10) == b"data"
    with pytest.raises(ConflictError):
        copy.copy_from("a.hfb", store)
    with pytest.raises(NotFoundError):
        copy.copy_from("b.hfb", store)
    assert copy.names("", "") == ["a.hfb"]
    assert copy.sweep() == 0


def test_a_folder_may_be_named_by_url_and_other_schemes_are_refused(tmp_path: Path) -> None:
    _write(LocalStore(f"file://{tmp_path}/store"), "a.hfb", b"data")
    assert (tmp_path / "store" / "a.hfb").read_bytes() == b"data"
    with pytest.raises(ConfigurationError, match="BACKUP_URL"):
        LocalStore("s3://bucket/prefix")


def test_a_file_in_the_place_of_the_folder_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    for location in ("store", "store/below"):
        with pytest.raises(ConfigurationError, match="BACKUP_URL"):
            LocalStore(str(tmp_path / location)).require_usable()
    assert (tmp_path / "store").read_text() == "a file"


def test_asking_whether_a_folder_can_be_used_makes_nothing(
    store: LocalStore, tmp_path: Path, folder: Path
) -> None:
    store.require_usable()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    store.require_usable()
    assert list(folder.iterdir()) == []
