"""The data subject: finding them, and what stands in the way of erasing them."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Select, bindparam, func, select
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import (
    ConflictError,
    LegalHoldError,
    RefusedError,
    SubjectErasedError,
    SubjectNotFoundError,
)
from backend.models import DATA_MAP, IDENTITY_INDEXES, Role, User
from backend.privacy.declarations import Identity
from backend.privacy.walk import Subjects, mentioned
from backend.services.audit_service import Actor, get_audit_service
from backend.services.hold_service import get_hold_service
from backend.services.reference_service import reference_to, reference_to_address

MAX_ADDRESS_CHARS = 320
# A database integer of the built-in model.
MAX_USER_ID = 2**31 - 1


class SeveralPeopleError(ConflictError):
    """Several people have the telephone that was asked for."""

    def __init__(self, detail: str, uids: Sequence[UUID], **extra: Any) -> None:
        super().__init__(detail, **extra)
        # For the record of who was found; the answer does not say them.
        self.uids = uids


@dataclass(frozen=True, slots=True)
class Who:
    """How a person is named: by exactly one of number, e-mail address and telephone."""

    user_id: int | None = None
    email: str | None = field(default=None, repr=False)
    phone: str | None = field(default=None, repr=False)

    @property
    def address(self) -> tuple[Identity, str] | None:
        if self.email is not None:
            return Identity.EMAIL, self.email
        return None if self.phone is None else (Identity.PHONE, self.phone)


@dataclass(frozen=True, slots=True)
class Person:
    """What of a person's own row leads to everything else; the rest of it stays sealed."""

    id: int
    uid: UUID
    anonymized_at: datetime | None
    role: Role
    is_active: bool
    email: str | None = field(repr=False)
    phone: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Subject:
    """
    One person.

    Attributes:
        person: From their own row; `None` for somebody who is only named in others' rows.
        rows: What selects everything that speaks of them.
        ref: Keyed reference; of the random `uid` where there is one.
        identity_refs: Keyed references of the addresses by which others' rows name them.
        ambiguous: What selects rows that name a telephone which others have too: nobody can say
            whom they speak of.
    """

    person: Person | None
    rows: Subjects
    ref: str
    identity_refs: tuple[str, ...]
    ambiguous: Subjects | None = None

    @property
    def number(self) -> int | None:
        return None if self.person is None else self.person.id


# Built once, and past the mapper, which would open every cell of the row.
_users = User.__table__.c
_PEOPLE: Final = select(*(_users[name] for name in Person.__slots__))
_PERSON: Final = _PEOPLE.where(_users.id == bindparam("user_id"))
_UID: Final = select(_users.uid, _users.anonymized_at).where(_users.id == bindparam("user_id"))
_SAME_PHONE: Final = (
    select(_users.id)
    .where(
        _users.phone_index.in_(bindparam("phones", expanding=True)),
        _users.id != bindparam("user_id"),
    )
    .limit(1)
)


