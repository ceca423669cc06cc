"""The tables, and the data map that their declarations give."""

from backend.models.acts import (
    ErasureRecord,
    ErasureStatus,
    InactivityNotice,
    PlannedErasure,
    QueuedErasure,
)
from backend.models.base import Base
from backend.models.consent import DataConsent
from backend.models.hotel import Booking, Feedback, Invoice, InvoiceLine, Payment
from backend.models.people import (
    BLIND_INDEXES,
    IDENTITY_INDEXES,
    BillingAddress,
    Companion,
    IndexedColumn,
    Role,
    User,
)
from backend.models.records import (
    Alert,
    AlertKind,
    AuditEvent,
    BackupRecord,
    BackupStatus,
    ColumnMigration,
    DataRetentionLog,
    EncryptionKey,
    HoldScope,
    Installation,
    JobRun,
    JobStatus,
    LedgerEntry,
    LedgerKind,
    LegalHold,
    PolicyVersion,
    RetentionPolicy,
    RetentionStatus,
    RevokedToken,
)
from backend.privacy.data_map import DataMap

DATA_MAP = DataMap.of(Base.metadata)

__all__ = [
    "BLIND_INDEXES",
    "DATA_MAP",
    "IDENTITY_INDEXES",
    "Alert",
    "AlertKind",
    "AuditEvent",
    "BackupRecord",
    "BackupStatus",
    "Base",
    "BillingAddress",
    "Booking",
    "ColumnMigration",
    "Companion",
    "DataConsent",
    "DataRetentionLog",
    "EncryptionKey",
    "ErasureRecord",
    "ErasureStatus",
    "Feedback",
    "HoldScope",
    "InactivityNotice",
    "IndexedColumn",
    "Installation",
    "Invoice",
    "InvoiceLine",
    "JobRun",
    "JobStatus",
    "LedgerEntry",
    "LedgerKind",
    "LegalHold",
    "Payment",
    "PlannedErasure",
    "PolicyVersion",
    "QueuedErasure",
    "RetentionPolicy",
    "RetentionStatus",
    "RevokedToken",
    "Role",
    "User",
]
