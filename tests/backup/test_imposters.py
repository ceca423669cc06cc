"""What lies where a backup should be, and is something else, is refused; nothing waits for it."""

import hashlib
import itertools
import os
import socket
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Final
from uuid import UUID, uuid4

import pytest
import zstandard
from sqlalchemy import text

from backend.backup.manifest import Manifest, archive_name, header_name, manifest_name
from backend.backup.storage import LocalStore
from backend.db_utils import get_engine
from backend.services import transfer_service
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.checkpoint_service import is_checkpoint
from backend.services.encryption_service import get_encryption_service
from backend.services.pruning_service import get_pruning_service
from backend.services.rotation_service import get_rotation_service
from backend.services.schema_service import get_schema_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import signer
from tests.backup.refusals import (
    DAMAGED,
    Damage,
    code_of,
    create,
    listed,
    object_of,
    refused,
    restore,
    verify,
)
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import plant

NAMES: Final = (archive_name, header_name, manifest_name)
# Of the three objects of a backup, each one, each two and all.
SUBSETS: Final = [
    subset for count in (1, 2, 3) for subset in itertools.combinations(range(3), count)
]
ANOTHER_DATABASE: Final = "CREATE TABLE users (id INTEGER); CREATE TABLE bookings (id INTEGER);"


def _link(path: Path) -> None:
    copy = path.with_name("elsewhere")
    path.rename(copy)
    path.symlink_to(copy)


def _zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _device(path: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root may make a device")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", NAMES, ids=["archive", "header", "manifest"])
@pytest.mark.parametrize("put", [_link, _zeros, _device, _pipe, _socket, _folder])
def test_what_is_no_plain_file_is_refused_at_once(
    sqlite_service: Service, put: Damage, name: Callable[[str], str]
) -> None:
    backup_id = create()
    put(object_of(sqlite_service, backup_id, name))
    assert refused(sqlite_service, backup_id, readable=name is not manifest_name) == DAMAGED
    assert [record.id for record in listed()] == [backup_id]
    assert create()


@pytest.mark.parametrize("which", SUBSETS, ids=str)
def test_an_older_backup_does_not_pass_under_the_name_of_the_newest(
    sqlite_service: Service, which: tuple[int, ...]
) -> None:
    older = create()
    plant("A")
    newest = create()
    for name in (NAMES[number] for number in which):
        source = object_of(sqlite_service, older, name)
        object_of(sqlite_service, newest, name).write_bytes(source.read_bytes())
    assert refused(sqlite_service, newest, readable=2 not in which) == DAMAGED
    restore(older, dry_run=True)


def _rewrite(service: Service, manifest: Manifest) -> None:
    """Sign a manifest, as only whoever has the key can."""
    store = LocalStore(str(service.folder / "backups"))
    store.replace(manifest_name(manifest.id), manifest.document(signer(manifest.key_id)))


def _seal(service: Service, backup_id: UUID, plain: bytes, *, claimed: int | None = None) -> None:
    """Put something else into a backup, sealed, named and signed as if we had made it."""
    manifest = get_archive_service().manifest(backup_id)
    key, _ = get_archive_service().key(manifest)
    sealed = b"".join(key.seal([zstandard.ZstdCompressor(level=1).compress(plain)]))
    object_of(service, backup_id).write_bytes(sealed)
    told = len(plain) if claimed is None else claimed
    digest = hashlib.sha256(sealed).hexdigest()
    _rewrite(service, replace(manifest, plain_bytes=told, size_bytes=len(sealed), sha256=digest))


def test_the_archive_and_header_of_another_backup_do_not_pass_even_where_they_are_signed_for(
    sqlite_service: Service,
) -> None:
    older, newest = create(), create()
    for name in (archive_name, header_name):
        source = object_of(sqlite_service, older, name)
        object_of(sqlite_service, newest, name).write_bytes(source.read_bytes())
    told = get_archive_service().manifest(older)
    _rewrite(sqlite_service, replace(told, id=str(newest)))
    assert refused(sqlite_service, newest) == DAMAGED


