"""The process that carries a backup: the same bytes, little memory, no secret to be seen."""

import base64
import hashlib
import os
import random
import signal
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import pytest

from backend.backup.archive import Stored, Written
from backend.backup.storage import LocalStore
from backend.backup.stores import StoreAddress
from backend.crypto.files import PayloadKey
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    TamperedError,
    UnavailableError,
)
from backend.services import transfer_service
from backend.services.transfer_service import get_transfer_service
from tests.backup.commands import WORKER, children, wait_for_child
from tests.backup.small_disks import room

MIB: Final = 1024 * 1024
KEY: Final = PayloadKey(bytes(range(32)), b"what the payload is bound to")
NAME: Final = "a.hfb"


@pytest.fixture(params=[False, True], ids=["itself", "carried"])
def carried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the bytes are carried by a process of their own."""
    if request.param:
        monkeypatch.setattr(transfer_service, "SMALL_BYTES", 0)
    return bool(request.param)


@pytest.fixture
def always_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_service, "SMALL_BYTES", 0)


@pytest.fixture
def address(tmp_path: Path) -> StoreAddress:
    return StoreAddress(str(tmp_path / "store"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Some megabytes that compress by half."""
    path = tmp_path / "plain"
    chance = random.Random(5)  # noqa: S311 - nothing secret
    with path.open("wb") as file:
        for _ in range(3):
            file.write(chance.randbytes(MIB // 2) + bytes(MIB // 2) + b"odd")
    return path


def write(
    address: StoreAddress,
    source: Path | BinaryIO,
    key: PayloadKey = KEY,
    require_whole: Callable[[], None] = lambda: None,
) -> tuple[Written, list[int]]:
    """Store a file; return what was said of it, and the reports on the way."""
    reports: list[int] = []
    with source.open("rb", buffering=0) if isinstance(source, Path) else source as file:
        written = get_transfer_service().write(
            address, NAME, file, key,
            size_bytes=1, require_whole=require_whole, report=reports.append,
        )  # fmt: skip
    return written, reports


def read(
    address: StoreAddress, stored: Stored, target: BinaryIO | Path, key: PayloadKey = KEY
) -> None:
    """Read an archive into a file."""
    with target.open("wb") if isinstance(target, Path) else target as file:
        get_transfer_service().read(address, stored, file, key, report=lambda _done: None)


def as_stored(written: Written) -> Stored:
    return Stored(NAME, 0, written.plain_bytes, written.sha256)


def test_what_a_process_carries_is_what_this_one_would_have_stored(
    address: StoreAddress, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Path(address.url) / NAME
    here, _ = write(address, plain)
    stored = archive.read_bytes()
    archive.unlink()
    monkeypatch.setattr(transfer_service, "SMALL_BYTES", 0)
    carried, reports = write(address, plain)
    # The payload begins with a random salt; beside that it is the same.
    assert archive.read_bytes() != stored
    assert (carried.plain_bytes, carried.size_bytes) == (here.plain_bytes, here.size_bytes)
    assert carried.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert reports == sorted(reports)
    assert 0 < reports[-1] <= plain.stat().st_size
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    read(address, as_stored(carried), tmp_path / "by a process")
    monkeypatch.setattr(transfer_service, "SMALL_BYTES", 1 << 40)
    read(address, as_stored(carried), tmp_path / "here")
    for copy in ("by a process", "here"):
        assert (tmp_path / copy).read_bytes() == plain.read_bytes()


# What goes wrong, and as what it is told.
Spoil = Callable[[StoreAddress, Stored, Path], Any]


def _again(address: StoreAddress, _stored: Stored, plain: Path) -> None:
    write(address, plain)


def _elsewhere(address: StoreAddress, _stored: Stored, plain: Path) -> None:
    write(replace(address, url="ftp://example.org/backups"), plain)


def _onto_a_full_disk(address: StoreAddress, _stored: Stored, plain: Path) -> None:
    (Path(address.url) / NAME).unlink()
    with room(4096):
        write(address, plain)


def _of_half_a_dump(address: StoreAddress, _stored: Stored, plain: Path) -> None:
    def refuse() -> None:
        raise UnavailableError("pg_dump failed: the server went away")

    (Path(address.url) / NAME).unlink()
    write(address, plain, require_whole=refuse)


def _what_is_gone(address: StoreAddress, stored: Stored, plain: Path) -> None:
    read(address, replace(stored, name="b.hfb"), plain)


def _with_another_key(address: StoreAddress, stored: Stored, plain: Path) -> None:
    read(address, stored, plain, PayloadKey(bytes(32), KEY.context))


def _another_archive(address: StoreAddress, stored: Stored, plain: Path) -> None:
    read(address, replace(stored, sha256="0" * 64), plain)


def _what_is_longer_than_it_should_be(address: StoreAddress, stored: Stored, plain: Path) -> None:
    read(address, replace(stored, plain_bytes=stored.plain_bytes - 1), plain)


def _a_pipe(address: StoreAddress, stored: Stored, plain: Path) -> None:
    (Path(address.url) / NAME).unlink()
    os.mkfifo(Path(address.url) / NAME)
    read(address, stored, plain)


def _for_nobody(address: StoreAddress, stored: Stored, _plain: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    read(address, stored, os.fdopen(writer, "wb", buffering=0))


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (_again, ConflictError, "a.hfb is already stored"),
        (_elsewhere, ConfigurationError, "BACKUP_URL"),
        (_onto_a_full_disk, UnavailableError, "the backup store cannot be written: File too large"),
        (_of_half_a_dump, UnavailableError, "pg_dump failed: the server went away"),
        (_what_is_gone, BackupDamagedError, "the archive of the backup is missing"),
        (_with_another_key, TamperedError, "the file was cut, extended or changed"),
        (_another_archive, BackupDamagedError, "is not the one its manifest names"),
        (_what_is_longer_than_it_should_be, BackupDamagedError, "unpacks to more than"),
        (_a_pipe, BackupDamagedError, "a.hfb is no plain file"),
        (_for_nobody, BrokenPipeError, ""),
    ],
)
@pytest.mark.usefixtures("carried")
def test_what_goes_wrong_is_told_as_the_same_error_wherever_it_happens(
    address: StoreAddress,
    plain: Path,
    spoil: Spoil,
    kind: type[Exception],
    words: str,
) -> None:
    written, _ = write(address, plain)
    running = children(os.getpid())
    with pytest.raises(kind) as refusal:
        spoil(address, as_stored(written), plain)
    assert type(refusal.value) is kind
    assert words in str(refusal.value)
    assert set(LocalStore(address.url).names("", "")) <= {NAME}
    assert children(os.getpid()) == running


@pytest.mark.usefixtures("always_carried")
def test_a_target_that_takes_no_more_is_told_as_unavailable(
    address: StoreAddress, plain: Path
) -> None:
    written, _ = write(address, plain)
    with pytest.raises(UnavailableError, match="No space left"):
        read(address, as_stored(written), Path("/dev/full"))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "garbage",
        "[1]",
        '{"done": null}',
        '{"error": "Any"}',
        None,
    ],
)
@pytest.mark.usefixtures("always_carried")
def test_a_process_that_is_not_there_dies_or_talks_nonsense_is_told_as_unavailable(
    address: StoreAddress,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str | None,
) -> None:
    program = tmp_path / "python"
    if words is not None:
        program.write_text(f"#!/bin/sh\nprintf '%s' '{words}'\n")
        program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    running = children(os.getpid())
    with pytest.raises(UnavailableError):
        write(address, plain)
    assert LocalStore(address.url).names("", "") == []
    assert children(os.getpid()) == running


