"""A restore brings back what was saved, and no promise that was made since is broken by it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, text

from backend.db_utils import get_engine, session_scope
from backend.errors import RefusedError, SubjectNotFoundError
from backend.models import DATA_MAP, DataConsent, Feedback, LegalHold, Role, User
from backend.privacy.declarations import EraseMode
from backend.privacy.periods import Period
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.restore_service import Restored, get_restore_service
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import get_subject_service
from backend.settings import RetentionAction
from tests.conftest import ADMIN, PASSWORD, Service, SignIn, clear_caches
from tests.privacy.people import dump, keys_of, person_hold, plant, without

Headers = dict[str, str]
JANE = "jane@example.com"
OF_PEOPLE = [mapped.name for mapped in DATA_MAP.of_people]
CONTROL = [name for name in (m.name for m in DATA_MAP.carried_over) if name not in OF_PEOPLE]


@pytest.fixture
def _nothing_is_due(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    for data_type in DATA_MAP.by_data_type:
        monkeypatch.setenv(f"RETENTION_{data_type}_DAYS".upper(), "36500")
    clear_caches()
    get_setup_service().open()


def _backup() -> UUID:
    return get_backup_service().create(COMMAND_LINE).id


def _restore(backup_id: UUID, *, dry_run: bool = False, confirm: bool = True) -> Restored:
    return get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=dry_run, confirm=confirm)


def _erase(user_id: int, mode: EraseMode = EraseMode.DELETE) -> None:
    with session_scope() as session:
        get_compliance_service().erase(
            session, COMMAND_LINE, user_id, mode, reason="request", dry_run=False
        )


def _consent(user_id: int, *, granted: bool, purpose: str = "marketing") -> None:
    with session_scope() as session:
        get_consent_service().record(
            session, COMMAND_LINE, user_id, purpose=purpose, granted=granted, evidence="a form"
        )


def _has_consent(user_id: int, purpose: str = "marketing") -> bool:
    with session_scope(read_only=True) as session:
        return get_consent_service().of(session, user_id).purposes[purpose].granted


def _texts() -> set[str]:
    """Every text of people's tables, encrypted ones in plain."""
    with session_scope(read_only=True) as session:
        return {
            value
            for mapped in DATA_MAP.of_people
            for row in session.execute(select(*mapped.table.columns))
            for value in row
            if isinstance(value, str)
        }


def _plain(table: str) -> set[tuple[Any, ...]]:
    """The rows of a table, encrypted columns in plain: they are sealed anew when carried over."""
    with session_scope(read_only=True) as session:
        return {tuple(row) for row in session.execute(select(*DATA_MAP[table].table.columns))}


@pytest.mark.usefixtures("_nothing_is_due")
def test_rows_are_back_as_they_were_saved(service: Service) -> None:
    jane = plant("A")
    saved = {name: _plain(name) for name in OF_PEOPLE}
    backup_id = _backup()
    late = plant("B")
    with session_scope() as session:
        session.get_one(User, jane.id).full_name = "Mistake"
        session.execute(text("DELETE FROM feedback"))
    restored = _restore(backup_id)
    assert {name: _plain(name) for name in OF_PEOPLE} == saved
    assert late.texts() & _texts() == set()
    assert restored.tables["feedback"].live == 0
    assert restored.tables["feedback"].restored == len(saved["feedback"]) == 2
    assert (restored.tables["users"].live, restored.tables["users"].restored) == (3, 2)


@pytest.mark.parametrize("mode", EraseMode)
def test_a_person_erased_since_is_still_gone(service: Service, mode: EraseMode) -> None:
    jane, joe = plant("A"), plant("B")
    backup_id = _backup()
    _erase(jane.id, mode)
    kept_by_law = _texts() & jane.texts()
    restored = _restore(backup_id)
    assert restored.reapplied.erasures == 1
    assert restored.reapplied.restrictions > 0
    assert _texts() & jane.texts() <= kept_by_law
    left = keys_of(dump(), jane.id)
    assert set().union(*(left[name] for name in left if name != "users")) == set()
    assert joe.texts() & _texts()
    with session_scope(read_only=True) as session:
        assert get_subject_service().require(session, joe.id)
        user = session.get(User, jane.id)
        assert user is None if mode is EraseMode.DELETE else user and user.anonymized_at


