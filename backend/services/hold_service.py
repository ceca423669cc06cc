"""Legal holds: what must stay, whatever erasure or retention says."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Select, bindparam, func, or_, select, true
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import ConflictError, NotFoundError, RefusedError, SubjectNotFoundError
from backend.models import DATA_MAP, HoldScope, LegalHold, User
from backend.privacy.due import Holds
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.steps import descendants_first, hanging_from
from backend.privacy.walk import Subjects, mentioned, owned, reached, rows_of
from backend.services.audit_service import Actor, get_audit_service


class Hold(NamedTuple):
    """What a standing hold keeps; its reason stays sealed."""

    id: UUID
    scope: HoldScope
    user_id: int | None
    data_type: str | None
    row_id: int | None


# Built once: every export and erasure asks.
_holds = LegalHold.__table__.c
_STANDING: Final = select(*(_holds[name] for name in Hold._fields)).where(
    _holds.released_at.is_(None)
)
_ON_PERSON: Final = _STANDING.where(
    or_(_holds.data_type.is_not(None), _holds.user_id == bindparam("person"))
)
_WITH_OWNER: Final = select(LegalHold, User.uid).outerjoin(User, User.id == LegalHold.user_id)


class HoldService:
    """Places and releases holds, and says what stands under one."""

    def place(
        self,
        session: Session,
        actor: Actor,
        *,
        scope: HoldScope,
        reason: str,
        user_id: int | None,
        data_type: str | None,
        row_id: int | None,
        review_on: datetime | None,
    ) -> LegalHold:
        """
        Place a hold on a person, one row or a whole data type.

        Raises:
            RefusedError: The scope lacks what it names, or names more.
            NotFoundError: The person or row does not exist.
        """
        named = (user_id is not None, data_type is not None, row_id is not None)
        wanted = {
            HoldScope.PERSON: (True, False, False),
            HoldScope.ROW: (False, True, True),
            HoldScope.DATA_TYPE: (False, True, False),
        }
        if named != wanted[scope]:
            raise RefusedError(
                "a hold names a user_id (person), a data_type (data_type), "
                "or a data_type and a row_id (row)"
            )
        # A hold on a row belongs to the row's person: its reason is their data too.
        owner = user_id or self._owner(session, data_type or "", row_id)
        subject = None if owner is None else session.get(User, owner)
        if user_id is not None and subject is None:
            raise SubjectNotFoundError(f"no person has the id {user_id}")
        hold = LegalHold(
            scope=scope,
            reason=reason,
            user_id=owner,
            data_type=data_type,
            row_id=row_id,
            review_on=review_on,
            placed_by=actor.ref(session),
            placed_at=datetime.now(UTC),
        )
        session.add(hold)
        session.flush()
        get_audit_service().record(
            session, "hold_placed", actor, subject=subject.uid if subject else None,
            hold=hold.id, scope=scope,
        )  # fmt: skip
        return hold

    def release(self, session: Session, hold_id: UUID, actor: Actor) -> LegalHold:
        """
        End a hold; what was due goes at the next run.

        Raises:
            NotFoundError: No such hold.
            ConflictError: It was released before.
        """
        hold = session.get(LegalHold, hold_id)
        if hold is None:
            raise NotFoundError(f"no hold has the id {hold_id}")
        if hold.released_at is not None:
            raise ConflictError(f"hold {hold_id} was released before")
        hold.released_at = datetime.now(UTC)
        subject = session.scalar(select(User.uid).where(User.id == hold.user_id))
        get_audit_service().record(session, "hold_released", actor, subject=subject, hold=hold.id)
        return hold

    def show(self, actor: Actor, hold_id: UUID) -> LegalHold:
        """
        Return one hold to *actor*, as `all` does.

        Raises:
            NotFoundError: No such hold.
        """
        found = _shown(actor, _WITH_OWNER.where(LegalHold.id == hold_id))
        if not found:
            raise NotFoundError(f"no hold has the id {hold_id}")
        return found[0]

    def all(self, actor: Actor, limit: int, offset: int = 0) -> list[LegalHold]:
        """
        Return so many holds, newest first; of whose person *actor* has read is recorded.

        Manages its own transactions: no writer waits while they are read.
        """
        newest_first = _WITH_OWNER.order_by(LegalHold.placed_at.desc(), LegalHold.id)
        return _shown(actor, newest_first.limit(limit).offset(offset))

    def standing(self, session: Session) -> Holds:
        """Everything that is held now."""
        people: set[int] = set()
        data_types: set[str] = set()
        rows: dict[str, set[int]] = {}
        for hold in map(Hold._make, session.execute(_STANDING)):
            if hold.scope is HoldScope.PERSON and hold.user_id is not None:
                people.add(hold.user_id)
            elif hold.scope is HoldScope.ROW and hold.row_id is not None:
                rows.setdefault(hold.data_type or "", set()).add(hold.row_id)
            elif hold.data_type is not None:
                data_types.add(hold.data_type)
        frozen = {data_type: frozenset(ids) for data_type, ids in rows.items()}
        return Holds(frozenset(people), frozenset(data_types), frozen)

    def due_for_review(self, session: Session, now: datetime) -> Sequence[UUID]:
        """The standing holds of which somebody was to ask by now whether they still stand."""
        return session.scalars(
            select(LegalHold.id).where(LegalHold.released_at.is_(None), LegalHold.review_on <= now)
        ).all()

    def on_person(self, session: Session, user_id: int) -> list[Hold]:
        """The standing holds that keep this person or a row of theirs."""
        standing = session.execute(_ON_PERSON, {"person": user_id}).all()
        return [hold for hold in map(Hold._make, standing) if self._keeps(session, hold, user_id)]

    def on_mentions(self, session: Session, subjects: Subjects) -> list[Hold]:
        """The standing holds that keep others' rows in which the person is named as they are."""
        standing = [Hold._make(row) for row in session.execute(_STANDING)]
        if not standing:
            return []
        named = [
            (mapped, rows)
            for mapped in DATA_MAP.of_people
            if (rows := mentioned(DATA_MAP, mapped, subjects)) is not None
        ]
        return [
            hold
            for hold in standing
            if any(self._covers(session, hold, one, rows, subjects.params) for one, rows in named)
        ]

    def _covers(
        self,
        session: Session,
        hold: Hold,
        mapped: MappedTable,
        rows: ColumnElement[bool],
        params: Mapping[str, Any],
    ) -> bool:
        held = _held_rows(hold, mapped)
        if held is None:
            return False
        statement = select(func.count()).select_from(mapped.table).where(rows, held)
        return bool(session.scalar(statement, params))

    def _keeps(self, session: Session, hold: Hold, user_id: int) -> bool:
        if hold.data_type is None:
            return hold.user_id == user_id
        mapped = DATA_MAP.by_data_type[hold.data_type]
        named = true() if hold.row_id is None else mapped.key == hold.row_id
        return any(
            session.execute(select(mapped.key).where(rows, named).limit(1)).first()
            for rows in owned(DATA_MAP, mapped, DATA_MAP.subject.key == user_id)
        )

    def _owner(self, session: Session, data_type: str, row_id: int | None) -> int | None:
        """Return whose row it is; `None` without a row, or when the row's link was cut."""
        mapped = DATA_MAP.by_data_type.get(data_type)
        if mapped is None:
            raise RefusedError(f"data_type is one of {', '.join(sorted(DATA_MAP.by_data_type))}")
        if row_id is None:
            return None
        found = session.execute(select(mapped.key).where(mapped.key == row_id)).first()
        if found is None:
            raise NotFoundError(f"no {data_type} has the id {row_id}")
        number: int | None = row_id
        while mapped.parent is not None and mapped.link is not None and number is not None:
            number = session.scalar(select(mapped.link).where(mapped.key == number))
            mapped = mapped.parent
        return number


