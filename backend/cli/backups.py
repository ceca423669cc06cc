"""Commands for backups."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from backend.backup.pgbackrest.says import Kind
from backend.cli import FAILED
from backend.cli.showing import (
    AsJson,
    DryRun,
    print_json,
    print_table,
    progress,
    refuse_new,
    show,
    show_rows,
    waiting,
    warn,
    write_new_with,
)
from backend.db_utils import session_scope
from backend.errors import ConfigurationError, ConflictError, RefusedError
from backend.models import BackupRecord
from backend.services.archive_service import get_archive_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.catalogue_service import get_catalogue_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.dump_service import get_dump_service
from backend.services.pruning_service import get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.restored import Restored
from backend.services.setup_service import get_setup_service
from backend.services.store_service import using_store
from backend.settings import get_settings

app = typer.Typer(help="Backups: make, list, prove, restore.", no_args_is_help=True)
From = Annotated[
    str | None, typer.Option("--from", help="A store that is not BACKUP_URL: folder or s3://….")
]


@app.command()
def create(
    *,
    label: Annotated[str | None, typer.Option()] = None,
    kind: Annotated[
        Kind, typer.Option("--type", help="Other than full where pgBackRest makes it.")
    ] = Kind.FULL,
    as_json: AsJson = False,
) -> None:
    """Back up the database, and look at the backup as BACKUP_VERIFY says."""
    get_setup_service().open()
    with progress("backing up") as bar:
        record = get_backup_service().create(COMMAND_LINE, label, kind=kind, progress=bar)
    show(_facts(record), as_json=as_json)


@app.command("list")
def list_backups(*, as_json: AsJson = False) -> None:
    """List the backups, newest first, and say which are not what they should be."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        records = get_catalogue_service().records(session)
        breaks = get_catalogue_service().breaks(session)
        proven = get_catalogue_service().age(session).newest_proven
    rows = [_facts(record) for record in records]
    if as_json:
        print_json({"items": rows, "breaks": breaks, "newest_proven_at": proven})
        return
    show_rows(rows, as_json=False)
    print(f"newest backup that was proven to restore: {proven or 'none'}")
    for each in breaks:
        warn(f"backup {each.backup_id} {each.why}")


@app.command()
def verify(backup_id: UUID, *, as_json: AsJson = False) -> None:
    """Prove that a backup restores: rebuild it beside, check it, drop it."""
    get_setup_service().open()
    with progress("verifying") as bar:
        record = get_backup_service().verify(backup_id, COMMAND_LINE, progress=bar)
    show(_facts(record), as_json=as_json)


