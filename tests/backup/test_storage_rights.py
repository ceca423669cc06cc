"""A folder that may not be read or written, or is full: told as what it is, and left as it was."""

import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backend.backup.storage import LocalStore
from backend.errors import ConfigurationError, UnavailableError


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A store that everybody may enter, so that an account without rights can try to."""
    folder = Path(tempfile.mkdtemp(prefix="holdfast-store-"))
    LocalStore(str(folder)).replace("a.hfb", b"data")
    (folder / "a.hfb").chmod(0o644)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


def _create(store: LocalStore, name: str, data: bytes) -> None:
    with store.create(name) as file:
        file.write(data)


@contextmanager
def _an_account_without_rights() -> Iterator[None]:
    """Be nobody for a while where we are root, whom no mode of a file stops."""
    account = os.geteuid()
    if account == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(account)


def test_a_folder_that_cannot_be_read_is_unavailable_and_not_empty(open_folder: Path) -> None:
    store = LocalStore(str(open_folder))
    open_folder.chmod(0)
    attempts: list[Callable[[], object]] = [
        lambda: store.names("", ""), store.sweep, lambda: store.size("a.hfb"),
    ]  # fmt: skip
    with _an_account_without_rights():
        for attempt in attempts:
            with pytest.raises(UnavailableError, match="Permission denied"):
                attempt()


def test_without_the_right_to_write_nothing_is_written_replaced_or_deleted(
    open_folder: Path,
) -> None:
    store = LocalStore(str(open_folder))
    open_folder.chmod(0o555)
    attempts: list[Callable[[], object]] = [
        lambda: _create(store, "b.hfb", b"data"),
        lambda: store.replace("a.hfb", b"new"),
        lambda: store.delete("a.hfb"),
    ]
    with _an_account_without_rights():
        for attempt in attempts:
            with pytest.raises(UnavailableError, match="Permission denied"):
                attempt()
        assert store.read("a.hfb", 10) == b"data"
        with pytest.raises(ConfigurationError, match="BACKUP_URL"):
            store.require_usable()
    assert [left.name for left in open_folder.iterdir()] == ["a.hfb"]


def test_a_full_disk_is_unavailable_and_leaves_nothing(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # What a file may not grow beyond ends it as a disk does that is full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UnavailableError, match="cannot be written"):
            _create(store, "a.hfb", bytes(20_000))
        with pytest.raises(UnavailableError, match="cannot be written"):
            store.replace("a.hfb", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
