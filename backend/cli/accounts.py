"""Commands for the installation and its accounts."""

from typing import Annotated

import typer

from backend.cli.showing import ask_password
from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import Role
from backend.services.account_service import get_account_service
from backend.services.audit_service import COMMAND_LINE
from backend.services.setup_service import get_setup_service
from backend.settings import is_address

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
    role: Annotated[Role, typer.Option(help="Rights of the account.")] = Role.USER,
    password_stdin: PasswordStdin = False,
) -> None:
    """Create an account."""
    # Before the password is asked for: nobody types one twice for nothing.
    if not is_address(email.strip()):
        raise RefusedError("this is no e-mail address")
    password = ask_password(password_stdin)
    get_setup_service().open()
    with session_scope() as session:
        role = Role.ADMIN if admin else role
        user = get_account_service().create(session, email, password, COMMAND_LINE, role)
        user_id = user.id
    print(f"created person {user_id}")


@app.command("set-password")
def set_password(email: str, *, password_stdin: PasswordStdin = False) -> None:
    """Change a password; every token of the account ends."""
    password = ask_password(password_stdin)
    get_setup_service().open()
    with session_scope() as session:
        get_account_service().set_password(session, email, password, COMMAND_LINE)
    print("the password was changed")


@app.command("set-role")
def set_role(email: str, role: Role) -> None:
    """Change the rights of an account; every token of it ends."""
    get_setup_service().open()
    with session_scope() as session:
        get_account_service().set_role(session, email, role, COMMAND_LINE)
    print(f"the account has the role {role}")


@app.command("remove-codes")
def remove_codes(email: str) -> None:
    """Ask an account for no more one-time codes: its device was lost."""
    get_setup_service().open()
    with session_scope() as session:
        get_account_service().remove_codes_of(session, email, COMMAND_LINE)
    print("the account has no one-time codes")


@app.command("end-sign-ins")
def end_sign_ins(email: str) -> None:
    """End every sign-in of an account: its tokens were stolen."""
    get_setup_service().open()
    with session_scope() as session:
        get_account_service().end_sign_ins_of(session, email, COMMAND_LINE)
    print("every sign-in of the account has ended")
