"""Commands for the audit trail."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from backend.cli import FAILED
from backend.cli.showing import AsJson, print_json, show, show_rows, waiting, warn
from backend.db_utils import session_scope
from backend.services.audit_service import COMMAND_LINE, Sought, get_audit_service
from backend.services.checkpoint_service import get_checkpoint_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import MAX_USER_ID
from backend.services.trail_service import Checked, Verdict, get_trail_service

app = typer.Typer(help="The audit trail: who did what, to whom, when.", no_args_is_help=True)

Number = Annotated[int | None, typer.Option(min=1, max=MAX_USER_ID)]
Moment = Annotated[datetime | None, typer.Option(help="In UTC.")]


@app.callback()
def audit() -> None:
    """Read the audit trail, and check it."""


@app.command("list")
def list_events(  # noqa: PLR0913 - each is a question of its own
    *,
    user_id: Number = None,
    subject_ref: Annotated[
        str | None, typer.Option(help="As `find` shows it, or an event of an erased person.")
    ] = None,
    by_user_id: Number = None,
    action: str | None = None,
    since: Moment = None,
    until: Moment = None,
    before: Annotated[
        int | None, typer.Option(min=1, max=2**63 - 1, help="Only events with a lower number.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 100,
    as_json: AsJson = False,
) -> None:
    """Show what was done, newest first, as who looked at a person's data between two moments."""
    get_setup_service().open()
    sought = Sought(
        user_id=user_id,
        subject_ref=subject_ref,
        by_user_id=by_user_id,
        action=action,
        since=since and since.replace(tzinfo=UTC),
        until=until and until.replace(tzinfo=UTC),
        before=before,
    )
    with session_scope() as session:
        events = get_audit_service().read(session, COMMAND_LINE, sought, limit)
    show_rows([asdict(event) for event in events], as_json=as_json)


@app.command()
def verify(*, as_json: AsJson = False) -> None:
    """Check that no event was edited, removed, reordered, cut off or put back; else exit with 1."""
    get_setup_service().open()
    with waiting("checking"):
        checked = get_trail_service().verify(COMMAND_LINE)
    if as_json:
        print_json(asdict(checked))
    else:
        _show_checked(checked)
    if checked.status is not Verdict.OK:
        raise typer.Exit(FAILED)


@app.command()
def checkpoint(*, as_json: AsJson = False) -> None:
    """Sign how the trail ends now, beside the backups; nothing if that is signed already."""
    get_setup_service().open()
    made = get_checkpoint_service().make()
    if as_json:
        print_json({"event": made and made.event_id})
    else:
        print(f"signed up to event {made.event_id}" if made else "signed already")


def _show_checked(checked: Checked) -> None:
    facts = {
        "status": checked.status,
        "events": checked.events,
        "last": checked.last,
        "checkpoints": checked.checkpoints,
        "newest": f"event {checked.checkpoint_event}, of {checked.checkpoint_at}"
        if checked.checkpoints
        else "none",
        "public key": checked.public_key,
    }
    show(facts, as_json=False)
    for each in checked.breaks:
        warn(f"{each.kind}: event {each.event_id} {each.detail}")
    for loss in checked.losses:
        warn(f"events after {loss.after} were lost until {loss.at}, by a restore without them")
    for other in checked.others:
        warn(
            f"another trail, {other.chain_id}, lies in {other.store}, up to event "
            f"{other.event_id}: no restore has replaced it by this one"
        )
    for url in checked.silent:
        warn(f"the store {url} does not answer: its checkpoints could not be compared")
