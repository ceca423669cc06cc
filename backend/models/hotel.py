"""What a hotel keeps: bookings, payments, invoices with their VAT lines, feedback."""

from datetime import date, datetime

from sqlalchemy import CheckConstraint, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from backend.crypto.columns import Encrypted
from backend.models.base import Base, UtcDateTime
from backend.privacy.declarations import (
    Disclosure,
    OnErase,
    Retention,
    not_personal,
    owned_table,
    personal,
)

_STAY = "Providing the stay that was booked"
_CONTRACT = "contract (GDPR art. 6(1)(b))"
_TAX = "legal obligation (GDPR art. 6(1)(c)): tax and commercial records"
_TAX_GROUND = "GDPR art. 17(3)(b): tax law keeps the records of a sale until the period ends"
_ROW = "row number"
_ANONYMIZED = "when the row ceased to be about anybody"
_RESTRICTED = "since when the row is kept for the law alone"


class Booking(Base):
    """One booking, with the columns of a real hotel's system."""

    __tablename__ = "bookings"
    __table_args__ = (
        CheckConstraint("check_out >= check_in", name="stay_not_negative"),
        CheckConstraint("adr_minor >= 0", name="rate_not_negative"),
        {
            "sqlite_autoincrement": True,
            "info": owned_table(
                by="user_id",
                purpose=_STAY,
                basis=_CONTRACT,
                source="the person or their travel agent; staff notes by the hotel",
                retention=Retention("booking", "check_out"),
                disclosure=Disclosure(recipients=("the travel agent who booked",)),
            ),
        },
    )

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal(_ROW))
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id"), index=True, info=personal("user.unique_id")
    )
    reference: Mapped[str] = mapped_column(
        String(32), unique=True, info=personal("user.unique_id", OnErase.RANDOM)
    )
    hotel: Mapped[str] = mapped_column(String(40), info=not_personal("which house"))
    status: Mapped[str] = mapped_column(
        String(20), info=personal("user.behavior.purchase_history", OnErase.KEEP)
    )
    status_date: Mapped[date | None] = mapped_column(
        info=personal("user.behavior.purchase_history", OnErase.MONTH)
    )
    check_in: Mapped[date] = mapped_column(
        info=personal("user.behavior.purchase_history", OnErase.MONTH)
    )
    check_out: Mapped[date] = mapped_column(
        index=True, info=personal("user.behavior.purchase_history", OnErase.MONTH)
    )
    weekend_nights: Mapped[int] = mapped_column(info=not_personal("length of a stay"))
    week_nights: Mapped[int] = mapped_column(info=not_personal("length of a stay"))
    adults: Mapped[int] = mapped_column(info=personal("user.demographic", OnErase.KEEP))
    children: Mapped[int | None] = mapped_column(info=personal("user.demographic", OnErase.KEEP))
    babies: Mapped[int] = mapped_column(info=personal("user.demographic", OnErase.KEEP))
    meal: Mapped[str] = mapped_column(String(12), info=not_personal("board"))
    country: Mapped[str | None] = mapped_column(
        String(3), info=personal("user.demographic", OnErase.KEEP)
    )
    market_segment: Mapped[str] = mapped_column(String(20), info=not_personal("way of sale"))
    distribution_channel: Mapped[str] = mapped_column(String(20), info=not_personal("way of sale"))
    is_repeated_guest: Mapped[bool] = mapped_column(
        info=personal("user.behavior", OnErase.CONSTANT, constant=False)
    )
    previous_cancellations: Mapped[int] = mapped_column(
        info=personal("user.behavior", OnErase.CONSTANT, constant=0)
    )
    previous_bookings_not_canceled: Mapped[int] = mapped_column(
        info=personal("user.behavior", OnErase.CONSTANT, constant=0)
    )
    reserved_room_type: Mapped[str] = mapped_column(String(4), info=not_personal("kind of room"))
    assigned_room_type: Mapped[str] = mapped_column(String(4), info=not_personal("kind of room"))
    booking_changes: Mapped[int] = mapped_column(info=not_personal("count of changes"))
    deposit_type: Mapped[str] = mapped_column(String(20), info=not_personal("terms of the sale"))
    customer_type: Mapped[str] = mapped_column(String(20), info=not_personal("terms of the sale"))
    # What could single a stay out beside its month: nulled, not kept.
    lead_time_days: Mapped[int | None] = mapped_column(info=personal("user.behavior"))
    days_in_waiting_list: Mapped[int | None] = mapped_column(info=personal("user.behavior"))
    agent: Mapped[str | None] = mapped_column(String(20), info=personal("user.behavior"))
    company: Mapped[str | None] = mapped_column(String(20), info=personal("user.workplace"))
    adr_minor: Mapped[int | None] = mapped_column(info=personal("user.financial"))
    currency: Mapped[str] = mapped_column(String(3), info=not_personal("unit of the amounts"))
    parking_spaces: Mapped[int] = mapped_column(info=not_personal("count of places"))
    special_request_count: Mapped[int] = mapped_column(info=not_personal("count of requests"))

    contact_phone: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.phone_number")
    )
    special_requests: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.content"))
    staff_notes: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.content"))
    ip_address: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.device.ip_address")
    )
    created_at: Mapped[datetime] = mapped_column(
        UtcDateTime, info=personal("user.behavior.purchase_history", OnErase.MONTH)
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_ANONYMIZED)
    )
    billing_address_id: Mapped[int | None] = mapped_column(
        ForeignKey("billing_addresses.id"), index=True, info=personal("user.contact.address")
    )


