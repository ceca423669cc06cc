"""Notices: inactive people are told in time, nobody goes untold, and activity cancels it."""

import tracemalloc
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, func, insert, select, update

from backend.db_utils import session_scope
from backend.models import AuditEvent, InactivityNotice, LegalHold, Role, User
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import WrongPasswordError, get_auth_service
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from tests.backup.promises import erase
from tests.conftest import PASSWORD, Service, SignIn, clear_caches
from tests.privacy.people import person_hold, retire

NOW = datetime.now(UTC)
TICK = timedelta(microseconds=1)
DAYS = timedelta(days=30)
# The period of people that the environment sets where it is silent.
PERIOD = timedelta(days=3650)
LONG_AGO = NOW - timedelta(days=7300)
NOTICES = "/security/retention/notices"
Headers = dict[str, str]


def set_days(monkeypatch: pytest.MonkeyPatch, days: int, **others: str) -> None:
    monkeypatch.setenv("RETENTION_NOTICE_DAYS", str(days))
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    clear_caches()
    get_setup_service().open()


@pytest.fixture
def _told(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    set_days(monkeypatch, DAYS.days)


told = pytest.mark.usefixtures("_told")


def queued() -> dict[int, InactivityNotice]:
    with session_scope(read_only=True) as session:
        return {notice.user_id: notice for notice in session.scalars(select(InactivityNotice))}


def there(user_id: int) -> bool:
    """Say whether the person is there, and is somebody."""
    with session_scope(read_only=True) as session:
        user = session.get(User, user_id)
        return user is not None and user.anonymized_at is None


def active(user_id: int, at: datetime) -> None:
    with session_scope() as session:
        session.execute(update(User).where(User.id == user_id).values(last_activity_at=at))


def sent(client: TestClient, headers: Headers, notice_id: UUID) -> int:
    return client.post(f"{NOTICES}/{notice_id}/sent", headers=headers).status_code


def test_without_days_of_notice_nobody_is_told_and_who_is_due_goes(service: Service) -> None:
    due = service.user("jane@example.com", last_activity_at=NOW - PERIOD)
    soon = service.user("joe@example.com", last_activity_at=NOW - PERIOD + TICK)
    retire(NOW)
    assert queued() == {}
    assert (there(due), there(soon)) == (False, True)


@told
def test_people_are_told_once_when_due_within_the_days_and_not_earlier(service: Service) -> None:
    soon = service.user("jane@example.com", last_activity_at=NOW - PERIOD + DAYS)
    later = service.user("joe@example.com", last_activity_at=NOW - PERIOD + DAYS + TICK)
    retire(NOW)
    first = queued()
    assert [(n.user_id, n.queued_at, n.ends_at, n.sent_at) for n in first.values()] == [
        (soon, NOW, NOW + DAYS, None)
    ]
    retire(NOW + TICK)
    again = queued()
    assert set(again) == {soon, later}
    assert (again[soon].id, again[soon].queued_at) == (first[soon].id, NOW)
    assert (again[later].queued_at, again[later].ends_at) == (NOW + TICK, NOW + TICK + DAYS)


@told
def test_a_dry_run_tells_nobody(service: Service, admin: Headers, client: TestClient) -> None:
    service.user("jane@example.com", last_activity_at=LONG_AGO)
    for body in ({"dry_run": True}, {"dry_run": False}):
        assert queued() == {}
        answer = client.post("/security/retention/apply", json=body, headers=admin)
        assert answer.status_code == 200
    assert len(queued()) == 1


@pytest.mark.parametrize("action", ["anonymize", "delete"])
@pytest.mark.parametrize("last", [NOW - PERIOD + DAYS, LONG_AGO], ids=["soon due", "long due"])
def test_nobody_goes_before_the_day_they_were_told_and_then_goes_though_nobody_sent_it(
    service: Service, monkeypatch: pytest.MonkeyPatch, last: datetime, action: str
) -> None:
    set_days(monkeypatch, DAYS.days, RETENTION_USER_ACTION=action)
    jane = service.user("jane@example.com", last_activity_at=last)
    assert retire(NOW).affected == 0
    ends_at = queued()[jane].ends_at
    assert ends_at == NOW + DAYS
    assert retire(ends_at - TICK).affected == 0
    assert there(jane)
    assert retire(ends_at).affected == 1
    assert not there(jane)
    assert queued() == {}


@told
def test_a_run_that_is_late_does_not_make_up_for_a_notice_that_was_not_queued(
    service: Service,
) -> None:
    jane = service.user("jane@example.com", last_activity_at=NOW - PERIOD + DAYS)
    later = NOW + 10 * DAYS
    retire(later)
    assert there(jane)
    assert queued()[jane].ends_at == later + DAYS


@told
def test_signing_in_cancels_ones_own_notice_only(service: Service) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    joe = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    with pytest.raises(WrongPasswordError):
        get_auth_service().sign_in("jane@example.com", "not the password")
    assert set(queued()) == {jane, joe}
    get_auth_service().sign_in("jane@example.com", PASSWORD)
    assert set(queued()) == {joe}
    retire(NOW + DAYS)
    assert (there(jane), there(joe)) == (True, False)
    assert queued() == {}


@told
def test_other_activity_cancels_at_the_next_run_and_a_new_notice_gives_all_days_again(
    service: Service,
) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    active(jane, NOW + TICK)
    assert retire(NOW + DAYS).affected == 0
    assert queued() == {}
    again = NOW + TICK + PERIOD
    retire(again)
    assert queued()[jane].ends_at == again + DAYS
    assert retire(again + DAYS - TICK).affected == 0
    assert retire(again + DAYS).affected == 1


@told
def test_a_held_person_stays_though_told_until_the_hold_is_released(service: Service) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    service.add(person_hold(jane))
    retire(NOW)
    run = retire(NOW + DAYS)
    assert [(r.matched, r.held, r.affected) for r in run.results if r.data_type == "user"] == [
        (1, 1, 0)
    ]
    assert there(jane)
    with session_scope() as session:
        session.execute(update(LegalHold).values(released_at=NOW))
    retire(NOW + DAYS)
    assert not there(jane)


@told
def test_who_has_no_clock_is_not_told(service: Service) -> None:
    service.user("boss@example.com", role=Role.ADMIN, last_activity_at=LONG_AGO)
    service.user("jack@example.com", last_activity_at=None)
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    assert set(queued()) == {jane}
    assert retire(NOW + DAYS).affected == 1


@told
def test_a_notice_is_sent_once_is_not_listed_then_and_is_not_queued_again(
    service: Service, client: TestClient, admin: Headers
) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    joe = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    mine = queued()[jane].id
    assert [sent(client, admin, one) for one in (uuid4(), mine, mine)] == [404, 200, 409]
    listed = client.get(NOTICES, headers=admin).json()["items"]
    assert [item["user_id"] for item in listed] == [joe]
    retire(NOW + timedelta(days=1))
    notice = queued()[jane]
    assert notice.id == mine
    assert notice.sent_at is not None
    with session_scope(read_only=True) as session:
        acts = select(AuditEvent.detail).where(AuditEvent.action == "notice_sent")
        assert len(session.scalars(acts).all()) == 1
    assert retire(NOW + DAYS).affected == 2
    assert sent(client, admin, mine) == 404


@told
def test_the_list_has_addresses_the_longest_wait_first_and_is_an_admins_only(
    service: Service, client: TestClient, admin: Headers, sign_in: SignIn
) -> None:
    first = service.user("jane@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    second = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW + timedelta(hours=1))
    answer = client.get(NOTICES, headers=admin)
    assert answer.headers["Cache-Control"] == "no-store"
    items = answer.json()["items"]
    assert [(item["user_id"], item["email"], item["sent_at"]) for item in items] == [
        (first, "jane@example.com", None),
        (second, "joe@example.com", None),
    ]
    assert [datetime.fromisoformat(item["ends_at"]) for item in items] == [
        NOW + DAYS,
        NOW + DAYS + timedelta(hours=1),
    ]
    assert client.get(f"{NOTICES}?limit=1", headers=admin).json()["items"] == items[:1]
    refused = [client.get(f"{NOTICES}?limit={n}", headers=admin).status_code for n in (0, 501, "x")]
    assert refused == [422] * 3
    notice = UUID(items[0]["id"])
    for headers, status in (({}, 401), (sign_in("jane@example.com"), 403)):
        assert client.get(NOTICES, headers=headers).status_code == status
        assert sent(client, headers, notice) == status
    assert client.post(f"{NOTICES}/1/sent", headers=admin).status_code == 422
    assert queued()[first].sent_at is None


@told
def test_a_persons_export_has_their_notice_and_no_other(
    service: Service, client: TestClient, sign_in: SignIn
) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    joe = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    body = {"user_id": jane, "format": "json"}
    answer = client.post("/security/data/export", json=body, headers=sign_in("jane@example.com"))
    assert answer.status_code == 200
    notices = queued()
    assert str(notices[jane].id) in answer.text
    assert str(notices[joe].id) not in answer.text


@told
@pytest.mark.parametrize("mode", EraseMode)
def test_an_erased_persons_notice_goes_with_them(service: Service, mode: EraseMode) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    joe = service.user("joe@example.com", last_activity_at=LONG_AGO)
    retire(NOW)
    erase(jane, mode)
    assert set(queued()) == {joe}
    retire(NOW)
    assert set(queued()) == {joe}


@told
def test_somebody_made_anonymous_is_signed_out_and_cannot_sign_in(
    service: Service, client: TestClient, sign_in: SignIn
) -> None:
    jane = service.user("jane@example.com", last_activity_at=LONG_AGO)
    service.user("joe@example.com")
    mine, theirs = sign_in("jane@example.com"), sign_in("joe@example.com")
    retire(NOW)
    me = f"/security/data/consent/{jane}"
    assert client.get(me, headers=mine).status_code == 200
    retire(NOW + DAYS)
    assert client.get(me, headers=mine).status_code == 401
    assert client.get(me, headers=theirs).status_code == 403
    with pytest.raises(WrongPasswordError):
        get_auth_service().sign_in("jane@example.com", PASSWORD)


@told
def test_very_many_people_are_told_in_the_memory_of_few(service: Service) -> None:
    peaks = []
    for people in (1_200, 4_800):
        with session_scope() as session:
            session.execute(delete(InactivityNotice))
            values = {"created_at": LONG_AGO, "last_activity_at": LONG_AGO}
            added = people - (session.scalar(select(func.count()).select_from(User)) or 0) + 1
            session.execute(insert(User), [values] * added)
        tracemalloc.start()
        try:
            get_retention_service().apply(COMMAND_LINE, dry_run=False, now=NOW)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(queued()) == people
    assert peaks[1] < 1.5 * peaks[0]
