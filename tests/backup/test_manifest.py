"""A manifest says what was written and signed, or it is refused; nothing else passes for one."""

import hashlib
import hmac
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from backend.backup.manifest import (
    Manifest,
    claimed_keys,
    manifest_name,
    read_manifest,
    stored_ids,
    write_manifest,
)
from backend.backup.storage import LocalStore
from backend.errors import BackupDamagedError, ConflictError, SchemaMismatchError, UnknownKeyError

NOW: Final = datetime(2026, 3, 1, tzinfo=UTC)
KEY_ID: Final = "01020304"
OTHER_KEY_ID: Final = "05060708"
LONG_AGO: Final = NOW - timedelta(days=365)
FIRST: Final = "11111111-1111-1111-1111-111111111111"
SECOND: Final = "22222222-2222-2222-2222-222222222222"
# One that names no key, or a wrong one, is told as needing a key that is not there.
REFUSED: Final = (BackupDamagedError, UnknownKeyError)
MANIFEST: Final = Manifest(
    id=FIRST,
    label="nightly",
    created_at=NOW.isoformat(),
    engine="sqlite",
    schema_revision="0001",
    tables={"users": 3, "bookings": 10},
    plain_bytes=5,
    size_bytes=7,
    sha256="00" * 32,
    previous={"id": SECOND, "created_at": LONG_AGO.isoformat(), "link": "22" * 32},
    key_id=KEY_ID,
    row_keys=[KEY_ID],
)


def _sign_with(key_id: str) -> Callable[[bytes], str]:
    if key_id not in {KEY_ID, OTHER_KEY_ID}:
        raise UnknownKeyError("no such key")
    return lambda body: hmac.new(key_id.encode(), body, hashlib.sha256).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


def _write(store: LocalStore, manifest: Manifest = MANIFEST) -> dict[str, Any]:
    write_manifest(store, manifest, _sign_with(manifest.key_id))
    document: dict[str, Any] = json.loads(store.read(manifest_name(manifest.id), 10_000))
    return document


def _put(store: LocalStore, data: bytes, backup_id: str = FIRST) -> None:
    store.replace(manifest_name(backup_id), data)


def _read(store: LocalStore, backup_id: str = FIRST) -> Manifest:
    return read_manifest(store, backup_id, _sign_with)


def test_a_manifest_is_read_back_as_it_was_written(store: LocalStore) -> None:
    assert stored_ids(store) == []
    _write(store)
    assert _read(store) == MANIFEST
    assert stored_ids(store) == [FIRST]
    assert claimed_keys(store) == {FIRST: {KEY_ID}}


def test_a_manifest_is_never_written_twice(store: LocalStore) -> None:
    _write(store)
    with pytest.raises(ConflictError):
        write_manifest(store, replace(MANIFEST, label="other"), _sign_with(KEY_ID))
    assert _read(store) == MANIFEST


CHANGES: Final[list[dict[str, Any]]] = [
    {"label": "weekly"},
    {"created_at": "2026-03-02T00:00:00+00:00"},
    {"engine": "postgresql"},
    {"schema_revision": "0002"},
    {"tables": {"users": 4, "bookings": 10}},
    {"plain_bytes": 2**40},
    {"size_bytes": 8},
    {"sha256": "11" * 32},
    {"previous": None},
    {"payload_offset": 4096},
    {"kind": "diff"},
    {"repository_label": "20260301-000000F"},
    {"id": SECOND},
    {"more": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_no_field_of_a_manifest_can_be_changed(store: LocalStore, change: dict[str, Any]) -> None:
    document = _write(store)
    document["manifest"] |= change
    _put(store, json.dumps(document).encode())
    with pytest.raises(BackupDamagedError):
        _read(store)


@pytest.mark.parametrize(
    "keys",
    [{"key_id": OTHER_KEY_ID}, {"row_keys": []}, {"row_keys": [OTHER_KEY_ID]}, {"more": 1}],
    ids=str,
)
def test_the_keys_that_a_manifest_names_cannot_be_changed(
    store: LocalStore, keys: dict[str, Any]
) -> None:
    document = _write(store)
    document["keys"] |= keys
    _put(store, json.dumps(document).encode())
    with pytest.raises(BackupDamagedError):
        _read(store)


def test_a_manifest_that_needs_a_key_we_do_not_have_is_told_as_that(store: LocalStore) -> None:
    document = _write(store)
    document["keys"] |= {"key_id": "00000000"}
    _put(store, json.dumps(document).encode())
    with pytest.raises(UnknownKeyError):
        _read(store)


def test_no_bit_of_a_manifest_can_be_flipped(store: LocalStore, tmp_path: Path) -> None:
    _write(store)
    path = tmp_path / "store" / manifest_name(FIRST)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(REFUSED):
            _read(store)


def test_a_manifest_cut_anywhere_is_refused(store: LocalStore, tmp_path: Path) -> None:
    _write(store)
    path = tmp_path / "store" / manifest_name(FIRST)
    whole = path.read_bytes()
    for end in range(0, len(whole), 3):
        path.write_bytes(whole[:end])
        with pytest.raises(BackupDamagedError):
            _read(store)


def _with(**changes: Any) -> bytes:
    """A document whose parts have wrong types; its signature is right where there can be one."""
    body = {
        "format": 2,
        "manifest": json.loads(MANIFEST.document(_sign_with(KEY_ID)))["manifest"],
        "keys": {"key_id": KEY_ID, "row_keys": [KEY_ID]},
    } | changes
    signed = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({"mac": _sign_with(KEY_ID)(signed)} | body).encode()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"NaN",
        b"\xff\xfe",
        b"\x00" * 1000,
        b'{"manifest": {}, "mac": ""}',
        b'{"manifest": 7, "mac": 7}',
        b'{"format": 2, "manifest": {}, "keys": {}, "mac": ""}',
        _with(manifest=7),
        _with(manifest=[["id", FIRST]]),
        _with(manifest={"id": FIRST}),
        _with(keys=None),
        _with(keys=[KEY_ID]),
        _with(keys={"key_id": 7, "row_keys": []}),
        _with(keys={"key_id": None, "row_keys": []}),
        _with(mac=None),
        _with(mac=["00"]),
        _with(mac="\u00fc" * 64),
        b"9" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": 2, "manifest": ' * 10_000,
    ],
    ids=range(25),
)
def test_what_is_no_manifest_is_refused(store: LocalStore, raw: bytes) -> None:
    _put(store, raw)
    with pytest.raises(REFUSED):
        _read(store)
    assert stored_ids(store) == [FIRST]
    claimed_keys(store)


