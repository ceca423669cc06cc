"""Our own backups: one consistent dump of the database, compressed, sealed and stored."""

from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import select

from backend.backup.archive import Written, decrypted
from backend.backup.database import Snapshot
from backend.backup.escrow import read_recipient, wrap
from backend.backup.manifest import Manifest, archive_name, header_name, write_manifest
from backend.backup.pgbackrest.says import Kind
from backend.crypto import keyring
from backend.crypto.files import Sealer
from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import BackupRecord, Base, EncryptionKey
from backend.services.archive_service import (
    as_damage,
    get_archive_service,
    live_database,
    lock_descriptors,
)
from backend.services.audit_service import Actor, get_audit_service
from backend.services.cluster_service import get_cluster_service, is_used
from backend.services.encryption_service import get_encryption_service
from backend.services.store_service import addresses, signer, store
from backend.services.transfer_service import Progress, get_transfer_service


class DumpService:
    """Makes archives in the store."""

    def write(self, record: BackupRecord, kind: Kind, progress: Progress) -> Manifest:
        """
        Back up the database as *record* says; the manifest, written last, makes it exist.

        Raises:
            UnavailableError: The store or the dump tool fails.
        """
        backup_id = str(record.id)
        # Before the snapshot: a key that is first used while it is taken is not in it.
        key_id, row_keys = keyring.current().primary.key_id.hex(), _keys_in_use()
        previous = get_archive_service().newest()
        if is_used():
            return get_cluster_service().write(record, kind, previous, row_keys, progress)
        meta = {"kind": "backup", "backup": backup_id}
        sealer = Sealer(meta, [get_encryption_service().file_lock()], now=record.created_at)
        tables = [table.name for table in Base.metadata.sorted_tables]
        with live_database().snapshot(tables) as snapshot:
            with store().create(header_name(backup_id)) as file:
                file.write(sealer.header)
            written = _carry(snapshot, archive_name(backup_id), sealer, progress)
        manifest = Manifest(
            id=backup_id,
            label=record.label,
            created_at=record.created_at.isoformat(),
            engine=live_database().engine_name,
            schema_revision=snapshot.schema_revision,
            tables=dict(snapshot.tables),
            plain_bytes=written.plain_bytes,
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            previous=previous.reference() if previous else None,
            key_id=key_id,
            row_keys=row_keys,
        )
        write_manifest(store(), manifest, signer(key_id))
        return manifest

    def copy_out(self, manifest: Manifest, recipient: Path, out: BinaryIO, actor: Actor) -> str:
        """
        `wrap_copy` for somebody who takes it away: recorded with the key that opens it, and first.

        Manages its own transactions.
        """
        fingerprint = read_recipient(recipient)
        self._tell_copied(manifest, fingerprint, actor, "begun")
        written = self.wrap_copy(manifest, recipient, out)
        self._tell_copied(manifest, written, actor, "done")
        return written

    def _tell_copied(self, manifest: Manifest, recipient: str, actor: Actor, outcome: str) -> None:
        with session_scope() as session:
            get_audit_service().record(
                session, "backup_copied", actor, outcome=outcome, backup=manifest.id,
                recipient=recipient,
            )  # fmt: skip

    def wrap_copy(self, manifest: Manifest, recipient: Path, out: BinaryIO) -> str:
        """
        Write a copy to *out* that the holder of a GPG key opens without us, still compressed.

        Args:
            recipient: File with the one public key.

        Returns:
            The key's fingerprint.

        Raises:
            ConfigurationError: gpg is missing, or this is no such file; nothing was written.
            BackupDamagedError: The backup is not what its manifest says.
        """
        if manifest.repository_label is not None:
            raise RefusedError("a backup of pgBackRest is no dump: copy its repository instead")
        archives = get_archive_service()
        with as_damage():
            key, _ = archives.key(manifest)
            return wrap(decrypted(store(), archives.stored(manifest), key), recipient, out)


def _carry(snapshot: Snapshot, name: str, sealer: Sealer, progress: Progress) -> Written:
    return get_transfer_service().write(
        addresses()[0],
        name,
        snapshot.source,
        sealer.payload,
        size_bytes=snapshot.size_bytes,
        require_whole=snapshot.require_whole,
        report=lambda done: progress(done, snapshot.size_bytes),
        keep_open=lock_descriptors(),
    )


def _keys_in_use() -> list[str]:
    with session_scope(read_only=True) as session:
        in_use = select(EncryptionKey.key_id).where(EncryptionKey.disabled_at.is_(None))
        return sorted(session.scalars(in_use))


@lru_cache(maxsize=1)
def get_dump_service() -> DumpService:
    return DumpService()
