"""What a restore loses and regains is counted by keys, of whatever kind they are."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    MetaData,
    String,
    Table,
    Uuid,
    delete,
    insert,
    text,
)
from sqlalchemy.orm import Session

from backend.db_utils import make_engine
from backend.models.base import UtcDateTime
from backend.privacy import comparison
from backend.privacy.comparison import TableChange, compare
from backend.privacy.declarations import KEY, reference_table
from backend.privacy.mapped_tables import MappedTable

Key = tuple[Any, ...]
METADATA: Final = MetaData()
NAMES: Final = ("comparison_live", "comparison_restored")
# What databases take as text: PostgreSQL has no NUL, UTF-8 no lone surrogate.
TEXTS: Final = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4
)
NUMBERS: Final = st.integers(-(2**63), 2**63 - 1)
EPOCH, END = datetime.fromisoformat("1970-01-01"), datetime.fromisoformat("2100-01-01")
TIMES: Final = st.datetimes(EPOCH, END, timezones=st.just(UTC))
# As people sort them, which is neither by their bytes nor as Python does.
WORDS: Final = st.sampled_from(["a", "B", "c", "Z", "ä", "Öl", "-1", "_b", "b c", "10", "9"])
COLLATED: Final = (
    String(8)
    .with_variant(String(8, collation="NOCASE"), "sqlite")
    .with_variant(String(8, collation="en-x-icu"), "postgresql")
)


def _table(name: str, *kinds: Any) -> MappedTable:
    columns = [Column(f"key_{number}", kind, primary_key=True) for number, kind in enumerate(kinds)]
    return MappedTable(Table(name, METADATA, *columns), reference_table("for tests")[KEY], {})


KINDS: Final[dict[str, tuple[MappedTable, st.SearchStrategy[Key]]]] = {
    "numbers": (_table("numbers", BigInteger), st.tuples(NUMBERS)),
    "uuids": (_table("uuids", Uuid), st.tuples(st.uuids())),
    "texts": (_table("texts", String(8)), st.tuples(TEXTS)),
    "lines": (_table("lines", String(8), BigInteger), st.tuples(TEXTS, st.integers(0, 3))),
    "times": (_table("times", Uuid, UtcDateTime), st.tuples(st.uuids(), TIMES)),
    "words": (_table("words", COLLATED), st.tuples(WORDS)),
}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    """Two databases of one engine with a table of every kind of key."""
    server = None
    if request.param == "sqlite":
        folder = tmp_path_factory.mktemp("comparison")
        urls = [f"sqlite:///{folder}/{name}.db" for name in NAMES]
    else:
        server = request.getfixturevalue("postgres_server")
        urls = [server.url(name) for name in NAMES]
        for name in NAMES:
            server.run(f"CREATE DATABASE {name}")
    live, restored = (make_engine(url) for url in urls)
    for engine in (live, restored):
        METADATA.create_all(engine, [t for t in METADATA.sorted_tables if _can_hold(engine, t)])
    yield live, restored
    for name, engine in zip(NAMES, (live, restored), strict=True):
        engine.dispose()
        if server is not None:
            server.run(f"DROP DATABASE {name}")


def _can_hold(engine: Engine, table: Table) -> bool:
    """Not every PostgreSQL was built with the rules by which languages sort."""
    if engine.dialect.name == "sqlite" or table.name != "words":
        return True
    known = text("SELECT count(*) FROM pg_collation WHERE collname = 'en-x-icu'")
    with engine.connect() as connection:
        return bool(connection.scalar(known))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lost_and_regained_is_what_sets_of_keys_say(
    databases: tuple[Engine, Engine],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    mapped, keys = KINDS[kind]
    if not _can_hold(databases[0], mapped.table):
        pytest.skip("this PostgreSQL knows no language's order")
    # Several reads for a handful of rows.
    monkeypatch.setattr(comparison, "_ROWS_PER_READ", 3)

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(*[st.sets(keys, max_size=5)] * 3)
    def check(kept: set[Key], lost: set[Key], regained: set[Key]) -> None:
        here, there = kept | lost, kept | regained
        with Session(databases[0]) as live, Session(databases[1]) as restored:
            _fill(live, mapped.table, here)
            _fill(restored, mapped.table, there)
            assert compare(live, restored, mapped) == TableChange(
                len(here), len(there), len(here - there), len(there - here)
            )

    check()


def _fill(session: Session, table: Table, keys: set[Key]) -> None:
    """Put these rows there until the session ends, which takes them back."""
    session.execute(delete(table))
    names = [column.name for column in table.columns]
    if keys:
        session.execute(insert(table), [dict(zip(names, key, strict=True)) for key in keys])
