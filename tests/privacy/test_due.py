"""Which rows are due, to the instant and the day, and that a digest tells every plan apart."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Integer,
    MetaData,
    Uuid,
    delete,
    event,
    insert,
    update,
)
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import Session

from backend.db_utils import make_engine
from backend.models.base import UtcDateTime
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode, OnErase, Retention, not_personal, personal
from backend.privacy.due import Clockwork, Holds, count_due_by, plan_retention
from backend.privacy.periods import Period
from tests.conftest import PostgresServer
from tests.privacy.odd_maps import by_law, key_of, link, number, owned, people, text_key

DELETE, ANONYMIZE = EraseMode.DELETE, EraseMode.ANONYMIZE
TICK, DAY = timedelta(microseconds=1), timedelta(days=1)
NOW: Final = datetime(2026, 3, 31, 12, 30, 15, 123456, tzinfo=UTC)
OLD, YOUNG = NOW - 4000 * DAY, NOW - DAY
LENGTHS = ("P1D", "P1M", "P1Y", "P7Y", "P2555D", "P1Y1M1D")
COUNTED = pytest.mark.parametrize("year_end", [False, True])


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database of its own."""
    if request.param == "sqlite":
        made = make_engine(f"sqlite:///{tmp_path}/due.db")
        yield made
        made.dispose()
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    schema = f"due_{token_hex(6)}"
    made = make_engine(f"{server.url('postgres')}?options=-csearch_path%3D{schema}")
    server.run(f"CREATE SCHEMA {schema}")
    yield made
    made.dispose()
    server.run(f"DROP SCHEMA {schema} CASCADE")


def hotel(kind: Any = Integer) -> MetaData:
    """People counted from an instant, invoices from a day; visits have a key of two columns."""
    m = MetaData()
    people(m)
    by_law(m, "invoices", number(kind), link("person_id", "people.id"), by="person_id")
    owned(
        m, "visits",
        Column("place", Integer, primary_key=True, info=not_personal("where")),
        Column("turn", Integer, primary_key=True, info=not_personal("which")),
        Column("left_at", UtcDateTime, info=personal("user.behavior", OnErase.MONTH)),
        link("person_id", "people.id"), by="person_id", retention=Retention("visit", "left_at"),
    )  # fmt: skip
    return m


@contextmanager
def made(engine: Engine, metadata: MetaData) -> Iterator[tuple[Session, DataMap]]:
    metadata.create_all(engine)
    with Session(engine) as session:
        yield session, DataMap.of(metadata)


def clockwork(data_type: str, period: Period, now: datetime = NOW, **also: Any) -> Clockwork:
    given: dict[str, Any] = {"mode": DELETE, "periods": {data_type: period}, "now": now}
    return Clockwork(data_type, **given | also)


def years(count: int = 1) -> Period:
    return Period.parse(f"P{count}Y")


@COUNTED
def test_an_instant_is_due_at_its_end_and_not_a_microsecond_before(
    engine: Engine, year_end: bool
) -> None:
    with made(engine, hotel()) as (session, data_map):
        table = data_map["people"].table
        for text in LENGTHS:
            period = Period.parse(text, year_end=year_end)
            session.execute(delete(table))
            last = period.cutoff(NOW)
            for id_, seen in enumerate((last - TICK, last, last + TICK, None), start=1):
                session.execute(insert(table).values(id=id_, seen_at=seen))
            assert plan_retention(session, data_map, clockwork("person", period)).matched == 2, text
            # The one that stayed goes at the end that it is told, and no microsecond before.
            end = period.end(last + TICK)
            counts = count_due_by(
                session, data_map, clockwork("person", period), [end - TICK, end, end + 9999 * DAY]
            )
            assert counts == [2, 3, 3], text


