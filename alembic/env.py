"""Run migrations on the connection that the caller gives, else on `DATABASE_URL`."""

from typing import Any, Literal

from alembic.operations.ops import CreateTableOp, MigrationScript
from sqlalchemy import Connection

from alembic import context
from backend.crypto.columns import Encrypted
from backend.db_utils import get_engine
from backend.models import Base
from backend.models.base import UtcDateTime


def render_type(kind: str, item: Any, _autogen: Any) -> str | Literal[False]:
    """Write our types as what they are in the database: history must not import the models."""
    if kind == "type" and isinstance(item, Encrypted):
        return "sa.Text()"
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    return False


def drop_declarations(_context: Any, _revision: Any, directives: list[MigrationScript]) -> None:
    """Keep the data map out of history: a migration is about the database alone."""
    for script in directives:
        for operation in script.upgrade_ops.ops if script.upgrade_ops else ():
            if isinstance(operation, CreateTableOp):
                operation.info = {}


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_item=render_type,
        process_revision_directives=drop_declarations,
        # SQLite cannot alter a table in place.
        render_as_batch=connection.dialect.name == "sqlite",
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with get_engine().begin() as connection:
        run(connection)