def _shown(actor: Actor, wanted: Select[LegalHold, UUID]) -> list[LegalHold]:
    with session_scope(read_only=True) as session:
        found = session.execute(wanted).all()
    about = [(hold.id, uid) for hold, uid in found if uid is not None]
    if about:
        with session_scope() as session:
            for hold_id, uid in about:
                get_audit_service().record(session, "hold_read", actor, subject=uid, hold=hold_id)
    return [hold for hold, _ in found]


def _held_rows(hold: Hold, mapped: MappedTable) -> ColumnElement[bool] | None:
    """Return the predicate for rows of *mapped* that *hold* keeps; `None` if it can keep none."""
    if hold.data_type is None:
        person = DATA_MAP.subject.key == hold.user_id
        shared = reached(DATA_MAP, mapped, person)
        return rows_of(DATA_MAP, mapped, person) if shared is None else shared
    root = DATA_MAP.by_data_type[hold.data_type]
    named = true() if hold.row_id is None else root.key == hold.row_id
    if mapped in descendants_first(DATA_MAP, root):
        return hanging_from(mapped, root, named)
    referring = [
        mapped.key.in_(select(column).where(hanging_from(other, root, named)))
        for other, column in DATA_MAP.references_to(mapped)
        if other in descendants_first(DATA_MAP, root)
    ]
    return or_(*referring) if referring else None


@lru_cache(maxsize=1)
def get_hold_service() -> HoldService:
    return HoldService()
