"""
Encrypted files: a fixed 4 KiB header, then Cobblestone-256 (C2SP chunked-encryption).

Header layout, in bytes, integers big-endian:

    magic 8 | version 2 | suite 2 | file id 16 | created 8 | meta length 2 | meta (JSON)
    slot count 1 | per slot: type 1 | id length 1 | id | wrapped length 2 | wrapped data key
    zeros up to 4064 | HMAC-SHA256 32

The first line is immutable and bound to the payload as Cobblestone's context. The slots are not:
each holds the file's random data key, wrapped for one opener, so a new key rewrites 4 KiB and
not the file. The HMAC, under a key derived from the data key, covers the 4064 bytes before it.
"""

import hashlib
import hmac
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from backend.crypto.codecs import encode_text
from backend.crypto.keyring import Keyring, RootKey
from backend.crypto.values import Scope
from backend.errors import (
    CryptoError,
    MalformedTokenError,
    TamperedError,
    UnknownKeyError,
)

MAGIC: Final = b"HOLDFAST"
HEADER_BYTES: Final = 4096
# Larger blocks are slower: each output would be fresh memory of the system (benchmarks/).
READ_BYTES: Final = 64 * 1024
_MAC_BYTES: Final = 32
_PREFIX: Final = struct.Struct(">8sHH16sQH")
_VERSION: Final = 1
_SUITE_COBBLESTONE_256: Final = 1
_MAX_META_BYTES: Final = 2048
_FILE_KEY: Final = Scope("file key")
_INNER_KEY: Final = Scope("inner key")
_KEYRING_SLOT: Final = 1
PASSPHRASE_SLOT: Final = 2
# A root key that what is in the file needs, sealed with the primary one of a later time.
_INNER_KEY_SLOT: Final = 3
# OWASP: N = 2**17, r = 8, p = 1 (128 MiB). The factor is stored, so it may grow later.
_SCRYPT_LOG_N: Final = 17
_MAX_SCRYPT_LOG_N: Final = 20


@dataclass(frozen=True, slots=True)
class Slot:
    """The data key, wrapped for one opener."""

    kind: int
    opener_id: bytes
    wrapped: bytes


class Readable(Protocol):
    """A source of bytes; fewer than asked for may come, none only at the end."""

    def read(self, size: int, /) -> bytes: ...


class Lock(Protocol):
    """Wraps a data key and unwraps it again."""

    def wrap(self, data_key: bytes, binding: bytes) -> Slot: ...

    def unwrap(self, slots: Iterable[Slot], binding: bytes) -> bytes: ...


class KeyringLock:
    """Locks with the service's own keys."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def wrap(self, data_key: bytes, binding: bytes) -> Slot:
        wrapped = self._keyring.cipher(_FILE_KEY).seal(data_key, binding)
        return Slot(_KEYRING_SLOT, self._keyring.primary.key_id, wrapped)

    def unwrap(self, slots: Iterable[Slot], binding: bytes) -> bytes:
        wanted = []
        for slot in slots:
            if slot.kind != _KEYRING_SLOT:
                continue
            try:
                return self._keyring.cipher(_FILE_KEY).open(slot.wrapped, binding)
            except UnknownKeyError:
                wanted.append(slot.opener_id.hex())
        if wanted:
            raise UnknownKeyError(f"the file needs key {' or '.join(wanted)}")
        raise UnknownKeyError("the file opens with a passphrase only")

    def inner_slots(self, keys: Iterable[RootKey], binding: bytes) -> list[Slot]:
        """Seal *keys* into slots, so that the file's content opens without their configuration."""
        cipher = self._keyring.cipher(_INNER_KEY)
        return [
            Slot(_INNER_KEY_SLOT, key.key_id, key.sealed(cipher, binding + key.key_id))
            for key in keys
        ]

    def inner_keys(self, slots: Iterable[Slot], binding: bytes) -> list[RootKey]:
        """Return the keys that the file brings along for its content."""
        cipher = self._keyring.cipher(_INNER_KEY)
        return [
            RootKey(cipher.open(slot.wrapped, binding + slot.opener_id))
            for slot in slots
            if slot.kind == _INNER_KEY_SLOT
        ]


