"""Buckets that keep versions, and locks: nothing goes before its date, and everything after it."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest

from backend.backup.s3.store import S3Store
from backend.backup.s3.upload import PART_BYTES
from backend.errors import ConflictError, NotFoundError, UnavailableError
from tests.backup.s3_server import REGION, S3Server

# Longer than any test takes; a test whose date is to come has it come sooner.
LOCK: Final = timedelta(hours=1)
KEY: Final = "some/folder/a.hfb"


def soon() -> datetime:
    return datetime.now(UTC) + LOCK


def open_store(
    server: S3Server, bucket: str, lock_until: Callable[[], datetime] | None = None
) -> S3Store:
    return S3Store(
        f"s3://{bucket}/some/folder",
        endpoint_url=server.endpoint_url,
        region=REGION,
        lock_until=lock_until,
    )


@pytest.fixture
def bucket(aws_environment: S3Server) -> str:
    """The name of a new bucket with object lock, and so with versions."""
    return aws_environment.make_bucket(lock=True)


@pytest.fixture
def store(s3_server: S3Server, bucket: str) -> S3Store:
    """A store that locks nothing."""
    return open_store(s3_server, bucket)


@pytest.fixture
def locking_store(s3_server: S3Server, bucket: str) -> S3Store:
    return open_store(s3_server, bucket, soon)


def put(store: S3Store, data: bytes, name: str = "a.hfb") -> None:
    with store.create(name) as file:
        file.write(data)


def versions(server: S3Server, bucket: str) -> list[Any]:
    """Everything that the bucket keeps, hidden or not."""
    answer = server.client.list_object_versions(Bucket=bucket)
    return [*answer.get("Versions", ()), *answer.get("DeleteMarkers", ())]


def is_marker_of(version: Any, name: str) -> bool:
    return "Size" not in version and version["Key"].endswith(f"/{name}")


def lock_of(server: S3Server, bucket: str, key: str = KEY) -> tuple[str, datetime]:
    found = server.client.head_object(Bucket=bucket, Key=key)
    return found["ObjectLockMode"], found["ObjectLockRetainUntilDate"]


def let_locks_end(server: S3Server, bucket: str) -> None:
    """Bring the dates of all locked versions near, as their owner may, and let them pass."""
    for version in server.client.list_object_versions(Bucket=bucket)["Versions"]:
        until = datetime.now(UTC) + timedelta(seconds=2)
        server.client.put_object_retention(
            Bucket=bucket,
            Key=version["Key"],
            VersionId=version["VersionId"],
            Retention={"Mode": "GOVERNANCE", "RetainUntilDate": until},
            BypassGovernanceRetention=True,
        )
    time.sleep(3)


@pytest.mark.parametrize("size", [5, PART_BYTES + 5])
def test_what_is_written_is_locked_until_its_date(
    locking_store: S3Store, s3_server: S3Server, bucket: str, size: int
) -> None:
    earliest = soon()
    put(locking_store, bytes(size))
    mode, until = lock_of(s3_server, bucket)
    assert mode == "GOVERNANCE"
    # S3 keeps whole seconds.
    assert earliest - timedelta(seconds=1) <= until <= soon()
    version = s3_server.client.head_object(Bucket=bucket, Key=KEY)["VersionId"]
    with pytest.raises(Exception, match="AccessDenied"):
        s3_server.client.delete_object(Bucket=bucket, Key=KEY, VersionId=version)
    with pytest.raises(ConflictError):
        put(locking_store, b"other")


def test_a_locked_object_that_is_deleted_can_be_recovered_until_its_date_and_is_swept_after_it(
    locking_store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    put(locking_store, b"\1" * (PART_BYTES + 5))
    put(locking_store, b"small", "b.hfb")
    for name in ("a.hfb", "b.hfb"):
        locking_store.delete(name)
        with pytest.raises(NotFoundError):
            locking_store.read(name, 1)
    assert locking_store.names("", "") == []
    assert locking_store.sweep() == 0
    (marker,) = (left for left in versions(s3_server, bucket) if is_marker_of(left, "a.hfb"))
    s3_server.client.delete_object(Bucket=bucket, Key=KEY, VersionId=marker["VersionId"])
    with locking_store.open("a.hfb") as file:
        assert file.read() == b"\1" * (PART_BYTES + 5), "removing the marker brings it back"
    locking_store.delete("a.hfb")

    let_locks_end(s3_server, bucket)
    assert locking_store.sweep() == 2
    assert versions(s3_server, bucket) == []
    assert locking_store.sweep() == 0


def test_a_replaced_object_is_kept_as_a_version_until_its_date(
    locking_store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    locking_store.replace("a.hfb", b"first")
    locking_store.replace("a.hfb", b"second")
    assert locking_store.read("a.hfb", 100) == b"second"
    assert locking_store.sweep() == 0
    assert len(versions(s3_server, bucket)) == 2
    let_locks_end(s3_server, bucket)
    assert locking_store.sweep() == 1
    assert locking_store.read("a.hfb", 100) == b"second"
    (left,) = versions(s3_server, bucket)
    assert left["IsLatest"]


def test_without_a_lock_a_delete_leaves_no_version(
    store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    for name in ("a.hfb", "a.hfb.longer"):
        store.replace(name, b"first")
        store.replace(name, b"second")
    for _ in range(2):
        store.delete("a.hfb")
        left = [version["Key"] for version in versions(s3_server, bucket)]
        assert left == 2 * ["some/folder/a.hfb.longer"]


def test_a_name_is_free_again_after_a_delete(store: S3Store, locking_store: S3Store) -> None:
    put(locking_store, b"first")
    locking_store.delete("a.hfb")
    put(store, b"second")
    assert store.read("a.hfb", 100) == b"second"
    assert store.sweep() == 0


def test_a_sweep_does_not_touch_versions_of_others(
    store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    for key in (KEY, "some/folder/below/a.hfb", "elsewhere"):
        for data in (b"first", b"second"):
            s3_server.client.put_object(Bucket=bucket, Key=key, Body=data)
        s3_server.client.delete_object(Bucket=bucket, Key=key)
    assert store.sweep() == 0
    assert len(versions(s3_server, bucket)) == 9


def test_the_owners_default_mode_is_followed(
    locking_store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    s3_server.client.put_object_lock_configuration(
        Bucket=bucket,
        ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule},
    )
    put(locking_store, b"data")
    mode, until = lock_of(s3_server, bucket)
    assert mode == "COMPLIANCE"
    assert until <= soon(), "and not its day"


def test_a_bucket_without_lock_takes_what_would_be_locked(
    s3_server: S3Server, s3_bucket: str
) -> None:
    store = open_store(s3_server, s3_bucket, soon)
    put(store, b"data")
    assert "ObjectLockMode" not in s3_server.client.head_object(Bucket=s3_bucket, Key=KEY)
    store.delete("a.hfb")
    assert versions(s3_server, s3_bucket) == []


def forbid(server: S3Server, bucket: str, action: str) -> None:
    """Take one right from everybody."""
    statement = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": action,
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    server.client.put_bucket_policy(Bucket=bucket, Policy=policy)


def test_a_store_that_cannot_know_of_a_lock_writes_nothing_without_it(
    store: S3Store, locking_store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    forbid(s3_server, bucket, "s3:GetBucketObjectLockConfiguration")
    with pytest.raises(UnavailableError, match="AccessDenied"):
        put(locking_store, b"data")
    assert versions(s3_server, bucket) == []
    put(store, b"data")


def test_a_version_that_stays_for_want_of_rights_is_told(
    store: S3Store, s3_server: S3Server, bucket: str
) -> None:
    put(store, b"data")
    forbid(s3_server, bucket, "s3:DeleteObjectVersion")
    with pytest.raises(UnavailableError, match="AccessDenied"):
        store.delete("a.hfb")
    assert store.names("", "") == []
    with pytest.raises(UnavailableError, match="AccessDenied"):
        store.sweep()
    s3_server.client.delete_bucket_policy(Bucket=bucket)
    assert store.sweep() == 1
    assert versions(s3_server, bucket) == []
