"""What is no whole export is refused, whole, and without a word of what was sent."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from backend.privacy.import_documents import parse
from backend.privacy.import_values import ImportRefusedError
from tests.conftest import Service
from tests.privacy.exports import Document, erase, export, import_
from tests.privacy.people import dump, plant

CANARY = "canary"


Change = Callable[[Document], object]


def booking(column: str, value: Any) -> Change:
    return lambda document: document["data"]["bookings"][0].update({column: value})


def user(column: str, value: Any) -> Change:
    return lambda document: document["data"]["users"][0].update({column: value})


def redacted(**change: Any) -> Change:
    """Change the redaction of a companion of the person's."""
    return lambda document: next(
        one for one in document["redactions"] if one["table"] == "companions"
    ).update(change)


BROKEN: dict[str, Change] = {
    "another format": lambda d: d.update(format="other"),
    "a later version": lambda d: d.update(version=2),
    "no subject": lambda d: d.pop("subject"),
    "no data": lambda d: d.pop("data"),
    "a member too many": lambda d: d.update(canary=[]),
    "a day of a week": booking("check_in", "2026-W06-1"),
    "a uuid in capitals": lambda d: d["data"]["users"][0].update(
        uid=d["data"]["users"][0]["uid"].upper().replace("-", "")
    ),
    "a list for data": lambda d: d.update(data=[]),
    "an unknown table": lambda d: d["data"].update(secrets=[]),
    "a table of the service": lambda d: d["data"].update(audit_events=[]),
    "rows that are none": lambda d: d["data"].update(bookings=["row"]),
    "a column too many": user("password_hash", "$argon2id$"),
    "a column too few": lambda d: d["data"]["users"][0].pop("phone"),
    "null where a value must be": booking("hotel", None),
    "a number as text": booking("adults", "2"),
    "a truth value as a number": booking("adults", True),
    "no such day": booking("check_in", "2026-02-30"),
    "a time without a zone": booking("created_at", "2026-02-03T01:02:03"),
    "no uuid": user("uid", "x"),
    "no such role": user("role", "owner"),
    "a truth value for a version": lambda d: d.update(version=True),
    "another's number": lambda d: d["subject"].update(user_id=True),
    "a text for a number": lambda d: d["subject"].update(user_id=CANARY),
    "a list for a number": lambda d: d["subject"].update(user_id=[CANARY]),
    "an anonymous row": user("anonymized_at", "2026-02-03T01:02:03Z"),
    "a row twice": lambda d: d["data"]["feedback"].append(d["data"]["feedback"][0]),
    "two rows with one key": lambda d: d["data"]["feedback"][1].update(
        id=d["data"]["feedback"][0]["id"]
    ),
    "a wrong value in a row that another has": lambda d: d["data"]["payments"][0].update(method=1),
    "lists in lists": booking("staff_notes", json.loads("[" * 200 + "]" * 200)),
    "no list of redactions": lambda d: d.update(redactions=CANARY),
    "a redaction of nothing": lambda d: d["redactions"].append(CANARY),
    "a redaction of no table": redacted(table=CANARY),
    "a redaction of no row": redacted(row={"id": 2**30}),
    "a redaction of a row by another column": redacted(row={"booking_id": 1}),
    "a redaction of no column": redacted(columns=[CANARY]),
    "a redaction of no columns": redacted(columns=[]),
    "a redaction of a list": redacted(columns=[["email"]]),
    "a redaction of what is never redacted": redacted(columns=["booking_id"]),
    "a redaction of the person's own row": lambda d: d["redactions"].append(
        {"table": "users", "row": {"id": d["subject"]["user_id"]}, "columns": ["email"]}
    ),
    "a redaction twice": lambda d: d["redactions"].append(d["redactions"][0]),
    "a redacted cell that is there": lambda d: d["data"]["companions"][0].update(email=CANARY),
}
# The types are right, but no row of ours can hold them.
IMPOSSIBLE: dict[str, Change] = {
    "a number that no column holds": booking("adults", 2**63),
    "a row number that no column holds": booking("id", 2**40),
    "half a character": user("full_name", "\ud800"),
    "a text that is too long": booking("country", "x" * 400),
    "a text that ends a string in C": booking("hotel", "a\x00b"),
    "a time before time": booking("created_at", "0001-01-01T00:00:00+14:00"),
}


def statuses(
    client: TestClient, headers: dict[str, str], changes: dict[str, Change]
) -> dict[str, int]:
    """Import a whole export with each of *changes*; none may leave a trace."""
    person = plant("A")
    document = export(person.id)
    erase(person.id)
    before, found = dump(), {}
    for name, change in changes.items():
        broken = copy.deepcopy(document)
        change(broken)
        answer = import_(client, headers, broken)
        assert CANARY not in answer.text, name
        found[name] = answer.status_code
    assert dump() == before
    assert import_(client, headers, document).status_code == 200
    return found


def test_what_is_no_whole_export_is_refused_and_nothing_changes(
    client: TestClient, admin: dict[str, str]
) -> None:
    assert statuses(client, admin, BROKEN) == dict.fromkeys(BROKEN, 422)


def test_values_that_no_row_can_hold_are_refused_and_nothing_changes(
    client: TestClient, admin: dict[str, str]
) -> None:
    assert statuses(client, admin, IMPOSSIBLE) == dict.fromkeys(IMPOSSIBLE, 422)


def test_a_value_that_breaks_a_rule_of_the_database_is_a_conflict(
    client: TestClient, admin: dict[str, str]
) -> None:
    changes: dict[str, Change] = {
        "a stay that ends before it begins": booking("check_out", "2001-01-01"),
        "a rating of six": lambda d: d["data"]["feedback"][0].update(rating=6),
    }
    assert statuses(client, admin, changes) == dict.fromkeys(changes, 409)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"canary",
        b"\xff\xfe canary",
        b'{"a": 1, "a": 1}',
        b'{"data": {"users": [{"canary": 1, "canary": 2}]}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": %s}' % (b"1" * 5_000),
        b'{"a": %s}' % (b"[" * 100_000),
    ],
    ids=["nothing", "a list", "no JSON", "no UTF-8", "a name twice", "a name twice deep inside",
         "no number", "infinity", "a number without end", "lists without end"],
)  # fmt: skip
def test_a_text_that_readers_take_in_two_ways_is_refused(text: bytes) -> None:
    with pytest.raises(ImportRefusedError) as caught:
        parse(text)
    assert "canary" not in caught.value.detail


def test_the_text_of_an_export_is_read_as_it_is(sqlite_service: Service) -> None:
    document = export(sqlite_service.user("jane@example.com"))
    assert parse(json.dumps(document).encode()) == document
