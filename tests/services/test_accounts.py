"""Accounts: hashes made anew, rights given and taken, and what the command line does for them."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from passlib.hash import argon2
from sqlalchemy import select

from backend.api import auth
from backend.crypto import passwords
from backend.db_utils import session_scope
from backend.errors import ConflictError, SubjectNotFoundError, UnauthenticatedError
from backend.models import AuditEvent, Role, SignIn, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE, Actor
from backend.services.auth_service import WrongPasswordError, get_auth_service
from backend.services.credential_service import get_credential_service
from tests.conftest import ADMIN, PASSWORD, Run, Service
from tests.conftest import SignIn as TokenOf

JANE: Final = "jane@example.com"
# More than there are threads for requests.
MANY: Final = 60


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Accounts do not depend on the engine."""
    return sqlite_service


def stored_hash(user_id: int) -> str:
    with session_scope(read_only=True) as session:
        return session.get_one(User, user_id).password_hash or ""


def test_a_sign_in_makes_an_outdated_hash_anew_and_leaves_a_good_one(service: Service) -> None:
    weak = argon2.using(type="ID", memory_cost=8192, time_cost=1).hash(PASSWORD)
    user_id = service.user(JANE)
    with session_scope() as session:
        session.get_one(User, user_id).password_hash = weak
    with pytest.raises(WrongPasswordError):
        get_auth_service().sign_in(JANE, "not the password")
    assert stored_hash(user_id) == weak
    assert get_auth_service().sign_in(JANE, PASSWORD)
    renewed = stored_hash(user_id)
    assert "m=19456,t=2,p=1" in renewed
    assert get_auth_service().sign_in(JANE, PASSWORD)
    assert stored_hash(user_id) == renewed


