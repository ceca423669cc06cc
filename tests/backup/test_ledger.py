"""The ledger: what was promised is known beside the backups too, and says nothing of anybody."""

import shutil
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from sqlalchemy import func, insert, select, text

from backend.crypto import keyring
from backend.db_utils import dispose_engine, get_engine, session_scope, sqlite_path
from backend.errors import HoldfastError, LegalHoldError
from backend.models import DataConsent, LedgerEntry, LedgerKind, User
from backend.privacy.declarations import EraseMode
from backend.privacy.steps import ConstraintError
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE, Actor
from backend.services.consent_service import get_consent_service
from backend.services.ledger_service import _SCOPE, Replayed, get_ledger_service
from backend.services.reference_service import reference_to
from backend.services.restore_service import get_restore_service
from backend.services.scheduler_service import SchedulerService
from backend.services.setup_service import get_setup_service
from tests.backup.promises import back_up, erase, is_there, restore
from tests.backup.s3_server import REGION, CuttableLine, S3Server, cuttable_line
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import dump, keys_of, person_hold, plant, without

JANE = "jane@example.com"


def _consent(user_id: int, *, granted: bool, actor: Actor = COMMAND_LINE) -> None:
    with session_scope() as session:
        get_consent_service().record(
            session, actor, user_id, purpose="marketing", granted=granted, evidence="a form"
        )


def _objects(service: Service) -> list[Path]:
    return sorted((service.folder / "backups").glob("ledger-*.enc"))


def _opened(path: Path) -> dict[str, Any]:
    plain = keyring.current().cipher(_SCOPE).open(path.read_bytes(), path.name.encode())
    body: dict[str, Any] = orjson.loads(plain)
    return body


def _rows() -> dict[UUID, LedgerEntry]:
    with session_scope(read_only=True) as session:
        return {entry.id: entry for entry in session.scalars(select(LedgerEntry))}


def _uid(user_id: int) -> UUID:
    with session_scope(read_only=True) as session:
        return session.get_one(User, user_id).uid


def test_every_promise_is_a_row_and_an_object_that_say_the_same(service: Service) -> None:
    jane, joe, eve = (service.user(f"{name}@example.com") for name in ("jane", "joe", "eve"))
    uids = [_uid(person) for person in (jane, joe, eve)]
    with session_scope(read_only=True) as session:
        refs = {reference_to(session, uid) for uid in uids}
    erase(jane)
    erase(joe, EraseMode.ANONYMIZE)
    _consent(eve, granted=True)
    assert len(_objects(service)) == 2, "to grant a consent is no promise to withhold"
    _consent(eve, granted=False)
    rows = _rows()
    assert {row.kind for row in rows.values()} == set(LedgerKind)
    assert {row.subject_ref for row in rows.values()} == refs
    assert len(_objects(service)) == len(rows) == 3
    for path in _objects(service):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        body = _opened(path)
        row = rows[UUID(body["id"])]
        assert path.name == f"ledger-{row.id}.enc"
        assert (body["kind"], body["subject_ref"], body["purpose"], body["recorded_by"]) == (
            row.kind, row.subject_ref, row.purpose, row.recorded_by,
        )  # fmt: skip
        assert datetime.fromisoformat(body["recorded_at"]) == row.recorded_at


def test_what_did_not_happen_is_not_promised(sqlite_service: Service) -> None:
    jane = sqlite_service.user(JANE)
    erase(jane, dry_run=True)
    sqlite_service.add(person_hold(jane))
    with pytest.raises(LegalHoldError):
        erase(jane)
    _consent(jane, granted=False)
    assert _objects(sqlite_service) == []
    assert _rows() == {}


def test_an_erasure_that_fails_half_way_takes_its_promise_back(sqlite_service: Service) -> None:
    jane = plant("A")
    with get_engine().begin() as connection:
        connection.execute(
            text("CREATE TRIGGER stop BEFORE DELETE ON users BEGIN SELECT RAISE(ABORT, 'no'); END")
        )
    before = dump()
    with pytest.raises(ConstraintError):
        erase(jane.id)
    assert dump() == before
    assert _objects(sqlite_service) == []


def test_without_a_place_for_the_promise_nobody_is_erased(sqlite_service: Service) -> None:
    jane = plant("A")
    shutil.rmtree(sqlite_service.folder / "backups", ignore_errors=True)
    (sqlite_service.folder / "backups").write_text("a file where the store should be")
    before = dump()
    with pytest.raises(HoldfastError):
        erase(jane.id)
    assert dump() == before


