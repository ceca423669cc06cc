"""
pgBackRest, driven: for clusters that outgrow logical dumps, and for going back to any moment.

It makes, keeps and restores backups of a whole cluster, and nothing here imitates it. What it does
not do is done around it: its `verify` ends with 0 on damage, its ciphertext is not authenticated
(`digest` is for a signed record of ours), and a restore is none until a server has run on it.
"""

import hashlib
import shutil
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.says import (
    BackupSet,
    Kind,
    Verdict,
    sets_of,
    tablespaces_of,
    verdict_on,
)
from backend.backup.pgbackrest.stanza import Progress, Stanza
from backend.backup.pgbackrest.swap import require_swappable
from backend.errors import (
    BackupDamagedError,
    ConfigurationError,
    ConflictError,
    NotFoundError,
    RefusedError,
    SchemaMismatchError,
    UnavailableError,
)

# Before that, `verify` looks at all backups whatever it is told.
_VERIFIES_ONE: Final = (2, 55)
_ARCHIVE_SECONDS: Final = 30


class Pgbackrest:
    """The backups of *cluster* that lie in *stanza*."""

    def __init__(self, cluster: Cluster, stanza: Stanza) -> None:
        self._cluster = cluster
        self._stanza = stanza

    def prepare(self) -> None:
        """
        Make sure that the cluster is backed up by this stanza; create it where it is missing.

        Raises:
            ConfigurationError: pgBackRest is too old, the passphrase is wrong, nothing would be
                encrypted, WAL is not archived, the stanza is another cluster's, or its directory
                cannot be exchanged.
            UnavailableError: pgBackRest is missing, the server is down, or WAL does not arrive.
        """
        require_swappable(self._cluster)
        if self._stanza.is_configured_by_us:
            # Where we were killed as we removed the only backup, archiving is still stopped.
            self._stanza.run("start")
        # It takes a while, and where there is a backup there is a stanza; an operator may have
        # added another repository, though.
        if not (self._stanza.is_configured_by_us and self.sets()):
            self._stanza.run("stanza-create", *self._server())
        self._archive_all()
        self.sets()

    def create(self, kind: Kind, record_id: UUID, *, progress: Progress | None = None) -> BackupSet:
        """
        Back up the cluster; return when the backup is stored and listed.

        Args:
            kind: Without a backup to build on, pgBackRest makes a full one.
            progress: Is told how many percent are done, as far as pgBackRest says.

        Raises:
            ConflictError: pgBackRest is busy with the stanza.
            ConfigurationError: See `prepare`.
            UnavailableError: The server or the repository fails.
        """
        self._stanza.run(
            "backup", *self._server(), f"--type={kind}", f"--annotation=record={record_id}",
            "--no-expire-auto", meter=progress,
        )  # fmt: skip
        for found in self.sets():
            if found.record == record_id:
                return found
        raise UnavailableError("pgBackRest reports success and lists no such backup")

    def sets(self) -> list[BackupSet]:
        """
        List the backups that are stored whole, oldest first.

        Raises:
            ConfigurationError: The passphrase is wrong, or nothing is encrypted.
            UnavailableError: pgBackRest is missing, or the repository cannot be read.
        """
        return sets_of(self._stanza.run("info", "--output=json").output)

    def get(self, label: str) -> BackupSet:
        """
        Return one backup.

        Raises:
            NotFoundError: No such backup.
        """
        for found in self.sets():
            if found.label == label:
                return found
        raise NotFoundError(f"pgBackRest has no backup {label}")

    def verify(self, label: str) -> Verdict:
        """
        Read every file of a backup, and the WAL that it needs.

        Raises:
            NotFoundError: No such backup.
            BackupDamagedError: Something of it is missing or damaged.
        """
        found = self.get(label)
        if found.damaged_pages:
            raise BackupDamagedError("pages of the cluster were damaged when this backup was made")
        options = ["--output=text", "--verbose", "--log-level-console=detail"]
        if self._stanza.version() >= _VERIFIES_ONE:
            options.append(f"--set={label}")
        said = self._stanza.run("verify", f"--repo={found.repository}", *options).output
        return verdict_on(found, said.decode(errors="replace"))

    def digest(self, label: str) -> str:
        """
        Return the SHA-256 of a backup's manifest, as hex.

        The manifest names a checksum for each file, and is never written again; a signed record
        of this digest is what the repository's own cipher lacks.

        Raises:
            NotFoundError: No such backup.
            BackupDamagedError: The manifest cannot be decrypted.
        """
        found, hasher = self.get(label), hashlib.sha256()
        path = f"backup/{self._stanza.name}/{label}/backup.manifest"
        self._stanza.run("repo-get", f"--repo={found.repository}", path, take=hasher.update)
        return hasher.hexdigest()

    def restore(
        self,
        label: str | None,
        into: Path,
        *,
        target_time: datetime | None = None,
        now: datetime | None = None,
        progress: Progress | None = None,
    ) -> BackupSet:
        """
        Restore a backup into an empty directory, ready for `private_server` to recover it.

        Args:
            label: Without it the newest is taken, or the newest that ended before *target_time*.
            into: What `Cluster.new_directory` made; cleared away on any error.
            target_time: Recover what was committed up to then, on the backup's own timeline;
                without it, the state at the end of the backup.

        Raises:
            NotFoundError: No such backup, or none at all.
            RefusedError: *target_time* is in the future, or before the end of the backup.
            SchemaMismatchError: The backup is of another major version of PostgreSQL.
            BackupDamagedError: A file is missing or not what the manifest says.
        """
        try:
            found = self._choose(label, target_time, now or datetime.now(UTC))
            is_ours = self._is_of_live_cluster(found)
            if target_time is not None and is_ours and self._cluster.postmaster():
                self._archive_up_to_now()
            self._restore(found, into, target_time, progress)
            if is_ours:
                self._cluster.bring_histories(into)
        except BaseException:
            shutil.rmtree(into, ignore_errors=True)
            raise
        return found

    def expire(self, label: str) -> None:
        """
        Remove a backup, and the WAL that is older than every backup that is left.

        Raises:
            NotFoundError: No such backup.
            ConflictError: Others build on it.
        """
        found, others = self.get(label), [s for s in self.sets() if s.label != label]
        others = [other for other in others if other.repository == found.repository]
        if any(label in other.references for other in others):
            raise ConflictError(f"other backups build on {label}: remove them first")
        if others:
            full = sum(other.kind is Kind.FULL for other in others)
            # Left to itself, pgBackRest keeps the WAL of what was removed for good.
            archive = f"--repo{found.repository}-retention-archive"
            self._stanza.run(
                "expire", f"--repo={found.repository}", f"--set={label}",
                f"{archive}={full}", f"{archive}-type=full",
            )  # fmt: skip
        else:
            self._empty(found.repository)
        if any(stored.label == label for stored in self.sets()):
            raise UnavailableError(f"pgBackRest did not remove {label}")

    def _empty(self, repository: int) -> None:
        """Remove all: pgBackRest lets go of its only full backup in no other way."""
        self._stanza.run("stop")
        try:
            self._stanza.run("stanza-delete", f"--repo={repository}", "--force")
        finally:
            self._stanza.run("start")
        if self._cluster.postmaster() is not None:
            # Until there is a stanza, the server keeps all of its WAL.
            self._stanza.run("stanza-create", *self._server())

    def _choose(self, label: str | None, target: datetime | None, now: datetime) -> BackupSet:
        if target is not None and (target.tzinfo is None or target > now):
            raise RefusedError("the target time is in the future, or of no time zone")
        stored = [self.get(label)] if label else self.sets()
        # Its end is known to the second.
        fit = [s for s in stored if not target or s.stopped_at + timedelta(seconds=1) <= target]
        if not stored:
            raise NotFoundError("pgBackRest has no backup yet")
        if not fit:
            raise RefusedError("the target time is before the end of the backup")
        newest = max(fit, key=lambda found: found.stopped_at)
        if newest.version != self._cluster.version:
            raise SchemaMismatchError(
                f"the backup is of PostgreSQL {newest.version}, "
                f"the cluster of {self._cluster.version}"
            )
        return newest

    def _is_of_live_cluster(self, found: BackupSet) -> bool:
        with suppress(BackupDamagedError):
            return found.system_id == self._cluster.system_id
        # What lives here now is broken, and may well be why somebody restores.
        return False

    def _archive_up_to_now(self) -> None:
        """
        Bring all WAL until now into the repository.

        The last commits may not be there yet; and a recovery stops at a moment only if it finds
        a commit behind it, which an idle cluster has not made.
        """
        self._cluster.ask("SELECT pg_logical_emit_message(true, 'holdfast', '')")
        self._archive_all()

    def _archive_all(self) -> None:
        server = self._server()
        try:
            self._stanza.run("check", *server, f"--archive-timeout={_ARCHIVE_SECONDS}")
        except ConfigurationError as err:
            raise ConfigurationError(
                f"{err.detail}; set archive_mode = on and archive_command = "
                f"'{self._stanza.archive_command}', and restart the server"
            ) from None

    def _restore(
        self, found: BackupSet, into: Path, target: datetime | None, progress: Progress | None
    ) -> None:
        which = [f"--repo={found.repository}", f"--set={found.label}"]
        if tablespaces_of(self._stanza.run("info", "--output=json", which[1]).output):
            raise RefusedError("the backup has tablespaces, which cannot be restored beside")
        aim = ["--type=immediate"]
        if target is not None:
            moment = target.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00")
            # Another timeline may have left this one before the backup was made.
            aim = ["--type=time", f"--target={moment}", "--target-timeline=current"]
        self._stanza.run(
            "restore", *which, *aim, f"--pg1-path={into}", "--target-action=promote",
            "--archive-mode=off", meter=progress,
        )  # fmt: skip

    def _server(self) -> list[str]:
        """Say where the live server listens, where the operator's configuration does not."""
        server = self._cluster.postmaster()
        if server is None:
            raise UnavailableError(f"the server of {self._cluster.data} does not run")
        if not self._stanza.is_configured_by_us:
            return []
        if not server.socket_folder:
            raise ConfigurationError("pgBackRest needs the server to listen on a socket")
        return [f"--pg1-port={server.port}", f"--pg1-socket-path={server.socket_folder}"]
