"""Certificates of erasures name the backups that there were, and when the last of them is gone."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select

from backend.crypto import certificates
from backend.db_utils import session_scope
from backend.errors import ConflictError
from backend.models import ErasureRecord
from backend.privacy.declarations import EraseMode
from backend.services import certificate_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.certificate_service import get_certificate_service
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import Who
from tests.backup.lives import Configure, aged, change, configured, create, listed, remove
from tests.conftest import Service
from tests.privacy.people import ADMINISTRATOR, plant

__all__ = ["configured"]  # a fixture


@pytest.fixture
def aged_backups(sqlite_service: Service, now: datetime) -> tuple[UUID, UUID]:
    """Two backups, made thirty and ten days ago."""
    older, newer = aged(30, 10, now=now)
    return older, newer


def erase(user_id: int, *, prove: bool = True) -> UUID:
    with session_scope() as session:
        done: Erasure = get_erasure_service().erase(
            session, ADMINISTRATOR, Who(user_id), EraseMode.DELETE, reason="request", dry_run=False
        )
    if prove:
        get_erasure_service().prove(done)
    return done.erasure_id


def certificate(erasure_id: UUID) -> bytes:
    with session_scope() as session:
        return get_certificate_service().of(session, erasure_id)


def statement(erasure_id: UUID) -> dict[str, Any]:
    """What a certificate says, checked with the public key."""
    with session_scope() as session:
        key = get_certificate_service().public_key(session)
    return dict(certificates.verify(certificate(erasure_id), key))


def expiry(erasure_id: UUID) -> datetime:
    return datetime.fromisoformat(statement(erasure_id)["backups_expire_at"])


def near(moment: datetime, expected: datetime) -> bool:
    # Days are told apart; how long the test takes decides nothing.
    return abs(moment - expected) < timedelta(hours=1)


def test_a_certificate_names_the_backups_that_there_were(
    aged_backups: tuple[UUID, UUID], now: datetime
) -> None:
    erasure_id = erase(plant("A").id)
    told = statement(erasure_id)
    assert [UUID(each["id"]) for each in told["backups"]] == list(aged_backups)
    moments = [datetime.fromisoformat(each["created_at"]) for each in told["backups"]]
    assert moments == [now - timedelta(days=30), now - timedelta(days=10)]
    assert near(expiry(erasure_id), now + timedelta(days=90))


def test_when_a_named_backup_goes_an_earlier_date_is_told_and_nothing_else_changes(
    aged_backups: tuple[UUID, UUID], now: datetime
) -> None:
    older, newer = aged_backups
    erasure_id = erase(plant("A").id)
    before = statement(erasure_id)
    assert before["scan"]["state"] == "clean"
    remove(newer)
    told = statement(erasure_id)
    assert [each["id"] for each in told["backups"]] == [str(older)]
    assert near(expiry(erasure_id), now + timedelta(days=60))
    changing = {"backups", "backups_expire_at"}
    assert {name for name in before if told[name] != before[name]} == changing
    # A backup that was made since does not hold the person, and counts for nothing.
    create()
    remove(older)
    assert statement(erasure_id)["backups"] == []
    assert near(expiry(erasure_id), datetime.now(UTC))


def test_pruning_tells_the_earlier_date_too(
    aged_backups: tuple[UUID, UUID], configured: Configure, now: datetime
) -> None:
    configured(backup_keep_last=1)
    erasure_id = erase(plant("A").id)
    create()
    get_pruning_service().prune(COMMAND_LINE, dry_run=True)
    assert len(statement(erasure_id)["backups"]) == 2
    get_pruning_service().prune(COMMAND_LINE, dry_run=False)
    assert statement(erasure_id)["backups"] == []
    assert near(expiry(erasure_id), datetime.now(UTC))


def test_an_earlier_date_is_told_also_while_the_scan_goes_on(
    aged_backups: tuple[UUID, UUID], now: datetime
) -> None:
    older, newer = aged_backups
    person = plant("A")
    with session_scope() as session:
        done = get_erasure_service().erase(
            session, ADMINISTRATOR, Who(person.id), EraseMode.DELETE, reason="r", dry_run=False
        )
    remove(newer)
    with pytest.raises(ConflictError):
        certificate(done.erasure_id)
    get_erasure_service().prove(done)
    assert [each["id"] for each in statement(done.erasure_id)["backups"]] == [str(older)]
    assert near(expiry(done.erasure_id), now + timedelta(days=60))


def test_a_certificate_of_before_the_backup_is_left_as_it_is(
    aged_backups: tuple[UUID, UUID],
) -> None:
    erasure_id = erase(plant("A").id)
    before = certificate(erasure_id)
    remove(create())
    assert certificate(erasure_id) == before


def test_a_date_that_has_passed_is_not_told_anew(
    aged_backups: tuple[UUID, UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    erasure_id = erase(plant("A").id)
    before = certificate(erasure_id)

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return super().now(tz) + timedelta(days=90, minutes=1)

    monkeypatch.setattr(certificate_service, "datetime", Later)
    remove(aged_backups[1])
    assert certificate(erasure_id) == before


def test_a_database_kept_aside_by_a_restore_holds_the_person_too(
    aged_backups: tuple[UUID, UUID], now: datetime
) -> None:
    first, last = plant("A"), plant("B")
    create()
    early = erase(first.id)
    get_restore_service().restore(listed()[0], COMMAND_LINE, dry_run=False, confirm=True)
    late = erase(last.id)
    for erasure_id in (early, late):
        named = [UUID(each["id"]) for each in statement(erasure_id)["backups"]]
        assert set(named) == set(listed())
    create()
    for backup_id in listed()[1:]:
        remove(backup_id)
    # When it was put aside, the one was erased already, and the other was not.
    assert near(expiry(early), datetime.now(UTC))
    assert near(expiry(late), now + timedelta(days=90))


def test_a_backup_under_way_counts_as_one_that_there_was(sqlite_service: Service) -> None:
    person = plant("A")
    erased: list[UUID] = []
    made = get_backup_service().create(
        COMMAND_LINE, begun=lambda _running: erased.append(erase(person.id))
    )
    told = statement(erased[0])
    assert [each["id"] for each in told["backups"]] == [str(made.id)]


def test_an_act_finished_after_a_crash_tells_when_the_backups_of_meanwhile_expire(
    sqlite_service: Service, now: datetime
) -> None:
    person = plant("A")
    with suppress(KeyboardInterrupt), session_scope() as session:
        get_erasure_service().erase(
            session, ADMINISTRATOR, Who(person.id), EraseMode.DELETE, reason="r", dry_run=False
        )
        # Killed before the commit: the ledger's object says that it is to be finished.
        raise KeyboardInterrupt
    meanwhile = create()
    later = now + timedelta(days=3)
    change(meanwhile, created_at=later)
    get_setup_service().prepare()
    with session_scope(read_only=True) as session:
        erasure_id = session.scalars(select(ErasureRecord.id)).one()
    assert [each["id"] for each in statement(erasure_id)["backups"]] == [str(meanwhile)]
    assert near(expiry(erasure_id), later + timedelta(days=90))
