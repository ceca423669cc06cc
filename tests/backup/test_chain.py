"""What is taken out of the chain of backups, or put into it, shows; what we deleted does not."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient

from backend.backup.manifest import Manifest, manifest_name
from backend.backup.storage import LocalStore
from backend.crypto import keyring
from backend.db_utils import session_scope
from backend.errors import HoldfastError, NotFoundError
from backend.models import BackupRecord
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import signer
from tests.conftest import KEY, OTHER_KEY, Run, Service, clear_caches

Headers = dict[str, str]
MISSING = "is missing, and was not deleted by "
OTHER_ID = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def chain(sqlite_service: Service) -> list[UUID]:
    """Three backups, each naming the one before."""
    return [_create() for _ in range(3)]


@pytest.fixture
def store(sqlite_service: Service) -> LocalStore:
    return LocalStore(str(sqlite_service.folder / "backups"))


def _create() -> UUID:
    return get_backup_service().create(COMMAND_LINE).id


def _breaks() -> dict[str, str]:
    with session_scope(read_only=True) as session:
        return {one.backup_id: one.why for one in get_catalogue_service().breaks(session)}


def _listed() -> list[UUID]:
    with session_scope(read_only=True) as session:
        return [record.id for record in get_catalogue_service().records(session)]


def _take_away(service: Service, backup_id: UUID) -> dict[Path, bytes]:
    """Remove a backup as somebody with access to the store would."""
    paths = list((service.folder / "backups").glob(f"{backup_id}.*"))
    taken = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    return taken


def _forget(backup_id: UUID) -> None:
    """Take away what the database knows, too: then the chain alone can tell."""
    with session_scope() as session:
        session.delete(session.get_one(BackupRecord, backup_id))


def _delete(backup_id: UUID) -> None:
    get_pruning_service().delete(backup_id, COMMAND_LINE)


def _manifest(backup_id: UUID) -> Manifest:
    return get_archive_service().manifest(backup_id)


def _sign(store: LocalStore, manifest: Manifest) -> None:
    """Write a manifest as whoever has the key can."""
    store.replace(manifest_name(manifest.id), manifest.document(signer(manifest.key_id)))


def _rotate_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give everything to another key, and go on without the old one."""
    old = keyring.current().primary.key_id.hex()
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    for previous in (KEY, ""):
        monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
        clear_caches()
        get_setup_service().open()
        if previous:
            assert get_rotation_service().rotate(COMMAND_LINE).failed == {}
            get_rotation_service().disable(old, COMMAND_LINE)


def test_each_backup_names_the_one_before(chain: list[UUID]) -> None:
    first, second, third = map(_manifest, chain)
    assert first.previous is None
    assert second.previous == first.reference()
    assert third.previous == second.reference()
    assert _breaks() == {}


def test_a_backup_that_somebody_took_away_shows_until_it_is_put_back(
    chain: list[UUID], sqlite_service: Service
) -> None:
    taken = _take_away(sqlite_service, chain[1])
    assert list(_breaks()) == [str(chain[1])]
    # Also where the database was lost, or knows nothing of it.
    _forget(chain[1])
    ((backup_id, why),) = _breaks().items()
    assert backup_id == str(chain[1])
    assert why.startswith(MISSING)
    assert _listed() == [chain[2], chain[0]]
    for path, data in taken.items():
        path.write_bytes(data)
    assert _breaks() == {}
    assert get_backup_service().verify(chain[1], COMMAND_LINE).verified_at is not None


def test_a_gap_of_several_backups_shows_at_its_end_and_in_the_records(
    sqlite_service: Service,
) -> None:
    chain = [_create() for _ in range(4)]
    for backup_id in chain[1:3]:
        _take_away(sqlite_service, backup_id)
    assert set(_breaks()) == set(map(str, chain[1:3]))
    for backup_id in chain[1:3]:
        _forget(backup_id)
    assert set(_breaks()) == {str(chain[2])}


def test_a_store_that_was_rolled_back_as_a_whole_shows_from_the_records(
    chain: list[UUID], sqlite_service: Service
) -> None:
    for backup_id in chain[1:]:
        _take_away(sqlite_service, backup_id)
    assert set(_breaks()) == set(map(str, chain[1:]))
    # The next one goes on from what is there, and the gap is told all the same.
    assert _manifest(_create()).previous == _manifest(chain[0]).reference()
    assert set(_breaks()) == set(map(str, chain[1:]))


def test_a_backup_that_somebody_took_away_is_not_the_newest_any_more(
    chain: list[UUID], sqlite_service: Service
) -> None:
    for backup_id in chain[1:]:
        get_backup_service().verify(backup_id, COMMAND_LINE)
    _take_away(sqlite_service, chain[2])
    get_backup_service().recover()
    with session_scope(read_only=True) as session:
        age = get_catalogue_service().age(session)
    made = _manifest(chain[1]).moment
    assert (age.newest, age.newest_proven) == (made, made)


