"""companions, shared billing addresses, proof of erasures"""

import sqlalchemy as sa

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "billing_addresses",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("company", sa.Text(), nullable=True),
        sa.Column("street", sa.Text(), nullable=True),
        sa.Column("postcode", sa.Text(), nullable=True),
        sa.Column("city", sa.Text(), nullable=True),
        sa.Column("country", sa.String(length=3), nullable=True),
        sa.Column("contact_name", sa.Text(), nullable=True),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("email_index", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_billing_addresses")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_billing_addresses_email_index"), "billing_addresses", ["email_index"])
    op.create_table(
        "companions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("booking_id", sa.Integer(), nullable=False),
        sa.Column("full_name", sa.Text(), nullable=True),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("email_index", sa.String(length=40), nullable=True),
        sa.Column("phone", sa.Text(), nullable=True),
        sa.Column("phone_index", sa.String(length=40), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("anonymized_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["booking_id"], ["bookings.id"], name=op.f("fk_companions_booking_id_bookings")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_companions")),
        sqlite_autoincrement=True,
    )
    for column in ("booking_id", "email_index", "phone_index"):
        op.create_index(op.f(f"ix_companions_{column}"), "companions", [column])
    # In one statement each: rebuilding the table, as other ways on SQLite do, copies every row.
    op.execute(
        "ALTER TABLE bookings ADD COLUMN billing_address_id INTEGER "
        "CONSTRAINT fk_bookings_billing_address_id_billing_addresses "
        "REFERENCES billing_addresses (id)"
    )
    op.create_index(op.f("ix_bookings_billing_address_id"), "bookings", ["billing_address_id"])
    op.add_column("users", sa.Column("phone_index", sa.String(length=40), nullable=True))
    op.create_index(op.f("ix_users_phone_index"), "users", ["phone_index"])
    op.add_column("installation", sa.Column("signing_key", sa.Text(), nullable=True))
    op.add_column("privacy_ledger", sa.Column("identity_refs", sa.String(200), nullable=True))
    _create_records()


def _create_records() -> None:
    op.create_table(
        "erasures",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("subject_ref", sa.String(length=64), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "complete",
                "partial",
                name="erasurestatus",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("statement", sa.Text(), nullable=False),
        sa.Column("certificate", sa.Text(), nullable=True),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_erasures")),
    )
    op.create_index(op.f("ix_erasures_erased_at"), "erasures", ["erased_at"])
    op.create_index(op.f("ix_erasures_subject_ref"), "erasures", ["subject_ref"])
    op.create_table(
        "planned_erasures",
        sa.Column("plan_digest", sa.String(length=64), nullable=False),
        sa.Column("subject_ref", sa.String(length=64), nullable=False),
        sa.Column("tables", sa.Text(), nullable=False),
        sa.Column("planned_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("plan_digest", "subject_ref", name=op.f("pk_planned_erasures")),
    )
    op.create_index(op.f("ix_planned_erasures_planned_at"), "planned_erasures", ["planned_at"])
    op.create_table(
        "queued_erasures",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column(
            "mode",
            sa.Enum(
                "delete",
                "anonymize",
                name="erasemode",
                native_enum=False,
                create_constraint=True,
                length=32,
            ),
            nullable=False,
        ),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("queued_by", sa.String(length=64), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name=op.f("fk_queued_erasures_user_id_users")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_queued_erasures")),
        sa.UniqueConstraint("user_id", name=op.f("uq_queued_erasures_user_id")),
    )


def downgrade() -> None:
    for table in ("queued_erasures", "planned_erasures", "erasures", "companions"):
        op.drop_table(table)
    op.drop_column("privacy_ledger", "identity_refs")
    op.drop_column("installation", "signing_key")
    op.drop_index(op.f("ix_users_phone_index"), "users")
    op.drop_column("users", "phone_index")
    op.drop_index(op.f("ix_bookings_billing_address_id"), "bookings")
    op.execute("ALTER TABLE bookings DROP COLUMN billing_address_id")
    op.drop_table("billing_addresses")
