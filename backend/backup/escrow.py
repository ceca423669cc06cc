"""
A copy for an escrow holder or an off-site auditor: one OpenPGP message to one public key.

The message holds the compressed dump and nothing of ours: `gpg -d COPY | zstd -d > DATABASE`.
It is made by the system's `gpg` in a folder of its own; the operator's keys and options are neither
read nor changed. python-gnupg reads the key. It does not carry the dump: when its source fails, it
ends the input as if all were said, and gpg finishes a message that opens.
"""

import logging
import os
import selectors
import shutil
import stat
import subprocess
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, BinaryIO, Final, cast

from backend.errors import ConfigurationError, UnavailableError

# A key that many have signed takes some hundred KiB.
_MAX_KEY_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 1024 * 1024
# gpg keeps its trust database there while it looks at a key.
_ROOM_BYTES: Final = 64 * 1024
_SILENCE_SECONDS: Final = 60.0
# The first with --recipient-file and with a modification check that cannot be left out.
_OLDEST_GPG: Final = (2, 2)
# No options of the operator or the machine, and no agent: a public key needs none.
_ALONE: Final = ("--no-options", "--no-keyring", "--no-autostart")
# The stream is compressed already. AES-256: a key that states no preference would get 3DES, whose
# blocks of 64 bits are too short for a database.
_HOW: Final = ("--trust-model", "always", "--compress-algo", "none", "--cipher-algo", "AES256")


def read_recipient(key_file: Path) -> str:
    """
    Check that *key_file* holds the public key of one recipient, and return its fingerprint.

    Args:
        key_file: One OpenPGP public key, armored or binary, at most 1 MiB.

    Returns:
        The fingerprint of the primary key, in upper-case hex.

    Raises:
        ConfigurationError: gpg or python-gnupg is not installed, or this is not one public key that
            can encrypt now.
        UnavailableError: The folder for temporary files is full.
    """
    key = _read_key(key_file)
    with _private_home() as home:
        return _fingerprint(_gpg(home), key, key_file)


def wrap(chunks: Iterable[bytes], key_file: Path, out: BinaryIO) -> str:
    """
    Encrypt *chunks* to the key in *key_file* alone, in constant memory.

    An exception of *chunks* passes through. After any exception, what *out* received is cut: gpg
    does not open it without an error.

    Args:
        out: Receives the binary OpenPGP message; only `write` is used.

    Returns:
        The fingerprint of the recipient.

    Raises:
        ConfigurationError: As for `read_recipient`; nothing was written.
        UnavailableError: gpg failed, or *out* or the folder for temporary files is full.
    """
    key = _read_key(key_file)
    with _private_home() as home:
        gpg = _gpg(home)
        fingerprint = _fingerprint(gpg, key, key_file)
        recipient = home / "recipient"
        _store(recipient, key)
        command = gpg.make_args([*_HOW, "--recipient-file", str(recipient), "--encrypt"], None)
        # Closed here: a traceback would keep the generator, and so gpg, alive.
        with closing(_message(command, gpg.env, chunks)) as message:
            for block in message:
                _write(out, block)
    return fingerprint