class SubjectService:
    """Finds people, and says why one may not be erased."""

    def require(self, session: Session, user_id: int, *, lock: bool = False) -> Person:
        """
        Return the person, *lock*ed against every other writer of their rows where asked.

        Raises:
            SubjectNotFoundError: Nobody has this id.
            SubjectErasedError: They were made anonymous.
        """
        return Person(*self._row(session, _PERSON, user_id, lock=lock))

    def uid_of(self, session: Session, user_id: int, *, lock: bool = False) -> UUID:
        """
        Return the person's `uid`, for which no cell is opened; *lock* as in `require`.

        Raises:
            SubjectNotFoundError: Nobody has this id.
            SubjectErasedError: They were made anonymous.
        """
        uid: UUID = self._row(session, _UID, user_id, lock=lock)[0]
        return uid

    def _row(
        self, session: Session, asked: Select[Any], user_id: int, *, lock: bool
    ) -> Sequence[Any]:
        statement = asked.with_for_update() if lock else asked
        row = session.connection().execute(statement, {"user_id": user_id}).one_or_none()
        if row is None:
            raise SubjectNotFoundError(f"no person has the id {user_id}")
        if row.anonymized_at is not None:
            raise SubjectErasedError(f"person {user_id} was erased")
        return row

    def find(self, session: Session, who: Who) -> Subject:
        """
        Find the person, also one whom only other people's rows name.

        Raises:
            RefusedError: *who* names the person in no way, or in more than one.
            SubjectNotFoundError: Nobody is named so.
            SubjectErasedError: They were made anonymous.
            SeveralPeopleError: Several people have this telephone; gives their ids.
        """
        if [who.user_id, who.email, who.phone].count(None) != 2:  # noqa: PLR2004 - all but one
            raise RefusedError("name the person by one of user_id, email and phone")
        if who.user_id is not None:
            return self._of(session, self.require(session, who.user_id))
        (identity, address) = who.address or (Identity.EMAIL, "")
        # In its compatible form: a copied number has spaces that do not break.
        readable = unicodedata.normalize("NFKC", address).isprintable()
        if len(address) > MAX_ADDRESS_CHARS or not readable or not address.strip():
            raise RefusedError(f"this is no {identity} that anybody could have")
        terms = IDENTITY_INDEXES[identity].terms(address)
        column = DATA_MAP.subject.identities[identity]
        named = session.execute(_PEOPLE.where(column.in_(terms)).order_by(_users.id))
        people = [Person(*row) for row in named]
        if len(people) > 1:
            raise SeveralPeopleError(
                "several people have this telephone: name the person by user_id",
                [person.uid for person in people],
                user_ids=[person.id for person in people],
            )
        if people:
            return self._of(session, people[0])
        ref = reference_to_address(session, identity, address)
        subject = Subject(None, Subjects.one(DATA_MAP, None, {identity: terms}), ref, (ref,))
        if not any(self.mentions(session, subject)):
            raise SubjectNotFoundError(f"nobody here has this {identity}")
        return subject

    def look_up(self, actor: Actor, who: Who) -> tuple[Subject, list[str]]:
        """
        Find the person for *actor*, and the tables that name them; it is recorded who was found.

        Manages its own transactions: no writer waits while the tables are read.

        Raises:
            HoldfastError: As `find`.
        """
        try:
            with session_scope(read_only=True) as session:
                subject = self.find(session, who)
                named_in = list(self.mentions(session, subject))
        except SeveralPeopleError as err:
            with session_scope() as session:
                for uid in err.uids:
                    get_audit_service().record(
                        session, "find", actor, outcome="several", subject=uid
                    )
            raise
        with session_scope() as session:
            get_audit_service().record(session, "find", actor, subject=subject.ref)
        return subject, named_in

    def mentions(self, session: Session, subject: Subject) -> Iterator[str]:
        """Yield the tables in which somebody else's row names the person."""
        return self._naming(session, subject.rows)

    def doubtful(self, session: Session, subject: Subject) -> Iterator[str]:
        """Yield the tables in which a row may name the person, or others with their telephone."""
        return iter(()) if subject.ambiguous is None else self._naming(session, subject.ambiguous)

    def _naming(self, session: Session, subjects: Subjects) -> Iterator[str]:
        for mapped in DATA_MAP.of_people:
            rows = mentioned(DATA_MAP, mapped, subjects)
            if rows is None:
                continue
            # A count: LIMIT 1 would have PostgreSQL read the table where there is none.
            statement = select(func.count()).select_from(mapped.table).where(rows)
            if session.scalar(statement, subjects.params):
                yield mapped.name

    def find_erasable(self, session: Session, who: Who) -> Subject:
        """
        Find the person, lock what speaks of them until the transaction ends, refuse who must stay.

        Locked before anything is planned: a row that is being written for them is waited for, and
        of two erasures the second finds nobody.

        Raises:
            RefusedError, ConflictError: As `find`; or they are the last admin.
            SubjectNotFoundError: Nobody is named so.
            SubjectErasedError: They were made anonymous.
            LegalHoldError: A hold keeps them, or a row that names them; gives the holds.
        """
        subject = self.find(session, who)
        if subject.person is None:
            self._lock_mentions(session, subject)
        else:
            self._refuse_last_admin(session, subject.person)
            # Their addresses anew: another may have changed them meanwhile.
            subject = self._of(session, self.require(session, subject.person.id, lock=True))
        holds = get_hold_service().on_mentions(session, subject.rows)
        if subject.number is not None:
            holds += get_hold_service().on_person(session, subject.number)
        if holds:
            raise LegalHoldError(
                "the person, or a row that names them, is under a legal hold (GDPR art. 17(3)(e))",
                holds=sorted({str(hold.id) for hold in holds}),
            )
        return subject

    def _lock_mentions(self, session: Session, subject: Subject) -> None:
        """
        Lock the rows that name somebody who has none of their own.

        Raises:
            SubjectNotFoundError: Another has redacted them meanwhile.
        """
        locked = 0
        for mapped in DATA_MAP.of_people:
            if (rows := mentioned(DATA_MAP, mapped, subject.rows)) is not None:
                keys = select(*mapped.keys).where(rows).order_by(*mapped.keys).with_for_update()
                locked += len(session.execute(keys, subject.rows.params).all())
        if not locked:
            raise SubjectNotFoundError("nobody is named so any more")

    def _of(self, session: Session, person: Person) -> Subject:
        addresses = {Identity.EMAIL: person.email, Identity.PHONE: person.phone}
        known = {identity: text for identity, text in addresses.items() if text}
        terms = {identity: IDENTITY_INDEXES[identity].terms(text)
                 for identity, text in known.items()}  # fmt: skip
        ambiguous = None
        phones = terms.get(Identity.PHONE)
        if phones and self._have_others(session, person.id, phones):
            ambiguous = Subjects.one(DATA_MAP, None, {Identity.PHONE: terms.pop(Identity.PHONE)})
        return Subject(
            person,
            Subjects.one(DATA_MAP, person.id, terms),
            reference_to(session, person.uid),
            tuple(reference_to_address(session, each, known[each]) for each in terms),
            ambiguous,
        )

    def _have_others(self, session: Session, user_id: int, phones: list[str]) -> bool:
        asked = {"user_id": user_id, "phones": phones}
        return session.connection().scalar(_SAME_PHONE, asked) is not None

    def _refuse_last_admin(self, session: Session, person: Person) -> None:
        if person.role is Role.ADMIN and person.is_active:
            # Locked in one order, so that two admins cannot erase each other at once.
            admins = select(User.id).where(User.role == Role.ADMIN, User.is_active)
            if len(session.scalars(admins.order_by(User.id).with_for_update()).all()) == 1:
                raise ConflictError("this is the last admin: create another one first")


@lru_cache(maxsize=1)
def get_subject_service() -> SubjectService:
    return SubjectService()
