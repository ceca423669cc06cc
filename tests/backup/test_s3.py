"""Backups in S3: whole or not at all, never replaced, kept by locks, and told when it is away."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from backend.backup.s3.store import S3Store
from backend.backup.s3.upload import PART_BYTES, part_bytes
from backend.backup.storage import Store
from backend.errors import (
    ConfigurationError,
    ConflictError,
    NotFoundError,
    UnavailableError,
)
from tests.backup.s3_server import (
    READER_KEY,
    READER_SECRET,
    REGION,
    Cut,
    CuttableLine,
    S3Server,
    cuttable_line,
)

NO_NAMES: Final = [
    "",
    ".",
    "..",
    "../a",
    "/a",
    "a/b",
    "a\\b",
    ".a",
    "a\n",
    "a\0b",
    "A",
    "%2e",
    "a" * 122,
]
ROOT: Final = Path(__file__).resolve().parents[2]
MIB: Final = 1024 * 1024


def open_store(server: S3Server, bucket: str, **options: Any) -> S3Store:
    endpoint = options.pop("endpoint_url", server.endpoint_url)
    return S3Store(f"s3://{bucket}/some/folder", endpoint_url=endpoint, region=REGION, **options)


@pytest.fixture
def store(s3_server: S3Server, s3_bucket: str) -> S3Store:
    return open_store(s3_server, s3_bucket)


@pytest.fixture
def line(s3_server: S3Server) -> Iterator[CuttableLine]:
    with cuttable_line(s3_server.endpoint_url) as line:
        yield line


@pytest.fixture
def far_store(s3_server: S3Server, s3_bucket: str, line: CuttableLine) -> S3Store:
    """The same store, over a line that can be cut."""
    return open_store(s3_server, s3_bucket, endpoint_url=line.url)


def put(store: Store, name: str, data: bytes) -> None:
    with store.create(name) as file:
        for start in range(0, len(data), MIB):
            file.write(data[start : start + MIB])


def get(store: Store, name: str) -> bytes:
    with store.open(name) as file:
        return b"".join(iter(lambda: file.read(MIB), b""))


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES])
def test_what_is_written_is_read_back(
    store: S3Store, s3_bucket: str, s3_server: S3Server, size: int
) -> None:
    data = os.urandom(size)
    put(store, "a.hfb", data)
    assert get(store, "a.hfb") == data
    assert store.size("a.hfb") == size
    assert store.read("a.hfb", 5) == data[:5]
    assert store.location("a.hfb") == f"s3://{s3_bucket}/some/folder/a.hfb"
    stored = s3_server.client.head_object(Bucket=s3_bucket, Key="some/folder/a.hfb")
    assert ("-" in stored["ETag"]) == (size > PART_BYTES), "in parts, or in one request"
    assert s3_server.uploads(s3_bucket) == []


def test_one_write_may_be_longer_than_a_part_and_of_any_octets(store: S3Store) -> None:
    data = os.urandom(2 * PART_BYTES + 7)
    with store.create("a.hfb") as file:
        file.write(memoryview(data))
        file.write(b"")
        file.write(bytearray(b"end"))
    assert get(store, "a.hfb") == data + b"end"


def test_a_store_without_prefix_lies_at_the_root_of_its_bucket(
    s3_server: S3Server, s3_bucket: str
) -> None:
    store = S3Store(f"s3://{s3_bucket}", endpoint_url=s3_server.endpoint_url, region=None)
    put(store, "a.hfb", b"data")
    assert store.names("", "") == ["a.hfb"]
    assert s3_server.client.get_object(Bucket=s3_bucket, Key="a.hfb")["Body"].read() == b"data"


def test_parts_grow_so_that_ten_thousand_hold_five_tebibytes() -> None:
    lengths = [part_bytes(number) for number in range(1, 10_001)]
    assert sum(lengths) >= 5 * 1024**4
    assert max(lengths) <= 5 * 1024**3
    assert sum(length for length in lengths if length <= 16 * MIB) >= 20 * 1024**3


UPLOAD: Final = """
import resource, sys
from backend.backup.s3.store import S3Store
url, endpoint, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = S3Store(url, endpoint_url=endpoint, region=None)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with store.create("small.hfb") as file:
    file.write(b"1")