@COUNTED
def test_a_day_is_due_from_midnight_after_its_end_and_not_a_microsecond_before(
    engine: Engine, year_end: bool
) -> None:
    with made(engine, hotel()) as (session, data_map):
        table = data_map["invoices"].table
        for text in LENGTHS:
            period = Period.parse(text, year_end=year_end)
            session.execute(delete(table))
            first = period.cutoff_day(NOW)
            for id_, day in enumerate((first - DAY, first, None), start=1):
                session.execute(insert(table).values(id=id_, issued_on=day))
            one = clockwork("invoice", period)
            assert plan_retention(session, data_map, one).matched == 1, text
            end = datetime.combine(period.end_of_day(first), datetime.min.time(), UTC)
            for now, due in ((end - TICK, 1), (end, 2)):
                at = plan_retention(session, data_map, replace(one, now=now))
                assert at.matched == due, (text, now)
                assert count_due_by(session, data_map, one, [now]) == [due]


@pytest.mark.parametrize("data_type", ["person", "visit"])
def test_a_now_without_a_zone_counts_no_instant(engine: Engine, data_type: str) -> None:
    with made(engine, hotel()) as (session, data_map):
        one = clockwork(data_type, years())
        assert plan_retention(session, data_map, one).matched == 0
        naive = replace(one, now=NOW.replace(tzinfo=None))
        with pytest.raises((ValueError, StatementError), match="zone"):
            plan_retention(session, data_map, naive)
        with pytest.raises((ValueError, StatementError), match="zone"):
            count_due_by(session, data_map, one, [naive.now])


def test_a_now_without_a_zone_counts_no_day(engine: Engine) -> None:
    with made(engine, hotel()) as (session, data_map):
        one = clockwork("invoice", years(), NOW.replace(tzinfo=None))
        with pytest.raises((ValueError, StatementError), match="zone"):
            plan_retention(session, data_map, one)


def row_of(table: str, kind: Any, n: int, at: datetime | None) -> dict[str, Any]:
    day = None if at is None else at.date()
    return {
        "people": {"id": n, "seen_at": at},
        "invoices": {"id": key_of(kind, n), "issued_on": day},
        "visits": {"place": n % 3, "turn": n, "left_at": at},
    }[table]


@pytest.mark.parametrize(
    ("data_type", "table", "kind"),
    [
        ("person", "people", Integer),
        ("visit", "visits", Integer),
        *(("invoice", "invoices", kind) for kind in (Integer, text_key, Uuid)),
    ],
)
def test_every_row_that_comes_goes_or_is_held_gives_another_digest(
    engine: Engine, data_type: str, table: str, kind: Any
) -> None:
    with made(engine, hotel(kind)) as (session, data_map):
        mapped = data_map[table].table
        for n in range(1, 8):
            session.execute(insert(mapped).values(row_of(table, kind, n, OLD)))
        session.execute(insert(mapped).values(row_of(table, kind, 8, YOUNG)))
        session.execute(insert(mapped).values(row_of(table, kind, 9, None)))
        one = clockwork(data_type, years(3))

        def digest(**changed: Any) -> str:
            return plan_retention(session, data_map, replace(one, **changed)).digest

        seen = [digest()]
        assert digest() == seen[0]
        # Neither a later run nor another period of the same rows makes another plan.
        assert digest(now=NOW + DAY, periods={data_type: years(2)}) == seen[0]
        seen.append(digest(holds=Holds(data_types=frozenset([data_type]))))
        here = [
            column == row_of(table, kind, 3, OLD)[column.name] for column in data_map[table].keys
        ]
        seen.append(digest(only=~here[-1]))
        for values in ({data_map[table].rule.retention.anchor: None}, {"anonymized_at": NOW}):  # type: ignore[union-attr] # it has a clock
            with session.begin_nested() as undo:
                session.execute(update(mapped).where(*here).values(values))
                mode = ANONYMIZE if "anonymized_at" in values else DELETE
                assert digest(mode=mode) == seen[2]
                undo.rollback()
        session.execute(insert(mapped).values(row_of(table, kind, 10, OLD)))
        seen.append(digest())
        session.execute(delete(mapped).where(*here))
        seen.append(digest())
        session.execute(delete(mapped))
        assert digest() == seen[1]
        assert len(set(seen)) == len(seen)


