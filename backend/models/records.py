"""The service's own records: policies, runs, backups, the ledger, the audit trail, keys."""

import uuid
from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, ForeignKey, Integer, String, Text, Uuid, false
from sqlalchemy.orm import Mapped, mapped_column

from backend.crypto.columns import Encrypted, RowEncrypted
from backend.models.base import Base, UtcDateTime, closed_set
from backend.privacy.declarations import control_table, not_personal, owned_table, personal
from backend.settings import RetentionAction

_ID = "number of the record"
_WHEN = "when the service acted"
_REFERENCE = "keyed reference; says nothing without the key and the person's own row"


class RetentionPolicy(Base):
    """A policy set over the API; it wins over the environment's default for its data type."""

    __tablename__ = "retention_policies"
    __table_args__ = {"info": control_table("Retention policies set by an admin")}  # noqa: RUF012 - SQLAlchemy's form

    data_type: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal("which data the policy is for")
    )
    period: Mapped[str] = mapped_column(
        String(32), info=not_personal("ISO 8601 duration, as P2555D or P7Y")
    )
    action: Mapped[RetentionAction] = mapped_column(
        closed_set(RetentionAction), info=not_personal("what happens to due rows")
    )
    enabled: Mapped[bool] = mapped_column(info=not_personal("whether it runs"))
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    updated_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    year_end: Mapped[bool] = mapped_column(
        default=False,
        server_default=false(),
        info=not_personal("whether the period begins when the anchor's year ends"),
    )


class PolicyVersion(Base):
    """One change of a policy: what it was before and after."""

    __tablename__ = "policy_versions"
    __table_args__ = {"info": control_table("Who changed which retention policy")}  # noqa: RUF012 - SQLAlchemy's form

    data_type: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal("which data the policy is for")
    )
    version: Mapped[int] = mapped_column(primary_key=True, info=not_personal("counts from 1"))
    before: Mapped[str] = mapped_column(Text, info=not_personal("JSON: the policy until then"))
    after: Mapped[str] = mapped_column(Text, info=not_personal("JSON: the policy from then on"))
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    changed_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))


class RetentionStatus(StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    # Done, by a clock that was ahead: no measure of later runs.
    CLOCK_AHEAD = "clock_ahead"


class DataRetentionLog(Base):
    """One policy in one run: what it matched, what a hold kept, what it changed."""

    __tablename__ = "data_retention_logs"
    __table_args__ = {"info": control_table("Proof that data left on time")}  # noqa: RUF012 - SQLAlchemy's form

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    run_id: Mapped[uuid.UUID] = mapped_column(Uuid, index=True, info=not_personal(_ID))
    data_type: Mapped[str] = mapped_column(String(64), info=not_personal("which data"))
    action: Mapped[RetentionAction] = mapped_column(
        closed_set(RetentionAction), info=not_personal("what was done")
    )
    cutoff: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal("limit of the run"))
    matched: Mapped[int] = mapped_column(info=not_personal("count of due rows"))
    held: Mapped[int] = mapped_column(info=not_personal("count of rows a hold kept"))
    affected: Mapped[int] = mapped_column(info=not_personal("count of rows changed"))
    plan_digest: Mapped[str] = mapped_column(String(64), info=not_personal("digest of the plan"))
    started_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    # Of a run that goes on, or did not end, when its last batch was done.
    finished_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    status: Mapped[str] = mapped_column(
        String(16),
        default=RetentionStatus.DONE,
        server_default=RetentionStatus.DONE,
        info=not_personal("how it ended: a RetentionStatus"),
    )
    period: Mapped[str | None] = mapped_column(
        String(32), info=not_personal("ISO 8601 duration that was applied")
    )
    year_end: Mapped[bool | None] = mapped_column(
        info=not_personal("whether it was counted from the end of the anchor's year")
    )


class HoldScope(StrEnum):
    PERSON = "person"
    ROW = "row"
    DATA_TYPE = "data_type"


