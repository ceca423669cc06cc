"""Backups: make, list, prove, restore, delete."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from backend.api import examples
from backend.api.access import AdminActor, GraveAdminActor, ObserverActor, RunnerActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, Body, Limit, Moment, Offset, ReadSession, WriteSession
from backend.api.problems import problems
from backend.backup.pgbackrest.says import Kind
from backend.models import BackupStatus
from backend.services.backup_service import MAX_LABEL_CHARS, get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service

router = APIRouter(prefix="/security/backup", tags=["backup"], route_class=StrictRoute)


class CreateBody(Body, json_schema_extra=examples.of(examples.BACKUP)):
    label: str | None = Field(default=None, max_length=MAX_LABEL_CHARS)

    kind: Annotated[Kind, Field(strict=False)] = Field(
        default=Kind.FULL, description="Other than `full` where pgBackRest makes it."
    )
    wait: bool = Field(
        default=True, description="False answers at once; how it ends, the record will say."
    )


class RestoreBody(Body, json_schema_extra=examples.of(examples.RESTORE)):
    backup_id: Annotated[UUID, Field(strict=False)]
    dry_run: bool = False
    confirm: bool = Field(default=False, description="Must be true to replace the live database.")
    confirm_empty: bool = Field(
        default=False,
        description="Must be true, too, where tables that have rows now would have none.",
    )
    target_time: Moment | None = Field(
        default=None,
        description="What was committed up to then, from a backup that pgBackRest has made.",
    )


class BackupHoldBody(Body, json_schema_extra=examples.of(examples.BACKUP_HOLD)):
    until: Moment | None = Field(description="When it may be deleted again; null releases it.")


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
    kind: str = Field(description="`full`, or what it adds to one: `diff`, `incr`.")
    bytes_done: int | None = Field(description="How far it is, in bytes of the database's dump.")
    held_until: datetime | None


class BreakAnswer(Answer):
    backup_id: str
    why: str


class BackupsAnswer(Answer):
    items: list[BackupAnswer] = Field(description="Newest first.")
    total: int
    breaks: list[BreakAnswer] = Field(
        description="Backups that were changed, replaced or taken away by somebody else."
    )
    newest_proven_at: datetime | None = Field(
        description="When the newest backup was made that was proven to restore."
    )


class ReappliedAnswer(Answer):
    erasures: int
    consents: int
    restrictions: int
    retention: int


class TableChangeAnswer(Answer):
    live: int
    restored: int
    lost: int = Field(description="Rows that are there now and will not be.")
    regained: int = Field(description="Rows that are not there now and will be.")


class RestoreAnswer(Answer, json_schema_extra=examples.of(examples.RESTORED)):
    backup_id: UUID
    status: str = Field(description="`restored`, or `planned` for a dry run.")
    dry_run: bool
    reapplied: ReappliedAnswer
    created_at: datetime = Field(description="When the backup was made.")
    tables: dict[str, TableChangeAnswer] = Field(description="Rows before and after.")
    emptied: list[str] = Field(
        description="Tables that have rows, of which the backup brings none: needs confirm_empty."
    )
    migrations: list[str] = Field(description="Revisions of the schema that the backup lacks.")
    breaks: list[BreakAnswer] = Field(
        description="Backups in the store that are not what they should be."
    )
    previous: str | None = Field(description="Where the old database is kept.")


@router.post("/create", status_code=201, responses=problems(401, 403, 409, 422, 503))
def create_backup(actor: RunnerActor, body: CreateBody | None = None) -> BackupAnswer:
    """Back up the database: consistent, compressed, encrypted, stored whole or not at all."""
    body = body or CreateBody()
    make = get_backup_service().create if body.wait else get_backup_service().start
    return BackupAnswer.model_validate(make(actor, body.label, kind=body.kind))


@router.get("/list", responses=problems(401, 403, 503))
def list_backups(
    session: ReadSession, _actor: ObserverActor, limit: Limit = 500, offset: Offset = 0
) -> BackupsAnswer:
    """List the backups in the store, and those running or failed."""
    catalogue = get_catalogue_service()
    records = catalogue.records(session)
    return BackupsAnswer(
        items=[BackupAnswer.model_validate(one) for one in records[offset : offset + limit]],
        total=len(records),
        breaks=[BreakAnswer.model_validate(each) for each in catalogue.breaks(session)],
        newest_proven_at=catalogue.age(session).newest_proven,
    )


@router.post("/restore", responses=problems(401, 403, 404, 409, 422, 503))
def restore_backup(body: RestoreBody, actor: GraveAdminActor) -> RestoreAnswer:
    """Restore beside the live database, keep every promise made since, then swap."""
    restored = get_restore_service().restore(
        body.backup_id,
        actor,
        dry_run=body.dry_run,
        confirm=body.confirm,
        confirm_empty=body.confirm_empty,
        target_time=body.target_time,
    )
    return RestoreAnswer.model_validate(restored)


@router.get("/{backup_id}", responses=problems(401, 403, 404, 409, 422, 503))
def read_backup(backup_id: UUID, session: ReadSession, _actor: ObserverActor) -> BackupAnswer:
    """Show one backup."""
    return BackupAnswer.model_validate(get_catalogue_service().get(session, backup_id))


@router.post("/{backup_id}/verify", responses=problems(401, 403, 404, 409, 422, 503))
def verify_backup(backup_id: UUID, actor: RunnerActor) -> BackupAnswer:
    """Prove that a backup restores: rebuild it, check it, drop it."""
    return BackupAnswer.model_validate(get_backup_service().verify(backup_id, actor))


@router.delete("/{backup_id}", status_code=204, responses=problems(401, 403, 404, 409, 422, 503))
def delete_backup(backup_id: UUID, actor: GraveAdminActor) -> None:
    """Delete a backup; the last good one, and one that is held, stay."""
    get_pruning_service().delete(backup_id, actor)


@router.put("/{backup_id}/hold", responses=problems(401, 403, 404, 409, 422, 503))
def hold_backup(
    backup_id: UUID, body: BackupHoldBody, session: WriteSession, actor: AdminActor
) -> BackupAnswer:
    """Keep a backup from being deleted until a date, or release it."""
    record = get_pruning_service().hold(session, backup_id, actor, body.until)
    return BackupAnswer.model_validate(record)
