"""The people: guests who book, the staff who administer, and whom a booking names besides."""

import uuid
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import BigInteger, Column, ForeignKey, String, Table, Uuid, event
from sqlalchemy.orm import Mapped, mapped_column

from backend.crypto.blind_index import BlindIndex, normalise_email, normalise_phone
from backend.crypto.columns import Encrypted
from backend.models.base import Base, UtcDateTime, closed_set
from backend.privacy.declarations import (
    Disclosure,
    Identity,
    OnErase,
    Retention,
    not_personal,
    owned_table,
    personal,
    shared_table,
    subject_table,
)
from backend.settings import get_settings


def _one_spelling(number: str) -> str:
    return normalise_phone(number, get_settings().phone_region)


# One index for every column of a kind: whoever is a guest here and a companion there is one person.
EMAIL_INDEX = BlindIndex("users", "email", normalise_email)
PHONE_INDEX = BlindIndex("users", "phone", _one_spelling)
IDENTITY_INDEXES = {Identity.EMAIL: EMAIL_INDEX, Identity.PHONE: PHONE_INDEX}


class Role(StrEnum):
    """Rights of an account; each of the others may what a user may with their own data."""

    USER = "user"
    AUDITOR = "auditor"  # Reads records, nothing else.
    OPERATOR = "operator"  # Runs backups and retention; sees nobody's data.
    ADMIN = "admin"


def _email_term(context: Any) -> str | None:
    """Index an e-mail on inserts that do not pass through the mapper."""
    return _term(EMAIL_INDEX, context.get_current_parameters().get("email"))


def _phone_term(context: Any) -> str | None:
    return _term(PHONE_INDEX, context.get_current_parameters().get("phone"))


def _term(index: BlindIndex, value: str | None) -> str | None:
    return None if value is None else index.term(value)


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
        info=personal("user.contact.email", exported=False, identity=Identity.EMAIL),
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
    phone_index: Mapped[str | None] = mapped_column(
        String(40),
        index=True,
        default=_phone_term,
        info=personal("user.contact.phone_number", exported=False, identity=Identity.PHONE),
    )
    totp_secret: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.authorization.credentials", exported=False)
    )
    # The last 30 seconds of which a code was taken; None until the first one was.
    totp_step: Mapped[int | None] = mapped_column(
        BigInteger, info=personal("user.authorization.credentials", exported=False)
    )


class SignIn(Base):
    """One sign-in, as long as it can be renewed; its access tokens name it."""

    __tablename__ = "sign_ins"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": owned_table(
            by="user_id",
            purpose="Keeping people signed in",
            basis="contract (GDPR art. 6(1)(b))",
            source="the person, at sign-in",
            always_delete=True,
            carried_over=True,
        )
    }

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal("random number")
    )
    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id"), index=True, info=not_personal("whose; goes with it")
    )
    token_digest: Mapped[str] = mapped_column(
        String(64),
        info=personal(
            "user.authorization.credentials", OnErase.CONSTANT, constant="", exported=False
        ),
    )
    signed_in_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.behavior", OnErase.MONTH)
    )
    renewed_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.behavior", OnErase.MONTH)
    )
    expires_at: Mapped[datetime] = mapped_column(
        UtcDateTime, index=True, info=not_personal("when the row may go")
    )


class Companion(Base):
    """Somebody who stays with the guest who booked, and is known by that booking alone."""

    __tablename__ = "companions"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": owned_table(
            by="booking_id",
            purpose="Receiving everybody who stays",
            basis="contract with the guest (GDPR art. 6(1)(b)); as to the others, legitimate "
            "interest (art. 6(1)(f))",
            source="the guest who booked",
            disclosure=Disclosure(recipients=("the authority that registers guests",)),
        ),
    }

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal("row number"))
    booking_id: Mapped[int] = mapped_column(
        ForeignKey("bookings.id"), index=True, info=not_personal("which booking; goes with it")
    )
    full_name: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.name", third_party=True)
    )
    email: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.email", third_party=True)
    )
    email_index: Mapped[str | None] = mapped_column(
        String(40),
        index=True,
        default=_email_term,
        info=personal(
            "user.contact.email", exported=False, third_party=True, identity=Identity.EMAIL
        ),
    )
    phone: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.phone_number", third_party=True)
    )
    phone_index: Mapped[str | None] = mapped_column(
        String(40),
        index=True,
        default=_phone_term,
        info=personal(
            "user.contact.phone_number", exported=False, third_party=True, identity=Identity.PHONE
        ),
    )
    created_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.behavior.purchase_history", OnErase.MONTH)
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal("when the row ceased to be about anybody")
    )


class BillingAddress(Base):
    """Where invoices for a stay go; the guests of one household or company may share it."""

    __tablename__ = "billing_addresses"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": shared_table(
            purpose="Sending invoices to whoever pays",
            basis="contract (GDPR art. 6(1)(b))",
            source="the guest who booked",
            disclosure=Disclosure(recipients=("the postal service",)),
        ),
    }

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal("row number"))
    company: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.workplace"))
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
    contact_name: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.name", third_party=True)
    )
    email: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.email", third_party=True)
    )
    email_index: Mapped[str | None] = mapped_column(
        String(40),
        index=True,
        default=_email_term,
        info=personal(
            "user.contact.email", exported=False, third_party=True, identity=Identity.EMAIL
        ),
    )
    created_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.behavior.purchase_history", OnErase.MONTH)
    )


@dataclass(frozen=True, slots=True)
class IndexedColumn:
    """A blind index and the columns that it is kept in and computed from."""

    index: BlindIndex
    index_column: Column[Any]
    source: Column[Any]


def _indexed(model: type[Base], name: str, index: BlindIndex) -> IndexedColumn:
    """Have the search term of *name* follow every change of it through the mapper."""

    @event.listens_for(getattr(model, name), "set")
    def _follow(row: Any, value: str | None, *_: object) -> None:
        setattr(row, f"{name}_index", _term(index, value))

    columns = cast("Table", model.__table__).c
    return IndexedColumn(index, columns[f"{name}_index"], columns[name])


BLIND_INDEXES = (
    _indexed(User, "email", EMAIL_INDEX),
    _indexed(User, "phone", PHONE_INDEX),
    _indexed(Companion, "email", EMAIL_INDEX),
    _indexed(Companion, "phone", PHONE_INDEX),
    _indexed(BillingAddress, "email", EMAIL_INDEX),
)
