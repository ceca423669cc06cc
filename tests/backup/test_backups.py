"""A backup is one consistent state, sealed, listed by the store, and gone when its time is over."""

import hashlib
import json
import stat
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from backend.db_utils import get_engine, session_scope
from backend.errors import ConflictError, NotFoundError, UnavailableError
from backend.models import AuditEvent, BackupRecord, BackupStatus, Base, Feedback, User
from backend.services.archive_service import exclusive, get_archive_service, live_database
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.checkpoint_service import is_checkpoint
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.schema_service import get_schema_service
from backend.services.setup_service import get_setup_service
from tests.backup.beside import beside
from tests.backup.promises import wait_until
from tests.conftest import ADMIN, Service, clear_caches
from tests.privacy.people import booking, dump, plant

Headers = dict[str, str]
ABSENT = "11111111-2222-3333-4444-555555555555"


def _create(label: str | None = None) -> BackupRecord:
    return get_backup_service().create(COMMAND_LINE, label)


def _listed() -> list[BackupRecord]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


def _stored(service: Service) -> dict[str, bytes]:
    """What is stored of backups."""
    found = (service.folder / "backups").glob("*")
    return {path.name: path.read_bytes() for path in found if not is_checkpoint(path.name)}


def _counts(session: Session) -> dict[str, int]:
    tables = Base.metadata.sorted_tables
    return {t.name: session.scalar(select(func.count()).select_from(t)) or 0 for t in tables}


@contextmanager
def _opened(record: BackupRecord) -> Iterator[Engine]:
    """The database inside a backup, built beside the live one."""
    manifest = get_archive_service().manifest(record.id)
    with get_archive_service().rebuilt(live_database(), manifest) as built:
        yield built


def test_a_backup_holds_every_row_and_no_readable_word_of_them(service: Service) -> None:
    people = [plant(letter) for letter in "ABCDEFGH"]
    before = dump()
    record = _create("nightly")
    stored = _stored(service)
    assert set(stored) == {f"{record.id}.{part}" for part in ("hfb", "key", "manifest.json")}
    # Encrypted columns would hide their marks by themselves: names of tables and columns would not.
    words = {word for person in people for word in person.words()}
    words |= {ADMIN, "feedback", "email_index", "SQLite format", "PGDMP", "Resort Hotel"}
    sealed = stored[f"{record.id}.hfb"] + stored[f"{record.id}.key"]
    assert [word for word in words if word.encode() in sealed] == []
    manifest = stored[f"{record.id}.manifest.json"]
    assert [word for word in words - {"feedback"} if word.encode() in manifest] == []
    with _opened(record) as built, session_scope(built, read_only=True) as session:
        rows = session.execute(text("SELECT * FROM bookings")).mappings()
        assert {(row["id"],): dict(row) for row in rows} == before["bookings"]
        assert set(session.scalars(select(User.email).where(User.id > 1))) == {
            mark.text
            for person in people
            for mark in person.marks
            if (mark.table, mark.column) == ("users", "email")
        }


def test_the_files_are_compressed_and_their_owners_alone(service: Service) -> None:
    service.add(*(booking(None, date(2026, 1, 2), agent="7") for _ in range(500)))
    manifest = get_archive_service().manifest(_create().id)
    assert manifest.size_bytes < manifest.plain_bytes / 3
    for path in (service.folder / "backups").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((service.folder / "backups").stat().st_mode) == 0o700


def test_the_record_and_the_manifest_say_what_was_stored(service: Service) -> None:
    plant("A")
    with session_scope(read_only=True) as session:
        counts = _counts(session)
    first, second = _create("one"), _create()
    archive = (service.folder / "backups" / f"{first.id}.hfb").read_bytes()
    assert first.status is BackupStatus.COMPLETE
    assert first.sha256 == hashlib.sha256(archive).hexdigest()
    assert first.size_bytes == len(archive)
    assert first.location == str(service.folder / "backups" / f"{first.id}.hfb")
    assert abs(datetime.now(UTC) - first.created_at) < timedelta(minutes=1)
    manifest = get_archive_service().manifest(first.id)
    # The record of the backup itself is in it already, and that it has begun: they exist before
    # the first byte.
    counts["audit_events"] += 1
    assert manifest.tables == counts | {"backup_records": 1}
    assert (manifest.label, manifest.engine) == ("one", service.engine)
    assert manifest.schema_revision == get_schema_service().wanted
    assert manifest.previous is None
    raw = (service.folder / "backups" / f"{first.id}.manifest.json").read_text()
    lasting = json.dumps(json.loads(raw)["manifest"], sort_keys=True, separators=(",", ":"))
    assert get_archive_service().manifest(second.id).previous == {
        "id": str(first.id),
        "created_at": first.created_at.isoformat(),
        "link": hashlib.sha256(lasting.encode()).hexdigest(),
    }