class LegalHold(Base):
    """A reason why data must stay, whatever erasure or retention says."""

    __tablename__ = "legal_holds"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": owned_table(
            by="user_id",
            purpose="Keeping evidence for legal claims",
            basis="legal claims (GDPR art. 17(3)(e))",
            source="the operator",
            carried_over=True,
        )
    }

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    scope: Mapped[HoldScope] = mapped_column(
        closed_set(HoldScope), info=not_personal("what kind of thing is held")
    )
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id"), index=True, info=personal("user.unique_id")
    )
    data_type: Mapped[str | None] = mapped_column(String(64), info=not_personal("which data"))
    row_id: Mapped[int | None] = mapped_column(info=not_personal("row number"))
    reason: Mapped[str | None] = mapped_column(RowEncrypted(), info=personal("user.content"))
    review_on: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal("when to ask whether it still stands")
    )
    placed_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    placed_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    released_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    anonymized_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))


class BackupStatus(StrEnum):
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


class BackupRecord(Base):
    """What is known here of one backup; the store itself is the truth."""

    __tablename__ = "backup_records"
    __table_args__ = {"info": control_table("What backups were made")}  # noqa: RUF012 - SQLAlchemy's form

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    label: Mapped[str | None] = mapped_column(String(100), info=not_personal("operator's words"))
    status: Mapped[BackupStatus] = mapped_column(
        closed_set(BackupStatus), info=not_personal("state of the backup")
    )
    size_bytes: Mapped[int | None] = mapped_column(BigInteger, info=not_personal("size stored"))
    sha256: Mapped[str | None] = mapped_column(String(64), info=not_personal("digest stored"))
    location: Mapped[str] = mapped_column(Text, info=not_personal("where it is stored"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True, info=not_personal(_WHEN))
    verified_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    error: Mapped[str | None] = mapped_column(Text, info=not_personal("code of the failure"))
    kind: Mapped[str] = mapped_column(
        String(8),
        default="full",
        server_default="full",
        info=not_personal("full, or what it adds to"),
    )
    bytes_done: Mapped[int | None] = mapped_column(
        BigInteger, info=not_personal("how far a running backup is")
    )
    held_until: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal("until when it may not be deleted")
    )


class LedgerKind(StrEnum):
    ERASE = "erase"
    ANONYMIZE = "anonymize"
    WITHDRAW_CONSENT = "withdraw_consent"


class LedgerEntry(Base):
    """
    An act that a restore must not undo, written before anything is destroyed.

    The same entry lies as a small encrypted object beside the backups, so that it survives the
    loss of this database.
    """

    __tablename__ = "privacy_ledger"
    __table_args__ = {"info": control_table("What a restore must not undo")}  # noqa: RUF012 - SQLAlchemy's form

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    kind: Mapped[LedgerKind] = mapped_column(
        closed_set(LedgerKind), info=not_personal("what was done")
    )
    subject_ref: Mapped[str] = mapped_column(String(64), index=True, info=not_personal(_REFERENCE))
    purpose: Mapped[str | None] = mapped_column(
        String(64), info=not_personal("purpose of a withdrawn consent")
    )
    recorded_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    recorded_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    identity_refs: Mapped[str | None] = mapped_column(
        String(200), info=not_personal("JSON: keyed references of the addresses that named them")
    )


class AuditEvent(Base):
    """Who did what, to whom (by reference), when, and how it ended."""

    __tablename__ = "audit_events"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": control_table("Accountability (GDPR art. 5(2))"),
    }

    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, info=not_personal(_ID)
    )
    at: Mapped[datetime] = mapped_column(UtcDateTime, index=True, info=not_personal(_WHEN))
    action: Mapped[str] = mapped_column(String(40), info=not_personal("what was done"))
    outcome: Mapped[str] = mapped_column(String(40), info=not_personal("how it ended"))
    actor_ref: Mapped[str] = mapped_column(String(64), index=True, info=not_personal(_REFERENCE))
    subject_ref: Mapped[str | None] = mapped_column(
        String(64), index=True, info=not_personal(_REFERENCE)
    )
    request_id: Mapped[str | None] = mapped_column(
        String(64), info=not_personal("number of the request")
    )
    detail: Mapped[str | None] = mapped_column(
        Encrypted(), info=not_personal("counts, ids, and an operator's words: hence encrypted")
    )
    # None of events of before the chain; see `backend.crypto.chain`.
    link: Mapped[str | None] = mapped_column(
        String(64), info=not_personal("keyed digest of this event and the link before it")
    )


