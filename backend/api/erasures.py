"""Erasing a person, and the proof of it."""

from datetime import date, datetime
from typing import Annotated, Self
from uuid import UUID

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, BackgroundTasks, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from backend.api import examples
from backend.api.access import GraveAdminActor, ReaderActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, Named, PlanDigest, WriteSession
from backend.api.problems import problems
from backend.crypto.signing import key_id, public_key_pem, spell_public_key
from backend.errors import LegalHoldError
from backend.models import QueuedErasure
from backend.privacy.declarations import EraseMode
from backend.services.certificate_service import get_certificate_service
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.queue_service import get_queue_service

# The scan reads the whole database: one at a time, and never in a thread that a request needs.
_ONE_SCAN = CapacityLimiter(1)

router = APIRouter(prefix="/security/data", tags=["personal data"], route_class=StrictRoute)


class DeleteBody(Named, json_schema_extra=examples.of(examples.DELETE)):
    mode: Annotated[EraseMode, Field(strict=False)]
    reason: str = Field(
        min_length=1,
        max_length=200,
        description="Kind of request, for the audit trail; do not name the person.",
    )
    dry_run: bool = False
    plan_digest: PlanDigest = None
    queue: bool = Field(
        default=False,
        description="While a legal hold keeps the person, note the request (202) and carry it out "
        "when the last hold is released, instead of refusing it.",
    )


class TableCounts(Answer):
    deleted: int
    anonymized: int
    retained: int
    redacted: int = Field(
        default=0, description="Rows of other people that no longer name this one."
    )
    shared: int = Field(default=0, description="Rows that others need too: they stay.")


class RetainedRows(Answer):
    table: str
    rows: int
    ground: str
    until: datetime | date | None


class DeleteAnswer(Answer, json_schema_extra=examples.of(examples.DELETED)):
    erasure_id: UUID = Field(description="Its certificate: `/security/data/erasures/{id}`.")
    status: str = Field(description="`complete`, `partial`, or `planned` for a dry run.")
    mode: EraseMode
    dry_run: bool
    plan_digest: str
    tables: dict[str, TableCounts]
    retained: list[RetainedRows]
    not_reached: list[str] = Field(
        default=[],
        description="Tables kept out of every act by `DATA_MAP_IGNORE`, and rows of which nobody "
        "can say whether they name this person.",
    )
    backups_expire_at: datetime = Field(
        description="When the last backup that holds the person must be gone."
    )

    @classmethod
    def of(cls, erasure: Erasure) -> Self:
        plan = erasure.plan
        return cls(
            erasure_id=erasure.erasure_id,
            status=erasure.status,
            mode=plan.mode,
            dry_run=erasure.dry_run,
            plan_digest=plan.digest,
            tables={
                name: TableCounts(**{str(outcome): rows for outcome, rows in counts.items()})
                for name, counts in plan.counts.items()
            },
            retained=[RetainedRows.model_validate(kept) for kept in plan.retained],
            not_reached=list(erasure.not_reached),
            backups_expire_at=erasure.backup_expires_at,
        )


class QueuedAnswer(Answer, json_schema_extra=examples.of(examples.QUEUED)):
    request_id: UUID
    status: str
    mode: EraseMode
    queued_at: datetime
    holds: list[UUID] = Field(description="The legal holds that it waits for.")

    @classmethod
    def of(cls, queued: QueuedErasure, held: LegalHoldError) -> Self:
        return cls(
            request_id=queued.id,
            status="queued",
            mode=queued.mode,
            queued_at=queued.queued_at,
            holds=held.extra["holds"],
        )


class PublicKeyAnswer(Answer):
    public_key: str
    key_id: str
    pem: str


@router.post(
    "/delete",
    response_model=DeleteAnswer,
    responses={
        202: {"model": QueuedAnswer, "description": "Queued behind a legal hold."},
        **problems(401, 403, 404, 409, 410, 422, 503),
    },
)
def delete_data(
    body: DeleteBody, session: WriteSession, actor: GraveAdminActor, after: BackgroundTasks
) -> DeleteAnswer | JSONResponse:
    """Erase a person: delete or anonymise, keep and restrict what the law keeps."""
    try:
        erasure = get_erasure_service().erase(
            session, actor, body.who, body.mode,
            reason=body.reason, dry_run=body.dry_run, plan_digest=body.plan_digest,
        )  # fmt: skip
    except LegalHoldError as held:
        if not body.queue or body.dry_run:
            raise
        queued = get_queue_service().enqueue(
            session, actor, body.who, body.mode, reason=body.reason
        )
        return JSONResponse(QueuedAnswer.of(queued, held).model_dump(mode="json"), 202)
    after.add_task(_prove, erasure)
    return DeleteAnswer.of(erasure)


async def _prove(erasure: Erasure) -> None:
    await to_thread.run_sync(get_erasure_service().prove, erasure, limiter=_ONE_SCAN)


@router.get(
    "/erasures/{erasure_id}",
    response_class=Response,
    responses={
        200: {
            "description": "The certificate: a signed statement that names nobody.",
            "content": {"application/json": {}},
        },
        **problems(401, 403, 404, 409, 422),
    },
)
def read_certificate(erasure_id: UUID, session: WriteSession, _actor: ReaderActor) -> Response:
    """Hand out the certificate of an erasure, once the scan after it has ended."""
    document = get_certificate_service().of(session, erasure_id)
    return Response(document, media_type="application/json")


@router.get("/certificate-key", responses=problems(401, 403))
def read_certificate_key(session: WriteSession, _actor: ReaderActor) -> PublicKeyAnswer:
    """Show the key that certificates are checked with; give it to whoever is to check them."""
    key = get_certificate_service().public_key(session)
    return PublicKeyAnswer(
        public_key=spell_public_key(key), key_id=key_id(key), pem=public_key_pem(key)
    )