class _KilledError(Exception):
    """Stands for the end of a process between object and commit."""


def _promise_only(kind: LedgerKind, subject: UUID, purpose: str | None = None) -> None:
    def promise() -> None:
        now = datetime.now(UTC)
        with session_scope() as session:
            ref = reference_to(session, subject)
            get_ledger_service().enter(session, kind, ref, COMMAND_LINE, at=now, purpose=purpose)
            raise _KilledError

    with pytest.raises(_KilledError):
        promise()


@pytest.mark.parametrize("kind", [LedgerKind.ERASE, LedgerKind.ANONYMIZE])
def test_an_erasure_cut_short_is_finished_at_the_next_start(
    service: Service, kind: LedgerKind
) -> None:
    jane, joe = plant("A"), plant("B")
    joes = keys_of(dump(), joe.id)
    _promise_only(kind, _uid(jane.id))
    assert is_there(jane.id)
    assert _rows() == {}
    get_setup_service().prepare()
    after = dump()
    assert keys_of(after, joe.id) == joes
    left = keys_of(after, jane.id)
    assert left.pop("users")
    assert set().union(*left.values()) == set()
    with session_scope(read_only=True) as session:
        user = session.get(User, jane.id)
        assert user is None if kind is LedgerKind.ERASE else user and user.anonymized_at
    (row,) = _rows().values()
    assert row.kind is kind
    get_setup_service().prepare()
    assert {name: rows for name, rows in dump().items() if name != "audit_events"} == {
        name: rows for name, rows in after.items() if name != "audit_events"
    }


def test_a_withdrawal_cut_short_is_finished_at_the_next_start(service: Service) -> None:
    jane = service.user(JANE)
    _consent(jane, granted=True)
    _promise_only(LedgerKind.WITHDRAW_CONSENT, _uid(jane), "marketing")
    get_setup_service().prepare()
    with session_scope(read_only=True) as session:
        record = get_consent_service().of(session, jane)
    assert record.purposes["marketing"].granted is False
    assert [event.granted for event in record.history] == [True, False]


def test_an_old_database_file_put_back_by_hand_forgets_whom_it_must(
    sqlite_service: Service, tmp_path: Path
) -> None:
    jane, joe = plant("A"), plant("B")
    path = sqlite_path(get_engine())
    with get_engine().connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql(f"VACUUM INTO '{tmp_path / 'copy.db'}'")
        connection.exec_driver_sql("BEGIN")
    erase(jane.id)
    dispose_engine()
    for side in path.parent.glob("holdfast.db*"):
        side.unlink()
    shutil.copy(tmp_path / "copy.db", path)
    assert is_there(jane.id)
    get_setup_service().prepare()
    assert (is_there(jane.id), is_there(joe.id)) == (False, True)


def test_replaying_again_changes_nothing(service: Service) -> None:
    jane, joe = plant("A"), service.user(JANE)
    _consent(joe, granted=True)
    backup_id = back_up()
    erase(jane.id)
    _consent(joe, granted=False)
    restore(backup_id)
    before = dump()
    for _again in range(2):
        with session_scope() as session:
            assert get_restore_service().recover(session) == Replayed(0, 0)
    assert dump() == before


def test_a_new_person_on_a_number_that_was_freed_is_left_alone(service: Service) -> None:
    jane = service.user(JANE)
    _consent(jane, granted=True)
    _consent(jane, granted=False)
    erase(jane)
    # As an import or a fresh database gives it, whatever the row numbers promise.
    values = {"id": jane, "email": JANE, "created_at": datetime.now(UTC), "uid": uuid4()}
    with session_scope() as session:
        session.execute(insert(User.__table__), [values])  # type: ignore[arg-type] # it is a Table
    with session_scope() as session:
        assert get_restore_service().recover(session) == Replayed(0, 0)
        assert session.get_one(User, jane).email == JANE
        assert session.scalar(select(func.count()).select_from(DataConsent)) == 0


