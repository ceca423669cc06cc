"""A person's data: export, import, erasure, consent."""

from datetime import date, datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import Field, SecretStr, StrictBool, model_validator

from backend.api import examples
from backend.api.dependencies import (
    AdminActor,
    Answer,
    Body,
    CurrentActor,
    ReadSession,
    UserId,
    UserIdInPath,
    WriteSession,
)
from backend.api.problems import problems
from backend.privacy.erase import EraseMode
from backend.privacy.export import ExportContainer, ExportFormat
from backend.services.auth_service import require_self_or_admin
from backend.services.compliance_service import (
    PASSPHRASE_MIN,
    Erasure,
    get_compliance_service,
)
from backend.services.consent_service import ConsentRecord, get_consent_service

router = APIRouter(prefix="/security/data", tags=["personal data"])
PlanDigest = Annotated[
    str | None,
    Field(
        pattern="^[0-9a-f]{64}$",
        description="Of a dry run: the real run is refused if the plan has changed since.",
    ),
]


class ExportBody(Body, json_schema_extra=examples.of(examples.EXPORT)):
    user_id: UserId
    # Closed sets arrive as text, so they alone are not strict.
    format: Annotated[ExportFormat, Field(strict=False)] = ExportFormat.JSON
    encrypt: bool = False
    passphrase: SecretStr | None = Field(
        default=None,
        min_length=PASSPHRASE_MIN,
        max_length=1024,
        description="With `encrypt`: opens the file with `python db_cli.py open FILE`, or, in the "
        "container `zip`, with 7-Zip and alike; there at most 99 printable ASCII characters.",
    )
    container: Annotated[ExportContainer, Field(strict=False)] = Field(
        default=ExportContainer.HOLDFAST,
        description="With `format: zip`, `encrypt` and a passphrase, `zip` gives a standard "
        "AES-256 zip (WinZip AE-2) that 7-Zip and alike open. It is weaker than `holdfast`: the "
        "format stretches a passphrase with only 1000 rounds of PBKDF2-HMAC-SHA1, so use a long "
        "random one, and names and sizes of the files inside can be read without it.",
    )


class ImportBody(Body, json_schema_extra=examples.of(examples.IMPORT)):
    user_id: UserId | None = Field(default=None, description="Refuse an export of anyone else.")
    dry_run: bool = False
    export: dict[str, Any] = Field(description="A JSON export of this service, as it was given.")


class DeleteBody(Body, json_schema_extra=examples.of(examples.DELETE)):
    user_id: UserId
    mode: Annotated[EraseMode, Field(strict=False)]
    reason: str = Field(
        min_length=1,
        max_length=200,
        description="Kind of request, for the audit trail; do not name the person.",
    )
    dry_run: bool = False
    plan_digest: PlanDigest = None


class ConsentBody(Body, json_schema_extra=examples.of(examples.CONSENT)):
    purpose: str = Field(min_length=1, max_length=64)
    granted: StrictBool
    notice_version: str | None = Field(default=None, max_length=64)
    evidence: str | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="An admin records here how the person said so elsewhere.",
    )


class ImportedTable(Answer):
    restored: int
    unchanged: int
    skipped: int


class ImportAnswer(Answer, json_schema_extra=examples.of(examples.IMPORTED)):
    user_id: int
    dry_run: bool
    tables: dict[str, ImportedTable]


class TableCounts(Answer):
    deleted: int
    anonymized: int
    retained: int


class RetainedRows(Answer):
    table: str
    rows: int
    ground: str
    until: datetime | date | None


class DeleteAnswer(Answer, json_schema_extra=examples.of(examples.DELETED)):
    erasure_id: UUID
    status: str = Field(description="`complete`, or `planned` for a dry run.")
    mode: EraseMode
    dry_run: bool
    plan_digest: str
    tables: dict[str, TableCounts]
    retained: list[RetainedRows]
    backups_expire_at: datetime = Field(
        description="When the last backup that holds the person must be gone."
    )

    @classmethod
    def of(cls, erasure: Erasure) -> Self:
        plan = erasure.plan
        return cls(
            erasure_id=erasure.erasure_id,
            status="planned" if erasure.dry_run else "complete",
            mode=plan.mode,
            dry_run=erasure.dry_run,
            plan_digest=plan.digest,
            tables={
                name: TableCounts(**{str(outcome): rows for outcome, rows in counts.items()})
                for name, counts in plan.counts.items()
            },
            retained=[RetainedRows.model_validate(kept) for kept in plan.retained],
            backups_expire_at=erasure.backup_expires_at,
        )


