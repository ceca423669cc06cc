"""
The archive of one backup: zstd, then encryption, then digest, as one stream in constant memory;
and its manifest, written last, which is the commit mark.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Final

import zstandard

from backend.backup.storage import LocalStore
from backend.errors import BackupDamagedError

# Level 3 took 60 % of a whole backup and gave 2.4x; see benchmarks/.
_ZSTD_LEVEL: Final = 3
_READ_BYTES: Final = 1024 * 1024
_MAX_MANIFEST_BYTES: Final = 1024 * 1024
_MANIFEST_SUFFIX: Final = ".manifest.json"
_ARCHIVE_SUFFIX: Final = ".hfb"

_ID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

Sign = Callable[[bytes], str]
Chunks = Iterator[bytes]


@dataclass(frozen=True, slots=True)
class Manifest:
    """
    What one backup is: sizes in bytes, digests as hex, times in ISO 8601 UTC.

    *previous* is the digest of the manifest before, so that a missing or swapped backup shows.
    *row_keys* are the keys that the rows in it need beside *key_id*, which its header needs.
    """

    id: str
    label: str | None
    created_at: str
    engine: str
    schema_revision: str
    tables: dict[str, int]
    key_id: str
    plain_bytes: int
    size_bytes: int
    sha256: str
    previous: str | None
    row_keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Written:
    """How many bytes went in and came out, and the SHA-256 of what was stored."""

    plain_bytes: int
    size_bytes: int
    sha256: str


def archive_name(backup_id: str) -> str:
    return f"{backup_id}{_ARCHIVE_SUFFIX}"


def manifest_name(backup_id: str) -> str:
    return f"{backup_id}{_MANIFEST_SUFFIX}"


def write_archive(
    file: BinaryIO, plain: Iterable[bytes], seal: Callable[[Iterable[bytes]], Chunks]
) -> Written:
    """
    Write *plain* to *file*, compressed and sealed.

    An exception of *plain* (a failed dump) passes through before the last chunk is written, so a
    broken archive can never be opened.
    """
    hasher = hashlib.sha256()
    sizes = {"in": 0, "out": 0}

    def compressed() -> Chunks:
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compressobj()
        for chunk in plain:
            sizes["in"] += len(chunk)
            yield compressor.compress(chunk)
        yield compressor.flush()

    for chunk in seal(compressed()):
        hasher.update(chunk)
        sizes["out"] += len(chunk)
        file.write(chunk)
    return Written(sizes["in"], sizes["out"], hasher.hexdigest())


class DigestingReader:
    """Reads a stored archive and checks, at its end, that it is the one the manifest names."""

    def __init__(self, file: BinaryIO, manifest: Manifest) -> None:
        self._file = file
        self._manifest = manifest
        self._hasher = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hasher.update(data)
        return data

    def is_whole(self) -> bool:
        """Read to the end, and say whether all of it is what the manifest names."""
        while self.read(_READ_BYTES):
            pass
        return self._hasher.hexdigest() == self._manifest.sha256


def decompress(sealed: Iterable[bytes], plain_bytes: int) -> Chunks:
    """
    Yield what was compressed.

    Raises:
        BackupDamagedError: Not zstd, cut, followed by more, or not *plain_bytes* long; a bomb is
            stopped as soon as it is longer.
    """
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    seen = 0
    try:
        for chunk in sealed:
            if decompressor.eof:
                raise BackupDamagedError("the backup goes on behind its end")
            data = decompressor.decompress(chunk)
            seen += len(data)
            if seen > plain_bytes:
                raise BackupDamagedError("the backup unpacks to more than its manifest says")
            yield data
    except zstandard.ZstdError:
        raise BackupDamagedError("the backup cannot be unpacked") from None
    if not decompressor.eof or decompressor.unused_data or seen != plain_bytes:
        raise BackupDamagedError("the backup is not whole")


def write_manifest(store: LocalStore, manifest: Manifest, sign: Sign) -> None:
    """Write the manifest: from here on the backup exists."""
    with store.create(manifest_name(manifest.id)) as file:
        file.write(manifest_text(manifest, sign))


def manifest_text(manifest: Manifest, sign: Sign) -> bytes:
    """Spell a manifest with its signature."""
    body = asdict(manifest)
    return json.dumps({"manifest": body, "mac": sign(_canonical(body))}, indent=1).encode()


def read_manifest(store: LocalStore, backup_id: str, sign_with: Callable[[str], Sign]) -> Manifest:
    """
    Read and authenticate one manifest.

    Args:
        sign_with: Returns the signing function for a key id; raises for an unknown key.

    Raises:
        NotFoundError: No such backup.
        BackupDamagedError: It was changed, or is another backup's.
        UnknownKeyError: Its key is not configured.
    """
    raw = store.read(manifest_name(backup_id), _MAX_MANIFEST_BYTES)
    damaged = BackupDamagedError("the manifest of the backup was changed")
    try:
        document: dict[str, Any] = json.loads(raw)
        body, mac = document["manifest"], document["mac"]
        manifest = Manifest(**body)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged from None
    expected = sign_with(manifest.key_id)(_canonical(body))
    if not hmac.compare_digest(str(mac).encode(), expected.encode()) or manifest.id != backup_id:
        raise damaged
    return manifest


def stored_ids(store: LocalStore) -> list[str]:
    """List the backups that exist: those with a manifest. A stray file is none."""
    names = (name.removesuffix(_MANIFEST_SUFFIX) for name in store.names("", _MANIFEST_SUFFIX))
    return [name for name in names if _ID.fullmatch(name)]


def claimed_keys(store: LocalStore) -> dict[str, set[str]]:
    """Return which keys each stored backup says it needs, by id; not authenticated."""
    claimed = {}
    for backup_id in stored_ids(store):
        raw = store.read(manifest_name(backup_id), _MAX_MANIFEST_BYTES)
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            said = json.loads(raw)["manifest"]
            needed = [said["key_id"], *said.get("row_keys", ())]
            claimed[backup_id] = {str(key_id)[:8] for key_id in needed}
    return claimed


def newest_digest(store: LocalStore, manifests: Iterable[Manifest]) -> str | None:
    """Return the SHA-256 of the newest manifest as it is stored, as hex."""
    newest = max(manifests, key=lambda m: m.created_at, default=None)
    if newest is None:
        return None
    raw = store.read(manifest_name(newest.id), _MAX_MANIFEST_BYTES)
    return hashlib.sha256(raw).hexdigest()


def delete_backup(store: LocalStore, backup_id: str) -> None:
    """Remove a backup: its manifest first, so that it is never listed without its archive."""
    store.delete(manifest_name(backup_id))
    store.delete(archive_name(backup_id))


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