def test_a_backup_beside_writers_never_holds_half_a_transaction(service: Service) -> None:
    written: list[str] = []
    records: list[BackupRecord] = []

    def write(name: str) -> None:
        pair = f"{name}-{len(written)}"
        with session_scope() as session:
            for _half in range(2):
                now = datetime.now(UTC)
                session.add(Feedback(rating=1, submitted_at=now, comment=pair))
                session.flush()
        written.append(pair)
        time.sleep(0.002)

    def wait_for_writer(*_progress: int) -> None:
        before = len(written)
        wait_until(lambda: failed or len(written) > before)

    with beside(partial(write, "a"), partial(write, "b")) as failed:
        for _ in range(3):
            wait_for_writer()
            # In the midst of it, too: a quick backup would meet none.
            records.append(get_backup_service().create(COMMAND_LINE, progress=wait_for_writer))
    assert failed == []
    found = []
    for record in records:
        with _opened(record) as built, session_scope(built, read_only=True) as session:
            halves = Counter(session.scalars(select(Feedback.comment)))
        assert set(halves.values()) == {2}
        found.append(len(halves))
    assert 0 < found[0] < found[1] < found[2] <= len(written)


def test_verify_proves_a_backup_and_leaves_nothing_beside_the_database(service: Service) -> None:
    plant("A")
    record = _create()
    before, files = dump(), sorted(service.folder.rglob("*"))
    assert get_backup_service().verify(record.id, COMMAND_LINE).verified_at is not None
    after = dump()
    assert {name for name in after if after[name] != before[name]} == {
        "audit_events",
        "backup_records",
    }
    assert sorted(service.folder.rglob("*")) == files
    assert live_database().sweep() == 0
    with pytest.raises(NotFoundError):
        get_backup_service().verify(UUID(ABSENT), COMMAND_LINE)


def test_over_http_a_backup_is_made_listed_proven_and_deleted(
    client: TestClient, admin: Headers
) -> None:
    made = [
        client.post("/security/backup/create", json={"label": label}, headers=admin)
        for label in ("one", "two")
    ]
    assert [answer.status_code for answer in made] == [201, 201]
    older, newer = (answer.json() for answer in made)
    assert (newer["status"], newer["label"], newer["verified_at"]) == ("complete", "two", None)
    listed = client.get("/security/backup/list", headers=admin).json()
    assert [item["id"] for item in listed["items"]] == [newer["id"], older["id"]]
    assert listed["total"] == 2
    verified = client.post(f"/security/backup/{older['id']}/verify", headers=admin)
    assert verified.status_code == 200
    assert verified.json()["verified_at"]
    one = client.get(f"/security/backup/{older['id']}", headers=admin).json()
    assert one == verified.json()
    assert client.delete(f"/security/backup/{newer['id']}", headers=admin).status_code == 204
    assert client.get(f"/security/backup/{newer['id']}", headers=admin).status_code == 404
    only = client.delete(f"/security/backup/{older['id']}", headers=admin)
    assert (only.status_code, only.json()["code"]) == (409, "conflict")
    assert client.get("/security/backup/list", headers=admin).json()["total"] == 1


def test_a_deleted_backup_leaves_nothing_but_a_note(service: Service) -> None:
    first, second = _create(), _create()
    get_pruning_service().delete(first.id, COMMAND_LINE)
    left = {name for name in _stored(service) if not name.startswith(str(second.id))}
    assert left == {f"{first.id}.gone.json"}
    assert [record.id for record in _listed()] == [second.id]


