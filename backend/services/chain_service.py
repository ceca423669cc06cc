"""
The audit trail's rows: written last in the transaction of their act, numbered without a gap in
the order of the commits, and each linked to the one before.
"""

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import orjson
from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    Text,
    case,
    event,
    func,
    insert,
    literal_column,
    select,
    true,
    type_coerce,
)
from sqlalchemy.orm import Session, SessionTransaction

from backend.crypto.chain import NUMBER_BYTES, START, ChainKeys, Event, canonical, link
from backend.crypto.columns import Encrypted
from backend.db_utils import BUSY_TIMEOUT_SECONDS, is_read_only
from backend.errors import CryptoError, UnavailableError
from backend.models import AuditEvent
from backend.services.reference_service import chain_keys_of

# The first event that has a link; its detail says what was there before.
BEGUN: Final = "audit_chain_begun"
# Recorded where the trail goes on from a backup, and what came after that is lost.
RESUMED: Final = "audit_resumed"
SERVICE: Final = "service"
_WAITING: Final = "audit_events"
# Any number that nothing else in the database locks.
_LOCK: Final = 7_305_208_116_944_302_881
_ROWS_PER_READ: Final = 1000
_MOMENTS: Final[list[Any]] = [
    literal_column(f"timestamptz '{t}+00'") for t in ("0001-01-02", "9999-12-30")
]
_LINK: Final = re.compile("[0-9a-f]{64}")
_TABLE: Final = cast("Table", AuditEvent.__table__)
_DETAIL: Final = cast("Encrypted", _TABLE.c.detail.type)
_NEW: Final = insert(_TABLE)
_COUNTED: Final = {"preserve_rowcount": True}
_NEWEST: Final = select(_TABLE.c.id, _TABLE.c.link).order_by(_TABLE.c.id.desc()).limit(1)
# From left to right: who waits for the lock gives up in time.
_TAKE_LOCK: Final = select(
    func.set_config("lock_timeout", f"{BUSY_TIMEOUT_SECONDS}s", true()),
    func.pg_advisory_xact_lock(_LOCK),
)


class StoredEvent(NamedTuple):
    """
    A row of the trail.

    Attributes:
        event: `None` where the row is none that was ever written; *raw* has what is there instead,
            in the order of the columns, as the driver gave it.
    """

    id: int
    link: str | None
    event: Event | None = None
    spelled: bytes = b""
    raw: Sequence[Any] = ()

    @property
    def is_linked(self) -> bool:
        """Whether the link has the form of one."""
        return _LINK.fullmatch(self.link or "") is not None

    @property
    def at(self) -> datetime | None:
        """When it was, where that can be read."""
        try:
            return _moment(self.raw[1])
        except (ValueError, TypeError):
            return None


@dataclass(slots=True)
class Older:
    """The events of before the chain: how many, the last one, and a keyed digest over all."""

    first: int | None = None
    rows: int = 0
    last: int = 0
    digest: bytes = START

    def add(self, stored: StoredEvent, keys: ChainKeys) -> None:
        # What cannot be read, then and now, is not more than its number.
        number = stored.id.to_bytes(NUMBER_BYTES, "big", signed=True)
        self.digest = link(keys.older, self.digest, stored.spelled or number)
        self.first = stored.id if self.first is None else self.first
        self.rows, self.last = self.rows + 1, stored.id

    def told(self) -> dict[str, Any]:
        return {"rows": self.rows, "last": self.last, "digest": self.digest.hex()}


