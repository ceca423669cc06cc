"""OpenPGP keys of made-up recipients, made by the system's gpg in a keyring of the test's own."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

LONG_AGO: Final = "20200101T000000"
# Taken before a test changes it, and short: the path of the agent's socket has at most 107 bytes.
_PLACE: Final = tempfile.gettempdir()
_CAN_BOTH: Final = ("future-default", "default")


class Keyring:
    """A keyring with secret keys: it makes them, and opens what was encrypted to them."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(
        self, *arguments: str | Path, data: bytes = b"", ok: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--no-tty", "--quiet"]
        command += ["--pinentry-mode", "loopback", "--passphrase", "", *map(str, arguments)]
        done = subprocess.run(command, input=data, capture_output=True, check=False)
        assert not ok or done.returncode == 0, done.stderr.decode()
        return done

    def make(
        self, name: str, *options: str, kind: tuple[str, str] = _CAN_BOTH, expires: str = "never"
    ) -> str:
        """Make a key for *name*, without a passphrase, and return its fingerprint."""
        self.run(*options, "--quick-gen-key", f"{name} <{name}@example.org>", *kind, expires)
        listed = self.run("--with-colons", "--list-keys", f"={name} <{name}@example.org>")
        lines = listed.stdout.decode().splitlines()
        return next(line.split(":")[9] for line in lines if line.startswith("fpr:"))

    def revoke(self, fingerprint: str) -> None:
        """Publish the revocation that gpg prepares, disarmed by a colon, with each key."""
        prepared = (self.home / "openpgp-revocs.d" / f"{fingerprint}.rev").read_text()
        self.run("--import", data=prepared.replace(":-----BEGIN", "-----BEGIN").encode())

    def public(self, *fingerprints: str) -> bytes:
        return self.run("--export", *fingerprints).stdout

    def secret(self, fingerprint: str) -> bytes:
        return self.run("--export-secret-keys", fingerprint).stdout

    def open(self, message: bytes) -> subprocess.CompletedProcess[bytes]:
        """Decrypt as the holder of these keys; the status lines are on stderr."""
        return self.run("--status-fd", "2", "--decrypt", data=message, ok=False)


@contextmanager
def keyring() -> Iterator[Keyring]:
    """Make an empty keyring, and end its agent and remove it afterwards."""
    home = Path(tempfile.mkdtemp(prefix="hf-keys-", dir=_PLACE))
    try:
        yield Keyring(home)
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
        shutil.rmtree(home, ignore_errors=True)
