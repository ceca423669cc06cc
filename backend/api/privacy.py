"""A person's data: export, import, erasure, consent."""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from anyio import CapacityLimiter
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator, Field, SecretStr, StrictBool, model_validator

from backend.api import examples
from backend.api.access import AdminActor, OwnActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import (
    Answer,
    Body,
    LargeBody,
    Named,
    UserId,
    UserIdInPath,
    WriteSession,
)
from backend.api.problems import problems
from backend.api.streams import ClosingResponse
from backend.crypto import passwords
from backend.errors import UnavailableError
from backend.models import DATA_MAP
from backend.privacy.export import ExportContainer, ExportFormat
from backend.privacy.export_schema import schema as export_schema
from backend.services.audit_service import Actor
from backend.services.auth_service import require_admin, require_self_or_admin
from backend.services.compliance_service import (
    PASSPHRASE_MIN,
    get_compliance_service,
)
from backend.services.consent_service import ConsentRecord, get_consent_service
from backend.services.subject_service import get_subject_service

router = APIRouter(prefix="/security/data", tags=["personal data"], route_class=StrictRoute)
_PASSPHRASE_MAX: Final = 1024
# Stretching a passphrase takes 128 MiB and a third of a second, as hashing a password does its own.
_STRETCHING: Final = CapacityLimiter(passwords.AT_ONCE)
_MAX_WAITING: Final = 20


class FindBody(Named, json_schema_extra=examples.of(examples.FIND)):
    pass


class FoundAnswer(Answer, json_schema_extra=examples.of(examples.FOUND)):
    user_id: int | None = Field(description="`null` for somebody whom only others' rows name.")
    named_in: list[str] = Field(description="Tables in which others' rows name the person.")
    subject_ref: str = Field(description="By which the audit trail tells what concerns them.")


def _fitting(passphrase: SecretStr) -> SecretStr:
    # Pydantic's own words would tell how long it is.
    if not PASSPHRASE_MIN <= len(passphrase) <= _PASSPHRASE_MAX:
        raise ValueError(f"a passphrase has {PASSPHRASE_MIN} to {_PASSPHRASE_MAX} characters")
    return passphrase


Passphrase = Annotated[
    SecretStr,
    AfterValidator(_fitting),
    Field(json_schema_extra={"minLength": PASSPHRASE_MIN, "maxLength": _PASSPHRASE_MAX}),
]


class ExportBody(Named, json_schema_extra=examples.of(examples.EXPORT)):
    # Closed sets arrive as text, so they alone are not strict.
    format: Annotated[ExportFormat, Field(strict=False)] = ExportFormat.JSON
    encrypt: bool = False
    passphrase: Passphrase | None = Field(
        default=None,
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


class ImportBody(LargeBody, json_schema_extra=examples.of(examples.IMPORT)):
    user_id: UserId | None = Field(default=None, description="Refuse an export of anyone else.")
    dry_run: bool = False
    export: dict[str, Any] = Field(description="A JSON export of this service, as it was given.")


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
    incomplete: int = Field(
        default=0, description="Restored ones, without cells that the export had left out."
    )


class ImportAnswer(Answer, json_schema_extra=examples.of(examples.IMPORTED)):
    user_id: int
    dry_run: bool
    tables: dict[str, ImportedTable]


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


def _require_own(actor: Actor, body: Named) -> None:
    """Let people at their own data by their number; by an address only an admin looks."""
    if body.user_id is None:
        require_admin(actor)
    else:
        require_self_or_admin(actor, body.user_id)


@router.post("/find", responses=problems(401, 403, 404, 409, 410, 422))
def find_person(body: FindBody, actor: AdminActor) -> FoundAnswer:
    """Find a person by e-mail address or telephone, however it is spelled."""
    subject, named_in = get_subject_service().look_up(actor, body.who)
    return FoundAnswer(user_id=subject.number, named_in=named_in, subject_ref=subject.ref)


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
        **problems(401, 403, 404, 409, 410, 422, 503),
    },
)
def export_data(body: ExportBody, session: WriteSession, actor: OwnActor) -> ClosingResponse:
    """Hand out everything that is held about a person, streamed."""
    _require_own(actor, body)
    passphrase = body.passphrase.get_secret_value() if body.passphrase else None
    turns = _STRETCHING if passphrase else None
    if turns and turns.statistics().tasks_waiting >= _MAX_WAITING:
        raise UnavailableError("too many exports with a passphrase wait by now")
    chunks = get_compliance_service().export(
        session, actor, body.who, body.format,
        encrypt=body.encrypt, passphrase=passphrase, container=body.container,
    )  # fmt: skip
    sealed = body.encrypt and body.container is ExportContainer.HOLDFAST
    media_type = "application/octet-stream" if sealed else body.format.media_type
    # No id or name in the file's name: it ends up in histories and logs.
    name = f"export.{body.format}{'.hfe' if sealed else ''}"
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return ClosingResponse(chunks, media_type=media_type, headers=disposition, turns=turns)


@router.get("/export/schema", responses=problems(401, 403))
def read_export_schema(_actor: OwnActor) -> dict[str, Any]:
    """Show the JSON Schema (draft 2020-12) that every JSON export follows."""
    return export_schema(DATA_MAP)


@router.post("/import", responses=problems(401, 403, 409, 410, 413, 422))
def import_data(body: ImportBody, session: WriteSession, actor: AdminActor) -> ImportAnswer:
    """Bring the rows of an export back to the person they were taken from."""
    user_id, tables = get_compliance_service().import_(
        session, actor, body.export, body.user_id, dry_run=body.dry_run
    )
    return ImportAnswer.model_validate(
        {"user_id": user_id, "dry_run": body.dry_run, "tables": tables}
    )


@router.get("/consent/{user_id}", responses=problems(401, 403, 404, 410, 422))
def read_consent(user_id: UserIdInPath, actor: OwnActor) -> ConsentAnswer:
    """Show the state per purpose and the whole history; that another has seen it is recorded."""
    require_self_or_admin(actor, user_id)
    return ConsentAnswer.model_validate(get_consent_service().show(actor, user_id))


@router.post(
    "/consent/{user_id}", status_code=201, responses=problems(401, 403, 404, 410, 422, 503)
)
def record_consent(
    user_id: UserIdInPath, body: ConsentBody, session: WriteSession, actor: OwnActor
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
