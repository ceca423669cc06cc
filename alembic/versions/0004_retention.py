"""retention: versions of policies, states of runs, alerts, notices to inactive people"""

import sqlalchemy as sa

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_KINDS = ("job_failed", "job_late", "retention_brake", "backup_unproven", "hold_review")


def upgrade() -> None:
    year_end: sa.Column[bool] = sa.Column(
        "year_end", sa.Boolean(), nullable=False, server_default=sa.false()
    )
    op.add_column("retention_policies", year_end)
    op.create_table(
        "policy_versions",
        sa.Column("data_type", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("after", sa.Text(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_by", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("data_type", "version", name=op.f("pk_policy_versions")),
    )
    status = sa.Column("status", sa.String(length=16), nullable=False, server_default="done")
    op.add_column("data_retention_logs", status)
    op.add_column("data_retention_logs", sa.Column("period", sa.String(length=32), nullable=True))
    op.add_column("data_retention_logs", sa.Column("year_end", sa.Boolean(), nullable=True))
    kind = sa.Enum(*_KINDS, name="alertkind", native_enum=False, create_constraint=True, length=32)
    op.create_table(
        "alerts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("kind", kind, nullable=False),
        sa.Column("about", sa.String(length=64), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("raised_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("retry_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_alerts")),
    )
    op.create_index(op.f("ix_alerts_raised_at"), "alerts", ["raised_at"])
    op.create_table(
        "inactivity_notices",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_inactivity_notices_user_id_users")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_inactivity_notices")),
        sa.UniqueConstraint("user_id", name=op.f("uq_inactivity_notices_user_id")),
    )
    op.create_index(op.f("ix_inactivity_notices_sent_at"), "inactivity_notices", ["sent_at"])


def downgrade() -> None:
    op.drop_table("inactivity_notices")
    op.drop_table("alerts")
    for column in ("year_end", "period", "status"):
        op.drop_column("data_retention_logs", column)
    op.drop_table("policy_versions")
    op.drop_column("retention_policies", "year_end")