def test_nothing_in_the_ledger_is_about_anybody(sqlite_service: Service) -> None:
    jane, joe = plant("A"), plant("B")
    uids = [_uid(person.id) for person in (jane, joe)]
    me = Actor("person", COMMAND_LINE.role, user_id=jane.id, uid=uids[0])
    _consent(jane.id, granted=True, actor=me)
    _consent(jane.id, granted=False, actor=me)
    erase(jane.id)
    erase(joe.id, EraseMode.ANONYMIZE)
    canaries = jane.words() | joe.words() | {f for u in uids for f in (str(u), u.hex)}
    told = [repr(_opened(path)) for path in _objects(sqlite_service)] + [
        repr(dump()["privacy_ledger"])
    ]
    assert len(told) == 4
    for words in told:
        assert [canary for canary in canaries if canary in words] == []
        assert "user_id" not in words
    # Unopened, an object does not even tell an erasure from a withdrawal.
    for path in _objects(sqlite_service):
        for word in (b"erase", b"anonymize", b"withdraw", b"marketing", b"subject"):
            assert word not in path.read_bytes()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _in_plain(path: Path) -> None:
    path.write_bytes(orjson.dumps(_opened(path)))


def _of_another(path: Path) -> None:
    path.write_bytes(_objects_beside(path)[0].read_bytes())


def _objects_beside(path: Path) -> list[Path]:
    return [other for other in path.parent.glob("ledger-*") if other != path]


@pytest.mark.parametrize("tamper", [_flip, _cut, _empty, _in_plain, _of_another])
def test_a_tampered_object_stops_a_restore_and_nothing_is_changed(
    sqlite_service: Service, tamper: Callable[[Path], None]
) -> None:
    jane, joe = sqlite_service.user(JANE), sqlite_service.user("joe@example.com")
    backup_id = back_up()
    erase(jane)
    erase(joe)
    before = dump()
    tamper(_objects(sqlite_service)[0])
    with pytest.raises(HoldfastError) as refusal:
        restore(backup_id)
    assert refusal.value.code in {"backup_damaged", "tampered", "malformed_token", "unknown_key"}
    assert without(dump(), {}, "audit_events") == without(before, {}, "audit_events")
    assert _last_restore()["outcome"] == refusal.value.code
    assert not list(sqlite_service.folder.glob(".holdfast-scratch-*"))


def _last_restore() -> dict[str, Any]:
    *_, last = (row for row in dump()["audit_events"].values() if row["action"] == "restore")
    return last


def test_an_unreadable_promise_stops_a_start_that_depends_on_it(sqlite_service: Service) -> None:
    jane = sqlite_service.user(JANE)
    _promise_only(LedgerKind.ERASE, _uid(jane))
    (path,) = _objects(sqlite_service)
    whole = path.read_bytes()
    _flip(path)
    with pytest.raises(HoldfastError):
        get_setup_service().prepare()
    assert is_there(jane)
    path.write_bytes(whole)
    get_setup_service().prepare()
    assert not is_there(jane)


def test_objects_lost_with_their_store_are_written_again(sqlite_service: Service) -> None:
    jane = sqlite_service.user(JANE)
    backup_id = back_up()
    erase(jane)
    (path,) = _objects(sqlite_service)
    body = _opened(path)
    path.unlink()
    restore(backup_id)
    assert not is_there(jane)
    assert [_opened(path) for path in _objects(sqlite_service)] == [body]


def test_promises_made_under_an_older_key_are_kept(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    jane = sqlite_service.user(JANE)
    backup_id = back_up()
    erase(jane)
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", KEY)
    clear_caches()
    get_setup_service().open()
    restored = restore(backup_id)
    assert restored.reapplied.erasures == 1
    assert not is_there(jane)
    with session_scope(read_only=True) as session:
        assert get_account_service().find(session, JANE) is None


@pytest.fixture
def line(s3_server: S3Server) -> Iterator[CuttableLine]:
    with cuttable_line(s3_server.endpoint_url) as line:
        yield line


def test_a_start_without_its_store_goes_on_and_a_later_tick_keeps_the_promise(
    sqlite_service: Service, s3_bucket: str, line: CuttableLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_URL", f"s3://{s3_bucket}/far")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", line.url)
    monkeypatch.setenv("AWS_REGION", REGION)
    clear_caches()
    get_setup_service().open()
    jane = sqlite_service.user(JANE)
    _promise_only(LedgerKind.ERASE, _uid(jane))
    line.hang_up()
    get_setup_service().prepare()
    SchedulerService()._tick_safely()
    assert is_there(jane), "nobody could know of the promise"
    line.is_open = True
    SchedulerService()._tick_safely()
    assert not is_there(jane)
    assert [row.kind for row in _rows().values()] == [LedgerKind.ERASE]
    # And once only: what was left for later is done.
    line.hang_up()
    get_setup_service().recover_if_due()
