"""
Filling the built-in model: real bookings from a CSV file, or generated ones, with generated guests.

The file has the columns of the "Hotel booking demand" data set (Antonio, Almeida, Nunes: Data in
Brief 22, 2019), whose authors removed all identities.
"""

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Table, insert, update
from sqlalchemy.orm import Session

from backend.errors import RefusedError
from backend.models import DATA_MAP, Role, User
from backend.privacy.sql import last_number, reserve_numbers
from backend.services.audit_service import Actor, get_audit_service

GENERATED_BOOKINGS: Final = 2_000
_ROWS_PER_INSERT: Final = 1_000
_BOOKINGS_PER_GUEST: Final = 3
_CURRENCY: Final = "EUR"
# Portuguese VAT, as the data set's hotels are there: 6 % lodging, 13 % meals (in hundredths).
_LODGING_VAT: Final = 600
_MEALS_VAT: Final = 1_300
_MEAL_MINOR: Final = {"BB": 900, "HB": 2_400, "FB": 3_600}
_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
_FIRST: Final = (
    "Ana", "Bruno", "Carla", "Diego", "Elena", "Filip", "Greta", "Hugo", "Ines", "Jonas", "Katja",
    "Luis", "Maria", "Nuno", "Olga", "Pedro", "Rita", "Sven", "Teresa", "Vera",
)  # fmt: skip
_LAST: Final = (
    "Almeida", "Bauer", "Costa", "Dubois", "Esteves", "Ferreira", "Garcia", "Hansen", "Jensen",
    "Keller", "Lopes", "Martins", "Novak", "Oliveira", "Pereira", "Rossi", "Santos", "Weber",
)  # fmt: skip
_STREETS: Final = ("Rua do Sol", "Main Street", "Gartenweg", "Calle Mayor", "Rue des Fleurs")
_CITIES: Final = ("Lisboa", "Porto", "Madrid", "Lyon", "Bremen", "Leeds")
_REQUESTS: Final = ("a quiet room", "a high floor", "a cot", "late arrival", "twin beds")
_OPINIONS: Final = ("Friendly staff.", "The room was small.", "We will come again.", "Too loud.")

Progress = Callable[[int, int], None]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """How many rows were put into each table."""

    users: int
    bookings: int
    payments: int
    invoices: int
    invoice_lines: int
    feedback: int


