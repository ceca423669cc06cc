"""
What the audit trail says of restores.

One that is done is recorded in the database that was built, before that one is put in place: so
neither the restore nor its record exists alone. All else is recorded in the live one.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import Engine, func, select, text
from sqlalchemy.exc import SQLAlchemyError

from backend.db_utils import get_engine, make_engine, session_scope
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    HoldfastError,
    NotFoundError,
    UnavailableError,
)
from backend.models import AuditEvent, BackupRecord
from backend.services.audit_service import Actor, get_audit_service
from backend.services.chain_service import StoredEvent, get_chain_service
from backend.services.restored import Restored

log = structlog.get_logger(__name__)
# Whoever reads goes on; whoever has written is waited for, and whoever would write waits.
_NO_WRITERS: Final = (
    text("SET LOCAL lock_timeout = '10s'"),
    text(f"LOCK TABLE {AuditEvent.__tablename__} IN SHARE MODE"),
)


def record_restore(
    actor: Actor, restored: Restored, outcome: str, *, built: Engine | None = None
) -> None:
    """Record what a restore did, or would do: in the live database, or in *built*."""
    with session_scope(built) as session:
        get_audit_service().record(
            session, "restore", actor, outcome=outcome, backup=restored.backup_id,
            erasures=restored.reapplied.erasures,
        )  # fmt: skip


@contextmanager
def failures_recorded(actor: Actor, backup_id: UUID | None) -> Iterator[None]:
    """Record that the restore in the block failed, also when it was refused."""
    try:
        yield
    except NotFoundError:
        # Nothing was tried.
        raise
    except (HoldfastError, SQLAlchemyError) as err:
        with suppress(SQLAlchemyError, UnavailableError):
            _record_failure(actor, backup_id, code_of(err))
        raise


def record_unfinished(actor: Actor, restored: Restored, step: str, err: Exception) -> None:
    """Record what failed after the restore was done; it is done all the same."""
    code = code_of(err)
    log.error("restore_unfinished", backup=str(restored.backup_id), step=step, code=code)
    with suppress(SQLAlchemyError, UnavailableError), session_scope() as session:
        get_audit_service().record(
            session, "restore_unfinished", actor, outcome=code, backup=restored.backup_id, step=step
        )


def record_lost(actor: Actor, restored: Restored, before: StoredEvent | None) -> None:
    """
    Record how many events the old PostgreSQL database has after *before*: they are not in the new.

    Between the end of all connections and the rename a new one may have come, written and gone.
    """
    url = get_engine().url.set(database=restored.previous)
    engine = make_engine(url.render_as_string(hide_password=False))
    later = select(func.count()).where(AuditEvent.id > (before.id if before else 0))
    try:
        with session_scope(engine, read_only=True) as session:
            lost = session.scalar(later)
        if lost:
            log.error("events_lost", backup=str(restored.backup_id), events=lost)
            with session_scope() as session:
                get_audit_service().record(
                    session, "events_lost", actor, backup=restored.backup_id, events=lost
                )
    except (SQLAlchemyError, UnavailableError) as err:
        record_unfinished(actor, restored, "count_lost", err)
    finally:
        engine.dispose()


def last_event(engine: Engine | None = None) -> StoredEvent | None:
    """Return number and link of the last event, in the live database or another one."""
    with session_scope(engine, read_only=True) as session:
        return get_chain_service().head(session)


def is_live(event: StoredEvent) -> bool:
    """Say whether the live database has *event*."""
    found = select(AuditEvent.link).where(AuditEvent.id == event.id)
    with session_scope(read_only=True) as session:
        return session.scalar(found) == event.link


@contextmanager
def unwritten_since(before: StoredEvent | None) -> Iterator[None]:
    """
    Hold the live trail as it is while the database is swapped.

    Only this process's writers wait by themselves; what others did meanwhile would be lost. On
    SQLite the swap has the lock already when it asks; on PostgreSQL it ends this one together with
    whoever waits for it.

    Raises:
        ConflictError: Somebody has written after *before*.
    """
    with session_scope(read_only=True) as session:
        locks = session.get_bind().dialect.name == "postgresql"
        for statement in _NO_WRITERS if locks else ():
            session.execute(statement)
        if get_chain_service().head(session) != before:
            raise ConflictError(
                "another process has written meanwhile, and nothing was restored: stop the "
                "others, or try again"
            )
        try:
            yield
        finally:
            # The swap has ended this connection, too.
            session.invalidate()


def code_of(err: Exception) -> str:
    return err.code if isinstance(err, HoldfastError) else type(err).__name__


def _record_failure(actor: Actor, backup_id: UUID | None, code: str) -> None:
    with session_scope() as session:
        if code == BackupDamagedError.code and backup_id is not None:
            record = session.get(BackupRecord, backup_id)
            if record is not None:
                record.error, record.verified_at = code, None
        get_audit_service().record(session, "restore", actor, outcome=code, backup=backup_id)
