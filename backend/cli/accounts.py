"""Commands for the installation and its accounts."""

from typing import Annotated

import typer

from backend.cli.showing import ask_password
from backend.db_utils import session_scope
from backend.models import Role
from backend.services.audit_service import COMMAND_LINE
from backend.services.auth_service import get_auth_service
from backend.services.setup_service import get_setup_service

app = typer.Typer()

PasswordStdin = Annotated[bool, typer.Option("--password-stdin", help="Read it from stdin.")]


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
    password = ask_password(password_stdin)
    get_setup_service().open()
    with session_scope() as session:
        role = Role.ADMIN if admin else Role.USER
        user = get_auth_service().create_user(session, email, password, COMMAND_LINE, role)
        user_id = user.id
    print(f"created person {user_id}")


@app.command("set-password")
def set_password(email: str, *, password_stdin: PasswordStdin = False) -> None:
    """Change a password; every token of the account ends."""
    password = ask_password(password_stdin)
    get_setup_service().open()
    with session_scope() as session:
        get_auth_service().set_password(session, email, password, COMMAND_LINE)
    print("the password was changed")
