"""Commands for retention."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer

from backend.cli.showing import AsJson, DryRun, print_bars, print_json, print_table, show_rows
from backend.db_utils import session_scope
from backend.privacy.periods import Period
from backend.services.audit_service import COMMAND_LINE
from backend.services.policy_service import get_policy_service
from backend.services.retention_results import Forecast
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction

_LOGGED: Final = (
    "started_at", "finished_at", "data_type", "action", "period", "matched", "held", "affected",
    "status", "started_by", "run_id",
)  # fmt: skip
app = typer.Typer(help="Retention: what is due, and applying it.", no_args_is_help=True)


@app.command()
def status(*, as_json: AsJson = False) -> None:
    """Show every policy, with what is due now and over the coming months."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        states = get_retention_service().states(session)
        forecasts = get_retention_service().forecast(session)
    coming = {
        one.data_type: [{"month": m, "due": due} for m, due in one.months] for one in forecasts
    }
    rows = [
        {
            "data_type": state.policy.data_type,
            "period": str(state.policy.period),
            "year_end": state.policy.period.year_end,
            "action": state.policy.action,
            "enabled": state.policy.enabled,
            "rows": state.rows,
            "due": state.due,
            "due_soon": state.due_soon,
            "held": state.held,
            "last_run_at": state.last_run_at,
        }
        for state in states
    ]
    if as_json:
        print_json({"items": [row | {"months": coming[str(row["data_type"])]} for row in rows]})
        return
    show_rows(rows, as_json=False)
    _draw(forecasts)


def _draw(forecasts: Sequence[Forecast]) -> None:
    for one in forecasts:
        months = [("now", one.due_now), *one.months]
        if any(due for _, due in months):
            print(f"\n{one.data_type}: rows that become due{'' if one.enabled else ' (off)'}")
            print_bars(months)


@app.command("policy")
def set_policy(
    data_type: str,
    period: Annotated[str, typer.Argument(help="ISO 8601, as P7Y or P2555D.")],
    action: RetentionAction,
    *,
    enabled: bool = True,
    year_end: Annotated[
        bool, typer.Option("--year-end", help="Counted from the end of the anchor's year.")
    ] = False,
) -> None:
    """Set the policy of one data type; it wins over the environment."""
    parsed = Period.parse(period, year_end=year_end)
    get_setup_service().open()
    with session_scope() as session:
        policy = get_policy_service().set(
            session, COMMAND_LINE, data_type, parsed, action, enabled=enabled
        )
    print(policy.words)


@app.command()
def versions(data_type: str, *, as_json: AsJson = False) -> None:
    """Show who changed the policy of one data type, when, from what to what."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        changes = get_policy_service().changes(session, data_type)
    rows = [asdict(change) for change in changes]
    if not as_json:
        rows = [row | {name: _said(row[name]) for name in ("before", "after")} for row in rows]
    show_rows(rows, as_json=as_json)


def _said(terms: Mapping[str, Any]) -> str:
    since = " from the end of the year" if terms["year_end"] else ""
    off = "" if terms["enabled"] else ", off"
    return f"{terms['action']} after {terms['retention_period']}{since}{off} ({terms['source']})"


@app.command()
def logs(
    *,
    data_type: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 50,
    as_json: AsJson = False,
) -> None:
    """Show what past runs did, newest first."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        rows, _ = get_retention_service().logs(session, limit, 0, data_type=data_type)
    show_rows([{name: getattr(row, name) for name in _LOGGED} for row in rows], as_json=as_json)


@app.command()
def apply(
    *,
    dry_run: DryRun = False,
    data_type: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    plan_digest: Annotated[str | None, typer.Option(help="Of a dry run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Apply the enabled policies."""
    get_setup_service().open()
    run = get_retention_service().apply(
        COMMAND_LINE, dry_run=dry_run, data_type=data_type, plan_digest=plan_digest
    )
    if as_json:
        print_json(run)
        return
    columns = ("data_type", "action", "cutoff", "matched", "held", "affected")
    print_table(columns, [[getattr(r, name) for name in columns] for r in run.results])
    print(f"{'dry run; ' if dry_run else ''}plan digest {run.plan_digest}")
    for brake in run.brakes if dry_run else ():
        print(f"needs this digest to run: {brake.words}")