class PassphraseLock:
    """Locks with a passphrase, stretched by scrypt, so that a person can open their own file."""

    def __init__(self, passphrase: str) -> None:
        self._passphrase = encode_text(passphrase)

    def wrap(self, data_key: bytes, binding: bytes) -> Slot:
        opener_id = os.urandom(16) + bytes([_SCRYPT_LOG_N])
        nonce = os.urandom(12)
        sealed = AESGCM(self._stretch(opener_id)).encrypt(nonce, data_key, binding + opener_id)
        return Slot(PASSPHRASE_SLOT, opener_id, nonce + sealed)

    def unwrap(self, slots: Iterable[Slot], binding: bytes) -> bytes:
        for slot in slots:
            if slot.kind != PASSPHRASE_SLOT:
                continue
            try:
                return AESGCM(self._stretch(slot.opener_id)).decrypt(
                    slot.wrapped[:12], slot.wrapped[12:], binding + slot.opener_id
                )
            except (InvalidTag, ValueError):
                # ValueError: too short to hold a nonce and a tag.
                raise TamperedError("the passphrase is wrong or the file was changed") from None
        raise UnknownKeyError("the file does not open with a passphrase")

    def _stretch(self, opener_id: bytes) -> bytes:
        salt, log_n = opener_id[:16], opener_id[16:]
        if len(log_n) != 1 or not _SCRYPT_LOG_N <= log_n[0] <= _MAX_SCRYPT_LOG_N:
            raise MalformedTokenError("the file's passphrase slot is malformed")
        return Scrypt(salt=salt, length=32, n=2 ** log_n[0], r=8, p=1).derive(self._passphrase)


