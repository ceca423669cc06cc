"""One-time codes: RFC 6238's vectors, and sign-ins that need one."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pyotp
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text

from backend.crypto import one_time_codes
from backend.db_utils import session_scope
from backend.models import AuditEvent, Role, User
from tests.conftest import ADMIN, PASSWORD, Run, Service, SignIn

# RFC 6238, appendix B: the key "12345678901234567890", SHA-1; the last six of eight digits.
RFC_SECRET: Final = "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
RFC_CODES: Final = {
    59: "287082", 1111111109: "081804", 1111111111: "050471", 1234567890: "005924",
    2000000000: "279037", 20000000000: "353130",
}  # fmt: skip


@pytest.mark.parametrize(("second", "code"), RFC_CODES.items())
def test_the_published_codes_are_right_at_their_time_and_one_step_around_it(
    second: int, code: str
) -> None:
    at = datetime.fromtimestamp(second, UTC)
    for offset in (-30, 0, 30):
        found = one_time_codes.step_of(code, RFC_SECRET, at + timedelta(seconds=offset))
        assert found == second // 30
    for offset in (-90, 90):
        assert one_time_codes.step_of(code, RFC_SECRET, at + timedelta(seconds=offset)) is None


@pytest.mark.parametrize("code", ["", "28708", "2870820", "28708a", " 287082", "٢٨٧٠٨٢", "-87082"])
def test_what_is_not_six_digits_is_wrong(code: str) -> None:
    assert one_time_codes.step_of(code, RFC_SECRET, datetime.fromtimestamp(59, UTC)) is None


def enrol(client: TestClient, headers: dict[str, str]) -> str:
    begun = client.post("/auth/codes", headers=headers)
    assert begun.status_code == 201
    secret: str = begun.json()["secret"]
    assert secret in begun.json()["address"]
    # Of the step before, so that the present one is still unused.
    code = pyotp.TOTP(secret).at(datetime.now(UTC) - timedelta(seconds=30))
    body = {"code": code}
    assert client.post("/auth/codes/confirm", json=body, headers=headers).status_code == 204
    return secret


def sign_in(client: TestClient, **form: str) -> Any:
    return client.post("/auth/token", data={"username": ADMIN, "password": PASSWORD} | form)


def test_a_confirmed_account_needs_password_and_code_and_each_code_is_good_once(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    secret = enrol(client, admin)
    code = pyotp.TOTP(secret).now()
    without = sign_in(client)
    wrong = sign_in(client, otp="000000" if code != "000000" else "111111")
    guessed = sign_in(client, password="not the password", otp=code)
    assert {answer.status_code for answer in (without, wrong, guessed)} == {401}
    assert len({answer.json()["detail"] for answer in (without, wrong, guessed)}) == 1
    assert sign_in(client, otp=code).status_code == 200
    assert sign_in(client, otp=code).status_code == 401
    # A page that has no field for it sends it as the client's secret.
    following = pyotp.TOTP(secret).at(datetime.now(UTC) + timedelta(seconds=30))
    assert sign_in(client, client_secret=following).status_code == 200


def test_of_two_who_come_with_one_code_one_is_let_in(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    code = pyotp.TOTP(enrol(client, admin)).now()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: sign_in(client, otp=code).status_code, range(4)))
    assert sorted(answers) == [200, 401, 401, 401]


def test_until_a_code_was_confirmed_none_is_asked_for(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    begun = client.post("/auth/codes", headers=admin).json()
    assert sign_in(client).status_code == 200
    wrong = client.post("/auth/codes/confirm", json={"code": "000000"}, headers=admin)
    assert wrong.status_code == 422
    again = client.post("/auth/codes", headers=admin).json()
    assert again["secret"] != begun["secret"]
    old = {"code": pyotp.TOTP(begun["secret"]).now()}
    assert client.post("/auth/codes/confirm", json=old, headers=admin).status_code == 422


def test_codes_once_confirmed_are_not_replaced_but_removed_by_one_of_them(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    secret = enrol(client, admin)
    assert client.post("/auth/codes", headers=admin).status_code == 409
    confirm = client.post("/auth/codes/confirm", json={"code": "123456"}, headers=admin)
    assert confirm.status_code == 409
    # Whoever has stolen a token has no code.
    used = {"code": pyotp.TOTP(secret).at(datetime.now(UTC) - timedelta(seconds=30))}
    for wrong in ({"code": "000000"}, used):
        answer = client.post("/auth/codes/remove", json=wrong, headers=admin)
        assert answer.status_code == 422
    present = {"code": pyotp.TOTP(secret).now()}
    assert client.post("/auth/codes/remove", json=present, headers=admin).status_code == 204
    assert client.post("/auth/codes/remove", json=present, headers=admin).status_code == 409
    assert sign_in(client).status_code == 200
    with session_scope(read_only=True) as session:
        actions = session.scalars(select(AuditEvent.action).order_by(AuditEvent.id)).all()
    assert [action for action in actions if action.startswith("codes")] == [
        "codes_confirmed", "codes_removed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("role", "status"), [(Role.USER, 403), (Role.AUDITOR, 201), (Role.OPERATOR, 201)]
)
def test_codes_are_for_those_with_more_than_a_users_rights(
    client: TestClient, service: Service, sign_in: SignIn, role: Role, status: int
) -> None:
    service.user("jane@example.com", role)
    headers = sign_in("jane@example.com")
    assert client.post("/auth/codes", headers=headers).status_code == status


def test_the_secret_lies_sealed_and_is_in_no_export(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    secret = enrol(client, admin)
    with session_scope(read_only=True) as session:
        stored = session.scalar(text("SELECT totp_secret FROM users WHERE id = 1"))
        assert session.get_one(User, 1).totp_secret == secret
    assert stored.startswith("enc1.")
    export = client.post(
        "/security/data/export", json={"user_id": 1, "format": "json"}, headers=admin
    )
    assert export.status_code == 200
    assert secret not in export.text
    assert "totp" not in export.text


def test_who_lost_the_device_is_helped_from_the_command_line(
    client: TestClient, service: Service, admin: dict[str, str], run: Run
) -> None:
    enrol(client, admin)
    assert sign_in(client).status_code == 401
    assert run("remove-codes", ADMIN).code == 0
    assert sign_in(client).status_code == 200
    assert run("remove-codes", "nobody@example.com").code == 2
