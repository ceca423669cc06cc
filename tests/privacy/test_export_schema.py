"""The published schema: real exports follow it, and nothing else does."""

import copy
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Column, LargeBinary, MetaData, Numeric, Table

from backend.models import DATA_MAP
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import Retention, not_personal, personal, subject_table
from backend.privacy.export_schema import SCHEMA_ID, schema
from backend.privacy.mapped_tables import DataMapError
from backend.services.subject_service import Who
from tests.conftest import Service
from tests.privacy.people import plant
from tests.privacy.reading_back import export

jsonschema = pytest.importorskip(
    "jsonschema", reason="jsonschema is not installed: see requirements-dev.txt"
)
Document = dict[str, Any]


def validator() -> Any:
    published = json.loads(json.dumps(schema(DATA_MAP)))
    jsonschema.Draft202012Validator.check_schema(published)
    formats = jsonschema.FormatChecker(["date", "uuid"])

    @formats.checks("date-time", ValueError)  # type: ignore[untyped-decorator] # It has no types.
    def _is_moment(value: object) -> bool:
        return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None

    return jsonschema.Draft202012Validator(published, format_checker=formats)


def breaches(document: Any) -> list[str]:
    return [error.json_path for error in validator().iter_errors(document)]


def test_exports_of_everybody_follow_the_schema(service: Service) -> None:
    guest = plant("A")
    named = next(m.text for m in guest.marks if (m.table, m.column) == ("companions", "email"))
    for who in (guest.id, 1, service.user("jane@example.com"), Who(email=named)):
        document = json.loads(export(who))
        assert breaches(document) == []
    assert SCHEMA_ID == "urn:holdfast-export:1"


def put(*path: str | int, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        part: Any = document
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value

    return change


def leave_out(*path: str | int) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        part: Any = document
        for step in path[:-1]:
            part = part[step]
        del part[path[-1]]

    return change


CHANGES = {
    "another format": put("format", value="another"),
    "another version": put("version", value=2),
    "a member more": put("more", value=1),
    "a member less": leave_out("consents"),
    "a table more": put("data", "audit_events", value=[]),
    "a table less": leave_out("data", "payments"),
    "a table that is no list": put("data", "payments", value={}),
    "two people": lambda document: document["data"]["users"].append(document["data"]["users"][0]),
    "a hash": put("data", "users", 0, "password_hash", value="x"),
    "a column less": leave_out("data", "users", 0, "email"),
    "a number as text": put("data", "bookings", 0, "adults", value="2"),
    "a truth as a number": put("data", "users", 0, "is_active", value=1),
    "a role of nobody": put("data", "users", 0, "role", value="owner"),
    "nothing where something must be": put("data", "bookings", 0, "check_in", value=None),
    "no date": put("data", "bookings", 0, "check_in", value="2026-02-30"),
    "no moment": put("data", "users", 0, "created_at", value="2026-02-03T04:05:06"),
    "no uuid": put("data", "users", 0, "uid", value="7"),
    "a subject by name": put("subject", "user_id", value="7"),
    "a count below nothing": put("counts", "users", value=-1),
    "a count less": leave_out("counts", "users"),
    "a consent of neither kind": put("consents", "history", 0, "granted", value=None),
    "a request of no time": put("requests", 0, "at", value="yesterday"),
    "a right without its article": leave_out("notice", "rights", 0, "article"),
    "a right to another table": put("notice", "rights", 0, "tables", value=["audit_events"]),
    "a purpose that is missing": leave_out("notice", "tables", "users", "purpose"),
    "a notice of another table": put("notice", "tables", "audit_events", value={}),
    "a redaction of no column": put("redactions", 0, "columns", value=[]),
    "a redaction of another table": put("redactions", 0, "table", value="users"),
}


def test_a_changed_export_does_not_follow_the_schema(sqlite_service: Service) -> None:
    document = json.loads(export(plant("A").id))
    check = validator()
    assert check.is_valid(document)
    for name, change in CHANGES.items():
        changed = copy.deepcopy(document)
        change(changed)
        assert not check.is_valid(changed), name


def test_amounts_are_text_and_a_column_that_json_cannot_hold_is_refused() -> None:
    def map_with(kind: Any) -> DataMap:
        about = subject_table(
            purpose="p", basis="b", source="s", retention=Retention("user", "seen_at")
        )
        metadata = MetaData()
        users = DATA_MAP.subject.table
        Table(
            "users", metadata,
            Column("id", users.c.id.type, primary_key=True, info=not_personal("number")),
            Column("uid", users.c.uid.type, info=personal("user.unique_id")),
            Column("seen_at", users.c.created_at.type, info=personal("user.behavior")),
            Column("anonymized_at", users.c.anonymized_at.type, info=not_personal("when")),
            Column("thing", kind, info=personal("user.content")),
            info=about,
        )  # fmt: skip
        return DataMap.of(metadata)

    row = schema(map_with(Numeric(10, 2)))["properties"]["data"]["properties"]["users"]["items"]
    assert row["properties"]["thing"]["type"] == ["string", "null"]
    with pytest.raises(DataMapError, match=r"users\.thing"):
        schema(map_with(LargeBinary()))


def test_the_schema_is_the_same_each_time_and_names_every_exported_column() -> None:
    published = schema(DATA_MAP)
    assert published == schema(DATA_MAP)
    rows = published["properties"]["data"]["properties"]
    assert set(rows["users"]["items"]["properties"]) == {
        str(column.name) for column in DATA_MAP["users"].table.columns
    } - {
        "password_hash", "email_index", "phone_index", "tokens_valid_after", "totp_secret",
        "totp_step",
    }  # fmt: skip
    roles = {"enum": ["user", "auditor", "operator", "admin"]}
    assert rows["users"]["items"]["properties"]["role"] == roles