@pytest.mark.usefixtures("always_carried")
def test_no_secret_is_on_the_command_line_or_in_the_environment_of_the_process(
    address: StoreAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ("ENCRYPTION_KEY", "encryption_keys_previous", "JWT_SECRET_KEY", "DATABASE_URL",
               "VAULT_TOKEN")  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, f"a secret in {name}")
    # What clients of S3 read, they must still find there.
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a token for the bucket")
    reader, writer = os.pipe()
    with ThreadPoolExecutor(1) as pool, os.fdopen(writer, "wb") as source:
        writing = pool.submit(write, address, os.fdopen(reader, "rb", buffering=0))
        worker = wait_for_child(os.getpid(), WORKER)
        seen = Path(f"/proc/{worker}/cmdline").read_bytes()
        seen += Path(f"/proc/{worker}/environ").read_bytes()
        os.kill(worker, signal.SIGCONT)
        source.write(b"the dump")
    assert writing.result()[0].plain_bytes == len("the dump")
    assert b"AWS_SESSION_TOKEN=a token for the bucket" in seen
    assert b"a secret in" not in seen
    assert not any(name.encode() in seen for name in secrets)
    spelled = (KEY.data_key, KEY.data_key.hex().encode(), base64.b64encode(KEY.data_key))
    assert not any(key in seen for key in spelled)
