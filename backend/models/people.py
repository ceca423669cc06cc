"""The people: guests who book, and the staff who administer."""

import uuid
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import Column, String, Table, Uuid
from sqlalchemy.orm import Mapped, mapped_column, validates

from backend.crypto.blind_index import BlindIndex, normalise_email
from backend.crypto.columns import Encrypted
from backend.models.base import Base, UtcDateTime, closed_set
from backend.privacy.data_map import (
    OnErase,
    Retention,
    not_personal,
    personal,
    subject_table,
)

EMAIL_INDEX = BlindIndex("users", "email", normalise_email)


class Role(StrEnum):
    USER = "user"
    ADMIN = "admin"


def _email_term(context: Any) -> str | None:
    """Index an e-mail on inserts that do not pass through the mapper."""
    email = context.get_current_parameters().get("email")
    return None if email is None else EMAIL_INDEX.term(email)


class User(Base):
    """One person. `uid` is random and never reused: the ledger knows people by its keyed hash."""

    __tablename__ = "users"
    # AUTOINCREMENT: SQLite would give an erased person's id to the next one.
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": subject_table(
            purpose="Keeping a guest account: contact, stays and wishes",
            basis="contract (GDPR art. 6(1)(b))",
            source="the person, at registration or booking; staff notes by the hotel",
            retention=Retention("user", "last_activity_at", only={"role": Role.USER}),
        ),
    }

    id: Mapped[int] = mapped_column(
        primary_key=True, info=not_personal("row number; an erased person's is never reused")
    )
    uid: Mapped[uuid.UUID] = mapped_column(
        Uuid, unique=True, default=uuid.uuid4, info=personal("user.unique_id", OnErase.RANDOM)
    )
    email: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.contact.email"))
    email_index: Mapped[str | None] = mapped_column(
        String(40),
        unique=True,
        default=_email_term,
        info=personal("user.contact.email", exported=False),
    )
    password_hash: Mapped[str | None] = mapped_column(
        String(255), info=personal("user.authorization.credentials", exported=False)
    )
    role: Mapped[Role] = mapped_column(
        closed_set(Role), default=Role.USER, info=not_personal("rights of the account")
    )
    is_active: Mapped[bool] = mapped_column(
        default=True, info=personal("user.account", OnErase.CONSTANT, constant=False)
    )
    tokens_valid_after: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=personal("user.account", exported=False)
    )

    full_name: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.name"))
    phone: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.phone_number")
    )
    street: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.address.street")
    )
    postcode: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.address.postal_code")
    )
    city: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.address.city")
    )
    country: Mapped[str | None] = mapped_column(
        String(3), info=personal("user.contact.address.country")
    )
    date_of_birth: Mapped[date | None] = mapped_column(
        Encrypted("date"), info=personal("user.demographic.date_of_birth")
    )
    document_type: Mapped[str | None] = mapped_column(
        String(20), info=personal("user.government_id")
    )
    document_number: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.government_id")
    )
    staff_notes: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.content"))

    created_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.account", OnErase.MONTH)
    )
    last_activity_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True, info=personal("user.behavior")
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal("when the row ceased to be about anybody")
    )

    @validates("email")
    def _index_email(self, _key: str, email: str | None) -> str | None:
        self.email_index = None if email is None else EMAIL_INDEX.term(email)
        return email


@dataclass(frozen=True, slots=True)
class IndexedColumn:
    """A blind index and the columns that it is kept in and computed from."""

    index: BlindIndex
    index_column: Column[Any]
    source: Column[Any]


_USERS = cast("Table", User.__table__)
BLIND_INDEXES = (IndexedColumn(EMAIL_INDEX, _USERS.c.email_index, _USERS.c.email),)