def test_a_second_backup_is_refused_while_one_runs(client: TestClient, admin: Headers) -> None:
    with exclusive():
        answer = client.post("/security/backup/create", headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
        with pytest.raises(ConflictError):
            get_restore_service().restore(UUID(ABSENT), COMMAND_LINE, dry_run=True, confirm=False)
    assert client.post("/security/backup/create", headers=admin).status_code == 201


def test_a_backup_that_fails_leaves_no_file_and_a_record_that_says_so(service: Service) -> None:
    with get_engine().begin() as connection:
        connection.execute(text("DROP TABLE feedback"))
    with pytest.raises(Exception, match="feedback"):
        _create("broken")
    _assert_failed(service)


def test_a_dump_tool_that_dies_half_way_leaves_no_file(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if service.engine == "sqlite":
        pytest.skip("SQLite is dumped by a library")
    tool = tmp_path / "pg_dump"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "pg_dump (PostgreSQL) 99" && exit\n'
        "head -c 3000000 /dev/urandom\necho 'connection lost' >&2\nexit 1\n"
    )
    tool.chmod(0o755)
    with monkeypatch.context() as changed:
        changed.setenv("PATH", str(tmp_path), prepend=":")
        with pytest.raises(UnavailableError, match="connection lost"):
            _create("broken")
    _assert_failed(service)
    assert _create().status is BackupStatus.COMPLETE


def _assert_failed(service: Service) -> None:
    assert _stored(service) == {}
    (record,) = _listed()
    assert (record.status, record.label) == (BackupStatus.FAILED, "broken")
    assert record.error
    assert record.size_bytes is None


def test_the_store_is_the_truth_of_what_is_listed(service: Service) -> None:
    kept, lost = _create("kept"), _create("lost")
    for path in (service.folder / "backups").glob(f"{lost.id}*"):
        path.unlink()
    with session_scope() as session:
        session.delete(session.get_one(BackupRecord, kept.id))
    (record,) = _listed()
    assert (record.id, record.label, record.sha256) == (kept.id, "kept", kept.sha256)
    with session_scope(read_only=True) as session, pytest.raises(NotFoundError):
        get_catalogue_service().get(session, lost.id)


def test_what_is_older_than_the_maximum_age_goes_and_nothing_else(service: Service) -> None:
    assert _prune(days=89, dry_run=False) == []
    old = _create()
    restored = get_restore_service().restore(old.id, COMMAND_LINE, dry_run=False, confirm=True)
    assert restored.previous
    assert _kept_databases(service) == [restored.previous]
    assert _prune(days=89, dry_run=False) == []
    files = _stored(service)
    assert _prune(days=91, dry_run=True) == [old.id]
    assert (_stored(service), _kept_databases(service)) == (files, [restored.previous])
    # The only backup goes too: the date that an erased person was told beats it.
    assert _prune(days=91, dry_run=False) == [old.id]
    assert (_stored(service), _kept_databases(service), _listed()) == ({}, [], [])


def test_the_maximum_age_is_a_setting(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_MAX_AGE_DAYS", "7")
    clear_caches()
    get_setup_service().open()
    record = _create()
    assert _prune(days=6, dry_run=False) == []
    assert _prune(days=8, dry_run=False) == [record.id]


def _prune(*, days: int, dry_run: bool) -> list[UUID]:
    now = datetime.now(UTC) + timedelta(days=days)
    verdicts = get_pruning_service().prune(COMMAND_LINE, dry_run=dry_run, now=now)
    return [verdict.backup_id for verdict in verdicts if not verdict.keep]


def _kept_databases(service: Service) -> list[str]:
    if service.engine == "sqlite":
        return sorted(str(path) for path in (service.folder / "previous").glob("*.db"))
    with get_engine().connect() as connection:
        name = service.url.rpartition("/")[2]
        found = text("SELECT datname FROM pg_database WHERE datname LIKE :like ORDER BY 1")
        return list(connection.execute(found, {"like": f"{name}\\_before%"}).scalars())


def test_making_and_deleting_are_in_the_audit_trail(client: TestClient, admin: Headers) -> None:
    made: Any = [client.post("/security/backup/create", headers=admin).json() for _ in range(2)]
    client.delete(f"/security/backup/{made[0]['id']}", headers=admin)
    with session_scope(read_only=True) as session:
        events = list(session.scalars(select(AuditEvent).order_by(AuditEvent.id)))
    acts = [event for event in events if event.action.startswith("backup_")]
    assert [(event.action, event.outcome) for event in acts] == [
        (action, outcome)
        for action in ("backup_created", "backup_created", "backup_deleted")
        for outcome in ("begun", "done")
    ]
    assert [json.loads(str(event.detail))["backup"] for event in acts] == [
        made[number]["id"] for number in (0, 0, 1, 1, 0, 0)
    ]
