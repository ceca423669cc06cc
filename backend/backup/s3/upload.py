"""
Writing an object of S3 from a stream of unknown length, once, in constant memory.

Up to 8 MiB go as one request, more in parts that are sent while the next ones are made. Each
carries its SHA-256, which S3 checks, and the object a mark that says whose write it was.
"""

import hashlib
import io
import secrets
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

from backend.backup.s3.bucket import Bucket, BucketUnreachedError
from backend.errors import ConflictError, NotFoundError, UnavailableError

PART_BYTES: Final = 8 * 1024 * 1024
MARK: Final = "holdfast-writer"
_PARTS_OF_ONE_LENGTH: Final = 1000
_IN_FLIGHT_BYTES: Final = 3 * PART_BYTES
_MAX_THREADS: Final = 3


def part_bytes(number: int) -> int:
    """
    Return the length of part *number*, counted from 1.

    It doubles every 1,000 parts: 32 MiB are in memory up to 23 GiB, and 10,000 parts hold 7.8 TiB.
    It depends on the number alone, so that a copy that goes on cuts as it did before.

    Source: docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html (10,000 parts of 5 GiB).
    """
    return PART_BYTES << (number - 1) // _PARTS_OF_ONE_LENGTH


def new_mark() -> dict[str, str]:
    """Return metadata that tell this write from every other."""
    return {MARK: secrets.token_hex(16)}


class PartsUpload:
    """A multipart upload under way; *stored* are the parts that S3 has of it, by number."""

    def __init__(
        self,
        bucket: Bucket,
        key: str,
        upload_id: str,
        mark: Mapping[str, str],
        stored: Mapping[int, Any] | None = None,
    ) -> None:
        self.upload_id: Final = upload_id
        self._bucket, self._mark, self._stored = bucket, mark, stored or {}
        self._target: Final = {"Key": key, "UploadId": upload_id}
        self._sent: list[dict[str, Any]] = []
        self._pending: deque[Future[dict[str, Any]]] = deque()
        self._threads = ThreadPoolExecutor(_MAX_THREADS, "s3-upload")

    @property
    def next_number(self) -> int:
        return len(self._sent) + len(self._pending) + 1

    def add(self, data: bytearray) -> None:
        """Send the next part; waits while 24 MiB, or one longer part, are on their way."""
        number = self.next_number
        while self._pending and len(self._pending) >= _IN_FLIGHT_BYTES // part_bytes(number):
            self._await_oldest()
        self._pending.append(self._threads.submit(self._send, number, data))

    def _await_oldest(self) -> None:
        # One that failed stays first, so that nothing can be put together without it.
        self._sent.append(self._pending[0].result())
        self._pending.popleft()

    def _send(self, number: int, data: bytearray) -> dict[str, Any]:
        digest = _sha256(data)
        etag = _etag_of_same(self._stored.get(number), data, digest)
        if etag is None:
            answer = self._bucket.ask(
                "upload_part",
                **self._target,
                PartNumber=number,
                Body=data,
                ChecksumSHA256=digest,
            )
            etag = answer["ETag"]
        return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": digest}

    def finish(self) -> None:
        """
        Put the parts together: from here on the object is there.

        Raises:
            ConflictError: An object has this key.
        """
        while self._pending:
            self._await_oldest()
        self.stop()
        complete = {"MultipartUpload": {"Parts": self._sent}, "IfNoneMatch": "*"}
        _publish(
            self._bucket,
            self._target["Key"],
            self._mark,
            lambda: self._bucket.ask("complete_multipart_upload", **self._target, **complete),
        )

    def stop(self) -> None:
        """Send nothing more; what was sent stays with S3, to be gone on with."""
        self._threads.shutdown(cancel_futures=True)

    def abort(self) -> None:
        """Remove what was sent."""
        # Parts on their way would come to lie there after the rest was removed.
        self.stop()
        # What led here is to be told, not that the bucket is away for this as well; `sweep`
        # removes what is left.
        with suppress(NotFoundError, UnavailableError):
            self._bucket.ask("abort_multipart_upload", **self._target)


class Upload(io.RawIOBase):
    """Takes what is written; *properties* are those of the object: its mark, and its lock."""

    def __init__(self, bucket: Bucket, key: str, properties: Mapping[str, Any]) -> None:
        self._bucket, self._key, self._properties = bucket, key, properties
        self._buffer = bytearray()
        self._parts: PartsUpload | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        with memoryview(data) as given, given.cast("B") as octets:
            taken = 0
            while taken < len(octets):
                number = self._parts.next_number if self._parts else 1
                room = part_bytes(number) - len(self._buffer)
                self._buffer += octets[taken : taken + room]
                taken += room
                # Only when more follows: an object of exactly one part goes as one request.
                if taken < len(octets):
                    self._send_part()
            return len(octets)

    def _send_part(self) -> None:
        if self._parts is None:
            self._parts = begin_parts(self._bucket, self._key, self._properties)
        self._parts.add(self._buffer)
        self._buffer = bytearray()

    def finish(self) -> None:
        """
        Make the object appear.

        Raises:
            ConflictError: An object has this key.
            UnavailableError: The bucket does not take it.
        """
        if self._parts is not None:
            self._parts.add(self._buffer)
            self._parts.finish()
        else:
            _publish(
                self._bucket,
                self._key,
                self._properties["Metadata"],
                lambda: put_whole(
                    self._bucket, self._key, self._buffer, self._properties, IfNoneMatch="*"
                ),
            )

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._parts is not None:
            self._parts.abort()


def put_whole(
    bucket: Bucket,
    key: str,
    data: bytes | bytearray,
    properties: Mapping[str, Any],
    **condition: str,
) -> None:
    """Store an object in one request. A bucket with object lock takes none without a digest."""
    digest = _sha256(data)
    bucket.ask("put_object", Key=key, Body=data, ChecksumSHA256=digest, **properties, **condition)


def begin_parts(bucket: Bucket, key: str, properties: Mapping[str, Any]) -> PartsUpload:
    """Begin a multipart upload of an object."""
    upload_id = bucket.ask(
        "create_multipart_upload", Key=key, ChecksumAlgorithm="SHA256", **properties
    )["UploadId"]
    return PartsUpload(bucket, key, upload_id, properties["Metadata"])


def _publish(bucket: Bucket, key: str, mark: Mapping[str, str], put: Callable[[], object]) -> None:
    """
    Make an object appear, and tell our own from another's.

    Where the first answer is lost, the retry finds our object, and is told that there is one or,
    for parts that were put together, that they are gone.
    """
    try:
        put()
    except BucketUnreachedError:
        # It would not answer a further question either.
        raise
    except (ConflictError, UnavailableError):
        if not _bears(bucket, key, mark):
            raise


def _bears(bucket: Bucket, key: str, mark: Mapping[str, str]) -> bool:
    try:
        found = bucket.ask("head_object", Key=key)["Metadata"]
    except (NotFoundError, UnavailableError):
        return False
    return bool(found.get(MARK) == mark[MARK])


def _sha256(data: bytes | bytearray) -> str:
    return b64encode(hashlib.sha256(data).digest()).decode()


def _etag_of_same(part: Any, data: bytearray, digest: str) -> str | None:
    """Return the ETag of a stored part if it holds *data*."""
    if part is None or part["Size"] != memoryview(data).nbytes:
        return None
    etag = str(part["ETag"])
    if "ChecksumSHA256" in part:
        return etag if part["ChecksumSHA256"] == digest else None
    # SeaweedFS lists no checksums; where the ETag is no MD5 (AWS under a KMS key), S3 does.
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    return etag if etag.strip('"') == md5 else None
