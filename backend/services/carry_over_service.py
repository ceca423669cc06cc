"""What a restore carries over from the live database: its records, and accounts as they are now."""

from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Executable, Integer, Text, cast, delete, insert, select, update
from sqlalchemy.orm import Session

from backend.models import DATA_MAP, Approval, DataConsent, Installation, SignIn, User
from backend.privacy.comparison import compare, windows
from backend.privacy.mapped_tables import MappedTable
from backend.privacy.sql import last_number, reserve_numbers
from backend.services.notice_service import get_notice_service

_ROWS_PER_COPY: Final = 500
_ROWS_PER_READ: Final = 1000
_ACCOUNT: Final = DATA_MAP[User.__tablename__].table.c
_OF_ACCOUNTS: Final = (
    "password_hash", "role", "is_active", "tokens_valid_after", "totp_secret", "totp_step",
)  # fmt: skip


class CarryOverService:
    """Copies control rows, consents, rights and passwords into a database that was rebuilt."""

    def carry_over(self, live: Session, restored: Session) -> int:
        """
        Carry over everything; return how many consents the backup did not have.

        No row number of the live database is given out again, whatever the backup knew.
        """
        consents = self._records(live, restored)
        _advance_row_numbers(live, restored)
        gone = self._accounts(live, restored)
        if self.is_same(live, restored):
            for part in range(0, len(gone), _ROWS_PER_COPY):
                get_notice_service().count_as_told(restored, gone[part : part + _ROWS_PER_COPY])
        return consents

    def is_same(self, live: Session, restored: Session) -> bool:
        """Say whether both are one installation, so that *live* knows what was done since."""
        ours, theirs = (s.scalars(select(Installation.id)).one() for s in (live, restored))
        return ours == theirs

    def _records(self, live: Session, restored: Session) -> int:
        """
        Replace the backup's control rows by the live ones; return how many consents are new.

        Only where both are the same installation: on a new machine the backup's are all there is.
        """
        ours, theirs = (s.scalars(select(Installation)).one() for s in (live, restored))
        if ours.id != theirs.id:
            # Who has signed out since the backup is not known here, nor what was refused: everybody
            # signs in and asks again.
            for waiting in (SignIn, Approval):
                restored.execute(delete(waiting))
            # Tokens carry whole seconds.
            since = datetime.now(UTC).replace(microsecond=0)
            restored.execute(update(User).values(tokens_valid_after=since))
            return 0
        # A backup of before the first certificate has no key for them.
        theirs.signing_key = ours.signing_key
        consents = DATA_MAP[DataConsent.__tablename__]
        new = compare(live, restored, consents).lost
        for mapped in DATA_MAP.carried_over:
            _make_room(live, restored, mapped)
            left_out = _copy_rows(live, restored, mapped)
            if mapped is consents:
                # The backup has no consents of people whom it does not have.
                new -= left_out
        return new

    def _accounts(self, live: Session, restored: Session) -> list[UUID]:
        """
        Keep rights and passwords as they are now: a restore must not bring back old ones.

        Returns:
            Who is in the backup and not, or not by name, in the live database.
        """
        # Their text is in the order of the numbers, and cheaper to read.
        uid = cast(_ACCOUNT.uid, Text)
        columns = [_ACCOUNT[name] for name in _OF_ACCOUNTS]
        accounts = select(uid, *columns).order_by(_ACCOUNT.uid)
        changed: list[tuple[Any, ...]] = []
        gone: list[UUID] = []
        for now, before in windows(
            _parts(live, accounts.where(_ACCOUNT.anonymized_at.is_(None))),
            _parts(restored, accounts),
            itemgetter(0),
        ):
            if now != before:
                known = {row[0]: row for row in before}
                changed += (row for row in now if row != known.get(row[0], row))
                gone += (UUID(uid) for uid in known.keys() - {row[0] for row in now})
        for account, *values in changed:
            restored.execute(
                update(User)
                .where(User.uid == UUID(account))
                .values(dict(zip(_OF_ACCOUNTS, values, strict=True)))
            )
        return gone


def _make_room(live: Session, restored: Session, mapped: MappedTable) -> None:
    """Delete the backup's rows that live ones replace: not those of people whom it alone knows."""
    if mapped.link is None:
        restored.execute(delete(mapped.table))
        return
    restored.execute(delete(mapped.table).where(mapped.link.is_(None)))
    for owners in _owners(restored, mapped.link):
        known = _people_among(owners, live)
        restored.execute(delete(mapped.table).where(mapped.link.in_(known)))


def _copy_rows(live: Session, restored: Session, mapped: MappedTable) -> int:
    """Copy the live rows whose person is there; return how many are left out."""
    left_out = 0
    rows = live.execute(select(mapped.table).execution_options(yield_per=_ROWS_PER_COPY))
    for part in rows.mappings().partitions():
        found = [dict(row) for row in part]
        if mapped.link is not None:
            name = mapped.link.name
            there = {None, *_people_among({row[name] for row in found}, restored)}
            found = [row for row in found if row[name] in there]
        if found:
            restored.execute(insert(mapped.table), found)
        left_out += len(part) - len(found)
    return left_out


def _owners(session: Session, link: Any) -> Iterator[Sequence[int]]:
    """Yield the people who have rows there, by their ids, which may change meanwhile."""
    owners = select(link).where(link.is_not(None)).distinct().order_by(link).limit(_ROWS_PER_COPY)
    part = session.scalars(owners).all()
    while part:
        yield part
        part = session.scalars(owners.where(link > part[-1])).all()


def _people_among(ids: Collection[int | None], session: Session) -> Sequence[int]:
    return session.scalars(select(User.id).where(User.id.in_(ids))).all()


def _parts(session: Session, rows: Executable) -> Iterator[Sequence[tuple[Any, ...]]]:
    read = session.execute(rows.execution_options(yield_per=_ROWS_PER_READ))
    for part in read.partitions():
        yield [tuple(row) for row in part]


def _advance_row_numbers(live: Session, restored: Session) -> None:
    """Make sure that no row number of the live database is given out again."""
    for mapped in DATA_MAP.tables:
        if isinstance(mapped.table.primary_key.columns[0].type, Integer):
            reserve_numbers(restored, mapped.key, last_number(live, mapped.key))


@lru_cache(maxsize=1)
def get_carry_over_service() -> CarryOverService:
    return CarryOverService()
