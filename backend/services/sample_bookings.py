"""
Bookings to fill the model with: read from a file, or generated.

The file has the columns of the "Hotel booking demand" data set (Antonio, Almeida, Nunes: Data in
Brief 22, 2019), whose authors removed all identities.
"""

import csv
import random
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

from backend.errors import RefusedError

_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

Row = dict[str, Any]


def noon(day: date) -> datetime:
    return datetime.combine(day, time(12), UTC)


def read_bookings(path: Path) -> Iterator[Row]:
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
        "created_at": noon(arrival - timedelta(days=values["lead_time_days"])),
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


def generate_bookings(chance: random.Random, count: int) -> Iterator[Row]:
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
            "company": chance.choice((None, None, None, None, None, "40", "67", "223")),
            "adr_minor": chance.randint(4_000, 20_000),
            "parking_spaces": 0,
            "special_request_count": chance.choice((0, 0, 1, 2)),
        }
        yield _complete(row, arrival)
