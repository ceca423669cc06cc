"""Gone means gone: what an erasure leaves in files, logs and statistics, and what it tells."""

import base64
import hashlib
import hmac
import logging
import re
import sqlite3
import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text, update

from backend.crypto.references import new_reference_key
from backend.db_utils import get_engine, session_scope, sqlite_path
from backend.models import DATA_MAP, Base, Booking, Installation, LedgerKind, Payment, User
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.ledger_service import get_ledger_service
from backend.services.reference_service import reference_to
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import Who
from main import create_app
from tests.conftest import ADMIN, PASSWORD, Service, clear_caches, set_environment
from tests.privacy.people import Dump, Person, dump, keys_of, plant

DELETE, ANONYMIZE = EraseMode.DELETE, EraseMode.ANONYMIZE
MODES = pytest.mark.parametrize("mode", [DELETE, ANONYMIZE])


def erase(user_id: int, mode: EraseMode = DELETE) -> Erasure:
    """Erase and commit; the scan is the caller's."""
    with session_scope() as session:
        return get_erasure_service().erase(
            session, COMMAND_LINE, Who(user_id), mode, reason="request", dry_run=False
        )


# Files


def stored(before: Dump, user_id: int) -> set[bytes]:
    """What the database's own words for a person are: sealed cells, terms, random ids."""
    keys = keys_of(before, user_id)
    users = before["users"][(user_id,)]
    found = {str(users[name]) for name in ("uid", "email_index", "password_hash")}
    for table in ("users", "bookings", "feedback", "companions"):
        for key in keys[table]:
            cells = before[table][key].values()
            found |= {c for c in cells if isinstance(c, str) and c.startswith("enc1.")}
    assert len(found) > 20
    return {value.encode() for value in found}


def left_in_files(service: Service, old: set[bytes]) -> dict[str, int]:
    """How many old values each of SQLite's files holds."""
    counts = {}
    for path in service.folder.glob("holdfast.db*"):
        content = path.read_bytes()
        if number := sum(value in content for value in old):
            counts[path.name] = number
    return counts


def wait_less_for_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits seconds for a reader that a test holds on purpose."""
    connect: Any = sqlite3.connect

    def connect_soon(*arguments: Any, timeout: float = 5.0, **options: Any) -> Any:
        return connect(*arguments, timeout=min(timeout, 0.05), **options)

    monkeypatch.setattr(sqlite3, "connect", connect_soon)


@pytest.fixture
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_less_for_readers(monkeypatch)


def reader() -> sqlite3.Connection:
    """Another process that goes on reading what it has begun with."""
    connection = sqlite3.connect(sqlite_path(get_engine()), isolation_level=None)
    connection.execute("BEGIN")
    connection.execute("SELECT count(*) FROM users").fetchone()
    return connection


@pytest.mark.usefixtures("_short_waits")
def test_a_log_that_a_reader_kept_is_emptied_at_the_end_of_the_scan(
    sqlite_service: Service,
) -> None:
    person, other = plant("A"), plant("B")
    before = dump()
    old, others = stored(before, person.id), stored(before, other.id)
    with closing(reader()) as held:
        erasure = erase(person.id)
        assert left_in_files(sqlite_service, old) == {"holdfast.db-wal": len(old)}
        held.execute("ROLLBACK")
    get_erasure_service().prove(erasure)
    assert left_in_files(sqlite_service, old) == {}
    assert left_in_files(sqlite_service, others) == {"holdfast.db": len(others)}


@pytest.mark.usefixtures("_short_waits")
def test_a_log_that_a_reader_kept_through_the_scan_is_emptied_by_the_next_erasure(
    sqlite_service: Service,
) -> None:
    person, other = plant("A"), plant("B")
    old = stored(dump(), person.id)
    with closing(reader()) as held:
        get_erasure_service().prove(erase(person.id))
        assert left_in_files(sqlite_service, old) == {"holdfast.db-wal": len(old)}
        held.execute("ROLLBACK")
    erase(other.id)
    assert left_in_files(sqlite_service, old) == {}


class _KilledError(Exception):
    """Stands for the end of a process between object and commit."""


def promise_only(user_id: int) -> None:
    """Leave what a process leaves that was killed once the ledger's object was written."""
    now = datetime.now(UTC)
    with session_scope() as session:
        ref = reference_to(session, session.get_one(User, user_id).uid)
        get_ledger_service().enter(session, LedgerKind.ERASE, ref, COMMAND_LINE, at=now)
        raise _KilledError


