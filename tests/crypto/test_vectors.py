"""Published vectors through our own wrappers, and what must hold of every sealed value."""

import base64
import hashlib
import json
import mmap
import zlib
from itertools import product
from pathlib import Path
from typing import Any, Final, cast

import pytest
from cryptography.cobblestone import Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography_vectors import open_vector_file
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backend.crypto import files, keyring
from backend.crypto.keyring import Keyring, RootKey
from backend.crypto.values import Cipher, Scope, column_scope, value_scope
from backend.errors import (
    ConfigurationError,
    CryptoError,
    HoldfastError,
    KeyFormatError,
    MalformedTokenError,
    NotEncryptedError,
    TamperedError,
)
from backend.services.encryption_service import get_encryption_service
from tests.conftest import KEY, Service, clear_caches
from tests.crypto.test_golden import expand, open_chunked
from tests.crypto.test_values import records

RING: Final = Keyring(RootKey(bytes(range(32))))
ROOT: Final = Path(__file__).resolve().parents[2]


# NIST CAVP, AES-256-GCM. Those for decryption are in test_values.py.


def test_published_aes_256_gcm_vectors_come_out_of_our_seal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sealed = 0
    for vector in records("ciphers/AES/GCM/gcmEncryptExtIV256.rsp"):
        if (vector["IVlen"], vector["Taglen"]) != ("96", "128"):
            continue
        key, nonce, plain, associated = (
            bytes.fromhex(vector[name]) for name in ("Key", "IV", "PT", "AAD")
        )
        cipher = Cipher(Scope("vector"), {b"vect": key}, b"vect")
        # Ours always binds the token's place, the vectors do not: theirs instead of ours, and
        # their nonce instead of a random one. All else is what every value goes through.
        header = b"\x01vect"
        cipher._openers[header] = (cipher._openers[header][0], associated)
        with monkeypatch.context() as fixed:
            fixed.setattr("os.urandom", {12: nonce}.__getitem__)
            token = cipher.seal(plain)
        assert token.hex() == (b"\x01vect" + nonce).hex() + vector["CT"] + vector["Tag"]
        assert cipher.open(token) == plain
        sealed += 1
    assert sealed == 375


def test_the_hkdf_that_keys_are_derived_with_gives_the_vectors_of_rfc_5869() -> None:
    vectors = [*records("KDF/rfc-5869-HKDF-SHA256.txt"), *records("KDF/hkdf-generated.txt")]
    assert len(vectors) == 4
    assert vars(keyring)["HKDF"] is HKDF
    assert vars(files)["HKDFExpand"] is HKDFExpand
    for vector in vectors:
        key, salt, info, expected = (
            bytes.fromhex(vector.get(name, "")) for name in ("IKM", "salt", "info", "OKM")
        )
        size = int(vector["L"])
        hkdf = HKDF(algorithm=SHA256(), length=size, salt=salt, info=info)
        assert hkdf.derive(key) == expected
        if prk := bytes.fromhex(vector.get("PRK", "")):
            assert HKDFExpand(SHA256(), size, info).derive(prk) == expected
            # The reader of golden files, by which `RootKey.derive` is proven.
            assert expand(prk, info, size) == expected


def test_the_scrypt_of_passphrases_gives_the_vectors_of_rfc_7914() -> None:
    # The fourth takes 1 GiB.
    vectors = [v for v in records("KDF/scrypt.txt") if int(v["N"]) <= 2**14]
    assert len(vectors) == 3
    assert vars(files)["Scrypt"] is Scrypt
    for vector in vectors:
        cost = {name.lower(): int(vector[name]) for name in ("N", "r", "p")}
        password, salt = vector["PASSWORD"].encode(), vector["SALT"].encode()
        for derived in (
            Scrypt(salt=salt, length=64, **cost).derive(password),
            hashlib.scrypt(password, salt=salt, dklen=64, maxmem=2**26, **cost),
        ):
            assert derived.hex() == vector["DERIVED_KEY"]


def _chunked_vectors() -> list[Any]:
    with open_vector_file("chunked-encryption/vectors.json", "r") as file:
        vectors = json.load(file)["vectors"]
    return [vector for vector in vectors if vector["aead"] == "AEAD_AES_256_GCM"]


