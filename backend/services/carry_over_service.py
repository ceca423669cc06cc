"""What a restore carries over from the live database: its records, and accounts as they are now."""

from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Integer, delete, insert, select, update
from sqlalchemy.orm import Session

from backend.models import DATA_MAP, DataConsent, Installation, User
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.sql import last_number, reserve_numbers

_ROWS_PER_COPY: Final = 500


class CarryOverService:
    """Copies control rows, consents, rights and passwords into a database that was rebuilt."""

    def carry_over(self, live: Session, restored: Session) -> int:
        """
        Carry over everything; return how many consents the backup did not have.

        No row number of the live database is given out again, whatever the backup knew.
        """
        consents = self._records(live, restored)
        _advance_row_numbers(live, restored)
        self._accounts(live, restored)
        return consents

    def _records(self, live: Session, restored: Session) -> int:
        """
        Replace the backup's control rows by the live ones; return how many consents are new.

        Only where both are the same installation: on a new machine the backup's are all there is.
        """
        ours, theirs = (s.scalars(select(Installation)).one() for s in (live, restored))
        if ours.id != theirs.id:
            return 0
        # A backup of before the first certificate has no key for them.
        theirs.signing_key = ours.signing_key
        saved = set(restored.scalars(select(DataConsent.id)))
        there, here = (set(s.scalars(select(User.id))) for s in (restored, live))
        for mapped in DATA_MAP.carried_over:
            _make_room(restored, mapped, sorted(there & here))
            rows = live.execute(select(mapped.table).execution_options(yield_per=_ROWS_PER_COPY))
            for part in rows.mappings().partitions(_ROWS_PER_COPY):
                mine = [dict(row) for row in part if _has_its_person(mapped, row, there)]
                if mine:
                    restored.execute(insert(mapped.table), mine)
        return sum(key not in saved for key in restored.scalars(select(DataConsent.id)))

    def _accounts(self, live: Session, restored: Session) -> None:
        """Keep rights and passwords as they are now: a restore must not bring back old ones."""
        columns = (User.uid, User.password_hash, User.role, User.is_active, User.tokens_valid_after)
        before = {row.uid: tuple(row) for row in restored.execute(select(*columns))}
        for row in live.execute(select(*columns).where(User.anonymized_at.is_(None))):
            if row.uid in before and before[row.uid] != tuple(row):
                values = dict(zip([c.key for c in columns[1:]], tuple(row)[1:], strict=True))
                restored.execute(update(User).where(User.uid == row.uid).values(values))


def _make_room(restored: Session, mapped: MappedTable, people: list[int]) -> None:
    """Delete the backup's rows that live ones replace: not those of people whom it alone knows."""
    if mapped.link is None:
        restored.execute(delete(mapped.table))
        return
    restored.execute(delete(mapped.table).where(mapped.link.is_(None)))
    for at in range(0, len(people), _ROWS_PER_COPY):
        part = people[at : at + _ROWS_PER_COPY]
        restored.execute(delete(mapped.table).where(mapped.link.in_(part)))


def _has_its_person(mapped: MappedTable, row: Any, people: set[int]) -> bool:
    """Whether the person whose row this is exists; rows of people's own need theirs."""
    owner = None if mapped.link is None else row[mapped.link.name]
    return owner is None or owner in people


def _advance_row_numbers(live: Session, restored: Session) -> None:
    """Make sure that no row number of the live database is given out again."""
    for mapped in DATA_MAP.tables:
        if isinstance(mapped.table.primary_key.columns[0].type, Integer):
            reserve_numbers(restored, mapped.key, last_number(live, mapped.key))


@lru_cache(maxsize=1)
def get_carry_over_service() -> CarryOverService:
    return CarryOverService()
