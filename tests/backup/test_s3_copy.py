"""A copy into S3: the same bytes, never over another object, and going on where it ended."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import pytest

from backend.backup.s3 import copy as s3_copy
from backend.backup.s3.store import S3Store
from backend.backup.s3.upload import PART_BYTES
from backend.backup.storage import LocalStore, Store
from backend.errors import ConflictError, NotFoundError, UnavailableError
from tests.backup.s3_server import REGION, CuttableLine, S3Server, cuttable_line

MIB: Final = 1024 * 1024
SIZE: Final = 3 * PART_BYTES + 7


@pytest.fixture
def source(tmp_path: Path) -> LocalStore:
    """A folder with one long object."""
    source = LocalStore(str(tmp_path / "source"))
    with source.create("a.hfb") as file:
        file.write(os.urandom(SIZE))
    return source


@pytest.fixture
def line(s3_server: S3Server) -> Iterator[CuttableLine]:
    with cuttable_line(s3_server.endpoint_url) as line:
        yield line


@pytest.fixture
def store(s3_bucket: str, line: CuttableLine) -> S3Store:
    return S3Store(f"s3://{s3_bucket}/copies", endpoint_url=line.url, region=REGION)


def bytes_of(store: Store) -> bytes:
    with store.open("a.hfb") as file:
        return b"".join(iter(lambda: file.read(MIB), b""))


class EndingSource:
    """A source that calls *at_end* once when so many bytes were read of it."""

    def __init__(self, source: LocalStore, after_bytes: int, at_end: Callable[[], None]) -> None:
        self._source, self._left, self._at_end = source, after_bytes, at_end
        self.size = source.size

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with self._source.open(name) as file:
            self._file = file
            yield cast("BinaryIO", self)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left <= 0:
            self._at_end()
        return data


class EndError(Exception):
    """Ends a copy, as a kill would."""


def interrupt(store: S3Store, source: LocalStore, after_bytes: int, stored: Any) -> None:
    """Begin to copy, and end once *stored* answers as if enough had arrived."""

    def end() -> None:
        deadline = time.monotonic() + 60
        while not stored():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        raise EndError

    with pytest.raises(EndError):
        store.copy_from("a.hfb", cast("Store", EndingSource(source, after_bytes, end)))


def parts(server: S3Server, bucket: str) -> list[Any]:
    found: list[Any] = []
    for upload in server.uploads(bucket):
        wanted = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        found += server.client.list_parts(**wanted).get("Parts", ())
    return found


@pytest.mark.parametrize("size", [0, 5, PART_BYTES, PART_BYTES + 1])
def test_a_copy_has_the_same_bytes_and_leaves_nothing_else(
    store: S3Store, s3_server: S3Server, s3_bucket: str, tmp_path: Path, size: int
) -> None:
    source = LocalStore(str(tmp_path / "source"))
    with source.create("a.hfb") as file:
        file.write(os.urandom(size))
    store.copy_from("a.hfb", source)
    assert bytes_of(store) == bytes_of(source)
    listed = s3_server.client.list_objects_v2(Bucket=s3_bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["copies/a.hfb"]
    assert s3_server.uploads(s3_bucket) == []


def test_a_copy_comes_back_to_another_folder(
    store: S3Store, source: LocalStore, tmp_path: Path
) -> None:
    store.copy_from("a.hfb", source)
    back = LocalStore(str(tmp_path / "back"))
    back.copy_from("a.hfb", store)
    assert bytes_of(back) == bytes_of(source)


def test_an_interrupted_copy_is_not_listed_and_goes_on_where_it_ended(
    store: S3Store, source: LocalStore, s3_server: S3Server, s3_bucket: str, line: CuttableLine
) -> None:
    interrupt(store, source, 3 * PART_BYTES, lambda: len(parts(s3_server, s3_bucket)) >= 2)
    assert store.names("", "") == []
    assert store.sweep() == 0, "a copy that goes on is not swept"
    s3_server.client.create_multipart_upload(Bucket=s3_bucket, Key="copies/a.hfb")
    assert store.sweep() == 1, "another upload of the same name is"
    had = len(parts(s3_server, s3_bucket))
    sent_before = line.bytes_up
    store.copy_from("a.hfb", source)
    assert line.bytes_up - sent_before < SIZE - had * PART_BYTES + MIB
    assert bytes_of(store) == bytes_of(source)
    assert s3_server.uploads(s3_bucket) == []
    assert store.names("", "") == ["a.hfb"]
    assert store.sweep() == 0


def test_parts_of_other_bytes_are_not_taken_for_the_copys(
    store: S3Store, source: LocalStore, s3_server: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    other = LocalStore(str(tmp_path / "other"))
    with other.create("a.hfb") as file:
        file.write(os.urandom(SIZE))
    interrupt(store, other, 3 * PART_BYTES, lambda: len(parts(s3_server, s3_bucket)) >= 2)
    store.copy_from("a.hfb", source)
    assert bytes_of(store) == bytes_of(source)


def test_a_copy_whose_server_goes_away_is_told_and_goes_on_later(
    store: S3Store, source: LocalStore, s3_server: S3Server, s3_bucket: str, line: CuttableLine
) -> None:
    with pytest.raises(UnavailableError, match="does not answer"):
        store.copy_from("a.hfb", cast("Store", EndingSource(source, 3 * PART_BYTES, line.hang_up)))
    assert len(s3_server.uploads(s3_bucket)) == 1
    line.is_open = True
    store.copy_from("a.hfb", source)
    assert bytes_of(store) == bytes_of(source)
    assert s3_server.uploads(s3_bucket) == []


def test_a_damaged_note_of_a_copy_lets_it_begin_anew(
    store: S3Store, source: LocalStore, s3_server: S3Server, s3_bucket: str
) -> None:
    notes = [b"", b"[]", b"{", b"[" * 4000, b'{"upload_id": "unknown", "mark": 1}']
    for note in notes:
        s3_server.client.put_object(Bucket=s3_bucket, Key="copies/a.hfb.copying", Body=note)
        store.copy_from("a.hfb", source)
        assert store.size("a.hfb") == SIZE
        store.delete("a.hfb")


def test_a_copy_that_nobody_goes_on_with_is_swept_after_a_week(
    store: S3Store,
    source: LocalStore,
    s3_server: S3Server,
    s3_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(store, source, 2 * PART_BYTES, lambda: parts(s3_server, s3_bucket))
    assert store.sweep() == 0
    monkeypatch.setattr(s3_copy, "_GOES_ON_FOR", timedelta(seconds=-5))
    assert store.sweep() == 1
    assert s3_server.uploads(s3_bucket) == []
    assert "Contents" not in s3_server.client.list_objects_v2(Bucket=s3_bucket)


def test_a_copy_never_replaces_an_object(
    store: S3Store, source: LocalStore, s3_server: S3Server, s3_bucket: str, line: CuttableLine
) -> None:
    store.replace("a.hfb", b"first")
    with pytest.raises(ConflictError):
        store.copy_from("a.hfb", source)
    assert line.bytes_up < MIB, "told before anything is sent"

    # And not one that comes while it is under way.
    store.delete("a.hfb")
    come = EndingSource(source, 3 * PART_BYTES, lambda: store.replace("a.hfb", b"second"))
    with pytest.raises(ConflictError):
        store.copy_from("a.hfb", cast("Store", come))
    assert store.read("a.hfb", 100) == b"second"
    assert s3_server.uploads(s3_bucket) == []
    listed = s3_server.client.list_objects_v2(Bucket=s3_bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["copies/a.hfb"]


def test_a_copy_of_what_is_not_there_is_not_found(
    store: S3Store, source: LocalStore, s3_server: S3Server, s3_bucket: str
) -> None:
    with pytest.raises(NotFoundError):
        store.copy_from("b.hfb", source)
    assert "Contents" not in s3_server.client.list_objects_v2(Bucket=s3_bucket)
