"""The services as commands: `python db_cli.py --help`. Exit codes: 0 done, 1 failed, 2 refused."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from backend.crypto.files import PASSPHRASE_SLOT, Opener, PassphraseLock, Slot
from backend.crypto.key_services import KeyService, wrap
from backend.crypto.keyring import parse_key
from backend.db_utils import dispose_engine, session_scope
from backend.errors import ConfigurationError, HoldfastError, RefusedError
from backend.logs import configure_logs, where
from backend.models import BackupRecord, Role
from backend.privacy.erase import EraseMode
from backend.privacy.export import ExportContainer, ExportFormat
from backend.privacy.periods import Period
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.backup_service import get_backup_service
from backend.services.column_service import get_column_service
from backend.services.compliance_service import Erasure, get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.demo_service import Chapter, get_demo_service
from backend.services.encryption_service import get_encryption_service, key_services
from backend.services.key_use_service import get_key_use_service
from backend.services.restore_service import get_restore_service
from backend.services.retention_service import get_retention_service
from backend.services.rotation_service import get_rotation_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from backend.settings import RetentionAction, get_settings

FAILED: Final = 1
REFUSED: Final = 2

app = typer.Typer(
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    # They print local variables, which are people's data and keys.
    pretty_exceptions_enable=False,
)
retention_app = typer.Typer(help="Retention: what is due, and applying it.", no_args_is_help=True)
backup_app = typer.Typer(help="Backups: make, list, prove, restore.", no_args_is_help=True)
keys_app = typer.Typer(help="Encryption keys.", no_args_is_help=True)
app.add_typer(retention_app, name="retention")
app.add_typer(backup_app, name="backup")
app.add_typer(keys_app, name="keys")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
PasswordStdin = Annotated[bool, typer.Option("--password-stdin", help="Read it from stdin.")]
Bookings = Annotated[
    Path | None, typer.Option(help="A CSV file of the hotel booking demand data set.")
]

# Piped, a table is as wide as it needs: programs read lines, not columns of 80.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 240)


# Accounts and data


@app.command()
def init() -> None:
    """Make folder, key, schema and first admin, whichever is missing."""
    prepared = get_setup_service().prepare()
    print("the schema is up to date" if not prepared.migrated else "the schema was brought up")
    if prepared.admin is not None:
        email, password = prepared.admin
        print(f"first admin: {email}\npassword, shown this once: {password}")


@app.command("create-user")
def create_user(
    email: str,
    *,
    admin: Annotated[bool, typer.Option("--admin", help="With an admin's rights.")] = False,
    password_stdin: PasswordStdin = False,
) -> None:
    """Create an account."""
    password = _password(password_stdin)
    get_setup_service().open()
    with session_scope() as session:
        role = Role.ADMIN if admin else Role.USER
        user = get_auth_service().create_user(session, email, password, COMMAND_LINE, role)
        user_id = user.id
    print(f"created person {user_id}")


@app.command("set-password")
def set_password(email: str, *, password_stdin: PasswordStdin = False) -> None:
    """Change a password; every token of the account ends."""
    password = _password(password_stdin)
    get_setup_service().open()
    with session_scope() as session:
        get_auth_service().set_password(session, email, password, COMMAND_LINE)
    print("the password was changed")


@app.command()
def load(
    *,
    bookings: Bookings = None,
    guests: Annotated[int | None, typer.Option(min=1, help="Spread over so many guests.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Without a file: so many bookings.")] = 2_000,
    as_json: AsJson = False,
) -> None:
    """Fill the built-in model with bookings and generated guests."""
    get_setup_service().open()
    with _progress("bookings") as report, session_scope() as session:
        loaded = get_sample_service().load(
            session, COMMAND_LINE, bookings=bookings, guests=guests, count=count, progress=report
        )
    _show(asdict(loaded), as_json=as_json)


@app.command()
def demo(*, bookings: Bookings = None, as_json: AsJson = False) -> None:
    """Do the main job, whole, on a database of its own that is removed afterwards."""
    with _own_installation():
        get_setup_service().prepare()
        chapters = []
        with _progress("bookings") as report:
            for chapter in get_demo_service().tell(bookings, report):
                chapters.append(chapter)
                if not as_json:
                    _tell(len(chapters), chapter)
    kept = all(chapter.ok for chapter in chapters)
    if as_json:
        _print_json({"ok": kept, "chapters": [asdict(chapter) for chapter in chapters]})
    else:
        out.print("\nEvery promise was kept." if kept else "\nA PROMISE WAS BROKEN: see above.")
    if not kept:
        raise typer.Exit(FAILED)


@app.command("export")
def export_data(
    user_id: int,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="A file that does not exist.")],
    format_: Annotated[ExportFormat, typer.Option("--format")] = ExportFormat.JSON,
    encrypt: Annotated[bool, typer.Option(help="Encrypt with the service's key.")] = False,
    passphrase_stdin: Annotated[
        bool, typer.Option(help="Encrypt with a passphrase read from stdin instead.")
    ] = False,
    container: Annotated[
        ExportContainer, typer.Option(help="zip: an AES-256 zip, for 7-Zip and alike.")
    ] = ExportContainer.HOLDFAST,
) -> None:
    """Write everything that is held about a person to a file."""
    _refuse_existing(output)
    passphrase = _passphrase(confirm=True) if passphrase_stdin else None
    get_setup_service().open()
    with session_scope() as session:
        chunks = get_compliance_service().export(
            session, COMMAND_LINE, user_id, format_,
            encrypt=encrypt or passphrase_stdin, passphrase=passphrase, container=container,
        )  # fmt: skip
    _write_new(output, chunks)
    print(f"written to {output}")


@app.command("open")
def open_file(
    file: Path,
    *,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A new file; without it, FILE without .hfe."),
    ] = None,
    passphrase_stdin: Annotated[bool, typer.Option(help="Read the passphrase from stdin.")] = False,
) -> None:
    """Decrypt an encrypted export; a passphrase that it needs is asked for."""
    if output is None:
        if file.suffix != ".hfe":
            raise RefusedError(f"{file} does not end in .hfe: give -o FILE")
        output = file.with_suffix("")
    _refuse_existing(output)
    with file.open("rb") as source:
        if passphrase_stdin:
            opener = Opener(source, PassphraseLock(_passphrase()))
        else:
            opener = Opener(source, _AskingLock())
        _write_new(output, opener.chunks())
    print(f"written to {output}")


class _AskingLock:
    """Opens a file with what it needs: a passphrase from the terminal, or the service's key."""

    def wrap(self, data_key: bytes, binding: bytes) -> Slot:
        return get_encryption_service().file_lock().wrap(data_key, binding)

    def unwrap(self, slots: Iterable[Slot], binding: bytes) -> bytes:
        slots = list(slots)
        if any(slot.kind != PASSPHRASE_SLOT for slot in slots):
            get_setup_service().open()
            return get_encryption_service().file_lock().unwrap(slots, binding)
        if not sys.stdin.isatty():
            raise RefusedError("the file opens with a passphrase: give it with --passphrase-stdin")
        return PassphraseLock(_passphrase()).unwrap(slots, binding)


