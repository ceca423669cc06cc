"""An audit trail to attack: acts that are recorded, and somebody with the database but no key."""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from sqlalchemy import select, text

from backend.crypto.chain import ChainKeys
from backend.db_utils import get_engine, reading_any_text, session_scope, snapshot_scope
from backend.models import AuditEvent
from backend.services.audit_service import COMMAND_LINE, get_audit_service
from backend.services.checkpoint_service import Known, get_checkpoint_service
from backend.services.reference_service import chain_keys_of
from backend.services.trail_service import Checked, get_trail_service
from backend.services.trail_walk import Break, Walk

TABLE = AuditEvent.__table__


def act(times: int = 1) -> int:
    """Record so many acts, each in a transaction of its own; return the last one's number."""
    for number in range(times):
        with session_scope() as session:
            get_audit_service().record(
                session, "export", COMMAND_LINE.during(f"request-{number}"), subject=uuid4(),
                number=uuid4(),
            )  # fmt: skip
    return numbers()[-1]


def numbers() -> list[int]:
    with session_scope(read_only=True) as session:
        return list(session.scalars(select(AuditEvent.id).order_by(AuditEvent.id)))


def anchor() -> int:
    """Make a checkpoint; return the event that it is about."""
    made = get_checkpoint_service().make()
    assert made is not None
    return made.event_id


def verify() -> Checked:
    return get_trail_service().verify(COMMAND_LINE)


def keys() -> ChainKeys:
    with session_scope(read_only=True) as session:
        return chain_keys_of(session)


def known() -> Known:
    return get_checkpoint_service().known(keys())


def first_break(known: Known | None = None) -> Break | None:
    """Look for the first break of the trail, and leave no event of it."""
    walk = Walk(keys(), known or Known())
    with snapshot_scope() as session, reading_any_text(session):
        return walk.through(session)


def found(known: Known | None = None) -> tuple[str, int] | None:
    """Kind and place of the first break."""
    one = first_break(known)
    return None if one is None else (str(one.kind), one.event_id)


def sql(statement: str, **values: Any) -> None:
    """Change the database as somebody does who is not the service."""
    with session_scope() as session:
        session.execute(text(statement), values)


def refuse_events(condition: str = "1 = 1") -> None:
    """Have the database refuse new events of which *condition* holds; they are `NEW`."""
    if get_engine().dialect.name == "sqlite":
        sql(
            f"CREATE TRIGGER no_room BEFORE INSERT ON audit_events WHEN {condition}"
            " BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
        return
    sql(
        "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION ''no room''; END'"
    )
    sql(
        "CREATE TRIGGER no_room BEFORE INSERT ON audit_events"
        f" FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION no_room()"
    )


def take_events_again() -> None:
    """Take back what `refuse_events` did."""
    is_sqlite = get_engine().dialect.name == "sqlite"
    sql("DROP TRIGGER no_room" if is_sqlite else "DROP TRIGGER no_room ON audit_events")


def raw_rows() -> Sequence[Any]:
    """The rows as the database has them."""
    with session_scope(read_only=True) as session:
        return session.execute(text("SELECT * FROM audit_events ORDER BY id")).mappings().all()


def put_back(rows: Sequence[Any]) -> None:
    """Have the table hold *rows* and nothing else, as a copy of it from then does."""
    names = ", ".join(rows[0])
    values = ", ".join(f":{name}" for name in rows[0])
    with session_scope() as session:
        session.execute(text("DELETE FROM audit_events"))
        statement = text(f"INSERT INTO audit_events ({names}) VALUES ({values})")  # noqa: S608 - names of columns
        session.execute(statement, [dict(row) for row in rows])