def test_consent_stands_as_it_was_decided_last(service: Service) -> None:
    jane, joe = service.user(JANE), service.user("joe@example.com")
    _consent(jane, granted=True)
    backup_id = _backup()
    _consent(jane, granted=False)
    _consent(joe, granted=True)
    restored = _restore(backup_id)
    assert restored.reapplied.consents == 2
    assert (_has_consent(jane), _has_consent(joe)) == (False, True)
    with session_scope(read_only=True) as session:
        history = get_consent_service().of(session, jane).history
        assert [event.granted for event in history] == [True, False]


def test_retention_is_applied_with_the_policies_and_holds_of_now(service: Service) -> None:
    jane, joe = plant("A"), plant("B")
    backup_id = _backup()
    # 30 days: both a person's answers are due, the one of 100 days ago under this policy only.
    with session_scope() as session:
        get_retention_service().set_policy(
            session, COMMAND_LINE, "feedback", Period.parse("P30D"), RetentionAction.DELETE,
            enabled=True,
        )  # fmt: skip
        session.add(person_hold(joe.id))
    restored = _restore(backup_id)
    assert restored.reapplied.retention > 2
    with session_scope(read_only=True) as session:
        assert set(session.scalars(select(Feedback.user_id))) == {joe.id}
        assert session.scalar(select(func.count()).select_from(Feedback)) == 2
    assert jane.texts() & _texts()


def test_the_services_own_records_are_carried_over(service: Service) -> None:
    jane = plant("A")
    _consent(jane.id, granted=True)
    backup_id = _backup()
    _consent(jane.id, granted=False)
    with session_scope() as session:
        get_retention_service().set_policy(
            session, COMMAND_LINE, "user", Period.parse("P9Y"), RetentionAction.ANONYMIZE,
            enabled=False,
        )  # fmt: skip
        get_retention_service().apply(session, COMMAND_LINE, dry_run=False)
        session.add(person_hold(jane.id))
        session.execute(
            text(
                "INSERT INTO job_runs (job, due_at, status, owner, lease_until, attempts)"
                " VALUES ('retention', :now, 'done', 'x', :now, 1)"
            ),
            {"now": datetime(2026, 1, 1, tzinfo=UTC).isoformat(" ")},
        )
    second = _backup()
    before = {name: _plain(name) for name in (*CONTROL, "legal_holds")}
    assert [name for name, rows in before.items() if not rows] == ["erasures", "revoked_tokens"]
    _restore(backup_id)
    for name, rows in before.items():
        assert rows <= _plain(name), name
    with session_scope(read_only=True) as session:
        listed = [record.id for record in get_catalogue_service().records(session)]
    assert listed == [second, backup_id]


def test_sessions_ended_and_passwords_changed_since_stay_so(
    client: TestClient, service: Service, sign_in: SignIn, admin: Headers
) -> None:
    jane, joe = service.user(JANE), service.user("joe@example.com", role=Role.ADMIN)
    gone = service.user("gone@example.com")
    tokens = {name: sign_in(f"{name}@example.com") for name in ("jane", "joe")}
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    assert client.post("/auth/logout", headers=tokens["jane"]).status_code in {200, 204}
    with session_scope() as session:
        get_auth_service().set_password(session, JANE, "a new long password", COMMAND_LINE)
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
    backup_id = _backup()
    lost = plant("B")
    _restore(backup_id)
    fresh = plant("C")
    for table, keys in lost.keys.items():
        if isinstance(keys[0], int):
            assert min(fresh.keys[table]) > max(keys), table


def test_a_new_person_on_an_erased_persons_address_is_not_taken_for_them(
    sqlite_service: Service,
) -> None:
    erased = sqlite_service.user(JANE, full_name="The first")
    first = _backup()
    _erase(erased)
    new = sqlite_service.user(JANE, full_name="The second")
    _consent(new, granted=True)
    second = _backup()
    _restore(second)
    with session_scope(read_only=True) as session:
        assert session.get_one(User, new).full_name == "The second"
    assert _has_consent(new)
    # They came after the first backup: both are gone, and the address is free.
    _restore(first)
    assert {"The first", "The second", JANE} & _texts() == set()
    assert sqlite_service.user(JANE) > new


