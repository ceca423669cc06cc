"""
The notice: what GDPR art. 15(1) and (2) ask to be told with the data, of one person's rows.

It is derived from the data map. Tables in which nothing is held of the person are named as such.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from backend.privacy.clocks import Periods, data_type_of
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import TableRole
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.rights import rights
from backend.privacy.storage_ends import End, ends
from backend.privacy.walk import Subjects

_WITH_ACCOUNT = "as long as the account"


@dataclass(frozen=True, slots=True)
class Terms:
    """
    What the notice says beyond the map.

    Attributes:
        periods: Retention period per data type.
        by_hand: Data types whose due rows are not removed by themselves.
        held: Data types of which a legal hold keeps rows of the person; `None` keeps all.
    """

    controller: str
    contact: str
    backups_expire_after_days: int
    periods: Periods
    by_hand: frozenset[str] = frozenset()
    held: frozenset[str | None] = frozenset()


def notice(
    session: Session,
    data_map: DataMap,
    subjects: Subjects,
    terms: Terms,
    *,
    counts: Mapping[str, int],
    consented: list[str],
    now: datetime,
) -> dict[str, Any]:
    """
    Return what the person is told beside their data.

    Args:
        counts: Rows of the person per table.
        consented: The purposes for which their consent stands.
    """
    held = [mapped for mapped in data_map.of_people if counts[mapped.name]]
    found = ends(session, data_map, subjects, terms.periods)
    tables = {
        mapped.name: _table(data_map, mapped, counts[mapped.name], found, terms, now)
        for mapped in held
    }
    return {
        "controller": {"name": terms.controller, "contact": terms.contact},
        "tables": tables,
        "nothing_held": [m.name for m in data_map.of_people if m.name not in tables],
        "rights": rights(tables, terms.contact, consented),
        "backups_expire_after_days": terms.backups_expire_after_days,
    }


def _table(
    data_map: DataMap,
    mapped: MappedTable,
    rows: int,
    found: Mapping[str, End],
    terms: Terms,
    now: datetime,
) -> dict[str, Any]:
    rule, told, end = mapped.rule, mapped.rule.disclosure, found.get(mapped.name, End())
    until = end.last if mapped.statute and end.last and end.last > now.date() else None
    return {
        "rows": rows,
        "purpose": rule.purpose,
        "lawful_basis": rule.basis,
        "categories": sorted({column.category for column in mapped.personal_columns.values()}),
        "recipients": list(told.recipients),
        "source": rule.source,
        "kept_for": _kept_for(data_map, mapped, end, terms),
        "last_due_on": None if end.undated else end.last,
        "kept_by_law": mapped.statute,
        "kept_by_law_until": until,
        "on_hold": bool(terms.held & {None, data_type_of(mapped.clock or data_map.subject)}),
        "transfers": told.transfers or None,
        "automated_decisions": told.automated_decisions or None,
    }


def _kept_for(data_map: DataMap, mapped: MappedTable, end: End, terms: Terms) -> str:
    if mapped.rule.role is TableRole.SHARED:
        return "as long as a row of anybody's refers to it"
    clock = mapped.clock
    if clock is None or clock.rule.retention is None or end.last is None:
        # Without a clock the rows go with the account, whose own end is told with it.
        return _WITH_ACCOUNT if mapped is not data_map.subject else "as long as it is in use"
    retention = clock.rule.retention
    anchor = retention.anchor.removesuffix("_at").removesuffix("_on").replace("_", " ")
    words = terms.periods[retention.data_type].since(anchor)
    if retention.data_type in terms.by_hand:
        words += ", then removed by hand"
    return words + (f"; where that is not known, {_WITH_ACCOUNT}" if end.undated else "")
