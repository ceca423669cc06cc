"""
Records of processing (GDPR art. 30(1)), derived from the data map.

An activity is one purpose: the tables that hold people's data for it are told together. What the
map cannot know is passed in: the controller, the policies in force, how columns are protected.

Source: Regulation (EU) 2016/679, art. 30(1)(a) to (g).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import TableRole
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.periods import Period

FORMAT_NAME: Final = "holdfast-processing-records"
FORMAT_VERSION: Final = 1
_ABBREVIATIONS: Final = {"id": "ID", "ip": "IP"}


class Protection(StrEnum):
    """What stands in the database in place of a column's values."""

    ENCRYPTED = "encrypted"
    BEING_ENCRYPTED = "being_encrypted"  # Some rows are still in plain.
    KEYED_HASH = "keyed_hash"
    NOT_ENCRYPTED = "not_encrypted"

    @property
    def words(self) -> str:
        return self.value.replace("_", " ")


# By table and column; what is not named is not encrypted.
Protections = Mapping[tuple[str, str], Protection]


@dataclass(frozen=True, slots=True)
class Clock:
    """The policy in force for one data type."""

    period: Period
    action: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class Controller:
    name: str
    contact: str


@dataclass(frozen=True, slots=True)
class Measure:
    """One technical or organisational measure (art. 32(1)), in words."""

    name: str
    words: str


@dataclass(frozen=True, slots=True)
class DataSubjects:
    """
    One category of people.

    They are those of the subject table or, where *third_party*, the others whom the columns
    declared so name.
    """

    who: str
    third_party: bool
    tables: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DataCategory:
    """One category of personal data: in Fides' vocabulary, for a reader, and where it is."""

    category: str
    words: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """When the rows of one table leave; without *period*, with what they belong to."""

    table: str
    data_type: str | None
    period: str | None
    action: str | None
    words: str
    kept_by_law: str | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What is done with people's data for one purpose."""

    purpose: str
    tables: tuple[str, ...]
    lawful_bases: tuple[str, ...]
    sources: tuple[str, ...]
    data_subjects: tuple[DataSubjects, ...]
    data_categories: tuple[DataCategory, ...]
    recipients: tuple[str, ...]
    transfers: tuple[str, ...]
    time_limits: tuple[TimeLimit, ...]
    protection: Mapping[Protection, tuple[str, ...]]

    @property
    def protection_words(self) -> str:
        return _counted(self.protection)


@dataclass(frozen=True, slots=True)
class Records:
    """All activities of one controller, as of *generated_at*."""

    format: str
    version: int
    generated_at: datetime
    controller: Controller
    activities: tuple[Activity, ...]
    measures: tuple[Measure, ...]


def records(
    data_map: DataMap,
    *,
    controller: Controller,
    clocks: Mapping[str, Clock],
    protections: Protections,
    measures: Sequence[Measure],
    now: datetime,
) -> Records:
    """
    Draw up the records: one activity per distinct purpose, in the map's order after the people's.

    Args:
        clocks: The policy in force per data type, for every one of *data_map*.
        measures: Those of the whole service; how columns are encrypted is added, counted.
    """
    by_purpose: dict[str, list[MappedTable]] = {}
    for mapped in sorted(data_map.of_people, key=lambda one: one is not data_map.subject):
        by_purpose.setdefault(mapped.rule.purpose, []).append(mapped)
    encryption = Measure(
        "encryption of columns", _counted(_protection(data_map.of_people, protections))
    )
    return Records(
        FORMAT_NAME,
        FORMAT_VERSION,
        now,
        controller,
        tuple(
            _activity(data_map, purpose, tables, clocks, protections)
            for purpose, tables in by_purpose.items()
        ),
        (encryption, *measures),
    )


def category_words(category: str) -> str:
    """Spell a category of Fides' vocabulary for a reader: `Contact: address, postal code`."""
    parts = [
        " ".join(_ABBREVIATIONS.get(word, word) for word in part.split("_"))
        for part in category.removeprefix("user.").split(".")
    ]
    first, rest = parts[0][:1].upper() + parts[0][1:], parts[1:]
    return f"{first}: {', '.join(rest)}" if rest else first


