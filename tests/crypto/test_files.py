"""Encrypted files: the documented layout, the locks, and that nothing but the whole file opens."""

import hashlib
import hmac
import io
import json
import stat
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
from cryptography.cobblestone import Cobblestone256Decryptor
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

import db_cli
from backend.crypto import files
from backend.crypto.files import KeyringLock, Lock, Opener, PassphraseLock, Sealer, Slot
from backend.crypto.keyring import Keyring, RootKey
from backend.errors import CryptoError, MalformedTokenError, TamperedError, UnknownKeyError
from backend.services.encryption_service import get_encryption_service
from tests.conftest import Service

RAW: Final = bytes(range(32))
KEY, OTHER = RootKey(RAW), RootKey(bytes(range(1, 33)))
LOCK: Final = KeyringLock(Keyring(KEY))
PHRASE: Final = "correct horse battery staple"
NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
META: Final = {"kind": "export", "format": "json"}
HEADER: Final = 4096
CHUNK: Final = 16 * 1024


def seal(*chunks: bytes, locks: Iterable[Lock] = (LOCK,)) -> bytes:
    return b"".join(Sealer(META, locks, now=NOW).seal(chunks))


def open_(data: bytes, lock: Lock = LOCK) -> bytes:
    return b"".join(Opener(io.BytesIO(data), lock).chunks())


# One file of each lock, made once: a passphrase takes a third of a second each time.
PLAIN: Final = b"all that is held about jane@example.com"


@pytest.fixture(scope="module")
def sealed_for_both() -> bytes:
    return seal(PLAIN, locks=[LOCK, PassphraseLock(PHRASE)])


def test_the_header_is_as_documented_and_opens_by_hand() -> None:
    data = seal(PLAIN)
    # magic 8 | version 2 | suite 2 | file id 16 | created 8 | meta length 2 | meta
    assert data[:12] == b"HOLDFAST\x00\x01\x00\x01"
    assert int.from_bytes(data[28:36], "big") == int(NOW.timestamp())
    end = 38 + int.from_bytes(data[36:38], "big")
    assert json.loads(data[38:end]) == META
    # slot count 1 | type 1 | id length 1 | id 4 | wrapped length 2 | wrapped data key
    assert data[end : end + 7] == b"\x01\x01\x04" + KEY.key_id
    size = int.from_bytes(data[end + 7 : end + 9], "big")
    wrapped = data[end + 9 : end + 9 + size]
    assert set(data[end + 9 + size : 4064]) == {0}
    # The wrapped key is a sealed value of the scope "file key", for the row that the digest is.
    hkdf = HKDF(algorithm=SHA256(), length=32, salt=b"holdfast/v1", info=b"\x00\x08file key")
    binding = hashlib.sha256(data[:end]).digest()
    bound = b"\x00\x00\x00\x08file key\x00\x00\x00\x20" + binding
    data_key = AESGCM(hkdf.derive(RAW)).decrypt(wrapped[5:17], wrapped[17:], wrapped[:5] + bound)
    # HKDF-Expand of one block (RFC 5869, 2.3).
    mac_key = hmac.digest(data_key, b"holdfast/file/v1 header\x01", hashlib.sha256)
    assert data[4064:HEADER] == hmac.digest(mac_key, data[:4064], hashlib.sha256)
    payload = Cobblestone256Decryptor(data_key, b"holdfast/file/v1" + binding)
    assert payload.update(data[HEADER:]) + payload.finalize() == PLAIN


def test_description_and_time_are_read_before_the_payload() -> None:
    opener = Opener(io.BytesIO(seal(PLAIN)), LOCK)
    assert (opener.meta, opener.created_at) == (META, NOW)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=8))
def test_what_was_sealed_in_any_pieces_opens_to_the_same(chunks: list[bytes]) -> None:
    assert open_(seal(*chunks)) == b"".join(chunks)


