"""Backups: ours beside restic, borg, pipes and pgBackRest, and beside the stages alone."""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.backup_cluster import Cluster, new_cluster
from benchmarks.backup_contenders import (
    HOLDFAST,
    Contender,
    Holdfast,
    Source,
    in_installation,
    installed,
)
from benchmarks.backup_limits import Limits, PostgresLimits, SqliteLimits
from benchmarks.backup_meter import Watched, spend
from benchmarks.backup_peers import Borg, Pipe, Restic
from benchmarks.backup_postgres_peers import (
    LIVE,
    PgBackRest,
    PostgresHoldfast,
    PostgresPipe,
    archive_environment,
)
from benchmarks.backup_report import (
    PEER_STEPS,
    STAGE,
    START,
    STEPS,
    BackupReport,
    Found,
    figures,
    waiting,
)
from benchmarks.backup_requests import A_SECOND, IDLE_SECONDS, Waits, wait_times
from benchmarks.privacy_server import programs
from benchmarks.processes import MIB, Home

_WHOLE_MIB: Final = 1024
_ROUNDS: Final = 3
# A peer whose first round takes longer has one round less.
_SLOW_SECONDS: Final = 90
_DATA_TYPES: Final = ("BOOKING", "PAYMENT", "INVOICE", "FEEDBACK", "USER")
_SETTINGS: Final = {
    "SCHEDULER_ENABLED": "false",
    # Each step by itself.
    "BACKUP_VERIFY": "off",
    # Longer than the sample goes back: a restore is not to begin with ten years of retention.
    **{f"RETENTION_{kind}_DAYS": "4000" for kind in _DATA_TYPES},
}
_VERSIONS: Final = (
    ("restic", "version"),
    ("borg", "--version"),
    ("zstd", "--version"),
    ("age", "--version"),
    ("pgbackrest", "version"),
    ("sqlite3", "--version"),
)


@dataclass(frozen=True)
class _Part:
    """What one engine's measurement gave."""

    found: Found
    waits: dict[str, Waits]
    notes: Sequence[str]


def measure() -> BackupReport:
    """Measure both engines, each with a database of `BENCH_MIB`."""
    mib = int(os.environ.get("BENCH_MIB", _WHOLE_MIB))
    # Have this unwind as an interrupt does, so that files and servers go.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        home = Home.make(Path(folder))
        home = replace(home, secrets={**home.secrets, **_SETTINGS})
        parts = [_on_sqlite(home, mib)]
        if (tools := programs()) is not None:
            with new_cluster(tools, archive_environment) as cluster:
                parts.append(_on_postgres(home, mib, cluster))
        versions = [*_versions(tools)]
    return BackupReport(
        part="backup" if mib == _WHOLE_MIB else "backup-quick",
        title=f"Backups of {mib:,} MiB beside peers and limits",
        peer="the peer named",
        figures=[
            figure
            for part in parts
            for figure in (*figures(part.found), *waiting(part.found.engine, part.waits))
        ],
        method=(
            f"{_ROUNDS} rounds, in which all take turns, forwards and backwards; wall time until "
            "what was done is on the disk (`fsync` of every file after each tool); CPU time of "
            "all processes, PostgreSQL's included; everything in the page cache and on one disk"
        ),
        notes=[
            *(note for part in parts for note in part.notes),
            *([] if tools else ["left out: there is no PostgreSQL on this machine"]),
            *_NOTES,
            *versions,
        ],
        found=[part.found for part in parts],
    )


_NOTES: Final = (
    (
        "the rows are 40,000 bookings of the sample with all that hangs from them, and copies "
        "that take their sealed cells from other rows; search terms, references and hashes are "
        "random"
    ),
    (
        "ours is `python db_cli.py backup create|verify|restore`, the start of Python and its "
        "imports included; every MiB/s is the database's size over the time; memory is that of "
        "the tool's processes, of all of them together with shared pages counted once"
    ),
    (
        "our `verify` restores into a scratch database and checks that; a peer's reads what it "
        "has stored and checks tags, beside which ours does the same (`BACKUP_VERIFY=read`); what "
        "proves as much as ours is a restore and, on SQLite, the checks (of integrity and foreign "
        "keys)"
    ),
    (
        "our restore proves the backup, keeps every promise made since, keeps the old database, "
        "and swaps under the eyes of users; the peers' writes a file or database beside it, "
        "pgBackRest's a cluster, of which the figure is until a server that runs from it answers"
    ),
    (
        "zstd at level 3 for all; restic's `auto` is its nearest; restic and borg read the file "
        "as it lies, which is no snapshot while somebody writes"
    ),
    (
        f"requests: GET of one person's consents, {A_SECOND} a second on one connection, "
        f"{IDLE_SECONDS} s idle and then for as long as a backup made through the API takes; the "
        "service, its backup and the client share the cores"
    ),
)


