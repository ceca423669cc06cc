"""Reading an object of S3 as a stream, going on where a connection was cut."""

import io
from typing import Any, Final

from backend.backup.s3.bucket import Bucket, meaning
from backend.errors import ConflictError, NotFoundError, UnavailableError

_MAX_CUTS: Final = 5
# Who gets so far with one connection gets on.
_PROGRESS_BYTES: Final = 8 * 1024 * 1024
_BUFFER_BYTES: Final = 1024 * 1024


def download(bucket: Bucket, key: str) -> io.BufferedReader:
    """
    Open an object.

    Raises:
        NotFoundError: There is none.
    """
    answer = bucket.ask("get_object", Key=key)
    return io.BufferedReader(_Download(bucket, key, answer), _BUFFER_BYTES)


class _Download(io.RawIOBase):
    """
    The bytes of one object, as `get_object` answered for it.

    A cut connection is made anew from the next byte on, of the same version, unless five in a row
    bring nothing worth it.
    """

    def __init__(self, bucket: Bucket, key: str, answer: Any) -> None:
        self._bucket, self._key = bucket, key
        self._body = answer["Body"]
        self._size: Final = int(answer["ContentLength"])
        version = answer.get("VersionId")
        self._pinned: Final = {"IfMatch": answer["ETag"]} | (
            {"VersionId": version} if version else {}
        )
        self._at = self._cuts = self._cut_at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        while self._at < self._size:
            try:
                data = self._body.read(min(len(buffer), self._size - self._at))
            except (BotoCoreError, HTTPError) as err:
                self._go_on(err)
                continue
            buffer[: len(data)] = data
            self._at += len(data)
            return len(data)
        return 0

    def _go_on(self, cut: Exception) -> None:
        self._body.close()
        self._cuts = 1 if self._at - self._cut_at >= _PROGRESS_BYTES else self._cuts + 1
        self._cut_at = self._at
        if self._cuts > _MAX_CUTS:
            raise meaning(cut, None) from None
        wanted = f"bytes={self._at}-"
        try:
            answer = self._bucket.ask("get_object", Key=self._key, Range=wanted, **self._pinned)
        except (ConflictError, NotFoundError):
            raise UnavailableError("the object was replaced while it was read") from None
        self._body = answer["Body"]

    def close(self) -> None:
        self._body.close()
        super().close()
