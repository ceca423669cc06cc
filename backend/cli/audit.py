"""Commands for the audit trail."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from backend.cli.showing import AsJson, show_rows
from backend.db_utils import session_scope
from backend.services.audit_service import COMMAND_LINE, Sought, get_audit_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import MAX_USER_ID

app = typer.Typer(help="The audit trail: who did what, to whom, when.", no_args_is_help=True)

Number = Annotated[int | None, typer.Option(min=1, max=MAX_USER_ID)]
Moment = Annotated[datetime | None, typer.Option(help="In UTC.")]


@app.callback()
def audit() -> None:
    """Read the audit trail."""


@app.command("list")
def list_events(
    *,
    user_id: Number = None,
    by_user_id: Number = None,
    action: str | None = None,
    since: Moment = None,
    until: Moment = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 100,
    as_json: AsJson = False,
) -> None:
    """Show what was done, newest first, as who looked at a person's data between two moments."""
    get_setup_service().open()
    sought = Sought(
        user_id=user_id,
        by_user_id=by_user_id,
        action=action,
        since=since and since.replace(tzinfo=UTC),
        until=until and until.replace(tzinfo=UTC),
    )
    with session_scope() as session:
        events = get_audit_service().read(session, COMMAND_LINE, sought, limit)
    show_rows([asdict(event) for event in events], as_json=as_json)