@app.command()
def restore(
    backup_id: Annotated[UUID | None, typer.Argument(help="The newest one without it.")] = None,
    *,
    dry_run: DryRun = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Replace the live database.")] = False,
    confirm_empty: Annotated[
        bool, typer.Option("--confirm-empty", help="Also where that empties tables.")
    ] = False,
    at: Annotated[
        datetime | None,
        typer.Option(
            "--at",
            help="A moment (of TIMEZONE); from a backup of pgBackRest.",
            formats=["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"],
        ),
    ] = None,
    from_: From = None,
    to: Annotated[
        str | None, typer.Option("--to", help="A new file or database, for a look at the backup.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Restore a backup and keep every promise made since; on a new machine, too."""
    if to is not None and (dry_run or confirm):
        raise RefusedError("--to leaves the live database alone: no --dry-run or --confirm with it")
    if to is not None and at is not None:
        raise RefusedError("--to takes a backup as it is: no --at with it")
    if not (to or dry_run or confirm):
        raise RefusedError("a restore replaces the live database: add --confirm, or --dry-run")
    with _store(from_), progress("restoring") as bar:
        if to is not None:
            restored = get_restore_service().restore_to(backup_id, COMMAND_LINE, to, progress=bar)
        else:
            restored = get_restore_service().restore(
                backup_id, COMMAND_LINE, dry_run=dry_run, confirm=confirm,
                confirm_empty=confirm_empty, progress=bar,
                target_time=None if at is None else at.replace(tzinfo=get_settings().zone),
            )  # fmt: skip
    if from_ is not None and confirm:
        # The ledger and the list of backups must be where this installation looks for them.
        get_restore_service().finish_ledger()
        with suppress(ConflictError):
            get_backup_service().recover()
        get_checkpoint_service().make_if_possible()
    _show_restored(restored, as_json=as_json)


@app.command()
def undo(
    *,
    dry_run: DryRun = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Replace the live database.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the database back that the last restore has kept aside, and keep every promise since."""
    get_setup_service().open()
    with waiting("restoring"):
        restored = get_restore_service().undo(COMMAND_LINE, dry_run=dry_run, confirm=confirm)
    _show_restored(restored, as_json=as_json)


@app.command()
def delete(backup_id: UUID) -> None:
    """Delete a backup; the last good one, and one that is held, stay."""
    get_setup_service().open()
    get_pruning_service().delete(backup_id, COMMAND_LINE)


@app.command()
def hold(
    backup_id: UUID,
    *,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"])] = None,
    release: Annotated[bool, typer.Option("--release")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a backup from being deleted until a day (of TIMEZONE), or release it."""
    if (until is None) != release:
        raise RefusedError("give either --until DAY or --release")
    get_setup_service().open()
    end = None if until is None else until.replace(tzinfo=get_settings().zone)
    with session_scope() as session:
        record = get_pruning_service().hold(session, backup_id, COMMAND_LINE, end)
    show(_facts(record), as_json=as_json)


@app.command()
def prune(*, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Delete what no BACKUP_KEEP_… rule keeps or BACKUP_MAX_AGE_DAYS ends; say why of each."""
    get_setup_service().open()
    verdicts = get_pruning_service().prune(COMMAND_LINE, dry_run=dry_run)
    gone = "would go" if dry_run else "deleted"
    show_rows(
        [
            {
                "backup": str(verdict.backup_id),
                "created_at": verdict.created_at,
                "verdict": "kept" if verdict.keep else gone,
                "why": verdict.reason,
            }
            for verdict in verdicts
        ],
        as_json=as_json,
    )


@app.command()
def sync(*, as_json: AsJson = False) -> None:
    """Make all stores of BACKUP_URL hold the same."""
    get_setup_service().open()
    synced = get_backup_service().copy()
    show(asdict(synced), as_json=as_json)
    if synced.failed:
        raise typer.Exit(FAILED)


@app.command("copy")
def copy_out(
    backup_id: UUID,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new file.")],
    recipient: Annotated[
        Path | None, typer.Option(help="File with one GPG public key; or BACKUP_GPG_RECIPIENT.")
    ] = None,
) -> None:
    """Write a copy for the holder of a GPG key: `gpg -d FILE | zstd -d` gives the dump."""
    key_file = recipient or get_settings().backup_gpg_recipient
    if key_file is None:
        raise ConfigurationError("give --recipient, or set BACKUP_GPG_RECIPIENT")
    refuse_new(output)
    get_setup_service().open()
    manifest = get_catalogue_service().manifest(backup_id)
    fingerprint = write_new_with(
        output, lambda out: get_dump_service().copy_out(manifest, key_file, out, COMMAND_LINE)
    )
    print(f"{output}: opens with the key {fingerprint}")


@contextmanager
def _store(url: str | None) -> Iterator[None]:
    """Work with another store, on a machine that may have nothing else yet."""
    if url is None:
        get_setup_service().open()
        yield
        return
    with using_store(url):
        get_archive_service().require_readable()
    # In our own stores: the other one may be somebody's who is writing there now.
    get_setup_service().prepare()
    get_setup_service().open()
    with using_store(url):
        yield


def _show_restored(restored: Restored, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(restored) | {"status": restored.status})
        return
    rows = [
        (name, each.live, each.restored, each.lost, each.regained)
        for name, each in restored.tables.items()
    ]
    print_table(("table", "rows before", "rows restored", "lost", "regained"), rows)
    facts = {
        "backup": restored.backup_id or "the old database",
        "made": restored.created_at,
        "status": restored.status,
    }
    if restored.dry_run and restored.emptied:
        warn(f"no row would be left in {', '.join(restored.emptied)}: needs --confirm-empty")
    facts |= asdict(restored.reapplied) | {"migrations": ", ".join(restored.migrations) or "none"}
    where = {"old database": restored.previous, "restored to": restored.target}
    show(facts | {name: at for name, at in where.items() if at}, as_json=False)
    for each in restored.breaks:
        warn(f"backup {each.backup_id} {each.why}")


def _facts(record: BackupRecord) -> dict[str, Any]:
    names = ("id", "label", "kind", "status", "size_bytes", "sha256", "created_at", "verified_at",
             "held_until", "error")  # fmt: skip
    return {name: getattr(record, name) for name in names}
