"""
Files and tokens of the past: they open for ever, also without our code.

The golden files were sealed once by `Sealer` and `Cipher.seal_text`, with the key and the
passphrase below. A new format gets a new golden file; none of these is ever made anew.
"""

import base64
import hashlib
import hmac
import io
import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backend.crypto.files import KeyringLock, Lock, Opener, PassphraseLock, Sealer
from backend.crypto.keyring import Keyring, RootKey
from backend.crypto.values import Scope, column_scope, value_scope

GOLDEN: Final = Path(__file__).parent / "golden"
KEY: Final = bytes(range(32))
PHRASE: Final = "correct horse battery staple"
NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
RING: Final = Keyring(RootKey(KEY))
KEYRING_SLOT, PASSPHRASE_SLOT = 1, 2
LOCKS: Final[dict[int, Lock]] = {
    KEYRING_SLOT: KeyringLock(RING),
    PASSPHRASE_SLOT: PassphraseLock(PHRASE),
}
DIGESTS: Final = {
    "keyring.hfe": "229a98151be8c9813cc24b3b1faac44a7b491a53be254b88078a0b7a1adac353",
    "passphrase.hfe": "4b2634f02045343d8d800fda33e5d692b3fce6c6da80f1e732c7fa5f13484222",
    "both.hfe": "3cfa1dff73f7538dec8c2284302671b53eee4afcf5192d30ac3515614a49d4fe",
    "values.json": "8646e81d970d522f063c943a5a9cdc38ab2210aeed56cd6be8af0fb2ef577176",
}
NOTE: Final = b"".join(b"%d: all that is held about somebody@example.com\n" % n for n in range(8))
# 40 KiB: two whole chunks and one of 8 KiB.
TABLE: Final = b"".join(b"%07d\n" % n for n in range(5 * 1024))
EXPORT: Final = {"kind": "export", "format": "json"}
OPENS: Final[list[tuple[str, int, dict[str, Any], bytes]]] = [
    ("keyring.hfe", KEYRING_SLOT, EXPORT, NOTE),
    ("passphrase.hfe", PASSPHRASE_SLOT, EXPORT, NOTE),
    ("both.hfe", KEYRING_SLOT, {"kind": "backup"}, TABLE),
    ("both.hfe", PASSPHRASE_SLOT, {"kind": "backup"}, TABLE),
]
TOKENS: Final[list[dict[str, Any]]] = json.loads((GOLDEN / "values.json").read_bytes())


# An independent reader, from the documents alone (RFC 5869, RFC 7914, SP 800-38D and
# https://c2sp.org/chunked-encryption): the standard library and AES-GCM, nothing of ours.


def expand(prk: bytes, info: bytes, size: int, hash_name: str = "sha256") -> bytes:
    okm, block, counter = b"", b"", 0
    while len(okm) < size:
        counter += 1
        block = hmac.digest(prk, block + info + bytes([counter]), hash_name)
        okm += block
    return okm[:size]


def working_key(*names: str, size: int = 32) -> bytes:
    info = b"".join(struct.pack(">H", len(name)) + name.encode() for name in names)
    return expand(hmac.digest(b"holdfast/v1", KEY, "sha256"), info, size)


def open_value(token: bytes, key_names: list[str], bound: list[bytes]) -> bytes:
    associated = token[:5] + b"".join(struct.pack(">I", len(part)) + part for part in bound)
    return AESGCM(working_key(*key_names)).decrypt(token[5:17], token[17:], associated)


def open_chunked(key: bytes, context: bytes, data: bytes, hash_name: str = "sha512") -> bytes:
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00" + data[:24] + context
    okm = expand(key, info, 76, hash_name)
    if len(key) != 32 or okm[44:] != data[24:56]:
        raise InvalidTag
    plain, number, chunk = [], 0, bytes(16_400)
    while len(chunk) == 16_400:
        chunk = data[56 + number * 16_400 :][:16_400]
        nonce = (int.from_bytes(okm[32:44], "big") ^ number).to_bytes(12, "big")
        plain.append(AESGCM(okm[:32]).decrypt(nonce, chunk, None))
        number += 1
    return b"".join(plain)


def open_file(data: bytes, slot: int) -> tuple[dict[str, Any], bytes]:
    meta_bytes = int.from_bytes(data[36:38], "big")
    end, at, slots = 38 + meta_bytes, 39 + meta_bytes, {}
    for _ in range(data[end]):
        kind, wrapped_at = data[at], at + 4 + data[at + 1]
        opener, at = data[at + 2 : wrapped_at - 2], wrapped_at
        at += int.from_bytes(data[wrapped_at - 2 : wrapped_at], "big")
        slots[kind] = opener, data[wrapped_at:at]
    opener, wrapped = slots[slot]
    binding = hashlib.sha256(data[:end]).digest()
    if slot == KEYRING_SLOT:
        key = open_value(wrapped, ["file key"], [b"file key", binding])
    else:
        cost = {"n": 2 ** opener[16], "r": 8, "p": 1, "maxmem": 2**28, "dklen": 32}
        stretched = hashlib.scrypt(PHRASE.encode(), salt=opener[:16], **cost)
        key = AESGCM(stretched).decrypt(wrapped[:12], wrapped[12:], binding + opener)
    mac_key = expand(key, b"holdfast/file/v1 header", 32)
    if hmac.digest(mac_key, data[:4064], "sha256") != data[4064:4096]:
        raise InvalidTag
    payload = open_chunked(key, b"holdfast/file/v1" + binding, data[4096:])
    return json.loads(data[38:end]), payload


