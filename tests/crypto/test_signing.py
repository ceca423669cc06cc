"""Signatures: published vectors, one spelling of a key, and no key that signs for everyone."""

import base64
import hashlib
from collections.abc import Iterator
from typing import Final

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography_vectors import open_vector_file
from hypothesis import example, given
from hypothesis import strategies as st

from backend.crypto import signing
from backend.crypto.signing import PublicKeyRefusedError, SignatureRefusedError
from backend.errors import KeyFormatError

PRIVATE: Final = bytes(range(32))
PUBLIC: Final = signing.public_key_of(PRIVATE)
SPELLED: Final = signing.spell_public_key(PUBLIC)
PEM: Final = signing.public_key_pem(PUBLIC)


# Published vectors


def published() -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """Those of the authors of Ed25519, among them RFC 8032, 7.1: private, public, text, signed."""
    with open_vector_file("asymmetric/Ed25519/sign.input", "r") as file:
        for line in file:
            private, public, message, signed, _ = line.split(":")
            text = bytes.fromhex(message)
            yield (
                bytes.fromhex(private)[:32],
                bytes.fromhex(public),
                text,
                bytes.fromhex(signed.removesuffix(message)),
            )


def test_published_ed25519_vectors_come_out_of_our_signatures_and_pass() -> None:
    vectors = list(published())
    assert len(vectors) == 1024
    # RFC 8032, 7.1, test 1, as printed there.
    assert vectors[0][1].hex().startswith("d75a980182b10ab7d54bfed3c964073a")
    assert vectors[0][3].hex().startswith("e5564300c360ac729086e2cc806e828a")
    for private, public, message, signature in vectors[::8]:
        assert signing.public_key_of(private) == public
        assert signing.sign(message, private) == signature
        signing.verify(message, signature, public)
        with pytest.raises(SignatureRefusedError):
            signing.verify(message + b"\0", signature, public)


WYCHEPROOF_KEY: Final = bytes.fromhex(
    "7d4d0e7f6153a69b6242b522abbee685fda4420f8834b108c3bdae369ef549fa"
)
R: Final = "7c38e026f29e14aabd059a0f2db8b0cd783040609a8be684db12f82a27774ab0"
S: Final = "7a9155711ecfaf7f99f277bad0c6ae7e39d4eef676573336a5c51eb6f946b30d"


@pytest.mark.parametrize(
    ("case", "message", "signature"),
    [
        (12, "3f", "00" * 32 + "ecd3f55c1a631258d69cf7a2def9de14" + "00" * 15 + "10"),
        (15, "3f", "01" + "00" * 63),
        (30, "54657374", ""),
        (31, "54657374", R),
        (33, "54657374", R + S + "2020"),
        (36, "54657374", R + "00" + S),
        (60, "313233343030", "00" * 32
         + "e0b8e7770d51c7a36375d006c5bffd6af43ff54aaf47e4330dc118c71d61ec02"),
        # S + L and S + 2L: a second signature that anyone could make from the first.
        (63, "54657374", R + "67654bce3832c2d76f8f6f5dafc08d9339d4eef676573336a5c51eb6f946b31d"),
        (64, "54657374", R + "5439412b5395d42f462c67008eba6ca839d4eef676573336a5c51eb6f946b32d"),
        (69, "54657374", R + S[:-2] + "8d"),
    ],
)  # fmt: skip
def test_signatures_that_wycheproof_calls_invalid_are_refused(
    case: int, message: str, signature: str
) -> None:
    """Source: C2SP/wycheproof, testvectors_v1/ed25519_test.json, by their `tcId`."""
    signing.verify(b"Test", bytes.fromhex(R + S), WYCHEPROOF_KEY)
    with pytest.raises(SignatureRefusedError):
        signing.verify(bytes.fromhex(message), bytes.fromhex(signature), WYCHEPROOF_KEY)


# Keys


def test_a_new_key_is_another_and_signs_for_its_public_half_only() -> None:
    key, other = signing.new_signing_key(), signing.new_signing_key()
    assert len(key) == 32
    assert key != other
    signature = signing.sign(b"text", key)
    signing.verify(b"text", signature, signing.public_key_of(key))
    with pytest.raises(SignatureRefusedError):
        signing.verify(b"text", signature, signing.public_key_of(other))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_size_is_refused_and_not_shown(size: int) -> None:
    key = b"K" * size
    for act in (signing.public_key_of, lambda raw: signing.sign(b"text", raw)):
        with pytest.raises(KeyFormatError) as refusal:
            act(key)
        assert "KK" not in f"{refusal.value!r}"
    with pytest.raises(PublicKeyRefusedError, match=f"32 bytes, not {size}"):
        signing.spell_public_key(key)


def test_a_key_is_named_by_the_beginning_of_its_digest() -> None:
    assert signing.key_id(PUBLIC) == hashlib.sha256(PUBLIC).hexdigest()[:8]


