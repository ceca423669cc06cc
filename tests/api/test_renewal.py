"""Staying signed in: refresh tokens that are good once, and sign-ins that end everywhere."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient
from jose import jwt
from sqlalchemy import select, text, update

from backend.db_utils import session_scope
from backend.models import AuditEvent, RevokedToken, Role, SignIn, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from tests.conftest import PASSWORD, Service

JANE: Final = "jane@example.com"


def bearer(tokens: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {tokens['access_token']}"}


def signed_in(client: TestClient) -> dict[str, Any]:
    answer = client.post("/auth/token", data={"username": JANE, "password": PASSWORD})
    assert answer.status_code == 200, answer.text
    tokens: dict[str, Any] = answer.json()
    return tokens


def renew(client: TestClient, token: str) -> Any:
    return client.post("/auth/token", data={"grant_type": "refresh_token", "refresh_token": token})


def who(client: TestClient, tokens: dict[str, Any]) -> int:
    return client.get("/auth/me", headers=bearer(tokens)).status_code


def outcomes(action: str) -> list[str]:
    with session_scope(read_only=True) as session:
        found = select(AuditEvent.outcome).where(AuditEvent.action == action)
        return list(session.scalars(found.order_by(AuditEvent.id)))


def test_a_refresh_token_gives_new_tokens_and_is_used_up(
    client: TestClient, service: Service
) -> None:
    user_id = service.user(JANE)
    first = signed_in(client)
    answer = renew(client, first["refresh_token"])
    assert answer.status_code == 200
    second = answer.json()
    assert client.get("/auth/me", headers=bearer(second)).json()["user_id"] == user_id
    assert second["refresh_token"] != first["refresh_token"]
    assert renew(client, second["refresh_token"]).status_code == 200
    # The first access token is of the same sign-in, and not the thief's.
    assert who(client, first) == 200


def test_a_refresh_token_that_is_used_twice_ends_the_sign_in_for_both_holders(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    elsewhere, stolen = signed_in(client), signed_in(client)
    thief = renew(client, stolen["refresh_token"]).json()
    assert renew(client, stolen["refresh_token"]).status_code == 401
    assert renew(client, thief["refresh_token"]).status_code == 401
    assert who(client, thief) == who(client, stolen) == 401
    # Another sign-in of the same person has nothing to do with it.
    assert who(client, elsewhere) == 200
    assert renew(client, elsewhere["refresh_token"]).status_code == 200
    assert outcomes("sign_in_renewed") == ["token_reused"]


def test_of_many_who_renew_with_one_token_at_once_at_most_one_gets_tokens(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    token = signed_in(client)["refresh_token"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: renew(client, token), range(6)))
    assert sorted({answer.status_code for answer in answers}) in ([200, 401], [401])
    assert [answer.status_code for answer in answers].count(200) <= 1
    with session_scope(read_only=True) as session:
        assert session.scalars(select(SignIn)).all() == []


@pytest.mark.parametrize(
    "token",
    ["x", "x" * 3000, f"{'0' * 32}.{'A' * 43}", f"{'0' * 32}.{'A' * 42}!", "a.b.c", "٣" * 76],
)
def test_what_is_no_refresh_token_is_refused_alike(
    client: TestClient, service: Service, token: str
) -> None:
    answer = renew(client, token)
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.json()["detail"] == "the bearer token is not valid"


def test_an_access_token_does_not_renew_and_a_refresh_token_does_not_open(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    tokens = signed_in(client)
    assert renew(client, tokens["access_token"]).status_code == 401
    assert who(client, {"access_token": tokens["refresh_token"]}) == 401
    assert who(client, tokens) == 200


def test_a_sign_in_ends_after_its_days_however_often_it_is_renewed(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    tokens = signed_in(client)
    with session_scope() as session:
        begun = session.scalars(select(SignIn)).one()
        assert begun.expires_at - begun.signed_in_at == timedelta(days=14)
        begun.expires_at = datetime.now(UTC) - timedelta(seconds=1)
    assert renew(client, tokens["refresh_token"]).status_code == 401
    # That is no theft.
    assert outcomes("sign_in_renewed") == []


def test_renewing_does_not_make_a_sign_in_fresh(client: TestClient, service: Service) -> None:
    service.user(JANE)
    tokens = signed_in(client)
    long_ago = datetime.now(UTC) - timedelta(hours=3)
    with session_scope() as session:
        session.execute(update(SignIn).values(signed_in_at=long_ago))
    renewed = renew(client, tokens["refresh_token"]).json()
    claims = jwt.get_unverified_claims(renewed["access_token"])
    assert claims["auth_time"] == int(long_ago.timestamp())


def test_the_database_holds_no_token_that_could_be_used(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    tokens = signed_in(client)
    with session_scope(read_only=True) as session:
        row = session.scalars(select(SignIn)).one()
    assert row.token_digest not in tokens["refresh_token"]
    assert renew(client, f"{row.id.hex}.{row.token_digest[:43]}").status_code == 401


def test_signing_out_ends_the_whole_sign_in_and_no_other(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    first, second = signed_in(client), signed_in(client)
    renewed = renew(client, first["refresh_token"]).json()
    assert client.post("/auth/logout", headers=bearer(renewed)).status_code == 204
    assert who(client, first) == who(client, renewed) == 401
    assert renew(client, renewed["refresh_token"]).status_code == 401
    assert who(client, second) == 200


def test_signing_out_many_times_at_once_is_signing_out(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    tokens = signed_in(client)
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda _: client.post("/auth/logout", headers=bearer(tokens)), range(6))
        )
    assert {answer.status_code for answer in answers} <= {204, 401}
    assert who(client, tokens) == 401


def test_a_revoked_token_stays_so_for_as_long_as_any_token_may_live(
    client: TestClient, service: Service
) -> None:
    """The setting may have been higher when it was issued."""
    service.user(JANE)
    tokens = signed_in(client)
    assert client.post("/auth/logout", headers=bearer(tokens)).status_code == 204
    with session_scope(read_only=True) as session:
        (revoked,) = session.scalars(select(RevokedToken)).all()
    assert revoked.expires_at > datetime.now(UTC) + timedelta(hours=24)


def test_signing_out_everywhere_ends_every_sign_in_of_that_person_at_once(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    service.user("joe@example.com")
    first, second = signed_in(client), signed_in(client)
    joe = client.post(
        "/auth/token", data={"username": "joe@example.com", "password": PASSWORD}
    ).json()
    assert client.post("/auth/logout/everywhere", headers=bearer(first)).status_code == 204
    assert who(client, first) == who(client, second) == 401
    assert renew(client, second["refresh_token"]).status_code == 401
    assert who(client, joe) == 200
    # Also in the same second, one may sign in again.
    assert who(client, signed_in(client)) == 200


def test_a_changed_password_ends_every_sign_in_and_the_old_one_is_wrong(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    first, second = signed_in(client), signed_in(client)
    body = {"present_password": PASSWORD, "new_password": "seven grey herons at noon"}
    wrong = client.post(
        "/auth/password", json=body | {"present_password": "wrong"}, headers=bearer(first)
    )
    assert (wrong.status_code, wrong.json()["code"]) == (422, "wrong_password")
    weak = client.post(
        "/auth/password", json=body | {"new_password": "passwordpassword"}, headers=bearer(first)
    )
    assert (weak.status_code, weak.json()["code"]) == (422, "weak_password")
    assert who(client, second) == 200
    assert client.post("/auth/password", json=body, headers=bearer(first)).status_code == 204
    assert who(client, first) == who(client, second) == 401
    assert renew(client, second["refresh_token"]).status_code == 401
    form = {"username": JANE, "password": PASSWORD}
    assert client.post("/auth/token", data=form).status_code == 401
    form["password"] = body["new_password"]
    assert client.post("/auth/token", data=form).status_code == 200
    assert outcomes("password_changed")[-2:] == ["wrong_password", "done"]


def test_who_loses_a_role_is_signed_out_everywhere(client: TestClient, service: Service) -> None:
    service.user(JANE, Role.AUDITOR)
    tokens = signed_in(client)
    assert client.get("/security/audit", headers=bearer(tokens)).status_code == 200
    with session_scope() as session:
        get_account_service().set_role(session, JANE, Role.USER, COMMAND_LINE)
    assert who(client, tokens) == 401
    assert renew(client, tokens["refresh_token"]).status_code == 401
    again = signed_in(client)
    assert client.get("/security/audit", headers=bearer(again)).status_code == 403


def test_a_person_who_is_deactivated_or_erased_cannot_renew(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    user_id = service.user(JANE)
    tokens = signed_in(client)
    with session_scope() as session:
        session.get_one(User, user_id).is_active = False
    assert renew(client, tokens["refresh_token"]).status_code == 401
    with session_scope() as session:
        session.get_one(User, user_id).is_active = True
    # What was tried meanwhile has used the token up.
    tokens = signed_in(client)
    body = {"user_id": user_id, "mode": "anonymize", "reason": "request under art. 17"}
    assert client.post("/security/data/delete", json=body, headers=admin).status_code == 200
    assert renew(client, tokens["refresh_token"]).status_code == 401
    with session_scope(read_only=True) as session:
        assert session.scalars(select(SignIn)).all() == []


def test_a_form_without_what_its_grant_needs_is_refused(client: TestClient) -> None:
    for form in (
        {},
        {"username": JANE},
        {"grant_type": "refresh_token"},
        {"grant_type": "refresh_token", "username": JANE, "password": PASSWORD},
        {"grant_type": "client_credentials", "username": JANE, "password": PASSWORD},
    ):
        answer = client.post("/auth/token", data=form)
        assert answer.status_code == 422, form
        assert PASSWORD not in answer.text


def test_one_signs_out_also_of_an_account_whose_row_cannot_be_opened(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    first, second = signed_in(client), signed_in(client)
    with session_scope() as session:
        session.execute(text("UPDATE users SET full_name = 'damaged', phone = 'damaged'"))
    assert client.post("/auth/logout", headers=bearer(first)).status_code == 204
    assert who(client, first) == 401
    assert client.post("/auth/logout/everywhere", headers=bearer(second)).status_code == 204
    assert who(client, second) == 401
