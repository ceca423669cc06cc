"""A copy for an auditor: opened with gpg and zstd alone, by the one recipient, whole or not."""

import io
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

import pytest
import zstandard

from backend.backup import escrow
from backend.backup.escrow import read_recipient, wrap
from backend.backup.storage import LocalStore
from backend.errors import ConfigurationError, HoldfastError, UnavailableError
from tests.backup.gpg_keys import LONG_AGO, Keyring, keyring
from tests.backup.small_disks import room
from tests.conftest import KEY
from tests.test_house import ROOT

pytest.importorskip("gnupg", reason="python-gnupg is not installed")
if shutil.which("gpg") is None:
    pytest.skip("gpg is not installed on this machine", allow_module_level=True)

MIB: Final = 1024 * 1024
DATABASE: Final = b"".join(b"row %d of the database\n" % row for row in range(100_000))
AES_256: Final = b"DECRYPTION_INFO 2 9"


@dataclass(frozen=True)
class Key:
    """A recipient: the file that an operator would name, and its fingerprint."""

    file: Path
    fingerprint: str


@dataclass(frozen=True)
class Recipients:
    """An auditor's keyring with a key, and the files that are no key to encrypt to, by name."""

    keys: Keyring
    auditor: Key
    folder: Path


@pytest.fixture(scope="session")
def recipients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipients]:
    folder = tmp_path_factory.mktemp("recipients")
    with keyring() as keys:
        auditor = keys.make("auditor")
        for name, content in files(keys, auditor).items():
            (folder / name).write_bytes(content)
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe")
        (folder / "device").symlink_to("/dev/zero")
        (folder / "link").symlink_to(folder / "auditor")
        yield Recipients(keys, Key(folder / "auditor", auditor), folder)


def files(keys: Keyring, auditor: str) -> dict[str, bytes]:
    """What an operator may have put in the place of the auditor's public key."""
    old = ("--faked-system-time", LONG_AGO)
    revoked, signing = keys.make("revoked"), ("ed25519", "sign")
    keys.revoke(revoked)
    worn = keys.make("worn", *old, kind=signing)
    keys.run(*old, "--quick-add-key", worn, "cv25519", "encr", "1d")
    public, second = keys.public(auditor), keys.public(keys.make("second"))
    sealed = keys.run("--trust-model", "always", "-r", auditor, "--encrypt", data=b"a message")
    return {
        "auditor": public,
        "armored": keys.run("--armor", "--export", auditor).stdout,
        "expired": keys.public(keys.make("expired", *old, expires="1d")),
        "revoked": keys.public(revoked),
        "worn": keys.public(worn),
        "signing": keys.public(keys.make("signing", kind=signing)),
        "tampered": public[:-10] + bytes([public[-10] ^ 1]) + public[-9:],
        "secret": keys.secret(auditor),
        "both": public + keys.secret(auditor),
        "two": public + second,
        "half": public + second[:-40],
        "twice": public * 2,
        "cut": public[:-40],
        "longer": public + b"garbage" * 100_000,
        "message": sealed.stdout,
        "text": b"the key is with the auditor\n",
        "nothing": b"",
        "noise": os.urandom(MIB),
        "endless": public + bytes(MIB),
    }


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go, and the operator's keyring: both are after each test as before."""
    # Short, so that an agent could make its socket there: the path has at most 107 bytes.
    place, home = Path(tempfile.mkdtemp(prefix="hf-")), tmp_path / "operator"
    (home / ".gnupg").mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("GNUPGHOME", raising=False)
    yield place
    assert children() == []
    place.rmdir()
    assert list(home.rglob("*")) == [home / ".gnupg"]


def children() -> list[tuple[int, str]]:
    """Id and command line of each gpg, and each agent, that was started for a copy."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        # Each test has its own folder for temporary files: others' copies are elsewhere.
        if f"{tempfile.gettempdir()}/holdfast-gpg-" in command:
            found.append((int(process.name), command))
    return found


def wrapped(key: Key, *chunks: bytes) -> bytes:
    out = io.BytesIO()
    assert wrap(iter(chunks), key.file, out) == key.fingerprint
    return out.getvalue()


def never() -> Iterator[bytes]:
    """A dump that must not be begun."""

    def begin(_: bytes) -> bytes:
        pytest.fail("the dump was begun")

    return map(begin, [b""])


class Both:
    """Keeps what a store gets, to look at what would have been stored."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seen = b""

    def write(self, data: bytes) -> int:
        self.seen += data
        return self._file.write(data)


