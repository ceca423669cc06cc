"""
The archive of one backup: zstd, then encryption, then digest, as one stream in constant memory.

The stream runs in a process of its own where there is much of it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol, cast

import zstandard

from backend.backup.storage import Store
from backend.errors import BackupDamagedError, NotFoundError

# Level 3 gives 2.4x; a second thread halves its time, and these jobs keep memory small: see
# benchmarks/.
_ZSTD_LEVEL: Final = 3
_ZSTD_THREADS: Final = min(4, os.cpu_count() or 1)
_ZSTD_JOB_BYTES: Final = 4 * 1024 * 1024
_READ_BYTES: Final = 1024 * 1024
# The largest window that zstd asks for at our level; a bomb may ask for more.
_MAX_WINDOW_BYTES: Final = 128 * 1024 * 1024

Report = Callable[[int], None]


class Payload(Protocol):
    """Encryption of one archive."""

    def seal(self, chunks: Iterable[bytes]) -> Iterator[bytes]: ...

    def open(self, source: "DigestingReader") -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Written:
    """How many bytes went in and came out, and the SHA-256 of what was stored."""

    plain_bytes: int
    size_bytes: int
    sha256: str


def write_archive(
    store: Store, name: str, plain: Iterable[bytes], payload: Payload, report: Report
) -> Written:
    """
    Store *plain* under *name*, compressed and sealed.

    An exception of *plain* (a failed dump) passes through before the last chunk is written, so a
    broken archive can never be opened; and it is not stored.

    Args:
        report: Told how many plain bytes were taken, now and then.
    """
    hasher = hashlib.sha256()
    taken, stored = 0, 0

    def compressed() -> Iterator[bytes]:
        nonlocal taken
        compressor = _compressor().compressobj()
        for chunk in plain:
            taken += len(chunk)
            if packed := compressor.compress(chunk):
                yield packed
            report(taken)
        yield compressor.flush()

    with store.create(name) as file:
        for chunk in payload.seal(compressed()):
            hasher.update(chunk)
            stored += len(chunk)
            file.write(chunk)
    return Written(taken, stored, hasher.hexdigest())


def _compressor() -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _ZSTD_LEVEL, threads=_ZSTD_THREADS, job_size=_ZSTD_JOB_BYTES, write_checksum=1
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where an archive lies, and what its manifest says of it."""

    name: str
    payload_offset: int
    plain_bytes: int
    sha256: str


def read_archive(
    store: Store, stored: Stored, payload: Payload, write: Callable[[bytes], object], report: Report
) -> None:
    """
    Give *write* what was backed up. Only when this returns was all of it right.

    Raises:
        BackupDamagedError: It is not the archive that the manifest names, or does not unpack; a
            bomb is stopped as soon as it is longer than it should be.
        CryptoError: The payload does not open.
    """
    given = 0
    for chunk in decompress(decrypted(store, stored, payload), stored.plain_bytes):
        write(chunk)
        given += len(chunk)
        report(given)


def decrypted(store: Store, stored: Stored, payload: Payload) -> Iterator[bytes]:
    """
    Yield the archive decrypted, still compressed; only its end proves it.

    Raises:
        BackupDamagedError: It is not the archive that the manifest names.
        CryptoError: The payload does not open.
    """
    try:
        with store.open(stored.name) as file:
            reader = DigestingReader(file)
            reader.skip(stored.payload_offset)
            yield from payload.open(reader)
            if reader.rest_digest() != stored.sha256:
                raise BackupDamagedError("the stored backup is not the one its manifest names")
    except NotFoundError:
        raise BackupDamagedError("the archive of the backup is missing") from None


class DigestingReader:
    """Reads a stored archive and knows, at its end, what the digest of all of it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hasher = hashlib.sha256()

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._hasher.update(data)
        return data

    def skip(self, size: int) -> None:
        """Read on behind the first *size* bytes."""
        while size > 0 and (data := self.read(size)):
            size -= len(data)

    def rest_digest(self) -> str:
        """Read to the end, and return the digest of the whole as hex."""
        while self.read(_READ_BYTES):
            pass
        return self._hasher.hexdigest()


def decompress(packed: Iterable[bytes], plain_bytes: int) -> Iterator[bytes]:
    """
    Yield what was compressed.

    Raises:
        BackupDamagedError: Not zstd, followed by more, or not *plain_bytes* long.
    """
    source = _Source(packed)
    # Read and not pushed: a bomb in one chunk would unpack to gigabytes before we saw any of it.
    unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    reader = unpacker.stream_reader(cast("BinaryIO", source))
    seen = 0
    try:
        while data := reader.read(_READ_BYTES):
            seen += len(data)
            if seen > plain_bytes:
                raise BackupDamagedError("the backup unpacks to more than its manifest says")
            yield data
    except zstandard.ZstdError:
        raise BackupDamagedError("the backup cannot be unpacked") from None
    if source.has_more():
        raise BackupDamagedError("the backup goes on behind its end")
    if seen != plain_bytes:
        raise BackupDamagedError("the backup is not whole")


class _Source:
    """Chunks as a file to read from."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def read(self, size: int = -1, /) -> bytes:
        data = self._rest
        while not data and (chunk := next(self._chunks, None)) is not None:
            data = chunk
        self._rest = data[size:] if size >= 0 else b""
        return data[:size] if size >= 0 else data

    def has_more(self) -> bool:
        """Whether anything follows; asking it to the end is what proves that nothing was cut."""
        return bool(self.read())
