"""
A new key for a stored backup: its header and its manifest are rewritten, its payload is not.

A header that is overwritten in its place could be cut by a crash. So the new one is stored beside
the archive first, then the manifest is replaced, which decides, and only then the header is
written; what a killed process left is finished or dropped by `finish_rewraps`.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final

from backend.backup.archive import (
    Manifest,
    Sign,
    archive_name,
    manifest_name,
    manifest_text,
)
from backend.backup.storage import LocalStore
from backend.errors import BackupDamagedError, NotFoundError

_SUFFIX: Final = ".rewrap"
_READ_BYTES: Final = 1024 * 1024
_MAX_BYTES: Final = 1024 * 1024
_DIGEST_CHARS: Final = 64


def rewrap_backup(
    store: LocalStore,
    manifest: Manifest,
    rewrap: Callable[[bytes], bytes],
    *,
    header_bytes: int,
    key_id: str,
    sign: Sign,
) -> Manifest:
    """
    Give the backup of *manifest* to the key *key_id*.

    Args:
        rewrap: Returns the archive's header for the new key.
        sign: Signs the manifest with the new key.

    Raises:
        BackupDamagedError: The archive is not the one that the manifest names.
    """
    before, after = hashlib.sha256(), hashlib.sha256()
    with store.open(archive_name(manifest.id)) as file:
        old = file.read(header_bytes)
        header = rewrap(old)
        before.update(old)
        after.update(header)
        while data := file.read(_READ_BYTES):
            before.update(data)
            after.update(data)
    if before.hexdigest() != manifest.sha256:
        raise BackupDamagedError("the stored backup is not the one its manifest names")
    changed = replace(manifest, key_id=key_id, sha256=after.hexdigest(), row_keys=[key_id])
    store.replace(manifest.id + _SUFFIX, changed.sha256.encode() + header)
    store.replace(manifest_name(manifest.id), manifest_text(changed, sign))
    _finish(store, manifest.id)
    return changed


def finish_rewraps(store: LocalStore) -> int:
    """Finish or drop what a killed process left; return how many there were."""
    left = store.names("", _SUFFIX)
    for name in left:
        _finish(store, name.removesuffix(_SUFFIX))
    return len(left)


def _finish(store: LocalStore, backup_id: str) -> None:
    journal = store.read(backup_id + _SUFFIX, _MAX_BYTES)
    digest, header = journal[:_DIGEST_CHARS].decode("ascii", "replace"), journal[_DIGEST_CHARS:]
    with suppress(NotFoundError, ValueError, TypeError, KeyError):
        raw = store.read(manifest_name(backup_id), _MAX_BYTES)
        if json.loads(raw)["manifest"]["sha256"] == digest:
            store.overwrite_head(archive_name(backup_id), header)
    store.delete(backup_id + _SUFFIX)