@dataclass(frozen=True, slots=True)
class PayloadKey:
    """What seals or opens one file's payload; it can be handed to another process."""

    data_key: bytes = field(repr=False)
    context: bytes

    def seal(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the payload for the plaintext in *chunks*."""
        encryptor = Cobblestone256Encryptor(self.data_key, self.context)
        for chunk in chunks:
            yield encryptor.update(chunk)
        yield encryptor.finalize()

    def open(self, source: Readable) -> Iterator[bytes]:
        """
        Yield the plaintext of the payload in *source*.

        Nothing may be published under its final name before the iterator has ended: only the
        end proves that the payload was not cut.

        Raises:
            TamperedError: The payload was changed, cut or extended.
        """
        decryptor = Cobblestone256Decryptor(self.data_key, self.context)
        try:
            while data := source.read(READ_BYTES):
                yield decryptor.update(data)
            yield decryptor.finalize()
        except InvalidTag:
            raise TamperedError("the file was cut, extended or changed") from None


class Sealer:
    """Encrypts one file as a stream: `header`, then the payload that `payload` seals."""

    def __init__(self, meta: Mapping[str, Any], locks: Iterable[Lock], *, now: datetime) -> None:
        data_key = Cobblestone256Encryptor.generate_key()
        immutable = _pack_immutable(meta, now)
        binding = hashlib.sha256(immutable).digest()
        slots = [lock.wrap(data_key, binding) for lock in locks]
        self.header = _pack_header(immutable, slots, data_key)
        self.payload = PayloadKey(data_key, _context(binding))

    def seal(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the whole encrypted file for the plaintext in *chunks*."""
        yield self.header
        yield from self.payload.seal(chunks)


class Opener:
    """
    Decrypts one file as a stream.

    Args:
        source: The whole file, or its header alone, for what `payload` then opens.

    Raises:
        MalformedTokenError: No file of ours, or a cut header.
        UnknownKeyError: *lock* fits no slot.
        TamperedError: Header or payload was changed, cut or extended.
    """

    def __init__(self, source: Readable, lock: Lock) -> None:
        header = source.read(HEADER_BYTES)
        immutable, self.meta, self.created_at, slots = _parse_header(header)
        binding = hashlib.sha256(immutable).digest()
        data_key = lock.unwrap(slots, binding)
        if not hmac.compare_digest(_header_mac(data_key, header), header[-_MAC_BYTES:]):
            raise TamperedError("the file's header was changed")
        self.inner_keys = lock.inner_keys(slots, binding) if isinstance(lock, KeyringLock) else []
        self._source = source
        self.payload = PayloadKey(data_key, _context(binding))

    def chunks(self) -> Iterator[bytes]:
        """Yield the plaintext; see `PayloadKey.open`."""
        return self.payload.open(self._source)


def rewrap(header: bytes, lock: KeyringLock, inner: Iterable[RootKey] = ()) -> bytes:
    """
    Return *header* with its data key wrapped for the primary key of *lock*.

    Args:
        inner: Previous keys that the content was sealed with; they are kept in the header, sealed,
            so that they need not stay configured.

    Raises:
        CryptoError: As `Opener`.
    """
    immutable, _, _, slots = _parse_header(header)
    binding = hashlib.sha256(immutable).digest()
    data_key = lock.unwrap(slots, binding)
    if not hmac.compare_digest(_header_mac(data_key, header), header[-_MAC_BYTES:]):
        raise TamperedError("the file's header was changed")
    kept = {key.key_id: key for key in (*lock.inner_keys(slots, binding), *inner)}
    new = [lock.wrap(data_key, binding), *lock.inner_slots(kept.values(), binding)]
    others = [slot for slot in slots if slot.kind == PASSPHRASE_SLOT]
    return _pack_header(immutable, new + others, data_key)


def _context(binding: bytes) -> bytes:
    return b"holdfast/file/v1" + binding


def _pack_immutable(meta: Mapping[str, Any], now: datetime) -> bytes:
    text = json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > _MAX_META_BYTES:
        raise ValueError("the description of a file has at most 2048 bytes")
    created = int(now.timestamp())
    prefix = _PREFIX.pack(
        MAGIC, _VERSION, _SUITE_COBBLESTONE_256, os.urandom(16), created, len(text)
    )
    return prefix + text


def _pack_header(immutable: bytes, slots: Iterable[Slot], data_key: bytes) -> bytes:
    packed = [
        bytes([slot.kind, len(slot.opener_id)])
        + slot.opener_id
        + len(slot.wrapped).to_bytes(2, "big")
        + slot.wrapped
        for slot in slots
    ]
    body = immutable + bytes([len(packed)]) + b"".join(packed)
    if len(body) > HEADER_BYTES - _MAC_BYTES:
        raise ValueError("too many openers for one header")
    body = body.ljust(HEADER_BYTES - _MAC_BYTES, b"\x00")
    return body + _header_mac(data_key, body)


def _header_mac(data_key: bytes, header: bytes) -> bytes:
    mac_key = HKDFExpand(SHA256(), 32, b"holdfast/file/v1 header").derive(data_key)
    return hmac.new(mac_key, header[: HEADER_BYTES - _MAC_BYTES], hashlib.sha256).digest()


def _parse_header(header: bytes) -> tuple[bytes, dict[str, Any], datetime, list[Slot]]:
    malformed = MalformedTokenError("this is no encrypted file of Holdfast")
    if len(header) != HEADER_BYTES or not header.startswith(MAGIC):
        raise malformed
    _, version, suite, _, created, meta_bytes = _PREFIX.unpack_from(header)
    if (version, suite) != (_VERSION, _SUITE_COBBLESTONE_256):
        raise CryptoError(f"the file has format {version}.{suite}, which is not known here")
    end = _PREFIX.size + meta_bytes
    if meta_bytes > _MAX_META_BYTES:
        raise malformed
    try:
        meta = json.loads(header[_PREFIX.size : end])
        created_at = datetime.fromtimestamp(created, UTC)
    except (ValueError, OverflowError, OSError, RecursionError):
        raise malformed from None
    return header[:end], meta, created_at, list(_parse_slots(header[end:-_MAC_BYTES]))


def _parse_slots(data: bytes) -> Iterator[Slot]:
    count, at = data[0], 1
    for _ in range(count):
        if at + 2 > len(data):
            raise MalformedTokenError("the file's key slots are malformed")
        kind, id_bytes = data[at], data[at + 1]
        wrapped_at = at + 2 + id_bytes + 2
        wrapped_bytes = int.from_bytes(data[wrapped_at - 2 : wrapped_at], "big")
        at, opener_id = wrapped_at + wrapped_bytes, data[at + 2 : wrapped_at - 2]
        if at > len(data):
            raise MalformedTokenError("the file's key slots are malformed")
        yield Slot(kind, opener_id, data[wrapped_at:at])