class Payment(Base):
    """Money received or returned, in minor units (cents)."""

    __tablename__ = "payments"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": owned_table(
            by=("user_id", "booking_id"),
            purpose="Taking payment and keeping the books",
            basis=_TAX,
            source="the person and their payment provider",
            retention=Retention("payment", "paid_at"),
            statute=_TAX_GROUND,
            disclosure=Disclosure(recipients=("the payment provider", "tax authorities")),
        ),
    }

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal(_ROW))
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id"), index=True, info=personal("user.unique_id")
    )
    booking_id: Mapped[int | None] = mapped_column(
        ForeignKey("bookings.id"), index=True, info=personal("user.unique_id")
    )
    amount_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    currency: Mapped[str] = mapped_column(String(3), info=not_personal("unit of the amount"))
    method: Mapped[str] = mapped_column(
        String(20), info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    status: Mapped[str] = mapped_column(String(20), info=not_personal("state of the payment"))
    paid_at: Mapped[datetime] = mapped_column(
        UtcDateTime, index=True, info=personal("user.financial", OnErase.MONTH, statutory=True)
    )
    payment_reference: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.financial")
    )
    card_last4: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.financial.credit_card")
    )
    ip_address: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.device.ip_address")
    )
    restricted_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_RESTRICTED)
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_ANONYMIZED)
    )


class Invoice(Base):
    """An invoice with what VAT Directive 2006/112/EC, art. 226 asks it to show."""

    __tablename__ = "invoices"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": owned_table(
            by=("user_id", "booking_id"),
            purpose="Invoicing",
            basis=_TAX,
            source="the booking",
            retention=Retention("invoice", "issued_on"),
            statute=_TAX_GROUND,
            disclosure=Disclosure(recipients=("tax authorities",)),
        ),
    }

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal(_ROW))
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id"), index=True, info=personal("user.unique_id")
    )
    booking_id: Mapped[int | None] = mapped_column(
        ForeignKey("bookings.id"), index=True, info=personal("user.unique_id")
    )
    number: Mapped[str] = mapped_column(
        String(32), unique=True, info=personal("user.financial", OnErase.RANDOM, statutory=True)
    )
    issued_on: Mapped[date] = mapped_column(
        index=True, info=personal("user.financial", OnErase.MONTH, statutory=True)
    )
    supplied_on: Mapped[date] = mapped_column(
        info=personal("user.financial", OnErase.MONTH, statutory=True)
    )
    billing_name: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.name", statutory=True)
    )
    billing_address: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.contact.address", statutory=True)
    )
    currency: Mapped[str] = mapped_column(String(3), info=not_personal("unit of the amounts"))
    net_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    vat_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    gross_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    note: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.content"))
    restricted_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_RESTRICTED)
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_ANONYMIZED)
    )


class InvoiceLine(Base):
    """One VAT line of an invoice; the rate in hundredths of a percent (1900 is 19 %)."""

    __tablename__ = "invoice_lines"
    __table_args__ = {  # noqa: RUF012 - SQLAlchemy's form
        "sqlite_autoincrement": True,
        "info": owned_table(by="invoice_id", purpose="Invoicing", basis=_TAX, source="the booking"),
    }

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal(_ROW))
    invoice_id: Mapped[int] = mapped_column(
        ForeignKey("invoices.id"), index=True, info=not_personal("which invoice")
    )
    description: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.financial", statutory=True)
    )
    quantity: Mapped[int] = mapped_column(info=not_personal("count of units"))
    unit_price_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    vat_rate_hundredths: Mapped[int] = mapped_column(info=not_personal("rate set by law"))
    net_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    vat_minor: Mapped[int] = mapped_column(
        info=personal("user.financial", OnErase.KEEP, statutory=True)
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_ANONYMIZED)
    )


class Feedback(Base):
    """What a guest said of a stay, and the hotel's answer."""

    __tablename__ = "feedback"
    __table_args__ = (
        CheckConstraint("rating BETWEEN 1 AND 5", name="rating_one_to_five"),
        {
            "sqlite_autoincrement": True,
            "info": owned_table(
                by=("user_id", "booking_id"),
                purpose="Learning from guests' opinions",
                basis="legitimate interest (GDPR art. 6(1)(f))",
                source="the person; the answer by the hotel",
                retention=Retention("feedback", "submitted_at"),
            ),
        },
    )

    id: Mapped[int] = mapped_column(primary_key=True, info=not_personal(_ROW))
    user_id: Mapped[int | None] = mapped_column(
        ForeignKey("users.id"), index=True, info=personal("user.unique_id")
    )
    booking_id: Mapped[int | None] = mapped_column(
        ForeignKey("bookings.id"), index=True, info=personal("user.unique_id")
    )
    rating: Mapped[int] = mapped_column(info=personal("user.content", OnErase.KEEP))
    comment: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.content"))
    staff_response: Mapped[str | None] = mapped_column(Encrypted(), info=personal("user.content"))
    ip_address: Mapped[str | None] = mapped_column(
        Encrypted(), info=personal("user.device.ip_address")
    )
    submitted_at: Mapped[datetime] = mapped_column(
        UtcDateTime, index=True, info=personal("user.behavior", OnErase.MONTH)
    )
    anonymized_at: Mapped[datetime | None] = mapped_column(
        UtcDateTime, info=not_personal(_ANONYMIZED)
    )
