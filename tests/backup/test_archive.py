"""An archive opens to exactly what went in, or not at all, and is stored whole or not at all."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.backup.archive import Stored, Written, decompress, read_archive, write_archive
from backend.backup.storage import LocalStore
from backend.crypto.files import HEADER_BYTES, KeyringLock, PayloadKey, Sealer
from backend.crypto.keyring import Keyring, RootKey
from backend.errors import BackupDamagedError, ConflictError, TamperedError

KEYS: Final = Keyring(RootKey(bytes(range(32))))
NOW: Final = datetime(2026, 3, 1, tzinfo=UTC)
NAME: Final = "a.hfb"
# A window of 2 GiB, and four bytes as they are (RFC 8878, 3.1.1.1.2 and 3.1.1.2).
GIANT_WINDOW: Final = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x21\x00\x00data"
chunkings = st.lists(st.binary(max_size=3000), max_size=12)


def _ignore(_done: int) -> None:
    """Nobody watches."""


def _sealer() -> Sealer:
    return Sealer({"kind": "backup"}, [KeyringLock(KEYS)], now=NOW)


def _key() -> PayloadKey:
    return _sealer().payload


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _write(store: LocalStore, plain: Iterable[bytes], key: PayloadKey, name: str = NAME) -> Written:
    return write_archive(store, name, plain, key, _ignore)


def _stored(written: Written, name: str = NAME, offset: int = 0) -> Stored:
    return Stored(name, offset, written.plain_bytes, written.sha256)


def _read(store: LocalStore, stored: Stored, key: PayloadKey) -> bytes:
    given: list[bytes] = []
    read_archive(store, stored, key, given.append, _ignore)
    return b"".join(given)


@settings(max_examples=60)
@given(chunks=chunkings)
def test_an_archive_opens_to_what_went_in_however_it_was_cut(chunks: list[bytes]) -> None:
    whole, taken, given_back = b"".join(chunks), [0], [0]
    with tempfile.TemporaryDirectory() as folder:
        store, key = LocalStore(folder), _key()
        written = write_archive(store, NAME, chunks, key, taken.append)
        raw = (Path(folder) / NAME).read_bytes()
        assert written == Written(len(whole), len(raw), hashlib.sha256(raw).hexdigest())
        found: list[bytes] = []
        read_archive(store, _stored(written), key, found.append, given_back.append)
        assert b"".join(found) == whole
    for told in (taken, given_back):
        assert told == sorted(told)
        assert told[-1] == len(whole)


def test_an_archive_larger_than_any_buffer_opens_to_what_went_in(store: LocalStore) -> None:
    chunks, key = [os.urandom(700_000) for _ in range(14)], _key()
    assert _read(store, _stored(_write(store, chunks, key)), key) == b"".join(chunks)


def test_an_archive_is_compressed_and_hides_what_is_in_it(store: LocalStore, folder: Path) -> None:
    _write(store, [b"jane@example.com " * 20_000], _key())
    stored = (folder / NAME).read_bytes()
    assert len(stored) < 20_000
    assert b"jane" not in stored


class DumpFailedError(Exception):
    """Stands for whatever a dump fails with."""


@settings(max_examples=25)
@given(chunks=chunkings)
def test_a_dump_that_fails_anywhere_is_never_stored(chunks: list[bytes]) -> None:
    def dump() -> Iterator[bytes]:
        yield from chunks
        raise DumpFailedError

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(DumpFailedError):
            _write(LocalStore(folder), dump(), _key())
        assert list(Path(folder).iterdir()) == []


def test_what_a_writer_had_written_when_its_dump_failed_does_not_open(
    store: LocalStore, folder: Path
) -> None:
    """A store may keep it, and a killed process leaves it."""
    left: list[bytes] = []
    key = _key()

    def dump() -> Iterator[bytes]:
        for _ in range(8):
            yield os.urandom(1024 * 1024)
        (partial,) = folder.iterdir()
        left.append(partial.read_bytes())
        raise DumpFailedError

    with pytest.raises(DumpFailedError):
        _write(store, dump(), key)
    assert len(left[0]) > 256 * 1024
    with store.create(NAME) as file:
        file.write(left[0])
    sha256 = hashlib.sha256(left[0]).hexdigest()
    with pytest.raises(TamperedError):
        _read(store, Stored(NAME, 0, 8 * 1024 * 1024, sha256), key)


def test_an_archive_is_never_written_over_another(store: LocalStore) -> None:
    key = _key()
    written = _write(store, [b"first"], key)
    with pytest.raises(ConflictError):
        _write(store, [b"second"], key)
    assert _read(store, _stored(written), key) == b"first"


def test_an_archive_that_is_not_there_is_damage_of_its_backup(store: LocalStore) -> None:
    written = _write(store, [b"data"], _key())
    with pytest.raises(BackupDamagedError, match="missing"):
        _read(store, _stored(written, "b.hfb"), _key())


def _compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def _pieces(data: bytes) -> list[bytes]:
    return [data[at : at + 1000] for at in range(0, len(data), 1000)]


def _seal(store: LocalStore, packed: bytes, key: PayloadKey, plain_bytes: int) -> Stored:
    """Store what is packed already, correctly sealed and named."""
    sealed = b"".join(key.seal([packed]))
    with store.create(NAME) as file:
        file.write(sealed)
    return Stored(NAME, 0, plain_bytes, hashlib.sha256(sealed).hexdigest())


def _peak_bytes_of(act: Callable[[], object]) -> int:
    """How much more memory than before *act* needed at its worst."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    act()
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