@pytest.mark.parametrize("vector", _chunked_vectors(), ids=lambda vector: vector["name"])
def test_published_chunked_encryption_vectors_open_or_are_refused_as_published(
    vector: dict[str, Any],
) -> None:
    """
    By the reader of golden files: these vectors are of the scheme with SHA-256.

    Cobblestone-256 is the scheme with SHA-512 and takes no other, so the published bytes prove the
    reader, and the reader proves what our files are made with.
    """
    key, context = bytes.fromhex(vector["key"]), vector["context"].encode()
    data = base64.b64decode(vector["ciphertext"] or "")
    data = zlib.decompress(data) if vector.get("compressed") else data
    if vector["expect"] == "failure":
        with pytest.raises(InvalidTag):
            open_chunked(key, context, data, "sha256")
        return
    plain = open_chunked(key, context, data, "sha256")
    assert len(plain) == vector["payload_length"]
    assert hashlib.sha256(plain).hexdigest() == vector["payload_sha256"]
    encryptor = Cobblestone256Encryptor(key, context)
    sealed = encryptor.update(plain) + encryptor.finalize()
    assert len(sealed) == len(data)
    assert open_chunked(key, context, sealed) == plain


# Every value


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(text="", context="")
@example(text="\x00", context="\x00")
@example(text="\x00a\x00", context="a")
@example(text="\U0001f5dd\U0010ffff\ufeffe\u0301\u00e9", context="\U0001f5dd")
@given(text=st.text(), context=st.text(max_size=20))
def test_any_text_comes_back_as_it_was_and_in_its_context_only(
    sqlite_service: Service, text: str, context: str
) -> None:
    service = get_encryption_service()
    token = service.encrypt(text, context)
    assert service.decrypt(token, context) == text
    assert len(base64.urlsafe_b64decode(token[5:] + "==")) == 33 + len(text.encode())
    with pytest.raises(TamperedError):
        service.decrypt(token, context + "\x00")


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(raw=b"")
@example(raw=b"\x00")
@example(raw=b"enc1.\xff\xed\xb3\xbf")
@given(raw=st.binary())
def test_any_bytes_come_back_as_they_were(sqlite_service: Service, raw: bytes) -> None:
    token = get_encryption_service().encrypt(raw, "a")
    assert len(token) == 33 + len(raw)
    assert get_encryption_service().decrypt(token, "a") == raw


def test_ten_megabytes_come_back_as_they_were(sqlite_service: Service) -> None:
    text = "all of it \U0001f5dd\x00" * 670_000
    assert len(text.encode()) == 10_050_000
    token = get_encryption_service().encrypt(text)
    assert get_encryption_service().decrypt(token) == text
    with pytest.raises(TamperedError):
        get_encryption_service().decrypt(f"{token[:-40]}AAAA{token[-36:]}")


def test_every_bit_of_a_token_counts(sqlite_service: Service) -> None:
    service = get_encryption_service()
    token = service.encrypt("jane@example.com", "guests.email")
    assert service.decrypt(token, "guests.email") == "jane@example.com"
    for at, bit in product(range(len(token)), range(8)):
        flipped = token[:at] + chr(ord(token[at]) ^ 1 << bit) + token[at + 1 :]
        with pytest.raises(NotEncryptedError if at < 5 else CryptoError):
            service.decrypt(flipped, "guests.email")
    cipher = keyring.current().cipher(column_scope("users", "email"))
    raw = cipher.seal(b"jane@example.com", b"17")
    for at, bit in product(range(len(raw)), range(8)):
        with pytest.raises(CryptoError):
            cipher.open(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :], b"17")


def test_a_token_cut_anywhere_is_no_token_or_a_changed_one(sqlite_service: Service) -> None:
    service = get_encryption_service()
    # One more than a multiple of three, so that a cut leaves groups of each length.
    token = service.encrypt("jane@example.com.", "guests.email")
    for end in range(len(token)):
        with pytest.raises(CryptoError) as refusal:
            service.decrypt(token[:end], "guests.email")
        body = token[5:end]
        if end < 5:
            expected: type[CryptoError] = NotEncryptedError
        elif len(body) * 6 // 8 < 33 or not _canonical(body):
            expected = MalformedTokenError
        else:
            expected = TamperedError
        assert type(refusal.value) is expected, end
    for start in range(1, len(token)):
        with pytest.raises(NotEncryptedError):
            service.decrypt(token[start:], "guests.email")


