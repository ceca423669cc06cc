"""The database: what every connection is set to, and that what was answered is what is kept."""

import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from backend.db_utils import (
    empty_wal_after_commit,
    make_engine,
    session_scope,
    snapshot_scope,
    writes_paused,
)
from backend.errors import ConfigurationError, UnavailableError
from backend.models import Base, LegalHold, User
from backend.settings import get_settings
from tests.conftest import Service

SECRET: Final = "hunter2"
HOLD: Final = {"scope": "data_type", "data_type": "payment", "reason": "claim"}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A SQLite file with one table of one counter."""
    engine = make_engine(f"sqlite:///{tmp_path / 'counter.db'}")
    with session_scope(engine) as session:
        session.execute(text("CREATE TABLE counter (id INTEGER PRIMARY KEY, n INTEGER, t TEXT)"))
        session.execute(text("INSERT INTO counter (n) VALUES (0)"))
    yield engine
    engine.dispose()


def count(engine: Engine) -> int:
    with session_scope(engine, read_only=True) as session:
        return int(session.execute(text("SELECT n FROM counter")).scalar_one())


def add_one(session: Session) -> None:
    session.execute(text("UPDATE counter SET n = n + 1"))


def test_every_sqlite_connection_keeps_the_promises_that_its_settings_carry(engine: Engine) -> None:
    wanted = {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "secure_delete": 1,
        "busy_timeout": 10_000,
    }
    with ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(engine.connect())
            found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted}
            assert found == wanted
            # Five at once, so none is the same one again.
            connection.rollback()


def test_the_file_and_those_beside_it_are_their_owners_only(engine: Engine, tmp_path: Path) -> None:
    with session_scope(engine) as session:
        add_one(session)
        session.flush()
        files = sorted(tmp_path.glob("counter.db*"))
        assert [file.name for file in files] == ["counter.db", "counter.db-shm", "counter.db-wal"]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_only_a_block_that_ends_and_may_write_is_committed(service: Service) -> None:
    eve = service.user("eve@example.com")
    with session_scope() as session:
        session.get_one(User, eve).country = "DEU"
    with suppress(RuntimeError), session_scope() as session:
        session.get_one(User, eve).country = "FRA"
        session.flush()
        raise RuntimeError
    with session_scope(read_only=True) as session:
        session.get_one(User, eve).country = "ITA"
        session.flush()
    with session_scope(read_only=True) as session:
        assert session.get_one(User, eve).country == "DEU"


def test_a_savepoint_is_undone_alone_and_a_table_made_in_a_failed_block_is_gone(
    engine: Engine,
) -> None:
    with session_scope(engine) as session:
        add_one(session)
        with suppress(RuntimeError), session.begin_nested():
            add_one(session)
            raise RuntimeError
    assert count(engine) == 1
    with suppress(RuntimeError), session_scope(engine) as session:
        session.execute(text("CREATE TABLE left_over (id INTEGER)"))
        raise RuntimeError
    with session_scope(engine) as session:
        session.execute(text("CREATE TABLE left_over (id INTEGER)"))


def test_a_reader_sees_one_state_makes_no_writer_wait_and_keeps_nothing(engine: Engine) -> None:
    with session_scope(engine, read_only=True) as reader:
        before = reader.execute(text("SELECT n FROM counter")).scalar_one()
        # One that had to wait would do so until it is refused: this one goes on reading.
        with session_scope(engine) as writer:
            add_one(writer)
        assert reader.execute(text("SELECT n FROM counter")).scalar_one() == before == 0
    assert count(engine) == 1


def test_a_snapshot_stays_as_it_was_while_others_commit(service: Service) -> None:
    people = select(func.count()).select_from(User)
    with snapshot_scope() as snapshot:
        before = snapshot.scalar(people)
        service.user("eve@example.com")
        assert snapshot.scalar(people) == before
    with snapshot_scope() as snapshot:
        assert snapshot.scalar(people) == (before or 0) + 1


def test_writers_that_read_first_wait_for_each_other_and_lose_nothing(engine: Engine) -> None:
    start = threading.Barrier(4)

    def work(_number: int) -> None:
        start.wait()
        for _ in range(10):
            with session_scope(engine) as session:
                n = session.execute(text("SELECT n FROM counter")).scalar_one()
                session.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert count(engine) == 40


# Commits that fail


def fail_commits(service: Service, table: str) -> Callable[[], None]:
    """Have the database itself refuse the commit of every transaction that adds to *table*."""
    if service.engine == "sqlite":
        parent = "INTEGER REFERENCES users (id) DEFERRABLE INITIALLY DEFERRED"
        run(
            f"CREATE TABLE broken (parent {parent})",
            f"CREATE TRIGGER refuse AFTER INSERT ON {table} BEGIN"  # noqa: S608 - our own names
            " INSERT INTO broken VALUES (-1); END",
        )
        return lambda: run("DROP TRIGGER refuse")
    body = "BEGIN RAISE EXCEPTION ''refused''; END"
    run(
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS '{body}'",
        f"CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON {table}"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    return lambda: run(f"DROP TRIGGER refuse ON {table}")


def run(*statements: str) -> None:
    with session_scope() as session:
        for statement in statements:
            session.execute(text(statement))


def rows() -> dict[str, int]:
    with session_scope(read_only=True) as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
        }


def test_a_commit_that_the_database_refuses_is_answered_with_an_error_and_keeps_nothing(
    client: TestClient, service: Service, admin: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_MAP_IGNORE", "broken")
    get_settings.cache_clear()
    eve = service.user("eve@example.com")
    requests: list[tuple[str, dict[str, Any] | None]] = [
        ("/security/holds", HOLD),
        (
            f"/security/data/consent/{eve}",
            {"purpose": "marketing", "granted": True, "evidence": "signed form"},
        ),
        (
            "/security/retention/policy",
            {"data_type": "feedback", "retention_days": 30, "action": "delete"},
        ),
        ("/security/data/export", {"user_id": eve}),
        ("/security/data/delete", {"user_id": eve, "mode": "delete", "reason": "art. 17"}),
        ("/auth/logout", None),
    ]
    # Each of them records itself there, as the last thing it does.
    mend = fail_commits(service, "audit_events")
    before = rows()
    for path, body in requests:
        answer = client.post(path, json=body, headers=admin)
        assert answer.status_code == 500, (path, answer.text)
        assert answer.headers["Content-Type"] == "application/problem+json", path
        assert answer.json()["code"] == "internal_error"
        assert "eve@" not in answer.text
    assert rows() == before
    mend()
    for path, body in requests:
        assert client.post(path, json=body, headers=admin).status_code < 300, path


def test_after_a_refused_commit_no_lock_is_left_and_the_next_writer_succeeds(
    engine: Engine, tmp_path: Path
) -> None:
    with session_scope(engine) as session:
        parent = "INTEGER REFERENCES counter (id) DEFERRABLE INITIALLY DEFERRED"
        session.execute(text(f"CREATE TABLE child (parent {parent})"))
    with pytest.raises(IntegrityError), session_scope(engine) as session:
        session.execute(text("INSERT INTO child VALUES (-1)"))
    with closing(sqlite3.connect(tmp_path / "counter.db", timeout=0.1)) as another_process:
        another_process.execute("BEGIN IMMEDIATE")
    with session_scope(engine) as session:
        add_one(session)
    assert count(engine) == 1


# The write gate


def test_while_writes_are_paused_writers_are_refused_readers_served_and_then_all_again(
    client: TestClient, admin: dict[str, str]
) -> None:
    def holds() -> int:
        with session_scope(read_only=True) as session:
            return session.scalar(select(func.count()).select_from(LegalHold)) or 0

    with writes_paused():
        answer = client.post("/security/holds", json=HOLD, headers=admin)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert client.get("/security/holds", headers=admin).status_code == 200
        with pytest.raises(UnavailableError), writes_paused():
            pass
        assert client.post("/security/holds", json=HOLD, headers=admin).status_code == 503
    assert holds() == 0
    assert client.post("/security/holds", json=HOLD, headers=admin).status_code == 201
    with pytest.raises(RuntimeError), writes_paused():
        raise RuntimeError
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(LegalHold)) == 1


def test_a_pause_begins_when_the_writers_at_work_are_done(sqlite_service: Service) -> None:
    inside, finish = threading.Event(), threading.Event()

    def write() -> None:
        with session_scope() as session:
            session.execute(update(User).values(country="DEU"))
            inside.set()
            finish.wait(60)

    with ThreadPoolExecutor(2) as pool:
        writer = pool.submit(write)
        assert inside.wait(60)
        with pytest.raises(UnavailableError, match="nothing was changed"), writes_paused(0.05):
            pytest.fail("the writer is still at work")
        # The pause that was given up lets writers through again.
        threading.Timer(0.1, finish.set).start()
        with writes_paused(60):
            writer.result(timeout=60)
            with session_scope(read_only=True) as session:
                assert session.scalars(select(User.country)).all() == ["DEU"]


def test_a_database_beside_the_live_one_is_written_during_a_pause(
    sqlite_service: Service, engine: Engine
) -> None:
    with writes_paused():
        with session_scope(engine) as session:
            add_one(session)
        with pytest.raises(UnavailableError), session_scope():
            pass
    assert count(engine) == 1


# What is left of what was erased


def log_and_file(folder: Path, name: str) -> tuple[bytes, bytes]:
    return (folder / f"{name}-wal").read_bytes(), (folder / name).read_bytes()


def test_erased_text_is_gone_from_the_log_and_the_file_after_the_commit(
    engine: Engine, tmp_path: Path
) -> None:
    canary = b"kanarienvogel " * 500
    for empties in (False, True):
        with session_scope(engine) as session:
            session.execute(text("UPDATE counter SET t = :t"), {"t": canary.decode()})
        with session_scope(engine) as session:
            if empties:
                empty_wal_after_commit(session)
            session.execute(text("UPDATE counter SET t = NULL"))
        log, file = log_and_file(tmp_path, "counter.db")
        assert (canary[:50] in log) is not empties
        assert canary[:50] not in file or not empties
    assert log == b""


# URLs and messages


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://app:{SECRET}@db.example/app",
        f"postgres://app:{SECRET}@db.example/app",
        f"oracle+oracledb://app:{SECRET}@db.example/app",
        f"app:{SECRET}@db.example/app",
        f"postgresql//app:{SECRET}@db.example/app",
        f"postgresql://app@db.example:{SECRET}/app",
        # A password with characters that would have to be quoted.
        f"postgresql://app:pass@word:{SECRET}@db.example/app",
        f"postgresql+psycopg2://app:{SECRET}@db.example/app",
        f"postgresql+unknown://app:{SECRET}@db.example/app",
        f"sqlite+aiosqlite:///{SECRET}.db",
        "sqlite://",
        "sqlite:///:memory:",
        "",
        SECRET,
    ],
)
def test_a_database_url_that_cannot_be_used_is_refused_and_not_shown(
    tmp_path: Path, url: str
) -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as refusal:
        make_engine(url)
    assert SECRET not in refusal.value.detail
    assert "db.example" not in refusal.value.detail


def test_a_failing_statement_does_not_quote_the_row_that_it_was_about(
    service: Service, now: datetime
) -> None:
    eve = service.user("eve@example.com")
    with session_scope(read_only=True) as session:
        uid = session.get_one(User, eve).uid
    with session_scope(read_only=True) as session:
        statement = insert(User).values(
            uid=uid, document_type="kanarienvogel", created_at=now, is_active=True
        )
        with pytest.raises(IntegrityError) as failure:
            session.execute(statement)
    assert "hide_parameters" in str(failure.value)
    assert "kanarienvogel" not in str(failure.value)
