"""The end of backups: deleting, holding, and pruning by keep rules and by age."""

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from backend.backup.keeping import KeepRules, kept
from backend.backup.manifest import stored_ids, without_manifest
from backend.backup.pgbackrest.says import Kind
from backend.db_utils import session_scope
from backend.errors import (
    BackupDamagedError,
    ConflictError,
    HoldfastError,
    NotFoundError,
    RefusedError,
    SchemaMismatchError,
    UnavailableError,
)
from backend.models import BackupRecord, BackupStatus
from backend.services.archive_service import (
    BackupKeyError,
    databases,
    exclusive,
    get_archive_service,
    kept_aside,
)
from backend.services.audit_service import Actor, get_audit_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.certificate_service import get_certificate_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.cluster_service import get_cluster_service, is_used
from backend.services.store_service import get_store_service, store
from backend.settings import get_settings

_WAIT_SECONDS: Final = 5
_PROMISED: Final = "erased people were told that it is gone by now"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a backup stays, and why."""

    backup_id: UUID
    created_at: datetime
    keep: bool
    reason: str


class PruningService:
    """Decides which backups go, and lets them go."""

    def delete(self, backup_id: UUID, actor: Actor) -> None:
        """
        Delete a backup, everywhere.

        That it begins is recorded first. Then objects go, and the record last, outside of any
        transaction: nobody waits for a store. What a crash leaves of either, the next start
        finishes.

        Raises:
            NotFoundError: No such backup.
            ConflictError: It is the last good one, it is held, or it is still being made; or a
                backup or restore is running.
        """
        with exclusive(_WAIT_SECONDS):
            with session_scope(read_only=True) as session:
                found = get_catalogue_service().records(session)
            records = {record.id: record for record in found}
            # A damaged manifest gives no record, and such a backup can be deleted too.
            if backup_id not in records and str(backup_id) not in stored_ids(store()):
                raise NotFoundError(f"no backup has the id {backup_id}")
            record = records.get(backup_id)
            if record is not None:
                _refuse_needed(record, found, datetime.now(UTC))
            _tell_deleted(backup_id, actor, "begun")
            try:
                _remove_objects(backup_id)
            except HoldfastError as err:
                with suppress(SQLAlchemyError, UnavailableError):
                    _tell_deleted(backup_id, actor, err.code)
                raise
            with session_scope() as session:
                _forget(session, backup_id)
                get_audit_service().record(session, "backup_deleted", actor, backup=backup_id)

    def hold(
        self, session: Session, backup_id: UUID, actor: Actor, until: datetime | None
    ) -> BackupRecord:
        """
        Keep a backup from being deleted until *until*, or let it go with `None`.

        Raises:
            NotFoundError: No such backup.
            RefusedError: *until* is past, or later than the backup's age allows.
            ConflictError: The backup is not complete.
        """
        record = session.merge(get_catalogue_service().get(session, backup_id))
        if record.status is not BackupStatus.COMPLETE:
            raise ConflictError(f"backup {backup_id} is not complete")
        latest = record.created_at + timedelta(days=get_settings().backup_max_age_days)
        promised = get_certificate_service().promised_ends(session, record.created_at)
        latest = min(latest, promised.get(backup_id, latest))
        if until is not None and not datetime.now(UTC) < until <= latest:
            raise RefusedError(
                "a backup is held until a time to come, and at most until "
                f"{latest.isoformat(timespec='seconds')}: erased people were told its end "
                "(BACKUP_MAX_AGE_DAYS)"
            )
        record.held_until = until
        get_audit_service().record(session, "backup_held", actor, backup=backup_id, until=until)
        return record

    def plan(self, session: Session, now: datetime | None = None) -> list[Verdict]:
        """
        Say of every complete backup whether it stays, newest first.

        The maximum age beats every reason to keep one: it is what erased people are told.
        """
        now = now or datetime.now(UTC)
        records = [
            record
            for record in get_catalogue_service().records(session)
            if record.status is BackupStatus.COMPLETE
        ]
        rules, zone = _rules(), get_settings().zone
        good = [record for record in records if record.error is None]
        wanted = kept([(record.id, record.created_at) for record in good], rules, zone)
        oldest = min((record.created_at for record in records), default=now)
        promised = get_certificate_service().promised_ends(session, oldest)
        verdicts = {}
        for record in records:
            keep, reason = _judge(record, good, wanted.get(record.id, []), rules, now)
            if promised.get(record.id, now) < now:
                keep, reason = False, _PROMISED
            verdicts[record.id] = Verdict(record.id, record.created_at, keep, reason)
        return list(_with_those_they_need(verdicts, _builds_on(records)).values())

    def prune(self, actor: Actor, *, dry_run: bool, now: datetime | None = None) -> list[Verdict]:
        """
        Delete what no rule keeps; return the verdict on every backup.

        Old databases that a restore has kept aside go by their age, too.

        Raises:
            ConflictError: A backup or restore is running.
            HoldfastError: Something could not be deleted; everything else was.
        """
        now = now or datetime.now(UTC)
        if dry_run:
            with session_scope(read_only=True) as session:
                return self.plan(session, now)
        with exclusive(_WAIT_SECONDS):
            with session_scope(read_only=True) as session:
                verdicts = self.plan(session, now)
            # Newest first: pgBackRest removes nothing that others build on.
            going = [verdict.backup_id for verdict in verdicts if not verdict.keep]
            before = now - timedelta(days=get_settings().backup_max_age_days)
            going += _remains(before)
            old = sum(moment < before for moment in kept_aside())
            if going or old:
                _tell_pruned(actor, "begun", backups=len(going), previous=old)
            removed, failed = _remove_all(going)
            forgotten = sum(each.forget_previous(before) for each in databases())
            get_store_service().forget_notes(before)
            get_checkpoint_service().forget(before)
            with session_scope() as session:
                for backup_id in removed:
                    _forget(session, backup_id)
                if going or old:
                    get_audit_service().record(
                        session, "backups_pruned", actor, outcome=failed.code if failed else "done",
                        backups=len(removed), previous=forgotten,
                    )  # fmt: skip
        if failed is not None:
            raise failed
        return verdicts


def _tell_deleted(backup_id: UUID, actor: Actor, outcome: str) -> None:
    with session_scope() as session:
        get_audit_service().record(
            session, "backup_deleted", actor, outcome=outcome, backup=backup_id
        )


def _tell_pruned(actor: Actor, outcome: str, *, backups: int, previous: int) -> None:
    with session_scope() as session:
        get_audit_service().record(
            session, "backups_pruned", actor, outcome=outcome, backups=backups, previous=previous
        )


def _remove_all(backup_ids: list[UUID]) -> tuple[list[UUID], HoldfastError | None]:
    removed: list[UUID] = []
    failed: HoldfastError | None = None
    for backup_id in backup_ids:
        try:
            _remove_objects(backup_id)
        except HoldfastError as err:
            log.error("backup_not_deleted", backup=str(backup_id), code=err.code)
            failed = err
        else:
            removed.append(backup_id)
    return removed, failed


def _remove_objects(backup_id: UUID) -> None:
    in_repository = is_used()
    with suppress(NotFoundError, BackupDamagedError, BackupKeyError, SchemaMismatchError):
        manifest = get_archive_service().manifest(backup_id)
        in_repository = manifest.repository_label is not None
    if in_repository:
        get_cluster_service().delete(str(backup_id))
    get_store_service().remove_backup(str(backup_id))


def _forget(session: Session, backup_id: UUID) -> None:
    """Drop the record, and tell the new date to whom an old one was told."""
    if record := session.get(BackupRecord, backup_id):
        session.delete(record)
        session.flush()
    get_certificate_service().backup_gone(session, backup_id, kept_aside())


def _remains(before: datetime) -> list[UUID]:
    """
    Find what is stored of backups that have no manifest, and are too old or known to nobody.

    Nobody can restore them; but their data are there, and open with the key.
    """
    with session_scope(read_only=True) as session:
        young = set(session.scalars(select(BackupRecord.id).where(
            BackupRecord.created_at >= before, BackupRecord.status == BackupStatus.COMPLETE
        )))  # fmt: skip
    return [one for one in map(UUID, without_manifest(store())) if one not in young]


def _builds_on(records: list[BackupRecord]) -> dict[UUID, set[UUID]]:
    """Which other backups each one needs to restore; a full one needs none."""
    found = {}
    for record in records:
        if record.kind != Kind.FULL:
            with suppress(NotFoundError, BackupDamagedError, BackupKeyError):
                manifest = get_archive_service().manifest(record.id)
                found[record.id] = set(map(UUID, manifest.builds_on))
    return found


def _with_those_they_need(
    verdicts: dict[UUID, Verdict], builds_on: dict[UUID, set[UUID]]
) -> dict[UUID, Verdict]:
    """Let what is kept keep what it builds on; but what builds on one too old is too old itself."""
    days = get_settings().backup_max_age_days
    too_old = {k for k, each in verdicts.items() if each.reason in (_too_old(days), _PROMISED)}
    for key, needed in builds_on.items():
        if needed & too_old:
            verdicts[key] = replace(verdicts[key], keep=False, reason=_too_old(days))
    for key, needed in builds_on.items():
        if verdicts[key].keep:
            for other in needed & verdicts.keys():
                if not verdicts[other].keep:
                    verdicts[other] = replace(
                        verdicts[other], keep=True, reason="a kept one builds on it"
                    )
    return verdicts


def _too_old(days: int) -> str:
    return f"older than {days} days"


def _judge(
    record: BackupRecord,
    good: list[BackupRecord],
    reasons: list[str],
    rules: KeepRules,
    now: datetime,
) -> tuple[bool, str]:
    days = get_settings().backup_max_age_days
    if record.created_at < now - timedelta(days=days):
        return False, _too_old(days)
    if record.held_until is not None and record.held_until > now:
        return True, f"held until {record.held_until.isoformat(timespec='seconds')}"
    if record in good and _is_last(record, good):
        return True, "the last good one"
    if reasons:
        return True, ", ".join(reasons)
    if not rules.any:
        return True, "no keep rule is set"
    return False, "damaged" if record.error else "kept by no rule"


def _is_last(record: BackupRecord, good: list[BackupRecord]) -> bool:
    """Whether it is the newest good backup, or the newest that was proven to restore."""
    proven = [each for each in good if each.verified_at is not None]
    newest = [max(some, key=lambda each: each.created_at) for some in (good, proven) if some]
    return record in newest


def _refuse_needed(record: BackupRecord, records: list[BackupRecord], now: datetime) -> None:
    if record.status is BackupStatus.RUNNING:
        raise ConflictError(f"backup {record.id} is still being made")
    if record.held_until is not None and record.held_until > now:
        raise ConflictError(f"backup {record.id} is held: release it first")
    complete = [each for each in records if each.status is BackupStatus.COMPLETE]
    others = [each for each in complete if each.error is None and each.id != record.id]
    if record.status is not BackupStatus.COMPLETE or record.error is not None:
        return
    if not others:
        raise ConflictError("this is the last good backup: make another one first")
    if record.verified_at is not None and not any(each.verified_at for each in others):
        raise ConflictError(
            "this is the last backup that was proven to restore: verify another one first"
        )


def _rules() -> KeepRules:
    settings = get_settings()
    return KeepRules(
        settings.backup_keep_last,
        settings.backup_keep_daily,
        settings.backup_keep_weekly,
        settings.backup_keep_monthly,
        settings.backup_keep_yearly,
    )


@lru_cache(maxsize=1)
def get_pruning_service() -> PruningService:
    return PruningService()
