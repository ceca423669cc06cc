"""Export: everything that is held about one person and nothing else, the same in every format."""

import io
import json
import tracemalloc
import zipfile
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, update

from backend.crypto.files import KeyringLock, Lock, Opener, PassphraseLock
from backend.crypto.keyring import Keyring, RootKey, parse_key
from backend.db_utils import session_scope
from backend.errors import (
    RefusedError,
    SubjectErasedError,
    SubjectNotFoundError,
    TamperedError,
    UnknownKeyError,
)
from backend.models import AuditEvent, Feedback, User
from backend.privacy.export import ExportFormat
from backend.services import compliance_service
from backend.services.compliance_service import get_compliance_service
from backend.services.encryption_service import get_encryption_service
from tests.conftest import OTHER_KEY, Service, SignIn
from tests.privacy.people import ADMINISTRATOR, Mark, dump, keys_of, plant
from tests.privacy.reading_back import export, members, tables_of_csv, tables_of_zip

FORMATS = pytest.mark.parametrize("format_", list(ExportFormat))
# Hashes and search terms are no answer to a person.
NEVER = {
    "password_hash", "email_index", "phone_index", "tokens_valid_after", "totp_secret", "totp_step",
    "token_digest",
}  # fmt: skip
# What a guest's rows say of somebody else.
OTHERS = {
    ("companions", "full_name"),
    ("companions", "email"),
    ("companions", "phone"),
    ("billing_addresses", "contact_name"),
    ("billing_addresses", "email"),
}
PASSPHRASE = "of the person alone"


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
    data = document["data"]
    assert expected == {
        (table, str(row["id"]), column)
        for table, rows in data.items()
        for row in rows
        for column in row
    }
    archive = members(answers["zip"].content)
    assert set(archive) == {"index.html", "export.json"} | {f"tables/{t}.csv" for t in mine}
    assert json.loads(archive["export.json"])["data"] == data
    assert tables_of_zip(answers["zip"].content) == data
    assert tables_of_csv(answers["csv"].content) == {t: rows for t, rows in data.items() if rows}
    assert document["counts"] == {table: len(keys) for table, keys in mine.items()}
    assert document["subject"] == {"user_id": person.id}
    shown = {mark.text for mark in person.marks if is_shown(mark)}
    never = {mark.text for mark in person.marks if not is_shown(mark)}
    terms = {raw["users"][person.id,][name] for name in ("email_index", "phone_index")}
    texts = {name: content.decode() for name, content in archive.items()}
    texts |= {"json": answers["json"].text, "csv": answers["csv"].text}
    for text in texts.values():
        assert not [secret for secret in never | terms if secret in text]
        assert "B01" not in text
        assert "enc1." not in text
    # The page, too, is the whole answer.
    for whole in ("index.html", "json", "csv"):
        assert not [text for text in shown if text not in texts[whole]]


def is_shown(mark: Mark) -> bool:
    return mark.column not in NEVER and (mark.table, mark.column) not in OTHERS


def document_key(key: Any) -> str:
    """Spell a row's key as the export does; SQLite stores UUIDs without dashes."""
    text = str(key)
    if len(text) == 32:
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    return text


def test_consents_and_requests_are_in_the_export(
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
    assert [(one["action"], one["outcome"]) for one in document["requests"]] == [("export", "done")]
    moment = datetime.fromisoformat(document["generated_at"])
    assert moment.utcoffset() == datetime.now(UTC).utcoffset()
    assert document["generated_at"].endswith("Z")


def test_a_person_of_whom_nothing_but_the_account_is_held_gets_that(service: Service) -> None:
    user_id = service.user("jane@example.com")
    data = json.loads(export(user_id))["data"]
    assert [table for table, rows in data.items() if rows] == ["users"]
    (row,) = data["users"]
    assert (row["id"], row["email"], row["phone"]) == (user_id, "jane@example.com", None)
    assert tables_of_csv(export(user_id, "csv")) == {"users": [row]}
    assert tables_of_zip(export(user_id, "zip")) == data


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


@FORMATS
def test_a_download_ends_with_an_error_when_the_person_is_erased_meanwhile(
    service: Service, monkeypatch: pytest.MonkeyPatch, format_: ExportFormat
) -> None:
    monkeypatch.setattr(compliance_service, "_STILL_THERE_SECONDS", 0)
    user_id = service.user("jane@example.com")
    row = {"user_id": user_id, "rating": 5, "submitted_at": datetime.now(UTC)}
    with session_scope() as session:
        # More than one chunk of any format.
        session.execute(insert(Feedback), [row] * 1_500)
        chunks = get_compliance_service().export(session, ADMINISTRATOR, user_id, format_)
    next(chunks)
    with session_scope() as session:
        erased = update(User).where(User.id == user_id).values(anonymized_at=datetime.now(UTC))
        session.execute(erased)
    with pytest.raises(SubjectErasedError):
        for _ in chunks:
            pass


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