@pytest.mark.parametrize("small_bytes", [0, 8 * 1024 * 1024], ids=["in a process", "here"])
def test_a_bomb_in_a_correctly_sealed_backup_is_refused(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    """See also `test_a_bomb_in_a_sealed_archive_is_stopped_in_little_memory`."""
    backup_id = create()
    plain_bytes = get_archive_service().manifest(backup_id).plain_bytes
    _seal(sqlite_service, backup_id, bytes(512 * 1024 * 1024), claimed=plain_bytes)
    monkeypatch.setattr(transfer_service, "SMALL_BYTES", small_bytes)
    assert refused(sqlite_service, backup_id) == DAMAGED


def _another_database(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(ANOTHER_DATABASE)
    return path.read_bytes()


@pytest.mark.parametrize("what", ["nothing", "zeros", "text", "database", "half"])
def test_what_is_sealed_and_is_not_our_database_does_not_restore(
    sqlite_service: Service, tmp_path: Path, what: str
) -> None:
    backup_id = create()
    whole = (sqlite_service.folder / "holdfast.db").read_bytes()
    plain = {
        "nothing": b"",
        "zeros": bytes(1024 * 1024),
        "text": b"PGDMP and no more\n" * 500,
        "database": _another_database(tmp_path / "other.db"),
        "half": whole[: len(whole) // 8192 * 4096],
    }[what]
    _seal(sqlite_service, backup_id, plain)
    get_archive_service().read_through(get_archive_service().manifest(backup_id))
    assert code_of(lambda: verify(backup_id)) == DAMAGED
    assert code_of(lambda: restore(backup_id)) == DAMAGED


def test_rows_that_the_manifest_does_not_count_are_refused(service: Service) -> None:
    """Also where both are ours: a dump tool that left rows out must not pass."""
    backup_id = create()
    manifest = get_archive_service().manifest(backup_id)
    tables = manifest.tables | {"users": manifest.tables["users"] + 1}
    _rewrite(service, replace(manifest, tables=tables))
    assert code_of(lambda: verify(backup_id)) == DAMAGED
    assert code_of(lambda: restore(backup_id)) == DAMAGED


def test_a_backup_that_was_never_made_is_not_found(sqlite_service: Service) -> None:
    assert code_of(lambda: verify(uuid4())) == "not_found"
    assert code_of(lambda: restore(uuid4())) == "not_found"


def test_a_backup_of_another_key_opens_only_while_that_key_is_configured(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = create()
    key_id = get_archive_service().manifest(backup_id).key_id
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()
    restore(backup_id)
    sealed_anew = create()
    assert get_archive_service().manifest(sealed_anew).key_id != key_id
    monkeypatch.setenv("ENCRYPTION_KEY", KEY)
    monkeypatch.delenv("ENCRYPTION_KEYS_PREVIOUS")
    clear_caches()
    get_encryption_service().load()
    assert code_of(lambda: verify(sealed_anew)) == "unknown_key"
    assert code_of(lambda: restore(sealed_anew)) == "unknown_key"


def test_a_backup_of_a_newer_schema_is_refused(service: Service) -> None:
    _stamp("9999")
    newer = create()
    _stamp(get_schema_service().wanted)
    assert code_of(lambda: verify(newer)) == "schema_mismatch"
    assert code_of(lambda: restore(newer)) == "schema_mismatch"


def _stamp(revision: str) -> None:
    with get_engine().begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


def test_a_backup_of_the_other_engine_is_refused(sqlite_service: Service) -> None:
    backup_id = create()
    _rewrite(
        sqlite_service, replace(get_archive_service().manifest(backup_id), engine="postgresql")
    )
    assert code_of(lambda: verify(backup_id)) == "schema_mismatch"
    assert code_of(lambda: restore(backup_id)) == "schema_mismatch"


def test_a_damaged_manifest_does_not_keep_the_next_backup_from_being_made(
    sqlite_service: Service,
) -> None:
    path = object_of(sqlite_service, create(), manifest_name)
    path.write_bytes(path.read_bytes().replace(b'"size_bytes": ', b'"size_bytes": 1'))
    assert create()


@pytest.mark.parametrize("put", [_link, _pipe, lambda path: path.write_text("{}")])
def test_a_damaged_backup_can_be_deleted(sqlite_service: Service, put: Damage) -> None:
    backup_id, whole = create(), create()
    put(object_of(sqlite_service, backup_id, manifest_name))
    get_pruning_service().delete(backup_id, COMMAND_LINE)
    there = (path.name for path in (sqlite_service.folder / "backups").iterdir())
    left = {name for name in there if not is_checkpoint(name)} - {"elsewhere"}
    assert left == {name(str(whole)) for name in NAMES} | {f"{backup_id}.gone.json"}


def test_a_backup_with_a_folder_in_it_can_be_deleted(sqlite_service: Service) -> None:
    backup_id, _ = create(), create()
    _folder(object_of(sqlite_service, backup_id, manifest_name))
    get_pruning_service().delete(backup_id, COMMAND_LINE)
    assert str(backup_id) not in {str(record.id) for record in listed()}


def test_a_stray_file_in_the_store_hides_no_backup(sqlite_service: Service) -> None:
    record = create()
    (sqlite_service.folder / "backups" / "copy-of-monday.manifest.json").write_text("{}")
    assert [one.id for one in listed()] == [record]
    assert create()


def test_what_lies_in_the_place_of_a_manifest_does_not_stop_a_rotation(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange, whole = create(), create()
    before = get_archive_service().manifest(whole).key_id
    _pipe(object_of(sqlite_service, strange, manifest_name))
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()
    assert get_rotation_service().rotate(COMMAND_LINE).changed["backups"] == 1
    assert get_archive_service().manifest(whole).key_id != before


def test_a_backup_that_cannot_be_proven_does_not_keep_others_from_it(
    sqlite_service: Service,
) -> None:
    older, newest = create(), create()
    key_id = bytes.fromhex(get_archive_service().manifest(newest).key_id)
    path = object_of(sqlite_service, newest, header_name)
    path.write_bytes(path.read_bytes().replace(key_id, b"\x00" * len(key_id)))
    assert code_of(lambda: get_backup_service().prove_next(COMMAND_LINE)) == "unknown_key"
    assert next(one for one in listed() if one.id == older).verified_at is not None


def test_what_cannot_be_copied_does_not_keep_other_objects_from_it(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("BACKUP_URL", f"{first},{second}")
    clear_caches()
    get_setup_service().open()
    create()
    (first / "0-stray").symlink_to("/etc/hostname")
    backup_id = create()
    assert {name(str(backup_id)) for name in NAMES} <= {path.name for path in second.iterdir()}
    assert not (second / "0-stray").exists()


@pytest.mark.parametrize("put", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_plain_file_does_not_stop_the_sweeping(tmp_path: Path, put: Damage) -> None:
    """It is done at every start."""
    swept: list[int] = []
    partial = tmp_path / ".partial-1"
    put(partial)
    sweeper = Thread(target=lambda: swept.append(_swept(tmp_path)), daemon=True)
    sweeper.start()
    sweeper.join(60)
    if waits := sweeper.is_alive():
        # Whoever opens the other end lets it go on.
        os.close(os.open(partial, os.O_WRONLY))
    sweeper.join()
    assert not waits
    assert swept[0] >= 0


def _swept(folder: Path) -> int:
    try:
        return LocalStore(str(folder)).sweep()
    except OSError:
        return -1