@pytest.mark.parametrize("gone", [True, False], ids=["taken away", "damaged"])
def test_an_older_backup_is_not_restored_for_the_newest_unless_it_is_named(
    chain: list[UUID], store: LocalStore, sqlite_service: Service, gone: bool
) -> None:
    if gone:
        _take_away(sqlite_service, chain[2])
    else:
        store.replace(manifest_name(str(chain[2])), b"{}")
    restores = get_restore_service()
    restores.restore(chain[1], COMMAND_LINE, dry_run=True, confirm=False)
    with pytest.raises(HoldfastError):
        restores.restore(None, COMMAND_LINE, dry_run=False, confirm=True)


def test_an_emptied_store_shows(chain: list[UUID], sqlite_service: Service) -> None:
    for backup_id in chain:
        _take_away(sqlite_service, backup_id)
    assert set(_breaks()) == set(map(str, chain))
    assert _listed() == []


def test_a_backup_that_was_replaced_by_another_one_signed_with_the_key_shows(
    chain: list[UUID], store: LocalStore
) -> None:
    _sign(store, replace(_manifest(chain[1]), tables={}))
    assert _breaks() == {str(chain[1]): "is not the one that the next backup names"}
    _sign(store, replace(_manifest(chain[2]), previous=_manifest(chain[0]).reference()))
    assert _breaks() == {}, "nobody names it any more"


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"format": 3, "manifest": {}, "mac": ""}'], ids=str)
def test_a_backup_whose_manifest_cannot_be_believed_shows(
    chain: list[UUID], store: LocalStore, raw: bytes
) -> None:
    store.replace(manifest_name(str(chain[1])), raw)
    assert list(_breaks()) == [str(chain[1])]
    assert _manifest(_create()).previous == _manifest(chain[2]).reference()


def test_what_we_delete_is_no_break(chain: list[UUID]) -> None:
    _delete(chain[1])
    assert _breaks() == {}
    _delete(chain[2])
    assert _breaks() == {}
    assert _listed() == [chain[0]]
    assert _create()
    assert _breaks() == {}


