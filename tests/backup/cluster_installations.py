"""Installations whose backups pgBackRest makes, each on a real cluster, quick to copy."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest
from sqlalchemy import select, update

from backend.backup.pgbackrest.says import Kind
from backend.db_utils import dispose_engine, session_scope
from backend.models import Booking, User
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from tests.backup.clusters import (
    SERVER_USER,
    Site,
    configure,
    new_folder,
    new_site,
    program,
    remove,
    site_in,
)
from tests.conftest import ADMIN, PASSWORD, Service, clear_caches, set_environment
from tests.privacy.people import retire

DATABASE: Final = "holdfast"
ROLE: Final = "service"
BOOKINGS: Final = 20


@dataclass
class Installation:
    """A service and its cluster; the bookings in each backup are of the hotel `in KIND`."""

    site: Site
    backups: dict[Kind, UUID] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Its `DATA_DIR`."""
        return self.site.folder / "service"

    @property
    def url(self) -> str:
        return f"postgresql://{ROLE}@/{DATABASE}?host={self.site.folder}"

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process be the installation's."""
        set_environment(monkeypatch, self.folder, self.url)
        monkeypatch.setenv("BACKUP_ENGINE", "pgbackrest")
        monkeypatch.setenv("PGBACKREST_CLUSTER", str(self.site.cluster.data))
        monkeypatch.setenv("PGBACKREST_REPOSITORY", str(self.site.repository))
        clear_caches()


def rename(hotel: str) -> None:
    with session_scope() as session:
        session.execute(update(Booking).values(hotel=hotel))


def hotels() -> set[str]:
    """One name, in a database that is old or new as a whole."""
    with session_scope(read_only=True) as session:
        return set(session.scalars(select(Booking.hotel)))


@lru_cache(maxsize=1)
def prepared_installation() -> Installation:
    """A stopped installation with a backup of each kind, to be copied."""
    with new_site() as site, pytest.MonkeyPatch.context() as monkeypatch:
        made = Installation(site)
        _make_database(site)
        site.sql("CREATE ROLE leaver LOGIN SUPERUSER PASSWORD 'leaver-of-tests'")
        made.enter(monkeypatch)
        get_setup_service().prepare()
        with session_scope() as session:
            get_account_service().set_password(session, ADMIN, PASSWORD, COMMAND_LINE)
            session.get_one(User, 1).tokens_valid_after = None
            get_sample_service().load(session, COMMAND_LINE, count=BOOKINGS, guests=5)
        # A restore would do it, and with numbers that nobody can foresee.
        retire()
        for kind in Kind:
            rename(f"in {kind}")
            made.backups[kind] = get_backup_service().create(COMMAND_LINE, kind, kind=kind).id
        rename("live")
        # What the backups know, and the cluster does not any more.
        site.sql("DROP ROLE leaver")
        dispose_engine()
    clear_caches()
    return made


def _make_database(site: Site) -> None:
    site.sql(f"CREATE ROLE {ROLE} LOGIN")
    site.sql(f"CREATE DATABASE {DATABASE} TEMPLATE postgres OWNER {ROLE}")
    Installation(site).folder.mkdir(mode=0o700)


def stop_at_once(site: Site) -> None:
    """Stop a server, without waiting for its last WAL to be archived."""
    stop = ["stop", "-s", "-m", "immediate", "-D", str(site.cluster.data)]
    subprocess.run(
        [program("pg_ctl"), *stop], check=False, capture_output=True, cwd="/", **SERVER_USER
    )


@contextmanager
def new_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """Run an installation on another cluster, with an empty database; this process then is it."""
    with new_site() as site:
        _make_database(site)
        made = Installation(site)
        made.enter(monkeypatch)
        try:
            yield made
        finally:
            dispose_engine()
            clear_caches()
            stop_at_once(site)


@contextmanager
def running_installation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """Run a copy of the prepared installation, which this process then is."""
    prepared, folder = prepared_installation(), new_folder()
    folder.rmdir()
    subprocess.run(["cp", "-a", prepared.site.folder, folder], check=True)
    copy = Installation(site_in(folder), prepared.backups)
    configure(copy.site)
    copy.enter(monkeypatch)
    copy.site.start()
    try:
        get_setup_service().open()
        yield copy
    finally:
        dispose_engine()
        clear_caches()
        stop_at_once(copy.site)
        remove(copy.site.folder)


@pytest.fixture
def installation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installation]:
    """An installation of the test's own, running."""
    with running_installation(monkeypatch) as copy:
        yield copy


@pytest.fixture
def service(installation: Installation) -> Service:
    """The same, for what asks for any service."""
    return Service(installation.folder, "postgresql", installation.url)