@pytest.mark.parametrize("name", ["auditor", "armored", "link"])
def test_one_public_key_is_taken_and_told_by_its_fingerprint(
    recipients: Recipients, name: str
) -> None:
    assert read_recipient(recipients.folder / name) == recipients.auditor.fingerprint


def test_an_auditor_opens_the_copy_with_gpg_and_zstd_and_nothing_of_ours(
    recipients: Recipients, tmp_path: Path
) -> None:
    packed = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(DATABASE)
    store = LocalStore(str(tmp_path / "store"))
    with store.create("copy.gpg") as out:
        wrap([packed[:10_000], b"", packed[10_000:]], recipients.auditor.file, out)
    opened = recipients.keys.run("--decrypt", store.location("copy.gpg")).stdout
    if shutil.which("zstd"):
        unpacked = subprocess.run(["zstd", "-d"], input=opened, capture_output=True, check=True)
        assert unpacked.stdout == DATABASE
    else:
        assert zstandard.ZstdDecompressor().decompress(opened) == DATABASE


@pytest.mark.parametrize("size", [0, 1, 65_536, 3 * MIB + 1])
def test_what_is_opened_is_what_was_given_whatever_its_size(
    recipients: Recipients, size: int
) -> None:
    data = os.urandom(size)
    opened = recipients.keys.open(wrapped(recipients.auditor, data))
    assert (opened.returncode, opened.stdout) == (0, data)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("secret", "holds a secret key, which does not belong here: export the public key"),
        ("both", "holds a secret key, which does not belong here: export the public key"),
        ("two", "holds 2 keys: one recipient is meant"),
        ("twice", "holds 2 keys: one recipient is meant"),
        ("expired", "has expired"),
        ("revoked", "was revoked"),
        ("worn", "has no part that can encrypt now"),
        ("signing", "has no part that can encrypt now"),
        ("tampered", "has no part that can encrypt now"),
        ("half", "holds no OpenPGP public key that gpg can read"),
        ("cut", "holds no OpenPGP public key that gpg can read"),
        ("longer", "holds no OpenPGP public key that gpg can read"),
        ("message", "holds no OpenPGP public key that gpg can read"),
        ("text", "holds no OpenPGP public key that gpg can read"),
        ("nothing", "holds no OpenPGP public key that gpg can read"),
        ("noise", "holds no OpenPGP public key that gpg can read"),
        ("endless", "is longer than a public key (1 MiB)"),
        ("missing", "cannot be read: No such file or directory"),
        ("folder", "is no plain file"),
        ("pipe", "is no plain file"),
        ("device", "is no plain file"),
    ],
)
def test_what_is_not_one_key_to_encrypt_to_is_refused_before_the_dump(
    recipients: Recipients, name: str, reason: str
) -> None:
    file, out = recipients.folder / name, io.BytesIO()
    with pytest.raises(ConfigurationError) as refusal:
        read_recipient(file)
    assert str(refusal.value).endswith(reason)
    assert str(file) in refusal.value.detail
    with pytest.raises(ConfigurationError) as again:
        wrap(never(), file, out)
    assert (str(again.value), out.getvalue()) == (str(refusal.value), b"")


def test_nobody_but_the_recipient_opens_it(recipients: Recipients) -> None:
    message = wrapped(recipients.auditor, DATABASE)
    with keyring() as other:
        other.make("other")
        refused = other.open(message)
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert b"DECRYPTION_FAILED" in refused.stderr


def test_the_operators_keys_and_options_are_neither_read_nor_changed(
    recipients: Recipients, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keyring() as operator:
        own = operator.make("operator")
        (operator.home / "gpg.conf").write_text(f"encrypt-to {own}\narmor\nverbose\n")
        monkeypatch.setenv("GNUPGHOME", str(operator.home))
        before = contents(operator.home)
        message = wrapped(recipients.auditor, DATABASE)
        assert contents(operator.home) == before
        assert operator.open(message).returncode == 2
    told = recipients.keys.open(message).stderr
    assert told.count(b"ENC_TO") == 1


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    plain = [path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode)]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in plain}