class SampleService:
    """Loads bookings with everything that hangs from them."""

    def load(
        self,
        session: Session,
        actor: Actor,
        *,
        bookings: Path | None = None,
        guests: int | None = None,
        count: int = GENERATED_BOOKINGS,
        progress: Progress = lambda _done, _total: None,
    ) -> Loaded:
        """
        Load every booking of the file *bookings*, or *count* generated ones, in one transaction.

        Args:
            guests: Over how many generated guests they are spread; by default a third.
            progress: Told how many of how many bookings are in.

        Raises:
            RefusedError: The file cannot be read; names the line and the column.
        """
        # A fixed seed: the same file gives the same guests, so that runs can be compared.
        chance = random.Random(2026)  # noqa: S311 - sample data, no secret
        stays = list(_read(bookings)) if bookings else list(_generate(chance, count))
        if not stays:
            raise RefusedError("the file has no bookings")
        total = min(guests or max(1, len(stays) // _BOOKINGS_PER_GUEST), len(stays))
        writer = _Writer(session, chance, total)
        for start in range(0, len(stays), _ROWS_PER_INSERT):
            writer.write(stays[start : start + _ROWS_PER_INSERT], start)
            progress(min(start + _ROWS_PER_INSERT, len(stays)), len(stays))
        loaded = writer.finish()
        get_audit_service().record(session, "sample_loaded", actor, bookings=loaded.bookings)
        return loaded


class _Writer:
    """Makes the rows that hang from bookings and inserts them in bulk."""

    def __init__(self, session: Session, chance: random.Random, guests: int) -> None:
        self._session = session
        self._chance = chance
        self._guests = guests
        self._tables = {
            name: DATA_MAP[name]
            for name in ("users", "bookings", "payments", "invoices", "invoice_lines", "feedback")
        }
        self._first = {name: last_number(session, m.key) + 1 for name, m in self._tables.items()}
        self._count = dict.fromkeys(self._tables, 0)
        self._names: dict[int, str] = {}
        self._last_stay: dict[int, datetime] = {}

    def write(self, stays: Sequence[Row], start: int) -> None:
        rows: dict[str, list[Row]] = {name: [] for name in self._tables}
        for position, stay in enumerate(stays, start):
            guest = position % self._guests
            if guest == position:
                rows["users"].append(self._guest(guest, stay))
            user = self._first["users"] + guest
            ended = _noon(stay["check_out"])
            self._last_stay[user] = max(ended, self._last_stay.get(user, ended))
            booking = self._add(rows, "bookings", stay | self._booking_extras(position, user, stay))
            self._charge(rows, booking)
        for name, mapped in self._tables.items():
            if rows[name]:
                self._insert(mapped.table, rows[name])

    def finish(self) -> Loaded:
        activity = [{"id": user, "last_activity_at": at} for user, at in self._last_stay.items()]
        self._session.execute(update(User), activity)
        for mapped in self._tables.values():
            reserve_numbers(self._session, mapped.key, 0)
        return Loaded(**self._count)

    def _insert(self, table: Table, rows: list[Row]) -> None:
        self._session.execute(insert(table), rows)

    def _add(self, rows: dict[str, list[Row]], table: str, row: Row) -> Row:
        row["id"] = self._first[table] + self._count[table]
        self._count[table] += 1
        rows[table].append(row)
        return row

    def _guest(self, number: int, stay: Row) -> Row:
        pick = self._chance.choice
        first, last = pick(_FIRST), pick(_LAST)
        self._count["users"] += 1
        user = self._first["users"] + number
        self._names[user] = f"{first} {last}"
        return {
            "id": user,
            "email": f"{first}.{last}.{user}@example.com".lower(),
            "role": Role.USER,
            "is_active": True,
            "full_name": self._names[user],
            "phone": f"+351 9{self._digits(8)}",
            "street": f"{pick(_STREETS)} {self._chance.randint(1, 120)}",
            "postcode": f"{self._digits(4)}-{self._digits(3)}",
            "city": pick(_CITIES),
            "country": stay["country"],
            "date_of_birth": date(1945, 1, 1) + timedelta(days=self._chance.randint(0, 22_000)),
            "document_type": "passport",
            "document_number": f"P{self._digits(8)}",
            "staff_notes": f"{first} likes to talk about football." if number % 7 == 0 else None,
            "created_at": stay["created_at"],
        }

    def _booking_extras(self, position: int, user: int, stay: Row) -> Row:
        wishes = self._chance.sample(_REQUESTS, stay["special_request_count"])
        return {
            "user_id": user,
            "reference": f"HF{self._first['bookings'] + position:08d}{self._digits(4)}",
            "contact_phone": f"+351 2{self._digits(8)}",
            "special_requests": ", ".join(wishes) or None,
            "staff_notes": "Paid in advance." if stay["deposit_type"] == "Non Refund" else None,
            "ip_address": f"192.0.2.{self._chance.randint(1, 254)}",
            "currency": _CURRENCY,
        }

    def _charge(self, rows: dict[str, list[Row]], booking: Row) -> None:
        """Add payment, invoice and feedback where the stay took place or was paid for."""
        stayed = booking["status"] == "Check-Out"
        nights = booking["weekend_nights"] + booking["week_nights"]
        lodging = booking["adr_minor"] * nights
        if lodging == 0 or not (stayed or booking["deposit_type"] == "Non Refund"):
            return
        meals = _MEAL_MINOR.get(booking["meal"], 0) * nights * booking["adults"] if stayed else 0
        paid_at = _noon(booking["check_out"] if stayed else booking["created_at"].date())
        owner = {"user_id": booking["user_id"], "booking_id": booking["id"]}
        payment = owner | {
            "amount_minor": lodging + meals,
            "currency": _CURRENCY,
            "method": self._chance.choice(("card", "card", "transfer", "cash")),
            "status": "settled",
            "paid_at": paid_at,
            "payment_reference": f"pay_{self._digits(12)}",
            "card_last4": self._digits(4),
            "ip_address": booking["ip_address"],
        }
        self._add(rows, "payments", payment)
        if stayed:
            self._invoice(rows, booking, owner, lodging, meals)
            if booking["id"] % 5 == 0:
                self._opine(rows, owner, paid_at)

    def _invoice(
        self, rows: dict[str, list[Row]], booking: Row, owner: Row, lodging: int, meals: int
    ) -> None:
        parts = [("Lodging", lodging, _LODGING_VAT)]
        if meals:
            parts.append(("Meals", meals, _MEALS_VAT))
        lines = [_line(name, gross, rate) for name, gross, rate in parts]
        vat = sum(line["vat_minor"] for line in lines)
        number = self._first["invoices"] + self._count["invoices"]
        invoice = self._add(
            rows,
            "invoices",
            owner
            | {
                "number": f"{booking['check_out'].year}-{number:07d}",
                "issued_on": booking["check_out"],
                "supplied_on": booking["check_out"],
                "billing_name": self._names[booking["user_id"]],
                "billing_address": f"{self._chance.choice(_STREETS)} 1, {_CITIES[0]}",
                "currency": _CURRENCY,
                "net_minor": lodging + meals - vat,
                "vat_minor": vat,
                "gross_minor": lodging + meals,
            },
        )
        for line in lines:
            self._add(rows, "invoice_lines", line | {"invoice_id": invoice["id"]})

    def _opine(self, rows: dict[str, list[Row]], owner: Row, at: datetime) -> None:
        opinion = {
            "rating": self._chance.randint(1, 5),
            "comment": self._chance.choice(_OPINIONS),
            "submitted_at": at + timedelta(days=2),
        }
        self._add(rows, "feedback", owner | opinion)

    def _digits(self, count: int) -> str:
        return "".join(self._chance.choices("0123456789", k=count))


def _line(description: str, gross: int, rate: int) -> Row:
    # Prices include VAT; the cent is rounded half up.
    net = (gross * 10_000 + (10_000 + rate) // 2) // (10_000 + rate)
    return {
        "description": description,
        "quantity": 1,
        "unit_price_minor": net,
        "vat_rate_hundredths": rate,
        "net_minor": net,
        "vat_minor": gross - net,
    }


def _noon(day: date) -> datetime:
    return datetime.combine(day, time(12), UTC)


def _read(path: Path) -> Iterator[Row]:
    """Read the CSV file; every row of it is a booking."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                yield _parse(row, number)
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise RefusedError(f"the bookings file cannot be read: {type(err).__name__}") from None


def _parse(row: dict[str, Any], number: int) -> Row:
    field = "a column"
    try:
        values = {}
        for column, (field, read) in _COLUMNS.items():
            values[column] = read(row[field].strip())
        field = "arrival_date_month"
        month = _MONTHS.index(row[field]) + 1
        field = "arrival_date_day_of_month"
        arrival = date(int(row["arrival_date_year"]), month, int(row[field]))
    except (KeyError, ValueError, AttributeError, InvalidOperation):
        raise RefusedError(f"line {number} of the bookings file: {field} cannot be read") from None
    return _complete(values, arrival)


def _complete(values: Row, arrival: date) -> Row:
    nights = values["weekend_nights"] + values["week_nights"]
    return values | {
        "check_in": arrival,
        "check_out": arrival + timedelta(days=nights),
        "created_at": _noon(arrival - timedelta(days=values["lead_time_days"])),
    }


def _minor(text: str) -> int:
    amount = Decimal(text) * 100
    if amount < 0 or amount != amount.to_integral_value():
        raise ValueError("no amount in cents")
    return int(amount)


def _count(text: str) -> int:
    if not text.isdigit():
        raise ValueError("no count")
    return int(text)


def _optional(text: str) -> str | None:
    return None if text in ("NULL", "NA", "") else text


def _american_date(text: str) -> date:
    month, day, year = (int(part) for part in text.split("/"))
    return date(year, month, day)


# Column of the model: column of the file, and how it is read.
_COLUMNS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "hotel": ("hotel", str),
    "status": ("reservation_status", str),
    "status_date": ("reservation_status_date", _american_date),
    "weekend_nights": ("stays_in_weekend_nights", _count),
    "week_nights": ("stays_in_week_nights", _count),
    "adults": ("adults", _count),
    "children": ("children", lambda text: None if text == "NA" else _count(text)),
    "babies": ("babies", _count),
    "meal": ("meal", str),
    "country": ("country", lambda text: (_optional(text) or "")[:3] or None),
    "market_segment": ("market_segment", str),
    "distribution_channel": ("distribution_channel", str),
    "is_repeated_guest": ("is_repeated_guest", lambda text: bool(_count(text))),
    "previous_cancellations": ("previous_cancellations", _count),
    "previous_bookings_not_canceled": ("previous_bookings_not_canceled", _count),
    "reserved_room_type": ("reserved_room_type", str),
    "assigned_room_type": ("assigned_room_type", str),
    "booking_changes": ("booking_changes", _count),
    "deposit_type": ("deposit_type", str),
    "customer_type": ("customer_type", str),
    "lead_time_days": ("lead_time", _count),
    "days_in_waiting_list": ("days_in_waiting_list", _count),
    "agent": ("agent", _optional),
    "company": ("company", _optional),
    "adr_minor": ("adr", _minor),
    "parking_spaces": ("required_car_parking_spaces", _count),
    "special_request_count": ("total_of_special_requests", _count),
}


def _generate(chance: random.Random, count: int) -> Iterator[Row]:
    """Make bookings of the last ten years, in order of arrival."""
    today = datetime.now(UTC).date()
    for position in range(count):
        ago = 3_650 - 3_640 * position // count
        stayed = chance.random() < 0.6  # noqa: PLR2004 - share of stays in the data set, roughly
        arrival = today - timedelta(days=ago)
        row = {
            "hotel": chance.choice(("Resort Hotel", "City Hotel")),
            "status": "Check-Out" if stayed else "Canceled",
            "status_date": arrival,
            "weekend_nights": chance.randint(0, 2),
            "week_nights": chance.randint(1, 5),
            "adults": chance.randint(1, 2),
            "children": chance.choice((0, 0, 0, 1)),
            "babies": 0,
            "meal": chance.choice(("BB", "HB", "SC")),
            "country": chance.choice(("PRT", "ESP", "GBR", "FRA", "DEU")),
            "market_segment": "Online TA",
            "distribution_channel": "TA/TO",
            "is_repeated_guest": False,
            "previous_cancellations": 0,
            "previous_bookings_not_canceled": 0,
            "reserved_room_type": "A",
            "assigned_room_type": "A",
            "booking_changes": 0,
            "deposit_type": "No Deposit",
            "customer_type": "Transient",
            "lead_time_days": chance.randint(0, 200),
            "days_in_waiting_list": 0,
            "agent": "240",
            "company": None,
            "adr_minor": chance.randint(4_000, 20_000),
            "parking_spaces": 0,
            "special_request_count": chance.choice((0, 0, 1, 2)),
        }
        yield _complete(row, arrival)


@lru_cache(maxsize=1)
def get_sample_service() -> SampleService:
    return SampleService()
