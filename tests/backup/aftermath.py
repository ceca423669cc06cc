"""What an act that was killed, or found no room, has left: in the folder, the store, the server."""

import re
import time
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID

import psycopg
from sqlalchemy import select, text, update

from backend.backup.manifest import is_part, stored_ids
from backend.db_utils import make_engine, session_scope
from backend.errors import ConflictError
from backend.models import BackupRecord, BackupStatus, Booking
from backend.services.archive_service import exclusive, get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.catalogue_service import get_catalogue_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from backend.services.store_service import store
from tests.conftest import Service
from tests.privacy.people import Dump, dump, retire, without

BOOKINGS: Final = 200
# Rows that say what was done, and not what people's data are.
CONTROL: Final = ("audit_events", "backup_records", "privacy_ledger", "data_retention_logs")
_PATIENCE_SECONDS: Final = 60
_SCRATCH: Final = re.compile(r"_restore_[0-9a-f]{8}$")


def fill(bookings: int = BOOKINGS) -> None:
    """Give the installation guests and their rows, under one name that can be changed."""
    with session_scope() as session:
        get_sample_service().load(session, COMMAND_LINE, count=bookings, guests=bookings // 10)
    # A restore would do it, and with numbers that nobody can foresee.
    retire()
    rename("saved")


def rename(hotel: str) -> None:
    with session_scope() as session:
        session.execute(update(Booking).values(hotel=hotel))


def hotels() -> set[str]:
    """One name, in a database that is old or new as a whole."""
    with session_scope(read_only=True) as session:
        return set(session.scalars(select(Booking.hotel)))


def people() -> Dump:
    """Every row that is no record of acts."""
    return without(dump(), {}, *CONTROL)


def leftovers(service: Service) -> list[str]:
    """Scratch files and databases, half-written objects, and objects of no backup."""
    store = service.folder / "backups"
    whole = {path.name.split(".")[0] for path in store.glob("*.manifest.json")}
    objects = [path.name for path in store.iterdir()] if store.exists() else []
    orphans = [
        name
        for name in objects
        if name.startswith(".") or (is_part(name) and name.split(".")[0] not in whole)
    ]
    scratch = [path.name for path in service.folder.glob(".*")]
    return orphans + scratch + [name for name in databases(service) if _SCRATCH.search(name)]


def while_it_is_built(service: Service) -> dict[str, Any]:
    """How to kill a command that builds a database beside the live one, while it does."""
    if service.engine == "sqlite":
        # What was stored is in the new file, which is asked whether it is sound.
        return {"at_path": ("write", "SELECT")}
    # The new database is there, and a program is started to fill it.
    return {"at_path": ("CREATE", "fork_exec")}


def start_again(service: Service) -> None:
    """Start, which clears up what a killed process has left."""
    settle(service)
    get_setup_service().prepare()
    assert leftovers(service) == []


def settle(service: Service) -> None:
    """
    Wait for those who worked for a dead process, and end by themselves.

    What it asked of PostgreSQL last is done all the same.
    """
    _wait_for_lock()
    if service.engine == "sqlite":
        return
    others_work = (
        "SELECT 1 FROM pg_stat_activity WHERE state <> 'idle' AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    with psycopg.connect(_admin(service), autocommit=True) as connection:
        while connection.execute(others_work).fetchone():
            time.sleep(0.01)


def _wait_for_lock() -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with exclusive(1):
                return
        except ConflictError:
            if time.monotonic() > end:
                raise


def databases(service: Service) -> list[str]:
    """The names of all databases of the server, if there is one."""
    if service.engine == "sqlite":
        return []
    with psycopg.connect(_admin(service), autocommit=True) as connection:
        return [name for (name,) in connection.execute("SELECT datname FROM pg_database")]


def _admin(service: Service) -> str:
    return urlsplit(service.url)._replace(path="/postgres").geturl()


def kept_databases(service: Service) -> set[str]:
    """Addresses of the old databases that restores have kept aside."""
    if service.engine == "sqlite":
        return {f"sqlite:///{path}" for path in (service.folder / "previous").glob("*.db")}
    url, own = urlsplit(service.url), service.url.rpartition("/")[2]
    names = [name for name in databases(service) if name.startswith(f"{own}_before_")]
    return {url._replace(path=f"/{name}").geturl() for name in names}


def bookings_in(url: str) -> int:
    """How many bookings the database at *url* has."""
    engine = make_engine(url)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT count(*) FROM bookings")).scalar_one()
    engine.dispose()
    return int(found)


def records() -> list[BackupRecord]:
    """What is listed, newest first."""
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


def running_without_manifest() -> set[UUID]:
    """Backups that were being made, and had not become any."""
    stored = stored_ids(store())
    running = [r.id for r in records() if r.status is BackupStatus.RUNNING]
    return {each for each in running if str(each) not in stored}


def listed_are_whole() -> list[BackupRecord]:
    """Read every backup that is listed as complete to its end; return the other records."""
    found = records()
    for record in found:
        if record.status is BackupStatus.COMPLETE:
            get_archive_service().read_through(get_archive_service().manifest(record.id))
    return [record for record in found if record.status is not BackupStatus.COMPLETE]
