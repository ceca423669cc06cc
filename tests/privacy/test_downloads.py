"""Downloads that end early: callers who hang up or stall, people who are erased meanwhile."""

import json
import logging
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from threading import Event
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.pool import QueuePool

from backend.api import privacy, streams
from backend.crypto.files import PassphraseLock, Slot
from backend.db_utils import get_engine, session_scope, sqlite_path
from backend.errors import HoldfastError
from backend.privacy.declarations import EraseMode
from backend.privacy.export import ExportFormat
from backend.services import compliance_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.compliance_service import get_compliance_service
from backend.services.erasure_service import get_erasure_service
from backend.services.subject_service import Who
from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service
from tests.privacy.people import ADMINISTRATOR, booking, companion, dump, many_rows, plant
from tests.privacy.test_gone import wait_less_for_readers

DELETE, ANONYMIZE = EraseMode.DELETE, EraseMode.ANONYMIZE
JANE, KIM = "jane@example.com", "kim@example.com"


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[uvicorn.Server]:
    """The service behind a real socket; `at` says where."""
    # The service sets up logs of its own: those of the tests come back afterwards.
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(
            uvicorn.Config(create_app(), access_log=False, log_config=None, server_header=False)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield server
        finally:
            server.should_exit = True
            thread.join()


def at(server: uvicorn.Server) -> int:
    """The port."""
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def finished(server: uvicorn.Server) -> bool:
    """Wait until nothing of any request goes on; a stream that is left alone never ends."""
    end = time.monotonic() + 40
    while server.server_state.tasks and time.monotonic() < end:
        time.sleep(0.02)
    return not server.server_state.tasks


def sign_in_at(port: int) -> str:
    form = {"username": ADMIN, "password": PASSWORD}
    answer = httpx.post(f"http://127.0.0.1:{port}/auth/token", data=form)
    return f"Bearer {answer.json()['access_token']}"


def hang_up(port: int, token: str, body: dict[str, Any], *, until: Event | None = None) -> bytes:
    """Ask for an export, read its first KB, read no more *until* told, break the connection."""
    content = json.dumps(body).encode()
    head = (
        "POST /security/data/export HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: {token}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # Without lingering: the other end is told of a broken connection, not of an ended one.
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        caller.connect(("127.0.0.1", port))
        caller.sendall(head.encode() + content)
        first = b""
        while len(first) < 1024 and (part := caller.recv(1024)):
            first += part
        if until is not None:
            until.wait(60)
        return first


def checked_out() -> int:
    """How many connections somebody has not given back."""
    pool = get_engine().pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


def in_transaction(service: Service) -> int:
    """How many connections of the service are in a transaction."""
    if service.engine == "sqlite":
        with closing(sqlite3.connect(sqlite_path(get_engine()), timeout=0)) as connection:
            busy, left, _moved = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return int(busy or left)
    with session_scope(read_only=True) as session:
        statement = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND xact_start IS NOT NULL"
        )
        return int(session.scalar(text(statement)) or 0)


@pytest.mark.parametrize("form", [{"format": "json"}, {"format": "csv"}, {"format": "zip"},
                                  {"format": "json", "encrypt": True}],
                         ids=["plain", "csv", "zip", "sealed"])  # fmt: skip
def test_a_caller_who_hangs_up_in_an_export_leaves_nothing_open(
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    form: dict[str, Any],
) -> None:
    person = service.user(JANE, full_name="Jane Known")
    many_rows(person, 6_000, words="words of Jane Known " * 80)
    with served(monkeypatch) as server:
        token = sign_in_at(at(server))
        for _again in range(3):
            first = hang_up(at(server), token, {"user_id": person, **form})
            assert first.startswith(b"HTTP/1.1 200")
        assert finished(server)
        assert (checked_out(), in_transaction(service)) == (0, 0)
        assert httpx.get(f"http://127.0.0.1:{at(server)}/readyz").status_code == 200
    said = capsys.readouterr()
    logged = said.out + said.err
    assert "route" in logged
    assert [word for word in (JANE, "Jane", "words of", token[7:]) if word in logged] == []


def test_a_caller_who_takes_nothing_more_is_given_up(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALLED_SECONDS", 0.3)
    person = sqlite_service.user(JANE)
    many_rows(person, 6_000, words="words " * 300)
    let_go = Event()
    with served(monkeypatch) as server, ThreadPoolExecutor(1) as pool:
        token = sign_in_at(at(server))
        caller = pool.submit(hang_up, at(server), token, {"user_id": person}, until=let_go)
        while not server.server_state.tasks and not caller.done():
            time.sleep(0.01)
        try:
            # The caller still holds its end of the connection.
            assert finished(server)
            assert (checked_out(), in_transaction(sqlite_service)) == (0, 0)
        finally:
            let_go.set()
        assert caller.result().startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("who", "format_"),
    [
        (DELETE, ExportFormat.JSON),
        (ANONYMIZE, ExportFormat.JSON),
        (DELETE, ExportFormat.ZIP),
        (KIM, ExportFormat.JSON),
    ],
)
def test_a_download_of_a_person_who_is_erased_meanwhile_ends(
    service: Service, monkeypatch: pytest.MonkeyPatch, who: EraseMode | str, format_: ExportFormat
) -> None:
    # The erasure's commit would wait for the download, which on SQLite keeps the log.
    wait_less_for_readers(monkeypatch)
    monkeypatch.setattr(compliance_service, "_STILL_THERE_SECONDS", 0)
    person, host = service.user(JANE), booking(plant("B").id, datetime.now(UTC).date())
    service.add(host)
    service.add(*(companion(host.id, email=KIM, full_name=f"Kim {n}") for n in range(600)))
    named = Who(person) if isinstance(who, EraseMode) else Who(email=who)
    with session_scope() as session:
        chunks = get_compliance_service().export(session, ADMINISTRATOR, named, format_)
    next(chunks)
    with session_scope() as session:
        mode = who if isinstance(who, EraseMode) else DELETE
        get_erasure_service().erase(
            session, COMMAND_LINE, named, mode, reason="request", dry_run=False
        )
    with pytest.raises(HoldfastError) as ended:
        list(chunks)
    assert ended.value.code in ("subject_not_found", "subject_erased")


def test_an_export_that_fits_one_chunk_has_a_length_and_others_are_streamed(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person = service.user(JANE)
    answer = client.post("/security/data/export", json={"user_id": person}, headers=admin)
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.json()["data"]["users"][0]["email"] == JANE
    many_rows(person, 600, words="words " * 40)
    answer = client.post("/security/data/export", json={"user_id": person}, headers=admin)
    assert "content-length" not in answer.headers
    assert len(answer.content) > 2 * streams.CHUNK_BYTES
    assert len(answer.json()["data"]["feedback"]) == 600


def test_what_goes_wrong_before_the_first_byte_is_answered_and_leaves_nothing_open(
    client: TestClient, service: Service, admin: dict[str, str]
) -> None:
    person = service.user(JANE, full_name="Jane Known")
    with session_scope() as session:
        session.execute(text("UPDATE users SET full_name = 'enc1.damaged'"))
    answer = client.post("/security/data/export", json={"user_id": person}, headers=admin)
    assert (answer.status_code, answer.json()["code"]) == (500, "malformed_token")
    assert "Jane" not in answer.text
    assert (checked_out(), in_transaction(service)) == (0, 0)


def test_nobody_waits_for_a_passphrase_to_be_stretched(
    client: TestClient,
    service: Service,
    admin: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    person, open_then = service.user(JANE), []
    stretch = PassphraseLock.wrap

    def watched(lock: PassphraseLock, *parts: bytes) -> Slot:
        open_then.append((checked_out(), in_transaction(service)))
        return stretch(lock, *parts)

    monkeypatch.setattr(PassphraseLock, "wrap", watched)
    body = {"user_id": person, "encrypt": True, "passphrase": "of the person alone"}
    assert client.post("/security/data/export", json=body, headers=admin).status_code == 200
    assert open_then == [(0, 0)]
    # Who would have to wait for too long is told to come back, and nothing was handed out.
    monkeypatch.setattr(privacy, "_MAX_WAITING", 0)
    before = dump()["audit_events"]
    refused = client.post("/security/data/export", json=body, headers=admin)
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert dump()["audit_events"] == before
