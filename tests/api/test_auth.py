"""Sign in, who am I, sign out, over HTTP."""

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from fastapi.testclient import TestClient
from jose import jwt
from sqlalchemy import select

from backend.crypto.bearer import AUDIENCE, ISSUER, TOKEN_TYPE, TokenKeys
from backend.db_utils import session_scope
from backend.models import AuditEvent, RevokedToken, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from tests.conftest import JWT_SECRET, PASSWORD, Service, SignIn

JANE: Final = "jane@example.com"


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Tokens do not depend on the engine."""
    return sqlite_service


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


HEADER: Final = {"alg": "HS256", "typ": TOKEN_TYPE, "kid": TokenKeys(JWT_SECRET).key_id}


@pytest.fixture
def sign_in(client: TestClient) -> SignIn:
    """Sign in as people do."""

    def header(email: str) -> dict[str, str]:
        answer = client.post("/auth/token", data={"username": email, "password": PASSWORD})
        return bearer(answer.json()["access_token"])

    return header


def forged(
    *,
    secret: str = JWT_SECRET,
    header: dict[str, str] | None = None,
    without: str | None = None,
    **claims: object,
) -> str:
    """A token as we issue it for the admin, but for *claims*."""
    now = int(datetime.now(UTC).timestamp())
    ours: dict[str, object] = {
        "sub": "1", "iss": ISSUER, "aud": AUDIENCE, "jti": "x" * 22, "sid": "y" * 22,
        "auth_time": now,
        "iat": now, "nbf": now, "exp": now + 600,
    }  # fmt: skip
    kept = {name: value for name, value in (ours | claims).items() if name != without}
    headers = HEADER if header is None else header
    return jwt.encode(kept, secret, algorithm="HS256", headers=headers)


def unsigned() -> str:
    """A token of the algorithm `none`."""
    _, claims, _ = forged().split(".")
    head = json.dumps(HEADER | {"alg": "none"}).encode()
    return f"{base64.urlsafe_b64encode(head).decode().rstrip('=')}.{claims}."


def test_the_right_password_gives_a_token_that_says_who_one_is(
    client: TestClient, service: Service
) -> None:
    user_id = service.user(JANE)
    form = {"username": JANE, "password": PASSWORD, "grant_type": "password"}
    answer = client.post("/auth/token", data=form)
    assert answer.status_code == 200
    token = answer.json()
    assert (token["token_type"], token["expires_in"]) == ("bearer", 1800)
    me = client.get("/auth/me", headers=bearer(token["access_token"]))
    assert me.json() == {"user_id": user_id, "role": "user"}


def test_the_address_counts_in_any_case_and_the_password_in_its_own(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    for email, password, status in (
        ("Jane@Example.COM", PASSWORD, 200),
        (f" {JANE} ", PASSWORD, 200),
        (JANE, PASSWORD.upper(), 401),
        (JANE, f"{PASSWORD} ", 401),
        (JANE, "", 401),
    ):
        form = {"username": email, "password": password}
        answer = client.post("/auth/token", data=form)
        # An empty field is refused as a form, before it is a wrong password.
        assert answer.status_code == (422 if not password else status), (email, password)


def test_unknown_deactivated_and_wrong_are_answered_alike(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    service.user("joe@example.com", is_active=False)
    answers = [
        client.post("/auth/token", data={"username": email, "password": password})
        for email, password in (
            (JANE, "not her password"),
            ("nobody@example.com", PASSWORD),
            ("joe@example.com", PASSWORD),
            ("x" * 5000 + "@example.com", PASSWORD),
            (JANE, "x" * 5000),
            ("\x00@example.com", PASSWORD),
        )
    ]
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.json()["code"] for answer in answers} == {"wrong_credentials"}
    assert len({answer.json()["detail"] for answer in answers}) == 1
    with session_scope(read_only=True) as session:
        events = session.scalars(select(AuditEvent).where(AuditEvent.action == "sign_in")).all()
    # A failure says neither who was tried nor who tried.
    assert [(e.outcome, e.subject_ref) for e in events] == [("wrong_credentials", None)] * 6


def test_a_token_that_was_signed_out_is_refused_and_others_go_on(
    client: TestClient, service: Service, sign_in: SignIn
) -> None:
    service.user(JANE)
    first, second = sign_in(JANE), sign_in(JANE)
    answer = client.post("/auth/logout", headers=first)
    assert (answer.status_code, answer.content) == (204, b"")
    assert client.get("/auth/me", headers=first).status_code == 401
    assert client.post("/auth/logout", headers=first).status_code == 401
    assert client.get("/auth/me", headers=second).status_code == 200
    with session_scope(read_only=True) as session:
        (revoked,) = session.scalars(select(RevokedToken)).all()
    # Never the token itself: whoever reads the table could use it until it is revoked.
    assert revoked.token_id not in first["Authorization"]
    assert answer.headers["cache-control"] == "no-store"


def test_a_deactivated_account_is_signed_out_at_once(
    client: TestClient, service: Service, sign_in: SignIn
) -> None:
    user_id = service.user(JANE)
    headers = sign_in(JANE)
    assert client.get("/auth/me", headers=headers).status_code == 200
    with session_scope() as session:
        session.get_one(User, user_id).is_active = False
    assert client.get("/auth/me", headers=headers).status_code == 401


def test_a_new_password_ends_every_token(
    client: TestClient, service: Service, sign_in: SignIn
) -> None:
    service.user(JANE)
    headers = sign_in(JANE)
    with session_scope() as session:
        get_account_service().set_password(session, JANE, "another good password", COMMAND_LINE)
    assert client.get("/auth/me", headers=headers).status_code == 401
    form = {"username": JANE, "password": PASSWORD}
    assert client.post("/auth/token", data=form).status_code == 401


def test_an_erased_persons_token_is_refused(
    client: TestClient, service: Service, sign_in: SignIn, admin: dict[str, str]
) -> None:
    user_id = service.user(JANE)
    headers = sign_in(JANE)
    body = {"user_id": user_id, "mode": "delete", "reason": "request under art. 17"}
    assert client.post("/security/data/delete", json=body, headers=admin).status_code == 200
    assert client.get("/auth/me", headers=headers).status_code == 401


def test_our_own_token_is_accepted_and_each_altered_one_refused_alike(client: TestClient) -> None:
    assert client.get("/auth/me", headers=bearer(forged())).json()["role"] == "admin"
    now = datetime.now(UTC)
    first, second, third = forged().split(".")
    tokens = [
        "",
        "garbage",
        "a.b.c",
        unsigned(),
        forged(secret="another secret of sufficient length"),
        forged(exp=int((now - timedelta(minutes=1)).timestamp())),
        forged(iat=int((now + timedelta(hours=1)).timestamp())),
        forged(nbf=int((now + timedelta(hours=1)).timestamp())),
        *(forged(without=claim) for claim in ("exp", "iat", "nbf", "sub", "aud", "iss")),
        *(forged(without=claim) for claim in ("jti", "sid", "auth_time")),
        forged(aud="another-api"),
        forged(aud=[AUDIENCE, "another-api"]),
        forged(iss="somebody"),
        forged(sub="999999"),
        forged(sub="1; DROP TABLE users"),
        forged(sub="٣"),
        forged(sub="9" * 30),
        forged(sub=1),
        forged(header=HEADER | {"typ": "JWT"}),
        forged(header=HEADER | {"crit": "exp"}),
        forged(header=HEADER | {"kid": "0" * 16}),
        f"{first}.{second}.{third}=",
        f"{first}.{second}.{third[:-1]}",
        f"{first}.{second}.",
        base64.urlsafe_b64encode(b'{"a":' * 1500).decode().rstrip("=") + f".{second}.{third}",
        forged() + "x" * 10_000,
    ]
    answers = [client.get("/auth/me", headers=bearer(token)) for token in tokens]
    assert {t: a.status_code for t, a in zip(tokens, answers, strict=True)} == dict.fromkeys(
        tokens, 401
    )
    assert {answer.json()["code"] for answer in answers} == {"unauthenticated"}
    assert {answer.headers["www-authenticate"] for answer in answers} == {"Bearer"}
    # The empty one is none at all; the rest must not tell which check they failed.
    assert len({answer.json()["detail"] for answer in answers[1:]}) == 1


@pytest.mark.parametrize("scheme", ["Basic", "Token", ""])
def test_a_token_under_another_scheme_is_none(
    client: TestClient, admin: dict[str, str], scheme: str
) -> None:
    token = admin["Authorization"].removeprefix("Bearer ")
    headers = {"Authorization": f"{scheme} {token}".strip()}
    assert client.get("/auth/me", headers=headers).status_code == 401


def test_a_token_in_the_address_does_not_count(client: TestClient, admin: dict[str, str]) -> None:
    token = admin["Authorization"].removeprefix("Bearer ")
    assert client.get(f"/auth/me?access_token={token}").status_code in {401, 422}