def test_an_erasure_that_a_start_finishes_leaves_no_byte_either(sqlite_service: Service) -> None:
    person = plant("A")
    old = stored(dump(), person.id)
    # So that the file itself, and not only its log, holds the person.
    with closing(sqlite3.connect(sqlite_path(get_engine()))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with pytest.raises(_KilledError):
        promise_only(person.id)
    get_setup_service().recover()
    assert (person.id,) not in dump()["users"]
    assert left_in_files(sqlite_service, old) == {}


def test_a_restore_brings_back_no_byte_of_an_erased_person(sqlite_service: Service) -> None:
    person, other = plant("A"), plant("B")
    before = dump()
    backup_id = get_backup_service().create(COMMAND_LINE).id
    get_erasure_service().prove(erase(person.id))
    restored = get_restore_service().restore(backup_id, COMMAND_LINE, dry_run=False, confirm=True)
    assert restored.reapplied.erasures == 1
    files = [path for path in sqlite_service.folder.rglob("*") if path.is_file()]
    old = stored(before, person.id)
    assert [p.name for p in files if any(value in p.read_bytes() for value in old)] == []
    assert left_in_files(sqlite_service, stored(before, other.id)) != {}


# Temporary files, logs, statistics


def sign_in(client: TestClient) -> dict[str, str]:
    form = {"username": ADMIN, "password": PASSWORD}
    token = client.post("/auth/token", data=form).json()["access_token"]
    return {"Authorization": f"Bearer {token}"}


def test_neither_logs_nor_temporary_files_keep_what_an_erasure_saw(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for name in ("TMPDIR", "SQLITE_TMPDIR"):
        monkeypatch.setenv(name, str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    # The service sets up logs of its own: those of the tests come back afterwards.
    monkeypatch.setattr(logging.getLogger(), "handlers", logging.getLogger().handlers[:])
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("DATA_MAP_IGNORE", "newsletter")
    person = plant("A")
    before = dump()
    mark = next(m.text for m in person.marks if m.column == "email")
    with session_scope() as session:
        session.execute(text("CREATE TABLE newsletter (email TEXT)"))
        session.execute(text("INSERT INTO newsletter VALUES (:email)"), {"email": mark})
    clear_caches()
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        admin = sign_in(client)
        body = {"user_id": person.id, "mode": "delete", "reason": "request"}
        done = client.post("/security/data/delete", json=body, headers=admin)
        assert done.status_code == 200, done.text
        certificate = client.get(
            f"/security/data/erasures/{done.json()['erasure_id']}", headers=admin
        )
        again = client.post("/security/data/delete", json=body, headers=admin)
    assert again.status_code == 404
    said = capsys.readouterr()
    logged = said.out + said.err
    assert "erasure_partial" in logged
    uid = str(before["users"][(person.id,)]["uid"])
    canaries = person.words() | {
        uid,
        uuid.UUID(uid).hex,
        before["users"][(person.id,)]["email_index"],
    }
    for told in (logged, done.text, certificate.text, again.text):
        assert [canary for canary in canaries if canary in told] == []
    assert certificate.json()["statement"]["scan"]["found"] == [
        {"table": "newsletter", "column": "email", "cells": 1}
    ]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("service", ["postgresql"], indirect=True)
@pytest.mark.parametrize("alone", [True, False], ids=["the only guest", "among others"])
def test_the_planner_s_statistics_forget_the_person_too(service: Service, alone: bool) -> None:
    person = plant("A")
    if not alone:
        plant("B")
    before = dump()
    engine = get_engine()

    def known(values: set[str]) -> set[str]:
        with engine.begin() as connection:
            rows = connection.exec_driver_sql(
                "SELECT concat(most_common_vals, histogram_bounds) FROM pg_stats"
                " WHERE schemaname = 'public'"
            )
            told = "\n".join(rows.scalars())
        return {value for value in values if value in told}

    with engine.begin() as connection:
        connection.exec_driver_sql("ANALYZE")
    mine = {value for table, keys in keys_of(before, person.id).items() for key in keys
            for value in texts(before[table][key])}  # fmt: skip
    assert known(mine) != set()
    get_erasure_service().prove(erase(person.id))
    gone = mine - long_cells(dump())
    assert len(gone) > 50
    assert known(gone) == set()


def texts(row: dict[str, Any]) -> set[str]:
    """Cells long enough not to stand somewhere by chance."""
    found = {str(cell) for cell in row.values() if isinstance(cell, str | uuid.UUID | date)}
    return {cell for cell in found if len(cell) > 7}


# What anonymous rows tell


def crowd(*letters: str) -> list[Person]:
    """People whose rows differ in nothing that an anonymous row may keep."""
    now = datetime.now(UTC)
    people = [plant(letter, now) for letter in letters]
    with session_scope() as session:
        session.execute(update(Booking).values(status="Check-Out", country="PRT"))
        session.execute(update(Payment).values(method="card"))
        for person in people:
            user = session.get_one(User, person.id)
            user.email = f"Guest.{person.id}@Example.com"
            user.phone = f"+351 912 345 67{person.id}"
    return people


def spellings(person: Person) -> set[str]:
    """What somebody would hash who wants to find the person again."""
    with session_scope(read_only=True) as session:
        user = session.get_one(User, person.id)
        known = [user.email, user.phone, user.full_name, user.document_number, str(user.uid),
                 user.uid.hex, str(user.id), str(user.date_of_birth)]  # fmt: skip
    texts_ = {text_ for text_ in known if text_}
    texts_ |= {text_.replace(" ", "") for text_ in texts_}
    texts_ |= {text_.lstrip("+") for text_ in texts_} | {
        text_.partition("@")[0] for text_ in texts_
    }
    return texts_ | {text_.lower() for text_ in texts_} | {text_.upper() for text_ in texts_}


_HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "blake2b", "blake2s", "sha3_256")
_GUESSED_KEYS = (b"", b"secret", b"holdfast", b"users", b"email", b"users.email")


def digests(value: str) -> Iterator[str]:
    """Every digest of *value* that needs no key of ours, as far as a cell would show it."""
    raw = value.encode()
    raws = [hashlib.new(name, raw).digest() for name in _HASHES]
    raws += [
        hmac.digest(key, raw, name) for key in _GUESSED_KEYS for name in ("md5", "sha1", "sha256")
    ]
    raws += [uuid.uuid5(space, value).bytes for space in (uuid.NAMESPACE_DNS, uuid.NAMESPACE_URL)]
    raws += [uuid.uuid3(uuid.NAMESPACE_DNS, value).bytes]
    for one in raws:
        # Also cut short: 12 characters of it do not stand anywhere by chance.
        yield one.hex()[:12]
        yield base64.b64encode(one).decode()[:12]
        yield base64.urlsafe_b64encode(one).decode()[:12]
    for checksum in (zlib.crc32(raw), zlib.adler32(raw)):
        yield f"{checksum:08x}"
        yield str(checksum)


def cells() -> str:
    """Every cell of every table, as stored and opened, in one text."""
    opened: list[str] = []
    with session_scope(read_only=True) as session:
        for table in Base.metadata.sorted_tables:
            for row in session.execute(select(table)):
                opened += [cell.hex() if isinstance(cell, bytes) else str(cell) for cell in row]
    raw = [str(cell) for rows in dump().values() for row in rows.values() for cell in row.values()]
    joined = "\n".join(opened + raw)
    return joined + joined.lower() + joined.replace("-", "")


@MODES
def test_no_digest_of_anything_of_the_person_is_left(service: Service, mode: EraseMode) -> None:
    person, other = crowd("A", "B")
    known = {d for value in spellings(person) if len(value) > 3 for d in digests(value)}
    known -= {d for value in spellings(other) for d in digests(value)}
    planted = hashlib.sha256(f"guest.{person.id}@example.com".encode()).hexdigest()[:20]
    with session_scope() as session:
        session.execute(update(Booking).where(Booking.user_id == other.id).values(agent=planted))
    erase(person.id, mode)
    everything = cells()
    # The search finds one where there is one.
    assert {digest for digest in known if digest in everything} == {planted[:12]}


def of_rows(person: Person, skip: Callable[[str, str], bool]) -> Iterator[set[str]]:
    """The cells of each row that is left of what was a person's, opened."""
    with session_scope(read_only=True) as session:
        for table, keys in person.keys.items():
            mapped = DATA_MAP[table]
            rows = session.execute(select(mapped.table).where(mapped.key.in_(keys))).mappings()
            for row in rows:
                yield {str(value) for name, value in row.items()
                       if value is not None and not skip(table, name)}  # fmt: skip


def is_row_number(table: str, column: str) -> bool:
    """Numbers that rows have had before there was an erasure, and what is not a person's."""
    place = DATA_MAP[table].table.c[column]
    return place.primary_key or bool(place.foreign_keys)


def test_anonymous_rows_of_one_person_have_nothing_in_common_that_others_lack(
    service: Service,
) -> None:
    """A time of the act to the microsecond ties a stay to the invoice that the law keeps."""
    people = crowd("A", "B", "C")
    for person in people:
        erase(person.id, ANONYMIZE)
    counts = [Counter(value for row in of_rows(person, is_row_number) for value in row)
              for person in people]  # fmt: skip
    everyone = Counter(value for count in counts for value in count)
    ties = {value for count in counts for value, rows in count.items()
            if rows > 1 and everyone[value] == 1}  # fmt: skip
    assert ties == set()


def test_the_same_person_erased_in_two_installations_is_two_strangers(
    sqlite_service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (person,) = crowd("A")
    before = long_cells(dump())
    copy = tmp_path / "other"
    copy.mkdir()
    with closing(sqlite3.connect(sqlite_path(get_engine()))) as connection:
        connection.execute("VACUUM INTO ?", (str(copy / "holdfast.db"),))
    seen = []
    for folder in (sqlite_service.folder, copy):
        set_environment(monkeypatch, folder, None)
        get_setup_service().open()
        with session_scope() as session:
            # Each installation has made its own.
            session.scalars(select(Installation)).one().reference_key = new_reference_key()
        get_erasure_service().prove(erase(person.id, ANONYMIZE))
        seen.append(long_cells(dump()) - before)
    assert min(map(len, seen)) > 10
    months = {cell for cell in seen[0] if re.fullmatch(r"\d{4}-\d\d-01( 00:00:00.000000)?", cell)}
    assert (seen[0] & seen[1]) - months == {"anonymize", "complete"}


def long_cells(raw: Dump) -> set[str]:
    """The cells that could be a name for somebody."""
    return {value for rows in raw.values() for row in rows.values() for value in texts(row)}