def test_a_password_that_changes_while_it_is_verified_lets_nobody_in(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.user(JANE)
    verify = passwords.verify_password

    def changed_meanwhile(password: str, stored: str | None) -> bool:
        monkeypatch.setattr(passwords, "verify_password", verify)
        with session_scope() as session:
            get_account_service().set_password(
                session, JANE, "seven grey herons at noon", COMMAND_LINE
            )
        return verify(password, stored)

    monkeypatch.setattr(passwords, "verify_password", changed_meanwhile)
    with pytest.raises(WrongPasswordError):
        get_auth_service().sign_in(JANE, PASSWORD)
    with session_scope(read_only=True) as session:
        assert session.scalars(select(SignIn)).all() == []


def erase(user_id: int) -> None:
    with session_scope() as session:
        session.delete(session.get_one(User, user_id))


def test_who_is_erased_while_a_password_is_verified_is_signed_in_no_more(
    client: TestClient, service: Service, sign_in: TokenOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = passwords.verify_password
    body = {"present_password": PASSWORD, "new_password": "seven grey herons at noon"}
    for path, sent in (
        ("/auth/password", body), ("/auth/codes", {"present_password": PASSWORD}),
    ):  # fmt: skip
        user_id = service.user(JANE, Role.AUDITOR)

        def erased_meanwhile(password: str, stored: str | None, user_id: int = user_id) -> bool:
            erase(user_id)
            return verify(password, stored)

        headers = sign_in(JANE)
        monkeypatch.setattr(passwords, "verify_password", erased_meanwhile)
        answer = client.post(path, json=sent, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), path


def test_who_is_erased_while_a_token_is_verified_changes_nothing(service: Service) -> None:
    user_id = service.user(JANE, Role.AUDITOR)
    gone = Actor("person", Role.AUDITOR, user_id, uid=uuid4())
    erase(user_id)
    credentials = get_credential_service()
    for act in (
        partial(credentials.change_password, gone, PASSWORD, "seven grey herons at noon", None),
        partial(credentials.begin_codes, gone, PASSWORD, None),
        partial(credentials.confirm_codes, gone, "123456", None),
        partial(credentials.remove_codes, gone, "123456", None),
    ):
        with pytest.raises(UnauthenticatedError, match="not valid"):
            act()


@pytest.mark.parametrize("password", ["Kowalczyk-Agnieszka7", "zoe.AGNIESZKA.zoe-7402"])
def test_a_password_that_is_made_of_the_persons_name_is_refused(
    client: TestClient, service: Service, sign_in: TokenOf, run: Run, password: str
) -> None:
    service.user(JANE, full_name="Agnieszka Zoe Kowalczyk")
    service.user("joe@example.com")
    body = {"present_password": PASSWORD, "new_password": password}
    named = client.post("/auth/password", json=body, headers=sign_in(JANE))
    assert (named.status_code, named.json()["code"]) == (422, "weak_password")
    assert run("set-password", JANE, "--password-stdin", stdin=password).code == 2
    # It is nobody else's name.
    other = client.post("/auth/password", json=body, headers=sign_in("joe@example.com"))
    assert other.status_code == 204
    assert run("set-password", "joe@example.com", "--password-stdin", stdin=password).code == 0


def test_who_waits_for_a_hash_keeps_no_thread_from_other_requests(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    form = {"username": "nobody@example.com", "password": PASSWORD}
    with ThreadPoolExecutor(MANY) as pool, ExitStack() as taken:
        for _ in range(passwords.AT_ONCE):
            taken.enter_context(passwords._SLOTS)
        waiting = [pool.submit(client.post, "/auth/token", data=form) for _ in range(MANY)]
        deadline = time.monotonic() + 60
        while auth._HASHING.statistics().tasks_waiting < MANY - passwords.AT_ONCE:
            assert not any(one.done() for one in waiting)
            assert time.monotonic() < deadline, "they do not all wait for a hash"
            time.sleep(0.005)
        # This one needs a thread.
        assert client.get("/auth/me", headers=admin).status_code == 200
        assert not any(one.done() for one in waiting)
        taken.close()
        # Ten of them fail, the others are throttled.
        assert {one.result(timeout=60).status_code for one in waiting} == {401, 429}


def test_more_than_can_wait_are_told_to_come_back(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "_MAX_WAITING", 0)
    answer = client.post("/auth/token", data={"username": JANE, "password": PASSWORD})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_rights_are_given_and_taken_on_the_command_line_and_recorded(
    service: Service, run: Run
) -> None:
    assert (
        run("create-user", JANE, "--role", "auditor", "--password-stdin", stdin=PASSWORD).code == 0
    )
    assert run("set-role", JANE, "operator").code == 0
    with session_scope(read_only=True) as session:
        assert session.scalars(select(User.role).order_by(User.id.desc())).first() is Role.OPERATOR
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "role_changed")).one()
    assert event.detail == '{"before":"auditor","after":"operator"}'
    assert run("set-role", JANE, "emperor").code == 2
    assert run("set-role", "nobody@example.com", "admin").code == 2


def test_the_last_admin_stays_one(service: Service) -> None:
    with pytest.raises(ConflictError), session_scope() as session:
        get_account_service().set_role(session, ADMIN, Role.USER, COMMAND_LINE)
    service.user(JANE, Role.ADMIN)
    with session_scope() as session:
        get_account_service().set_role(session, ADMIN, Role.USER, COMMAND_LINE)


def test_stolen_tokens_are_ended_from_the_command_line(
    client: TestClient, service: Service, run: Run
) -> None:
    service.user(JANE)
    form = {"username": JANE, "password": PASSWORD}
    tokens = client.post("/auth/token", data=form).json()
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    assert client.get("/auth/me", headers=headers).status_code == 200
    assert run("end-sign-ins", JANE).code == 0
    assert client.get("/auth/me", headers=headers).status_code == 401
    assert run("end-sign-ins", "nobody@example.com").code == 2


def test_a_weak_password_is_refused_on_the_command_line_and_not_shown(
    service: Service, run: Run
) -> None:
    answer = run("create-user", JANE, "--password-stdin", stdin="jane-jane-jane1")
    assert answer.code == 2
    assert "easily guessed" in answer.err
    assert "jane-jane" not in answer.err + answer.out
    with pytest.raises(SubjectNotFoundError), session_scope() as session:
        get_account_service().set_password(session, JANE, PASSWORD, COMMAND_LINE)


def test_a_token_of_before_rights_changed_counts_no_more_and_one_of_after_does(
    client: TestClient, service: Service, sign_in: TokenOf
) -> None:
    user_id = service.user(JANE)
    headers = sign_in(JANE)
    now = datetime.now(UTC)
    for changed_at, status in (
        (now - timedelta(minutes=1), 200),
        (now + timedelta(seconds=1), 401),
    ):
        with session_scope() as session:
            session.get_one(User, user_id).tokens_valid_after = changed_at
        assert client.get("/auth/me", headers=headers).status_code == status