@pytest.fixture(scope="module")
def bomb() -> bytes:
    """64 KiB, one chunk of which unpacks to 2 GiB."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(16 * 1024 * 1024)
    return b"".join([*(packer.compress(zeros) for _ in range(128)), packer.flush()])


@pytest.mark.parametrize("claimed", [1_000_000, 16 * 1024 * 1024])
def test_a_bomb_in_a_sealed_archive_is_stopped_in_little_memory(
    store: LocalStore, bomb: bytes, claimed: int
) -> None:
    key = _key()
    stored = _seal(store, bomb, key, claimed)
    unpacked: list[int] = []

    def read() -> None:
        with pytest.raises(BackupDamagedError, match="more than its manifest says"):
            read_archive(store, stored, key, lambda data: unpacked.append(len(data)), _ignore)

    assert _peak_bytes_of(read) < 32 * 1024 * 1024
    assert sum(unpacked) <= claimed


def test_a_frame_that_asks_for_gigabytes_is_refused(store: LocalStore) -> None:
    key = _key()
    stored = _seal(store, GIANT_WINDOW, key, 4)
    with pytest.raises(BackupDamagedError, match="cannot be unpacked"):
        _read(store, stored, key)


@pytest.mark.parametrize("claimed", [0, 4999, 5001])
def test_another_length_than_the_manifest_says_is_refused(claimed: int) -> None:
    data = os.urandom(5000)
    assert b"".join(decompress(_pieces(_compressed(data)), 5000)) == data
    with pytest.raises(BackupDamagedError):
        b"".join(decompress(_pieces(_compressed(data)), claimed))


@pytest.mark.parametrize("extra", [b"\x00", b"more", _compressed(b"more")])
def test_bytes_behind_the_end_are_refused(extra: bytes) -> None:
    whole = _compressed(b"data")
    for chunks in ([whole + extra], [whole, extra]):
        with pytest.raises(BackupDamagedError):
            b"".join(decompress(chunks, 4))


def test_a_cut_stream_is_refused_wherever_it_is_cut() -> None:
    whole = _compressed(os.urandom(300))
    for end in range(0, len(whole), 7):
        with pytest.raises(BackupDamagedError):
            b"".join(decompress([whole[:end]], 300))


def test_what_is_not_zstd_is_refused() -> None:
    with pytest.raises(BackupDamagedError):
        b"".join(decompress([b"plain text"], 10))


def test_an_archive_swapped_for_another_of_the_same_service_is_refused(store: LocalStore) -> None:
    key, other = _key(), _key()
    written = _write(store, [b"data"], key)
    swapped = _write(store, [b"data"], other, "b.hfb")
    assert _read(store, _stored(written), key) == b"data"
    with pytest.raises(TamperedError):
        _read(store, _stored(written, "b.hfb"), key)
    with pytest.raises(BackupDamagedError, match="not the one its manifest names"):
        _read(store, _stored(written, "b.hfb"), other)
    assert _read(store, _stored(swapped, "b.hfb"), other) == b"data"


def test_the_digest_covers_what_is_skipped(store: LocalStore, folder: Path) -> None:
    """The first format's header lies in the archive, and is read from elsewhere later."""
    sealer = _sealer()
    whole = b"".join(sealer.seal([_compressed(b"data")]))
    stored = Stored(NAME, HEADER_BYTES, 4, hashlib.sha256(whole).hexdigest())
    folder.mkdir()
    (folder / NAME).write_bytes(whole)
    assert _read(store, stored, sealer.payload) == b"data"
    for at in (0, HEADER_BYTES // 2, HEADER_BYTES - 1):
        (folder / NAME).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BackupDamagedError, match="not the one its manifest names"):
            _read(store, stored, sealer.payload)


@settings(max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.binary(max_size=99))
def test_no_bit_of_an_archive_can_be_flipped(where: float, bit: int, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, key, path = LocalStore(folder), _key(), Path(folder) / NAME
        stored = _stored(_write(store, [data], key))
        whole = path.read_bytes()
        at = int(where * len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        with pytest.raises(TamperedError):
            _read(store, stored, key)
