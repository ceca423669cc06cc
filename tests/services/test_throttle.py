"""Guessing is slowed down, and nobody is locked out by somebody else who guesses."""

import time
from collections.abc import Callable
from typing import Final

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

import main
from backend.db_utils import session_scope
from backend.errors import TooManyAttemptsError
from backend.models import AuditEvent
from backend.services.auth_service import WrongPasswordError, get_auth_service
from backend.services.throttle_service import get_throttle_service
from backend.settings import load_settings
from tests.conftest import PASSWORD, Service

JANE: Final = "jane@example.com"
HOME, AWAY = "198.51.100.7", "203.0.113.9"


@pytest.fixture
def service(sqlite_service: Service) -> Service:
    """Failures are not counted in the database."""
    return sqlite_service


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock, and set it so many minutes after that."""
    now = time.time()

    def ahead(minutes: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now + minutes * 60)

    ahead(0)
    return ahead


def guess(times: int, address: str | None, account: str = JANE) -> None:
    for _ in range(times):
        get_throttle_service().failed(account, address)


def is_allowed(address: str | None, account: str = JANE) -> bool:
    try:
        get_throttle_service().require_allowed(account, address)
    except TooManyAttemptsError:
        return False
    return True


def test_ten_wrong_passwords_from_one_address_are_enough_for_a_quarter_of_an_hour(
    service: Service, later: Callable[[float], None]
) -> None:
    guess(9, HOME)
    assert is_allowed(HOME)
    guess(1, HOME)
    assert not is_allowed(HOME)
    with pytest.raises(TooManyAttemptsError) as refusal:
        get_throttle_service().require_allowed(JANE, HOME)
    assert refusal.value.retry_after_seconds == 15 * 60
    later(14)
    assert not is_allowed(HOME)
    later(15.1)
    assert is_allowed(HOME)


def test_the_person_comes_in_from_elsewhere_while_somebody_guesses(service: Service) -> None:
    guess(10, AWAY)
    assert not is_allowed(AWAY)
    assert is_allowed(HOME)
    assert is_allowed(AWAY, "joe@example.com")


def test_an_account_that_is_attacked_from_everywhere_is_closed_to_nobody(service: Service) -> None:
    get_throttle_service().succeeded(JANE, HOME)
    for number in range(100):
        guess(1, f"203.0.113.{number}")
    # Whoever signed in from here before has as many tries as always.
    guess(9, HOME)
    assert is_allowed(HOME)
    # Others have three.
    new = "192.0.2.1"
    guess(2, new)
    assert is_allowed(new)
    guess(1, new)
    assert not is_allowed(new)
    # Other accounts are not attacked.
    guess(3, new, "joe@example.com")
    assert is_allowed(new, "joe@example.com")


def test_one_address_that_tries_one_password_at_many_accounts_is_stopped(service: Service) -> None:
    for number in range(50):
        guess(1, AWAY, f"guest{number}@example.com")
    assert not is_allowed(AWAY, "another@example.com")
    assert is_allowed(HOME, "another@example.com")


def test_who_signed_in_before_is_let_in_beside_somebody_who_guesses_at_the_same_address(
    service: Service,
) -> None:
    get_throttle_service().succeeded(JANE, HOME)
    for number in range(60):
        guess(1, HOME, f"guest{number}@example.com")
    assert is_allowed(HOME)
    assert not is_allowed(HOME, "joe@example.com")


def test_a_success_forgets_the_failures_of_that_account_there_and_not_those_of_the_address(
    service: Service,
) -> None:
    guess(9, HOME)
    get_throttle_service().succeeded(JANE, HOME)
    guess(9, HOME)
    assert is_allowed(HOME)
    for number in range(32):
        guess(1, HOME, f"guest{number}@example.com")
    assert not is_allowed(HOME, "joe@example.com")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2001:db8::1", "2001:db8::ffff:2"),
        (HOME, f"::ffff:{HOME}"),
        # As a translator of the provider carries it (RFC 6052), and a tunnel (RFC 3056).
        (HOME, "64:ff9b::c633:6407"),
        (HOME, "2002:c633:6407::1"),
        ("a-socket", "a-socket"),
        (None, None),
    ],
)
def test_two_spellings_of_one_network_are_one(
    service: Service, first: str | None, second: str | None
) -> None:
    guess(10, first)
    assert not is_allowed(second)


def test_two_spellings_of_one_account_are_one_and_two_networks_are_two(service: Service) -> None:
    guess(10, HOME, " Jane@EXAMPLE.com ")
    assert not is_allowed(HOME)
    guess(10, "2001:db8:0:1::1")
    assert not is_allowed("2001:db8:0:1::2")
    assert is_allowed("2001:db8:0:2::1")
    # What comes through one translator comes from many.
    guess(10, "64:ff9b::c633:6408")
    assert is_allowed("64:ff9b::808:808")


def test_the_networks_of_one_site_have_together_the_tries_of_two(
    service: Service, later: Callable[[float], None]
) -> None:
    for number in range(30):
        network = f"2001:db8:7:{number:x}::1"
        if is_allowed(network):
            guess(3, network)
    # 20, and what was left of the last three.
    assert not is_allowed("2001:db8:7:ffff::1")
    for number in range(7):
        assert not is_allowed(f"2001:db8:7:{number:x}::1")
    # Not for other accounts, nor from other sites.
    assert is_allowed("2001:db8:7:ffff::1", "joe@example.com")
    assert is_allowed("2001:db8:8::1")
    later(15.1)
    assert is_allowed("2001:db8:7:ffff::1")


def test_a_person_comes_in_from_their_network_while_others_of_their_site_guess(
    service: Service,
) -> None:
    home = "2001:db8:7:1::1"
    get_throttle_service().succeeded(JANE, home)
    for number in range(100, 150):
        guess(3, f"2001:db8:7:{number:x}::1")
    assert not is_allowed("2001:db8:7:2::1")
    assert is_allowed(home)
    guess(10, home)
    assert not is_allowed(home)


def test_one_site_that_tries_one_password_at_many_accounts_is_stopped(service: Service) -> None:
    for number in range(199):
        guess(1, f"2001:db8:7:{number:x}::1", f"guest{number}@example.com")
    assert is_allowed("2001:db8:7:ffff::1")
    guess(1, "2001:db8:7:fff0::1", "one-more@example.com")
    assert not is_allowed("2001:db8:7:ffff::1")
    assert is_allowed("2001:db8:8::1")


@pytest.mark.parametrize(
    "account", ["", "x" * 100_000, "\ud800@example.com", "a\x00@b", "no address"]
)
def test_what_is_no_address_is_counted_too(service: Service, account: str) -> None:
    guess(10, HOME, account)
    assert not is_allowed(HOME, account)


def test_over_http_the_answer_is_429_with_the_time_and_the_same_for_an_unknown_account(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    for account in (JANE, "nobody@example.com"):
        form = {"username": account, "password": "not the password"}
        answers = [client.post("/auth/token", data=form) for _ in range(11)]
        assert [answer.status_code for answer in answers] == [401] * 10 + [429]
        assert answers[-1].json()["code"] == "too_many_attempts"
        assert 0 < int(answers[-1].headers["retry-after"]) <= 900
        # The right password does not help whoever guesses.
        form["password"] = PASSWORD
        assert client.post("/auth/token", data=form).status_code == 429
    with session_scope(read_only=True) as session:
        found = select(func.count()).where(AuditEvent.action == "sign_in")
        # What is refused unseen fills no table.
        assert session.scalar(found) == 20


def test_who_guesses_at_the_present_password_of_a_signed_in_account_is_throttled(
    client: TestClient, service: Service
) -> None:
    service.user(JANE)
    token = client.post("/auth/token", data={"username": JANE, "password": PASSWORD}).json()
    headers = {"Authorization": f"Bearer {token['access_token']}"}
    body = {"present_password": "guessed", "new_password": "seven grey herons at noon"}
    answers = [client.post("/auth/password", json=body, headers=headers) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [422] * 10 + [429]


@pytest.mark.parametrize(
    ("trusted", "statuses"), [("", [401] * 10 + [429]), ("127.0.0.1", [401] * 11)]
)
def test_a_proxy_that_is_trusted_says_which_address_is_counted_and_no_other_caller_does(
    service: Service, trusted: str, statuses: list[int]
) -> None:
    # Through what stands between the socket and the service.
    config = main._server_config(load_settings(trusted_proxies=trusted))
    config.app = main.create_app
    config.load()
    form = {"username": JANE, "password": "not the password"}
    with TestClient(config.loaded_app, client=("127.0.0.1", 1)) as client:
        answers = [
            client.post("/auth/token", data=form, headers={"X-Forwarded-For": f"192.0.2.{number}"})
            for number in range(11)
        ]
    assert [answer.status_code for answer in answers] == statuses


def test_a_wrong_password_counts_and_a_right_one_forgets(service: Service) -> None:
    service.user(JANE)
    for _ in range(9):
        with pytest.raises(WrongPasswordError):
            get_auth_service().sign_in(JANE, "not the password", address=HOME)
    assert get_auth_service().sign_in(JANE, PASSWORD, address=HOME)
    for _ in range(9):
        with pytest.raises(WrongPasswordError):
            get_auth_service().sign_in(JANE, "not the password", address=HOME)
    assert get_auth_service().sign_in(JANE, PASSWORD, address=HOME)


def test_a_spelling_that_finds_an_account_is_counted_as_that_account(
    client: TestClient, service: Service
) -> None:
    """The fullwidth sign is the same to whoever looks the account up (Unicode NFKC)."""
    service.user(JANE)
    service.user("mallory@example.com")
    guessed = {"username": JANE.replace("@", "\uff20"), "password": "not the password"}
    own = {"username": "mallory\uff20example.com", "password": PASSWORD}
    statuses = [client.post("/auth/token", data=guessed).status_code for _ in range(9)]
    # An own success does not clear what was counted for somebody else.
    assert client.post("/auth/token", data=own).status_code == 200
    statuses += [client.post("/auth/token", data=guessed).status_code for _ in range(2)]
    assert statuses == [401] * 10 + [429]
    assert client.post("/auth/token", data=guessed | {"username": JANE}).status_code == 429
