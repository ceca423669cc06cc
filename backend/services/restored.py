"""What a restore starts from, and what it says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from backend.backup.manifest import Break, Manifest
from backend.privacy.comparison import TableChange


@dataclass(frozen=True, slots=True)
class Reapplied:
    """What was done again: people erased, consent events, rows restricted, rows retired."""

    erasures: int
    consents: int
    restrictions: int
    retention: int


@dataclass(frozen=True, slots=True)
class Restored:
    """
    A restore, done or tried.

    Attributes:
        emptied: Tables that have rows, of which the backup brings none.
        migrations: Revisions of the schema that the backup lacks.
        previous: Where the old database is kept.
        target: Where the backup was restored to for a look, in the place of nothing.
        breaks: Backups in the store that are not what they should be.
    """

    backup_id: UUID | None
    created_at: datetime
    dry_run: bool
    reapplied: Reapplied
    tables: dict[str, TableChange]
    emptied: list[str]
    migrations: list[str]
    previous: str | None = None
    target: str | None = None
    breaks: list[Break] = field(default_factory=list)

    @property
    def status(self) -> str:
        return "planned" if self.dry_run else "restored"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the rows come from: a backup, or a database that was kept aside."""

    created_at: datetime
    schema_revision: str
    tables: Mapping[str, int]
    manifest: Manifest | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> "Origin":
        return cls(manifest.moment, manifest.schema_revision, manifest.tables, manifest)

    @property
    def backup_id(self) -> UUID | None:
        return UUID(self.manifest.id) if self.manifest else None
