"""Real PostgreSQL clusters that archive into a real repository of pgBackRest, quick to copy."""

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.postmaster import RunOptions
from backend.backup.pgbackrest.private_server import PrivateServer, private_server
from backend.backup.pgbackrest.repository import Pgbackrest
from backend.backup.pgbackrest.says import Kind
from backend.backup.pgbackrest.stanza import Stanza
from tests.conftest import postgres_programs

PASSPHRASE: Final = "passphrase-of-tests-0123456789abcdef"
OTHER_PASSPHRASE: Final = "another-one-of-tests-0123456789abcdef"
STANZA: Final = "holdfast"
_NOBODY: Final = 65534
_ROOM_BYTES: Final = 2 * 1024**3
_SETTINGS: Final = """
listen_addresses = ''
unix_socket_directories = '{folder}'
archive_mode = on
archive_command = '{archive_command}'
fsync = off
max_wal_size = 32MB
min_wal_size = 2MB
shared_buffers = 16MB
autovacuum = off
jit = off
"""
SERVER_USER: Final[dict[str, Any]] = (
    {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
)


@dataclass
class Site:
    """A folder with a cluster, its repository, and what was committed when each backup was made."""

    folder: Path
    cluster: Cluster
    stanza: Stanza
    labels: dict[Kind, str] = field(default_factory=dict)
    records: dict[Kind, UUID] = field(default_factory=dict)

    @property
    def backups(self) -> Pgbackrest:
        return Pgbackrest(self.cluster, self.stanza)

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def sql(self, statement: str) -> str:
        return self.cluster.ask(statement)

    def now(self) -> datetime:
        """The server's clock."""
        return datetime.fromisoformat(self.sql("SELECT clock_timestamp()::text"))

    def write(self, words: str) -> None:
        self.sql(f"INSERT INTO notes VALUES ('{words}')")  # noqa: S608 - words of tests

    def notes(self) -> list[str]:
        return self.sql("SELECT words FROM notes ORDER BY words").splitlines()

    def start(self) -> None:
        self.cluster.start(RunOptions(str(program("postgres")), log=str(self.folder / "log")))


def program(name: str) -> Path:
    programs = postgres_programs()
    assert programs is not None
    return programs / name


def notes_in(server: PrivateServer) -> list[str]:
    engine = create_engine(server.url("postgres", "postgres"), poolclass=NullPool)
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT words FROM notes ORDER BY words")).scalars())


@contextmanager
def restored_server(site: Site, label: str | None, **how: Any) -> Iterator[PrivateServer]:
    """Restore a backup beside the live cluster, run it, and clear it away."""
    built = site.cluster.new_directory()
    try:
        site.backups.restore(label, built, **how)
        with private_server(site.cluster, built) as server:
            yield server
    finally:
        site.cluster.clear_directory(built)


def processes_of(site: Site) -> list[str]:
    """The command lines of all programs that work for a site, but the live server's own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(site.folder) in words and f"-D {site.cluster.data} " not in f"{words} ":
                found.append(words)
    return [words for words in found if "archive-push" not in words]


def are_gone(site: Site) -> bool:
    """Whether no program works for a site any more; one that was ended gets a moment to go."""
    deadline = time.monotonic() + 60
    while processes_of(site) and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes_of(site) == []


def new_folder() -> Path:
    """Make a folder that the server's user may enter, with a path short enough for sockets."""
    # pgBackRest makes each of a thousand files durable, which in memory costs nothing.
    memory, disk = Path("/dev/shm"), Path("/tmp")  # noqa: S108 - made 0700 there
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM_BYTES
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pgb-", dir=memory if roomy else disk))
    if os.geteuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
    return folder


def remove(folder: Path) -> None:
    """Remove the folder of a server that has just ended; what it had begun may still write."""
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)


def as_server(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, cwd="/", **SERVER_USER)


def initdb(data: Path) -> None:
    as_server(
        program("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync",
        "--wal-segsize=1", "--no-locale", "-E", "UTF8",
    )  # fmt: skip
    with (data / "postgresql.conf").open("a") as file:
        file.write("include = 'holdfast.conf'\n")


def site_in(folder: Path, passphrase: str = PASSPHRASE) -> Site:
    """Return the site that lies in *folder*."""
    cluster = Cluster(folder / "data")
    stanza = Stanza(cluster, STANZA, passphrase, repository=folder / "repository")
    return Site(folder, cluster, stanza)


def configure(site: Site, more: str = "") -> None:
    """Write the server's settings for where the site lies now."""
    settings = _SETTINGS.format(folder=site.folder, archive_command=site.stanza.archive_command)
    site.cluster.account.write(site.cluster.data / "holdfast.conf", (settings + more).encode())


def require_parts() -> None:
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL on this machine: see requirements-parts.txt")
    if shutil.which("pgbackrest") is None:
        pytest.skip("pgBackRest is not installed")


@contextmanager
def new_site() -> Iterator[Site]:
    """Make a site with an empty cluster that runs until the block ends, and nothing more."""
    require_parts()
    folder = new_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    initdb(folder / "data")
    site = site_in(folder)
    configure(site)
    site.start()
    try:
        # A third of the files is enough.
        site.sql("UPDATE pg_database SET datistemplate = false")
        for template in ("template0", "template1"):
            site.sql(f"DROP DATABASE {template}")
        yield site
    finally:
        site.cluster.stop()


@lru_cache(maxsize=1)
def prepared_site() -> Site:
    """A stopped site with a full, a differential and an incremental backup, to be copied."""
    with new_site() as site:
        site.backups.prepare()
        site.sql("CREATE TABLE notes (words text)")
        for kind in Kind:
            site.write(f"in {kind}")
            site.records[kind] = uuid4()
            site.labels[kind] = site.backups.create(kind, site.records[kind]).label
    return site


def copy_to(folder: Path) -> Site:
    """Copy the prepared site; it is not running."""
    prepared = prepared_site()
    as_server("cp", "-a", prepared.folder, folder)
    copy = site_in(folder)
    copy.labels, copy.records = prepared.labels, prepared.records
    return copy


def _copy() -> Site:
    folder = new_folder()
    folder.rmdir()
    copy = copy_to(folder)
    configure(copy)
    copy.start()
    # Writes where its repository lies now, before the server archives anything.
    copy.backups.sets()
    return copy


@contextmanager
def running_copy() -> Iterator[Site]:
    copy = _copy()
    try:
        yield copy
    finally:
        # Nobody waits for the last WAL to be archived.
        stop = ["stop", "-s", "-m", "immediate", "-D", str(copy.cluster.data)]
        subprocess.run(
            [program("pg_ctl"), *stop], check=False, capture_output=True, cwd="/", **SERVER_USER
        )
        remove(copy.folder)


@pytest.fixture
def site() -> Iterator[Site]:
    """A site of the test's own, running."""
    with running_copy() as copy:
        yield copy


@pytest.fixture(scope="module")
def shared_site() -> Iterator[Site]:
    """A running site whose backups no test changes."""
    with running_copy() as copy:
        yield copy