def _read_key(key_file: Path) -> bytes:
    try:
        # O_NONBLOCK: a pipe must not block us for ever. A link is followed: a mounted file is one.
        descriptor = os.open(key_file, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ConfigurationError(f"{key_file} is no plain file")
        with os.fdopen(descriptor, "rb") as file:
            key = file.read(_MAX_KEY_BYTES + 1)
    except OSError as err:
        raise ConfigurationError(f"{key_file} cannot be read: {err.strerror}") from err
    if len(key) > _MAX_KEY_BYTES:
        raise ConfigurationError(f"{key_file} is longer than a public key (1 MiB)")
    return key


@contextmanager
def _private_home() -> Iterator[Path]:
    """Make a folder (0700) for gpg, and remove it in the end."""
    try:
        folder = TemporaryDirectory(prefix="holdfast-gpg-")
    except OSError as err:
        raise UnavailableError(f"no folder for gpg can be made: {err.strerror}") from err
    with folder as home:
        # On a full disk gpg fails as it does on a broken key: find out first.
        room = Path(home) / "room"
        _store(room, bytes(_ROOM_BYTES))
        room.unlink()
        yield Path(home)


def _store(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as err:
        raise UnavailableError(f"the folder for gpg cannot be written: {err.strerror}") from err


def _gpg(home: Path) -> Any:
    """Start with the system's gpg, and with nothing of our environment: it holds our key."""
    try:
        import gnupg
    except ImportError:
        raise ConfigurationError("a copy for escrow needs python-gnupg: pip install it") from None
    # At debug level it logs user ids, and the beginning of what was taken for a public key.
    logging.getLogger(gnupg.__name__).setLevel(logging.CRITICAL)
    path = os.environ.get("PATH", os.defpath)
    binary = shutil.which("gpg", path=path)
    needed = "a copy for escrow needs GnuPG 2.2 or newer: install the package gnupg"
    if binary is None:
        raise ConfigurationError(f"{needed}; there is no gpg on PATH")
    environment = {"PATH": path, "HOME": str(home), "LC_ALL": "C"}
    try:
        gpg = gnupg.GPG(binary, str(home), options=list(_ALONE), env=environment)
    except (OSError, ValueError) as err:
        raise ConfigurationError(f"{needed}; {binary} does not run") from err
    if (gpg.version or ()) < _OLDEST_GPG:
        raise ConfigurationError(f"{needed}; {binary} is older")
    return gpg


def _fingerprint(gpg: Any, key: bytes, key_file: Path) -> str:
    """Refuse all but one public key that can encrypt; the reason quotes nothing of the key."""
    unreadable = ConfigurationError(f"{key_file} holds no OpenPGP public key that gpg can read")
    try:
        # From memory: a secret key that was given by mistake must not be copied to a disk.
        found = gpg.scan_keys_mem(key)
    except BrokenPipeError:
        # It did not want to read on.
        raise unreadable from None
    if found.returncode < 0:
        raise UnavailableError(f"gpg was ended by signal {-found.returncode}")
    if any(one["type"] == "sec" for one in found):
        raise ConfigurationError(
            f"{key_file} holds a secret key, which does not belong here: export the public key"
        )
    if found.returncode != 0 or not found:
        raise unreadable
    if len(found) > 1:
        raise ConfigurationError(f"{key_file} holds {len(found)} keys: one recipient is meant")
    (only,) = found
    if state := {"e": "has expired", "r": "was revoked"}.get(only["trust"]):
        raise ConfigurationError(f"the key in {key_file} {state}")
    # A capital letter stands for a part of the key that can do this now (GnuPG, doc/DETAILS).
    if "E" not in only["cap"]:
        raise ConfigurationError(f"the key in {key_file} has no part that can encrypt now")
    return str(only["fingerprint"])


def _message(
    command: list[str], environment: dict[str, str], chunks: Iterable[bytes]
) -> Generator[bytes, None, None]:
    """Yield what gpg makes of *chunks*: the last block only after gpg has ended well."""
    with subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Its words may quote the user id of the key.
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        held = b""
        try:
            for block in _exchange(process, chunks):
                yield held
                held = block
        except BaseException:
            # What gpg would still write is not taken, and it cannot keep us waiting.
            process.kill()
            raise
        if process.wait() != 0:
            raise UnavailableError(f"gpg failed with status {process.returncode}")
        yield held


def _exchange(process: subprocess.Popen[bytes], chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Feed gpg, and yield what it writes meanwhile; whoever only writes blocks on a full pipe."""
    given, taken = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
    os.set_blocking(given.fileno(), False)
    with selectors.DefaultSelector() as pipes:
        pipes.register(taken, selectors.EVENT_READ)
        pipes.register(given, selectors.EVENT_WRITE)
        for chunk in chunks:
            left = memoryview(chunk)
            while left:
                for pipe in _ready(pipes):
                    if pipe is given:
                        left = left[_feed(given, left) :]
                    elif block := os.read(taken.fileno(), _READ_BYTES):
                        yield block
                    else:
                        raise UnavailableError("gpg ended before the copy did")
        pipes.unregister(given)
        given.close()
        while _ready(pipes) and (block := os.read(taken.fileno(), _READ_BYTES)):
            yield block


def _ready(pipes: selectors.BaseSelector) -> list[Any]:
    ready = [key.fileobj for key, _ in pipes.select(_SILENCE_SECONDS)]
    if not ready:
        raise UnavailableError(f"gpg did nothing for {_SILENCE_SECONDS:.0f} seconds")
    return ready


def _feed(given: IO[bytes], data: memoryview) -> int:
    try:
        return os.write(given.fileno(), data)
    except BrokenPipeError:
        raise UnavailableError("gpg ended before the copy did") from None


def _write(out: BinaryIO, block: bytes) -> None:
    try:
        out.write(block)
    except OSError as err:
        raise UnavailableError(f"the copy cannot be written: {err.strerror}") from err
