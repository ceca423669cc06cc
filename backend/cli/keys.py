"""Commands for the encryption keys."""

import sys
from typing import Annotated

import typer

from backend.cli import FAILED
from backend.cli.showing import AsJson, print_json, print_table, progress
from backend.crypto.key_services import KeyService, wrap
from backend.crypto.keyring import RootKey, parse_key
from backend.db_utils import session_scope
from backend.services.audit_service import COMMAND_LINE
from backend.services.column_service import get_column_service
from backend.services.encryption_service import get_encryption_service, key_services
from backend.services.key_use_service import get_key_use_service
from backend.services.rotation_service import get_rotation_service
from backend.services.setup_service import get_setup_service

app = typer.Typer(help="Encryption keys.", no_args_is_help=True)


@app.command()
def generate() -> None:
    """Print a fresh key for ENCRYPTION_KEY; it is stored nowhere."""
    print(get_encryption_service().generate_key())


@app.command("wrap")
def wrap_key(service: KeyService) -> None:
    """Have a key service wrap the key that is piped in; print what ENCRYPTION_KEY then holds."""
    key = parse_key(sys.stdin.readline())
    print(wrap(key, service, key_services()))


@app.command("id")
def key_id() -> None:
    """Say which key the text is that is piped in, as `keys status` and refusals name keys."""
    print(RootKey(parse_key(sys.stdin.readline())).key_id.hex())


@app.command()
def status(*, as_json: AsJson = False) -> None:
    """Show the known keys, what each protects, and whether it may be disabled."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        known = get_key_use_service().status(session)
    if as_json:
        print_json(known)
        return
    for key in known["keys"]:
        print(
            f"{key['key_id']}  {key['state']}  {key['values']} values, {key['index_terms']} index "
            f"terms, {key['ledger_entries']} ledger entries, {key['backups']} backups"
            f"{'; may be disabled' if key['may_be_disabled'] else ''}"
        )
        print_table(("column", "values"), [row for row in key["columns"].items() if row[1]])


@app.command()
def rotate(*, as_json: AsJson = False) -> None:
    """Seal anew, under ENCRYPTION_KEY, whatever a previous key protects. May be run again."""
    get_setup_service().open()
    with progress("values") as report:
        done = get_rotation_service().rotate(COMMAND_LINE, report)
    left = {key_id: use.words for key_id, use in done.left.items()}
    if as_json:
        print_json(
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
        print_table(("sealed anew", "done", "failed"), rows)
        for key_id, use in done.left.items():
            print(
                f"key {key_id} still protects {use.words}"
                if use.total
                else f"key {key_id} protects nothing any more: it may be disabled"
            )
    if not done.finished:
        raise typer.Exit(FAILED)


@app.command("encrypt-column")
def encrypt_column(column: Annotated[str, typer.Argument(metavar="TABLE.COLUMN")]) -> None:
    """Encrypt the plain values of a column that the model declares as encrypted."""
    get_setup_service().open()
    table, _, name = column.partition(".")
    with progress("values") as report:
        left = get_column_service().encrypt(table, name, COMMAND_LINE, report)
    print(f"{left} values are left in plain" if left else f"{column} is encrypted")
    if left:
        raise typer.Exit(FAILED)


@app.command()
def disable(key_id: str) -> None:
    """Retire a key that nothing needs any more: it opens nothing from now on."""
    get_setup_service().open()
    get_rotation_service().disable(key_id, COMMAND_LINE)
    print(f"key {key_id} is disabled: it may be taken out of ENCRYPTION_KEYS_PREVIOUS")
