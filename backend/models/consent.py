"""Consent: an append-only history; the state is the newest event per purpose."""

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, String, Uuid
from sqlalchemy.orm import Mapped, mapped_column

from backend.crypto.columns import RowEncrypted
from backend.models.base import Base, UtcDateTime
from backend.privacy.declarations import OnErase, not_personal, owned_table, personal


class DataConsent(Base):
    """
    One event: a person gave or withdrew consent for one purpose.

    Rows are never updated (GDPR art. 7(1) asks for proof). `recorded_at` grows strictly per
    person and purpose, so that the newest event is well defined.
    """

    __tablename__ = "data_consents"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": owned_table(
            by="user_id",
            purpose="Proving what the person agreed to",
            basis="legal obligation (GDPR art. 6(1)(c), art. 7(1))",
            source="the person",
            always_delete=True,
            carried_over=True,
        )
    }

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal("number of the event")
    )
    user_id: Mapped[int] = mapped_column(
        ForeignKey("users.id"), index=True, info=not_personal("whose; goes with the row")
    )
    purpose: Mapped[str] = mapped_column(String(64), info=personal("user.consent", OnErase.KEEP))
    granted: Mapped[bool] = mapped_column(info=personal("user.consent", OnErase.KEEP))
    notice_version: Mapped[str | None] = mapped_column(
        String(64), info=not_personal("which text was shown")
    )
    method: Mapped[str] = mapped_column(String(20), info=personal("user.consent", OnErase.KEEP))
    evidence: Mapped[str | None] = mapped_column(RowEncrypted(), info=personal("user.content"))
    recorded_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.consent", OnErase.MONTH)
    )
