"""A restore as others see it, and every act killed half way: old or new, whole, and cleared up."""

import gc
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.exc import OperationalError

from backend.crypto.certificates import verify
from backend.db_utils import get_engine, make_engine, session_scope, sqlite_path
from backend.errors import ConflictError, UnavailableError
from backend.models import BackupRecord, BackupStatus, Booking, ErasureRecord, User
from backend.services import certificate_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.certificate_service import get_certificate_service
from backend.services.restore_service import get_restore_service
from backend.services.rotation_service import get_rotation_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from tests.conftest import KEY, OTHER_KEY, Service, clear_caches
from tests.privacy.people import Dump, booking, cells_in_plain, dump, keys_of

ROOT: Final = Path(__file__).resolve().parents[2]
MOMENTS: Final = 8
NOW: Final = datetime(2026, 1, 2, tzinfo=UTC)
# Runs the real commands as processes of their own, without the second that imports take.
STARTER: Final = """
import json, os, sys
import db_cli
print(0, flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        environment, arguments = json.loads(line)
        os.environ.update(environment)
        sys.argv = ["db_cli.py", *arguments]
        try:
            code = db_cli.main()
        except SystemExit as end:
            code = end.code
        os._exit(code or 0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Until = Callable[[], bool]


class Commands:
    """Runs `db_cli.py` in processes that can be killed."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        # It has imported everything: what follows is the command alone.
        assert self._answer() == 0

    def run(self, *arguments: str) -> float:
        """Run a command to its end; return how many seconds it took."""
        started = time.perf_counter()
        self._start(arguments)
        assert self._answer() == 0
        return time.perf_counter() - started

    def kill(self, *arguments: str, after: float | None = None, at: Until | None = None) -> bool:
        """Kill a command after so many seconds or once *at* holds; whether it was still running."""
        child = self._start(arguments)
        end = time.perf_counter() + (20 if after is None else after)
        while time.perf_counter() < end and not (at and at()):
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return self._answer() == signal.SIGKILL

    def _start(self, arguments: tuple[str, ...]) -> int:
        assert self._process.stdin is not None
        environment = {**os.environ, "LOG_LEVEL": "ERROR"}
        print(json.dumps([environment, arguments]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    # Not in our own folder: no `.env` of the machine may reach a command.
    folder = tmp_path_factory.mktemp("commands")
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=folder, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        yield Commands(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def _filled(service: Service) -> None:
    _fill()


@pytest.fixture
def _filled_sqlite(sqlite_service: Service) -> None:
    _fill()


def _fill() -> None:
    with session_scope() as session:
        get_sample_service().load(session, COMMAND_LINE, count=600, guests=60)
    _rename("saved")


def _rename(hotel: str) -> None:
    with session_scope() as session:
        session.execute(update(Booking).values(hotel=hotel))


def _hotels() -> set[str]:
    """One name in a database that is old or new as a whole."""
    with session_scope(read_only=True) as session:
        return set(session.scalars(select(Booking.hotel)))


def _backup() -> UUID:
    return get_backup_service().create(COMMAND_LINE).id


def _restore(backup_id: UUID) -> str:
    restored = get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)
    assert restored.previous
    return restored.previous


def _moments(seconds: float) -> list[float]:
    return [seconds * (step + 0.5) / MOMENTS for step in range(MOMENTS)]


def _people() -> Dump:
    control = ("audit_events", "backup_records", "privacy_ledger", "data_retention_logs")
    return {name: rows for name, rows in dump().items() if name not in control}


def _leftovers(service: Service) -> list[str]:
    store = service.folder / "backups"
    whole = {path.name.split(".")[0] for path in store.glob("*.manifest.json")}
    return [
        path.name
        for path in (*service.folder.glob(".*"), *store.iterdir())
        if path.name.startswith(".") or (path.suffix == ".hfb" and path.stem not in whole)
    ]


def _records() -> list[BackupRecord]:
    with session_scope(read_only=True) as session:
        return get_catalogue_service().records(session)


@pytest.mark.usefixtures("_filled_sqlite")
def test_a_killed_backup_is_whole_or_none_and_the_next_start_clears_up(
    sqlite_service: Service, commands: Commands
) -> None:
    seconds = min(commands.run("backup", "create") for _ in range(2))
    before = _people()
    interrupted = 0
    kills = [partial(commands.kill, after=moment) for moment in _moments(seconds)]
    for kill in (*kills, partial(commands.kill, at=lambda: bool(_leftovers(sqlite_service)))):
        kill("backup", "create")
        records = _records()
        for record in records:
            if record.status is BackupStatus.COMPLETE and record.verified_at is None:
                get_backup_service().verify(record.id, COMMAND_LINE)
        interrupted += any(record.status is BackupStatus.RUNNING for record in records)
        get_setup_service().prepare()
        assert _leftovers(sqlite_service) == []
        assert {record.status for record in _records()} <= {
            BackupStatus.COMPLETE,
            BackupStatus.FAILED,
        }
        assert _people() == before
    assert interrupted > 0, "no kill came while a backup was being made"
    assert {r.error for r in _records() if r.status is BackupStatus.FAILED} == {"interrupted"}
    commands.run("backup", "create")


@pytest.mark.usefixtures("_filled_sqlite")
def test_a_killed_restore_leaves_the_old_database_or_the_new_one_whole(
    sqlite_service: Service, commands: Commands
) -> None:
    backup_id = str(_backup())
    seconds = commands.run("backup", "restore", backup_id, "--confirm")
    seen, scratch = set(), 0
    kills = [partial(commands.kill, after=moment) for moment in _moments(seconds)]
    for kill in (*kills, partial(commands.kill, at=lambda: bool(_leftovers(sqlite_service)))):
        _rename("live")
        kill("backup", "restore", backup_id, "--confirm")
        scratch += bool(_leftovers(sqlite_service))
        (found,) = _hotels()
        seen.add(found)
        with closing(sqlite3.connect(sqlite_path(get_engine()))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        get_setup_service().prepare()
        assert _leftovers(sqlite_service) == []
        assert _hotels() == {found}
    assert "live" in seen
    assert scratch > 0, "no kill came while the new database was being built"
    for kept in (sqlite_service.folder / "previous").glob("*.db"):
        engine = make_engine(f"sqlite:///{kept}")
        with engine.connect() as connection:
            rows = connection.execute(text("SELECT count(*) FROM bookings")).scalar()
        engine.dispose()
        assert rows == 600, "a cut copy is kept as if it were the old database"
    commands.run("backup", "restore", backup_id, "--confirm")
    assert _hotels() == {"saved"}


@pytest.mark.usefixtures("_filled_sqlite")
def test_a_killed_erasure_changed_nothing_or_is_finished_at_the_next_start(
    sqlite_service: Service, commands: Commands
) -> None:
    seconds = commands.run("erase", "2")
    for user_id, moment in enumerate(_moments(seconds), 3):
        before, promised = _people(), _entries(sqlite_service)
        commands.kill("erase", str(user_id), after=moment)
        promised = _entries(sqlite_service) - promised
        if not promised:
            assert _people() == before
        get_setup_service().prepare()
        if promised:
            _assert_gone(user_id)
        else:
            assert _people() == before


@pytest.mark.usefixtures("_filled_sqlite")
def test_an_erasure_killed_once_it_was_promised_is_finished_at_the_next_start(
    sqlite_service: Service, commands: Commands
) -> None:
    sqlite_service.add(*(booking(2, NOW.date()) for _ in range(1500)))
    # The object is durable before the first row goes, and 1500 rows take a while.
    assert commands.kill("erase", "2", at=lambda: bool(_entries(sqlite_service)))
    with session_scope(read_only=True) as session:
        assert session.get(User, 2) is not None
        assert session.scalar(select(func.count()).where(Booking.user_id == 2)) == 1510
    get_setup_service().prepare()
    _assert_gone(2)


@pytest.mark.usefixtures("_filled")
def test_an_erasure_killed_before_its_scan_ended_is_done_and_has_a_certificate_that_says_so(
    service: Service, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The scan reads all of these; the erasure does not.
    service.add(*(booking(2, NOW.date(), staff_notes=f"late words {n}") for n in range(900)))
    assert commands.kill("erase", "3", at=lambda: _erasures() == [False])
    get_setup_service().prepare()
    _assert_gone(3)
    assert _erasures() == [False]
    with session_scope() as session:
        (erasure_id,) = session.scalars(select(ErasureRecord.id))
        with pytest.raises(ConflictError):
            get_certificate_service().of(session, erasure_id)
    # An hour later nobody is taken to be at it still.
    monkeypatch.setattr(certificate_service, "datetime", _HourLater)
    with session_scope() as session:
        document = get_certificate_service().of(session, erasure_id)
        key = get_certificate_service().public_key(session)
    assert verify(document, key)["scan"] == {"state": "not_finished"}
    assert _erasures() == [True]


def _erasures() -> list[bool]:
    """Of each erasure that was committed, whether it has a certificate."""
    with session_scope(read_only=True) as session:
        return [found is not None for found in session.scalars(select(ErasureRecord.certificate))]


class _HourLater(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "_HourLater":
        later = datetime.now(tz) + timedelta(hours=1)
        return cls.fromisoformat(later.isoformat())


@pytest.mark.usefixtures("_filled_sqlite")
def test_a_killed_rotation_is_gone_on_with_and_no_value_or_backup_is_lost(
    sqlite_service: Service, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = _backup()
    before = len(cells_in_plain())
    primary, previous = OTHER_KEY, KEY
    for moment in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, None):
        # Back and forth, so that each run has everything to do that the one before did.
        monkeypatch.setenv("ENCRYPTION_KEY", primary)
        monkeypatch.setenv("ENCRYPTION_KEYS_PREVIOUS", previous)
        if moment is None:
            commands.run("keys", "rotate")
        else:
            commands.kill("keys", "rotate", after=moment)
        clear_caches()
        get_setup_service().open()
        assert len(cells_in_plain()) >= before
        get_backup_service().verify(backup_id, COMMAND_LINE)
        primary, previous = previous, primary
    assert get_rotation_service().rotate(COMMAND_LINE).finished


def _entries(service: Service) -> set[str]:
    return {path.name for path in (service.folder / "backups").glob("ledger-*")}


def _assert_gone(user_id: int) -> None:
    keys = keys_of(dump(), user_id)
    assert keys.pop("users") == {(user_id,)}
    assert set().union(*keys.values()) == set()
    with session_scope(read_only=True) as session:
        assert session.get(User, user_id) is None


@contextmanager
def _threads(*works: Callable[[], None]) -> Iterator[list[Exception]]:
    """Do *works* again and again beside the block; yield what they raise."""
    stop, raised = threading.Event(), list[Exception]()

    def repeat(work: Callable[[], None]) -> None:
        while not stop.is_set() and not raised:
            try:
                work()
            except Exception as err:  # noqa: BLE001 - looked at by the test
                raised.append(err)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    try:
        yield raised
        time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.usefixtures("_filled")
def test_a_reader_sees_the_old_rows_or_the_new_ones_and_never_both(service: Service) -> None:
    backup_id = _backup()
    _rename("live")
    seen: list[frozenset[str]] = []

    def read() -> None:
        try:
            seen.append(frozenset(_hotels()))
        except OperationalError:
            # PostgreSQL ends connections to rename a database: over HTTP that is a 503.
            if service.engine == "sqlite":
                raise

    with _threads(read, read) as raised:
        _restore(backup_id)
    assert raised == []
    assert set(seen) == {frozenset({"live"}), frozenset({"saved"})}
    # A connection that was dropped without being closed warns here, and not in another test.
    gc.collect()


@pytest.mark.usefixtures("_filled_sqlite")
def test_another_process_with_an_open_connection_reads_the_new_rows(
    sqlite_service: Service,
) -> None:
    backup_id = _backup()
    _rename("live")
    with closing(sqlite3.connect(sqlite_path(get_engine()))) as other:
        names = "SELECT DISTINCT hotel FROM bookings"
        assert other.execute(names).fetchall() == [("live",)]
        _restore(backup_id)
        assert other.execute(names).fetchall() == [("saved",)]


@pytest.mark.usefixtures("_filled")
def test_no_acknowledged_write_is_missing_from_both_databases(service: Service) -> None:
    backup_id = _backup()
    done: list[str] = []
    refused: list[UnavailableError] = []
    insert = "INSERT INTO feedback (rating, submitted_at, comment) VALUES (1, '2026-01-02', '{}')"

    def write() -> None:
        name = f"own-{len(done)}-{threading.get_ident()}"
        try:
            with session_scope() as session:
                session.execute(text(insert.format(name)))
        except UnavailableError as err:
            refused.append(err)
            time.sleep(0.001)
        else:
            done.append(name)

    def write_from_elsewhere() -> None:
        name = f"other-{len(done)}-{threading.get_ident()}"
        try:
            _write_as_another_process(service, insert.format(name))
        except psycopg.OperationalError:
            return
        done.append(name)
        time.sleep(0.002)

    with _threads(write, write_from_elsewhere) as raised:
        kept = _restore(backup_id)
    assert raised == []
    assert {err.status for err in refused} == {503}
    url = f"sqlite:///{kept}" if service.engine == "sqlite" else _sibling(service.url, kept)
    engine = make_engine(url)
    found = _comments(engine) | _comments(get_engine())
    engine.dispose()
    assert {name.partition("-")[0] for name in done} == {"own", "other"}
    assert set(done) - found == set()
    # Writers are let in again afterwards.
    assert done[-1] in _comments(get_engine())


def _write_as_another_process(service: Service, statement: str) -> None:
    if service.engine == "postgresql":
        with psycopg.connect(service.url, autocommit=True) as connection:
            connection.execute(statement)
        return
    with closing(sqlite3.connect(sqlite_path(get_engine()), isolation_level=None)) as connection:
        connection.execute("PRAGMA busy_timeout = 10000")
        connection.execute(statement)


def _sibling(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


def _comments(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.execute(text("SELECT comment FROM feedback")).scalars())