class PurposeState(Answer):
    granted: bool
    since: datetime | None
    notice_version: str | None


class ConsentEvent(Answer, json_schema_extra=examples.of(examples.CONSENT_EVENT)):
    id: UUID
    purpose: str
    granted: bool
    notice_version: str | None
    method: str
    recorded_at: datetime


class ConsentAnswer(Answer, json_schema_extra=examples.of(examples.CONSENT_STATE)):
    user_id: int
    purposes: dict[str, PurposeState]
    history: list[ConsentEvent] = Field(description="Oldest first.")

    @model_validator(mode="before")
    @classmethod
    def _from_record(cls, record: Any) -> Any:
        if isinstance(record, ConsentRecord):
            return {
                "user_id": record.user_id,
                "purposes": record.purposes,
                "history": record.history,
            }
        return record


@router.post(
    "/export",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "The file: JSON, CSV or zip, or any of them encrypted; "
            "`application/zip` also for an encrypted one in the container `zip`.",
            "content": {
                "application/json": {},
                "text/csv": {},
                "application/zip": {},
                "application/octet-stream": {},
            },
        },
        **problems(401, 403, 404, 410, 422),
    },
)
def export_data(body: ExportBody, session: WriteSession, actor: CurrentActor) -> StreamingResponse:
    """Hand out everything that is held about a person, streamed."""
    require_self_or_admin(actor, body.user_id)
    passphrase = body.passphrase.get_secret_value() if body.passphrase else None
    chunks = get_compliance_service().export(
        session, actor, body.user_id, body.format,
        encrypt=body.encrypt, passphrase=passphrase, container=body.container,
    )  # fmt: skip
    sealed = body.encrypt and body.container is ExportContainer.HOLDFAST
    media_type = "application/octet-stream" if sealed else body.format.media_type
    # No id or name in the file's name: it ends up in histories and logs.
    name = f"export.{body.format}{'.hfe' if sealed else ''}"
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(chunks, media_type=media_type, headers=disposition)


@router.post("/import", responses=problems(401, 403, 409, 410, 413, 422))
def import_data(body: ImportBody, session: WriteSession, actor: AdminActor) -> ImportAnswer:
    """Bring the rows of an export back to the person they were taken from."""
    user_id, tables = get_compliance_service().import_(
        session, actor, body.export, body.user_id, dry_run=body.dry_run
    )
    return ImportAnswer.model_validate(
        {"user_id": user_id, "dry_run": body.dry_run, "tables": tables}
    )


@router.post("/delete", responses=problems(401, 403, 404, 409, 410, 422, 503))
def delete_data(body: DeleteBody, session: WriteSession, actor: AdminActor) -> DeleteAnswer:
    """Erase a person: delete or anonymise, keep and restrict what the law keeps."""
    erasure = get_compliance_service().erase(
        session,
        actor,
        body.user_id,
        body.mode,
        reason=body.reason,
        dry_run=body.dry_run,
        plan_digest=body.plan_digest,
    )
    return DeleteAnswer.of(erasure)


@router.get("/consent/{user_id}", responses=problems(401, 403, 404, 410, 422))
def read_consent(user_id: UserIdInPath, session: ReadSession, actor: CurrentActor) -> ConsentAnswer:
    """Show the state per purpose and the whole history."""
    require_self_or_admin(actor, user_id)
    return ConsentAnswer.model_validate(get_consent_service().of(session, user_id))


@router.post(
    "/consent/{user_id}", status_code=201, responses=problems(401, 403, 404, 410, 422, 503)
)
def record_consent(
    user_id: UserIdInPath, body: ConsentBody, session: WriteSession, actor: CurrentActor
) -> ConsentEvent:
    """Give or withdraw consent for one purpose; withdrawing is the same call."""
    require_self_or_admin(actor, user_id)
    event = get_consent_service().record(
        session,
        actor,
        user_id,
        purpose=body.purpose,
        granted=body.granted,
        notice_version=body.notice_version,
        evidence=body.evidence,
    )
    return ConsentEvent.model_validate(event)
