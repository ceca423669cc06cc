"""An archive opens to exactly what went in, or not at all; so does its manifest."""

import hashlib
import hmac
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.backup.archive import (
    DigestingReader,
    Manifest,
    claimed_keys,
    decompress,
    delete_backup,
    manifest_name,
    newest_digest,
    read_manifest,
    stored_ids,
    write_archive,
    write_manifest,
)
from backend.backup.storage import LocalStore
from backend.crypto.files import KeyringLock, Opener, Sealer
from backend.crypto.keyring import Keyring, RootKey
from backend.errors import BackupDamagedError, NotFoundError, TamperedError

KEYS = Keyring(RootKey(bytes(range(32))))
NOW = datetime(2026, 3, 1, tzinfo=UTC)
MANIFEST = Manifest(
    id="11111111-1111-1111-1111-111111111111",
    label="nightly",
    created_at=NOW.isoformat(),
    engine="sqlite",
    schema_revision="0001",
    tables={"users": 3},
    key_id=KEYS.primary.key_id.hex(),
    plain_bytes=5,
    size_bytes=7,
    sha256="00" * 32,
    previous=None,
)


def _sealer() -> Sealer:
    return Sealer({"kind": "backup"}, [KeyringLock(KEYS)], now=NOW)


def _archive(plain: Iterable[bytes]) -> tuple[bytes, Manifest]:
    file = io.BytesIO()
    written = write_archive(file, plain, _sealer().seal)
    return file.getvalue(), replace(
        MANIFEST,
        plain_bytes=written.plain_bytes,
        size_bytes=written.size_bytes,
        sha256=written.sha256,
    )


def _open(stored: bytes, manifest: Manifest) -> bytes:
    reader = DigestingReader(io.BytesIO(stored), manifest)
    opener = Opener(reader, KeyringLock(KEYS))  # type: ignore[arg-type] # it reads, and no more
    plain = b"".join(decompress(opener.chunks(), manifest.plain_bytes))
    if not reader.is_whole():
        raise BackupDamagedError("the stored backup is not the one its manifest names")
    return plain


def _sign(key_id: str) -> Callable[[bytes], str]:
    return lambda body: hmac.new(key_id.encode(), body, hashlib.sha256).hexdigest()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=12))
def test_an_archive_opens_to_what_went_in(chunks: list[bytes]) -> None:
    stored, manifest = _archive(chunks)
    assert _open(stored, manifest) == b"".join(chunks)
    assert manifest.plain_bytes == sum(map(len, chunks))
    assert manifest.size_bytes == len(stored)
    assert manifest.sha256 == hashlib.sha256(stored).hexdigest()


def test_an_archive_larger_than_any_buffer_opens_to_what_went_in() -> None:
    chunks = [os.urandom(700_000) for _ in range(5)]
    stored, manifest = _archive(chunks)
    assert _open(stored, manifest) == b"".join(chunks)


def test_an_archive_is_compressed_and_hides_what_is_in_it() -> None:
    stored, _ = _archive([b"jane@example.com " * 20_000])
    assert len(stored) < 20_000
    assert b"jane" not in stored


def test_a_dump_that_fails_leaves_an_archive_that_cannot_be_opened() -> None:
    def dump() -> Iterator[bytes]:
        yield os.urandom(100_000)
        raise OSError("the dump tool died")

    file = io.BytesIO()
    with pytest.raises(OSError, match="died"):
        write_archive(file, dump(), _sealer().seal)
    with pytest.raises(TamperedError):
        b"".join(Opener(io.BytesIO(file.getvalue()), KeyringLock(KEYS)).chunks())


def _compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def _pieces(data: bytes) -> list[bytes]:
    return [data[at : at + 1000] for at in range(0, len(data), 1000)]


def test_a_bomb_is_stopped_long_before_it_has_unpacked() -> None:
    bomb = _compressed(bytes(200_000_000))
    assert len(bomb) < 20_000
    unpacked: list[int] = []
    with pytest.raises(BackupDamagedError, match="more than its manifest says"):
        unpacked.extend(map(len, decompress(_pieces(bomb), 1_000_000)))
    assert sum(unpacked) <= 1_000_000


@pytest.mark.parametrize("claimed", [0, 4999, 5001])
def test_another_length_than_the_manifest_says_is_refused(claimed: int) -> None:
    data = os.urandom(5000)
    assert b"".join(decompress(_pieces(_compressed(data)), 5000)) == data
    with pytest.raises(BackupDamagedError):
        b"".join(decompress(_pieces(_compressed(data)), claimed))


@pytest.mark.parametrize("extra", [b"\x00", b"more", _compressed(b"")])
def test_bytes_behind_the_end_are_refused(extra: bytes) -> None:
    whole = _compressed(b"data")
    for chunks in ([whole + extra], [whole, extra]):
        with pytest.raises(BackupDamagedError):
            b"".join(decompress(chunks, 4))


