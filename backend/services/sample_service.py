"""Filling the built-in model: bookings from a file, or generated, with generated guests."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Table, insert, update
from sqlalchemy.orm import Session

from backend.errors import RefusedError
from backend.models import DATA_MAP, Role, User
from backend.privacy.sql import last_number, reserve_numbers
from backend.services.audit_service import Actor, get_audit_service
from backend.services.sample_bookings import generate_bookings, noon, read_bookings

GENERATED_BOOKINGS: Final = 2_000
_ROWS_PER_INSERT: Final = 1_000
_BOOKINGS_PER_GUEST: Final = 3
_CURRENCY: Final = "EUR"
# Portuguese VAT, as the data set's hotels are there: 6 % lodging, 13 % meals (in hundredths).
_LODGING_VAT: Final = 600
_MEALS_VAT: Final = 1_300
_MEAL_MINOR: Final = {"BB": 900, "HB": 2_400, "FB": 3_600}
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

# Parents first: a row is inserted after what it refers to.
_TABLES: Final = (
    "users", "billing_addresses", "bookings", "companions", "payments", "invoices",
    "invoice_lines", "feedback",
)  # fmt: skip
_BOOKINGS_PER_COMPANION: Final = 4

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
    companions: int
    billing_addresses: int


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
        stays = (
            list(read_bookings(bookings)) if bookings else list(generate_bookings(chance, count))
        )
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
        self._tables = {name: DATA_MAP[name] for name in _TABLES}
        self._first = {name: last_number(session, m.key) + 1 for name, m in self._tables.items()}
        self._count = dict.fromkeys(self._tables, 0)
        self._names: dict[int, str] = {}
        self._addresses: dict[str, int] = {}
        self._last_stay: dict[int, datetime] = {}

    def write(self, stays: Sequence[Row], start: int) -> None:
        rows: dict[str, list[Row]] = {name: [] for name in self._tables}
        for position, stay in enumerate(stays, start):
            guest = position % self._guests
            if guest == position:
                rows["users"].append(self._guest(guest, stay))
            user = self._first["users"] + guest
            ended = noon(stay["check_out"])
            self._last_stay[user] = max(ended, self._last_stay.get(user, ended))
            extras = self._booking_extras(position, user, stay)
            extras["billing_address_id"] = self._billing_address(rows, stay)
            booking = self._add(rows, "bookings", stay | extras)
            if stay["adults"] > 1 and position % _BOOKINGS_PER_COMPANION == 0:
                self._accompany(rows, booking)
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

    def _billing_address(self, rows: dict[str, list[Row]], stay: Row) -> int | None:
        """Return the address of the company that pays; its guests share it."""
        company = stay["company"]
        if company is None:
            return None
        if company not in self._addresses:
            number = self._first["billing_addresses"] + self._count["billing_addresses"]
            address = {
                "company": f"Company {company}",
                "street": f"{self._chance.choice(_STREETS)} {self._chance.randint(1, 120)}",
                "postcode": f"{self._digits(4)}-{self._digits(3)}",
                "city": self._chance.choice(_CITIES),
                "country": "PRT",
                "contact_name": f"{self._chance.choice(_FIRST)} {self._chance.choice(_LAST)}",
                "email": f"accounts.{number}@example.com",
                "created_at": stay["created_at"],
            }
            self._addresses[company] = self._add(rows, "billing_addresses", address)["id"]
        return self._addresses[company]

    def _accompany(self, rows: dict[str, list[Row]], booking: Row) -> None:
        first, last = self._chance.choice(_FIRST), self._chance.choice(_LAST)
        companion = {
            "booking_id": booking["id"],
            "full_name": f"{first} {last}",
            "email": f"{first}.{last}.{booking['id']}@example.org".lower(),
            "created_at": booking["created_at"],
        }
        self._add(rows, "companions", companion)

    def _charge(self, rows: dict[str, list[Row]], booking: Row) -> None:
        """Add payment, invoice and feedback where the stay took place or was paid for."""
        stayed = booking["status"] == "Check-Out"
        nights = booking["weekend_nights"] + booking["week_nights"]
        lodging = booking["adr_minor"] * nights
        if lodging == 0 or not (stayed or booking["deposit_type"] == "Non Refund"):
            return
        meals = _MEAL_MINOR.get(booking["meal"], 0) * nights * booking["adults"] if stayed else 0
        paid_at = noon(booking["check_out"] if stayed else booking["created_at"].date())
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


@lru_cache(maxsize=1)
def get_sample_service() -> SampleService:
    return SampleService()