def _activity(
    data_map: DataMap,
    purpose: str,
    tables: Sequence[MappedTable],
    clocks: Mapping[str, Clock],
    protections: Protections,
) -> Activity:
    rules = [mapped.rule for mapped in tables]
    return Activity(
        purpose=purpose,
        tables=tuple(mapped.name for mapped in tables),
        lawful_bases=_distinct(rule.basis for rule in rules),
        sources=_distinct(rule.source for rule in rules),
        data_subjects=tuple(_data_subjects(data_map, tables)),
        data_categories=_data_categories(tables),
        recipients=_distinct(one for rule in rules for one in rule.disclosure.recipients),
        transfers=_distinct(rule.disclosure.transfers for rule in rules),
        time_limits=tuple(_time_limit(data_map, mapped, clocks) for mapped in tables),
        protection=_protection(tables, protections),
    )


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))


def _data_subjects(data_map: DataMap, tables: Sequence[MappedTable]) -> Iterable[DataSubjects]:
    # A shared row belongs to nobody: it is about its people only where a column says so.
    own = tuple(
        mapped.name
        for mapped in tables
        if mapped.rule.role is not TableRole.SHARED
        or mapped.personal_columns.keys() - mapped.third_party_columns
    )
    if own:
        yield DataSubjects(_spaced(data_map.subject.name), third_party=False, tables=own)
    for mapped in tables:
        if mapped.third_party_columns:
            who = f"others whom {_spaced(mapped.name)} name"
            yield DataSubjects(who, third_party=True, tables=(mapped.name,))


def _data_categories(tables: Sequence[MappedTable]) -> tuple[DataCategory, ...]:
    columns: dict[str, list[str]] = {}
    for mapped in tables:
        for name, rule in mapped.personal_columns.items():
            columns.setdefault(rule.category, []).append(f"{mapped.name}.{name}")
    return tuple(
        DataCategory(category, category_words(category), tuple(columns[category]))
        for category in sorted(columns)
    )


def _time_limit(data_map: DataMap, mapped: MappedTable, clocks: Mapping[str, Clock]) -> TimeLimit:
    counted_by = mapped.clock
    retention = None if counted_by is None else counted_by.rule.retention
    if counted_by is None or retention is None:
        words = (
            "as long as a row of anybody's refers to it"
            if mapped.rule.role is TableRole.SHARED
            else f"as long as the person's row in {_spaced(data_map.subject.name)}"
        )
        return TimeLimit(mapped.name, None, None, None, words, mapped.statute)
    clock = clocks[retention.data_type]
    words = clock.period.since(_spaced(retention.anchor))
    if counted_by is not mapped:
        words += f" of its row in {_spaced(counted_by.name)}"
    words += f", then {clock.action}d" if clock.enabled else "; not enforced: the policy is off"
    if counted_by.table.c[retention.anchor].nullable:
        words += "; where that is not known, without limit"
    if retention.only:
        only = " and ".join(f"{_spaced(name)} is {v}" for name, v in retention.only.items())
        words += f"; only where {only}, others without limit"
    return TimeLimit(
        mapped.name,
        retention.data_type,
        str(clock.period),
        clock.action if clock.enabled else None,
        words,
        mapped.statute,
    )


def _protection(
    tables: Iterable[MappedTable], protections: Protections
) -> dict[Protection, tuple[str, ...]]:
    found: dict[Protection, list[str]] = {one: [] for one in Protection}
    for mapped in tables:
        for name in mapped.personal_columns:
            protection = protections.get((mapped.name, name), Protection.NOT_ENCRYPTED)
            found[protection].append(f"{mapped.name}.{name}")
    return {one: tuple(columns) for one, columns in found.items()}


def _counted(protection: Mapping[Protection, Sequence[str]]) -> str:
    total = sum(map(len, protection.values()))
    parts = [f"{len(names)} {one.words}" for one, names in protection.items() if names]
    columns = "column" if total == 1 else "columns"
    return f"{total} personal {columns}: {', '.join(parts)}" if total else "no personal columns"


def _spaced(name: str) -> str:
    return name.replace("_", " ")
