"""
A cluster as backups see it: restored by pgBackRest into a directory beside, run there in private.

What a restore does to a database that was rebuilt from a dump, it does to this one by the same
means; only building it and putting it in place are different.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Final

from sqlalchemy import URL, Engine, text

from backend.backup.database import Still
from backend.backup.pgbackrest import roles, swap
from backend.backup.pgbackrest.cluster import Cluster
from backend.backup.pgbackrest.private_server import PrivateServer, private_server
from backend.backup.pgbackrest.repository import Pgbackrest
from backend.backup.pgbackrest.stanza import Progress
from backend.backup.postgres import PostgresDatabase
from backend.db_utils import make_engine
from backend.errors import BackupDamagedError, NotFoundError


class ClusterDatabase:
    """The database of *live*, whose cluster lies on this machine."""

    engine_name: Final = "pgbackrest"

    def __init__(
        self, live: Engine, cluster: Cluster, repository: Callable[[], Pgbackrest]
    ) -> None:
        self._live = live
        self._cluster = cluster
        self._open_repository = repository
        self._running: dict[Engine, tuple[Path, PrivateServer, ExitStack]] = {}

    @cached_property
    def repository(self) -> Pgbackrest:
        """Opened where it is needed: what lies beside the cluster can be seen without its key."""
        return self._open_repository()

    def lock(self) -> AbstractContextManager[None]:
        """See `Database`."""
        return PostgresDatabase(self._live).lock()

    def restore(
        self, label: str, digest: str, target_time: datetime | None, progress: Progress
    ) -> Engine:
        """
        Restore the backup *label* into a directory beside, and run a server on it.

        Args:
            digest: Of the backup's manifest in the repository, from our own signed record.
            target_time: Recover what was committed up to then.

        Raises:
            BackupDamagedError: It is not the backup of the record, or does not recover.
            RefusedError: It cannot reach *target_time*.
        """
        self._require(label, digest)
        into = self._cluster.new_directory()
        self.repository.restore(label, into, target_time=target_time, progress=progress)
        return self._run(into)

    def read_through(self, label: str, digest: str) -> None:
        """
        Read every file of a backup, and the WAL that it needs.

        Raises:
            BackupDamagedError: It is not the backup of the record, or something of it is missing.
        """
        self._require(label, digest)
        self.repository.verify(label)

    def _require(self, label: str, digest: str) -> None:
        """Make sure that what lies under *label* is what our record was signed for."""
        try:
            found = self.repository.digest(label)
        except NotFoundError:
            raise BackupDamagedError("the repository does not have the backup any more") from None
        if found != digest:
            raise BackupDamagedError("the repository's backup is not the one of our record")

    def reopen(self, moment: datetime) -> Engine:
        """Run a server on a copy of what a swap at *moment* kept aside."""
        into = self._cluster.new_directory()
        swap.copy_kept(self._cluster, moment, into)
        return self._run(into)

    def _run(self, directory: Path) -> Engine:
        stack = ExitStack()
        try:
            server = stack.enter_context(private_server(self._cluster, directory))
            roles.carry_over(self._cluster, server)
            built = make_engine(self._url_on(server).render_as_string(hide_password=False))
        except BaseException:
            stack.close()
            self._cluster.clear_directory(directory)
            raise
        self._running[built] = (directory, server, stack)
        return built

    def _url_on(self, server: PrivateServer) -> URL:
        """As the service's own role: what migrations make there must be that role's, too."""
        live = self._live.url
        url = server.url(str(live.database), live.username or self._cluster.superuser)
        options = live.query.get("options")
        return url.update_query_dict({"options": options}) if options else url

    def check(self, built: Engine) -> None:
        """Raise unless it answers; pgBackRest has compared every file, and recovery every page."""
        with built.connect() as connection:
            connection.execute(text("SELECT 1"))

    def swap(self, built: Engine, at: datetime, still: Still) -> str:
        """Put the restored cluster in the place of the live one; see `swap`."""
        directory, server, stack = self._running[built]
        built.dispose()
        # Once more: somebody may have been shut out meanwhile.
        roles.carry_over(self._cluster, server)
        server.stop()
        stack.close()
        # From here on it may be the old cluster that lies in this directory.
        del self._running[built]
        try:
            with still():
                return str(swap.swap(self._cluster, directory, at))
        except BaseException:
            if not swap.is_unfinished(self._cluster):
                self._cluster.clear_directory(directory)
            raise

    def discard(self, built: Engine) -> None:
        """Stop the private server and remove its directory."""
        built.dispose()
        if built in self._running:
            directory, _, stack = self._running.pop(built)
            stack.close()
            self._cluster.clear_directory(directory)

    def previous(self) -> list[datetime]:
        """When the old clusters that are still kept aside were."""
        return [moment for _, moment in swap.kept(self._cluster)]

    def forget_previous(self, before: datetime) -> int:
        """Remove old clusters that swaps before *before* have kept aside; return how many."""
        return swap.forget_previous(self._cluster, before)

    def recover(self) -> int:
        """Finish a swap that was cut, and start the server that it had stopped."""
        return swap.recover(self._cluster)

    def sweep(self) -> int:
        """Remove what a killed restore left; return how many."""
        return swap.sweep(self._cluster)
