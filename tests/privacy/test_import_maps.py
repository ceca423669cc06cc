"""Import by any data map: circles, links to later rows, composite keys, price lists."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import orjson
import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, String, Table, Uuid, delete, select
from sqlalchemy import update as sql_update
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.models.base import UtcDateTime
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import (
    OnErase,
    Retention,
    not_personal,
    owned_table,
    personal,
    reference_table,
    subject_table,
)
from backend.privacy.export import FORMAT_NAME, FORMAT_VERSION
from backend.privacy.import_plan import Imported
from backend.privacy.imports import import_rows
from backend.privacy.reading import Reader
from backend.privacy.walk import Subjects
from tests.conftest import Service

Document = dict[str, Any]
JANE, JOE = 1, 101
SAID: dict[str, Any] = {"purpose": "p", "basis": "b", "source": "s"}

metadata = MetaData()


def _id() -> Column[int]:
    return Column("id", Integer, primary_key=True, info=not_personal("row number"))


def _mark() -> Column[Any]:
    return Column("anonymized_at", UtcDateTime, info=not_personal("when"))


def _link(name: str, to: str, **options: Any) -> Column[Any]:
    info = personal("user.unique_id") if options.get("nullable", True) else not_personal("whose")
    return Column(name, ForeignKey(f"{to}.id"), info=info, **options)


Table(
    "members", metadata, _id(), _mark(),
    Column("uid", Uuid, unique=True, info=personal("user.unique_id", OnErase.RANDOM)),
    Column("seen_at", UtcDateTime, info=personal("user.behavior")),
    info=subject_table(**SAID, retention=Retention("member", "seen_at")),
)  # fmt: skip
Table("prices", metadata, _id(), info=reference_table("what things cost"))
# A post is its member's, or an answer to a post of theirs; a note hangs from it and may be pinned.
Table(
    "posts", metadata, _id(), _mark(), _link("member_id", "members"), _link("answers", "posts"),
    _link("pinned_id", "notes"), _link("price_id", "prices"),
    Column("words", String(20), info=personal("user.content")),
    info=owned_table(by=("member_id", "answers"), **SAID),
)  # fmt: skip
Table(
    "notes", metadata, _id(), _mark(), _link("post_id", "posts", nullable=False),
    info=owned_table(by="post_id", **SAID),
)  # fmt: skip
# Teams have tasks, and a task may have a team of its own: a circle of two tables.
Table(
    "teams", metadata, _id(), _mark(), _link("member_id", "members"), _link("task_id", "tasks"),
    info=owned_table(by=("member_id", "task_id"), **SAID),
)  # fmt: skip
Table(
    "tasks", metadata, _id(), _mark(), _link("team_id", "teams", nullable=False),
    info=owned_table(by="team_id", **SAID),
)  # fmt: skip
Table(
    "tags", metadata, _mark(),
    Column("post_id", ForeignKey("posts.id"), primary_key=True, info=not_personal("which post")),
    Column("label", String(20), primary_key=True, info=not_personal("a word of the house")),
    info=owned_table(by="post_id", **SAID),
)  # fmt: skip
DATA_MAP = DataMap.of(metadata)


def _rows(at: int, member_id: int) -> dict[str, list[dict[str, Any]]]:
    return {
        "members": [{"id": member_id, "uid": uuid4(), "seen_at": datetime(2026, 1, 2, tzinfo=UTC)}],
        "posts": [
            # The first answers a later one, which answers the last.
            {"id": at + 2, "answers": at + 3, "words": "first"},
            {"id": at + 3, "answers": at + 9, "words": "second", "price_id": 1},
            {"id": at + 9, "member_id": member_id, "pinned_id": at + 5},
        ],
        "notes": [{"id": at + 5, "post_id": at + 9}],
        "teams": [
            {"id": at + 1, "task_id": at + 8},
            {"id": at + 2, "task_id": at + 7},
            {"id": at + 3, "member_id": member_id},
        ],
        "tasks": [
            {"id": at + 7, "team_id": at + 3},
            {"id": at + 8, "team_id": at + 2},
        ],
        "tags": [{"post_id": at + 9, "label": label} for label in ("old", "new")],
    }


@pytest.fixture
def session(service: Service) -> Iterator[Session]:
    """The tables with Jane's rows and Joe's; all of it is rolled back."""
    assert service
    with session_scope(read_only=True) as session:
        metadata.create_all(session.connection())
        session.execute(DATA_MAP["prices"].table.insert(), [{"id": 1}])
        for rows in (_rows(0, JANE), _rows(100, JOE)):
            _insert(session, rows)
        yield session


def _insert(session: Session, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Insert rows, and set their links when all are there."""
    later = []
    for name in ("members", "posts", "notes", "teams", "tasks", "tags"):
        table = DATA_MAP[name].table
        for row in rows[name]:
            links = {
                n: v for n, v in row.items() if table.c[n].foreign_keys and table.c[n].nullable
            }
            session.execute(table.insert(), [{n: v for n, v in row.items() if n not in links}])
            later.append((table, row, links))
    for table, row, links in later:
        if links:
            session.execute(sql_update(table).where(table.c.id == row["id"]).values(links))


