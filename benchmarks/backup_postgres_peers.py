"""Who is compared, on PostgreSQL: ours, `pg_dump` on a pipe, and pgBackRest."""

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.backup_cluster import NO_ARCHIVE, Cluster, running
from benchmarks.backup_contenders import Holdfast, Source, size_of
from benchmarks.backup_meter import Place, Watched, make_durable
from benchmarks.backup_peers import Pipe

LIVE: Final = "holdfast"
_FRESH: Final = "fresh"
_STANZA: Final = "bench"


def count_rows(cluster: Cluster, database: str, source: Source) -> dict[str, int]:
    counts = (f"SELECT '{table}', count(*) FROM {table}" for table in source.rows)  # noqa: S608 - ours
    return dict(cluster.run(" UNION ALL ".join(counts), database))


class PostgresHoldfast(Holdfast):
    def __init__(self, source: Source, cluster: Cluster) -> None:
        super().__init__(source)
        self._cluster = cluster

    def check(self) -> None:
        self.source.require_rows(count_rows(self._cluster, LIVE, self.source), self.name)

    def clear(self) -> None:
        # The next restore is again one over the database that was backed up.
        ((kept,),) = self._cluster.run(
            f"SELECT datname FROM pg_database WHERE datname LIKE '{LIVE}\\_before\\_%'"  # noqa: S608 - ours
        )
        self._cluster.run(f"DROP DATABASE {LIVE} WITH (FORCE)")
        self._cluster.run(f"ALTER DATABASE {kept} RENAME TO {LIVE}")
        shutil.rmtree(self._store)
        self._cluster.run("CHECKPOINT")


class PostgresPipe(Pipe):
    """`pg_dump -Fc -Z0`, `zstd -3`, `age`, and back into a fresh database in one transaction."""

    programs: Sequence[str] = ("zstd", "age", "age-keygen")
    _copier = "pg_dump"

    def __init__(self, source: Source, cluster: Cluster, threads: int) -> None:
        super().__init__(source, threads)
        self._cluster = cluster

    def create(self) -> None:
        self.store(dumping(self._cluster, LIVE))

    def restore(self) -> None:
        self._cluster.run(f"CREATE DATABASE {_FRESH} TEMPLATE template0")
        self.place.run(*self.opened(), loading(self._cluster, _FRESH))

    def check(self) -> None:
        self.source.require_rows(count_rows(self._cluster, _FRESH, self.source), self.name)

    def clear(self) -> None:
        super().clear()
        self._cluster.run(f"DROP DATABASE {_FRESH} WITH (FORCE)")
        self._cluster.run("CHECKPOINT")


def dumping(cluster: Cluster, database: str) -> list[str | Path]:
    """Spell the command that writes a dump of *database* to its standard output."""
    return [cluster.tools / "pg_dump", "-Fc", "-Z0", "-d", cluster.url(database)]


def loading(cluster: Cluster, database: str, *options: str) -> list[str | Path]:
    """Spell the command that fills *database* from a dump on its standard input."""
    one_or_nothing = ("--exit-on-error", "--single-transaction", "--no-owner")
    tool = cluster.tools / "pg_restore"
    return [tool, *one_or_nothing, *options, "-d", cluster.url(database)]


def archive_environment(folder: Path) -> dict[str, str]:
    """
    Settings of pgBackRest, of which the server's `archive_command` needs the same.

    Args:
        folder: The cluster's owner may write there.
    """
    return {
        "PGBACKREST_STANZA": _STANZA,
        # Whatever the machine is set up for is not ours.
        "PGBACKREST_CONFIG": os.devnull,
        "PGBACKREST_PG1_PATH": str(folder / "data"),
        "PGBACKREST_PG1_SOCKET_PATH": str(folder),
        "PGBACKREST_PG1_USER": "postgres",
        "PGBACKREST_REPO1_PATH": str(folder / "repository"),
        "PGBACKREST_REPO1_CIPHER_TYPE": "aes-256-cbc",
        "PGBACKREST_REPO1_CIPHER_PASS": secrets.token_urlsafe(),
        # Faster here: a cluster has a thousand files of a page or two.
        "PGBACKREST_REPO1_BUNDLE": "y",
        "PGBACKREST_COMPRESS_TYPE": "zst",
        "PGBACKREST_COMPRESS_LEVEL": "3",
        # Not to wait for the next checkpoint, which may be minutes off.
        "PGBACKREST_START_FAST": "y",
        "PGBACKREST_LOG_LEVEL_FILE": "off",
        "PGBACKREST_LOCK_PATH": str(folder / "lock"),
        "PGBACKREST_SPOOL_PATH": str(folder / "spool"),
    }


class PgBackRest:
    """A full backup of the cluster; restored is where a server that runs from it answers."""

    programs: Sequence[str] = ("pgbackrest",)

    def __init__(
        self,
        source: Source,
        cluster: Cluster,
        servers: list[Watched],
        running_servers: ExitStack,
        processes: int,
    ) -> None:
        self.name = f"pgBackRest, {processes} process{'es' if processes > 1 else ''}"
        self.source = source
        self._cluster = cluster
        self._environment = {**cluster.environment, "PGBACKREST_PG1_PORT": str(cluster.port)}
        self._servers = servers
        self._many = f"--process-max={processes}"
        self._restored = cluster.folder / "restored"
        self._repository = Path(cluster.environment["PGBACKREST_REPO1_PATH"])
        # Ended with the round, or with whatever ends the measurement before.
        self._running = running_servers.enter_context(ExitStack())
        # Of each restore, without the start of the server.
        self.files_seconds: list[float] = []

    def begin(self) -> None:
        self._run("stanza-create")
        self._cluster.archive_with("pgbackrest archive-push %p")
        # It waits until a segment has been archived, so the command above is in force.
        self._run("check")
        self._restored.mkdir(0o700)
        if self._cluster.user:
            os.chown(self._restored, self._cluster.user["user"], self._cluster.user["group"])

    def create(self) -> None:
        self._run("backup", "--type=full", self._many)
        make_durable(self._repository)

    def verify(self) -> None:
        # It exits with 0 whatever it finds.
        said = self._run("verify", "--output=text", "--verbose", self._many)
        if "status: ok" not in said:
            raise RuntimeError(f"pgBackRest's verify said: {said}")

    def restore(self) -> None:
        started = time.perf_counter()
        where = f"--pg1-path={self._restored}"
        # The end of the backup is enough; and this copy archives nothing.
        how = ("--type=immediate", "--target-action=promote", "--archive-mode=off")
        self._run("restore", where, *how, self._many)
        make_durable(self._restored)
        self.files_seconds.append(time.perf_counter() - started)
        server = self._running.enter_context(
            running(self._restored, self._cluster.tools, self._cluster.user, self._environment, {})
        )
        self._servers.append(server)
        self._answering = server

    def stored_bytes(self) -> int:
        return size_of(self._repository)

    def check(self) -> None:
        self.source.require_rows(count_rows(self._answering, LIVE, self.source), self.name)

    def clear(self) -> None:
        self._cluster.archive_with(NO_ARCHIVE)
        self._servers.remove(self._answering)
        self._running.close()
        for folder in (self._restored, self._repository):
            shutil.rmtree(folder)
        self._cluster.run("CHECKPOINT")

    def _run(self, command: str, *options: str) -> str:
        place = Place(self._cluster.folder, self._environment, self._cluster.user)
        return place.run(["pgbackrest", *options, command])