@app.command("import")
def import_data(file: Path, *, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Bring the rows of a JSON export back to the person they were taken from."""
    try:
        document = orjson.loads(file.read_bytes())
    except orjson.JSONDecodeError:
        raise typer.BadParameter("the file is no JSON export") from None
    if not isinstance(document, dict):
        raise typer.BadParameter("the file is no JSON export")
    get_setup_service().open()
    with session_scope() as session:
        user_id, tables = get_compliance_service().import_(
            session, COMMAND_LINE, document, None, dry_run=dry_run
        )
    if as_json:
        done = {name: asdict(table) for name, table in tables.items()}
        _print_json({"user_id": user_id, "dry_run": dry_run} | done)
        return
    rows = [(name, t.restored, t.unchanged, t.skipped) for name, t in tables.items()]
    _print_table(("table", "restored", "unchanged", "skipped"), rows)


@app.command()
def erase(
    user_id: int,
    *,
    mode: EraseMode = EraseMode.DELETE,
    reason: Annotated[str, typer.Option(help="Kind of request; do not name the person.")] = "",
    dry_run: DryRun = False,
    plan_digest: Annotated[str | None, typer.Option(help="Of a dry run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Erase a person; what the law keeps stays, restricted."""
    get_setup_service().open()
    with session_scope() as session:
        erasure = get_compliance_service().erase(
            session, COMMAND_LINE, user_id, mode,
            reason=reason or "command line", dry_run=dry_run, plan_digest=plan_digest,
        )  # fmt: skip
    if as_json:
        _print_json(_erasure_facts(erasure))
        return
    plan = erasure.plan
    rows = [(name, *counts.values()) for name, counts in plan.counts.items()]
    _print_table(("table", "deleted", "anonymized", "retained"), rows)
    for kept in plan.retained:
        print(f"{kept.rows} rows of {kept.table} are kept until {kept.until}: {kept.ground}")
    print(f"{'planned, nothing changed' if dry_run else 'erased'}; plan digest {plan.digest}")
    print(f"the last backup that holds the person is gone by {erasure.backup_expires_at:%Y-%m-%d}")


@app.command()
def consent(user_id: int, *, as_json: AsJson = False) -> None:
    """Show a person's consent per purpose, and its history."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        record = get_consent_service().of(session, user_id)
    if as_json:
        history = [
            {"purpose": e.purpose, "granted": e.granted, "recorded_at": e.recorded_at}
            for e in record.history
        ]
        _print_json({"user_id": user_id, "purposes": record.purposes, "history": history})
        return
    rows = [
        (purpose, "given" if state.granted else "not given", state.since or "")
        for purpose, state in record.purposes.items()
    ]
    _print_table(("purpose", "state", "since"), rows)


# Retention


@retention_app.command("status")
def retention_status(*, as_json: AsJson = False) -> None:
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
    _show_rows(rows, as_json=as_json)


@retention_app.command("policy")
def retention_policy(
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


@retention_app.command("apply")
def retention_apply(
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
        _print_json(run)
        return
    columns = ("data_type", "action", "cutoff", "matched", "held", "affected")
    _print_table(columns, [[getattr(r, name) for name in columns] for r in run.results])
    print(f"{'dry run; ' if dry_run else ''}plan digest {run.plan_digest}")


# Backups


@backup_app.command("create")
def backup_create(
    *, label: Annotated[str | None, typer.Option()] = None, as_json: AsJson = False
) -> None:
    """Back up the database."""
    get_setup_service().open()
    with _waiting("backing up"):
        record = get_backup_service().create(COMMAND_LINE, label)
    _show(_backup_facts(record), as_json=as_json)


@backup_app.command("list")
def backup_list(*, as_json: AsJson = False) -> None:
    """List the backups, newest first."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        records = get_backup_service().list(session)
    _show_rows([_backup_facts(record) for record in records], as_json=as_json)


@backup_app.command("verify")
def backup_verify(backup_id: UUID, *, as_json: AsJson = False) -> None:
    """Prove that a backup restores: rebuild it beside, check it, drop it."""
    get_setup_service().open()
    with _waiting("verifying"):
        record = get_backup_service().verify(backup_id, COMMAND_LINE)
    _show(_backup_facts(record), as_json=as_json)


@backup_app.command("restore")
def backup_restore(
    backup_id: UUID,
    *,
    dry_run: DryRun = False,
    confirm: Annotated[bool, typer.Option("--confirm", help="Replace the live database.")] = False,
    as_json: AsJson = False,
) -> None:
    """Restore a backup and keep every promise made since."""
    get_setup_service().open()
    with _waiting("restoring"):
        restored = get_restore_service().restore(
            backup_id, COMMAND_LINE, dry_run=dry_run, confirm=confirm
        )
    if as_json:
        _print_json(restored)
        return
    rows = [(name, change.live, change.restored) for name, change in restored.tables.items()]
    _print_table(("table", "rows before", "rows restored"), rows)
    _show(asdict(restored.reapplied) | {"old database": restored.previous}, as_json=False)


@backup_app.command("prune")
def backup_prune(*, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Delete what is older than BACKUP_MAX_AGE_DAYS, databases kept by restores included."""
    get_setup_service().open()
    with session_scope() as session:
        expired = get_backup_service().prune(session, COMMAND_LINE, dry_run=dry_run)
    _show_rows([{"backup": str(backup_id)} for backup_id in expired], as_json=as_json)


# Keys


@keys_app.command("generate")
def keys_generate() -> None:
    """Print a fresh key for ENCRYPTION_KEY; it is stored nowhere."""
    print(get_encryption_service().generate_key())


@keys_app.command("wrap")
def keys_wrap(service: KeyService) -> None:
    """Have a key service wrap the key that is piped in; print what ENCRYPTION_KEY then holds."""
    key = parse_key(sys.stdin.readline())
    print(wrap(key, service, key_services()))


@keys_app.command("status")
def keys_status(*, as_json: AsJson = False) -> None:
    """Show the known keys, what each protects, and whether it may be disabled."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        status = get_key_use_service().status(session)
    if as_json:
        _print_json(status)
        return
    for key in status["keys"]:
        print(
            f"{key['key_id']}  {key['state']}  {key['values']} values, {key['index_terms']} index "
            f"terms, {key['ledger_entries']} ledger entries, {key['backups']} backups"
            f"{'; may be disabled' if key['may_be_disabled'] else ''}"
        )
        _print_table(("column", "values"), [row for row in key["columns"].items() if row[1]])


@keys_app.command("rotate")
def keys_rotate(*, as_json: AsJson = False) -> None:
    """Seal anew, under ENCRYPTION_KEY, whatever a previous key protects. May be run again."""
    get_setup_service().open()
    with _progress("values") as report:
        done = get_rotation_service().rotate(COMMAND_LINE, report)
    left = {key_id: use.words for key_id, use in done.left.items()}
    if as_json:
        _print_json(
            {
                "primary": done.primary,
                "finished": done.finished,
                "changed": done.changed,
                "failed": done.failed,
                "left": left,
            }
        )
    else:
        rows = [(what, done.changed.get(what, 0), done.failed.get(what, 0))
                for what in sorted({*done.changed, *done.failed})]  # fmt: skip
        _print_table(("sealed anew", "done", "failed"), rows)
        for key_id, use in done.left.items():
            print(
                f"key {key_id} still protects {use.words}"
                if use.total
                else f"key {key_id} protects nothing any more: it may be disabled"
            )
    if not done.finished:
        raise typer.Exit(FAILED)


@keys_app.command("encrypt-column")
def keys_encrypt_column(column: Annotated[str, typer.Argument(metavar="TABLE.COLUMN")]) -> None:
    """Encrypt the plain values of a column that the model declares as encrypted."""
    get_setup_service().open()
    table, _, name = column.partition(".")
    with _progress("values") as report:
        left = get_column_service().encrypt(table, name, COMMAND_LINE, report)
    print(f"{left} values are left in plain" if left else f"{column} is encrypted")
    if left:
        raise typer.Exit(FAILED)


@keys_app.command("disable")
def keys_disable(key_id: str) -> None:
    """Retire a key that nothing needs any more: it opens nothing from now on."""
    get_setup_service().open()
    get_rotation_service().disable(key_id, COMMAND_LINE)
    print(f"key {key_id} is disabled: it may be taken out of ENCRYPTION_KEYS_PREVIOUS")


# How things are asked for and shown


def _password(from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))


def _passphrase(*, confirm: bool = False) -> str:
    """Read a line that is piped in; on a terminal ask, without showing what is typed."""
    if sys.stdin.isatty():
        return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm))
    return sys.stdin.readline().rstrip("\n")


