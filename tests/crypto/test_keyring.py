"""Keys: every accepted spelling gives the same key, every refusal keeps the value to itself."""

import base64
import gc
import hashlib
import hmac
import re
from collections.abc import Callable
from typing import Final

import pytest
from cryptography.fernet import Fernet
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from backend.crypto import keyring
from backend.crypto.keyring import Keyring, RootKey, parse_key
from backend.crypto.values import Cipher, column_scope, value_scope
from backend.db_utils import session_scope
from backend.errors import ConfigurationError, KeyFormatError, UnknownKeyError
from backend.models import EncryptionKey, User
from backend.services.setup_service import get_setup_service
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches

RAW: Final = base64.b64decode(KEY)
ONE, TWO = RootKey(RAW), RootKey(base64.b64decode(OTHER_KEY))

SPELLINGS: Final[dict[str, Callable[[bytes], str]]] = {
    "base64": lambda raw: base64.b64encode(raw).decode(),
    "base64 without padding": lambda raw: base64.b64encode(raw).decode().rstrip("="),
    "base64url, as a Fernet key": lambda raw: base64.urlsafe_b64encode(raw).decode(),
    "base64url without padding": lambda raw: base64.urlsafe_b64encode(raw).decode().rstrip("="),
    "base64 of a Fernet key": lambda raw: base64.b64encode(base64.urlsafe_b64encode(raw)).decode(),
    "base64 of a Fernet key without padding": lambda raw: (
        base64.b64encode(base64.urlsafe_b64encode(raw).rstrip(b"=")).decode().rstrip("=")
    ),
    "in quotes and blanks, as an env file has it": lambda raw: (
        f' "{base64.b64encode(raw).decode()}"\n'
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@settings(max_examples=30)
@given(raw=st.binary(min_size=32, max_size=32))
def test_a_key_is_read_from_each_of_its_spellings(spelling: str, raw: bytes) -> None:
    assume(len(set(raw)) >= 8)
    assert parse_key(SPELLINGS[spelling](raw)) == raw


def test_what_fernet_generates_is_read_bare_and_encoded_once_more() -> None:
    generated = Fernet.generate_key()
    twice = base64.b64encode(generated).decode()
    assert len(twice) == 60
    assert parse_key(generated.decode()) == parse_key(twice) == base64.urlsafe_b64decode(generated)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "correct horse battery staple",
        RAW.hex(),
        base64.b64encode(RAW[:16]).decode(),
        base64.b64encode(RAW[:31]).decode(),
        base64.b64encode(RAW + b"\x01").decode(),
        base64.b64encode(RAW * 2).decode(),
        # Three times encoded, and encoded twice around the wrong size.
        base64.b64encode(base64.b64encode(base64.b64encode(RAW))).decode(),
        base64.b64encode(base64.b64encode(RAW[:31])).decode(),
        # 44 bytes that are no text.
        base64.b64encode(bytes(range(200, 244))).decode(),
        KEY[:-2],
        f"={KEY[:-1]}",
        KEY.replace("Y", " ", 1),
        KEY.replace("Y", "\n", 1),
        KEY.replace("Y", "Ý", 1),
        # The same 32 bytes with other unused bits: a second spelling of one secret.
        KEY.replace("jg=", "jh="),
    ],
)
def test_anything_else_is_refused_with_its_length_and_nothing_of_its_value(text: str) -> None:
    with pytest.raises(KeyFormatError) as refusal:
        parse_key(text)
    words = (
        r"an encryption key is the base64 of 32 bytes; "
        r"this one has (\d+) characters and is (?:not base64|\d+ bytes)"
    )
    said = re.fullmatch(words, refusal.value.detail)
    assert said is not None
    assert int(said[1]) == len(text.strip())
    assert refusal.value.extra == {}


@pytest.mark.parametrize("raw", [bytes(32), b"A" * 32, b"abcdefg" * 4 + b"abcd"])
def test_a_key_that_repeats_a_few_bytes_is_no_random_key(raw: bytes) -> None:
    text = base64.b64encode(raw).decode()
    with pytest.raises(KeyFormatError) as refusal:
        parse_key(text)
    assert text not in refusal.value.detail
    parse_key(base64.b64encode(b"abcdefgh" * 4).decode())