def test_a_cut_stream_is_refused_wherever_it_is_cut() -> None:
    whole = _compressed(os.urandom(300))
    for end in range(0, len(whole), 7):
        with pytest.raises(BackupDamagedError):
            b"".join(decompress([whole[:end]], 300))


def test_what_is_not_zstd_is_refused() -> None:
    with pytest.raises(BackupDamagedError):
        b"".join(decompress([b"plain text"], 10))


def test_an_archive_swapped_for_another_of_the_same_service_is_refused() -> None:
    stored, manifest = _archive([b"data"])
    other, _ = _archive([b"data"])
    assert _open(stored, manifest) == b"data"
    with pytest.raises(BackupDamagedError, match="not the one its manifest names"):
        _open(other, manifest)


def test_the_digest_covers_what_nobody_has_read() -> None:
    stored, manifest = _archive([b"data"])
    assert DigestingReader(io.BytesIO(stored), manifest).is_whole()
    assert not DigestingReader(io.BytesIO(stored + b"\x00"), manifest).is_whole()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


def _rewrite(store: LocalStore, data: bytes) -> None:
    store.delete(manifest_name(MANIFEST.id))
    with store.create(manifest_name(MANIFEST.id)) as file:
        file.write(data)


def test_a_manifest_is_read_back_as_it_was_written(store: LocalStore) -> None:
    assert stored_ids(store) == []
    write_manifest(store, MANIFEST, _sign(MANIFEST.key_id))
    assert read_manifest(store, MANIFEST.id, _sign) == MANIFEST
    assert stored_ids(store) == [MANIFEST.id]
    assert claimed_keys(store) == {MANIFEST.id: {MANIFEST.key_id}}


CHANGES: list[dict[str, Any]] = [
    {"label": "weekly"},
    {"created_at": "2026-03-02T00:00:00+00:00"},
    {"engine": "postgresql"},
    {"schema_revision": "0002"},
    {"tables": {"users": 4}},
    {"key_id": "00000000"},
    {"plain_bytes": 2**40},
    {"size_bytes": 8},
    {"sha256": "11" * 32},
    {"previous": "11" * 32},
    {"id": "22222222-2222-2222-2222-222222222222"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_no_field_of_a_manifest_can_be_changed(store: LocalStore, change: dict[str, Any]) -> None:
    write_manifest(store, MANIFEST, _sign(MANIFEST.key_id))
    document = json.loads(store.read(manifest_name(MANIFEST.id), 10_000))
    document["manifest"] |= change
    _rewrite(store, json.dumps(document).encode())
    with pytest.raises(BackupDamagedError):
        read_manifest(store, MANIFEST.id, _sign)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"manifest": {}, "mac": ""}',
        b'{"manifest": 7, "mac": 7}',
        json.dumps({"manifest": asdict(MANIFEST) | {"more": 1}, "mac": ""}).encode(),
        json.dumps({"manifest": asdict(MANIFEST), "mac": None}).encode(),
        b"[" * 100_000,
    ],
    ids=range(10),
)
def test_what_is_no_manifest_is_refused(store: LocalStore, raw: bytes) -> None:
    _rewrite(store, raw)
    with pytest.raises(BackupDamagedError):
        read_manifest(store, MANIFEST.id, _sign)


def test_a_manifest_of_another_backup_does_not_stand_in(store: LocalStore) -> None:
    other = replace(MANIFEST, id="22222222-2222-2222-2222-222222222222")
    write_manifest(store, other, _sign(MANIFEST.key_id))
    _rewrite(store, store.read(manifest_name(other.id), 10_000))
    with pytest.raises(BackupDamagedError):
        read_manifest(store, MANIFEST.id, _sign)
    assert read_manifest(store, other.id, _sign) == other


def test_a_deleted_backup_is_not_found(store: LocalStore) -> None:
    write_manifest(store, MANIFEST, _sign(MANIFEST.key_id))
    delete_backup(store, MANIFEST.id)
    assert stored_ids(store) == []
    with pytest.raises(NotFoundError):
        read_manifest(store, MANIFEST.id, _sign)


def test_the_newest_manifest_is_the_one_that_the_next_names(store: LocalStore) -> None:
    later = replace(
        MANIFEST, id="00000000-1111-1111-1111-111111111111", created_at="2026-03-02T00:00:00+00:00"
    )
    assert newest_digest(store, []) is None
    for manifest in (MANIFEST, later):
        write_manifest(store, manifest, _sign(MANIFEST.key_id))
    raw = store.read(manifest_name(later.id), 10_000)
    assert newest_digest(store, [later, MANIFEST]) == hashlib.sha256(raw).hexdigest()