def test_a_hold_on_one_row_gives_another_digest_and_its_end_the_first(engine: Engine) -> None:
    with made(engine, hotel()) as (session, data_map):
        table = data_map["invoices"].table
        for n in range(1, 8):
            session.execute(insert(table).values(id=n, issued_on=OLD.date()))
        one = clockwork("invoice", years())
        free = plan_retention(session, data_map, one)
        plans = [
            plan_retention(session, data_map, replace(one, holds=Holds(rows={"invoice": held})))
            for held in map(frozenset, ([], [2], [3], [2, 3], [99]))
        ]
        assert [(p.matched, p.held) for p in plans] == [(7, 0), (7, 1), (7, 1), (7, 2), (7, 0)]
        assert plans[0] == plans[4] == free
        assert len({p.digest for p in plans}) == 4


keys = st.integers(-5, 60) | st.integers(-(2**31), 2**31 - 1)
key_sets = st.sets(keys, min_size=1, max_size=8)


@contextmanager
def planner(engine: Engine, kind: type[Any]) -> Iterator[Callable[[Collection[int]], str]]:
    """A way to ask for the digest of a plan that touches the rows with these keys."""
    with made(engine, hotel(kind)) as (session, data_map):
        table = data_map["invoices"].table

        def digest(found: Collection[int]) -> str:
            session.execute(delete(table))
            rows = [{"id": key, "issued_on": OLD.date()} for key in found]
            session.execute(insert(table), rows)
            return plan_retention(session, data_map, clockwork("invoice", years())).digest

        yield digest


def test_a_key_that_comes_goes_or_changes_gives_another_digest(engine: Engine) -> None:
    with planner(engine, Integer) as digest:

        @given(found=key_sets, key=keys, other=keys)
        def differ(found: set[int], key: int, other: int) -> None:
            assume(key not in found)
            assert digest(found) != digest(found | {key})
            if other not in found | {key}:
                assert digest(found | {key}) != digest(found | {other})

        differ()


def test_no_two_small_sets_of_keys_have_the_same_digest(engine: Engine) -> None:
    with planner(engine, Integer) as digest:

        @given(found=key_sets, lost=key_sets, won=key_sets)
        @example(found={1, 6}, lost={2, 5}, won={3, 4})
        @example(found={1, 10}, lost={2, 6, 7}, won={3, 4, 8})
        @example(found={1, 2, 19}, lost={12, 16}, won={4, 8, 18})
        def differ(found: set[int], lost: set[int], won: set[int]) -> None:
            one, other = found | lost, found | won
            assume(one != other)
            assert digest(one) != digest(other)

        differ()


def test_keys_as_large_as_an_engine_counts_are_told_apart(engine: Engine) -> None:
    top = 2**63 - 1
    sets = [{1, top}, {2, top}, {1, top - 1}, {1, 2**31}, {1, 2**31 - 3}, {-top, top}, {-top, 1}]
    with planner(engine, BigInteger) as digest:
        found = [digest(each) for each in sets]
        assert len(set(found)) == len(sets)
        assert digest({top, 1}) == found[0]


def test_what_is_due_is_counted_in_one_statement_for_all_moments(engine: Engine) -> None:
    with made(engine, hotel()) as (session, data_map):
        table = data_map["people"].table
        for n in range(1, 61):
            session.execute(insert(table).values(id=n, seen_at=NOW - n * 10 * DAY))
        session.execute(update(table).where(table.c.id == 40).values(anonymized_at=NOW))
        one = clockwork("person", Period.parse("P1Y"), mode=ANONYMIZE)
        moments = [NOW + days * DAY for days in (0, 5, 10, 300, 400)]
        expected = [
            plan_retention(session, data_map, replace(one, now=at)).matched for at in moments
        ]
        sent = list[str]()
        event.listen(engine, "before_cursor_execute", lambda *a: sent.append(a[2]))
        assert count_due_by(session, data_map, one, moments) == expected
        assert len(sent) == 1
        assert (expected[0], expected[-1]) == (23, 59)
