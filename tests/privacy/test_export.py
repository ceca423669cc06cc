"""Export: everything that is held about one person and nothing else, the same in every format."""

import csv
import io
import json
import tracemalloc
import zipfile
from datetime import UTC, date, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select

from backend.crypto.files import KeyringLock, Lock, Opener, PassphraseLock
from backend.crypto.keyring import Keyring, RootKey, parse_key
from backend.db_utils import session_scope
from backend.errors import RefusedError, SubjectNotFoundError, TamperedError, UnknownKeyError
from backend.models import DATA_MAP, AuditEvent, Feedback, User
from backend.privacy.export import ExportFormat
from backend.services.compliance_service import get_compliance_service
from backend.services.encryption_service import get_encryption_service
from tests.conftest import OTHER_KEY, Service, SignIn
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, dump, keys_of, plant

FORMATS = pytest.mark.parametrize("format_", list(ExportFormat))
# Hashes and search terms are no answer to a person.
NEVER = {"password_hash", "email_index", "tokens_valid_after"}
PASSPHRASE = "of the person alone"

Facts = dict[tuple[str, str, str], str]


def export(
    user_id: int, format_: str = "json", *, encrypt: bool = False, passphrase: str | None = None
) -> bytes:
    with session_scope() as session:
        chunks = get_compliance_service().export(
            session, ADMINISTRATOR, user_id, ExportFormat(format_), encrypt=encrypt,
            passphrase=passphrase,
        )  # fmt: skip
    return b"".join(chunks)


def spelled(value: Any) -> str:
    """A value of the JSON as a cell of CSV spells it."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def facts_of_json(document: dict[str, Any]) -> Facts:
    return {
        (table, str(row["id"]), name): spelled(value)
        for table, rows in document["data"].items()
        for row in rows
        for name, value in row.items()
    }


def lines(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def facts_of_csv(data: bytes) -> Facts:
    return {
        (line["data_type"], line["record"], line["field"]): line["value"] for line in lines(data)
    }


def facts_of_zip(archive: zipfile.ZipFile) -> Facts:
    return {
        (mapped.name, line["id"], name): value
        for mapped in DATA_MAP.of_people
        for line in lines(archive.read(f"tables/{mapped.name}.csv"))
        for name, value in line.items()
    }


def test_every_column_of_every_table_is_in_the_export_and_in_every_format_the_same(
    client: TestClient, admin: dict[str, str]
) -> None:
    person, _other = plant("A"), plant("B")
    raw = dump()
    answers = {
        format_: client.post(
            "/security/data/export",
            json={"user_id": person.id, "format": format_},
            headers=admin,
        )
        for format_ in ("json", "csv", "zip")
    }
    types = {name: answer.headers["Content-Type"] for name, answer in answers.items()}
    assert types["json"] == "application/json"
    assert types["csv"].startswith("text/csv")
    assert types["zip"] == "application/zip"
    document = answers["json"].json()
    mine = keys_of(raw, person.id)
    expected = {
        (table, str(document_key(key[0])), column)
        for table, keys in mine.items()
        for key in keys
        for column in raw[table][key]
        if column not in NEVER
    }
    facts = facts_of_json(document)
    assert set(facts) == expected
    assert facts_of_csv(answers["csv"].content) == facts
    archive = zipfile.ZipFile(io.BytesIO(answers["zip"].content))
    assert archive.testzip() is None
    assert set(archive.namelist()) == {"index.html", "export.json"} | {
        f"tables/{table}.csv" for table in mine
    }
    assert facts_of_zip(archive) == facts
    inner = json.loads(archive.read("export.json"))
    assert inner["data"] == document["data"]
    assert document["counts"] == {table: len(keys) for table, keys in mine.items()}
    assert document["subject"] == {"user_id": person.id}
    texts = [answers["json"].text, answers["csv"].text]
    texts += [archive.read(name).decode() for name in archive.namelist()]
    never = {mark.text for mark in person.marks if mark.column in NEVER}
    assert len(never) == 1
    for text in texts:
        assert not any(secret in text for secret in never)
        assert raw["users"][(person.id,)]["email_index"] not in text
        assert "B01" not in text
        assert "enc1." not in text
    # The page, too, is the whole answer.
    page = archive.read("index.html").decode()
    shown = {mark.text for mark in person.marks if mark.column not in NEVER}
    assert {text for text in shown if text not in page} == set()
    assert {text for text in shown if text not in facts.values()} == set()


def document_key(key: Any) -> str:
    """Spell a row's key as the export does; SQLite stores UUIDs without dashes."""
    text = str(key)
    if len(text) == 32:
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    return text