def _write_new(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a new 0600 file, under its name only when it is whole."""
    _refuse_existing(path)
    # A name that nobody can have put there before, and 0600.
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(descriptor)
        # A link fails where a rename would replace.
        os.link(partial, path)
    finally:
        Path(partial).unlink()


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise RefusedError(f"{path} exists already")


@contextmanager
def _own_installation() -> Iterator[None]:
    """Work in a folder of its own, with a key of its own, whatever the environment says."""
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as folder:
        os.environ |= {
            "DATA_DIR": folder,
            "DATABASE_URL": f"sqlite:///{folder}/holdfast.db",
            "BACKUP_URL": f"{folder}/backups",
            "APP_ENV": "development",
            "LOG_LEVEL": "ERROR",
            "ENCRYPTION_KEY": get_encryption_service().generate_key(),
            "CONSENT_PURPOSES": "marketing,analytics",
        }
        get_settings.cache_clear()
        configure_logs(get_settings())
        try:
            yield
        finally:
            dispose_engine()


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Report progress: a bar on a terminal, nothing when piped."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    error = Console(stderr=True)
    with Progress(*columns, console=error, disable=not error.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    error = Console(stderr=True)
    if not error.is_terminal:
        yield
        return
    with error.status(f"{what} …"):
        yield


def _tell(number: int, chapter: Chapter) -> None:
    mark = "[green]✓[/green]" if chapter.ok else "[red]✗[/red]"
    out.print(f"\n{mark} [bold]{number}. {chapter.title}[/bold]  ({chapter.seconds} s)")
    print(f"  {chapter.text}")
    width = max((len(name) for name in chapter.facts), default=0)
    for name, value in chapter.facts.items():
        print(f"    {name:<{width}}  {value}")


def _erasure_facts(erasure: Erasure) -> dict[str, Any]:
    tables = {
        name: {str(outcome): rows for outcome, rows in counts.items()}
        for name, counts in erasure.plan.counts.items()
    }
    return {
        "erasure_id": str(erasure.erasure_id),
        "dry_run": erasure.dry_run,
        "mode": erasure.plan.mode,
        "plan_digest": erasure.plan.digest,
        "tables": tables,
        "retained": [asdict(kept) for kept in erasure.plan.retained],
        "backups_expire_at": erasure.backup_expires_at,
    }


def _backup_facts(record: BackupRecord) -> dict[str, Any]:
    names = ("id", "label", "status", "size_bytes", "sha256", "created_at", "verified_at", "error")
    return {name: getattr(record, name) for name in names}


def _show(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(facts)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _show_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _print_json({"items": rows})
    elif rows:
        _print_table(tuple(rows[0]), [list(row.values()) for row in rows])
    else:
        print("none")


def _print_table(columns: tuple[str, ...], rows: Any) -> None:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row))
    out.print(table)


def _print_json(value: Any) -> None:
    def default(other: Any) -> Any:
        if is_dataclass(other) and not isinstance(other, type):
            return asdict(other)
        return str(other)

    options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS
    print(orjson.dumps(value, default=default, option=options).decode())


def main() -> int:
    """Run one command; a refusal is one line on stderr and exit code 2."""
    try:
        configure_logs(get_settings())
        app()
    except HoldfastError as err:
        print(f"holdfast: {err.detail}", file=sys.stderr)
        failed = err.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return FAILED if failed and not isinstance(err, ConfigurationError) else REFUSED
    except OSError as err:
        print(f"holdfast: {err.strerror}: {err.filename}", file=sys.stderr)
        return REFUSED
    except Exception as err:  # noqa: BLE001 - the edge: its words may quote a row, its class does not
        print(f"holdfast: failed: {type(err).__name__} at {where(err)}", file=sys.stderr)
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
