"""What becomes of a request for erasure: planned, queued behind a hold, done and proven."""

import uuid
from datetime import datetime
from enum import StrEnum

from sqlalchemy import ForeignKey, String, Text, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from backend.crypto.columns import Encrypted, RowEncrypted
from backend.models.base import Base, UtcDateTime, closed_set
from backend.privacy.declarations import (
    EraseMode,
    control_table,
    not_personal,
    owned_table,
    personal,
)

_ID = "number of the record"
_WHEN = "when the service acted"
_REFERENCE = "keyed reference; says nothing without the key and the person's own row"


class ErasureStatus(StrEnum):
    COMPLETE = "complete"
    PARTIAL = "partial"


class ErasureRecord(Base):
    """
    One erasure that was carried out, and its certificate once the scan after it has ended.

    The number is that of the ledger's entry.
    """

    __tablename__ = "erasures"
    __table_args__ = {"info": control_table("Proof of what was erased")}  # noqa: RUF012 - SQLAlchemy's form

    id: Mapped[uuid.UUID] = mapped_column(Uuid, primary_key=True, info=not_personal(_ID))
    subject_ref: Mapped[str] = mapped_column(String(64), index=True, info=not_personal(_REFERENCE))
    status: Mapped[ErasureStatus] = mapped_column(
        closed_set(ErasureStatus), info=not_personal("whether everything was reached")
    )
    statement: Mapped[str] = mapped_column(
        Text, info=not_personal("JSON: counts, grounds and dates; names nobody")
    )
    certificate: Mapped[str | None] = mapped_column(
        Text, info=not_personal("JSON: the statement, signed")
    )
    erased_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True, info=not_personal(_WHEN))


class PlannedErasure(Base):
    """What a dry run found, so that a run with a stale digest can say what has changed since."""

    __tablename__ = "planned_erasures"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": control_table("Saying what changed after a dry run", carried_over=False)
    }

    plan_digest: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal("digest of the plan")
    )
    subject_ref: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal(_REFERENCE)
    )
    tables: Mapped[str] = mapped_column(
        Text, info=not_personal("JSON: rows and digest per table and outcome")
    )
    planned_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True, info=not_personal(_WHEN))


class QueuedErasure(Base):
    """A request that waits until no hold keeps the person any more; it goes with them."""

    __tablename__ = "queued_erasures"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": owned_table(
            by="user_id",
            purpose="Erasing as soon as no legal hold forbids it",
            basis="legal obligation (GDPR art. 6(1)(c), art. 17(1))",
            source="the person's request",
            always_delete=True,
            carried_over=True,
        )
    }

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id"), unique=True, info=not_personal("whose; goes with it")
    )
    mode: Mapped[EraseMode] = mapped_column(
        closed_set(EraseMode), info=not_personal("what was asked for")
    )
    reason: Mapped[str | None] = mapped_column(RowEncrypted(), info=personal("user.content"))
    queued_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))


class InactivityNotice(Base):
    """A person who is to be told that their account ends unless they use it."""

    __tablename__ = "inactivity_notices"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": owned_table(
            by="user_id",
            purpose="Telling people before their unused account ends",
            basis="fairness (GDPR art. 5(1)(a))",
            source="the service",
            always_delete=True,
            carried_over=True,
        )
    }

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id"), unique=True, info=not_personal("whose; goes with it")
    )
    ends_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=not_personal("when the account ends unless it is used; goes with it")
    )
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    sent_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, index=True, info=not_personal(_WHEN)
    )


class Approval(Base):
    """An act that waits for a second admin, or was approved by one; it goes when it is done."""

    __tablename__ = "approvals"
    __table_args__ = {"info": control_table("Acts that two people have to want")}  # noqa: RUF012 - SQLAlchemy's form

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    act: Mapped[str] = mapped_column(String(200), info=not_personal("method and path"))
    request: Mapped[str] = mapped_column(
        Encrypted(), info=not_personal("body of the request, of a day at most: hence encrypted")
    )
    requested_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    approved_by: Mapped[str | None] = mapped_column(String(64), info=not_personal(_REFERENCE))
    approved_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