def test_consents_and_the_notice_of_article_15_are_in_the_export(
    client: TestClient, service: Service, sign_in: SignIn
) -> None:
    user_id = service.user("jane@example.com")
    jane = sign_in("jane@example.com")
    for granted in (True, False):
        body = {"purpose": "marketing", "granted": granted, "notice_version": "3"}
        path = f"/security/data/consent/{user_id}"
        assert client.post(path, json=body, headers=jane).status_code == 201
    answer = client.post("/security/data/export", json={"user_id": user_id}, headers=jane)
    document = answer.json()
    assert document["consents"]["purposes"]["marketing"]["granted"] is False
    assert [event["granted"] for event in document["consents"]["history"]] == [True, False]
    assert len(document["data"]["data_consents"]) == 2
    assert set(document["notice"]["tables"]) == set(document["data"])
    assert document["notice"]["tables"]["bookings"]["kept_for"] == "2555 days from check out"
    assert "art. 17(3)(b)" in document["notice"]["tables"]["invoices"]["kept_by_law"]
    moment = datetime.fromisoformat(document["generated_at"])
    assert moment.utcoffset() == datetime.now(UTC).utcoffset()
    assert document["generated_at"].endswith("Z")


def test_a_person_of_whom_nothing_but_the_account_is_held_gets_that(service: Service) -> None:
    user_id = service.user("jane@example.com")
    facts = facts_of_json(json.loads(export(user_id)))
    assert {(table, record) for table, record, _ in facts} == {("users", str(user_id))}
    assert facts["users", str(user_id), "email"] == "jane@example.com"
    assert facts["users", str(user_id), "phone"] == ""
    assert facts_of_csv(export(user_id, "csv")) == facts
    assert facts_of_zip(zipfile.ZipFile(io.BytesIO(export(user_id, "zip")))) == facts


def test_an_export_of_nobody_is_refused_and_one_of_somebody_is_in_the_trail(
    service: Service,
) -> None:
    user_id = service.user("jane@example.com")
    with pytest.raises(SubjectNotFoundError):
        export(user_id + 1)
    export(user_id, "csv", encrypt=True)
    with session_scope(read_only=True) as session:
        event = session.scalars(select(AuditEvent).where(AuditEvent.action == "export")).one()
    assert json.loads(event.detail or "") == {"format": "csv", "encrypted": True}


@FORMATS
def test_an_encrypted_export_opens_with_the_key_of_the_service(
    sqlite_service: Service, format_: ExportFormat
) -> None:
    person = plant("A")
    sealed = export(person.id, format_, encrypt=True)
    assert not any(text.encode() in sealed for text in person.words())
    with pytest.raises(UnknownKeyError):
        unseal(sealed, KeyringLock(Keyring(RootKey(parse_key(OTHER_KEY)))))
    opened = unseal(sealed, get_encryption_service().file_lock())
    if format_ is ExportFormat.JSON:
        assert json.loads(opened)["data"] == json.loads(export(person.id))["data"]
    elif format_ is ExportFormat.CSV:
        assert opened == export(person.id, format_)
    else:
        assert zipfile.ZipFile(io.BytesIO(opened)).testzip() is None


def unseal(sealed: bytes, lock: Lock) -> bytes:
    return b"".join(Opener(io.BytesIO(sealed), lock).chunks())