def _canonical(body: str) -> bool:
    if len(body) % 4 == 1:
        return False
    raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    return base64.urlsafe_b64encode(raw).decode().rstrip("=") == body


def test_a_value_opens_where_it_was_sealed_and_nowhere_else() -> None:
    places = [
        *product(
            [column_scope(t, c) for t in ("users", "bookings") for c in ("email", "name")],
            [b"", b"1", b"2"],
        ),
        *product([value_scope(c) for c in ("", "users", "email", "users.email")], [b""]),
        # The same letters, split elsewhere.
        *product([column_scope("user", "semail"), column_scope("usersemail", "")], [b""]),
        *product([Scope("file key"), Scope("column")], [b"", b"1"]),
    ]
    tokens = [RING.cipher(scope).seal(b"secret", row) for scope, row in places]
    for (home, token), (there, (scope, row)) in product(enumerate(tokens), enumerate(places)):
        if home == there:
            assert RING.cipher(scope).open(token, row) == b"secret"
        else:
            with pytest.raises(TamperedError):
                RING.cipher(scope).open(token, row)


def test_a_million_values_have_a_million_nonces() -> None:
    seal = RING.cipher(column_scope("users", "email")).seal
    assert len({seal(b"")[5:17] for _ in range(10**6)}) == 10**6


# Bad input


@pytest.mark.parametrize("bad", ["\ud800", "jane\udcff@example.com", None, 7, 1.5, ["a"]])
def test_what_is_no_text_is_refused_by_an_error_of_ours(sqlite_service: Service, bad: Any) -> None:
    service = get_encryption_service()
    token = service.encrypt("fine", "guests.email")
    with pytest.raises(HoldfastError):
        service.encrypt(bad)
    with pytest.raises(HoldfastError):
        service.encrypt("fine", bad)
    with pytest.raises(HoldfastError):
        service.decrypt(bad)
    with pytest.raises(HoldfastError):
        service.decrypt(token, bad)


def test_more_than_the_cipher_can_take_is_refused_by_an_error_of_ours() -> None:
    # Zeros that are never touched: no memory is taken.
    with mmap.mmap(-1, 2**31) as zeros, pytest.raises(HoldfastError):
        RING.cipher(value_scope("")).seal(cast("bytes", zeros))


RAW: Final = base64.b64decode(KEY)
BAD_KEYS: Final = {
    "16 bytes": base64.b64encode(RAW[:16]).decode(),
    "16 bytes in hex": RAW[:16].hex(),
    "hex": RAW.hex(),
    "hex in capitals": RAW.hex().upper(),
    "all zero": base64.b64encode(bytes(32)).decode(),
    "all ones": base64.b64encode(b"\xff" * 32).decode(),
    "a sentence": "change-me-to-a-long-and-random-key-please-do",
    "a lone surrogate": "\udcff" * 44,
}


@pytest.mark.parametrize("setting", ["ENCRYPTION_KEY", "ENCRYPTION_KEYS_PREVIOUS"])
@pytest.mark.parametrize("kind", BAD_KEYS)
def test_a_bad_key_stops_the_start_and_is_not_shown(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch, setting: str, kind: str
) -> None:
    find = get_encryption_service().find
    assert find() is not None
    monkeypatch.setenv(setting, BAD_KEYS[kind])
    clear_caches()
    with pytest.raises(KeyFormatError, match=f"^{setting}: ") as refusal:
        find()
    assert BAD_KEYS[kind] not in f"{refusal.value} {refusal.value!r}"


def test_the_placeholders_of_the_example_are_no_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (ROOT / "env.example").read_text().splitlines()
    placeholders = [line.removeprefix("# ") for line in lines if "KEY" in line and "=" in line]
    assert any(line.startswith("ENCRYPTION_KEY=") for line in placeholders)
    # Settings are read from `.env` in the folder that a test runs in.
    (tmp_path / ".env").write_text("\n".join(["APP_ENV=production", *placeholders]))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    clear_caches()
    with pytest.raises(ConfigurationError, match="ENCRYPTION_KEY"):
        get_encryption_service().find()
    monkeypatch.setenv("ENCRYPTION_KEY", KEY)
    clear_caches()
    assert get_encryption_service().find() is not None
