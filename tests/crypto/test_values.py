"""Sealed values: the documented bytes, opened by another implementation, and nothing else opens."""

import base64
import hashlib
import hmac
import struct
from collections.abc import Iterator
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography_vectors import open_vector_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.crypto.keyring import Keyring, RootKey
from backend.crypto.values import Cipher, Scope, column_scope, decode_token, value_scope
from backend.errors import (
    CryptoError,
    MalformedTokenError,
    NotEncryptedError,
    TamperedError,
    UnknownKeyError,
)
from backend.services.encryption_service import get_encryption_service
from tests.conftest import Service

RAW: Final = bytes(range(32))
KEYS: Final = Keyring(RootKey(RAW))
ALPHABET: Final = f"{ascii_uppercase}{ascii_lowercase}{digits}-_"
EMAIL: Final = KEYS.cipher(column_scope("users", "email"))


# A second implementation, from the documents alone: HKDF from the standard library, AES-GCM
# called directly.


def hkdf(key: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869 with SHA-256, sections 2.2 and 2.3."""
    extracted = hmac.digest(salt or bytes(32), key, hashlib.sha256)
    block = okm = b""
    while len(okm) < size:
        counter = bytes([len(okm) // 32 + 1])
        block = hmac.digest(extracted, block + info + counter, hashlib.sha256)
        okm += block
    return okm[:size]


def working_key(*names: str, size: int = 32) -> bytes:
    info = b"".join(struct.pack(">H", len(name)) + name.encode() for name in names)
    return hkdf(RAW, b"holdfast/v1", info, size)


def bound(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def records(path: str) -> Iterator[dict[str, str]]:
    """Read a file of published vectors: blocks of `name = value`, sections in brackets."""
    section: dict[str, str] = {}
    block: dict[str, str] = {}
    with open_vector_file(path, "r") as file:
        for line in (*map(str.strip, file), ""):
            name, _, value = (part.strip() for part in line.strip("[]").partition("="))
            if block and (line.startswith("[") or name.lower() == "count"):
                yield section | block
                block = {}
            if line.startswith("["):
                section[name] = value
            elif line and not line.startswith("#"):
                block[name] = value
    yield section | block


def test_the_second_implementations_hkdf_gives_the_published_vectors() -> None:
    vectors = list(records("KDF/rfc-5869-HKDF-SHA256.txt"))
    assert len(vectors) == 3
    for vector in vectors:
        key, salt, info = (bytes.fromhex(vector.get(name, "")) for name in ("IKM", "salt", "info"))
        assert hkdf(key, salt, info, int(vector["L"])).hex() == vector["OKM"]


def test_published_aes_256_gcm_vectors_open_in_our_layout_or_are_refused_as_published() -> None:
    opened = refused = 0
    for vector in records("ciphers/AES/GCM/gcmDecrypt256.rsp"):
        if (vector["IVlen"], vector["Taglen"]) != ("96", "128"):
            continue
        key, nonce, ciphertext, tag = (
            bytes.fromhex(vector[name]) for name in ("Key", "IV", "CT", "Tag")
        )
        cipher = Cipher(Scope("vector"), {b"vect": key}, b"vect")
        header = b"\x01vect"
        cipher._openers[header] = (cipher._openers[header][0], bytes.fromhex(vector["AAD"]))
        token = b"\x01vect" + nonce + ciphertext + tag
        if "FAIL" in vector:
            refused += 1
            with pytest.raises(TamperedError):
                cipher.open(token)
        else:
            opened += 1
            assert cipher.open(token) == bytes.fromhex(vector["PT"])
    assert min(opened, refused) > 100


@pytest.mark.parametrize(
    ("cipher", "key", "associated"),
    [
        (
            EMAIL,
            working_key("column", "users", "email"),
            bound(b"column", b"users", b"email"),
        ),
        (
            KEYS.cipher(value_scope("guests.name")),
            working_key("value"),
            bound(b"value", b"guests.name"),
        ),
    ],
)
@pytest.mark.parametrize("row", [b"", b"17"])
def test_a_token_is_version_key_id_nonce_ciphertext_and_tag(
    cipher: Cipher, key: bytes, associated: bytes, row: bytes
) -> None:
    plain = "Zoë, 12 rue de l'Été".encode()
    token = cipher.seal(plain, row)
    assert len(token) == len(plain) + 33
    assert token[:5] == b"\x01" + working_key("key id", size=4)
    data = token[:5] + associated + (bound(row) if row else b"")
    assert AESGCM(key).decrypt(token[5:17], token[17:], data) == plain
    # And the other way: what the second implementation seals, ours opens.
    nonce = b"twelve bytes"
    theirs = token[:5] + nonce + AESGCM(key).encrypt(nonce, b"theirs", data)
    assert cipher.open(theirs, row) == b"theirs"


@given(plain=st.binary(max_size=500))
def test_as_text_a_token_is_enc1_and_unpadded_base64url(plain: bytes) -> None:
    text = EMAIL.seal_text(plain)
    prefix, body = text[:5], text[5:]
    assert prefix == "enc1."
    token = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    assert base64.urlsafe_b64encode(token).decode().rstrip("=") == body
    assert len(token) == len(plain) + 33
    assert EMAIL.open(token) == plain


@given(plain=st.binary(max_size=2000), row=st.binary(max_size=20))
def test_what_was_sealed_opens_for_its_row(plain: bytes, row: bytes) -> None:
    assert EMAIL.open_text(EMAIL.seal_text(plain, row), row) == plain


def test_a_value_sealed_twice_gives_two_tokens_without_a_common_nonce() -> None:
    tokens = [EMAIL.seal(b"same") for _ in range(500)]
    assert len({token[5:17] for token in tokens}) == 500
    assert len({token[17:] for token in tokens}) == 500


@pytest.mark.parametrize("plain", [b"", b"jane@example.com"])
def test_a_token_with_any_bit_flipped_is_refused(plain: bytes) -> None:
    token = EMAIL.seal(plain)
    expected = {0: MalformedTokenError} | dict.fromkeys(range(1, 5), UnknownKeyError)
    for at in range(len(token)):
        for bit in range(8):
            flipped = bytearray(token)
            flipped[at] ^= 1 << bit
            with pytest.raises(expected.get(at, TamperedError)):
                EMAIL.open(bytes(flipped))


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_a_text_with_any_character_changed_dropped_or_added_is_refused(size: int) -> None:
    """Sizes so that each length of the last base64 group occurs: a token has one spelling."""
    text = EMAIL.seal_text(b"x" * size)
    for at in range(len(text)):
        changed = {text[:at] + new + text[at + 1 :] for new in ("", "A", "_", "+", "=", "\n", "é")}
        added = {text[:at] + new + text[at:] for new in ("A", "=", " ")}
        # The bits of the last character that no byte takes.
        changed |= {text[:-1] + ALPHABET[ALPHABET.index(text[-1]) ^ bits] for bits in (1, 2, 3)}
        for wrong in (changed | added | {f"{text}=", f"{text}\n", f"{text}A"}) - {text}:
            with pytest.raises(CryptoError):
                EMAIL.open_text(wrong)


def test_every_cut_or_longer_token_is_refused() -> None:
    token = EMAIL.seal(b"jane@example.com")
    for end in range(len(token)):
        with pytest.raises(MalformedTokenError if end < 33 else TamperedError):
            EMAIL.open(token[:end])
    with pytest.raises(TamperedError):
        EMAIL.open(token + b"\x00")


def test_a_value_moved_to_another_place_does_not_open() -> None:
    token = EMAIL.seal(b"jane@example.com", b"17")
    assert EMAIL.open(token, b"17") == b"jane@example.com"
    for row in (b"", b"18", b"1", b"17\x00"):
        with pytest.raises(TamperedError):
            EMAIL.open(token, row)
    for scope in (
        column_scope("users", "phone"),
        column_scope("bookings", "email"),
        column_scope("user", "semail"),
        value_scope("users.email"),
        value_scope(""),
    ):
        with pytest.raises(TamperedError):
            KEYS.cipher(scope).open(token, b"17")


@settings(max_examples=50)
@given(one=st.text(max_size=20), other=st.text(max_size=20))
def test_a_value_opens_in_its_own_context_only(one: str, other: str) -> None:
    token = KEYS.cipher(value_scope(one)).seal(b"secret")
    opens = KEYS.cipher(value_scope(other)).open
    if one == other:
        assert opens(token) == b"secret"
    else:
        with pytest.raises(TamperedError):
            opens(token)


OTHER: Final = Keyring(RootKey(bytes(range(1, 33)))).cipher(column_scope("users", "email"))
FOREIGN: Final = OTHER.seal_text(b"jane@example.com")
TEXT: Final = EMAIL.seal_text(b"jane@example.com")


@pytest.mark.parametrize(
    ("text", "error", "code"),
    [
        (FOREIGN, UnknownKeyError, "unknown_key"),
        (f"{TEXT[:-9]}AAAAAAAA{TEXT[-1]}", TamperedError, "tampered"),
        (TEXT[:30], MalformedTokenError, "malformed_token"),
        (f"enc1.{'AgAA' * 20}", MalformedTokenError, "malformed_token"),
        ("enc1.", MalformedTokenError, "malformed_token"),
        (f"enc2.{TEXT[5:]}", NotEncryptedError, "not_encrypted"),
        ("jane@example.com", NotEncryptedError, "not_encrypted"),
        ("", NotEncryptedError, "not_encrypted"),
    ],
    ids=["unknown", "changed", "cut", "version", "empty", "prefix", "plain", "nothing"],
)
def test_each_way_not_to_open_is_an_error_of_its_own_that_shows_no_value(
    text: str, error: type[CryptoError], code: str
) -> None:
    assert EMAIL.open_text(TEXT) == b"jane@example.com"
    with pytest.raises(CryptoError) as refusal:
        EMAIL.open_text(text)
    assert type(refusal.value) is error
    assert refusal.value.code == code
    assert "jane" not in refusal.value.detail
    assert len(text) < 6 or text[5:] not in refusal.value.detail


def test_an_unknown_key_is_named_by_its_id() -> None:
    token = decode_token(FOREIGN)
    with pytest.raises(UnknownKeyError, match=token[1:5].hex()):
        EMAIL.open(token)


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(max_size=200))
def test_the_service_gives_back_any_text_and_binds_it_to_its_context(
    sqlite_service: Service, text: str
) -> None:
    service = get_encryption_service()
    token = service.encrypt(text, "guests.name")
    assert service.decrypt(token, "guests.name") == text
    with pytest.raises(TamperedError):
        service.decrypt(token)
