"""A restore brings back what was saved, and no promise that was made since is broken by it."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text

from backend.db_utils import get_engine, session_scope
from backend.errors import RefusedError
from backend.models import (
    DATA_MAP,
    Alert,
    AlertKind,
    Approval,
    Feedback,
    InactivityNotice,
    RevokedToken,
    Role,
    User,
)
from backend.privacy.declarations import EraseMode
from backend.privacy.periods import Period
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.catalogue_service import get_catalogue_service
from backend.services.consent_service import get_consent_service
from backend.services.policy_service import get_policy_service
from backend.services.pruning_service import get_pruning_service
from backend.services.queue_service import get_queue_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import Who, get_subject_service
from backend.settings import RetentionAction
from tests.backup.promises import (
    OF_PEOPLE,
    back_up,
    consent,
    erase,
    has_consent,
    nothing_is_due,
    plain_rows,
    restore,
    texts,
)
from tests.conftest import ADMIN, PASSWORD, Service, SignIn, clear_caches
from tests.privacy.people import dump, keys_of, person_hold, plant, retire

Headers = dict[str, str]
JANE = "jane@example.com"
CARRIED_OVER = [mapped.name for mapped in DATA_MAP.carried_over]


@pytest.fixture
def _nothing_is_due(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    nothing_is_due(monkeypatch)


@pytest.mark.usefixtures("_nothing_is_due")
def test_rows_are_back_as_they_were_saved(service: Service) -> None:
    jane = plant("A")
    saved = {name: plain_rows(name) for name in OF_PEOPLE}
    backup_id = back_up()
    late = plant("B")
    with session_scope() as session:
        session.get_one(User, jane.id).full_name = "Mistake"
        session.execute(text("DELETE FROM feedback"))
    restored = restore(backup_id)
    assert {name: plain_rows(name) for name in OF_PEOPLE} == saved
    assert late.texts() & texts() == set()
    assert restored.tables["feedback"].live == 0
    assert restored.tables["feedback"].restored == len(saved["feedback"]) == 2
    assert (restored.tables["users"].live, restored.tables["users"].restored) == (3, 2)


@pytest.mark.parametrize("mode", EraseMode)
def test_a_person_erased_since_is_still_gone(service: Service, mode: EraseMode) -> None:
    jane, joe = plant("A"), plant("B")
    backup_id = back_up()
    erase(jane.id, mode)
    kept_by_law = texts() & jane.texts()
    restored = restore(backup_id)
    assert restored.reapplied.erasures == 1
    assert restored.reapplied.restrictions > 0
    assert texts() & jane.texts() <= kept_by_law
    left = keys_of(dump(), jane.id)
    assert set().union(*(left[name] for name in left if name != "users")) == set()
    assert joe.texts() & texts()
    with session_scope(read_only=True) as session:
        assert get_subject_service().require(session, joe.id)
        user = session.get(User, jane.id)
        assert user is None if mode is EraseMode.DELETE else user and user.anonymized_at


def test_consent_stands_as_it_was_decided_last(service: Service) -> None:
    jane, joe = service.user(JANE), service.user("joe@example.com")
    consent(jane, granted=True)
    backup_id = back_up()
    consent(jane, granted=False)
    consent(joe, granted=True)
    restored = restore(backup_id)
    assert restored.reapplied.consents == 2
    assert (has_consent(jane), has_consent(joe)) == (False, True)
    with session_scope(read_only=True) as session:
        history = get_consent_service().of(session, jane).history
        assert [event.granted for event in history] == [True, False]


def test_retention_is_applied_as_at_the_last_run_with_the_holds_of_now(
    service: Service,
) -> None:
    jane, joe = plant("A"), plant("B")
    backup_id = back_up()
    # 30 days: both a person's answers are due, the one of 100 days ago under this policy only.
    with session_scope() as session:
        get_policy_service().set(
            session, COMMAND_LINE, "feedback", Period.parse("P30D"), RetentionAction.DELETE,
            enabled=True,
        )  # fmt: skip
        session.add(person_hold(joe.id))
    retire()
    restored = restore(backup_id)
    assert restored.reapplied.retention > 2
    with session_scope(read_only=True) as session:
        assert set(session.scalars(select(Feedback.user_id))) == {joe.id}
        assert session.scalar(select(func.count()).select_from(Feedback)) == 2
    assert jane.texts() & texts()


def test_the_services_own_records_are_carried_over(service: Service) -> None:
    jane, joe = plant("A"), plant("B")
    consent(jane.id, granted=True)
    backup_id = back_up()
    consent(jane.id, granted=False)
    erase(joe.id)
    now = datetime.now(UTC)
    with session_scope() as session:
        get_policy_service().set(
            session, COMMAND_LINE, "user", Period.parse("P9Y"), RetentionAction.ANONYMIZE,
            enabled=False,
        )  # fmt: skip
    retire()
    with session_scope() as session:
        session.add(person_hold(jane.id))
        get_queue_service().enqueue(
            session, COMMAND_LINE, Who(jane.id), EraseMode.DELETE, reason="request"
        )
        session.add(InactivityNotice(user_id=jane.id, ends_at=now, queued_at=now))
        session.add(Alert(kind=AlertKind.JOB_LATE, about="backup", code="late", raised_at=now))
        session.add(
            Approval(
                act="POST /security/retention/apply", request="{}", requested_by="x",
                requested_at=now, expires_at=now + timedelta(days=1),
            )
        )  # fmt: skip
        session.add(RevokedToken(token_id="a token", expires_at=now + timedelta(hours=1)))
        session.execute(
            text(
                "INSERT INTO job_runs (job, due_at, status, owner, lease_until, attempts)"
                " VALUES ('retention', :now, 'done', 'x', :now, 1)"
            ),
            {"now": datetime(2026, 1, 1, tzinfo=UTC).isoformat(" ")},
        )
    second = back_up()
    with session_scope() as session:
        until = now + timedelta(days=30)
        get_pruning_service().hold(session, second, COMMAND_LINE, until)
    before = {name: plain_rows(name) for name in CARRIED_OVER}
    assert [name for name, rows in before.items() if not rows] == []
    restore(backup_id)
    for name, rows in before.items():
        assert rows <= plain_rows(name), name
    with session_scope(read_only=True) as session:
        listed = get_catalogue_service().records(session)
    assert [record.id for record in listed] == [second, backup_id]
    assert [record.held_until for record in listed] == [until, None]


def test_sessions_ended_and_passwords_changed_since_stay_so(
    client: TestClient, service: Service, sign_in: SignIn, admin: Headers
) -> None:
    jane, joe = service.user(JANE), service.user("joe@example.com", role=Role.ADMIN)
    gone = service.user("gone@example.com")
    tokens = {name: sign_in(f"{name}@example.com") for name in ("jane", "joe")}
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    assert client.post("/auth/logout", headers=tokens["jane"]).status_code in {200, 204}
    with session_scope() as session:
        get_account_service().set_password(session, JANE, "a new long password", COMMAND_LINE)
        session.get_one(User, joe).role = Role.USER
        session.get_one(User, gone).is_active = False
    late = service.user("late@example.com")
    tokens["late"] = sign_in("late@example.com")
    body = {"backup_id": backup_id, "confirm": True}
    answer = client.post("/security/backup/restore", json=body, headers=admin)
    assert (answer.status_code, answer.json()["status"]) == (200, "restored")
    assert client.get("/auth/me", headers=tokens["jane"]).status_code == 401
    assert client.get("/security/backup/list", headers=tokens["joe"]).status_code == 403
    assert client.get("/security/backup/list", headers=admin).status_code == 200
    for email, password, status in (
        (JANE, PASSWORD, 401),
        (JANE, "a new long password", 200),
        ("gone@example.com", PASSWORD, 401),
        ("late@example.com", PASSWORD, 401),
    ):
        form = {"username": email, "password": password}
        assert client.post("/auth/token", data=form).status_code == status, email
    # The next person does not get the number, nor the session, of the one who is gone.
    assert service.user("next@example.com") > late > jane
    assert client.get("/auth/me", headers=tokens["late"]).status_code == 401


@pytest.mark.usefixtures("_nothing_is_due")
def test_no_row_number_is_given_out_twice(service: Service) -> None:
    plant("A")
    backup_id = back_up()
    lost = plant("B")
    restore(backup_id)
    fresh = plant("C")
    for table, keys in lost.keys.items():
        if isinstance(keys[0], int):
            assert min(fresh.keys[table]) > max(keys), table


def test_a_new_person_on_an_erased_persons_address_is_not_taken_for_them(
    sqlite_service: Service,
) -> None:
    erased = sqlite_service.user(JANE, full_name="The first")
    first = back_up()
    erase(erased)
    new = sqlite_service.user(JANE, full_name="The second")
    consent(new, granted=True)
    second = back_up()
    restore(second)
    with session_scope(read_only=True) as session:
        assert session.get_one(User, new).full_name == "The second"
    assert has_consent(new)
    # They came after the first backup: both are gone, and the address is free.
    restore(first, confirm_empty=True)
    assert {"The first", "The second", JANE} & texts() == set()
    assert sqlite_service.user(JANE) > new


def test_consent_that_only_the_backup_knows_comes_back_with_its_person(
    sqlite_service: Service,
) -> None:
    wrong = back_up()
    jane = sqlite_service.user(JANE)
    consent(jane, granted=True)
    right, saved = back_up(), plain_rows("data_consents")
    restore(wrong, confirm_empty=True)
    restore(right)
    assert plain_rows("data_consents") == saved
    assert has_consent(jane)


def test_a_hold_that_only_the_backup_knows_comes_back_with_its_person(
    sqlite_service: Service,
) -> None:
    wrong = back_up()
    jane = plant("A")
    sqlite_service.add(person_hold(jane.id))
    right, saved = back_up(), dump()
    restore(wrong, confirm_empty=True)
    restore(right)
    assert dump()["legal_holds"].keys() == saved["legal_holds"].keys()
    assert dump()["feedback"] == saved["feedback"], "retention ran over what is held"


def test_without_confirm_nothing_happens(
    client: TestClient, service: Service, admin: Headers
) -> None:
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    service.user(JANE)
    before = dump()
    for body in ({"backup_id": backup_id}, {"backup_id": backup_id, "confirm": False}):
        answer = client.post("/security/backup/restore", json=body, headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (422, "refused")
    with pytest.raises(RefusedError):
        get_restore_service().restore(
            UUID(backup_id), COMMAND_LINE, dry_run=False, confirm=False, confirm_empty=True
        )
    assert dump() == before


def test_the_old_database_is_kept_whole_and_can_be_used(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = back_up()
    late = plant("A")
    before = dump()
    kept = restore(backup_id, confirm_empty=True).previous
    assert kept
    assert late.texts() & texts() == set()
    if service.engine == "sqlite":
        assert Path(kept).stat().st_mode & 0o777 == 0o600
        url = f"sqlite:///{kept}"
    else:
        url = f"{service.url.rpartition('/')[0]}/{kept}"
    monkeypatch.setenv("DATABASE_URL", url)
    clear_caches()
    get_setup_service().open()
    try:
        assert dump() == before
        with session_scope() as session:
            get_account_service().set_password(session, ADMIN, "another password", COMMAND_LINE)
    finally:
        get_engine().dispose()
