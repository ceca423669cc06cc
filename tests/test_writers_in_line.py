"""Writers of one process on SQLite wait in line, each gets a turn, and none keeps it."""

import threading
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError

from backend import db_utils
from backend.db_utils import get_engine, session_scope
from backend.errors import UnavailableError
from backend.models import RevokedToken
from tests.conftest import Service

WRITE: Final = text("UPDATE users SET is_active = is_active")


def write() -> None:
    with session_scope() as session:
        session.execute(WRITE)


def elsewhere(act: Callable[[], object]) -> list[BaseException]:
    """Do *act* in another thread; return what it raised."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            act()
        except Exception as err:  # noqa: BLE001 - looked at by the test
            raised.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return raised


def fail_before_writing() -> None:
    with session_scope():
        raise RuntimeError


def fail_after_writing() -> None:
    with session_scope() as session:
        session.execute(WRITE)
        raise RuntimeError


def be_refused() -> None:
    with session_scope() as session:
        session.execute(insert(RevokedToken), [{"token_id": "x", "expires_at": None}])


def write_twice() -> None:
    with get_engine().connect() as connection:
        for _ in range(2):
            connection.execute(WRITE)
            connection.commit()


def lose_the_connection() -> None:
    with session_scope() as session:
        session.execute(WRITE)
        session.invalidate()


@pytest.mark.usefixtures("sqlite_service")
@pytest.mark.parametrize(
    "act",
    [write, fail_before_writing, fail_after_writing, be_refused, write_twice, lose_the_connection],
)
def test_however_a_writer_ends_the_next_one_has_its_turn(act: Callable[[], None]) -> None:
    for raised in elsewhere(act):
        assert isinstance(raised, RuntimeError | DBAPIError)
    for _ in range(50):
        assert elsewhere(write) == []


@pytest.fixture
def _impatient(sqlite_service: Service) -> Iterator[None]:
    """Let writers wait for a moment only, on an engine that no other test gets."""
    db_utils.dispose_engine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db_utils, "BUSY_TIMEOUT_SECONDS", 0.2)
        yield
    db_utils.dispose_engine()


@pytest.mark.usefixtures("_impatient")
def test_whoever_waits_too_long_is_told_to_come_back_and_readers_do_not_wait() -> None:
    def read() -> None:
        with session_scope(read_only=True) as session:
            session.execute(text("SELECT count(*) FROM users"))

    with session_scope() as session:
        session.execute(WRITE)
        (refusal,) = elsewhere(write)
        assert isinstance(refusal, UnavailableError)
        assert elsewhere(read) == []
    assert elsewhere(write) == []


def test_two_databases_have_a_line_each(sqlite_service: Service) -> None:
    other = db_utils.make_engine(f"sqlite:///{sqlite_service.folder / 'other.db'}")
    with session_scope() as session, other.begin() as connection:
        session.execute(WRITE)
        connection.execute(text("CREATE TABLE here (id INTEGER)"))
    other.dispose()
