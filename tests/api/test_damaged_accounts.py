"""Accounts of which a cell cannot be opened: what does not decide does not matter."""

import time
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text

from backend.crypto import passwords
from backend.db_utils import session_scope
from backend.models import AuditEvent, Role, User
from backend.services.auth_service import WrongPasswordError, get_auth_service
from backend.settings import AppEnv
from tests.conftest import PASSWORD, Run, Service
from tests.logged import logged

JANE: Final = "jane@example.com"
NEW: Final = "seven grey herons at noon"
# Of a hash that was right, with a mark to look for in the logs.
_CUT: Final = "$argon2id$v=19$m=19456,t=2,p=1$vhcCIARAiJHSeq9VCgEgZA$gqh48EhXm2"
DAMAGED_HASHES: Final = {
    "empty": "",
    "no hash": "gqh48EhXm2",
    "cut": f"{_CUT}/F+xhaNTwIyFZ2bUh9YRq0w14PeHtYfP",
    "without a digest": _CUT.rpartition("$")[0],
    "no base64": f"{_CUT}#F+xhaNTwIyFZ2bUh9YRq0w14PeHtYfPc",
    "no ASCII": f"{_CUT}\u017cF+xhaNTwIyFZ2bUh9YRq0w14PeHtYfPc",
    "of another kind": "$2b$12$gqh48EhXm2gqh48EhXm2gqh48EhXm2gqh48EhXm2gqh48EhXm2abc",
    "with what we never write": _CUT.replace("p=1", "p=1,data=AAAA"),
    "of more memory than there is": _CUT.replace("19456", "4294967295"),
}


def damage(**columns: str) -> None:
    """Put plain text into columns of all but the admin's row, past what would seal it."""
    names = ", ".join(f"{name} = :{name}" for name in columns)
    with session_scope() as session:
        session.execute(text(f"UPDATE users SET {names} WHERE id > 1"), columns)  # noqa: S608 - ours


def ask_token(client: TestClient, **form: str) -> Any:
    return client.post("/auth/token", data={"username": JANE, "password": PASSWORD} | form)


def renew(client: TestClient, token: str) -> Any:
    return ask_token(client, grant_type="refresh_token", refresh_token=token)


