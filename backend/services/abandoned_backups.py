"""What killed processes left of backups: those that were being made, and deletions cut short."""

from uuid import UUID

from sqlalchemy import select

from backend.backup.manifest import delete_backup, gone_ids, stored_ids
from backend.db_utils import session_scope
from backend.errors import BackupDamagedError
from backend.models import BackupRecord, BackupStatus
from backend.services.archive_service import BackupKeyError, get_archive_service, kept_aside
from backend.services.audit_service import ITSELF, get_audit_service
from backend.services.catalogue_service import record_of
from backend.services.certificate_service import get_certificate_service
from backend.services.cluster_service import get_cluster_service, is_used
from backend.services.store_service import signer, store


def settle_abandoned() -> int:
    """
    Say of every backup that is `running` how it ended; return how many there were.

    Whoever holds the lock knows that no other backup is running, whatever records say. One whose
    manifest is stored is a backup: its process died before it wrote that down, or the record came
    with a restore from the backup that was just being made then.
    """
    with session_scope() as session:
        running = select(BackupRecord).where(BackupRecord.status == BackupStatus.RUNNING)
        records = session.scalars(running).all()
        stored = stored_ids(store()) if records else []
        for record in records:
            if str(record.id) in stored:
                try:
                    session.merge(record_of(get_archive_service().manifest(record.id)))
                except (BackupDamagedError, BackupKeyError) as err:
                    record.status, record.error = BackupStatus.FAILED, err.code
            else:
                delete_backup(store(), str(record.id))
                record.status, record.error = BackupStatus.FAILED, "interrupted"
            get_audit_service().record(
                session, "backup_created", ITSELF, outcome=record.error or "done", backup=record.id
            )
    return len(records)


def forget_gone() -> None:
    """Drop records of backups that we have deleted, where that was not written down."""
    gone = gone_ids(store(), signer).keys() - set(stored_ids(store()))
    with session_scope() as session:
        for backup_id in map(UUID, gone):
            if record := session.get(BackupRecord, backup_id):
                session.delete(record)
                get_certificate_service().backup_gone(session, backup_id, kept_aside())
                get_audit_service().record(session, "backup_deleted", ITSELF, backup=backup_id)


def drop_failed() -> None:
    """Remove from pgBackRest's repository what it stored for backups that failed afterwards."""
    if not is_used():
        return
    with session_scope(read_only=True) as session:
        of_failed = select(BackupRecord.id).where(BackupRecord.status == BackupStatus.FAILED)
        failed = set(map(str, session.scalars(of_failed)))
    # Not of one that has a manifest: with the right key, say, it is a backup.
    if failed := failed - set(stored_ids(store())):
        get_cluster_service().drop_failed(failed)