class JobStatus(StrEnum):
    BASELINE = "baseline"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class JobRun(Base):
    """
    One due time of one scheduled job; whoever inserts the row runs it.

    A lease that is not extended may be taken over, so a killed runner's work is done by another.
    """

    __tablename__ = "job_runs"
    __table_args__ = {"info": control_table("What scheduled work was done")}  # noqa: RUF012 - SQLAlchemy's form

    job: Mapped[str] = mapped_column(String(40), primary_key=True, info=not_personal("which job"))
    due_at: Mapped[datetime] = mapped_column(
        UtcDateTime, primary_key=True, info=not_personal("when it was due")
    )
    status: Mapped[JobStatus] = mapped_column(
        closed_set(JobStatus), info=not_personal("state of the run")
    )
    owner: Mapped[str] = mapped_column(String(64), info=not_personal("which process"))
    lease_until: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    attempts: Mapped[int] = mapped_column(info=not_personal("count of attempts"))
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    error: Mapped[str | None] = mapped_column(String(200), info=not_personal("code of the failure"))


class AlertKind(StrEnum):
    JOB_FAILED = "job_failed"
    JOB_LATE = "job_late"
    RETENTION_BRAKE = "retention_brake"
    BACKUP_UNPROVEN = "backup_unproven"
    HOLD_REVIEW = "hold_review"
    AUDIT_BROKEN = "audit_broken"


class Alert(Base):
    """Something that a person has to look at, and whether the webhook was told."""

    __tablename__ = "alerts"
    __table_args__ = {"info": control_table("What somebody has to look at")}  # noqa: RUF012 - SQLAlchemy's form

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal(_ID)
    )
    kind: Mapped[AlertKind] = mapped_column(
        closed_set(AlertKind), info=not_personal("what happened")
    )
    about: Mapped[str] = mapped_column(
        String(64), info=not_personal("name of a job or data type, or number of a record")
    )
    code: Mapped[str] = mapped_column(String(64), info=not_personal("code of the failure"))
    raised_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True, info=not_personal(_WHEN))
    sent_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    attempts: Mapped[int] = mapped_column(
        default=0, info=not_personal("count of attempts to tell the webhook")
    )
    retry_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    error: Mapped[str | None] = mapped_column(
        String(64), info=not_personal("why the webhook was not told")
    )


class RevokedToken(Base):
    """A token that was signed out before its end, by its `jti`."""

    __tablename__ = "revoked_tokens"
    __table_args__ = {"info": control_table("Tokens that no longer count")}  # noqa: RUF012 - SQLAlchemy's form

    token_id: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal("random number of a token")
    )
    expires_at: Mapped[datetime] = mapped_column(
        UtcDateTime, index=True, info=not_personal("when the row may go")
    )


class EncryptionKey(Base):
    """A key that data here was sealed with, and its check value; never the key."""

    __tablename__ = "encryption_keys"
    # A backup's own rows say which keys its data needs, so they are not replaced.
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": control_table("Which keys the data needs", carried_over=False)
    }

    key_id: Mapped[str] = mapped_column(String(8), primary_key=True, info=not_personal("key id"))
    check_value: Mapped[str] = mapped_column(
        String(16), info=not_personal("derived one way from the key")
    )
    is_primary: Mapped[bool] = mapped_column(info=not_personal("whether it seals new values"))
    first_seen_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))


class ColumnMigration(Base):
    """A column whose plain values are being encrypted: only meanwhile may they be read as such."""

    __tablename__ = "column_migrations"
    # A backup's own rows say which of its columns are still in plain, so they are not replaced.
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": control_table("Which columns are being encrypted", carried_over=False)
    }

    table_name: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal("which table")
    )
    column_name: Mapped[str] = mapped_column(
        String(64), primary_key=True, info=not_personal("which column")
    )
    started_by: Mapped[str] = mapped_column(String(64), info=not_personal(_REFERENCE))
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime, info=not_personal(_WHEN))


class Installation(Base):
    """One row: which installation this database belongs to, told apart from any other."""

    __tablename__ = "installation"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "info": control_table("Telling installations apart", carried_over=False)
    }

    id: Mapped[uuid.UUID] = mapped_column(
        Uuid, primary_key=True, default=uuid.uuid4, info=not_personal("random number")
    )
    reference_key: Mapped[bytes] = mapped_column(
        Encrypted("bytes"), info=not_personal("key of the references to people")
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, info=not_personal(_WHEN))
    signing_key: Mapped[bytes | None] = mapped_column(
        Encrypted("bytes"), info=not_personal("private key of the certificates")
    )
