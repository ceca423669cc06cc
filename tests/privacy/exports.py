"""Exports as documents, and their way back, for the tests of import."""

import json
from typing import Any

import httpx2 as httpx
from fastapi.testclient import TestClient

from backend.db_utils import session_scope
from backend.privacy.declarations import EraseMode
from backend.privacy.export import ExportFormat
from backend.privacy.import_plan import Imported
from backend.services.compliance_service import get_compliance_service
from tests.privacy import people
from tests.privacy.people import ADMINISTRATOR, Dump, dump

Document = dict[str, Any]


def export(user_id: int) -> Document:
    with session_scope() as session:
        chunks = get_compliance_service().export(session, ADMINISTRATOR, user_id, ExportFormat.JSON)
    document: Document = json.loads(b"".join(chunks))
    return document


def erase(user_id: int, mode: EraseMode = EraseMode.DELETE) -> None:
    with session_scope() as session:
        get_compliance_service().erase(
            session, ADMINISTRATOR, user_id, mode, reason="request", dry_run=False
        )


def take_back(document: Document, *, dry_run: bool = False) -> dict[str, Imported]:
    with session_scope() as session:
        _user_id, tables = get_compliance_service().import_(
            session, ADMINISTRATOR, document, None, dry_run=dry_run
        )
    return tables


def import_(
    client: TestClient, headers: dict[str, str], document: Document, **fields: Any
) -> httpx.Response:
    # Escaped, so that every text of Python can be sent.
    body = json.dumps({"export": document, **fields})
    headers = {"Content-Type": "application/json", **headers}
    return client.post("/security/data/import", content=body, headers=headers)


def contents() -> Dump:
    """All rows but the trail, which tells of dry runs too."""
    return people.without(dump(), {}, "audit_events")


def counts(answer: httpx.Response) -> dict[str, tuple[int, int, int]]:
    assert answer.status_code == 200, answer.text
    return {
        table: (done["restored"], done["unchanged"], done["skipped"])
        for table, done in answer.json()["tables"].items()
    }