def test_golden_files_do_not_change() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in GOLDEN.iterdir()}
    assert found == DIGESTS


@pytest.mark.parametrize(("name", "slot", "meta", "plain"), OPENS)
def test_a_golden_file_opens_with_our_code_and_with_the_independent_reader(
    name: str, slot: int, meta: dict[str, Any], plain: bytes
) -> None:
    data = (GOLDEN / name).read_bytes()
    opener = Opener(io.BytesIO(data), LOCKS[slot])
    assert (opener.meta, opener.created_at) == (meta, NOW)
    assert b"".join(opener.chunks()) == plain
    assert open_file(data, slot) == (meta, plain)


def test_the_bytes_of_a_golden_header_are_as_documented() -> None:
    data = (GOLDEN / "both.hfe").read_bytes()
    layout = {
        "magic": (0, b"HOLDFAST"),
        "version": (8, b"\x00\x01"),
        "suite": (10, b"\x00\x01"),
        "file id": (12, bytes.fromhex("5ecdf015f0ba5b68cf9aba5a74a48c66")),
        "created": (28, int(NOW.timestamp()).to_bytes(8, "big")),
        "meta length": (36, b"\x00\x11"),
        "meta": (38, b'{"kind":"backup"}'),
        "slot count": (55, b"\x02"),
        # A keyring slot: the key's id, and a sealed value of 33 + 32 bytes for that key.
        "type, id length": (56, b"\x01\x04"),
        "key id": (58, working_key("key id", size=4)),
        "wrapped length": (62, b"\x00\x41"),
        "wrapped: version, key id": (64, b"\x01" + working_key("key id", size=4)),
        # A passphrase slot: salt and log2 N; nonce, data key and tag.
        "type, id length ": (129, b"\x02\x11"),
        "log2 N": (147, b"\x11"),
        "wrapped length ": (148, b"\x00\x3c"),
        "zeros": (210, bytes(4064 - 210)),
    }
    for field, (at, expected) in layout.items():
        assert data[at : at + len(expected)] == expected, field
    # Header, salt and commitment; then chunks of 16 KiB, each with its tag.
    assert len(data) == 4096 + 56 + len(TABLE) + 3 * 16


@pytest.mark.parametrize("slot", LOCKS)
def test_the_independent_reader_opens_what_is_sealed_today(slot: int) -> None:
    meta = {"kind": "export", "of": "Zoë"}
    data = b"".join(Sealer(meta, [LOCKS[slot]], now=NOW).seal([TABLE[:100], TABLE[100:]]))
    assert open_file(data, slot) == (meta, TABLE)


@pytest.mark.parametrize("at", [0, 12, 40, 70, 4000, 4095, 4096, 4130, 4152, 30_000, -1])
def test_the_independent_reader_too_refuses_a_changed_file(at: int) -> None:
    data = bytearray((GOLDEN / "both.hfe").read_bytes())
    data[at] ^= 1
    with pytest.raises(InvalidTag):
        open_file(bytes(data), KEYRING_SLOT)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_the_independent_reader_too_refuses_a_file_cut_behind_a_chunk(chunks: int) -> None:
    data = (GOLDEN / "both.hfe").read_bytes()[: 4096 + 56 + chunks * 16_400]
    with pytest.raises(InvalidTag):
        open_file(data, KEYRING_SLOT)


@pytest.mark.parametrize("golden", TOKENS, ids=[str(n) for n in range(len(TOKENS))])
def test_a_golden_token_opens_with_our_code_and_with_the_independent_reader(
    golden: dict[str, Any],
) -> None:
    names, token, row = golden["names"], golden["token"], golden["row"].encode()
    scope: Scope = column_scope(*names) if golden["purpose"] == "column" else value_scope(*names)
    assert RING.cipher(scope).open_text(token, row).decode() == golden["plain"]
    prefix, body = token[:5], token[5:]
    raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    assert (prefix, raw[:5]) == ("enc1.", b"\x01" + working_key("key id", size=4))
    # A column has a key of its own; single values share one.
    key_names = ["column", *names] if golden["purpose"] == "column" else ["value"]
    bound = [name.encode() for name in (golden["purpose"], *names)]
    opened = open_value(raw, key_names, bound + ([row] if row else []))
    assert opened.decode() == golden["plain"]
    assert len(raw) == 33 + len(opened)


def test_the_golden_tokens_are_of_both_kinds_and_more_than_plain_ascii() -> None:
    assert {golden["purpose"] for golden in TOKENS} == {"column", "value"}
    assert {"", "Zoë 🗝\x00", "1990-02-28"} <= {golden["plain"] for golden in TOKENS}
    assert any(golden["row"] for golden in TOKENS)
