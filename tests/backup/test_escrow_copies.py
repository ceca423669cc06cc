"""Beside each backup lies a copy for the holder of a GPG key, if there is one; it goes with it."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from backend.backup.manifest import escrow_name
from backend.models import BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.checkpoint_service import is_checkpoint
from tests.backup.gpg_keys import Keyring, keyring
from tests.backup.lives import Configure, acts, configured, create, names, parts_of, remove
from tests.conftest import ADMIN, Run, Service
from tests.services.trail import refuse_events, take_events_again

__all__ = ["configured"]  # a fixture
pytest.importorskip("gnupg", reason="python-gnupg is not installed")
if shutil.which("gpg") is None:
    pytest.skip("gpg is not installed on this machine", allow_module_level=True)


@pytest.fixture(scope="module")
def auditor() -> Iterator[Keyring]:
    with keyring() as keys:
        keys.make("auditor")
        yield keys


@pytest.fixture
def recipient(auditor: Keyring, tmp_path: Path) -> Path:
    file = tmp_path / "auditor.gpg"
    file.write_bytes(auditor.public("auditor"))
    return file


def test_the_copy_opens_without_us_and_lies_wherever_the_backup_does(
    sqlite_service: Service,
    configured: Configure,
    auditor: Keyring,
    recipient: Path,
    tmp_path: Path,
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    configured(backup_url=f"{first},{second}", backup_gpg_recipient=recipient)
    backup_id = create()
    assert acts("backup_escrowed") == ["done"]
    copy = (first / escrow_name(str(backup_id))).read_bytes()
    assert (second / escrow_name(str(backup_id))).read_bytes() == copy
    opened = auditor.open(copy)
    assert opened.returncode == 0
    database = tmp_path / "opened.db"
    database.write_bytes(zstandard.ZstdDecompressor().decompressobj().decompress(opened.stdout))
    connection = sqlite3.connect(database)
    assert connection.execute("SELECT count(*) FROM users").fetchone() == (1,)
    connection.close()
    for word in (ADMIN, "SQLite format", "users"):
        assert word.encode() not in copy


def test_the_copy_goes_with_the_backup(
    sqlite_service: Service, configured: Configure, recipient: Path, tmp_path: Path
) -> None:
    folders = tmp_path / "first", tmp_path / "second"
    configured(backup_url=",".join(map(str, folders)), backup_gpg_recipient=recipient)
    old, kept = create(), create()
    remove(old)
    for folder in folders:
        assert parts_of(old, folder) == []
        assert parts_of(kept, folder) == ["hfb", "key", "manifest.json", "zst.gpg"]


def test_a_gpg_that_fails_leaves_the_backup_as_it_is_and_is_recorded(
    sqlite_service: Service,
    configured: Configure,
    recipient: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configured(backup_gpg_recipient=recipient)
    folder = sqlite_service.folder / "backups"
    gpg = tmp_path / "gpg"
    # It looks at the key, and dies half way through the message.
    gpg.write_text(
        '#!/bin/sh\ncase "$*" in *--encrypt*) head -c 100; exit 2;; esac\n'
        f'exec {shutil.which("gpg")} "$@"\n'
    )
    gpg.chmod(0o755)
    with monkeypatch.context() as changed:
        changed.setenv("PATH", str(tmp_path), prepend=":")
        made = get_backup_service().create(COMMAND_LINE)
    assert (made.status, made.error) == (BackupStatus.COMPLETE, None)
    assert parts_of(made.id, folder) == ["hfb", "key", "manifest.json"]
    left = [name for name in names(folder) if not is_checkpoint(name)]
    assert all(name.startswith(str(made.id)) for name in left)
    recipient.unlink()
    gone = get_backup_service().create(COMMAND_LINE)
    assert gone.status is BackupStatus.COMPLETE
    assert acts("backup_escrowed") == ["unavailable", "configuration_error"]
    assert get_backup_service().verify(made.id, COMMAND_LINE).verified_at is not None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"no key", id="no key"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_recipient_that_is_none_refuses_the_start_with_one_line(
    sqlite_service: Service,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    file = tmp_path / "auditor.gpg"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("BACKUP_GPG_RECIPIENT", str(file))
    for command in (("init",), ("backup", "create")):
        refused = run(*command)
        assert refused.code == 2
        assert refused.err.startswith("holdfast: ")
        assert str(file) in refused.err
        assert refused.err.count("\n") == 1
    assert not (sqlite_service.folder / "backups").exists()


def test_the_refusal_of_a_recipient_names_the_setting(
    sqlite_service: Service, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BACKUP_GPG_RECIPIENT", str(tmp_path / "missing"))
    assert run("backup", "list").err.startswith("holdfast: BACKUP_GPG_RECIPIENT: ")


def test_a_copy_is_written_for_who_asks_and_never_over_a_file(
    sqlite_service: Service, run: Run, auditor: Keyring, recipient: Path, tmp_path: Path
) -> None:
    backup_id, out = str(create()), tmp_path / "copy.zst.gpg"
    refused = run("backup", "copy", backup_id, "-o", out)
    assert (refused.code, refused.err) == (
        2, "holdfast: give --recipient, or set BACKUP_GPG_RECIPIENT\n",
    )  # fmt: skip
    absent = "11111111-2222-3333-4444-555555555555"
    for unknown in (absent, "../../etc/passwd"):
        assert run("backup", "copy", unknown, "-o", out, "--recipient", recipient).code == 2
    refuse_events()
    assert run("backup", "copy", backup_id, "-o", out, "--recipient", recipient).code == 1
    take_events_again()
    assert (list(tmp_path.glob("*copy*")), acts("backup_copied")) == ([], [])
    done = run("backup", "copy", backup_id, "-o", out, "--recipient", recipient)
    assert done.code == 0, done.err
    assert acts("backup_copied") == ["begun", "done"]
    told = run("audit", "list", "--action", "backup_copied", "--json").json["items"]
    assert {each["detail"]["recipient"] for each in told} == {done.out.split()[-1]}
    assert auditor.open(out.read_bytes()).returncode == 0
    assert out.stat().st_mode & 0o777 == 0o600
    before = out.read_bytes()
    assert run("backup", "copy", backup_id, "-o", out, "--recipient", recipient).code == 2
    assert out.read_bytes() == before
