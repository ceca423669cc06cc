"""audit trail: the link of each event to the one before it"""

import sqlalchemy as sa

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("audit_events", sa.Column("link", sa.String(length=64), nullable=True))


def downgrade() -> None:
    op.drop_column("audit_events", "link")