@given(st.binary(min_size=32, max_size=32))
@example(PRIVATE)
def test_a_spelled_key_reads_back_and_so_does_its_pem(private: bytes) -> None:
    public = signing.public_key_of(private)
    spelled = signing.spell_public_key(public)
    assert spelled == "ed25519:" + base64.urlsafe_b64encode(public).decode().rstrip("=")
    for text in (spelled, f"\n {spelled}\r\n", signing.public_key_pem(public)):
        assert signing.parse_public_key(text) == public


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        SPELLED.removeprefix("ed25519:"),
        SPELLED.upper(),
        SPELLED[:-1],
        SPELLED + "A",
        SPELLED + "=",
        SPELLED.replace(":", ": "),
        # The last character carries two bits that belong to no byte.
        SPELLED[:-1] + chr(ord(SPELLED[-1]) + 1),
        # Standard base64 of the same bytes, and a stranger among the characters.
        "ed25519:" + base64.b64encode(b"\xfb" * 32).decode().rstrip("="),
        SPELLED[:20] + "!" + SPELLED[20:],
        f"{SPELLED}\n{SPELLED}",
        "ed25519:\ud800",
        PEM + PEM,
        "key of the auditor\n" + PEM,
        PEM[:60],
        PEM.replace("PUBLIC KEY", "PRIVATE KEY"),
        PEM.replace("MCow", "MCox"),
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    ],
)
def test_what_is_no_key_in_one_of_two_spellings_is_refused(text: str) -> None:
    assert signing.parse_public_key(SPELLED) == signing.parse_public_key(PEM) == PUBLIC
    with pytest.raises(PublicKeyRefusedError) as refusal:
        signing.parse_public_key(text)
    assert PUBLIC[:6].hex() not in str(refusal.value)


@pytest.mark.parametrize(
    "path",
    ["X25519/x25519-pub.pem", "X448/x448-pub.pem", "PEM_Serialization/rsa_public_key.pem",
     "PEM_Serialization/ec_public_key.pem", "Ed25519/ed25519-pkcs8.pem"],
)  # fmt: skip
def test_another_kind_of_key_is_refused(path: str) -> None:
    with open_vector_file("asymmetric/Ed25519/ed25519-pub.pem", "r") as file:
        assert len(signing.parse_public_key(file.read())) == 32
    with open_vector_file(f"asymmetric/{path}", "r") as file, pytest.raises(PublicKeyRefusedError):
        signing.parse_public_key(file.read())


# Weak keys: the curve's arithmetic (RFC 8032, 5.1), to find them from nothing but its equation.

P: Final = 2**255 - 19
D: Final = -121665 * pow(121666, -1, P) % P
L: Final = 2**252 + 27742317777372353535851937790883648493
Point = tuple[int, int]


def add(one: Point, other: Point) -> Point:
    (x1, y1), (x2, y2) = one, other
    k = D * x1 * x2 * y1 * y2
    return (
        (x1 * y2 + x2 * y1) * pow(1 + k, -1, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - k, -1, P) % P,
    )


def times(factor: int, point: Point) -> Point:
    result = (0, 1)
    for bit in f"{factor:b}":
        result = add(result, result)
        result = add(result, point) if bit == "1" else result
    return result


def points() -> Iterator[Point]:
    """Points of the curve with a small y."""
    for y in range(2, 30):
        square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
        root = pow(square, (P + 3) // 8, P)
        for x in (root, root * pow(2, (P - 1) // 4, P) % P):
            if x * x % P == square:
                yield x, y


def weak_keys() -> set[bytes]:
    """Every spelling of every point whose eightfold is nothing, also those that RFC 8032 bars."""
    # A point times the order of the large group is one of the eight.
    eight = {times(L, point) for point in points()}
    eight |= {(-x % P, y) for x, y in eight}
    assert len(eight) == 8
    assert all(times(8, point) == (0, 1) for point in eight)
    spellings = {y + shift for _, y in eight for shift in (0, P) if y + shift < 2**255}
    return {(y | sign << 255).to_bytes(32, "little") for y in spellings for sign in (0, 1)}


def forged(key: bytes) -> int:
    """In how many of 64 messages a signature made without any private key passes the library."""
    passed = 0
    for number in range(64):
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(b"\1" + bytes(63), bytes([number]))
        except InvalidSignature:
            continue
        passed += 1
    return passed


def test_a_key_in_whose_name_anyone_can_sign_is_refused_in_every_spelling() -> None:
    weak = weak_keys()
    assert len(weak) == 14
    assert forged(PUBLIC) == 0
    for key in weak:
        # The library takes every one: without the refusal this would be a certificate's key.
        assert forged(key) > 0
        spelled = signing.to_base64url(key)
        for act in (
            lambda key=key: signing.verify(b"text", b"\1" + bytes(63), key),
            lambda key=key: signing.spell_public_key(key),
            lambda spelled=spelled: signing.parse_public_key(f"ed25519:{spelled}"),
            lambda key=key: signing.parse_public_key(PEM.replace(_body(PUBLIC), _body(key))),
        ):
            with pytest.raises(PublicKeyRefusedError, match="weak"):
                act()


def _body(key: bytes) -> str:
    """What a PEM holds: 12 bytes that say Ed25519 (RFC 8410), and the key."""
    return base64.b64encode(bytes.fromhex("302a300506032b6570032100") + key).decode()


def test_a_key_spelled_beyond_the_field_is_refused() -> None:
    # y = 3 and y = 3 + p are one key with two names, and OpenSSL takes both.
    spelled = [(3).to_bytes(32, "little"), (3 + P).to_bytes(32, "little")]
    assert signing.parse_public_key(f"ed25519:{signing.to_base64url(spelled[0])}") == spelled[0]
    with pytest.raises(PublicKeyRefusedError):
        signing.parse_public_key(f"ed25519:{signing.to_base64url(spelled[1])}")
