"""
Backups of the first format: they are listed, proven, restored and given to other keys for ever.

The golden one was made once, on SQLite, by the last version that wrote this format: the header
lies in the archive, the manifest is flat and names no keys apart, the schema is 0002. It holds an
administrator and one person with rows everywhere. A new format gets a new one; this one is never
made anew.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import text

from backend.backup.manifest import archive_name, header_name, manifest_name
from backend.crypto import keyring
from backend.crypto.files import HEADER_BYTES
from backend.db_utils import get_engine, session_scope
from backend.models import DATA_MAP, BackupStatus
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.restore_service import get_restore_service
from backend.services.restored import Restored
from backend.services.rotation_service import get_rotation_service
from backend.services.schema_service import get_schema_service
from backend.services.setup_service import get_setup_service
from tests.backup.refusals import (
    DAMAGED,
    code_of,
    create,
    listed,
    object_of,
    refused,
    verify,
)
from tests.conftest import ADMIN, KEY, OTHER_KEY, PASSWORD, Run, Service, clear_caches
from tests.privacy.people import cells_in_plain

GOLDEN: Final = Path(__file__).parent / "golden"
OLD: Final = UUID("5a442152-7b73-48fd-acbc-d25805eae8db")
DIGESTS: Final = {
    archive_name(str(OLD)): "49711ba4f61d074595c5e98ab525cfed0efd770f9b4e8e72116abf621126bd01",
    manifest_name(str(OLD)): "a69148db5cdd54373ddae1c72a6849d9ab6228bdc394ee464c07864909877529",
}
# How many cells held a word of the person then, and the digest of all of them, sorted.
WORDS: Final = (66, "afcb39515ce517e0e9bc22d8317dffc8e05228d34ba7441050d3b830b58904ab")


@pytest.fixture
def old(sqlite_service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """An installation of today with the golden backup in its store; nothing in it is due."""
    for data_type in DATA_MAP.by_data_type:
        monkeypatch.setenv(f"RETENTION_{data_type}_DAYS".upper(), "36500")
    clear_caches()
    get_setup_service().open()
    shutil.copytree(GOLDEN, sqlite_service.folder / "backups")
    # As every start does: it takes up what the store has and the database does not know.
    get_backup_service().recover()
    return sqlite_service


def _restore() -> Restored:
    return get_restore_service().restore(OLD, COMMAND_LINE, dry_run=False, confirm=True)


def _words() -> tuple[int, str]:
    found = sorted(cell for cell in cells_in_plain() if cell.startswith("A") and "-mark" in cell)
    return len(found), hashlib.sha256("\n".join(found).encode()).hexdigest()


def _breaks() -> dict[str, str]:
    with session_scope(read_only=True) as session:
        return {one.backup_id: one.why for one in get_catalogue_service().breaks(session)}


def _document(service: Service) -> dict[str, Any]:
    raw = object_of(service, OLD, manifest_name).read_bytes()
    document: dict[str, Any] = json.loads(raw)
    return document


def _use_keys(monkeypatch: pytest.MonkeyPatch, primary: str, previous: str = "") -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", primary)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
    clear_caches()
    get_setup_service().open()


def _rotate_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give everything to another key, and go on without the old one."""
    _use_keys(monkeypatch, OTHER_KEY, KEY)
    done = get_rotation_service().rotate(COMMAND_LINE)
    assert (done.finished, done.failed) == (True, {})
    _, old_key = keyring.current().keys
    get_rotation_service().disable(old_key.key_id.hex(), COMMAND_LINE)
    _use_keys(monkeypatch, OTHER_KEY)


def test_the_golden_files_are_those_that_were_made_then() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in GOLDEN.iterdir()}
    assert found == DIGESTS
    document = json.loads((GOLDEN / manifest_name(str(OLD))).read_bytes())
    assert document.keys() == {"manifest", "mac"}
    assert isinstance(document["manifest"]["previous"], str)


def test_it_is_listed(old: Service, run: Run) -> None:
    (record,) = listed()
    assert (record.id, record.label, record.kind) == (OLD, "the first format", "full")
    assert record.status is BackupStatus.COMPLETE
    assert record.sha256 == DIGESTS[archive_name(str(OLD))]
    assert _breaks() == {}
    answer = run("backup", "list", "--json").json
    assert [item["id"] for item in answer["items"]] == [str(OLD)]
    assert answer["breaks"] == []


def test_it_is_proven(old: Service) -> None:
    get_archive_service().read_through(get_archive_service().manifest(OLD))
    assert verify(OLD).verified_at is not None
    assert [record.verified_at is not None for record in listed()] == [True]


