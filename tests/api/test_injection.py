"""Text is a value wherever it goes, on each engine: never SQL."""

from typing import Final

from fastapi.testclient import TestClient
from sqlalchemy import inspect, select

from backend.db_utils import get_engine, session_scope
from backend.models import LegalHold, Role, User
from tests.api.sweeps import Headers, Place, swept
from tests.conftest import PASSWORD, Service

__all__ = ["swept"]

JANE: Final = "jane@example.com"
FORM: Final = {"Content-Type": "application/x-www-form-urlencoded"}
# Each would be seen in what is answered, in what is left, or by how the server fails.
SQL: Final = (
    "' OR '1'='1' OR 'a'='",
    "'; DROP TABLE users;--",
    "' UNION SELECT 1, 2 --",
    '"; DELETE FROM users;-',
    "\\'; SELECT 1 FROM x; --",
    "%' ESCAPE '\\' %s {0} :n",
)


def roles() -> dict[int, Role]:
    with session_scope(read_only=True) as session:
        return {user.id: user.role for user in session.scalars(select(User))}


def test_sql_in_any_place_is_answered_like_any_other_text(
    client: TestClient, service: Service, admin: Headers, swept: list[Place]
) -> None:
    service.user(JANE)
    tables, people = inspect(get_engine()).get_table_names(), roles()
    flaws = []
    for place in swept:
        lengths = {len(text) for text in SQL}
        plain = {length: place.send(client, "q" * length, admin).status_code for length in lengths}
        for text in SQL:
            answer = place.send(client, text, admin)
            if answer.status_code != plain[len(text)] or answer.status_code >= 500:
                flaws.append(f"{place}: {text}: {answer.status_code}, not {plain[len(text)]}")
            if answer.status_code == 422 and text in answer.text:
                flaws.append(f"{place}: repeats {text}")
            if "argon2" in answer.text or "syntax" in answer.text:
                flaws.append(f"{place}: {answer.text[:200]}")
    assert flaws == []
    assert sorted(inspect(get_engine()).get_table_names()) == sorted(tables)
    assert roles() == people


def test_text_that_looks_like_sql_is_kept_as_it_is(
    client: TestClient, service: Service, admin: Headers
) -> None:
    for text in SQL:
        hold = {"scope": "data_type", "data_type": "invoice", "reason": text}
        placed = client.post("/security/holds", json=hold, headers=admin)
        assert placed.json()["reason"] == text
        found = client.get(f"/security/holds/{placed.json()['id']}", headers=admin)
        assert found.json()["reason"] == text
    with session_scope(read_only=True) as session:
        assert len(session.scalars(select(LegalHold)).all()) == len(SQL)
    made = client.post("/security/backup/create", json={"label": SQL[1]}, headers=admin)
    assert made.json()["label"] == SQL[1]


def test_sql_in_the_sign_in_form_signs_nobody_in(client: TestClient, service: Service) -> None:
    service.user(JANE)
    for text in SQL:
        for fields in ((text, PASSWORD), (JANE, text), (f"{JANE}{text}", PASSWORD)):
            form = dict(zip(("username", "password"), fields, strict=True))
            assert client.post("/auth/token", data=form).status_code in {401, 429}, text
    assert set(roles()) == {1, 2}
