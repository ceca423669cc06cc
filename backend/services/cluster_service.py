"""Backups of a whole PostgreSQL cluster by pgBackRest, kept in our list and with our promises."""

import base64
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Final

import structlog

from backend.backup.manifest import Manifest, header_name, write_manifest
from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.database import ClusterDatabase
from backend.backup.pgbackrest.repository import Pgbackrest
from backend.backup.pgbackrest.says import BackupSet, Kind
from backend.backup.pgbackrest.stanza import Stanza
from backend.backup.pgbackrest.swap import recover
from backend.backup.storage import Store
from backend.crypto import keyring
from backend.crypto.files import Sealer
from backend.crypto.keyring import KEY_ID_BYTES
from backend.crypto.values import Scope
from backend.db_utils import get_engine
from backend.errors import ConfigurationError, ConflictError, HoldfastError, NotFoundError
from backend.models import BackupRecord
from backend.services.encryption_service import get_encryption_service
from backend.services.schema_service import get_schema_service
from backend.services.store_service import signer, store, stores
from backend.services.transfer_service import Progress
from backend.settings import BackupEngine, get_settings

log = structlog.get_logger(__name__)
ENGINE: Final = ClusterDatabase.engine_name
_SCOPE: Final = Scope("pgbackrest")
_OBJECT: Final = "pgbackrest.enc"
_MAX_BYTES: Final = 1024


class ClusterService:
    """Makes backups with pgBackRest; what it stores is its own, and a signed record of it ours."""

    def database(self) -> ClusterDatabase:
        """
        Return the cluster of `PGBACKREST_CLUSTER`.

        Raises:
            ConfigurationError: It is none, or this process may not drive it.
        """
        cluster = _cluster()
        return ClusterDatabase(get_engine(), cluster, lambda: self._repository_of(cluster))

    def _repository_of(self, cluster: Cluster) -> Pgbackrest:
        settings = get_settings()
        stanza = Stanza(
            cluster,
            settings.pgbackrest_stanza,
            self._passphrase(),
            repository=None if settings.pgbackrest_config else _repository(),
            config=settings.pgbackrest_config,
        )
        return Pgbackrest(cluster, stanza)

    def write(
        self,
        record: BackupRecord,
        kind: Kind,
        previous: Manifest | None,
        row_keys: list[str],
        progress: Progress,
    ) -> Manifest:
        """
        Back up the cluster as *record* says; the manifest, written last, makes it a backup.

        Raises:
            ConfigurationError: The server or pgBackRest is not set up for it; says how.
            UnavailableError: The server or the repository fails.
        """
        database, backup_id = self.database(), str(record.id)
        revision = get_schema_service().revision(get_engine()) or ""
        database.repository.prepare()
        made = database.repository.create(
            kind, record.id, progress=lambda percent: progress(int(percent), 100)
        )
        meta = {"kind": "backup", "backup": backup_id}
        # It has no payload of ours; it carries the keys that the rows need after a rotation.
        sealer = Sealer(meta, [get_encryption_service().file_lock()], now=record.created_at)
        with store().create(header_name(backup_id)) as file:
            file.write(sealer.header)
        key_id = keyring.current().primary.key_id.hex()
        manifest = Manifest(
            id=backup_id,
            label=record.label,
            created_at=record.created_at.isoformat(),
            engine=ENGINE,
            schema_revision=revision,
            tables={},
            plain_bytes=made.database_bytes,
            size_bytes=made.size_bytes,
            sha256=database.repository.digest(made.label),
            previous=previous.reference() if previous else None,
            kind=made.kind,
            repository_label=made.label,
            builds_on=_records_of(made, database.repository.sets()),
            key_id=key_id,
            row_keys=row_keys,
        )
        write_manifest(store(), manifest, signer(key_id))
        return manifest

    def delete(self, backup_id: str) -> None:
        """
        Remove a backup from the repository; one that is gone already is no error.

        Raises:
            ConflictError: Others build on it.
        """
        self._expire({backup_id})

    def drop_failed(self, backup_ids: set[str]) -> None:
        """Remove what pgBackRest stored for backups that failed afterwards, if nothing needs it."""
        try:
            self._expire(backup_ids)
        except HoldfastError as err:
            # The next backup tries again.
            log.warning("failed_backup_not_removed", code=err.code)

    def _expire(self, backup_ids: set[str]) -> None:
        repository = self.database().repository
        # Newest first: a later one may build on an earlier one.
        for found in reversed(repository.sets()):
            if str(found.record) in backup_ids:
                repository.expire(found.label)

    def reseal(self) -> None:
        """Seal the passphrase anew with the primary key, in every store that has it."""
        for where in stores():
            if sealed := _read(where):
                cipher = keyring.current().cipher(_SCOPE)
                plain = cipher.open(sealed, _OBJECT.encode())
                where.replace(_OBJECT, cipher.seal(plain, _OBJECT.encode()))

    def key_id(self) -> str | None:
        """Return which key the passphrase says it is sealed with, if there is one."""
        sealed = _read(store())
        return sealed[1 : 1 + KEY_ID_BYTES].hex() if sealed else None

    def _passphrase(self) -> str:
        """
        Return the repository's passphrase; at first it is derived from the primary key.

        pgBackRest cannot change it, so it is kept, sealed, and outlives that key.
        """
        cipher = keyring.current().cipher(_SCOPE)
        if sealed := _read(store()):
            return cipher.open(sealed, _OBJECT.encode()).decode()
        derived = keyring.current().primary.derive("pgbackrest repository")
        passphrase = base64.urlsafe_b64encode(derived).decode().rstrip("=")
        try:
            with store().create(_OBJECT) as file:
                file.write(cipher.seal(passphrase.encode(), _OBJECT.encode()))
        except ConflictError:
            # Another process was first.
            return self._passphrase()
        return passphrase


def recover_cluster() -> None:
    """
    Finish a swap of clusters that was cut; the server may be stopped, and no key is needed.

    Raises:
        UnavailableError: The server does not start.
    """
    if recover(_cluster()):
        log.warning("cluster_swap_finished")


def _cluster() -> Cluster:
    settings = get_settings()
    if settings.pgbackrest_cluster is None:
        raise ConfigurationError("PGBACKREST_CLUSTER is not set: the data directory")
    return Cluster(
        settings.pgbackrest_cluster,
        superuser=settings.pgbackrest_superuser,
        password=get_engine().url.password,
        start_command=shlex.split(settings.pgbackrest_start_command or ""),
        stop_command=shlex.split(settings.pgbackrest_stop_command or ""),
    )


def is_known() -> bool:
    """Whether there is a cluster that pgBackRest has backed up, or may have."""
    return get_settings().pgbackrest_cluster is not None


def is_used() -> bool:
    """Whether new backups are made by pgBackRest."""
    return get_settings().backup_engine is BackupEngine.PGBACKREST


def _records_of(made: BackupSet, sets: list[BackupSet]) -> list[str]:
    """Our own ids of the backups that *made* builds on."""
    return [str(one.record) for one in sets if one.label in made.references and one.record]


def _repository() -> Path:
    settings = get_settings()
    return settings.pgbackrest_repository or settings.data_dir.absolute() / "pgbackrest"


def _read(where: Store) -> bytes | None:
    try:
        return where.read(_OBJECT, _MAX_BYTES)
    except NotFoundError:
        return None


@lru_cache(maxsize=1)
def get_cluster_service() -> ClusterService:
    return ClusterService()
