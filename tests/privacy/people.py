"""Guests with rows in every table of people, a mark in every text of theirs, and raw dumps."""

import secrets
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import count
from typing import Any

from sqlalchemy import Column, Select, insert, literal_column, select, text
from sqlalchemy import table as sql_table
from sqlalchemy.orm import Session

from backend.crypto.columns import Encrypted
from backend.db_utils import session_scope
from backend.models import (
    DATA_MAP,
    Base,
    Booking,
    Companion,
    Feedback,
    HoldScope,
    Invoice,
    Payment,
    Role,
)
from backend.models.records import LegalHold
from backend.services.audit_service import Actor
from backend.services.retention_results import RetentionRun
from backend.services.retention_service import get_retention_service

ADMINISTRATOR = Actor("an administrator", Role.ADMIN)
# In the default periods of 2555 days, and past them.
INSIDE, PAST = timedelta(days=100), timedelta(days=3000)
# Derived from the address by the model.
_DERIVED = {"email_index", "phone_index"}

Row = dict[str, Any]
Dump = dict[str, dict[tuple[Any, ...], Row]]
Keys = dict[str, set[tuple[Any, ...]]]

_BOOKING: Row = {
    "hotel": "Resort Hotel",
    "status": "Check-Out",
    "weekend_nights": 1,
    "week_nights": 2,
    "adults": 2,
    "children": 1,
    "babies": 0,
    "meal": "BB",
    "market_segment": "Direct",
    "distribution_channel": "Direct",
    "is_repeated_guest": True,
    "previous_cancellations": 3,
    "previous_bookings_not_canceled": 4,
    "reserved_room_type": "A",
    "assigned_room_type": "A",
    "booking_changes": 0,
    "deposit_type": "No Deposit",
    "customer_type": "Transient",
    "lead_time_days": 37,
    "days_in_waiting_list": 5,
    "adr_minor": 12_345,
    "currency": "EUR",
    "parking_spaces": 0,
    "special_request_count": 1,
}
_PAYMENT: Row = {"amount_minor": 24_690, "currency": "EUR", "status": "settled", "method": "card"}
_INVOICE: Row = {"currency": "EUR", "net_minor": 20_748, "vat_minor": 3_942, "gross_minor": 24_690}
_LINE: Row = {
    "quantity": 1,
    "unit_price_minor": 10_374,
    "vat_rate_hundredths": 1900,
    "net_minor": 10_374,
    "vat_minor": 1_971,
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A text found nowhere else, in one cell of one person."""

    table: str
    column: str
    record: str
    text: str


@dataclass
class Person:
    """A planted person: their marks, and the keys of their rows by table."""

    id: int
    marks: list[Mark] = field(default_factory=list)
    keys: dict[str, list[Any]] = field(default_factory=dict)

    def texts(self) -> set[str]:
        return {mark.text for mark in self.marks}

    def words(self) -> set[str]:
        """The texts that do not turn up by chance among random bytes, as a country's letters do."""
        return {text for text in self.texts() if len(text) > 6}


class _Planter:
    """Fills each personal text column with a mark, as the data map lists them."""

    def __init__(self, session: Session, letter: str) -> None:
        self._session = session
        self._letter = letter
        self._numbers = count(1)
        self.person = Person(0)

    def row(self, table: str, **values: Any) -> Any:
        mapped = DATA_MAP[table]
        texts = {
            name: self._text(mapped.table.c[name])
            for name in mapped.personal_columns
            if mapped.table.c[name].type.python_type is str and name not in {*values, *_DERIVED}
        }
        statement = insert(mapped.table).values(**values, **texts).returning(mapped.key)
        key = self._session.execute(statement).scalar_one()
        self.person.marks += [Mark(table, name, str(key), text) for name, text in texts.items()]
        self.person.keys.setdefault(table, []).append(key)
        return key

    def _text(self, column: Column[Any]) -> str:
        number = next(self._numbers)
        text = f"{self._letter}{number:02d}-{column.table.name}-{column.name}-mark"
        if column.name == "email":
            return f"{text}@example.com"
        length = None if isinstance(column.type, Encrypted) else column.type.length  # type: ignore[attr-defined] # a String has it
        return text[:length]


def plant(letter: str, now: datetime | None = None) -> Person:
    """
    Insert a person with rows in every table of people.

    Of payments and invoices one is inside the period of the law and one is past it.

    Args:
        letter: First character of the person's marks; two digits follow.
    """
    now = now or datetime.now(UTC)
    with session_scope() as session:
        planter = _Planter(session, letter)
        person = planter.person
        person.id = planter.row(
            "users",
            role=Role.USER,
            is_active=True,
            tokens_valid_after=now - INSIDE,
            date_of_birth=date(1931, 3, ord(letter) % 28 + 1),
            created_at=now - INSIDE,
            last_activity_at=now - timedelta(days=3),
        )
        for age in (INSIDE, PAST):
            _plant_stay(planter, now - age)
        planter.row(
            "sign_ins",
            user_id=person.id,
            signed_in_at=now - timedelta(days=3),
            renewed_at=now - timedelta(days=1),
            expires_at=now + timedelta(days=11),
        )
        for granted in (True, False):
            planter.row(
                "data_consents",
                user_id=person.id,
                granted=granted,
                recorded_at=now - INSIDE + timedelta(seconds=not granted),
            )
        planter.row(
            "legal_holds",
            scope=HoldScope.PERSON,
            user_id=person.id,
            placed_by="an administrator",
            placed_at=now - INSIDE,
            released_at=now - INSIDE,
        )
        return person


def _plant_stay(planter: _Planter, at: datetime) -> None:
    user_id = planter.person.id
    day = at.date()
    address_id = planter.row("billing_addresses", created_at=at)
    booking_id = planter.row(
        "bookings",
        billing_address_id=address_id,
        **{name: value for name, value in _BOOKING.items() if name != "status"},
        user_id=user_id,
        status_date=day,
        check_in=day - timedelta(days=3),
        check_out=day,
        created_at=at - timedelta(days=37),
    )
    planter.row("companions", booking_id=booking_id, created_at=at)
    links = {"user_id": user_id, "booking_id": booking_id}
    planter.row(
        "payments",
        **{name: value for name, value in _PAYMENT.items() if name != "method"},
        **links,
        paid_at=at,
    )
    invoice_id = planter.row("invoices", **_INVOICE, **links, issued_on=day, supplied_on=day)
    for _line in range(2):
        planter.row("invoice_lines", **_LINE, invoice_id=invoice_id)
    planter.row("feedback", **links, rating=5, submitted_at=at)


def booking(user_id: int | None, check_out: date, **columns: Any) -> Booking:
    return Booking(
        **_BOOKING
        | {
            "user_id": user_id,
            "reference": secrets.token_hex(8),
            "check_in": check_out,
            "check_out": check_out,
            "created_at": datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC),
        }
        | columns
    )