@pytest.mark.parametrize(
    "size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, files.READ_BYTES + CHUNK]
)
def test_sizes_at_the_edges_of_a_chunk_open_to_the_same_and_only_whole(size: int) -> None:
    plain = b"x" * size
    data = seal(plain[: size // 3], plain[size // 3 :])
    assert open_(data) == plain
    ends = {HEADER, HEADER + 56, len(data) - 1, len(data) - 16, len(data) - 17}
    # Where a chunk ends there is a whole tag: only the missing last chunk gives a cut away.
    ends |= {HEADER + 56 + chunk * (CHUNK + 16) for chunk in range(1, size // CHUNK + 1)}
    for end in ends - {len(data)}:
        with pytest.raises(TamperedError):
            open_(data[:end])
    for more in (b"\x00", b"\x00" * 16, data[-40:], data[HEADER:]):
        with pytest.raises(TamperedError):
            open_(data + more)


def test_a_file_hides_what_is_in_it_and_is_new_each_time() -> None:
    one, two = seal(PLAIN), seal(PLAIN)
    assert b"jane" not in one
    assert one[12:28] != two[12:28]
    assert one[HEADER:] != two[HEADER:]


def test_a_file_cut_anywhere_is_refused() -> None:
    data = seal(PLAIN)
    for end in range(len(data)):
        with pytest.raises(MalformedTokenError if end < HEADER else TamperedError):
            open_(data[:end])


def test_a_file_with_any_bit_flipped_is_refused() -> None:
    data = seal(PLAIN)
    assert open_(data) == PLAIN
    for at in range(len(data)):
        # Of the zeros before the MAC one bit a byte will do.
        for bit in range(8) if at < 256 or at >= 4064 else (at % 8,):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(CryptoError):
                open_(bytes(flipped))


def test_a_header_does_not_fit_another_payload_nor_slots_another_header() -> None:
    one, two = seal(b"one"), seal(b"two")
    with pytest.raises(TamperedError):
        open_(one[:HEADER] + two[HEADER:])
    end = 38 + int.from_bytes(one[36:38], "big")
    with pytest.raises(TamperedError):
        open_(one[:end] + two[end:])


@pytest.mark.parametrize(
    "data", [b"", b"HOLDFAST", b"PK\x03\x04" * 2000, b'{"data": {}}' * 500, b"\x00" * 5000]
)
def test_what_is_no_file_of_ours_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(MalformedTokenError):
        open_(data)


def test_a_file_opens_with_each_of_its_locks_and_with_no_other(sealed_for_both: bytes) -> None:
    assert open_(sealed_for_both) == PLAIN
    assert open_(sealed_for_both, PassphraseLock(PHRASE)) == PLAIN
    with pytest.raises(TamperedError, match="the passphrase is wrong or the file was changed"):
        open_(sealed_for_both, PassphraseLock(PHRASE.title()))
    with pytest.raises(UnknownKeyError, match=f"the file needs key {KEY.key_id.hex()}"):
        open_(sealed_for_both, KeyringLock(Keyring(OTHER)))


def test_a_lock_that_a_file_has_no_slot_for_says_so() -> None:
    with pytest.raises(UnknownKeyError, match="does not open with a passphrase"):
        open_(seal(PLAIN), PassphraseLock(PHRASE))
    with pytest.raises(UnknownKeyError, match="opens with a passphrase only"):
        open_(seal(PLAIN, locks=[PassphraseLock(PHRASE)]))


def test_a_rotated_keyring_opens_old_files_and_seals_for_its_primary() -> None:
    rotated = KeyringLock(Keyring(OTHER, [KEY]))
    assert open_(seal(PLAIN), rotated) == PLAIN
    assert open_(seal(PLAIN, locks=[rotated]), KeyringLock(Keyring(OTHER))) == PLAIN


def test_a_passphrase_slot_holds_16_random_bytes_and_a_cost_of_128_mib(
    sealed_for_both: bytes,
) -> None:
    slots = [
        slot
        for slot in files._parse_header(sealed_for_both[:HEADER])[3]
        if slot.kind == files.PASSPHRASE_SLOT
    ]
    again = PassphraseLock(PHRASE).wrap(bytes(32), b"")
    assert [len(slot.opener_id) for slot in slots] == [17]
    assert slots[0].opener_id[:16] != again.opener_id[:16]
    # OWASP: N = 2**17 with r = 8 and p = 1.
    assert slots[0].opener_id[16] == again.opener_id[16] == 17
    scrypt = hashlib.scrypt(
        PHRASE.encode(), salt=again.opener_id[:16], n=2**17, r=8, p=1, maxmem=2**28, dklen=32
    )
    opened = AESGCM(scrypt).decrypt(again.wrapped[:12], again.wrapped[12:], again.opener_id)
    assert opened == bytes(32)


@pytest.mark.parametrize(
    ("opener_id", "wrapped"),
    [
        # A cost that would take all memory, or none: refused before any is spent.
        (bytes(16) + b"\x3f", bytes(60)),
        (bytes(16) + b"\x15", bytes(60)),
        (bytes(16) + b"\x10", bytes(60)),
        (bytes(16) + b"\x00", bytes(60)),
        (bytes(15) + b"\x11", bytes(60)),
        (bytes(17) + b"\x11", bytes(60)),
        (b"", bytes(60)),
        # No room for a nonce.
        (bytes(16) + b"\x11", b""),
        (bytes(16) + b"\x11", bytes(11)),
    ],
    ids=["2**63", "2**21", "2**16", "2**0", "short", "long", "no id", "no nonce", "cut nonce"],
)
def test_a_forged_passphrase_slot_is_refused_as_damage(opener_id: bytes, wrapped: bytes) -> None:
    class Forger:
        def wrap(self, data_key: bytes, binding: bytes) -> Slot:  # noqa: ARG002 - its signature
            return Slot(files.PASSPHRASE_SLOT, opener_id, wrapped)

        def unwrap(self, slots: Iterable[Slot], binding: bytes) -> bytes:
            raise NotImplementedError

    with pytest.raises((MalformedTokenError, TamperedError)):
        open_(seal(PLAIN, locks=[Forger()]), PassphraseLock(PHRASE))


def test_slots_that_point_beyond_the_header_are_refused() -> None:
    data = seal(PLAIN)
    end = 38 + int.from_bytes(data[36:38], "big")
    for slots in (b"\xff", b"\x01\x01\xff", b"\x01\x01\x04xxxx\xff\xff", b"\x01" * 4000):
        forged = (data[:end] + slots).ljust(4064, b"\x00") + data[4064:]
        with pytest.raises(CryptoError):
            open_(forged)


def test_a_description_too_long_or_too_many_locks_are_refused_when_sealing() -> None:
    Sealer({"note": "x" * 2000}, [LOCK], now=NOW)
    with pytest.raises(ValueError, match="at most 2048 bytes"):
        Sealer({"note": "x" * 2048}, [LOCK], now=NOW)
    with pytest.raises(ValueError, match="too many openers"):
        Sealer(META, [LOCK] * 60, now=NOW)


# The opener streams, so whoever writes to a name must wait for its end.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, sqlite_service: Service) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["db_cli.py", *map(str, arguments)])
        monkeypatch.setenv("LOG_LEVEL", "ERROR")
        try:
            return db_cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0)

    return run


def _big(lock: Lock) -> bytes:
    """More than the opener reads at once, so that plain bytes come out before the end."""
    return seal(*[b"jane@example.com " * 60_000] * 3, locks=[lock])


def test_what_comes_out_of_a_cut_file_is_never_published(
    command: Callable[..., int], tmp_path: Path
) -> None:
    data = _big(get_encryption_service().file_lock())
    cut = Opener(io.BytesIO(data[:-1]), get_encryption_service().file_lock()).chunks()
    assert next(cut).startswith(b"jane@example.com ")
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in (("cut", data[:-1]), ("long", data + b"\x00"), ("whole", data)):
        file = tmp_path / name
        file.write_bytes(content)
        code = command("open", file, "-o", folder / "plain")
        assert code == (0 if name == "whole" else 1), name
        assert [path.name for path in folder.iterdir()] == (["plain"] if name == "whole" else [])
    assert (folder / "plain").read_bytes() == b"jane@example.com " * 180_000


def test_an_opened_file_is_its_owners_only_whatever_lay_there_before(
    command: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "sealed").write_bytes(seal(PLAIN, locks=[get_encryption_service().file_lock()]))
    # Anyone may put a file or a link there, in a folder that is shared.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch(0o644)
    (tmp_path / ".linked.partial").symlink_to(elsewhere)
    (tmp_path / ".open.partial").touch(0o644)
    for name in ("fresh", "open", "linked"):
        out = tmp_path / name
        if command("open", tmp_path / "sealed", "-o", out) == 0:
            assert out.read_bytes() == PLAIN
            assert not out.is_symlink(), name
            assert stat.S_IMODE(out.stat().st_mode) == 0o600, name
        assert name != "fresh" or out.exists()
    assert elsewhere.read_bytes() == b""
