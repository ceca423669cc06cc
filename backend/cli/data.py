"""Commands for what is held about a person: taking it out, bringing it back, erasing it."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from backend.cli.erasures import AddressStdin, who
from backend.cli.showing import (
    AsJson,
    DryRun,
    ask_passphrase,
    print_json,
    print_table,
    refuse_existing,
    write_new,
)
from backend.crypto.files import PASSPHRASE_SLOT, Opener, PassphraseLock, Slot
from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.privacy.export import ExportContainer, ExportFormat
from backend.privacy.import_documents import parse
from backend.services.audit_service import COMMAND_LINE
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.encryption_service import get_encryption_service
from backend.services.setup_service import get_setup_service

app = typer.Typer()


@app.command("export")
def export_data(
    user_id: Annotated[int | None, typer.Argument()] = None,
    *,
    address_stdin: AddressStdin = False,
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
    refuse_existing(output)
    named = who(user_id, address_stdin=address_stdin)
    passphrase = ask_passphrase(confirm=True) if passphrase_stdin else None
    get_setup_service().open()
    with session_scope() as session:
        chunks = get_compliance_service().export(
            session, COMMAND_LINE, named, format_,
            encrypt=encrypt or passphrase_stdin, passphrase=passphrase, container=container,
        )  # fmt: skip
    write_new(output, chunks)
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
    refuse_existing(output)
    with file.open("rb") as source:
        if passphrase_stdin:
            opener = Opener(source, PassphraseLock(ask_passphrase()))
        else:
            opener = Opener(source, _AskingLock())
        write_new(output, opener.chunks())
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
        return PassphraseLock(ask_passphrase()).unwrap(slots, binding)


@app.command("import")
def import_data(file: Path, *, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Bring the rows of a JSON export back to the person they were taken from."""
    document = parse(file.read_bytes())
    get_setup_service().open()
    with session_scope() as session:
        user_id, tables = get_compliance_service().import_(
            session, COMMAND_LINE, document, None, dry_run=dry_run
        )
    if as_json:
        done = {name: asdict(table) for name, table in tables.items()}
        print_json({"user_id": user_id, "dry_run": dry_run} | done)
        return
    rows = [(name, t.restored, t.unchanged, t.skipped, t.incomplete) for name, t in tables.items()]
    print_table(("table", "restored", "unchanged", "skipped", "incomplete"), rows)


@app.command()
def consent(user_id: int, *, as_json: AsJson = False) -> None:
    """Show a person's consent per purpose, and its history."""
    who(user_id, address_stdin=False)
    get_setup_service().open()
    record = get_consent_service().show(COMMAND_LINE, user_id)
    if as_json:
        history = [
            {"purpose": e.purpose, "granted": e.granted, "recorded_at": e.recorded_at}
            for e in record.history
        ]
        print_json({"user_id": user_id, "purposes": record.purposes, "history": history})
        return
    rows = [
        (purpose, "given" if state.granted else "not given", state.since or "")
        for purpose, state in record.purposes.items()
    ]
    print_table(("purpose", "state", "since"), rows)
