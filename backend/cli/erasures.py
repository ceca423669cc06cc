"""Commands for erasing a person, and for the proof of it."""

import os
import stat
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import orjson
import typer

from backend.cli.showing import (
    AsJson,
    DryRun,
    ask_address,
    print_json,
    print_table,
    refuse_new,
    show,
    write_new,
)
from backend.crypto import certificates, signing
from backend.db_utils import session_scope
from backend.errors import ConflictError, RefusedError
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.certificate_service import get_certificate_service
from backend.services.erasure_service import Erasure, get_erasure_service
from backend.services.restore_service import get_restore_service
from backend.services.setup_service import get_setup_service
from backend.services.subject_service import MAX_USER_ID, Who, get_subject_service

_MAX_CERTIFICATE_BYTES: Final = 1024 * 1024

app = typer.Typer()
certificate_app = typer.Typer(help="Certificates of erasures.", no_args_is_help=True)

AddressStdin = Annotated[
    bool,
    typer.Option(
        "--address-stdin", help="Read an e-mail address or a telephone from stdin, not USER_ID."
    ),
]


def who(user_id: int | None, *, address_stdin: bool) -> Who:
    """
    Return whom the command is about.

    An address comes from stdin: an argument would stand in the shell's history and in `ps`.
    """
    if (user_id is None) != address_stdin:
        raise RefusedError("give either USER_ID or --address-stdin")
    if user_id is not None:
        if not 0 < user_id <= MAX_USER_ID:
            raise RefusedError("nobody can have this number")
        return Who(user_id)
    address = ask_address()
    return Who(email=address) if "@" in address else Who(phone=address)


@app.command()
def find(*, as_json: AsJson = False) -> None:
    """Find the person whose e-mail address or telephone is asked for, or read from stdin."""
    named = who(None, address_stdin=True)
    get_setup_service().open()
    subject, tables = get_subject_service().look_up(COMMAND_LINE, named)
    found = {"user_id": subject.number, "named_in": tables, "subject_ref": subject.ref}
    show(found, as_json=as_json)


