"""A backup is restored beside the live database, for a look: whole, with every promise kept."""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select
from sqlalchemy.engine import make_url

from backend.db_utils import get_engine, session_scope, sqlite_path
from backend.errors import BackupDamagedError, ConflictError, HoldfastError, RefusedError
from backend.models import DataConsent, Feedback, User
from backend.services.archive_service import live_database
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.restore_service import get_restore_service
from backend.services.restored import Restored
from backend.services.setup_service import get_setup_service
from tests.backup.promises import back_up, consent, erase, is_there, texts
from tests.conftest import ADMIN, PASSWORD, Run, Service, clear_caches
from tests.privacy.people import dump, feedback, plant, without

NAME = "look"
POSTGRES = pytest.mark.parametrize("service", ["postgresql"], indirect=True)


def _restore_to(backup_id: UUID | None, target: str, **options: Any) -> Restored:
    return get_restore_service().restore_to(backup_id, COMMAND_LINE, target, **options)


def _live() -> Any:
    """What must stay as it is: all but the record that somebody had a look."""
    return without(dump(), {}, "audit_events")


@pytest.fixture
def target(service: Service, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """An address at which there is nothing yet: a file, or a database of the server."""
    if service.engine == "sqlite":
        yield str(tmp_path / f"{NAME}.db")
        return
    yield f"{service.url.rpartition('/')[0]}/{NAME}"
    clear_caches()
    request.getfixturevalue("postgres_server").run(f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)")


def _open(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Let this process work with the database that was restored."""
    get_engine().dispose()
    url = target if "://" in target else f"sqlite:///{target}"
    monkeypatch.setenv("DATABASE_URL", url)
    clear_caches()
    get_setup_service().open()


def test_it_is_the_backup_with_every_promise_kept_and_the_live_database_stays(
    service: Service, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jane, joe = plant("A"), service.user("joe@example.com", full_name="Joe")
    consent(joe, granted=True)
    backup_id = back_up()
    erase(jane.id)
    kept_by_law = texts() & jane.words()
    consent(joe, granted=False)
    late = service.user("late@example.com")
    before, kept = _live(), live_database().previous()
    restored = _restore_to(backup_id, target)
    assert (restored.status, restored.previous) == ("restored", None)
    assert (restored.reapplied.erasures, restored.reapplied.consents) == (1, 1)
    assert _live() == before
    (told,) = (row for row in dump()["audit_events"].values() if row["action"] == "restore")
    assert told["outcome"] == "beside"
    assert live_database().previous() == kept
    assert live_database().sweep() == 0
    _open(monkeypatch, target)
    assert [is_there(person) for person in (jane.id, joe, late)] == [False, True, False]
    assert texts() & jane.words() <= kept_by_law
    with session_scope(read_only=True) as session:
        assert session.get_one(User, joe).full_name == "Joe"
        assert session.scalar(select(func.count()).select_from(DataConsent)) == 2
    get_auth_service().sign_in(ADMIN, PASSWORD)


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_a_file_is_whole_sound_and_its_owners_alone(
    sqlite_service: Service, tmp_path: Path, form: str
) -> None:
    sqlite_service.add(Feedback(rating=4, submitted_at=datetime.now(UTC)))
    back_up()
    path = tmp_path / "look.db"
    umask = os.umask(0)
    try:
        restored = _restore_to(None, form.format(path))
    finally:
        os.umask(umask)
    assert restored.target == str(path)
    assert [left.name for left in tmp_path.iterdir()] == ["look.db"]
    assert (path.stat().st_mode & 0o777, path.stat().st_nlink) == (0o600, 1)
    # Alone, as somebody takes it away.
    (tmp_path / "elsewhere").mkdir()
    taken = shutil.move(path, tmp_path / "elsewhere")
    with closing(sqlite3.connect(taken)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT rating FROM feedback").fetchall() == [(4,)]


def _file(path: Path) -> str:
    path.write_bytes(b"somebody's")
    return str(path)


def _link_that_leads_nowhere(path: Path) -> str:
    path.symlink_to(path.with_name("nowhere"))
    return str(path)


def _folder(path: Path) -> str:
    path.mkdir()
    return f"sqlite:///{path}"


def _in_no_folder(path: Path) -> str:
    return str(path / "below" / "look.db")


def _live_file(_path: Path) -> str:
    return str(sqlite_path(get_engine()))


def _live_file_by_another_name(path: Path) -> str:
    path.symlink_to(sqlite_path(get_engine()))
    return f"sqlite:///{path}"


def _nothing(_path: Path) -> str:
    return ""


def _url_without_a_file(_path: Path) -> str:
    return "sqlite://"


def _another_kind(_path: Path) -> str:
    return "mysql://root:a-password@127.0.0.1:1/look"


def _no_url(_path: Path) -> str:
    return "look://at/this?password=a-password"


REFUSED = [
    _file, _link_that_leads_nowhere, _folder, _in_no_folder, _live_file,
    _live_file_by_another_name, _nothing, _url_without_a_file, _another_kind, _no_url,
]  # fmt: skip


@pytest.mark.parametrize("target_at", REFUSED)
def test_where_something_is_or_nothing_can_be_it_is_refused(
    sqlite_service: Service, tmp_path: Path, target_at: Callable[[Path], str]
) -> None:
    back_up()
    target = target_at(tmp_path / "look.db")
    before, files = _live(), _files(tmp_path)
    with pytest.raises(RefusedError) as refused:
        _restore_to(None, target)
    assert "a-password" not in refused.value.detail
    assert (_live(), _files(tmp_path)) == (before, files)


def _files(folder: Path) -> dict[Path, Any]:
    return {
        path: path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


def test_a_url_that_names_the_driver_is_an_address_too(
    sqlite_service: Service, tmp_path: Path
) -> None:
    back_up()
    _restore_to(None, f"sqlite+pysqlite:///{tmp_path}/look.db")


def test_a_log_that_an_earlier_file_of_that_name_has_left_is_not_read_into_the_new_one(
    sqlite_service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "look.db"
    jane = plant("A")
    _leave_a_log(path)
    erase(jane.id)
    back_up()
    try:
        _restore_to(None, str(path))
    except RefusedError:
        return
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT count(*) FROM users WHERE id = ?", (jane.id,))
        assert found.fetchone() == (0,)


def _leave_a_log(path: Path) -> None:
    """Leave what is left of a copy of the live file that was killed and deleted by hand."""
    with closing(sqlite3.connect(sqlite_path(get_engine()))) as live:
        live.execute("VACUUM INTO ?", (str(path),))
    with closing(sqlite3.connect(path)) as copy:
        copy.execute("PRAGMA journal_mode=WAL")
        # Every page goes through the log.
        copy.execute("VACUUM")
        log = path.with_name(f"{path.name}-wal").read_bytes()
    path.unlink()
    path.with_name(f"{path.name}-wal").write_bytes(log)


@POSTGRES
def test_a_database_that_exists_or_is_another_engines_is_refused(
    service: Service, target: str, tmp_path: Path
) -> None:
    back_up()
    before = _live()
    for taken in (service.url, str(make_url(service.url).set(database="postgres"))):
        with pytest.raises(RefusedError, match="exists already"):
            _restore_to(None, taken)
    with pytest.raises(HoldfastError) as refused:
        _restore_to(None, str(tmp_path / "look.db"))
    assert refused.value.code == "schema_mismatch"
    assert (_live(), list(tmp_path.iterdir())) == (before, [])
    _restore_to(None, target)
    with pytest.raises(RefusedError, match="exists already"):
        _restore_to(None, target)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://postgres@{host}",
        "postgresql://postgres@{host}/",
        # The driver takes it for the name: everything after would happen to the live database.
        "postgresql://postgres@{host}/look?dbname={live}",
    ],
)
@POSTGRES
def test_an_address_that_does_not_say_which_database_is_refused(
    service: Service, request: pytest.FixtureRequest, address: str
) -> None:
    back_up()
    before = _live()
    host, _, live = service.url.rpartition("@")[2].partition("/")
    try:
        with pytest.raises(RefusedError):
            _restore_to(None, address.format(host=host, live=live))
        assert _live() == before
    finally:
        clear_caches()
        for name in ("None", "look"):
            request.getfixturevalue("postgres_server").run(
                f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'
            )


def _databases(service: Service) -> list[str]:
    with get_engine().connect() as connection:
        found = connection.exec_driver_sql("SELECT datname FROM pg_database ORDER BY 1")
        return [str(name) for name in found.scalars()]


def test_a_failure_half_way_leaves_nothing(service: Service, target: str, tmp_path: Path) -> None:
    service.add(feedback(None, datetime.now(UTC)))
    backup_id = back_up()
    archive = service.folder / "backups" / f"{backup_id}.hfb"
    archive.write_bytes(archive.read_bytes()[:-1])
    before = without(dump(), {}, "audit_events", "backup_records")
    databases = [] if service.engine == "sqlite" else _databases(service)
    with pytest.raises(BackupDamagedError):
        _restore_to(backup_id, target)
    assert without(dump(), {}, "audit_events", "backup_records") == before
    assert list(tmp_path.iterdir()) == []
    assert live_database().sweep() == 0
    if service.engine == "postgresql":
        assert _databases(service) == databases
    *_, told = (row for row in dump()["audit_events"].values() if row["action"] == "restore")
    (record,) = dump()["backup_records"].values()
    assert told["outcome"] == record["error"] == "backup_damaged"


def test_what_comes_to_be_there_meanwhile_is_not_replaced(
    sqlite_service: Service, tmp_path: Path
) -> None:
    back_up()
    path = tmp_path / "look.db"

    def meanwhile(_done: int, _total: int) -> None:
        path.write_bytes(b"somebody's")

    with pytest.raises(ConflictError):
        _restore_to(None, str(path), progress=meanwhile)
    assert path.read_bytes() == b"somebody's"
    assert list(tmp_path.iterdir()) == [path]


def test_over_the_command_line_it_is_one_option(
    run: Run, sqlite_service: Service, tmp_path: Path
) -> None:
    backup_id = back_up()
    before = _live()
    for more in ("--dry-run", "--confirm"):
        refused = run("backup", "restore", str(backup_id), "--to", "look.db", more)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("holdfast: --to ")
    assert list(tmp_path.iterdir()) == []
    # The working folder is `tmp_path`.
    done = run("backup", "restore", "--to", "look.db", "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["target"], done.json["backup_id"]) == (
        str(tmp_path / "look.db"), str(backup_id),
    )  # fmt: skip
    assert _live() == before
    again = run("backup", "restore", "--to", "look.db")
    assert (again.code, again.err) == (2, f"holdfast: {tmp_path / 'look.db'} exists already\n")
