"""Killing or stopping one of the processes of a backup: the others notice, tell it, and end."""

import os
import signal
from typing import Final

import pytest

from backend.models import BackupRecord, BackupStatus
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from tests.backup.aftermath import fill, leftovers, listed_are_whole, people, records, start_again
from tests.backup.commands import (
    WORKER,
    Commands,
    commands,
    is_running,
    wait_for_child,
    wait_until,
)
from tests.conftest import Service

CREATE: Final = ("backup", "create")
# With programs and a lock of its own.
ON_POSTGRES: Final = pytest.mark.parametrize("service", ["postgresql"], indirect=True)


__all__ = ["commands"]  # a fixture


@pytest.fixture
def filled(service: Service) -> Service:
    fill()
    return service


def only_record() -> BackupRecord:
    (record,) = records()
    return record


def test_a_worker_that_is_killed_is_told_and_the_backup_has_failed(
    filled: Service, commands: Commands
) -> None:
    os.kill(wait_for_child(commands.start(*CREATE, carried=True), WORKER), signal.SIGKILL)
    ended = commands.wait()
    assert (ended.code, "the process that carries the backup was ended" in ended.said) == (1, True)
    assert (only_record().status, only_record().error) == (BackupStatus.FAILED, "unavailable")
    assert leftovers(filled) == []
    commands.run(*CREATE, carried=True)


def test_a_worker_that_is_killed_while_it_writes_leaves_nothing(
    sqlite_service: Service, commands: Commands
) -> None:
    fill(6000)
    parent = commands.start(*CREATE, carried=True)
    worker = wait_for_child(parent, WORKER)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: list((sqlite_service.folder / "backups").glob(".partial-*")))
    os.kill(worker, signal.SIGKILL)
    assert commands.wait().code == 1
    assert leftovers(sqlite_service) == []


@ON_POSTGRES
def test_a_worker_that_is_killed_in_a_restore_leaves_the_old_database(
    filled: Service, commands: Commands
) -> None:
    backup_id, before = str(get_backup_service().create(COMMAND_LINE).id), people()
    restore = ("backup", "restore", backup_id, "--confirm")
    os.kill(wait_for_child(commands.start(*restore, carried=True), WORKER), signal.SIGKILL)
    ended = commands.wait()
    assert (ended.code, "the process that carries the backup was ended" in ended.said) == (1, True)
    assert people() == before
    assert leftovers(filled) == []
    assert only_record().error is None
    commands.run(*restore, carried=True)


@ON_POSTGRES
def test_a_worker_ends_by_itself_when_its_parent_is_killed_and_gives_the_lock_back(
    filled: Service, commands: Commands
) -> None:
    parent = commands.start(*CREATE, carried=True)
    worker = wait_for_child(parent, WORKER)
    os.kill(parent, signal.SIGKILL)
    assert commands.wait().killed
    assert is_running(worker)
    refused = commands.end(*CREATE)
    assert (refused.code, "another backup or restore is running" in refused.said) == (2, True)
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not is_running(worker))
    start_again(filled)
    assert (only_record().status, only_record().error) == (BackupStatus.FAILED, "interrupted")
    commands.run(*CREATE, carried=True)


@pytest.mark.parametrize("service", ["sqlite"], indirect=True)
def test_a_worker_that_is_stopped_for_a_while_breaks_nothing(
    filled: Service, commands: Commands
) -> None:
    worker = wait_for_child(commands.start(*CREATE, carried=True), WORKER)
    before = people()
    # Nobody else waits for it.
    assert only_record().status is BackupStatus.RUNNING
    os.kill(worker, signal.SIGCONT)
    assert commands.wait().code == 0
    assert listed_are_whole() == []
    restore = ("backup", "restore", str(only_record().id), "--confirm")
    worker = wait_for_child(commands.start(*restore, carried=True), WORKER)
    assert people() == before
    os.kill(worker, signal.SIGCONT)
    assert commands.wait().code == 0
    assert people() == before


@ON_POSTGRES
def test_an_interrupted_backup_has_failed_and_left_nothing(
    filled: Service, commands: Commands
) -> None:
    parent = commands.start(*CREATE, carried=True)
    worker = wait_for_child(parent, WORKER)
    # As a terminal does it: all of them are told.
    for process in (parent, worker):
        os.kill(process, signal.SIGINT)
    os.kill(worker, signal.SIGCONT)
    assert commands.wait().code != 0
    wait_until(lambda: not is_running(worker))
    assert (only_record().status, only_record().error) == (BackupStatus.FAILED, "KeyboardInterrupt")
    assert leftovers(filled) == []


@ON_POSTGRES
def test_a_dump_that_is_killed_makes_no_backup(filled: Service, commands: Commands) -> None:
    dump = wait_for_child(commands.start(*CREATE), "--snapshot=")
    os.kill(dump, signal.SIGKILL)
    ended = commands.wait()
    assert (ended.code, "pg_dump failed" in ended.said) == (1, True)
    assert (only_record().status, only_record().error) == (BackupStatus.FAILED, "unavailable")
    assert leftovers(filled) == []


@ON_POSTGRES
def test_a_load_that_is_killed_says_nothing_about_the_backup(
    filled: Service, commands: Commands
) -> None:
    commands.run(*CREATE)
    verify = ("backup", "verify", str(only_record().id))
    load = wait_for_child(commands.start(*verify), "--section=data")
    os.kill(load, signal.SIGKILL)
    ended = commands.wait()
    assert leftovers(filled) == []
    assert (ended.code, only_record().error) == (1, None)
