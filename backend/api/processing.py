"""Records of processing (GDPR art. 30), as JSON and as a page."""

from datetime import datetime

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from pydantic import Field

from backend.api.access import ReaderActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, ReadSession
from backend.api.problems import problems
from backend.privacy.processing import Protection
from backend.privacy.processing_page import page, page_policy
from backend.services.map_service import get_map_service

router = APIRouter(
    prefix="/security/processing", tags=["records of processing"], route_class=StrictRoute
)


class ControllerAnswer(Answer):
    name: str
    contact: str


class DataSubjectsAnswer(Answer):
    who: str = Field(examples=["users", "others whom companions name"])
    third_party: bool = Field(
        description="They are not those of the subject table, but named in rows of theirs."
    )
    tables: list[str]


class DataCategoryAnswer(Answer):
    category: str = Field(description="In Fides' vocabulary.", examples=["user.contact.email"])
    words: str = Field(description="For a reader.", examples=["Contact: email"])
    columns: list[str]


class TimeLimitAnswer(Answer):
    table: str
    data_type: str | None
    period: str | None = Field(description="ISO 8601; null where rows go with others.")
    action: str | None = Field(description="What happens then; null where nothing does.")
    words: str
    kept_by_law: str | None = Field(description="The ground on which rows outlast an erasure.")


class ActivityAnswer(Answer):
    purpose: str
    tables: list[str]
    lawful_bases: list[str]
    sources: list[str]
    data_subjects: list[DataSubjectsAnswer]
    data_categories: list[DataCategoryAnswer]
    recipients: list[str]
    transfers: list[str] = Field(description="To which third countries, with what safeguard.")
    time_limits: list[TimeLimitAnswer]
    protection: dict[Protection, list[str]] = Field(
        description="The personal columns by what stands in the database."
    )


class MeasureAnswer(Answer):
    name: str
    words: str


class RecordsAnswer(Answer):
    format: str
    version: int
    generated_at: datetime
    controller: ControllerAnswer
    activities: list[ActivityAnswer] = Field(description="One for each purpose.")
    measures: list[MeasureAnswer] = Field(description="Of the whole service.")


@router.get("", responses=problems(401, 403))
def read_records(session: ReadSession, _actor: ReaderActor) -> RecordsAnswer:
    """Draw up the records of processing, by the data map and the policies now in force."""
    return RecordsAnswer.model_validate(get_map_service().records(session))


@router.get("/page", response_class=HTMLResponse, responses=problems(401, 403))
def read_page(session: ReadSession, _actor: ReaderActor) -> HTMLResponse:
    """Draw up the records of processing as a page to read, save or print."""
    text = page(get_map_service().records(session))
    policy = f"{page_policy()}; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})