def test_what_we_prune_is_no_break(
    chain: list[UUID], sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_KEEP_LAST", "1")
    clear_caches()
    get_setup_service().open()
    get_pruning_service().prune(COMMAND_LINE, dry_run=False)
    assert (_listed(), _breaks()) == ([chain[2]], {})


def _notes(store: LocalStore, backup_id: UUID) -> Iterator[bytes]:
    """What somebody without the key may make of the notes that we left."""
    of_another = json.loads(store.read(f"{OTHER_ID}.gone.json", 10_000))
    body: dict[str, Any] = of_another["gone"] | {"id": str(backup_id)}
    yield json.dumps(of_another).encode()
    yield json.dumps({"gone": body, "mac": of_another["mac"]}).encode()
    for mac in ("", None, 7, "\u00fc", "\ud800"):
        yield json.dumps({"gone": body, "mac": mac}).encode()
    for changed in ({"key_id": "00000000"}, {"key_id": "x"}, {"key_id": 7}, {"deleted_at": "x"}):
        yield json.dumps({"gone": body | changed, "mac": of_another["mac"]}).encode()
    # Another document with a right signature of ours.
    manifest = json.loads(store.read(manifest_name(str(backup_id)), 10_000))
    signed = {name: manifest[name] for name in ("format", "manifest", "keys")}
    yield json.dumps({"gone": signed, "mac": manifest["mac"]}).encode()
    yield from (b"", b"null", b"[]", b"{}", b'{"gone": 7, "mac": ""}', b"[" * 100_000, b"\xff")


def test_a_note_that_we_did_not_sign_is_not_believed(
    chain: list[UUID], store: LocalStore, sqlite_service: Service
) -> None:
    other = _create()
    _delete(other)
    folder = sqlite_service.folder / "backups"
    # The real note of another backup is there to be copied from.
    (folder / f"{OTHER_ID}.gone.json").write_bytes((folder / f"{other}.gone.json").read_bytes())
    forged = list(_notes(store, chain[1]))
    _take_away(sqlite_service, chain[1])
    for raw in forged:
        (folder / f"{chain[1]}.gone.json").write_bytes(raw)
        assert list(_breaks()) == [str(chain[1])], raw[:100]
    (folder / f"{chain[1]}.gone.json").unlink()
    (folder / f"{chain[1]}.gone.json").symlink_to(folder / f"{other}.gone.json")
    assert list(_breaks()) == [str(chain[1])]


def test_a_forged_note_deletes_nothing(chain: list[UUID], sqlite_service: Service) -> None:
    _delete(chain[0])
    folder = sqlite_service.folder / "backups"
    note = (folder / f"{chain[0]}.gone.json").read_text()
    (folder / f"{chain[1]}.gone.json").write_text(note.replace(str(chain[0]), str(chain[1])))
    assert get_backup_service().recover() == 0
    get_backup_service().copy()
    assert _listed() == [chain[2], chain[1]]
    assert get_backup_service().verify(chain[1], COMMAND_LINE).verified_at is not None


def test_a_backup_that_we_deleted_is_not_put_back_by_somebody_else(
    chain: list[UUID], sqlite_service: Service
) -> None:
    folder = sqlite_service.folder / "backups"
    kept = {path: path.read_bytes() for path in folder.glob(f"{chain[1]}.*")}
    _delete(chain[1])
    for path, data in kept.items():
        path.write_bytes(data)
    assert get_backup_service().recover() == 1
    assert _listed() == [chain[2], chain[0]]
    assert {path.name for path in folder.glob(f"{chain[1]}.*")} == {f"{chain[1]}.gone.json"}
    with pytest.raises(NotFoundError):
        get_restore_service().restore(chain[1], COMMAND_LINE, dry_run=False, confirm=True)


def _grow_old(store: LocalStore, chain: list[UUID], days: int) -> None:
    """Let the first of a chain be made so many days ago, by all that is signed of it."""
    made = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    before = replace(_manifest(chain[0]), created_at=made)
    _sign(store, before)
    for backup_id in chain[1:]:
        before = replace(_manifest(backup_id), previous=before.reference())
        _sign(store, before)


@pytest.mark.parametrize(("days", "missed"), [(89, 1), (91, 0)])
def test_a_backup_beyond_the_maximum_age_is_missed_by_nobody(
    chain: list[UUID], store: LocalStore, sqlite_service: Service, days: int, missed: int
) -> None:
    _grow_old(store, chain, days)
    _take_away(sqlite_service, chain[0])
    _forget(chain[0])
    assert list(_breaks()) == [str(chain[0])][:missed]


def test_a_record_beyond_the_maximum_age_is_missed_by_nobody(
    chain: list[UUID], store: LocalStore, sqlite_service: Service
) -> None:
    """A lost machine comes back with records of backups whose notes are forgotten by now."""
    _grow_old(store, chain, 91)
    _take_away(sqlite_service, chain[0])
    with session_scope() as session:
        record = session.get_one(BackupRecord, chain[0])
        record.created_at = datetime.now(UTC) - timedelta(days=91)
    assert _breaks() == {}


def test_the_chain_holds_after_a_rotation_of_the_keys_and_breaks_as_before(
    chain: list[UUID], sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted, last = _create(), _create()
    _delete(deleted)
    before = {backup_id: _manifest(backup_id) for backup_id in (*chain, last)}
    _rotate_away(monkeypatch)
    for backup_id, manifest in before.items():
        after = _manifest(backup_id)
        assert (after.link, after.previous) == (manifest.link, manifest.previous)
        assert manifest.key_id not in {after.key_id, *after.row_keys}
    # Nor is what we deleted before taken for taken away: its note was signed anew.
    assert _breaks() == {}
    assert _manifest(_create()).previous == before[last].reference()
    assert _breaks() == {}
    _take_away(sqlite_service, chain[1])
    assert list(_breaks()) == [str(chain[1])]


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
def test_breaks_are_told_by_list_and_by_restore(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    made = [client.post("/security/backup/create", headers=admin).json()["id"] for _ in range(3)]
    assert client.get("/security/backup/list", headers=admin).json()["breaks"] == []
    assert "warning" not in run("backup", "list").err
    _take_away(service, UUID(made[1]))
    listed = client.get("/security/backup/list", headers=admin).json()
    ((broken,), total) = listed["breaks"], listed["total"]
    assert (broken["backup_id"], total) == (made[1], 2)
    assert broken["why"].startswith(MISSING)
    body = {"backup_id": made[2], "dry_run": True}
    planned = client.post("/security/backup/restore", json=body, headers=admin).json()
    assert planned["breaks"] == [broken]
    as_lines, as_json = run("backup", "list"), run("backup", "list", "--json")
    assert (as_lines.code, as_json.code) == (0, 0)
    assert f"backup {made[1]} {broken['why']}" in as_lines.out + as_lines.err
    assert as_json.json["breaks"] == [broken]
    restored = run("backup", "restore", made[0], "--confirm")
    assert restored.code == 0
    assert made[1] in restored.out + restored.err
