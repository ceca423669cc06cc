"""How old the backups are is told to probes; what this machine lacks for them is told in a line."""

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient

from backend.errors import HoldfastError
from backend.models import BackupRecord, BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.setup_service import get_setup_service
from tests.backup.lives import (
    PATH,
    SQLITE,
    Configure,
    Headers,
    change,
    configured,
    create,
    listed,
    names,
    records,
)
from tests.conftest import OTHER_KEY, Run, Service, clear_caches, set_environment
from tests.test_house import ROOT

__all__ = ["configured"]  # a fixture
HOUR: Final = 3600
POSTGRESQL = pytest.mark.parametrize("service", ["postgresql"], indirect=True)
_PROGRAMS: Final = Path("/usr/lib/postgresql")


# How old they are


def gauges(client: TestClient) -> tuple[str, str]:
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines())
    both = "holdfast_backup_age_seconds", "holdfast_backup_proven_age_seconds"
    return lines[both[0]], lines[both[1]]


def ages(client: TestClient) -> tuple[int | None, int | None]:
    ready = client.get("/readyz")
    assert ready.status_code == 200
    backup = ready.json()["backup"]
    return backup["newest_seconds"], backup["proven_seconds"]


@SQLITE
def test_without_a_backup_there_is_no_age_and_the_gauges_are_infinite(client: TestClient) -> None:
    assert ages(client) == (None, None)
    assert gauges(client) == ("+Inf", "+Inf")


@SQLITE
def test_the_age_of_the_newest_and_of_the_newest_proven_are_told_apart(
    client: TestClient, service: Service, now: datetime
) -> None:
    def is_of(found: tuple[Any, Any], *hours: int | None) -> bool:
        return all(
            abs(float(age) - wanted * HOUR) < 60 if wanted is not None else age in (None, "+Inf")
            for age, wanted in zip(found, hours, strict=True)
        )

    proven, newest = create(), create()
    change(proven, created_at=now - timedelta(hours=90 * 24))
    change(newest, created_at=now - timedelta(hours=2))
    assert is_of(ages(client), 2, None)
    assert is_of(gauges(client), 2, None)
    change(proven, verified_at=now)
    # However old: no reason to take a service away from its users.
    assert is_of(ages(client), 2, 90 * 24)
    assert is_of(gauges(client), 2, 90 * 24)
    get_backup_service().verify(newest, COMMAND_LINE)
    assert is_of(ages(client), 2, 2)
    # What turned out to be damaged was no backup.
    change(newest, error="backup_damaged", verified_at=None)
    assert is_of(ages(client), 90 * 24, 90 * 24)
    assert is_of(gauges(client), 90 * 24, 90 * 24)


def test_the_list_says_when_the_newest_proven_backup_was_made(
    sqlite_service: Service, run: Run
) -> None:
    none = run("backup", "list")
    assert none.out == "none\nnewest backup that was proven to restore: none\n"
    backup_id = create()
    assert run("backup", "list", "--json").json["newest_proven_at"] is None
    get_backup_service().verify(backup_id, COMMAND_LINE)
    create()
    made = next(each.created_at for each in records() if each.id == backup_id)
    shown = run("backup", "list").out.splitlines()
    assert shown[-1] == f"newest backup that was proven to restore: {made}"
    told = run("backup", "list", "--json").json["newest_proven_at"]
    assert datetime.fromisoformat(told) == made.astimezone(UTC)


# Addresses, rights and programs


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/backups",
        "s3://",
        "{good},s3:///prefix",
        "{file}",
        "{file}/below",
        "{good},ftp://host",
    ],
)
def test_an_address_that_is_none_refuses_the_start_with_one_line(
    sqlite_service: Service, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str
) -> None:
    (tmp_path / "file").write_text("")
    url = url.format(file=tmp_path / "file", good=tmp_path / "good")
    monkeypatch.setenv("BACKUP_URL", url)
    for command in (("init",), ("backup", "create")):
        refused = run(*command)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert refused.err.startswith("holdfast: BACKUP_URL: ")
    assert not (tmp_path / "good").exists()