def _on_sqlite(home: Home, mib: int) -> _Part:
    source = _filled(home, "sqlite", "SQLite", mib)
    pipes = [Pipe(source, threads) for threads in (1, 2)]
    everybody: list[Contender] = [Holdfast(source), Restic(source), Borg(source), *pipes]
    part = _measured(source, everybody, SqliteLimits(source), [])
    shutil.rmtree(source.folder)
    return part


def _on_postgres(home: Home, mib: int, cluster: Cluster) -> _Part:
    cluster.run(f"CREATE DATABASE {LIVE}")
    home = replace(home, secrets={**home.secrets, "DATABASE_URL": cluster.url(LIVE)})
    source = _filled(home, "postgresql", "PostgreSQL", mib)
    servers: list[Watched] = [cluster]
    with ExitStack() as running:
        physical = [PgBackRest(source, cluster, servers, running, many) for many in (1, 2)]
        pipes = [PostgresPipe(source, cluster, threads) for threads in (1, 2)]
        everybody: list[Contender] = [PostgresHoldfast(source, cluster), *physical, *pipes]
        part = _measured(source, everybody, PostgresLimits(source, cluster), servers)
    notes = [
        f"{one.name}: {statistics.median(one.files_seconds):.1f} s of its restore are the files"
        for one in physical
        if one.files_seconds
    ]
    return replace(part, notes=[*part.notes, *notes])


def _filled(home: Home, data: str, engine: str, mib: int) -> Source:
    made = in_installation(home, data, {"task": "prepare", "mib": mib})
    return Source(home, data, engine, made["mib"], made["rows"])


def _measured(
    source: Source, everybody: Sequence[Contender], limits: Limits, servers: Sequence[Watched]
) -> _Part:
    contenders, missing = installed(everybody)
    limited, missing_limits = installed([limits])
    found = Found(source.engine, source.mib, limits if limited else None)
    for number in range(_ROUNDS):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            if number < _ROUNDS - 1 or not _is_slow(found, contender):
                _take_turn(found, contender, number, servers)
        if limited:
            _measure_limits(found, limits, number, servers)
    notes = [*missing, *missing_limits, *_few(found)]
    notes.append(
        f"{found.median(HOLDFAST, START):.1f} s of every step of ours on {found.engine} are the "
        "start of Python and its imports (`backup list`, which does nothing else)"
    )
    return _Part(found, wait_times(source), notes)


def _is_slow(found: Found, contender: Contender) -> bool:
    steps = found.costs.get(contender.name, {})
    first = sum(rounds[0].seconds for step, rounds in steps.items() if step in STEPS)
    return contender.name != HOLDFAST and first > _SLOW_SECONDS


def _take_turn(found: Found, contender: Contender, number: int, servers: Sequence[Watched]) -> None:
    contender.begin()
    if isinstance(contender, Holdfast):
        found.keep(HOLDFAST, START, number, spend(contender.start, servers))
    # The peers' verification reads; ours proves, and reading is a step of its own.
    for step in STEPS if isinstance(contender, Holdfast) else PEER_STEPS:
        found.keep(contender.name, step, number, spend(getattr(contender, step), servers))
        if step == "create":
            found.stored_mib[contender.name] = contender.stored_bytes() / MIB
    contender.check()
    contender.clear()


def _measure_limits(found: Found, limits: Limits, number: int, servers: Sequence[Watched]) -> None:
    limits.begin()
    for stage, call in limits.stages().items():
        found.keep(stage, STAGE, number, spend(call, servers))
    limits.clear()


def _few(found: Found) -> Iterator[str]:
    for name in found.stored_mib:
        if (count := len(found.costs[name]["create"])) < _ROUNDS:
            yield f"{name} on {found.engine} is slow: {count} rounds"


def _versions(tools: Path | None) -> Iterator[str]:
    server = [(str(tools / "postgres"), "--version")] if tools else []
    said = []
    for program, option in (*_VERSIONS, *server):
        try:
            done = subprocess.run([program, option], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        if version := re.search(r"\d+(\.\d+)+", done.stdout):
            said.append(f"{Path(program).name} {version[0]}")
    yield "versions: " + ", ".join(said)