def _document(session: Session, member_id: int) -> Document:
    subjects = Subjects(DATA_MAP.subject.key == member_id)
    data = {
        mapped.name: [one.row for one in Reader(session, DATA_MAP, subjects).rows(mapped)]
        for mapped in DATA_MAP.of_people
    }
    head = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "subject": {"user_id": member_id}}
    document: Document = orjson.loads(orjson.dumps(head | {"data": data}))
    return document


def _lose(session: Session, *tables: str) -> None:
    """Delete Jane's rows, of all *tables* or of all there are."""
    for mapped in DATA_MAP.of_people:
        table = mapped.table
        for column in table.columns:
            if column.foreign_keys and column.nullable:
                session.execute(
                    sql_update(table).where(mapped.keys[0] < 100).values({column: None})
                )
    for mapped in DATA_MAP.children_first:
        if not tables or mapped.name in tables:
            session.execute(delete(mapped.table).where(mapped.keys[0] < 100))


def _take_back(session: Session, document: Document, **options: Any) -> dict[str, Imported]:
    def never(_exported: Any, _present: Any) -> bool:
        return False

    return import_rows(session, DATA_MAP, document, came_back=never, **options).tables


def test_all_that_leads_to_the_person_comes_back_through_circles_and_later_rows(
    session: Session,
) -> None:
    document = _document(session, JANE)
    _lose(session)
    of_joe = _document(session, JOE)
    planned = _take_back(session, document, dry_run=True)
    assert (
        session.scalar(select(DATA_MAP["members"].key).where(DATA_MAP["members"].key < 100)) is None
    )
    done = _take_back(session, document)
    assert done == planned
    assert {name: one.restored for name, one in done.items()} == {
        "members": 1, "posts": 3, "notes": 1, "teams": 3, "tasks": 2, "tags": 2
    }  # fmt: skip
    again = _document(session, JANE)
    assert again["data"]["members"][0].pop("uid") != document["data"]["members"][0].pop("uid")
    assert again["data"] == document["data"]
    assert _document(session, JOE) == of_joe


def test_of_a_circle_come_back_the_rows_that_are_missing(session: Session) -> None:
    document = _document(session, JANE)
    table = DATA_MAP["posts"].table
    session.execute(sql_update(table).where(table.c.id == 2).values(answers=None))
    session.execute(delete(table).where(table.c.id == 2))
    done = _take_back(session, document)
    assert done["posts"] == Imported(restored=1, unchanged=2)
    assert _document(session, JANE)["data"] == document["data"]
    assert {one.restored for one in _take_back(session, document).values()} == {0}


def test_what_leads_to_others_or_to_nobody_stays_out(session: Session) -> None:
    document = _document(session, JANE)
    first, second, last = document["data"]["posts"]
    _lose(session, "posts", "notes", "tags")
    of_joe = _document(session, JOE)
    # An answer to Joe, one in a ring of its own, and a post that Joe pinned his note to.
    first["answers"] = 109
    second["answers"] = second["id"]
    last["pinned_id"] = 105
    last["price_id"] = 7
    document["data"]["tags"][0]["post_id"] = 109
    done = _take_back(session, document)
    assert done["posts"] == Imported(restored=1, skipped=2)
    assert done["tags"] == Imported(restored=1, skipped=1)
    (post,) = _document(session, JANE)["data"]["posts"]
    assert (post["id"], post["pinned_id"], post["price_id"]) == (9, None, None)
    assert _document(session, JOE) == of_joe


def test_a_price_that_is_there_stays_linked(session: Session) -> None:
    document = _document(session, JANE)
    _lose(session, "posts", "notes", "tags")
    _take_back(session, document)
    found = {post["id"]: post["price_id"] for post in _document(session, JANE)["data"]["posts"]}
    assert found == {2: None, 3: 1, 9: None}


def test_a_row_of_a_composite_key_that_another_has_is_skipped(session: Session) -> None:
    document = _document(session, JANE)
    table = DATA_MAP["tags"].table
    session.execute(delete(table).where(table.c.post_id == 9, table.c.label == "old"))
    assert _take_back(session, document)["tags"] == Imported(restored=1, unchanged=1)
    document["data"]["tags"] = [{"post_id": 109, "label": "old", "anonymized_at": None}]
    assert _take_back(session, document)["tags"] == Imported(skipped=1)
