"""Secrets for tokens: what somebody would guess is refused at the start, what was drawn never."""

import base64
from random import Random
from typing import Final

import pytest

from backend.errors import ConfigurationError
from backend.settings import load_settings
from backend.token_secrets import is_weak
from tests.conftest import JWT_SECRET, KEY, OTHER_KEY

DRAWN: Final = "4f8a1c6b9d2e7f30a5b8c1d4e7f0a3b6"
NAMES: Final = ("JWT_SECRET_KEY", "JWT_SECRET_KEYS_PREVIOUS")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "secret",
    [
        DRAWN[:31],
        # Words that are put where a secret belongs.
        "my-super-secret-jwt-key-123456789",
        "jwt_secret_key_for_development_only",
        "this-is-a-very-long-secret-key-for-jwt",
        "a-string-that-has-at-least-256-bits-in-it",
        "PasswordPasswordForOurHotel!2026",
        "<generate with openssl rand -hex 32>",
        "<put 48 bytes of base64 in between these>",
        "todo-todo-by-the-operator-on-monday",
        "insert-your-jwt-signing-value-here-please",
        "ExampleExampleExampleExample-0001",
        "CHANGE-IT-BEFORE-THE-FIRST-START-PLEASE",
        "your-value-of-thirty-two-characters-or-more",
        f"holdfast-{DRAWN}",
        f"secret-{DRAWN}",
        # One block again and again.
        "holdfast" * 4,
        "abcdefgh" * 4,
        "x7Kq2mZp" * 5,
        # Rows of digits, of the alphabet, of a keyboard.
        "12345678901234567890123456789012",
        "00000000000000000000000001234567",
        "0123456789abcdef0123456789abcdef",
        "zyxwvutsrqponmlkjihgfedcba987654",
        "qwertyuiopasdfghjklzxcvbnm123456",
        "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9",
        # Everybody has read them.
        "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
        "192b9bdd22ab9ed4d12e236c78afcb9a393ec15f71bbf5dc987d54727823bcbf",
        "404E635266556A586E3272357538782F413F4428472B4B6250645367566B5970",
        "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow",
    ],
)
def test_a_guessable_secret_is_refused_by_the_name_of_its_setting_and_not_shown(
    name: str, secret: str
) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(**{name.lower(): secret})
    assert refusal.value.detail.startswith(f"{name}: ")
    assert "\n" not in refusal.value.detail
    assert secret not in refusal.value.detail


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "secret",
    [
        DRAWN,
        JWT_SECRET,
        f"jwt-{DRAWN}",
        "correct horse battery staple grey herons at noon",
    ],
)
def test_a_secret_with_enough_of_its_own_is_taken(name: str, secret: str) -> None:
    assert load_settings(**{name.lower(): secret})


def test_a_random_secret_is_never_refused() -> None:
    draw = Random(7)  # noqa: S311 - the same ones in every run
    for _ in range(1000):
        short, long = draw.randbytes(24), draw.randbytes(48)
        drawn = [short.hex()[:32], long.hex()]
        for raw in (short, long):
            drawn += [base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()]
        assert [secret for secret in drawn if is_weak(secret)] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "keys",
    [
        {"encryption_key": KEY},
        {"encryption_key": OTHER_KEY, "encryption_keys_previous": KEY},
        {"encryption_keys_previous": f"{OTHER_KEY}, {KEY}"},
    ],
)
def test_no_token_is_signed_with_an_encryption_key(name: str, keys: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: ") as refusal:
        load_settings(**{name.lower(): KEY}, **keys)
    assert KEY not in refusal.value.detail
    assert load_settings(**{name.lower(): JWT_SECRET}, **keys)


def test_each_secret_before_the_present_one_is_looked_at() -> None:
    with pytest.raises(ConfigurationError, match=r"^JWT_SECRET_KEYS_PREVIOUS: "):
        load_settings(jwt_secret_keys_previous=f"{DRAWN},{'holdfast' * 4}")
