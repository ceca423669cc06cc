"""backups: kind, progress and holds"""

import sqlalchemy as sa

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    kind = sa.Column("kind", sa.String(length=8), nullable=False, server_default="full")
    op.add_column("backup_records", kind)
    op.add_column("backup_records", sa.Column("bytes_done", sa.BigInteger(), nullable=True))
    held_until = sa.Column("held_until", sa.DateTime(timezone=True), nullable=True)
    op.add_column("backup_records", held_until)


def downgrade() -> None:
    for column in ("held_until", "bytes_done", "kind"):
        op.drop_column("backup_records", column)
