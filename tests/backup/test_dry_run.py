"""A dry run says what the restore then does, and a restore that would empty tables asks first."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Final
from uuid import UUID

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from backend.db_utils import session_scope
from backend.models import Feedback
from backend.privacy.declarations import EraseMode
from backend.privacy.periods import Period
from backend.services.audit_service import COMMAND_LINE
from backend.services.policy_service import get_policy_service
from backend.services.restore_service import EmptyingError
from backend.settings import RetentionAction
from tests.backup.promises import OF_PEOPLE, back_up, consent, erase, nothing_is_due, restore
from tests.conftest import Run, Service
from tests.privacy.people import (
    booking,
    companion,
    dump,
    feedback,
    payment,
    person_hold,
    plant,
    retire,
    without,
)

Headers = dict[str, str]
# What no engine does otherwise is shown on the one that is faster.
SQLITE = pytest.mark.parametrize("service", ["sqlite"], indirect=True)
# Tables whose rows no other row needs.
LEAVES: Final = ("companions", "feedback", "invoice_lines", "payments", "data_consents")


def _retire_answers_of_a_month() -> None:
    with session_scope() as session:
        get_policy_service().set(
            session, COMMAND_LINE, "feedback", Period.parse("P30D"), RetentionAction.DELETE,
            enabled=True,
        )  # fmt: skip
    retire()


def _change_at_random(service: Service, chance: Random, people: list[int]) -> None:
    """Delete about half of the rows that may go, and add as many new ones."""
    now = datetime.now(UTC)
    with session_scope() as session:
        for table in LEAVES:
            # Spelled as the database has it: an id of SQLite's is text.
            rows = session.execute(text(f"SELECT id FROM {table}")).scalars().all()  # noqa: S608 - names above
            for key in chance.sample(rows, len(rows) // 2):
                session.execute(text(f"DELETE FROM {table} WHERE id = :id"), {"id": key})  # noqa: S608 - the same
    for _ in range(chance.randrange(4, 9)):
        person = chance.choice(people)
        stay = booking(person, date(2026, 1, 2))
        service.add(stay, feedback(person, now), payment(person, now))
        service.add(*(companion(stay.id) for _ in range(chance.randrange(3))))
        consent(person, granted=chance.random() > 0.5)


def _files(service: Service) -> dict[Path, int]:
    found = (p for p in service.folder.rglob("*") if not p.name.startswith("holdfast.db"))
    return {path: path.stat().st_size for path in found}


def test_a_dry_run_says_what_a_restore_then_does_and_changes_nothing(
    client: TestClient, service: Service, admin: Headers
) -> None:
    jane, joe, eve, tom = (plant(letter) for letter in "ABCD")
    consent(joe.id, granted=True)
    backup_id = client.post("/security/backup/create", headers=admin).json()["id"]
    erase(jane.id)
    erase(tom.id, EraseMode.ANONYMIZE)
    service.add(person_hold(eve.id))
    _change_at_random(service, Random(service.engine), [joe.id, eve.id])  # noqa: S311 - no secret
    consent(joe.id, granted=False)
    _retire_answers_of_a_month()
    before, files = dump(), _files(service)
    body: dict[str, Any] = {"backup_id": backup_id, "dry_run": True}
    tried = client.post("/security/backup/restore", json=body, headers=admin)
    assert tried.status_code == 200, tried.text
    assert (tried.json()["status"], tried.json()["previous"]) == ("planned", None)
    assert without(dump(), {}, "audit_events") == without(before, {}, "audit_events")
    assert len(dump()["audit_events"]) == len(before["audit_events"]) + 1
    assert _files(service) == files
    body = {"backup_id": backup_id, "confirm": True}
    done = client.post("/security/backup/restore", json=body, headers=admin).json()
    assert done["previous"]
    after = dump()
    for said in (tried.json(), done):
        assert said["tables"] == {
            table: {
                "live": len(before[table]),
                "restored": len(after[table]),
                "lost": len(before[table].keys() - after[table].keys()),
                "regained": len(after[table].keys() - before[table].keys()),
            }
            for table in OF_PEOPLE
        }
        assert said["migrations"] == []
    assert done["reapplied"] == tried.json()["reapplied"]
    assert done["reapplied"]["erasures"] == 2
    assert all(done["reapplied"].values()), "each kind of promise was there to be kept"
    payments = done["tables"]["payments"]
    assert payments["lost"] > 0 < payments["regained"]


def test_a_dry_run_leaves_the_store_as_it_is(sqlite_service: Service) -> None:
    backup_id = back_up()
    erase(plant("A").id)
    (entry,) = (sqlite_service.folder / "backups").glob("ledger-*")
    entry.unlink()
    files = _files(sqlite_service)
    restore(backup_id, dry_run=True)
    assert _files(sqlite_service) == files


def _fill_after_an_empty_backup(service: Service) -> UUID:
    backup_id = back_up()
    service.add(feedback(None, datetime.now(UTC)))
    return backup_id


@SQLITE
def test_an_empty_backup_over_a_full_database_asks_first(
    client: TestClient, service: Service, admin: Headers
) -> None:
    backup_id = str(_fill_after_an_empty_backup(service))
    before = dump()
    body: dict[str, Any] = {"backup_id": backup_id, "confirm": True}
    refused = client.post("/security/backup/restore", json=body, headers=admin)
    assert (refused.status_code, refused.json()["code"]) == (409, "would_empty")
    assert refused.json()["tables"] == ["feedback"]
    assert without(dump(), {}, "audit_events") == without(before, {}, "audit_events")
    (told,) = (row for row in dump()["audit_events"].values() if row["action"] == "restore")
    assert told["outcome"] == "would_empty"
    body |= {"confirm_empty": True}
    done = client.post("/security/backup/restore", json=body, headers=admin)
    assert (done.status_code, dump()["feedback"]) == (200, {})


def test_over_the_command_line_it_asks_first_too(run: Run, sqlite_service: Service) -> None:
    backup_id = _fill_after_an_empty_backup(sqlite_service)
    refused = run("backup", "restore", str(backup_id), "--confirm")
    assert (refused.code, refused.out) == (2, "")
    assert "feedback" in refused.err
    assert len(dump()["feedback"]) == 1
    done = run("backup", "restore", str(backup_id), "--confirm", "--confirm-empty")
    assert (done.code, dump()["feedback"]) == (0, {})


@SQLITE
def test_a_dry_run_says_that_the_restore_would_ask_first(
    client: TestClient, service: Service, admin: Headers, run: Run
) -> None:
    backup_id = str(_fill_after_an_empty_backup(service))
    assert restore(UUID(backup_id), dry_run=True).emptied == ["feedback"]
    body = {"backup_id": backup_id, "dry_run": True}
    answer = client.post("/security/backup/restore", json=body, headers=admin)
    assert answer.json()["emptied"] == ["feedback"]


def test_what_retention_takes_from_a_backup_needs_no_word(sqlite_service: Service) -> None:
    now = datetime.now(UTC)
    sqlite_service.add(*(feedback(None, now - timedelta(days=40)) for _ in range(3)))
    backup_id = back_up()
    _retire_answers_of_a_month()
    sqlite_service.add(Feedback(rating=1, submitted_at=now))
    restored = restore(backup_id)
    assert (restored.emptied, restored.reapplied.retention, dump()["feedback"]) == ([], 3, {})


def test_what_an_erasure_takes_from_a_backup_needs_no_word(
    sqlite_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_due(monkeypatch)
    jane = plant("A")
    backup_id = back_up()
    erase(jane.id)
    sqlite_service.add(feedback(None, datetime.now(UTC)))
    restored = restore(backup_id)
    assert (restored.emptied, restored.reapplied.erasures, dump()["feedback"]) == ([], 1, {})


def test_the_service_itself_asks_first(sqlite_service: Service) -> None:
    backup_id = _fill_after_an_empty_backup(sqlite_service)
    with pytest.raises(EmptyingError, match="feedback") as refused:
        restore(backup_id)
    assert refused.value.extra == {"tables": ["feedback"]}
    assert not list(sqlite_service.folder.glob(".holdfast-scratch-*"))