before = peak()
with store.create("a.hfb") as file:
    for number in range(size):
        file.write(bytes([number % 256]) * 1024 * 1024)
        if number == 20:
            print("under way", flush=True)
            if len(sys.argv) > 4:
                sys.stdin.read()
print(peak() - before, flush=True)
"""


def upload_command(server: S3Server, bucket: str, *arguments: str) -> list[str]:
    url = f"s3://{bucket}/some/folder"
    return [sys.executable, "-c", UPLOAD, url, server.endpoint_url, *arguments]


def test_an_upload_takes_the_same_memory_whatever_its_size(
    store: S3Store, s3_server: S3Server, s3_bucket: str
) -> None:
    done = subprocess.run(
        upload_command(s3_server, s3_bucket, "120"), cwd=ROOT, check=True, capture_output=True
    )
    grown_kib = int(done.stdout.split()[-1])
    assert grown_kib < 64 * 1024
    assert store.size("a.hfb") == 120 * MIB
    store.delete("a.hfb")


def test_parts_are_sent_while_the_next_ones_are_made(
    store: S3Store, s3_bucket: str, s3_server: S3Server
) -> None:
    with store.create("a.hfb") as file:
        file.write(bytes(PART_BYTES + 1))
        (upload,) = s3_server.uploads(s3_bucket)
        wanted = {key: upload[key] for key in ("Key", "UploadId")}
        wait_until(lambda: s3_server.client.list_parts(Bucket=s3_bucket, **wanted).get("Parts"))
        assert store.names("", "") == []
    assert store.names("", "") == ["a.hfb"]


@pytest.mark.parametrize("size", [5, PART_BYTES + 5])
def test_an_object_is_never_replaced(
    store: S3Store, s3_bucket: str, s3_server: S3Server, size: int
) -> None:
    put(store, "a.hfb", b"first")
    with pytest.raises(ConflictError, match=r"a\.hfb"):
        put(store, "a.hfb", bytes(size))
    assert get(store, "a.hfb") == b"first"
    assert s3_server.uploads(s3_bucket) == []


def test_of_many_writers_of_one_name_exactly_one_wins(store: S3Store) -> None:
    together = threading.Barrier(6)

    def write(number: int) -> bool:
        try:
            with store.create("a.hfb") as file:
                file.write(bytes([number]) * 1000)
                together.wait(timeout=60)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        won = list(threads.map(write, range(6)))
    assert won.count(True) == 1
    assert get(store, "a.hfb") == bytes([won.index(True)]) * 1000


def test_of_writers_of_parts_the_first_to_end_wins(
    store: S3Store, s3_bucket: str, s3_server: S3Server
) -> None:
    # One after the other: S3 puts parts together or refuses in one step, SeaweedFS 4.48 looks
    # first and takes no lock, so that of two in the same millisecond the last one stays.
    def write_second() -> None:
        with store.create("a.hfb") as second:
            second.write(b"2" * (PART_BYTES + 5))
            with store.create("a.hfb") as first:
                first.write(b"1" * (PART_BYTES + 5))

    with pytest.raises(ConflictError):
        write_second()
    assert get(store, "a.hfb") == b"1" * (PART_BYTES + 5)
    assert s3_server.uploads(s3_bucket) == []


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("size", [5, 2 * PART_BYTES + 5])
def test_a_failed_write_leaves_nothing(
    store: S3Store, s3_bucket: str, s3_server: S3Server, size: int, failure: type[BaseException]
) -> None:
    def fail() -> None:
        with store.create("a.hfb") as file:
            file.write(bytes(size))
            raise failure

    with pytest.raises(failure):
        fail()
    assert not [left for left in threading.enumerate() if left.name.startswith("s3-upload")]
    assert s3_server.uploads(s3_bucket) == []
    assert store.names("", "") == []


def test_a_killed_writer_leaves_nothing_listed_and_a_sweep_removes_its_parts(
    store: S3Store, s3_server: S3Server, s3_bucket: str
) -> None:
    with subprocess.Popen(
        upload_command(s3_server, s3_bucket, "40", "wait"),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"under way\n"
        process.send_signal(signal.SIGKILL)
    assert len(s3_server.uploads(s3_bucket)) == 1
    assert store.names("", "") == ["small.hfb"]
    assert store.sweep() == 1
    assert s3_server.uploads(s3_bucket) == []
    assert store.names("", "") == ["small.hfb"]
    assert store.sweep() == 0


def test_a_sweep_leaves_alone_what_is_not_directly_in_our_folder(
    store: S3Store, s3_bucket: str, s3_server: S3Server
) -> None:
    for key in ("some/folder/below/a.hfb", "some/folders.hfb", "elsewhere/a.hfb"):
        s3_server.client.create_multipart_upload(Bucket=s3_bucket, Key=key)
    assert store.sweep() == 0
    assert len(s3_server.uploads(s3_bucket)) == 3


def test_a_small_object_is_replaced_whole(store: S3Store) -> None:
    store.replace("a.key", b"first")
    store.replace("a.key", b"second")
    assert store.read("a.key", 100) == b"second"
    with pytest.raises(ConflictError):
        put(store, "a.key", b"third")


def test_a_write_whose_answer_was_lost_is_known_as_our_own(
    far_store: S3Store, line: CuttableLine
) -> None:
    line.cuts = [Cut("down", 1, b"PUT /")]
    put(far_store, "a.hfb", b"data")
    assert line.cuts == []
    assert get(far_store, "a.hfb") == b"data"


def test_parts_put_together_without_an_answer_are_known_as_our_own(
    far_store: S3Store, line: CuttableLine, s3_bucket: str, s3_server: S3Server
) -> None:
    data = os.urandom(PART_BYTES + 5)
    # The request that has the parts' list as its body.
    line.cuts = [Cut("down", 1, b"<CompleteMultipartUpload")]
    put(far_store, "a.hfb", data)
    assert line.cuts == []
    assert get(far_store, "a.hfb") == data
    assert s3_server.uploads(s3_bucket) == []


def test_a_part_whose_connection_is_cut_is_sent_again(
    far_store: S3Store, line: CuttableLine
) -> None:
    data = os.urandom(3 * PART_BYTES)
    line.cuts = [Cut("up", 10 * MIB)]
    put(far_store, "a.hfb", data)
    assert line.cuts == []
    assert get(far_store, "a.hfb") == data


def test_a_server_that_goes_away_half_way_ends_the_write_and_a_sweep_clears_up(
    far_store: S3Store, store: S3Store, line: CuttableLine, s3_bucket: str, s3_server: S3Server
) -> None:
    written = 0

    def write() -> None:
        nonlocal written
        with far_store.create("a.hfb") as file:
            while written < 200:
                file.write(bytes(MIB))
                written += 1
                if written == 20:
                    line.hang_up()

    with pytest.raises(UnavailableError, match="does not answer"):
        write()
    assert written < 60, "the producer is told soon"
    assert store.names("", "") == []
    assert len(s3_server.uploads(s3_bucket)) == 1, "the server could not be told any more"
    assert store.sweep() == 1
    assert s3_server.uploads(s3_bucket) == []


def test_a_write_that_lost_a_part_ends_in_an_error_even_if_its_writer_goes_on(
    far_store: S3Store, line: CuttableLine
) -> None:
    def write() -> None:
        with far_store.create("a.hfb") as file:
            file.write(bytes(PART_BYTES + 1))
            line.hang_up()
            with pytest.raises(UnavailableError):
                file.write(bytes(10 * PART_BYTES))
            line.is_open = True
            file.write(bytes(PART_BYTES))

    with pytest.raises(UnavailableError):
        write()
    assert far_store.names("", "") == []


def test_a_download_that_is_cut_goes_on_where_it_was(
    store: S3Store, far_store: S3Store, line: CuttableLine
) -> None:
    data = os.urandom(5 * PART_BYTES)
    put(store, "a.hfb", data)
    # More cuts than are borne without progress.
    line.cuts = [Cut("down", 9 * MIB), *(Cut("down", MIB) for _ in range(4))]
    line.cuts += [Cut("down", 9 * MIB), *(Cut("down", MIB) for _ in range(3))]
    assert get(far_store, "a.hfb") == data
    assert line.cuts == []


def test_a_download_that_is_cut_over_and_over_is_given_up(
    store: S3Store, far_store: S3Store, line: CuttableLine
) -> None:
    put(store, "a.hfb", bytes(PART_BYTES))
    line.cuts = [Cut("down", 200_000) for _ in range(20)]
    with pytest.raises(UnavailableError, match="does not answer"):
        get(far_store, "a.hfb")
    assert line.cuts


def test_a_download_never_mixes_two_objects(
    store: S3Store, far_store: S3Store, line: CuttableLine
) -> None:
    put(store, "a.hfb", bytes(PART_BYTES))
    line.cuts = [Cut("down", 4 * MIB)]
    with far_store.open("a.hfb") as file:
        file.read(MIB)
        store.replace("a.hfb", b"\1" * PART_BYTES)
        with pytest.raises(UnavailableError, match="replaced"):
            file.read()


def test_a_server_that_goes_away_half_way_ends_the_download(
    store: S3Store, far_store: S3Store, line: CuttableLine
) -> None:
    put(store, "a.hfb", bytes(5 * PART_BYTES))
    with far_store.open("a.hfb") as file:
        file.read(MIB)
        line.hang_up()
        with pytest.raises(UnavailableError, match="does not answer"):
            file.read()


def test_what_is_not_there_is_not_found_and_deleting_it_is_no_error(store: S3Store) -> None:
    put(store, "a.hfb.longer", b"data")
    with pytest.raises(NotFoundError, match=r"a\.hfb is not"):
        store.size("a.hfb")
    with pytest.raises(NotFoundError, match=r"a\.hfb is not"):
        store.read("a.hfb", 1)
    store.delete("a.hfb")
    assert store.names("", "") == ["a.hfb.longer"]
    store.delete("a.hfb.longer")
    assert store.names("", "") == []


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_a_path_names_nothing(name: str) -> None:
    # Nobody listens here: it is refused before anybody is asked.
    store = S3Store("s3://some-bucket", endpoint_url="http://127.0.0.1:1", region=REGION)
    attempts: list[Callable[[str], object]] = [
        lambda name: get(store, name),
        lambda name: put(store, name, b"data"),
        lambda name: store.replace(name, b"data"),
        lambda name: store.copy_from(name, store),
        store.size,
        store.delete,
    ]
    for attempt in attempts:
        with pytest.raises(NotFoundError, match="no name"):
            attempt(name)


def test_names_are_those_directly_in_our_folder_sorted_and_chosen_by_both_ends(
    store: S3Store, s3_bucket: str, s3_server: S3Server
) -> None:
    assert store.names("", "") == []
    for name in ("b.x", "a.x", "a.y", "below/a.x", "Other.x", "a.x.copying"):
        s3_server.client.put_object(Bucket=s3_bucket, Key=f"some/folder/{name}", Body=b"")
    s3_server.client.put_object(Bucket=s3_bucket, Key="some/folder-of-others", Body=b"")
    assert store.names("", "") == ["a.x", "a.y", "b.x"]
    assert store.names("", ".x") == ["a.x", "b.x"]
    assert store.names("a", "") == ["a.x", "a.y"]


def test_more_names_than_one_answer_holds_are_all_listed(
    store: S3Store, s3_bucket: str, s3_server: S3Server
) -> None:
    wanted = [f"ledger-{number:04}.enc" for number in range(1010)]
    with ThreadPoolExecutor(8) as threads:
        for put_ in [
            threads.submit(
                s3_server.client.put_object, Bucket=s3_bucket, Key=f"some/folder/{name}", Body=b""
            )
            for name in wanted
        ]:
            put_.result()
    assert store.names("ledger-", ".enc") == wanted


OPERATIONS: Final[dict[str, Callable[[S3Store], object]]] = {
    "create": lambda store: put(store, "a.hfb", b"data"),
    "create long": lambda store: put(store, "a.hfb", bytes(PART_BYTES + 1)),
    "replace": lambda store: store.replace("a.hfb", b"data"),
    "read": lambda store: store.read("a.hfb", 1),
    "names": lambda store: store.names("", ""),
    "size": lambda store: store.size("a.hfb"),
    "delete": lambda store: store.delete("a.hfb"),
    "sweep": lambda store: store.sweep(),
}
WRITES: Final = ("create", "create long", "replace", "delete")


def refusal(ask: Callable[[], object]) -> str:
    """What is said; neither it nor what led to it shows a credential."""
    with pytest.raises(UnavailableError) as caught:
        ask()
    shown = "".join(traceback.format_exception(caught.value))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ.get(name, "-none-") not in shown
    assert "botocore" not in shown
    return caught.value.detail


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_bucket_that_is_not_there_is_unavailable(
    s3_server: S3Server, s3_bucket: str, operation: str
) -> None:
    store = open_store(s3_server, f"{s3_bucket}-other")
    assert "NoSuchBucket" in refusal(lambda: OPERATIONS[operation](store))


@pytest.mark.parametrize(
    ("key", "secret", "code"),
    [
        (None, "tests-only-wrong-secret", "SignatureDoesNotMatch"),
        ("TESTSUNKNOWNKEY", "tests-only-wrong-secret", "InvalidAccessKeyId"),
    ],
)
def test_wrong_credentials_are_refused_with_the_code_alone(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, key: str | None, secret: str, code: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    if key is not None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    assert refusal(lambda: store.names("", "")) == f"the backup store refuses: {code}"


def test_missing_credentials_are_told(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no AWS credentials" in refusal(lambda: store.names("", ""))


@pytest.mark.parametrize("operation", WRITES)
def test_credentials_that_may_only_read_are_refused_writing(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    assert store.names("", "") == []
    assert "AccessDenied" in refusal(lambda: OPERATIONS[operation](store))


def test_over_tls_a_server_is_trusted_by_its_certificate_alone(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_server.tls_endpoint_url
    stranger = open_store(s3_server, s3_bucket, endpoint_url=url)
    assert "SSLError" in refusal(lambda: put(stranger, "a.hfb", b"data"))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(s3_server.tls_certificate))
    store = open_store(s3_server, s3_bucket, endpoint_url=url)
    data = os.urandom(PART_BYTES + 5)
    put(store, "a.hfb", data)
    assert get(store, "a.hfb") == data


def test_a_server_that_is_down_is_told_soon(store: S3Store, line: CuttableLine) -> None:
    dead = S3Store("s3://some-bucket", endpoint_url=line.url, region=REGION)
    line.close()
    begun = time.monotonic()
    assert "does not answer" in refusal(lambda: put(dead, "a.hfb", b"data"))
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3:",
        "s3://",
        "s3:///prefix",
        "s4://bucket/prefix",
        "/some/folder",
        "s3://TOKEN:canary@bucket/prefix",
        "s3://bucket/prefix?secret=canary",
        "s3://bucket/prefix#canary",
        "s3://bucket:9000/canary",
        "s3://Bucket/canary",
        "s3://bu/canary",
        "s3://bucket..name/canary",
        "s3://127.0.0.1/canary",
        "s3://-bucket/canary",
        "s3://bucket/../canary",
        "s3://bucket/./canary",
        "s3://bucket/a//canary",
        "s3://bucket//canary",
        "s3://bucket/a b",
        "s3://bucket/a\ncanary",
        "s3://bucket/a%2fcanary",
        "s3://bucket/" + 20 * "a-folder-with-a-name-that-takes-fifty-characters/",
    ],
)
def test_an_address_that_is_none_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        S3Store(url, endpoint_url=None, region=None)
    assert "canary" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "endpoint",
    ["", "127.0.0.1:9000", "ftp://host", "http://", "http://key:canary@host", "http://host:port"],
)
def test_an_endpoint_that_is_none_is_refused_and_not_shown(endpoint: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        S3Store("s3://bucket/prefix", endpoint_url=endpoint, region=None)
    assert "canary" not in caught.value.detail


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3://my.bucket-1/a/B_c.d/"])
def test_an_address_is_taken_without_asking_anybody(url: str) -> None:
    store = S3Store(url, endpoint_url=None, region=None)
    assert store.location("a.hfb") == f"{url.removesuffix('/')}/a.hfb"


def test_without_boto3_the_refusal_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "boto3.session", raising=False)
    with pytest.raises(ConfigurationError, match="pip install boto3"):
        S3Store("s3://bucket/prefix", endpoint_url=None, region=None)


def test_boto3_is_loaded_only_for_a_store_in_s3() -> None:
    check = (
        "import sys, backend.backup.s3.store as _\n"
        "print('boto3' in sys.modules, 'botocore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "False"]
