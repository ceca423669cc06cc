"""Passwords: slow hashes of one strength, few at a time, and no hint who has an account."""

import base64
import os
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from argon2.low_level import Type, hash_secret_raw
from passlib.hash import argon2

from backend.crypto import passwords
from backend.crypto.passwords import (
    WeakPasswordError,
    generate_password,
    hash_password,
    require_strong,
    verify_password,
)
from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import WrongPasswordError, get_auth_service
from tests.conftest import PASSWORD, Service

STORED = hash_password(PASSWORD)


def test_a_hash_is_argon2id_of_19_mib_two_rounds_and_a_salt_of_its_own() -> None:
    """OWASP's parameters, checked by computing the hash from what the text says."""
    _, kind, version, cost, salt, digest = STORED.split("$")
    assert (kind, version) == ("argon2id", "v=19")
    assert dict(part.split("=") for part in cost.split(",")) == {"m": "19456", "t": "2", "p": "1"}
    raw_salt, raw = (base64.b64decode(part + "=" * (-len(part) % 4)) for part in (salt, digest))
    assert len(raw_salt) >= 16
    again = hash_secret_raw(
        PASSWORD.encode(), raw_salt,
        time_cost=2, memory_cost=19_456, parallelism=1, hash_len=len(raw), type=Type.ID,
    )  # fmt: skip
    assert again == raw
    assert len(raw) >= 32
    assert hash_password(PASSWORD).split("$")[4] != salt


def test_the_right_password_verifies_and_no_other() -> None:
    assert verify_password(PASSWORD, STORED)
    for wrong in ("", PASSWORD[:-1], PASSWORD + " ", PASSWORD.title(), PASSWORD + "\x00", STORED):
        assert not verify_password(wrong, STORED)


@pytest.mark.parametrize(
    "password", ["ünïcode passwörd", "\U0001f512" * 12, "nul\x00in the middle"]
)
def test_a_password_of_any_letters_verifies_to_its_last(password: str) -> None:
    stored = hash_password(password)
    assert verify_password(password, stored)
    assert not verify_password(password[:-1], stored)


def test_two_long_passwords_that_differ_at_the_end_are_two() -> None:
    # bcrypt would cut both to 72 bytes.
    stored = hash_password("x" * 1023 + "a")
    assert verify_password("x" * 1023 + "a", stored)
    assert not verify_password("x" * 1023 + "b", stored)


def test_a_password_beyond_the_limit_costs_no_hashing() -> None:
    longer = "x" * (passwords.MAX_CHARS + 1)
    stored = hash_password(longer)
    with ThreadPoolExecutor(1) as pool, ExitStack() as taken:
        # Whoever hashes waits for one of these.
        for _ in range(passwords.AT_ONCE):
            taken.enter_context(passwords._SLOTS)
        for password in (longer, "x" * 1_000_000):
            assert not pool.submit(verify_password, password, stored).result(timeout=60)


def test_without_an_account_the_answer_is_no_and_takes_as_long() -> None:
    verify_password(PASSWORD, None)
    assert passwords._dummy().split("$")[:4] == STORED.split("$")[:4]

    def seconds(stored: str | None) -> float:
        started = time.thread_time()
        assert not verify_password("a wrong password", stored)
        return time.thread_time() - started

    # In turn, and more than once: what else runs on the core makes a hash slower, not faster.
    known = unknown = float("inf")
    for _ in range(50):
        known, unknown = min(known, seconds(STORED)), min(unknown, seconds(None))
        if 0.5 < unknown / known < 2:
            return
    pytest.fail(f"{unknown} s without an account, {known} s with one")


def test_an_account_of_no_hash_opens_with_no_password_not_even_the_dummys() -> None:
    for password in ("", PASSWORD, passwords._dummy()):
        assert not verify_password(password, None)


def test_half_of_the_cores_hash_at_once_and_the_next_one_waits() -> None:
    assert max(1, (os.cpu_count() or 2) // 2) == passwords.AT_ONCE
    with ThreadPoolExecutor(1) as pool:
        with ExitStack() as taken:
            for _ in range(passwords.AT_ONCE):
                taken.enter_context(passwords._SLOTS)
            waiting = pool.submit(verify_password, PASSWORD, STORED)
            time.sleep(0.3)
            assert not waiting.done()
        assert waiting.result(timeout=60)


def test_a_hash_of_less_cost_is_outdated_and_one_of_todays_is_not() -> None:
    assert not passwords.is_outdated(STORED)
    assert passwords.is_outdated(argon2.using(type="ID", memory_cost=8192).hash(PASSWORD))


@pytest.mark.parametrize(
    "weak",
    [
        "passwordpassword", "Password1234!", "123456789012", "qwertyuiopasdf", "aaaaaaaaaaaaaaaa",
        "iloveyou12345", "x" * 64, "letmein" * 100, "holdfast-2026!", "Ursula2026!!",
        "ursula.example.com", "EXAMPLE-Ursula-99", "x" * 11, "",
    ],
)  # fmt: skip
def test_a_password_that_many_use_or_that_says_whose_it_is_is_refused(weak: str) -> None:
    with pytest.raises(WeakPasswordError) as refusal:
        require_strong(weak, ("ursula@example.com", "holdfast"))
    assert weak == "" or weak not in refusal.value.detail


@pytest.mark.parametrize(
    "strong",
    [
        PASSWORD,
        "four unrelated grey herons",
        "Ursula eats seven herons",
        "k7#Qz!m2Vx@9",
        "zwölf grüne Reiher 🔒 im Nebel",
    ],
)
def test_a_password_of_unrelated_words_or_letters_is_taken(strong: str) -> None:
    require_strong(strong, ("ursula@example.com", "holdfast"))


def test_many_at_once_are_all_answered() -> None:
    start = threading.Barrier(8)

    def verify(number: int) -> bool:
        start.wait()
        return verify_password(PASSWORD if number % 2 else "a wrong password", STORED)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(verify, range(8))) == [False, True] * 4


def test_a_failure_while_hashing_gives_its_place_back() -> None:
    for _ in range(4):
        with pytest.raises(ValueError, match="hash"):
            verify_password(PASSWORD, "no hash of ours")
    assert verify_password(PASSWORD, STORED)


def test_generated_passwords_are_long_enough_random_and_different() -> None:
    made = {generate_password() for _ in range(200)}
    assert len(made) == 200
    # 120 bits in base64url.
    assert {len(password) for password in made} == {20}


@pytest.mark.parametrize("characters", [0, passwords.MIN_CHARS - 1, passwords.MAX_CHARS + 1])
def test_an_account_is_not_made_with_a_password_too_short_or_too_long(
    sqlite_service: Service, characters: int
) -> None:
    words = "a password has 12 to 1024 characters"
    with pytest.raises(RefusedError, match=words), session_scope() as session:
        get_account_service().create(session, "eve@example.com", "x" * characters, COMMAND_LINE)
    with pytest.raises(WrongPasswordError):
        get_auth_service().sign_in("eve@example.com", "x" * characters)


@pytest.mark.parametrize("characters", [passwords.MIN_CHARS, passwords.MAX_CHARS])
def test_an_account_signs_in_with_a_password_at_the_edge(
    sqlite_service: Service, characters: int
) -> None:
    password = secrets.token_hex(characters // 2)
    with session_scope() as session:
        get_account_service().create(session, "eve@example.com", password, COMMAND_LINE)
    assert get_auth_service().sign_in("eve@example.com", password)