@SQLITE
def test_a_store_that_went_away_while_we_serve_is_not_available_now(
    client: TestClient, admin: Headers, service: Service
) -> None:
    backup_id = create()
    folder = service.folder / "backups"
    folder.rename(folder.with_name("away"))
    folder.write_text("not mounted")
    for answer in (
        client.post(f"{PATH}/create", headers=admin),
        client.get(f"{PATH}/list", headers=admin),
        client.post(f"{PATH}/{backup_id}/verify", headers=admin),
        client.delete(f"{PATH}/{backup_id}", headers=admin),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.headers["retry-after"]


# Each line of its input is a command of ours, or a change of what is around it.
_CHILD: Final = """
import os, sys
import db_cli
for line in sys.stdin:
    words = line.split()
    if words[0] == "chmod":
        os.chmod(words[2], int(words[1], 8))
    elif words[0].startswith("PATH="):
        os.environ["PATH"] = words[0].removeprefix("PATH=")
    else:
        sys.argv = ["db_cli.py", *words]
        code = db_cli.main()
        print("CODE", code, file=sys.stderr)
"""


def in_a_child(*lines: str, before: tuple[str, ...]) -> list[tuple[int, str]]:
    """Run commands in a process that is started behind *before*; return codes and refusals."""
    done = subprocess.run(
        [*before, sys.executable, "-c", _CHILD],
        input="\n".join(lines), capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LOG_LEVEL": "ERROR"},
    )  # fmt: skip
    told = [int(part.split()[0]) for part in done.stderr.split("CODE ")[1:]]
    words = [line for line in done.stderr.splitlines() if line.startswith("holdfast: ")]
    assert len(words) == len(told), done.stderr
    return list(zip(told, words, strict=True))


@pytest.fixture
def under_modes() -> tuple[str, ...]:
    """Start a process for which modes of files count, as they do not for root."""
    if os.geteuid() != 0:
        return ()
    powers = "-dac_override,-dac_read_search"
    before = ("setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}")
    tried = shutil.which("setpriv") and subprocess.run([*before, "true"], check=False)
    if not tried or tried.returncode != 0:
        pytest.skip("root cannot give up its powers over files here")
    return before


def test_a_store_without_rights_is_told_and_nothing_is_left(
    sqlite_service: Service, under_modes: tuple[str, ...]
) -> None:
    backup_id = create()
    folder = sqlite_service.folder / "backups"
    before = names(folder)
    verify, make = f"backup verify {backup_id}", "backup create"
    told = in_a_child(
        f"chmod 0 {folder / f'{backup_id}.hfb'}",
        verify,
        f"chmod 600 {folder / f'{backup_id}.hfb'}",
        # It can be written, and not listed.
        f"chmod 300 {folder}",
        make,
        "backup list",
        f"chmod 500 {folder}",
        make,
        verify,
        f"chmod 700 {folder}",
        before=under_modes,
    )
    unreadable = (1, "holdfast: the backup store cannot be read: Permission denied")
    refused = (2, f"holdfast: BACKUP_URL: {folder} cannot be a folder of ours")
    assert told == [unreadable] * 3 + [refused] * 2
    assert names(folder) == before
    get_setup_service().prepare()
    made, kept = records()
    assert (made.status, made.size_bytes) == (BackupStatus.FAILED, None)
    # That it could not be read was no damage.
    assert (kept.id, kept.status, kept.error) == (backup_id, BackupStatus.COMPLETE, None)


def test_a_backup_whose_store_went_away_says_so_at_once(sqlite_service: Service) -> None:
    folder = sqlite_service.folder / "backups"

    def unmount(_record: BackupRecord) -> None:
        folder.write_text("not mounted")

    with pytest.raises(HoldfastError):
        get_backup_service().create(COMMAND_LINE, begun=unmount)
    folder.unlink()
    assert [each.status for each in records()] == [BackupStatus.FAILED]


@pytest.fixture
def without_programs(tmp_path: Path) -> tuple[str, ...]:
    """Start a process for which PostgreSQL's programs are not on this machine."""
    if not _PROGRAMS.is_dir():
        return ()
    before = (
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs none {_PROGRAMS} && exec "$@"',
        "-",
    )
    tried = shutil.which("unshare") and subprocess.run(
        [*before, "true"], check=False, capture_output=True
    )
    if not tried or tried.returncode != 0:
        pytest.skip("this process may not hide PostgreSQL's programs from another")
    return before


def old_program(folder: Path, name: str) -> str:
    """A program of PostgreSQL from long ago; return a PATH on which it alone is."""
    program = folder / name
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{name} (PostgreSQL) 9.6.24"\n')
    program.chmod(0o755)
    return str(folder)


@POSTGRESQL
def test_without_programs_as_new_as_the_server_nothing_is_backed_up_or_proven(
    service: Service, without_programs: tuple[str, ...], tmp_path: Path
) -> None:
    make, verify = "backup create", f"backup verify {create()}"
    empty, old = tmp_path / "empty", tmp_path / "old"
    for folder in (empty, old):
        folder.mkdir()
    for name in ("pg_dump", "pg_restore"):
        old_program(old, name)
    told = in_a_child(
        f"PATH={empty}", make, verify, f"PATH={old}", make, verify, before=without_programs
    )
    for (code, words), name in zip(told, ("pg_dump", "pg_restore") * 2, strict=True):
        assert (code, words.startswith(f"holdfast: {name} ")) == (1, True)
        assert words.endswith("or newer is needed and was not found on PATH")
    assert [each.error for each in records()] == ["unavailable", "unavailable", None]
    # Of the one that was made before: its three parts, and a checkpoint of the audit trail.
    assert len(names(service.folder / "backups")) == 4


@POSTGRESQL
def test_an_old_program_on_the_path_is_passed_over_for_a_newer_one(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _PROGRAMS.is_dir():
        pytest.skip("PostgreSQL's programs are on PATH alone on this machine")
    for name in ("pg_dump", "pg_restore"):
        path = old_program(tmp_path, name)
    monkeypatch.setenv("PATH", path, prepend=":")
    assert get_backup_service().verify(create(), COMMAND_LINE).verified_at is not None


@POSTGRESQL
def test_a_program_that_cannot_run_is_passed_over_too(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _PROGRAMS.is_dir():
        pytest.skip("PostgreSQL's programs are on PATH alone on this machine")
    (tmp_path / "pg_dump").write_bytes(b"")
    (tmp_path / "pg_dump").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert get_backup_service().create(COMMAND_LINE).status is BackupStatus.COMPLETE


# Another key


@pytest.fixture
def strange_backup(
    sqlite_service: Service, configured: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A new installation with a key of its own, at a store with a backup that another one made."""
    folder = tmp_path / "store"
    configured(backup_url=folder)
    backup_id = str(create())
    set_environment(monkeypatch, tmp_path / "new", None)
    monkeypatch.setenv("BACKUP_URL", str(folder))
    monkeypatch.setenv("ENCRYPTION_KEY", OTHER_KEY)
    clear_caches()
    get_setup_service().prepare()
    return backup_id


def test_a_backup_of_another_key_is_told_and_neither_opened_nor_in_the_way(
    strange_backup: str, run: Run
) -> None:
    for command in (("verify",), ("restore", "--dry-run"), ("restore", "--confirm")):
        refused = run("backup", command[0], strange_backup, *command[1:])
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert "key" in refused.err
    found = run("backup", "list", "--json").json
    assert found["items"] == []
    assert [each["backup_id"] for each in found["breaks"]] == [strange_backup]
    made = create()
    assert listed() == [made]
    assert get_backup_service().verify(made, COMMAND_LINE).verified_at is not None