def test_a_signature_that_cannot_be_spelled_is_refused(store: LocalStore) -> None:
    _put(store, _with(mac="\ud800" * 64))
    with pytest.raises(BackupDamagedError):
        _read(store)


def test_a_manifest_of_any_depth_is_refused(store: LocalStore) -> None:
    limit = sys.getrecursionlimit()
    for depth in range(limit - 200, limit):
        nested = "[" * depth + "]" * depth
        _put(store, _with().replace(b'"users": 3', b'"users": ' + nested.encode()))
        with pytest.raises(BackupDamagedError):
            _read(store)


def test_a_manifest_of_a_hundred_megabytes_is_refused_and_not_read_whole(
    store: LocalStore, tmp_path: Path
) -> None:
    _write(store)
    path = tmp_path / "store" / manifest_name(FIRST)
    with path.open("r+b") as file:
        # Zeros that take no room on the disk.
        file.truncate(100 * 1024 * 1024)
    with pytest.raises(BackupDamagedError):
        _read(store)
    assert claimed_keys(store) == {}


def test_a_manifest_with_more_behind_its_end_is_refused(store: LocalStore) -> None:
    whole = MANIFEST.document(_sign_with(KEY_ID))
    _put(store, whole + b" " * (1024 * 1024) + b"more")
    with pytest.raises(BackupDamagedError):
        _read(store)


def test_a_manifest_of_a_newer_format_is_refused_as_that(store: LocalStore) -> None:
    _put(store, _with(format=3))
    with pytest.raises(SchemaMismatchError, match="newer version"):
        _read(store)


def test_a_manifest_cannot_be_passed_off_as_one_of_the_first_format(store: LocalStore) -> None:
    document = _write(store)
    inner = {name: document[name] for name in ("format", "manifest", "keys")}
    flat = document["manifest"] | document["keys"]
    for manifest in (inner, flat, document["manifest"]):
        _put(store, json.dumps({"manifest": manifest, "mac": document["mac"]}).encode())
        with pytest.raises(REFUSED):
            _read(store)


def test_a_manifest_of_another_backup_does_not_stand_in(store: LocalStore) -> None:
    other = replace(MANIFEST, id=SECOND)
    _write(store, other)
    _put(store, store.read(manifest_name(SECOND), 10_000))
    with pytest.raises(BackupDamagedError, match="another backup's"):
        _read(store)
    assert _read(store, SECOND) == other


def test_a_manifest_given_to_another_key_is_the_same_link_of_the_chain(store: LocalStore) -> None:
    before = _write(store)
    changed = replace(MANIFEST, key_id=OTHER_KEY_ID, row_keys=[OTHER_KEY_ID])
    _put(store, changed.document(_sign_with(OTHER_KEY_ID)))
    found = _read(store)
    assert (found.key_id, found.link) == (OTHER_KEY_ID, MANIFEST.link)
    assert json.loads(store.read(manifest_name(FIRST), 10_000))["mac"] != before["mac"]
    assert claimed_keys(store) == {FIRST: {OTHER_KEY_ID}}


def test_every_lasting_field_is_part_of_the_link() -> None:
    links = {replace(MANIFEST, **change).link for change in CHANGES if "more" not in change}
    assert len(links | {MANIFEST.link}) == len(CHANGES)


@pytest.mark.parametrize("later", ["kind", "payload_offset", "repository_label"])
def test_a_manifest_of_before_a_field_was_there_is_the_link_that_it_was(
    store: LocalStore, later: str
) -> None:
    lasting = json.loads(MANIFEST.document(_sign_with(KEY_ID)))["manifest"]
    lasting.pop(later, None)
    _put(store, _with(manifest=lasting))
    spelled = json.dumps(lasting, sort_keys=True, separators=(",", ":")).encode()
    assert _read(store).link == hashlib.sha256(spelled).hexdigest()


@pytest.mark.parametrize("key_id", ["\x1b[31mred", "", 7, "0102030G"])
def test_what_is_no_id_of_a_key_claims_none(store: LocalStore, key_id: object) -> None:
    _put(store, _with(keys={"key_id": key_id, "row_keys": [KEY_ID]}))
    assert claimed_keys(store).get(FIRST, {KEY_ID}) == {KEY_ID}
