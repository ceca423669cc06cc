"""Commands for backups."""

from dataclasses import asdict
from typing import Annotated, Any
from uuid import UUID

import typer

from backend.cli.showing import AsJson, DryRun, print_json, print_table, show, show_rows, waiting
from backend.db_utils import session_scope
from backend.models import BackupRecord
from backend.services.audit_service import COMMAND_LINE
from backend.services.backup_service import get_backup_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service

app = typer.Typer(help="Backups: make, list, prove, restore.", no_args_is_help=True)


@app.command()
def create(*, label: Annotated[str | None, typer.Option()] = None, as_json: AsJson = False) -> None:
    """Back up the database."""
    get_setup_service().open()
    with waiting("backing up"):
        record = get_backup_service().create(COMMAND_LINE, label)
    show(_backup_facts(record), as_json=as_json)


@app.command("list")
def list_backups(*, as_json: AsJson = False) -> None:
    """List the backups, newest first."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        records = get_backup_service().list(session)
    show_rows([_backup_facts(record) for record in records], as_json=as_json)


@app.command()
def verify(backup_id: UUID, *, as_json: AsJson = False) -> None:
    """Prove that a backup restores: rebuild it beside, check it, drop it."""
    get_setup_service().open()
    with waiting("verifying"):
        record = get_backup_service().verify(backup_id, COMMAND_LINE)
    show(_backup_facts(record), as_json=as_json)


@app.command()
def restore(
    backup_id: UUID,
    *,
    dry_run: DryRun = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Replace the live database.")] = False,
    as_json: AsJson = False,
) -> None:
    """Restore a backup and keep every promise made since."""
    get_setup_service().open()
    with waiting("restoring"):
        restored = get_restore_service().restore(
            backup_id, COMMAND_LINE, dry_run=dry_run, confirm=confirm
        )
    if as_json:
        print_json(restored)
        return
    rows = [(name, change.live, change.restored) for name, change in restored.tables.items()]
    print_table(("table", "rows before", "rows restored"), rows)
    show(asdict(restored.reapplied) | {"old database": restored.previous}, as_json=False)


@app.command()
def prune(*, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Delete what is older than BACKUP_MAX_AGE_DAYS, databases kept by restores included."""
    get_setup_service().open()
    with session_scope() as session:
        expired = get_backup_service().prune(session, COMMAND_LINE, dry_run=dry_run)
    show_rows([{"backup": str(backup_id)} for backup_id in expired], as_json=as_json)


def _backup_facts(record: BackupRecord) -> dict[str, Any]:
    names = ("id", "label", "status", "size_bytes", "sha256", "created_at", "verified_at", "error")
    return {name: getattr(record, name) for name in names}
