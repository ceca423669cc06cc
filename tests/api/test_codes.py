"""One-time codes: RFC 6238's vectors, and sign-ins that need one."""

import time
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


def test_of_no_secret_every_code_is_wrong() -> None:
    assert one_time_codes.step_of("287082", "", datetime.fromtimestamp(59, UTC)) is None


@pytest.mark.parametrize("code", ["", "28708", "2870820", "28708a", " 287082", "٢٨٧٠٨٢", "-87082"])
def test_what_is_not_six_digits_is_wrong(code: str) -> None:
    assert one_time_codes.step_of(code, RFC_SECRET, datetime.fromtimestamp(59, UTC)) is None


BODY: Final = {"present_password": PASSWORD}


class Device:
    """
    An authenticator app, which knows the half minute in which it was set up.

    That one's code and the next one's are good for half a minute at least: a code may be late or
    early by one step.
    """

    def __init__(self, secret: str) -> None:
        self.secret, self._otp, self._step = secret, pyotp.TOTP(secret), int(time.time()) // 30
        self.first, self.second = (self._otp.generate_otp(self._step + n) for n in (0, 1))

    def wrong(self) -> list[str]:
        """Twenty codes that are of no half minute near this one."""
        near = {self._otp.generate_otp(self._step + n) for n in range(-2, 20)}
        return [code for code in (f"{n:06d}" for n in range(50)) if code not in near][:20]


def enrol(client: TestClient, headers: dict[str, str], body: dict[str, str] = BODY) -> Device:
    begun = client.post("/auth/codes", json=body, headers=headers)
    assert begun.status_code == 201
    device = Device(begun.json()["secret"])
    assert device.secret in begun.json()["address"]
    first = {"code": device.first}
    assert client.post("/auth/codes/confirm", json=first, headers=headers).status_code == 204
    return device


def codes_events() -> list[tuple[str, str]]:
    with session_scope(read_only=True) as session:
        found = select(AuditEvent).where(AuditEvent.action.startswith("codes"))
        events = session.scalars(found.order_by(AuditEvent.id)).all()
    assert len({event.subject_ref for event in events}) == 1
    return [(event.action, event.outcome) for event in events]


def sign_in(client: TestClient, **form: str) -> Any:
    return client.post("/auth/token", data={"username": ADMIN, "password": PASSWORD} | form)


def test_a_confirmed_account_needs_password_and_code_and_each_code_is_good_once(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    device = enrol(client, admin)
    code = device.second
    without = sign_in(client)
    wrong = sign_in(client, otp=device.wrong()[0])
    used = sign_in(client, otp=device.first)
    guessed = sign_in(client, password="not the password", otp=code)
    refused = (without, wrong, used, guessed)
    assert {answer.status_code for answer in refused} == {401}
    assert len({answer.json()["detail"] for answer in refused}) == 1
    assert sign_in(client, otp=code).status_code == 200
    assert sign_in(client, otp=code).status_code == 401


def test_a_page_that_has_no_field_for_the_code_sends_it_as_the_clients_secret(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    device = enrol(client, admin)
    assert sign_in(client, client_secret=device.wrong()[0]).status_code == 401
    assert sign_in(client, client_secret=device.second).status_code == 200


def test_of_two_who_come_with_one_code_one_is_let_in(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    code = enrol(client, admin).second
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: sign_in(client, otp=code).status_code, range(4)))
    assert sorted(answers) == [200, 401, 401, 401]


def test_until_a_code_was_confirmed_none_is_asked_for(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    begun = client.post("/auth/codes", json=BODY, headers=admin).json()
    assert sign_in(client).status_code == 200
    again = client.post("/auth/codes", json=BODY, headers=admin).json()
    assert again["secret"] != begun["secret"]
    old, device = Device(begun["secret"]), Device(again["secret"])
    for wrong in (old.first, device.wrong()[0]):
        answer = client.post("/auth/codes/confirm", json={"code": wrong}, headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (422, "wrong_code")
    assert sign_in(client).status_code == 200
    right = {"code": device.first}
    assert client.post("/auth/codes/confirm", json=right, headers=admin).status_code == 204
    assert sign_in(client).status_code == 401


def test_codes_once_confirmed_are_not_replaced_but_removed_by_one_of_them(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    device = enrol(client, admin)
    assert client.post("/auth/codes", json=BODY, headers=admin).status_code == 409
    present = {"code": device.second}
    assert client.post("/auth/codes/confirm", json=present, headers=admin).status_code == 409
    # Whoever has stolen a token has no code.
    for wrong in (device.wrong()[0], device.first):
        answer = client.post("/auth/codes/remove", json={"code": wrong}, headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (422, "wrong_code")
    assert client.post("/auth/codes/remove", json=present, headers=admin).status_code == 204
    assert client.post("/auth/codes/remove", json=present, headers=admin).status_code == 409
    assert sign_in(client).status_code == 200
    assert codes_events() == [
        ("codes_begun", "done"), ("codes_confirmed", "done"),
        ("codes_removed", "wrong_code"), ("codes_removed", "wrong_code"), ("codes_removed", "done"),
    ]  # fmt: skip


def test_a_stolen_token_is_not_enough_to_set_up_codes(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    """Its holder would lock the owner out by a device of their own."""
    assert client.post("/auth/codes", headers=admin).status_code == 422
    guesses = [{"present_password": f"guess number {n}"} for n in range(11)]
    answers = [client.post("/auth/codes", json=guess, headers=admin) for guess in guesses]
    assert [answer.status_code for answer in answers] == [422] * 10 + [429]
    assert {answer.json()["code"] for answer in answers[:10]} == {"wrong_password"}
    assert client.post("/auth/codes", json=BODY, headers=admin).status_code == 429
    assert codes_events() == [("codes_begun", "wrong_password")] * 10
    with session_scope(read_only=True) as session:
        assert session.get_one(User, 1).totp_secret is None


@pytest.mark.parametrize("act", ["confirm", "remove"])
def test_guessed_codes_are_recorded_and_after_ten_of_them_no_other_is_looked_at(
    client: TestClient, service: Service, admin: dict[str, str], act: str
) -> None:
    if act == "confirm":
        begun = client.post("/auth/codes", json=BODY, headers=admin).json()
        device = Device(begun["secret"])
        right = device.first
    else:
        device = enrol(client, admin)
        right = device.second
    before = len(codes_events())
    statuses = [
        client.post(f"/auth/codes/{act}", json={"code": code}, headers=admin).status_code
        for code in [*device.wrong()[:10], right]
    ]
    assert statuses == [422] * 10 + [429]
    assert (
        codes_events()[before:]
        == [("codes_confirmed" if act == "confirm" else "codes_removed", "wrong_code")] * 10
    )


@pytest.mark.parametrize(
    ("role", "status"), [(Role.USER, 403), (Role.AUDITOR, 201), (Role.OPERATOR, 201)]
)
def test_codes_are_for_those_with_more_than_a_users_rights(
    client: TestClient, service: Service, sign_in: SignIn, role: Role, status: int
) -> None:
    service.user("jane@example.com", role)
    headers = sign_in("jane@example.com")
    assert client.post("/auth/codes", json=BODY, headers=headers).status_code == status


def test_the_secret_lies_sealed_and_is_in_no_export(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    secret = enrol(client, admin).secret
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