@app.command()
def erase(  # noqa: PLR0913 - each is an option of the command
    user_id: Annotated[int | None, typer.Argument()] = None,
    *,
    address_stdin: AddressStdin = False,
    mode: EraseMode = EraseMode.DELETE,
    reason: Annotated[str, typer.Option(help="Kind of request; do not name the person.")] = "",
    dry_run: DryRun = False,
    plan_digest: Annotated[str | None, typer.Option(help="Of a dry run.")] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Write the signed certificate to this new file.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Erase again whomever the ledger names; no USER_ID.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Erase a person; what the law keeps stays, restricted."""
    if replay:
        if user_id is not None or address_stdin or dry_run or plan_digest or certificate:
            raise RefusedError("--replay goes with no other person, plan or certificate")
        _replay(as_json=as_json)
        return
    named = who(user_id, address_stdin=address_stdin)
    if certificate is not None:
        if dry_run:
            raise RefusedError("a dry run erases nobody, so there is no certificate")
        refuse_new(certificate)
    get_setup_service().open()
    with session_scope() as session:
        erasure = get_erasure_service().erase(
            session, COMMAND_LINE, named, mode,
            reason=reason or "command line", dry_run=dry_run, plan_digest=plan_digest,
        )  # fmt: skip
    get_erasure_service().prove(erasure)
    facts, document = _facts(erasure), None
    if not dry_run:
        with suppress(ConflictError):
            # Without it the scan was cut short; what was done is told all the same.
            document = _certificate(erasure.erasure_id)
            facts["scan"] = orjson.loads(document)["statement"]["scan"]
    if as_json:
        print_json(facts)
    else:
        _tell(erasure, facts)
    if certificate is not None:
        if document is None:
            raise ConflictError("the scan did not end: ask for the certificate later")
        # Last: whatever comes, the number of the erasure was told.
        write_new(certificate, iter([document]))


def _replay(*, as_json: bool) -> None:
    get_setup_service().open()
    replayed = get_restore_service().finish_ledger()
    show(asdict(replayed), as_json=as_json)


def _certificate(erasure_id: UUID) -> bytes:
    with session_scope() as session:
        return get_certificate_service().of(session, erasure_id)


def _tell(erasure: Erasure, facts: dict[str, Any]) -> None:
    plan = erasure.plan
    rows = [
        (name, *counts.values()) for name, counts in plan.counts.items() if any(counts.values())
    ]
    print_table(("table", "deleted", "anonymized", "retained", "redacted", "shared"), rows)
    for kept in plan.retained:
        until = kept.until and f"{kept.until:%Y-%m-%d}"
        print(f"{kept.table}: {kept.rows} kept until {until}. {kept.ground}")
    for name in erasure.not_reached:
        print(f"not reached: {name}")
    done = "planned, nothing changed" if erasure.dry_run else f"erased ({erasure.erasure_id})"
    print(f"{done}; plan digest {plan.digest}")
    if scan := facts.get("scan"):
        print(f"scan of {scan['cells']} cells in {scan['tables']} tables: {scan['state']}")
        for one in scan["found"]:
            print(f"  {one['table']}.{one['column']}: {one['cells']} cells hold an old value")
    print(f"the last backup that holds the person is gone by {erasure.backup_expires_at:%Y-%m-%d}")


def _facts(erasure: Erasure) -> dict[str, Any]:
    tables = {
        name: {str(outcome): rows for outcome, rows in counts.items()}
        for name, counts in erasure.plan.counts.items()
    }
    return {
        "erasure_id": str(erasure.erasure_id),
        "status": erasure.status,
        "dry_run": erasure.dry_run,
        "mode": erasure.plan.mode,
        "plan_digest": erasure.plan.digest,
        "tables": tables,
        "retained": [asdict(kept) for kept in erasure.plan.retained],
        "not_reached": list(erasure.not_reached),
        "backups_expire_at": erasure.backup_expires_at,
    }


@certificate_app.command("show")
def certificate_show(
    erasure_id: UUID,
    *,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A new file.")] = None,
) -> None:
    """Print the certificate of an erasure, or write it to a file."""
    get_setup_service().open()
    document = _certificate(erasure_id)
    if output is None:
        print(document.decode(), end="")
        return
    write_new(output, iter([document]))
    print(f"written to {output}")


@certificate_app.command("key")
def certificate_key(
    *, pem: Annotated[bool, typer.Option("--pem", help="As openssl reads it.")] = False
) -> None:
    """Print the public key that certificates are checked with: give it to whoever checks them."""
    key = _public_key()
    print(signing.public_key_pem(key) if pem else signing.spell_public_key(key))


@certificate_app.command("verify")
def certificate_verify(
    file: Path,
    *,
    public_key: Annotated[
        str | None,
        typer.Option(help="As `certificate key` prints it, or a PEM file. Without it: our own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a certificate; with --public-key it needs neither database nor key."""
    document = _read(file)
    key = _public_key() if public_key is None else signing.parse_public_key(_key_text(public_key))
    statement = certificates.verify(document, key)
    if as_json:
        print_json(statement)
        return
    print(f"signed by key {signing.key_id(key)}, and unchanged")
    told = ("erasure_id", "controller", "status", "mode", "erased_at", "backups_expire_at")
    show({name: statement.get(name) for name in told}, as_json=False)
    tables: dict[str, dict[str, int]] = statement["tables"]
    outcomes = tuple(next(iter(tables.values()), {}))
    rows = [(name, *counts.values()) for name, counts in tables.items() if any(counts.values())]
    print_table(("table", *outcomes), rows)
    for kept in statement["retained"]:
        print(f"{kept['table']}: {kept['rows']} kept until {kept['until']}. {kept['ground']}")
    print(f"scan afterwards: {statement['scan']['state']}")


def _key_text(given: str) -> str:
    """Return the key as it was given, or what the file of that name holds."""
    if given.startswith("ed25519:"):
        return given
    try:
        return _read(Path(given)).decode("ascii", "replace")
    except OSError:
        # Not by name: whoever mistakes a private key for it must not read it in a log.
        raise RefusedError("--public-key is ed25519:… or a PEM file that can be read") from None


def _read(path: Path) -> bytes:
    """
    Read a small file.

    Raises:
        RefusedError: It is no file but a pipe or a device, which may never end.
    """
    # Opening a pipe would wait for somebody to write into it.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as source:
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise RefusedError("what is to be read is no file")
        # One byte more, so that what is too long shows as that.
        return source.read(_MAX_CERTIFICATE_BYTES + 1)


def _public_key() -> bytes:
    get_setup_service().open()
    with session_scope() as session:
        return get_certificate_service().public_key(session)