def test_consent_that_only_the_backup_knows_comes_back_with_its_person(
    sqlite_service: Service,
) -> None:
    wrong = _backup()
    jane = sqlite_service.user(JANE)
    _consent(jane, granted=True)
    right, saved = _backup(), _plain("data_consents")
    _restore(wrong)
    _restore(right)
    assert _plain("data_consents") == saved
    assert _has_consent(jane)


def test_a_hold_that_only_the_backup_knows_comes_back_with_its_person(
    sqlite_service: Service,
) -> None:
    wrong = _backup()
    jane = plant("A")
    sqlite_service.add(person_hold(jane.id))
    right, saved = _backup(), dump()
    _restore(wrong)
    _restore(right)
    assert dump()["legal_holds"].keys() == saved["legal_holds"].keys()
    assert dump()["feedback"] == saved["feedback"], "retention ran over what is held"


def test_a_dry_run_says_what_a_restore_does_and_changes_nothing(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane, joe = plant("A"), plant("B")
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    _erase(jane.id)
    service.add(Feedback(user_id=joe.id, rating=2, submitted_at=datetime.now(UTC)))
    before, files = dump(), _files(service)
    body: dict[str, Any] = {"backup_id": backup_id, "dry_run": True}
    tried = client.post("/security/backup/restore", json=body, headers=admin)
    assert tried.status_code == 200, tried.text
    assert (tried.json()["status"], tried.json()["previous"]) == ("planned", None)
    assert without(dump(), {}, "audit_events") == without(before, {}, "audit_events")
    assert len(dump()["audit_events"]) == len(before["audit_events"]) + 1
    assert _files(service) == files
    body = {"backup_id": backup_id, "confirm": True}
    done = client.post("/security/backup/restore", json=body, headers=admin).json()
    assert done["previous"]
    for name in ("backup_id", "reapplied", "tables"):
        assert done[name] == tried.json()[name]
    assert done["reapplied"]["erasures"] == 1


def _files(service: Service) -> dict[Path, int]:
    found = (p for p in service.folder.rglob("*") if not p.name.startswith("holdfast.db"))
    return {path: path.stat().st_size for path in found}


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
        _restore(UUID(backup_id), confirm=False)
    assert dump() == before


def test_the_old_database_is_kept_whole_and_can_be_used(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = _backup()
    late = plant("A")
    before = dump()
    kept = _restore(backup_id).previous
    assert kept
    assert late.texts() & _texts() == set()
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
            get_auth_service().set_password(session, ADMIN, "another password", COMMAND_LINE)
    finally:
        get_engine().dispose()


def test_a_lost_machine_comes_back_from_the_folder_of_backups_and_the_key(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    jane, joe = plant("A"), service.user("joe@example.com", full_name="Joe")
    _consent(joe, granted=True)
    backup_id = _backup()
    _erase(jane.id)
    _consent(joe, granted=False)
    clear_caches()
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "new"))
    monkeypatch.setenv("BACKUP_URL", str(service.folder / "backups"))
    if service.engine == "postgresql":
        server = request.getfixturevalue("postgres_server")
        name = f"{service.url.rpartition('/')[2]}_new"
        server.run(f"CREATE DATABASE {name}")
        monkeypatch.setenv("DATABASE_URL", server.url(name))
    clear_caches()
    assert get_setup_service().prepare().admin is not None
    with session_scope(read_only=True) as session:
        assert [record.id for record in get_catalogue_service().records(session)] == [backup_id]
    restored = _restore(backup_id)
    assert (restored.reapplied.erasures, restored.reapplied.consents) == (1, 1)
    with session_scope(read_only=True) as session:
        with pytest.raises(SubjectNotFoundError):
            get_subject_service().require(session, jane.id)
        assert session.get_one(User, joe).full_name == "Joe"
        assert session.scalar(select(func.count()).select_from(DataConsent)) == 2
        assert session.scalar(select(func.count()).select_from(LegalHold)) == 0
    assert not _has_consent(joe)
    get_auth_service().sign_in(ADMIN, PASSWORD, None)
    assert get_setup_service().prepare().admin is None