def test_it_is_aes_256_and_not_compressed_again_whatever_the_key_prefers(
    recipients: Recipients, tmp_path: Path
) -> None:
    options = ("--default-preference-list", "3DES ZIP")
    key = Key(tmp_path / "old", recipients.keys.make("old", *options))
    key.file.write_bytes(recipients.keys.public(key.fingerprint))
    message = wrapped(key, DATABASE)
    assert len(message) > len(DATABASE)
    assert AES_256 in recipients.keys.open(message).stderr


def test_a_flipped_bit_and_a_cut_are_noticed(recipients: Recipients) -> None:
    message = wrapped(recipients.auditor, DATABASE)
    for place in (30, len(message) // 2, len(message) - 1):
        changed = bytearray(message)
        changed[place] ^= 1
        assert recipients.keys.open(bytes(changed)).returncode != 0
    assert recipients.keys.open(message[:-1]).returncode != 0


@pytest.mark.parametrize("before", [b"", b"a short dump", DATABASE])
def test_a_dump_that_fails_at_its_end_leaves_no_message_that_opens(
    recipients: Recipients, before: bytes
) -> None:
    out = io.BytesIO()
    failure = LookupError("the dump failed")

    def chunks() -> Iterator[bytes]:
        yield before
        raise failure

    with pytest.raises(LookupError) as passed:
        wrap(chunks(), recipients.auditor.file, out)
    assert passed.value is failure
    assert bool(out.getvalue()) is (before is DATABASE)
    assert recipients.keys.open(out.getvalue()).returncode != 0


def ending(act: Callable[[int], None], *, again: bool) -> Iterator[bytes]:
    """Yield a dump in whose middle *act* gets the id of the gpg at work."""
    yield DATABASE
    ((pid, command),) = children()
    assert "--encrypt" in command
    act(pid)
    if again:
        yield DATABASE


@pytest.mark.parametrize("again", [True, False], ids=["in the middle", "at the end"])
def test_a_killed_gpg_is_told_and_leaves_no_message_that_opens(
    recipients: Recipients, tmp_path: Path, again: bool
) -> None:
    store = LocalStore(str(tmp_path / "store"))
    out: list[Both] = []

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def copy() -> None:
        with store.create("copy.gpg") as file:
            out.append(Both(file))
            wrap(ending(kill, again=again), recipients.auditor.file, cast("BinaryIO", out[0]))

    with pytest.raises(UnavailableError, match=r"gpg (ended before|failed with status -9)"):
        copy()
    assert store.names("", "") == []
    assert out[0].seen
    assert recipients.keys.open(out[0].seen).returncode != 0


@pytest.fixture
def changed_gpg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a gpg on PATH that is the real one, but runs *script* for *option*."""
    real, path = shutil.which("gpg"), tmp_path / "bin"

    def change(option: str, script: str) -> None:
        path.mkdir()
        case = f'case "$*" in *{option}*) {script} ;; *) exec {real} "$@" ;; esac'
        (path / "gpg").write_text(f"#!/bin/sh\n{case}\n")
        (path / "gpg").chmod(0o700)
        monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")

    return change


def test_a_gpg_that_fails_behind_its_last_byte_leaves_no_message_that_opens(
    recipients: Recipients, changed_gpg: Callable[[str, str], None]
) -> None:
    changed_gpg("--encrypt", f'{shutil.which("gpg")} "$@"; exit 3')
    out = io.BytesIO()
    with pytest.raises(UnavailableError, match="gpg failed with status 3"):
        wrap([DATABASE], recipients.auditor.file, out)
    assert out.getvalue()
    assert recipients.keys.open(out.getvalue()).returncode != 0


def test_a_gpg_that_ends_its_message_before_the_dump_has_not_done_its_work(
    recipients: Recipients, changed_gpg: Callable[[str, str], None]
) -> None:
    changed_gpg("--encrypt", "exec cat > /dev/null")
    with pytest.raises(UnavailableError, match="gpg ended before the copy did"):
        wrap([DATABASE] * 9, recipients.auditor.file, io.BytesIO())


def test_a_gpg_that_is_killed_at_the_key_is_not_taken_for_a_bad_key(
    recipients: Recipients, changed_gpg: Callable[[str, str], None]
) -> None:
    changed_gpg("--import", "cat > /dev/null; kill -9 $$")
    with pytest.raises(UnavailableError, match="gpg was ended by signal 9"):
        read_recipient(recipients.auditor.file)


@pytest.mark.parametrize("again", [True, False], ids=["in the middle", "at the end"])
def test_a_gpg_that_stands_still_is_given_up(
    recipients: Recipients, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr(escrow, "_SILENCE_SECONDS", 0.3)

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)

    with pytest.raises(UnavailableError, match="gpg did nothing"):
        wrap(ending(stop, again=again), recipients.auditor.file, io.BytesIO())


def test_a_store_that_takes_no_more_is_told_and_holds_nothing(
    recipients: Recipients, tmp_path: Path
) -> None:
    store = LocalStore(str(tmp_path / "store"))

    def copy() -> None:
        with store.create("copy.gpg") as out:
            wrap([DATABASE, DATABASE], recipients.auditor.file, out)

    with room(MIB), pytest.raises(UnavailableError, match="written: File too large") as held:
        copy()
    # Even while the error, and with it each frame, is still looked at.
    assert (children(), held.type) == ([], UnavailableError)
    assert store.names("", "") == []
    copy()
    assert recipients.keys.open(Path(store.location("copy.gpg")).read_bytes()).returncode == 0


def test_no_room_for_temporary_files_is_not_taken_for_a_bad_key(
    recipients: Recipients, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with room(0), pytest.raises(UnavailableError, match="the folder for gpg cannot be written"):
        wrap(never(), recipients.auditor.file, io.BytesIO())
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "missing"))
    with pytest.raises(UnavailableError, match="no folder for gpg can be made"):
        read_recipient(recipients.auditor.file)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))


def test_while_it_works_its_folder_is_private_no_agent_runs_and_gpg_gets_none_of_our_secrets(
    recipients: Recipients, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCRYPTION_KEY", KEY)

    def chunks() -> Iterator[bytes]:
        yield DATABASE
        (home,) = temporary.iterdir()
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert [path.name for path in home.iterdir() if path.name != "trustdb.gpg"] == ["recipient"]
        ((pid, _),) = children()
        given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {pair.split(b"=")[0] for pair in given if pair} == {b"PATH", b"HOME", b"LC_ALL"}

    wrap(chunks(), recipients.auditor.file, io.BytesIO())


_MEASURED: Final = """
import resource, sys
from pathlib import Path
from backend.backup.escrow import wrap

class Nowhere:
    size = 0
    def write(self, data):
        self.size += len(data)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

key, chunk, out = Path(sys.argv[1]), bytes(range(256)) * 4096, Nowhere()
wrap([chunk], key, out)
before = peak()
wrap((chunk for _ in range(200)), key, out)
print(peak() - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, out.size)
"""


def test_200_mib_need_no_more_memory_than_one(recipients: Recipients) -> None:
    command = [sys.executable, "-c", _MEASURED, str(recipients.auditor.file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ours, gpgs, size = map(int, done.stdout.split())
    assert size > 201 * MIB
    assert (ours < 8, gpgs < 64) == (True, True), done.stdout


def test_neither_user_ids_nor_key_material_are_logged(
    recipients: Recipients, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    read_recipient(recipients.auditor.file)
    with pytest.raises(HoldfastError) as refusal:
        read_recipient(recipients.folder / "secret")
    assert "example.org" not in caplog.text + str(refusal.value)
    assert "scan_keys" not in caplog.text


def test_without_python_gnupg_it_says_what_to_install(
    recipients: Recipients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gnupg", None)
    with pytest.raises(ConfigurationError, match="needs python-gnupg: pip install it"):
        wrap(never(), recipients.auditor.file, io.BytesIO())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (None, "install the package gnupg; there is no gpg on PATH"),
        ("exit 127", "install the package gnupg; .*/gpg does not run"),
        ("echo cfg:version:1.4.23", "install the package gnupg; .*/gpg is older"),
    ],
)
def test_without_a_gpg_that_fits_it_says_what_to_install(
    recipients: Recipients,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    program: str | None,
    reason: str,
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    if program:
        (folder / "gpg").write_text(f"#!/bin/sh\n{program}\n")
        (folder / "gpg").chmod(0o700)
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ConfigurationError, match=reason):
        read_recipient(recipients.auditor.file)
