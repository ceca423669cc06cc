"""Backups: make, list, prove, restore, delete."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from backend.api import examples
from backend.api.dependencies import AdminActor, Answer, Body, ReadSession, WriteSession
from backend.api.problems import problems
from backend.models import BackupStatus
from backend.services.backup_service import MAX_LABEL_CHARS, get_backup_service
from backend.services.restore_service import get_restore_service

router = APIRouter(prefix="/security/backup", tags=["backup"])


class CreateBody(Body, json_schema_extra=examples.of(examples.BACKUP)):
    label: str | None = Field(default=None, max_length=MAX_LABEL_CHARS)


class RestoreBody(Body, json_schema_extra=examples.of(examples.RESTORE)):
    backup_id: Annotated[UUID, Field(strict=False)]
    dry_run: bool = False
    confirm: bool = Field(default=False, description="Must be true to replace the live database.")


class BackupAnswer(Answer, json_schema_extra=examples.of(examples.BACKED_UP)):
    id: UUID
    label: str | None
    status: BackupStatus
    size_bytes: int | None
    sha256: str | None
    created_at: datetime
    verified_at: datetime | None
    location: str
    error: str | None


class BackupsAnswer(Answer):
    items: list[BackupAnswer] = Field(description="Newest first.")
    total: int


class ReappliedAnswer(Answer):
    erasures: int
    consents: int
    restrictions: int
    retention: int


class TableChangeAnswer(Answer):
    live: int
    restored: int


class RestoreAnswer(Answer, json_schema_extra=examples.of(examples.RESTORED)):
    backup_id: UUID
    status: str = Field(description="`restored`, or `planned` for a dry run.")
    dry_run: bool
    reapplied: ReappliedAnswer
    tables: dict[str, TableChangeAnswer] = Field(description="Rows before and after.")
    previous: str | None = Field(description="Where the old database is kept.")


@router.post("/create", status_code=201, responses=problems(401, 403, 409, 422, 503))
def create_backup(actor: AdminActor, body: CreateBody | None = None) -> BackupAnswer:
    """Back up the database: consistent, compressed, encrypted, stored whole or not at all."""
    label = body.label if body else None
    return BackupAnswer.model_validate(get_backup_service().create(actor, label))


@router.get("/list", responses=problems(401, 403))
def list_backups(session: ReadSession, _actor: AdminActor) -> BackupsAnswer:
    """List the backups in the store, and those running or failed."""
    items = [BackupAnswer.model_validate(record) for record in get_backup_service().list(session)]
    return BackupsAnswer(items=items, total=len(items))


@router.post("/restore", responses=problems(401, 403, 404, 409, 422, 503))
def restore_backup(body: RestoreBody, actor: AdminActor) -> RestoreAnswer:
    """Restore beside the live database, keep every promise made since, then swap."""
    restored = get_restore_service().restore(
        body.backup_id, actor, dry_run=body.dry_run, confirm=body.confirm
    )
    return RestoreAnswer(
        backup_id=restored.backup_id,
        status="planned" if restored.dry_run else "restored",
        dry_run=restored.dry_run,
        reapplied=ReappliedAnswer.model_validate(restored.reapplied),
        tables={
            name: TableChangeAnswer.model_validate(change)
            for name, change in restored.tables.items()
        },
        previous=restored.previous,
    )


@router.get("/{backup_id}", responses=problems(401, 403, 404, 422))
def read_backup(backup_id: UUID, session: ReadSession, _actor: AdminActor) -> BackupAnswer:
    """Show one backup."""
    return BackupAnswer.model_validate(get_backup_service().get(session, backup_id))


@router.post("/{backup_id}/verify", responses=problems(401, 403, 404, 409, 422, 503))
def verify_backup(backup_id: UUID, actor: AdminActor) -> BackupAnswer:
    """Prove that a backup restores: rebuild it, check it, drop it."""
    return BackupAnswer.model_validate(get_backup_service().verify(backup_id, actor))


@router.delete("/{backup_id}", status_code=204, responses=problems(401, 403, 404, 409, 422))
def delete_backup(backup_id: UUID, session: WriteSession, actor: AdminActor) -> None:
    """Delete a backup; the only complete one stays."""
    get_backup_service().delete(session, backup_id, actor)
