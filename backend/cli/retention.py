"""Commands for retention."""

from typing import Annotated

import typer

from backend.cli.showing import AsJson, DryRun, print_json, print_table, show_rows
from backend.db_utils import session_scope
from backend.privacy.periods import Period
from backend.services.audit_service import COMMAND_LINE
from backend.services.retention_service import get_retention_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction

app = typer.Typer(help="Retention: what is due, and applying it.", no_args_is_help=True)


@app.command()
def status(*, as_json: AsJson = False) -> None:
    """Show every policy, with what is due now."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        states = get_retention_service().states(session)
    rows = [
        {
            "data_type": state.policy.data_type,
            "period": str(state.policy.period),
            "action": state.policy.action,
            "enabled": state.policy.enabled,
            "rows": state.rows,
            "due": state.due,
            "held": state.held,
            "last_run_at": state.last_run_at,
        }
        for state in states
    ]
    show_rows(rows, as_json=as_json)


@app.command()
def policy(
    data_type: str,
    period: Annotated[str, typer.Argument(help="ISO 8601, as P7Y or P2555D.")],
    action: RetentionAction,
    *,
    enabled: bool = True,
) -> None:
    """Set the policy of one data type; it wins over the environment."""
    parsed = Period.parse(period)
    get_setup_service().open()
    with session_scope() as session:
        get_retention_service().set_policy(
            session, COMMAND_LINE, data_type, parsed, action, enabled=enabled
        )
    print(f"{data_type}: {action} after {parsed.words}")


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
    with session_scope() as session:
        run = get_retention_service().apply(
            session, COMMAND_LINE, dry_run=dry_run, data_type=data_type, plan_digest=plan_digest
        )
    if as_json:
        print_json(run)
        return
    columns = ("data_type", "action", "cutoff", "matched", "held", "affected")
    print_table(columns, [[getattr(r, name) for name in columns] for r in run.results])
    print(f"{'dry run; ' if dry_run else ''}plan digest {run.plan_digest}")
