"""
A server of our own: restarted half way, that is told as not available, and nothing is torn.

And its first database, which is called as the server's own, is one like any other.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy.exc import OperationalError

from backend.errors import HoldfastError, UnavailableError
from backend.models import BackupStatus
from backend.services import transfer_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from backend.services.transfer_service import Progress, ignore
from tests.backup.aftermath import fill, hotels, leftovers, people, records, rename, start_again
from tests.conftest import (
    PostgresServer,
    Service,
    clear_caches,
    postgres_programs,
    set_environment,
)
from tests.ports import free_port
from tests.privacy.people import many_rows

_NOBODY: Final = 65534
# More than the pipes between the programs hold, so that each is in the middle of it.
ROWS: Final = 12_000


@dataclass(frozen=True)
class OwnServer:
    """A server that nobody else uses, so that it may be restarted."""

    programs: Path
    folder: Path
    port: int

    def control(self, *arguments: str) -> None:
        as_nobody: dict[str, Any] = {}
        if os.getuid() == 0:
            as_nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        subprocess.run(
            [self.programs / "pg_ctl", *arguments, "-s", "-w", "-D", self.folder / "data"],
            check=True, stdout=subprocess.DEVNULL, cwd="/", **as_nobody,
        )  # fmt: skip

    def restart(self) -> None:
        """End every connection, and be back a moment later."""
        self.control("restart", "-m", "fast")


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL on this machine: see requirements-parts.txt")
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pg-"))
    if os.getuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
    server = OwnServer(programs, folder, free_port())
    server.control("init", "-o", "-U postgres -A trust --no-sync")
    options = {
        "listen_addresses": "127.0.0.1",
        "port": server.port,
        "unix_socket_directories": folder,
        "fsync": "off",
        "jit": "off",
    }
    settings = " ".join(f"-c {name}={value}" for name, value in options.items())
    server.control("start", "-l", str(folder / "log"), "-o", settings)
    try:
        yield server
    finally:
        server.control("stop", "-m", "immediate")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def url(server: OwnServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database on that server, with more rows than go through at once."""
    PostgresServer(server.port).run("CREATE DATABASE restarts")
    url = PostgresServer(server.port).url("restarts")
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_environment(monkeypatch, tmp_path_factory.mktemp("restarts"), url)
        get_setup_service().prepare()
        get_setup_service().open()
        fill()
        many_rows(2, ROWS, "long words " * 20)
        clear_caches()
    return url


@pytest.fixture
def service(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    set_environment(monkeypatch, folder, url)
    # A process that carries the bytes goes on while it is told how many went through.
    monkeypatch.setattr(transfer_service, "SMALL_BYTES", 1 << 40)
    get_setup_service().open()
    return Service(folder, "postgresql", url)


def half_way(server: OwnServer) -> Callable[[int, int], None]:
    """Restart the server as soon as a part of the bytes has gone through."""
    restarts = iter([server.restart])

    def progress(_done: int, _total: int) -> None:
        for restart in restarts:
            restart()

    return progress


def create(progress: Progress = ignore) -> UUID:
    return get_backup_service().create(COMMAND_LINE, progress=progress).id


def verify(progress: Progress = ignore) -> None:
    get_backup_service().verify(records()[0].id, COMMAND_LINE, progress=progress)


def restore(progress: Progress = ignore) -> None:
    get_restore_service().restore(
        records()[0].id, COMMAND_LINE, dry_run=False, confirm=True, progress=progress
    )


def test_a_restart_half_way_through_a_backup_makes_none_and_leaves_nothing(
    server: OwnServer, service: Service
) -> None:
    # Over HTTP both are a 503.
    with pytest.raises((UnavailableError, OperationalError)):
        create(half_way(server))
    assert records()[0].status is BackupStatus.FAILED
    assert leftovers(service) == []
    create()
    verify()


@pytest.mark.parametrize("act", [verify, restore])
def test_a_restart_half_way_through_a_restore_changes_nothing_and_leaves_nothing(
    server: OwnServer, service: Service, act: Callable[..., None]
) -> None:
    create()
    before = people()
    with pytest.raises(HoldfastError):
        act(half_way(server))
    start_again(service)
    assert people() == before
    act()
    assert people() == before


@pytest.mark.parametrize("act", [create, verify, restore])
def test_a_restart_is_told_as_unavailable_and_says_nothing_of_a_backup(
    server: OwnServer, service: Service, act: Callable[..., None]
) -> None:
    backup_id = create()
    with pytest.raises(UnavailableError):
        act(half_way(server))
    assert {record.id: record.error for record in records()}[backup_id] is None


def test_the_database_postgres_is_restored_too(
    server: OwnServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, folder, PostgresServer(server.port).url("postgres"))
    get_setup_service().prepare()
    get_setup_service().open()
    fill(20)
    create()
    rename("live")
    restore()
    assert hotels() == {"saved"}