class ChainService:
    """Writes events so that a change of any of them shows."""

    def add(self, session: Session, values: Event) -> None:
        """
        Have *values* written when *session* commits; their number is given then.

        Raises:
            RuntimeError: What *session* does now may be undone while the rest is committed, or
                will not be committed at all.
        """
        if is_read_only(session) or session.in_nested_transaction():
            raise RuntimeError("an event is recorded in the transaction that commits its act")
        if not session.in_transaction():
            # So that taking back what did nothing else is told, too.
            session.begin()
        session.info.setdefault(_WAITING, []).append(values)

    def begin(self, session: Session) -> None:
        """Begin the chain in a database that has none yet."""
        session.info.setdefault(_WAITING, [])

    def head(self, session: Session) -> StoredEvent | None:
        """Return number and link of the last event."""
        row = session.connection().execute(_NEWEST).one_or_none()
        return None if row is None else StoredEvent(row.id, _text(row.link))

    def stored(self, session: Session, after: int | None = None) -> Generator[StoredEvent]:
        """Yield the rows after number *after*, whatever somebody has made of them; close it."""
        unseal, number = _unsealing(session), _TABLE.c.id
        rows = _raw(session).order_by(number)
        if after is not None:
            rows = rows.where(number > after)
        with session.execute(rows.execution_options(yield_per=_ROWS_PER_READ)) as found:
            for row in found:
                yield _read(row, unseal)

    def newest(
        self, session: Session, wanted: Sequence[ColumnElement[bool]], limit: int
    ) -> list[StoredEvent]:
        """Return the newest rows that fit *wanted*, whatever somebody has made of them."""
        unseal = _unsealing(session)
        rows = _raw(session).where(*wanted).order_by(_TABLE.c.id.desc()).limit(limit)
        return [_read(row, unseal) for row in session.execute(rows)]

    def write(self, session: Session) -> None:
        """Write the events that wait; whoever else writes some waits until *session* ends."""
        waiting = session.info.pop(_WAITING)
        # Before the lock: the act itself keeps nobody waiting.
        session.flush()
        if session.get_bind().dialect.name == "postgresql":
            # SQLite has one writer at a time. Apart from the reading: one statement would see
            # what was there before it waited.
            session.connection().execute(_TAKE_LOCK)
        head = self.head(session) or StoredEvent(0, None)
        if head.link is None and not _is_begun(session):
            waiting.insert(0, self._begun(session))
        if waiting:
            self._append(session, head, waiting)

    def _begun(self, session: Session) -> Event:
        keys, older = chain_keys_of(session), Older()
        with closing(self.stored(session)) as rows:
            for stored in rows:
                older.add(stored, keys)
        detail = orjson.dumps(older.told()).decode()
        return Event(0, datetime.now(UTC), BEGUN, "done", SERVICE, None, None, detail)

    def _append(self, session: Session, head: StoredEvent, waiting: Sequence[Event]) -> None:
        key, rows = chain_keys_of(session).link, []
        # Where somebody has taken the last link away, the trail goes on, and its check will tell.
        previous = bytes.fromhex(head.link) if head.link and head.is_linked else START
        for number, each in enumerate(waiting, head.id + 1):
            numbered = each._replace(id=number)
            previous = link(key, previous, canonical(numbered))
            rows.append(numbered._asdict() | {"link": previous.hex()})
        # Asked for, because a trigger may drop a row without an error, and the act would stay.
        written = session.connection().execute(_NEW, rows, execution_options=_COUNTED).rowcount
        if written != len(rows):
            raise UnavailableError("the database does not take the record of what is done")


@event.listens_for(Session, "before_commit")
def _write(session: Session) -> None:
    # The release of a savepoint is told like a commit, and settles nothing.
    if _WAITING in session.info and not session.in_nested_transaction():
        get_chain_service().write(session)


@event.listens_for(Session, "after_soft_rollback")
def _forget(session: Session, undone: SessionTransaction) -> None:
    if not undone.nested:
        session.info.pop(_WAITING, None)


def _is_begun(session: Session) -> bool:
    linked = select(AuditEvent.id).where(AuditEvent.link.is_not(None)).limit(1)
    return session.scalar(linked) is not None


def _unsealing(session: Session) -> Callable[[Any], Any]:
    return _DETAIL.result_processor(session.get_bind().dialect, None)


def _raw(session: Session) -> Select[Any]:
    """Select columns as the driver gives them: a type would fail at what it does not know."""
    number, *others = _TABLE.c
    raw: list[Any] = [type_coerce(column, Text) for column in others]
    if session.get_bind().dialect.name == "postgresql":
        # It keeps moments that Python has not, and the driver fails at them.
        raw[0] = case((raw[0].between(*_MOMENTS), raw[0]))
    return select(number, *raw)


def _read(row: Sequence[Any], unseal: Callable[[Any], Any]) -> StoredEvent:
    id_, at, *texts, detail, link_ = row
    link_ = _text(link_)
    try:
        event_ = Event._make((id_, _moment(at), *texts, unseal(detail)))
        return StoredEvent(id_, link_, event_, canonical(event_), row)
    except (ValueError, TypeError, AttributeError, CryptoError):
        return StoredEvent(id_, link_, raw=row)


def _text(link_: Any) -> str | None:
    # SQLite keeps bytes in a column of text.
    return link_ if isinstance(link_, str | None) else ""


def _moment(raw: Any) -> datetime:
    if isinstance(raw, datetime):
        return raw
    moment = datetime.fromisoformat(raw)
    # SQLite keeps text; of the many that mean one moment, one is ours.
    if moment.tzinfo is not None or moment.isoformat(" ", "microseconds") != raw:
        raise ValueError("a moment in another spelling")
    return moment.replace(tzinfo=UTC)


@lru_cache(maxsize=1)
def get_chain_service() -> ChainService:
    return ChainService()
