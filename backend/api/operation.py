"""For probes: alive, ready, metrics; and the self-hosted API page."""

import math
import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Depends, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Gauge,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import Field
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from backend.api.access import ANYONE
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer
from backend.db_utils import get_engine, session_scope, sqlite_path, takes_writes
from backend.errors import ConfigurationError, UnavailableError
from backend.services.alert_service import get_alert_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.encryption_service import get_encryption_service
from backend.services.scheduler_service import get_scheduler_service
from backend.services.schema_service import get_schema_service
from backend.services.setup_service import get_setup_service
from backend.services.throttle_service import get_throttle_service
from backend.settings import get_settings

router = APIRouter(tags=["operation"], dependencies=[Depends(ANYONE)], route_class=StrictRoute)
# Of several workers, the one that was asked last knows best.
_Gauge: Final = partial(Gauge, multiprocess_mode="mostrecent")
_NEWEST: Final = _Gauge("holdfast_backup_age_seconds", "Age of the newest backup")
_PROVEN: Final = _Gauge(
    "holdfast_backup_proven_age_seconds", "Age of the newest backup that was proven to restore"
)
_ALERTS: Final = _Gauge("holdfast_alerts", "Alerts raised within a day", ["kind"])
_JOB_DONE: Final = _Gauge(
    "holdfast_job_last_done_timestamp_seconds", "When a job was last done", ["job"]
)
# SQLite's log grows to 1000 pages of 4 KiB before it is moved into the file.
_ROOM_BYTES: Final = 4 * 1024 * 1024
_DOCS_PAGE: Final = Path(__file__).parent.parent / "web" / "docs.html"


class Alive(Answer):
    status: str = Field(examples=["ok"])


class BackupAge(Answer):
    newest_seconds: int | None = Field(description="Age of the newest backup.")
    proven_seconds: int | None = Field(
        description="Age of the newest backup that was proven to restore."
    )


class Ready(Answer):
    status: str = Field(description="`ready` or `not_ready`.")
    checks: dict[str, str] = Field(
        examples=[{"database": "ok", "migrations": "ok", "key": "ok", "scheduler": "ok"}]
    )
    backup: BackupAge = Field(
        description="How old the newest backups are; no reason to be unready."
    )


@router.get("/healthz")
# Without a thread: they may all wait for a database that does not answer.
async def alive() -> Alive:
    """Say that the process answers."""
    return Alive(status="ok")


@router.get("/readyz", response_model=Ready, responses={503: {"model": Ready}})
def ready() -> Response:
    """Say whether requests can be served, and what is missing if not."""
    checks = _checks()
    good = all(result in ("ok", "off") for result in checks.values())
    answer = Ready(status="ready" if good else "not_ready", checks=checks, backup=_backup_age())
    return JSONResponse(answer.model_dump(), 200 if good else 503)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics() -> Response:
    """Counters and timings in Prometheus' text format."""
    age = _backup_age()
    for gauge, seconds in ((_NEWEST, age.newest_seconds), (_PROVEN, age.proven_seconds)):
        # None was ever made: an alert on age must fire.
        gauge.set(math.inf if seconds is None else seconds)
    # That the database does not answer is told elsewhere.
    with suppress(SQLAlchemyError), session_scope(read_only=True) as session:
        for kind, count in get_alert_service().counts(session).items():
            _ALERTS.labels(kind).set(count)
        for job, moment in get_scheduler_service().last_done(session).items():
            _JOB_DONE.labels(job).set(moment.timestamp())
    return Response(generate_latest(_counts()), media_type=CONTENT_TYPE_LATEST)


@router.get("/docs", include_in_schema=False)
def docs() -> HTMLResponse:
    return HTMLResponse(_DOCS_PAGE.read_text())


def _is_disk_full(engine: Engine) -> bool:
    """Say whether SQLite's file has no room to grow; other servers look after their own."""
    if engine.dialect.name != "sqlite":
        return False
    return shutil.disk_usage(sqlite_path(engine).parent).free < _ROOM_BYTES


def _counts() -> CollectorRegistry:
    """What this process has counted, or all workers together."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call] # It has none.
    return registry


def _backup_age() -> BackupAge:
    try:
        with session_scope(read_only=True) as session:
            age = get_catalogue_service().age(session)
    except SQLAlchemyError:
        # That the database does not answer is told elsewhere.
        return BackupAge(newest_seconds=None, proven_seconds=None)
    now = datetime.now(UTC)
    newest, proven = (
        moment and int((now - moment).total_seconds()) for moment in (age.newest, age.newest_proven)
    )
    return BackupAge(newest_seconds=newest, proven_seconds=proven)


def _checks() -> dict[str, str]:
    running = get_scheduler_service().is_running
    wanted = get_settings().scheduler_enabled
    checks = {"scheduler": "ok" if running else ("stopped" if wanted else "off")}
    if not get_setup_service().is_open:
        # A key service that answers again is asked for the key within moments, not at once.
        checks["start"] = "not finished"
    if not get_throttle_service().is_answering():
        checks["throttle"] = "does not answer"
    try:
        found = get_schema_service().revision(get_engine())
        checks["database"] = "ok"
        checks["migrations"] = "ok" if found == get_schema_service().wanted else "behind or ahead"
        with session_scope(read_only=True) as session:
            get_encryption_service().check(session)
            if not takes_writes(session):
                checks["database"] = "takes no writes"
        checks["key"] = "ok"
        if _is_disk_full(get_engine()):
            checks["disk"] = "full"
    except SQLAlchemyError:
        checks["database"] = "does not answer"
    except ConfigurationError:
        checks["key"] = "wrong or missing"
    except UnavailableError:
        checks["key"] = "the key service does not answer"
    return checks