def test_it_restores_and_is_brought_to_the_schema_of_today(old: Service) -> None:
    assert _words()[0] == 0
    restored = _restore()
    assert restored.migrations[0] == "0003"
    assert get_schema_service().revision(get_engine()) == get_schema_service().wanted
    assert _words() == WORDS
    manifest = get_archive_service().manifest(OLD)
    assert manifest.schema_revision == "0002"
    with get_engine().connect() as connection:
        for table in ("users", "bookings", "companions", "invoice_lines", "data_consents"):
            rows = connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()  # noqa: S608 - names from here
            assert rows == manifest.tables[table]
    get_auth_service().sign_in(ADMIN, PASSWORD)


def test_it_is_still_there_after_the_start_that_follows_its_restore(old: Service) -> None:
    """It was made by another installation, as a lost machine's backups were."""
    _restore()
    get_setup_service().recover()
    assert [(record.id, record.status) for record in listed()] == [(OLD, BackupStatus.COMPLETE)]
    assert create()
    assert verify(OLD).verified_at is not None


def test_the_next_backup_names_it_and_misses_it(
    old: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_MAX_AGE_DAYS", "36500")
    clear_caches()
    get_setup_service().open()
    following = create()
    manifest = get_archive_service().manifest(OLD)
    assert get_archive_service().manifest(following).previous == manifest.reference()
    assert _breaks() == {}
    object_of(old, OLD, manifest_name).unlink()
    assert list(_breaks()) == [str(OLD)]


def test_it_is_given_to_another_key_and_the_old_one_can_go(
    old: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, before = object_of(old, OLD).read_bytes(), get_archive_service().manifest(OLD)
    _rotate_away(monkeypatch)
    assert object_of(old, OLD).read_bytes() == archive
    assert object_of(old, OLD, header_name).stat().st_size == HEADER_BYTES
    assert object_of(old, OLD, header_name).read_bytes() != archive[:HEADER_BYTES]
    after = get_archive_service().manifest(OLD)
    assert _document(old)["format"] == 2
    assert (after.link, after.sha256) == (before.link, before.sha256)
    assert before.key_id not in {after.key_id, *after.row_keys}
    get_archive_service().read_through(after)
    assert verify(OLD).verified_at is not None
    _restore()
    assert _words() == WORDS
    _use_keys(monkeypatch, OTHER_KEY)
    get_auth_service().sign_in(ADMIN, PASSWORD)


def test_a_rotation_that_was_cut_between_its_two_writes_leaves_it_whole(
    old: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is given to the new key first; the manifest still names the old one."""
    of_before = object_of(old, OLD, manifest_name).read_bytes()
    _use_keys(monkeypatch, OTHER_KEY, KEY)
    get_archive_service().rewrap(OLD)
    object_of(old, OLD, manifest_name).write_bytes(of_before)
    assert verify(OLD).verified_at is not None
    _rotate_away(monkeypatch)
    assert verify(OLD).verified_at is not None
    _restore()
    assert _words() == WORDS


def test_a_flipped_bit_in_its_archive_is_noticed_under_both_keys(
    old: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = object_of(old, OLD)
    whole = path.read_bytes()
    for rotated in (False, True):
        if rotated:
            # The header in the archive is used no more, and is part of what was signed.
            _rotate_away(monkeypatch)
        # In its magic, its description, its wrapped key, the zeros behind it and its MAC; then in
        # the payload.
        for at in (0, 60, 170, 2000, HEADER_BYTES - 1, HEADER_BYTES, 9000, len(whole) - 1):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert code_of(lambda: verify(OLD)) == DAMAGED, at
        assert refused(old, OLD) == DAMAGED
        path.write_bytes(whole)
        assert verify(OLD).error is None


def test_a_flipped_bit_in_its_manifest_is_noticed(old: Service) -> None:
    path = object_of(old, OLD, manifest_name)
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        code = code_of(lambda: get_archive_service().manifest(OLD))
        assert code in {DAMAGED, "unknown_key"}, at


def test_a_header_of_another_backup_beside_it_is_refused(old: Service) -> None:
    following = create()
    source = object_of(old, following, header_name)
    object_of(old, OLD, header_name).write_bytes(source.read_bytes())
    assert refused(old, OLD) == DAMAGED


@pytest.mark.parametrize("to", [0, HEADER_BYTES - 1, HEADER_BYTES, 9000, -1])
def test_it_is_refused_when_it_was_cut(old: Service, to: int) -> None:
    path = object_of(old, OLD)
    path.write_bytes(path.read_bytes()[:to])
    assert refused(old, OLD) == DAMAGED