def bearing(tokens: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


def test_a_stolen_refresh_token_is_found_out_also_where_the_row_cannot_be_opened(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    stolen = ask_token(client).json()
    thief = renew(client, stolen["refresh_token"]).json()
    damage(full_name="damaged", phone="damaged", email="damaged", totp_secret="damaged")
    assert client.get("/auth/me", headers=bearing(thief)).status_code == 200
    second = renew(client, stolen["refresh_token"])
    assert (second.status_code, second.json()["code"]) == (401, "unauthenticated")
    assert client.get("/auth/me", headers=bearing(thief)).status_code == 401
    assert renew(client, thief["refresh_token"]).status_code == 401
    with session_scope(read_only=True) as session:
        found = select(AuditEvent).where(AuditEvent.action == "sign_in_renewed")
        (recorded,) = session.scalars(found).all()
    assert (recorded.outcome, recorded.subject_ref is None) == ("token_reused", False)


def test_a_cell_that_does_not_decide_locks_nobody_out(
    client: TestClient, service: Service, run: Run
) -> None:
    service.user(JANE, Role.AUDITOR)
    damage(full_name="damaged", phone="damaged", email="damaged")
    assert ask_token(client, password="not the password").status_code == 401
    headers = bearing(ask_token(client).json())
    codes = {"present_password": PASSWORD}
    assert client.post("/auth/codes", json=codes, headers=headers).status_code == 201
    wrong = client.post("/auth/codes/confirm", json={"code": "12345x"}, headers=headers)
    assert wrong.status_code == 422
    body = {"present_password": PASSWORD, "new_password": NEW}
    assert client.post("/auth/password", json=body, headers=headers).status_code == 204
    assert ask_token(client, password=NEW).status_code == 200
    # Nor an operator who helps.
    assert run("set-password", JANE, "--password-stdin", stdin=PASSWORD).code == 0
    assert run("set-role", JANE, "operator").code == 0
    assert run("end-sign-ins", JANE).code == 0
    assert ask_token(client).status_code == 200


def test_who_guesses_is_throttled_also_where_the_address_cannot_be_opened(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    service.user("joe@example.com")
    damage(email="damaged")
    wrong = {"present_password": "guessed", "new_password": NEW}
    headers = bearing(ask_token(client, username="joe@example.com").json())
    answers = [client.post("/auth/password", json=wrong, headers=headers) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [422] * 10 + [429]
    # Counted by themselves, and not as all whose addresses do not open.
    jane = bearing(ask_token(client).json())
    assert client.post("/auth/password", json=wrong, headers=jane).status_code == 422


def test_where_the_secret_of_the_codes_cannot_be_opened_every_code_is_wrong(
    client: TestClient, service: Service, run: Run
) -> None:
    service.user(JANE, Role.AUDITOR, totp_step=1)
    damage(totp_secret="damaged")
    for otp in ("", "123456"):
        answer = ask_token(client, otp=otp)
        assert (answer.status_code, answer.json()["code"]) == (401, "wrong_credentials")
    assert run("remove-codes", JANE).code == 0
    headers = bearing(ask_token(client).json())
    damage(totp_secret="damaged")
    confirm = client.post("/auth/codes/confirm", json={"code": "123456"}, headers=headers)
    assert confirm.status_code == 409
    with session_scope() as session:
        session.execute(text("UPDATE users SET totp_step = 1 WHERE totp_secret IS NOT NULL"))
    remove = client.post("/auth/codes/remove", json={"code": "123456"}, headers=headers)
    assert (remove.status_code, remove.json()["code"]) == (422, "wrong_code")


@pytest.mark.parametrize("damaged", DAMAGED_HASHES.values(), ids=DAMAGED_HASHES)
def test_a_damaged_hash_is_a_wrong_password_and_is_not_logged(
    client: TestClient, service: Service, run: Run, damaged: str
) -> None:
    service.user(JANE)
    headers = bearing(ask_token(client).json())
    damage(password_hash=damaged)
    with logged(AppEnv.PRODUCTION) as written:
        answer = ask_token(client)
        body = {"present_password": PASSWORD, "new_password": NEW}
        change = client.post("/auth/password", json=body, headers=headers)
        said = written()
    assert (answer.status_code, answer.json()["code"]) == (401, "wrong_credentials")
    assert answer.json()["detail"] == ask_token(client, username="x@example.com").json()["detail"]
    assert (change.status_code, change.json()["code"]) == (422, "wrong_password")
    # An empty one is as none.
    assert said.count("password_hash_damaged") == (2 if damaged else 0)
    assert "gqh48EhXm2" not in said
    assert run("set-password", JANE, "--password-stdin", stdin=NEW).code == 0
    assert ask_token(client, password=NEW).status_code == 200


def test_a_hash_that_is_no_text_is_a_wrong_password_too(
    client: TestClient, sqlite_service: Service
) -> None:
    """SQLite keeps whatever it was given."""
    sqlite_service.user(JANE)
    headers = bearing(ask_token(client).json())
    with session_scope() as session:
        session.execute(text("UPDATE users SET password_hash = CAST(X'24FF41' AS TEXT)"))
    assert ask_token(client).status_code == 401
    body = {"present_password": PASSWORD, "new_password": NEW}
    change = client.post("/auth/password", json=body, headers=headers)
    assert (change.status_code, change.json()["code"]) == (422, "wrong_password")


def test_a_damaged_hash_is_answered_as_late_as_a_wrong_password(sqlite_service: Service) -> None:
    sqlite_service.user(JANE)

    def seconds() -> float:
        taken = []
        for _ in range(4):
            started = time.thread_time()
            with pytest.raises(WrongPasswordError):
                get_auth_service().sign_in(JANE, "not the password")
            taken.append(time.thread_time() - started)
        return min(taken)

    passwords.verify_password("", None)
    wrong = seconds()
    damage(password_hash=DAMAGED_HASHES["cut"])
    assert 0.5 < seconds() / wrong < 2
    with session_scope(read_only=True) as session:
        assert session.scalars(select(User.password_hash)).all()[-1] == DAMAGED_HASHES["cut"]