def payment(user_id: int | None, paid_at: datetime, **columns: Any) -> Payment:
    return Payment(**_PAYMENT | {"user_id": user_id, "paid_at": paid_at} | columns)


def invoice(user_id: int | None, issued_on: date, **columns: Any) -> Invoice:
    number = secrets.token_hex(8)
    given = {"user_id": user_id, "number": number, "issued_on": issued_on, "supplied_on": issued_on}
    return Invoice(**_INVOICE | given | columns)


def feedback(user_id: int | None, submitted_at: datetime, **columns: Any) -> Feedback:
    return Feedback(**{"user_id": user_id, "rating": 5, "submitted_at": submitted_at} | columns)


def companion(stay: int, **columns: Any) -> Companion:
    return Companion(booking_id=stay, **{"created_at": datetime.now(UTC)} | columns)


def many_rows(user_id: int, rows: int, words: str = "") -> None:
    """Give a person very many rows, by copying one in the database."""
    one = feedback(user_id, datetime.now(UTC), comment=words or "short words", staff_response="yes")
    with session_scope() as session:
        session.add(one)
        session.flush()
        session.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows) "
                "INSERT INTO feedback (user_id, rating, comment, staff_response, submitted_at) "
                "SELECT user_id, rating, comment, staff_response, submitted_at "
                "FROM feedback, n WHERE id = :id"
            ),
            {"rows": rows - 1, "id": one.id},
        )


def line_values() -> Row:
    return dict(_LINE)


def person_hold(user_id: int) -> LegalHold:
    return LegalHold(
        scope=HoldScope.PERSON,
        user_id=user_id,
        reason="a claim",
        placed_by="an administrator",
        placed_at=datetime.now(UTC),
    )


def dump() -> Dump:
    """Every row of every table as the database holds it, by primary key."""
    found: Dump = {}
    with session_scope(read_only=True) as session:
        for table in Base.metadata.sorted_tables:
            every: Select[Any] = select(literal_column("*")).select_from(sql_table(table.name))
            rows = [dict(row._mapping) for row in session.execute(every)]
            names = [column.name for column in table.primary_key.columns]
            found[table.name] = {tuple(row[name] for name in names): row for row in rows}
    return found


def cells_in_plain() -> set[str]:
    """Every cell of every table, opened where it is encrypted."""
    with session_scope(read_only=True) as session:
        return {
            str(cell)
            for table in Base.metadata.sorted_tables
            for row in session.execute(select(table))
            for cell in row
        }


def left_of(texts: set[str], cells: set[str]) -> set[str]:
    everything = "\n".join(cells)
    # A country has three letters, which stand by chance in longer cells.
    return {text for text in texts if text in cells or (len(text) > 3 and text in everything)}


def keys_of(raw: Dump, user_id: int) -> Keys:
    """The keys of a person's rows, found through the links as the database holds them."""
    keys: Keys = {"users": {(user_id,)}}
    for table in ("bookings", "payments", "invoices", "feedback", "data_consents", "legal_holds",
                  "queued_erasures", "inactivity_notices", "sign_ins"):  # fmt: skip
        keys[table] = {key for key, row in raw[table].items() if row["user_id"] == user_id}
    keys["invoice_lines"] = {
        key for key, row in raw["invoice_lines"].items() if (row["invoice_id"],) in keys["invoices"]
    }
    keys["companions"] = {
        key for key, row in raw["companions"].items() if (row["booking_id"],) in keys["bookings"]
    }
    keys["billing_addresses"] = {
        (address,)
        for key in keys["bookings"]
        if (address := raw["bookings"][key]["billing_address_id"]) is not None
    }
    return keys


def without(raw: Dump, keys: Keys, *tables: str) -> Dump:
    """The dump without the rows of *keys* and without whole *tables*."""
    return {
        name: {key: row for key, row in rows.items() if key not in keys.get(name, set())}
        for name, rows in raw.items()
        if name not in tables
    }


def retire(now: datetime | None = None) -> RetentionRun:
    """Apply every policy, as somebody who has looked at what that does."""
    service = get_retention_service()
    planned = service.apply(ADMINISTRATOR, dry_run=True, now=now)
    return service.apply(ADMINISTRATOR, dry_run=False, plan_digest=planned.plan_digest, now=now)
