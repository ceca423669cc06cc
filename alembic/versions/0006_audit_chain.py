"""audit trail: the link of each event to the one before it, and alerts of one that is broken"""

import sqlalchemy as sa

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


_BEFORE = "kind IN ('job_failed', 'job_late', 'retention_brake', 'backup_unproven', 'hold_review')"
_AFTER = _BEFORE.replace(")", ", 'audit_broken')")


def upgrade() -> None:
    op.add_column("audit_events", sa.Column("link", sa.String(length=64), nullable=True))
    _let_kinds_be(_BEFORE, _AFTER)


def downgrade() -> None:
    op.execute("DELETE FROM alerts WHERE kind = 'audit_broken'")
    _let_kinds_be(_AFTER, _BEFORE)
    op.drop_column("audit_events", "link")


def _let_kinds_be(before: str, after: str) -> None:
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        op.drop_constraint(op.f("ck_alerts_alertkind"), "alerts", type_="check")
        op.create_check_constraint(op.f("ck_alerts_alertkind"), "alerts", after)
        return
    # As 0005 does it for roles.
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    connection.exec_driver_sql(
        "UPDATE sqlite_schema SET sql = replace(sql, ?, ?)"
        " WHERE type = 'table' AND name = 'alerts'",
        (f"CHECK ({before})", f"CHECK ({after})"),
    )
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
    connection.exec_driver_sql("PRAGMA writable_schema = OFF")