def _hkdf(key: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869, written out: one block is enough for at most 32 bytes."""
    extracted = hmac.digest(b"holdfast/v1", key, hashlib.sha256)
    return hmac.digest(extracted, info + b"\x01", hashlib.sha256)[:size]


def test_working_keys_are_hkdf_sha256_of_the_key_and_the_purpose() -> None:
    # Stored data depend on it: a change here makes every database unreadable.
    column = b"\x00\x06column\x00\x05users\x00\x05email"
    assert ONE.derive("column", "users", "email") == _hkdf(RAW, column, 32)
    assert ONE.key_id == _hkdf(RAW, b"\x00\x06key id", 4)
    assert ONE.check_value == _hkdf(RAW, b"\x00\x0bcheck value", 8)


def test_no_two_purposes_or_names_share_a_working_key() -> None:
    purposes: list[tuple[str, ...]] = [
        ("key id",),
        ("check value",),
        ("value",),
        ("file key",),
        ("subject reference",),
        ("column", "users", "email"),
        ("column", "users", "phone"),
        ("column", "bookings", "email"),
        ("blind index", "users", "email"),
        # The same letters, split elsewhere.
        ("column", "user", "semail"),
        ("column", "usersemail"),
        ("columnusersemail",),
    ]
    derived = {key.derive(*purpose) for key in (ONE, TWO) for purpose in purposes}
    assert len(derived) == 2 * len(purposes)
    assert RAW not in derived


def test_neither_keys_nor_keyring_print_a_key() -> None:
    printed = f"{ONE!r} {ONE} {Keyring(ONE, [TWO])!r}"
    assert ONE.key_id.hex() in printed
    assert TWO.key_id.hex() in printed
    for secret in (RAW, ONE.derive("value")):
        assert secret.hex() not in printed
        assert repr(secret)[2:-1] not in printed


def test_the_primary_key_seals_and_previous_keys_only_open() -> None:
    scope = column_scope("users", "email")
    before = Keyring(ONE).cipher(scope).seal(b"old")
    rotated = Keyring(TWO, [ONE]).cipher(scope)
    assert rotated.open(before) == b"old"
    assert rotated.seal(b"new")[1:5] == TWO.key_id
    with pytest.raises(UnknownKeyError, match=ONE.key_id.hex()):
        Keyring(TWO).cipher(scope).open(before)


def test_a_key_is_found_by_its_id_and_an_unknown_one_is_named() -> None:
    ring = Keyring(ONE, [TWO])
    assert ring.find(TWO.key_id) is TWO
    with pytest.raises(UnknownKeyError, match="00000000"):
        ring.find(bytes(4))


def test_one_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEYS_PREVIOUS repeats a key"):
        Keyring(ONE, [TWO, RootKey(RAW)])


def test_before_a_key_is_loaded_nothing_is_sealed(sqlite_service: Service) -> None:
    assert keyring.current().primary.key_id == ONE.key_id
    clear_caches()
    with pytest.raises(ConfigurationError, match="no encryption key is loaded yet"):
        keyring.current()


def test_values_bound_to_ever_new_contexts_do_not_fill_the_memory() -> None:
    # A caller may name a row in the context, and a process runs for months.
    def ciphers() -> int:
        gc.collect()
        return sum(isinstance(found, Cipher) for found in gc.get_objects())

    before, ring = ciphers(), Keyring(ONE)
    for number in range(5_000):
        ring.cipher(value_scope(f"booking {number}")).seal(b"")
    assert ciphers() - before < 2_000


def start_with(
    monkeypatch: pytest.MonkeyPatch, primary: str, previous: str | None = None
) -> list[tuple[str, bool]]:
    """Start as a new process with these keys and return the keys that the database knows."""
    monkeypatch.setenv("ENCRYPTION_KEY", primary)
    if previous is not None:
        monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
    clear_caches()
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        rows = session.query(EncryptionKey).order_by(EncryptionKey.first_seen_at)
        return [(row.key_id, row.is_primary) for row in rows]


def test_a_wrong_primary_key_stops_the_start_and_names_the_one_that_is_needed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed, other = ONE.key_id.hex(), TWO.key_id.hex()
    with pytest.raises(ConfigurationError) as refusal:
        start_with(monkeypatch, OTHER_KEY)
    assert refusal.value.detail == f"the data needs encryption key {needed}; configured: {other}"
    assert start_with(monkeypatch, KEY) == [(needed, True)]


def test_a_new_primary_starts_with_the_old_key_as_previous_and_reads_what_it_sealed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    eve = service.user("eve@example.com")
    needed, other = ONE.key_id.hex(), TWO.key_id.hex()
    assert start_with(monkeypatch, OTHER_KEY, KEY) == [(needed, False), (other, True)]
    with session_scope(read_only=True) as session:
        assert session.get_one(User, eve).email == "eve@example.com"


def test_a_key_whose_check_value_differs_from_the_datas_stops_the_start(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another key with the same four bytes of id, as one in 2**32 is.
    with session_scope() as session:
        session.execute(update(EncryptionKey).values(check_value="00" * 8))
    with pytest.raises(ConfigurationError) as refusal:
        start_with(monkeypatch, KEY)
    assert refusal.value.detail == f"the configured key {ONE.key_id.hex()} is not the data's key"
