"""
Zip archives as a stream: plain, or locked with a passphrase for 7-Zip and alike.

A locked archive is AES-256 in the form of WinZip (AE-2), so a person needs nothing of ours to open
it. The form is fixed: PBKDF2-HMAC-SHA1 with 1000 rounds stretches the passphrase, and names, sizes
and the time of the members stay readable.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, Final

# 7-Zip refuses a longer passphrase for a zip (kPasswordSizeMax in its WzAes.h).
PASSPHRASE_MAX: Final = 99
_BLOCK_BYTES: Final = 64 * 1024

Member = tuple[str, Iterator[bytes]]


def takes_passphrase(passphrase: str) -> bool:
    """
    Tell whether archivers agree on *passphrase*.

    Outside ASCII each spells it its own way (7-Zip in the code page of the machine), so that the
    archive would open on some machines only.
    """
    printable = passphrase.isascii() and passphrase.isprintable()
    return printable and 0 < len(passphrase) <= PASSPHRASE_MAX


class _Drain(io.RawIOBase):
    """A file that cannot seek: what zipfile writes is handed on at once."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def archive(
    members: Iterable[Member], at: datetime, passphrase: str | None = None
) -> Iterator[bytes]:
    """
    Yield a zip of *members*, which all have the time *at*; memory does not grow with their size.

    Args:
        passphrase: Locks it; one that `takes_passphrase` accepts.
    """
    drain = _Drain()
    zip_, info_class = _zip_on(drain, passphrase)
    with zip_:
        for name, chunks in members:
            info = info_class(name, at.timetuple()[:6])
            info.compress_type = zipfile.ZIP_DEFLATED
            with zip_.open(info, "w", force_zip64=True) as member:
                for block in _blocks(chunks):
                    member.write(block)
                    if data := drain.take():
                        yield data
    yield drain.take()


def _zip_on(drain: _Drain, passphrase: str | None) -> tuple[Any, Any]:
    """Return an empty zip that writes to *drain*, and the class that describes its members."""
    if passphrase is None:
        return zipfile.ZipFile(drain, "w", zipfile.ZIP_DEFLATED), zipfile.ZipInfo
    # Late: few processes lock one, and all would pay for it at their start.
    import pyzipper  # type: ignore[import-untyped] # It ships no types.

    zip_ = pyzipper.AESZipFile(drain, "w", pyzipper.ZIP_DEFLATED)
    zip_.setpassword(passphrase.encode("ascii"))
    # AE-2 leaves out the CRC of the plain text, which would tell what a short member holds.
    zip_.setencryption(
        pyzipper.WZ_AES, nbits=256, force_wz_aes_version=pyzipper.zipfile_aes.WZ_AES_V2
    )
    return zip_, zip_.zipinfo_cls


def _blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Gather small chunks: encrypting each line by itself costs more than the cipher."""
    block = bytearray()
    for chunk in chunks:
        block += chunk
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)
