"""
Removing objects of S3 for good: on a bucket with versions a delete only hides.

Versions that an object lock keeps stay until its date; `sweep_versions` removes them after it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from backend.backup.s3.bucket import Bucket, BucketRefusedError
from backend.backup.s3.upload import MARK
from backend.errors import NotFoundError


@dataclass(slots=True)
class _History:
    """The versions of one key, and the marks that hide them, as S3 lists both."""

    versions: list[Any] = field(default_factory=list)
    delete_markers: list[Any] = field(default_factory=list)


def remove(bucket: Bucket, key: str) -> None:
    """
    Hide an object, and remove what versions of it no lock keeps; none at all is no error.

    Raises:
        BucketRefusedError: A version could be removed but for the rights of these credentials:
            the data would stay for ever, and nobody would know.
    """
    answer = bucket.ask("delete_object", Key=key)
    if answer.get("DeleteMarker"):
        history = _histories(bucket, key).get(key, _History())
        _clear(bucket, key, history, only_marked=False)


def sweep_versions(bucket: Bucket) -> int:
    """Remove the unlocked versions of deleted and of replaced objects of ours; return how many."""
    return sum(
        _clear(bucket, key, history, only_marked=True)
        for key, history in _histories(bucket, bucket.address.prefix).items()
        if bucket.address.name(key)
    )


def _histories(bucket: Bucket, prefix: str) -> dict[str, _History]:
    found: dict[str, _History] = {}
    for page in bucket.pages("list_object_versions", Prefix=prefix, Delimiter="/"):
        for version in page.get("Versions", ()):
            found.setdefault(version["Key"], _History()).versions.append(version)
        for marker in page.get("DeleteMarkers", ()):
            found.setdefault(marker["Key"], _History()).delete_markers.append(marker)
    return found


def _clear(bucket: Bucket, key: str, history: _History, *, only_marked: bool) -> int:
    old = [version for version in history.versions if not version["IsLatest"]]
    gone = sum(_remove(bucket, key, version["VersionId"], only_marked) for version in old)
    # A marker that went before the last version would bring that one back.
    if gone == len(history.versions):
        for marker in history.delete_markers:
            bucket.ask("delete_object", Key=key, VersionId=marker["VersionId"])
    return gone


def _remove(bucket: Bucket, key: str, version: str, only_marked: bool) -> bool:
    try:
        found = bucket.ask("head_object", Key=key, VersionId=version)
    except NotFoundError:
        return True
    # Another's object in our folder is none of our business.
    if only_marked and MARK not in found["Metadata"]:
        return False
    try:
        bucket.ask("delete_object", Key=key, VersionId=version)
    except BucketRefusedError:
        if _is_locked(found):
            return False
        raise
    return True


def _is_locked(found: Any) -> bool:
    # The store decides by its own clock: this only tells a lock from missing rights.
    until = found.get("ObjectLockRetainUntilDate")
    return found.get("ObjectLockLegalHoldStatus") == "ON" or (
        until is not None and until > datetime.now(UTC)
    )