def test_an_export_with_a_passphrase_opens_with_that_alone(sqlite_service: Service) -> None:
    user_id = sqlite_service.user("jane@example.com")
    sealed = export(user_id, encrypt=True, passphrase=PASSPHRASE)
    assert json.loads(unseal(sealed, PassphraseLock(PASSPHRASE)))["subject"] == {"user_id": user_id}
    with pytest.raises(TamperedError):
        unseal(sealed, PassphraseLock(PASSPHRASE + "s"))
    with pytest.raises(UnknownKeyError):
        unseal(sealed, get_encryption_service().file_lock())
    with pytest.raises(RefusedError):
        export(user_id, passphrase=PASSPHRASE)


FORMULAS = ("=1+1", "+49 30 1", "-1", "@SUM(A1)", "\t=1", "\r=1")


def test_no_cell_of_a_csv_is_a_formula_and_the_json_has_the_text_as_it_is(
    service: Service,
) -> None:
    user_id = service.user("jane@example.com")
    service.add(*(people.booking(user_id, date(2026, 1, 2), staff_notes=t) for t in FORMULAS))
    document = json.loads(export(user_id))
    assert [row["staff_notes"] for row in document["data"]["bookings"]] == list(FORMULAS)
    archive = zipfile.ZipFile(io.BytesIO(export(user_id, "zip")))
    tables = lines(archive.read("tables/bookings.csv"))
    assert [line["staff_notes"] for line in tables] == [f"'{text}" for text in FORMULAS]
    flat = lines(export(user_id, "csv"))
    notes = [line["value"] for line in flat if line["field"] == "staff_notes"]
    assert notes[1:] == [f"'{text}" for text in FORMULAS]
    cells = [cell for line in flat for cell in line.values()]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_words_of_a_person_are_text_on_the_page_and_not_markup(service: Service) -> None:
    user_id = service.user("jane@example.com", full_name="<script>alert(1)</script>&amp;")
    page = zipfile.ZipFile(io.BytesIO(export(user_id, "zip"))).read("index.html").decode()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in page


@given(words=st.text(), reply=st.text())
@example(words='"a";b,\n\r\n', reply="\x00")
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_comes_out_as_it_went_in(sqlite_service: Service, words: str, reply: str) -> None:
    now = datetime.now(UTC)
    user = User(created_at=now)
    with session_scope() as session:
        session.add(user)
        session.flush()
        session.add(people.feedback(user.id, now, comment=words, staff_response=reply))
    (row,) = json.loads(export(user.id))["data"]["feedback"]
    assert (row["comment"], row["staff_response"]) == (words, reply)
    archive = zipfile.ZipFile(io.BytesIO(export(user.id, "zip")))
    (line,) = lines(archive.read("tables/feedback.csv"))
    for cell, text in ((line["comment"], words), (line["staff_response"], reply)):
        assert cell.removeprefix("'") == text.removeprefix("'")


def peak_of_export(service: Service, rows: int, format_: ExportFormat) -> tuple[int, int]:
    """Export a person with so many rows; return the most memory in use, and the size."""
    user_id = service.user(f"jane{rows}@example.com")
    row = {"user_id": user_id, "rating": 5, "submitted_at": datetime.now(UTC)}
    with session_scope() as session:
        session.execute(insert(Feedback), [row] * rows)
        chunks = get_compliance_service().export(session, ADMINISTRATOR, user_id, format_)
    tracemalloc.start()
    size = sum(len(chunk) for chunk in chunks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, size


def test_memory_does_not_grow_with_the_rows_of_a_person(service: Service) -> None:
    small, _ = peak_of_export(service, 2_000, ExportFormat.JSON)
    large, size = peak_of_export(service, 20_000, ExportFormat.JSON)
    assert size > 3_000_000
    assert large < 1.5 * small


def test_memory_does_not_grow_with_the_rows_in_a_zip_either(sqlite_service: Service) -> None:
    small, _ = peak_of_export(sqlite_service, 500, ExportFormat.ZIP)
    large, _ = peak_of_export(sqlite_service, 2_000, ExportFormat.ZIP)
    assert large < 1.5 * small
