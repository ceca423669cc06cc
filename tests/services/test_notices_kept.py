"""Notices through restores, wrong clocks, changed settings and writers beside a run."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from backend.crypto import passwords
from backend.db_utils import session_scope
from backend.errors import ConflictError, UnauthenticatedError
from backend.models import InactivityNotice, User
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.notice_service import get_notice_service
from backend.services.retention_service import get_retention_service
from tests.backup.promises import back_up, restore
from tests.conftest import PASSWORD, Service
from tests.privacy.people import retire
from tests.services.test_notices import (
    DAYS,
    LONG_AGO,
    NOTICES,
    NOW,
    TICK,
    Headers,
    queued,
    set_days,
    there,
)

# Long enough for a thread to come as far as it can.
PATIENCE_SECONDS = 0.5


@pytest.fixture(autouse=True)
def _told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    set_days(monkeypatch, DAYS.days)


def seen() -> list[tuple[Any, ...]]:
    return [(n.id, n.user_id, n.ends_at, n.queued_at, n.sent_at) for n in queued().values()]


def test_a_restore_keeps_what_was_queued_and_sent_since_the_backup(service: Service) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    service.user("joe@example.com", last_activity_at=LONG_AGO)
    backup_id = back_up()
    retire(NOW)
    with session_scope() as session:
        get_notice_service().sent(session, COMMAND_LINE, queued()[jane].id)
    before = seen()
    assert len(before) == 2
    restore(backup_id)
    assert seen() == before
    assert retire(NOW + DAYS - TICK).affected == 0
    assert retire(NOW + DAYS).affected == 2


def test_a_restore_does_not_bring_back_a_notice_that_was_cancelled(service: Service) -> None:
    service.user("jane@example.com", last_activity_at=LONG_AGO)
    joe = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    backup_id = back_up()
    get_auth_service().sign_in("jane@example.com", PASSWORD)
    restore(backup_id)
    assert set(queued()) == {joe}


@pytest.mark.parametrize("action", ["anonymize", "delete"])
def test_who_has_gone_since_the_backup_does_not_come_back(
    service: Service, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    set_days(monkeypatch, DAYS.days, RETENTION_USER_ACTION=action)
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    backup_id = back_up()
    retire(NOW - DAYS)
    retire(NOW)
    assert not there(jane)
    restore(backup_id)
    assert not there(jane)


def test_a_clock_that_was_behind_costs_nobody_their_days(service: Service) -> None:
    retire(NOW)
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    get_retention_service().apply(COMMAND_LINE, dry_run=False, now=NOW - 2 * DAYS)
    retire(NOW + TICK)
    assert there(jane)


def test_a_clock_that_was_ahead_keeps_nobody_for_ever(service: Service) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    get_retention_service().apply(COMMAND_LINE, dry_run=False, now=NOW + 1000 * DAYS)
    retire(NOW)
    retire(NOW + DAYS)
    assert not there(jane)


def test_nobody_goes_before_the_day_that_they_were_told_though_the_days_are_fewer_now(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    ends_at = queued()[jane].ends_at
    set_days(monkeypatch, 1)
    retire(NOW + timedelta(days=2))
    assert there(jane)
    retire(ends_at)
    assert not there(jane)


def test_more_days_of_notice_count_for_those_who_are_queued_already(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_days(monkeypatch, 1)
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    set_days(monkeypatch, DAYS.days)
    retire(NOW + DAYS - TICK)
    assert there(jane)
    retire(NOW + DAYS)
    assert not there(jane)


def test_who_has_no_address_does_not_stand_in_the_way_of_those_who_have(
    service: Service, client: TestClient, admin: Headers
) -> None:
    service.add(*(User(created_at=LONG_AGO, last_activity_at=LONG_AGO) for _ in range(3)))
    retire(NOW - TICK)
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    listed = client.get(f"{NOTICES}?limit=3", headers=admin).json()["items"]
    assert jane in [item["user_id"] for item in listed]


def test_the_status_counts_everybody_whom_the_forecast_counts(service: Service) -> None:
    service.user("jane@example.com", last_activity_at=LONG_AGO)
    with session_scope(read_only=True) as session:
        states = get_retention_service().states(session, NOW)
        forecast = get_retention_service().forecast(session, NOW)
    (state,) = [one for one in states if one.policy.data_type == "user"]
    (coming,) = [one for one in forecast if one.data_type == "user"]
    assert state.due + state.due_soon == coming.due_now == 1


def beside(first: Callable[[Session], object], second: Callable[[], object]) -> list[Exception]:
    """Do *second* in a thread before *first*'s transaction commits; return what it raised."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            second()
        except Exception as err:  # noqa: BLE001 - given to the test
            raised.append(err)

    thread = threading.Thread(target=run)
    with session_scope() as session:
        first(session)
        thread.start()
        thread.join(PATIENCE_SECONDS)
    thread.join(60)
    assert not thread.is_alive()
    return raised


def test_of_two_runs_at_once_each_tells_whom_the_other_has_not(service: Service) -> None:
    people = {service.user(f"p{n}@example.com", last_activity_at=LONG_AGO) for n in range(3)}

    def tell_one(session: Session) -> None:
        session.add(
            InactivityNotice(user_id=min(people), ends_at=NOW + DAYS, queued_at=NOW, sent_at=None)
        )
        session.flush()

    def tell() -> None:
        get_retention_service().apply(COMMAND_LINE, dry_run=False, now=NOW)

    assert beside(tell_one, tell) == []
    assert set(queued()) == people


def test_of_two_senders_at_once_one_is_told_that_it_was_sent(service: Service) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    mine = queued()[jane].id

    def send(session: Session) -> None:
        get_notice_service().sent(session, COMMAND_LINE, mine)
        session.flush()

    def send_too() -> None:
        with session_scope() as session:
            send(session)

    assert [type(err) for err in beside(send, send_too)] == [ConflictError]


def test_signing_in_while_one_goes_leaves_no_trace_and_gives_no_token(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    verify = passwords.verify_password

    def slowly(password: str, stored: str | None) -> bool:
        # The run comes while the password is hashed, which takes the longest.
        retire(NOW + DAYS)
        return verify(password, stored)

    monkeypatch.setattr(passwords, "verify_password", slowly)
    with pytest.raises(UnauthenticatedError):
        get_auth_service().sign_in("jane@example.com", PASSWORD)
    with session_scope(read_only=True) as session:
        row = session.get_one(User, jane)
        assert (row.anonymized_at is None, row.last_activity_at) == (False, None)


def test_whoever_is_active_after_the_plan_is_not_taken_by_its_run(service: Service) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    joe = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    planned = get_retention_service().apply(COMMAND_LINE, dry_run=True, now=NOW + DAYS)
    assert planned.affected == 2
    get_auth_service().sign_in("jane@example.com", PASSWORD)
    retire(NOW + DAYS)
    assert (there(jane), there(joe)) == (True, False)
    with session_scope(read_only=True) as session:
        assert session.scalars(select(InactivityNotice)).all() == []
