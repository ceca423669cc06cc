"""
Copying a long object into S3 so that a copy which was interrupted goes on where it ended.

Beside the object, until it is there, lies `<name>.copying`: which upload it is, and its mark.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO, Final

from backend.backup.s3.bucket import Bucket, BucketRefusedError
from backend.backup.s3.download import download
from backend.backup.s3.upload import (
    MARK,
    PartsUpload,
    begin_parts,
    new_mark,
    part_bytes,
    put_whole,
)
from backend.backup.s3.versions import remove
from backend.errors import ConflictError, NotFoundError

NOTE_SUFFIX: Final = ".copying"
# S3 takes money for parts, too: a copy that nobody has gone on with for so long is given up.
_GOES_ON_FOR: Final = timedelta(days=7)
_MAX_NOTE_BYTES: Final = 4096
_READ_BYTES: Final = 1024 * 1024


def copy_in_parts(bucket: Bucket, key: str, file: BinaryIO, lock: Mapping[str, Any]) -> None:
    """
    Store what *file* reads under *key*; on an error, what was sent stays for the next call.

    Raises:
        ConflictError: An object has this key; nothing is left behind.
    """
    parts = _interrupted(bucket, key) or _begun(bucket, key, lock)
    try:
        while data := _read_part(file, part_bytes(parts.next_number)):
            parts.add(data)
        parts.finish()
    except ConflictError:
        parts.abort()
        remove(bucket, key + NOTE_SUFFIX)
        raise
    finally:
        parts.stop()
    remove(bucket, key + NOTE_SUFFIX)


def is_going_on(bucket: Bucket, key: str, upload: Mapping[str, Any]) -> bool:
    """Say whether an open upload of *key*, as S3 lists it, is a copy to be gone on with."""
    note = _note(bucket, key)
    begun: datetime = upload["Initiated"]
    is_recent = begun > datetime.now(UTC) - _GOES_ON_FOR
    return is_recent and note is not None and note[0] == upload["UploadId"]


def _begun(bucket: Bucket, key: str, lock: Mapping[str, Any]) -> PartsUpload:
    mark = new_mark()
    parts = begin_parts(bucket, key, {"Metadata": mark, **lock})
    note = json.dumps({"upload_id": parts.upload_id, "mark": mark[MARK]}).encode()
    put_whole(bucket, key + NOTE_SUFFIX, note, {"Metadata": mark})
    return parts


def _interrupted(bucket: Bucket, key: str) -> PartsUpload | None:
    note = _note(bucket, key)
    if note is None:
        return None
    upload_id, mark = note
    stored: dict[int, Any] = {}
    try:
        for page in bucket.pages("list_parts", Key=key, UploadId=upload_id):
            stored |= {part["PartNumber"]: part for part in page.get("Parts", ())}
    except BucketRefusedError as err:
        if err.reason != "NoSuchUpload":
            raise
        return None
    return PartsUpload(bucket, key, upload_id, {MARK: mark}, stored)


def _note(bucket: Bucket, key: str) -> tuple[str, str] | None:
    """Return id and mark of the upload that the note at *key* names, if it is one of ours."""
    try:
        with download(bucket, key + NOTE_SUFFIX) as file:
            note = json.loads(file.read(_MAX_NOTE_BYTES))
        return str(note["upload_id"]), str(note["mark"])
    except NotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        # Another's object, or damaged: the copy begins anew and writes a new one.
        return None


def _read_part(file: BinaryIO, length: int) -> bytearray:
    """Read *length* bytes, or what is left."""
    data = bytearray()
    while len(data) < length and (piece := file.read(min(_READ_BYTES, length - len(data)))):
        data += piece
    return data
