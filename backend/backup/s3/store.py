"""
A bucket of S3, or of a server that speaks its protocol, as a place for backups.

The prefix is ours alone: `sweep` aborts every upload directly below it. The credentials need
`s3:ListBucket`, `ListBucketVersions`, `ListBucketMultipartUploads`, `GetObject`, `PutObject`,
`DeleteObject`, `AbortMultipartUpload` and `ListMultipartUploadParts`; with versions also
`GetObjectVersion` and `DeleteObjectVersion`; with a lock `GetBucketObjectLockConfiguration`,
`PutObjectRetention`, `GetObjectRetention`, and *not* `BypassGovernanceRetention`.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, BinaryIO, Final, cast

from backend.backup.s3.bucket import Bucket, BucketRefusedError
from backend.backup.s3.copy import NOTE_SUFFIX, copy_in_parts, is_going_on
from backend.backup.s3.download import download
from backend.backup.s3.upload import PART_BYTES, Upload, new_mark, put_whole
from backend.backup.s3.versions import remove, sweep_versions
from backend.backup.storage import Store
from backend.errors import ConflictError, NotFoundError

# People may have to be forgotten before a lock ends, and a wrong date must not bind for ever:
# GOVERNANCE lets a person with a right of their own remove a version, and these credentials not.
# A bucket whose default is COMPLIANCE says that its owner wants otherwise.
_LOCK_MODE: Final = "GOVERNANCE"
_NO_LOCK: Final = frozenset(
    {"ObjectLockConfigurationNotFoundError", "NotImplemented", "MethodNotAllowed"}
)
_COPY_BYTES: Final = 1024 * 1024


class S3Store:
    """
    `s3://bucket/prefix`; asks nothing before it is used.

    Args:
        endpoint_url: Another server than AWS.
        region: Of the bucket; None takes what the environment of AWS tools says.
        lock_until: Until when a bucket with object lock keeps what is written now.

    Raises:
        ConfigurationError: The address or the endpoint is none, or boto3 is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint_url: str | None,
        region: str | None,
        lock_until: Callable[[], datetime] | None = None,
    ) -> None:
        self._bucket = Bucket(url, endpoint_url, region)
        self._address = self._bucket.address
        self._lock_until = lock_until
        self._lock_mode: str | None = None
        self._lock_is_known = False

    def location(self, name: str) -> str:
        return f"s3://{self._address.bucket}/{self._address.prefix}{name}"

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        key = self._address.key(name)
        upload = Upload(self._bucket, key, {"Metadata": new_mark(), **self._lock()})
        try:
            yield cast("BinaryIO", upload)
            upload.finish()
        except BaseException:
            upload.abandon()
            raise

    def replace(self, name: str, data: bytes) -> None:
        properties = {"Metadata": new_mark(), **self._lock()}
        put_whole(self._bucket, self._address.key(name), data, properties)

    def copy_from(self, name: str, source: Store) -> None:
        key = self._address.key(name)
        with source.open(name) as file:
            if source.size(name) <= PART_BYTES:
                with self.create(name) as copy:
                    shutil.copyfileobj(file, copy, _COPY_BYTES)
                return
            # Not only at the end: it may be hours away.
            with suppress(NotFoundError):
                self.size(name)
                raise ConflictError(f"{name} is already stored")
            copy_in_parts(self._bucket, key, file, self._lock())

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with download(self._bucket, self._address.key(name)) as file:
            yield file

    def read(self, name: str, limit_bytes: int) -> bytes:
        with self.open(name) as file:
            return file.read(limit_bytes)

    def names(self, prefix: str, suffix: str) -> list[str]:
        names = (self._address.name(entry["Key"]) for entry in self._listed(prefix))
        return sorted(
            name for name in names if name and name.endswith(suffix) and not _is_note(name)
        )

    def size(self, name: str) -> int:
        # Listed, not asked for by HEAD: that one does not tell a missing bucket from an object.
        key = self._address.key(name)
        for entry in self._listed(name):
            if entry["Key"] == key:
                return int(entry["Size"])
        raise NotFoundError(f"{name} is not in the backup store")

    def delete(self, name: str) -> None:
        remove(self._bucket, self._address.key(name))

    def sweep(self) -> int:
        swept, going_on = 0, set()
        for page in self._bucket.pages("list_multipart_uploads", Prefix=self._address.prefix):
            for upload in page.get("Uploads", ()):
                key = upload["Key"]
                if not self._address.name(key):
                    continue
                if is_going_on(self._bucket, key, upload):
                    going_on.add(key + NOTE_SUFFIX)
                    continue
                with suppress(NotFoundError):
                    self._bucket.ask("abort_multipart_upload", Key=key, UploadId=upload["UploadId"])
                swept += 1
        for entry in self._listed(""):
            if _is_note(entry["Key"]) and entry["Key"] not in going_on:
                remove(self._bucket, entry["Key"])
        return swept + sweep_versions(self._bucket)

    def _listed(self, prefix: str) -> Iterator[Any]:
        """Yield what lies directly below our prefix, with names that begin with *prefix*."""
        wanted = self._address.prefix + prefix
        for page in self._bucket.pages("list_objects_v2", Prefix=wanted, Delimiter="/"):
            yield from page.get("Contents", ())

    def _lock(self) -> dict[str, Any]:
        """Return what locks a new object, if the bucket can and we are to."""
        if self._lock_until is None:
            return {}
        if not self._lock_is_known:
            self._lock_mode, self._lock_is_known = self._find_lock_mode(), True
        if self._lock_mode is None:
            return {}
        return {
            "ObjectLockMode": self._lock_mode,
            "ObjectLockRetainUntilDate": self._lock_until(),
        }

    def _find_lock_mode(self) -> str | None:
        try:
            answer = self._bucket.ask("get_object_lock_configuration")
        except BucketRefusedError as err:
            # Any other refusal is told: a backup that was to be locked must not silently not be.
            if err.reason in _NO_LOCK:
                return None
            raise
        configuration = answer["ObjectLockConfiguration"]
        if configuration.get("ObjectLockEnabled") != "Enabled":
            return None
        default = configuration.get("Rule", {}).get("DefaultRetention", {})
        return str(default.get("Mode", _LOCK_MODE))


def _is_note(name: str) -> bool:
    return name.endswith(NOTE_SUFFIX)
