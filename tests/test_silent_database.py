"""A PostgreSQL that takes connections and says nothing is not waited for without end."""

import socket
import time
from collections.abc import Iterator
from typing import Final

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from backend import db_utils
from backend.db_utils import make_engine
from tests.conftest import PostgresServer

# Far below what libpq would wait, and far above what is set here.
SOON_SECONDS: Final = 60


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of somebody who listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"postgresql://postgres@127.0.0.1:{listener.getsockname()[1]}/postgres"


def refused_in_time(engine: Engine) -> None:
    started = time.monotonic()
    with pytest.raises(OperationalError, match="timeout"):
        engine.connect()
    assert time.monotonic() - started < SOON_SECONDS


def test_it_is_given_up_in_bounded_time(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert db_utils._PATIENCE["connect_timeout"] < SOON_SECONDS
    monkeypatch.setitem(db_utils._PATIENCE, "connect_timeout", 2)
    refused_in_time(make_engine(silent))


def test_the_address_itself_may_say_how_long(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(db_utils._PATIENCE, "connect_timeout", 3600)
    refused_in_time(make_engine(f"{silent}?connect_timeout=2"))


def test_one_that_answers_takes_the_settings(postgres_server: PostgresServer) -> None:
    engine = make_engine(postgres_server.url("postgres"))
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        given = raw.info.get_parameters()
    engine.dispose()
    assert (given["connect_timeout"], given["tcp_user_timeout"]) == ("10", "30000")
