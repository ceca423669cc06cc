"""The tables, and the data map that their declarations give."""

from backend.models.base import Base
from backend.models.consent import DataConsent
from backend.models.hotel import Booking, Feedback, Invoice, InvoiceLine, Payment
from backend.models.people import BLIND_INDEXES, IndexedColumn, Role, User
from backend.models.records import (
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
    RetentionPolicy,
    RevokedToken,
)
from backend.privacy.data_map import DataMap

DATA_MAP = DataMap.of(Base.metadata)

__all__ = [
    "BLIND_INDEXES",
    "DATA_MAP",
    "AuditEvent",
    "BackupRecord",
    "BackupStatus",
    "Base",
    "Booking",
    "ColumnMigration",
    "DataConsent",
    "DataRetentionLog",
    "EncryptionKey",
    "Feedback",
    "HoldScope",
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
    "RetentionPolicy",
    "RevokedToken",
    "Role",
    "User",
]
