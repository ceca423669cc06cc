"""The walk over maps that are not ours: whose a row is, and what an erasure does to all others."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    CheckConstraint,
    Column,
    Engine,
    ForeignKey,
    Integer,
    MetaData,
    Uuid,
    event,
    insert,
    text,
    update,
)
from sqlalchemy.orm import Session

from backend.db_utils import make_engine
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import EraseMode, Identity, OnErase, not_personal
from backend.privacy.erase import carry_out_erasure
from backend.privacy.reading import Ground, Read, Reader
from backend.privacy.steps import ConstraintError, Outcome
from backend.privacy.walk import Subjects
from tests.conftest import PostgresServer
from tests.privacy.odd_maps import (
    NOW,
    OLD,
    PERIOD,
    YOUNG,
    Foretold,
    Row,
    address,
    alike,
    by_law,
    dump,
    erase,
    key_of,
    link,
    number,
    owned,
    people,
    person,
    plan,
    put,
    said,
    shared,
    text_key,
    village,
)

DELETE, ANONYMIZE = EraseMode.DELETE, EraseMode.ANONYMIZE
MODES = pytest.mark.parametrize("mode", [DELETE, ANONYMIZE])


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database of its own."""
    if request.param == "sqlite":
        made = make_engine(f"sqlite:///{tmp_path}/odd.db")
        yield made
        made.dispose()
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    schema = f"odd_{token_hex(6)}"
    made = make_engine(f"{server.url('postgres')}?options=-csearch_path%3D{schema}")
    server.run(f"CREATE SCHEMA {schema}")
    yield made
    made.dispose()
    server.run(f"DROP SCHEMA {schema} CASCADE")


@contextmanager
def planted(engine: Engine, metadata: MetaData, **rows: list[Row]) -> Iterator[Session]:
    """The tables with *rows* in them; what the block does to them is undone at its end."""
    metadata.create_all(engine)
    with Session(engine) as session:
        put(session, metadata, rows)
        yield session


KINDS = {"int": Integer, "text": text_key, "uuid": Uuid}
MANY = {"regions": 2, "addresses": 3, "people": 3, "wings": 3, "orders": 3, "order_lines": 2,
        "guests": 3, "invoices": 3, "invoice_lines": 2, "comments": 4, "docs": 3, "labels": 3,
        "folders": 3, "attachments": 2, "likes": 2, "newsletter": 2}  # fmt: skip
CIRCLE = ("docs", "labels", "folders")
CHOICES: dict[str, tuple[Any, ...]] = {
    "email": (None, *(f"p{n}@example.com" for n in range(1, 4)), "stranger@example.com"),
    "phone": (None, "+4930111", "+4930222"),
    "issued_on": (None, YOUNG, OLD),
}


@st.composite
def forests(draw: st.DrawFn, metadata: MetaData, kind: Any) -> dict[str, list[Row]]:
    """Some rows in every table of `village`, with links to wherever the schema lets them lead."""
    sizes = {table: draw(st.integers(most // 2, most)) for table, most in MANY.items()}
    sizes |= {"people": draw(st.integers(1, 3)), "products": 1}

    def cell(column: Column[Any], n: int) -> Any:
        table = column.table.name
        for foreign in column.foreign_keys:
            target = foreign.column.table.name
            to = draw(st.integers(0 if column.nullable else 1, sizes[target]))
            return key_of(kind if target in CIRCLE else Integer, to) if to else None
        match column.name:
            case "id":
                return key_of(kind if table in CIRCLE else Integer, n)
            case "line":
                return n
            case "email" if table in ("people", "newsletter"):
                return f"p{n}@example.com"
            case "email" | "phone" | "issued_on":
                return draw(st.sampled_from(CHOICES[column.name]))
        return None if column.name.endswith("_at") else f"{table} {n} {column.name}"

    return {
        table.name: [
            {column.name: cell(column, n) for column in table.columns}
            for n in range(1, sizes[table.name] + 1)
            # Where there is no parent, there is no child.
            if all(
                column.nullable or sizes[foreign.column.table.name]
                for column in table.columns
                for foreign in column.foreign_keys
            )
        ]
        for table in metadata.tables.values()
    }


@pytest.mark.parametrize("kind", ["int", "uuid"])
def test_exactly_the_rows_that_lead_to_a_person_meet_their_end_and_no_other_cell_changes(
    engine: Engine, kind: str
) -> None:
    metadata = village(KINDS[kind])
    data_map = DataMap.of(metadata)
    metadata.create_all(engine)

    @settings(max_examples=7, deadline=None, database=None)
    @given(forests(metadata, KINDS[kind]), st.sampled_from([DELETE, ANONYMIZE]))
    def holds(rows: dict[str, list[Row]], mode: EraseMode) -> None:
        with Session(engine) as session:
            put(session, metadata, rows)
            who = person(session, data_map, 1)
            before = dump(session, data_map)
            cells = before["people"][(1,)]
            terms = {identity: [cells[identity]] for identity in Identity if cells[identity]}
            foretold = Foretold(data_map, before, 1, mode, terms)
            _reads_what_is_theirs(session, data_map, who, foretold)
            digest = plan(session, data_map, who, mode).digest
            planned = erase(session, data_map, who, mode)
            assert planned.digest == digest
            said_ = {
                table: {str(outcome): n for outcome, n in counts.items() if n}
                for table, counts in planned.counts.items()
                if any(counts.values())
            }
            assert said_ == foretold.counts
            assert alike(dump(session, data_map), foretold.after) == {}

    holds()


def _reads_what_is_theirs(
    session: Session, data_map: DataMap, who: Subjects, foretold: Foretold
) -> None:
    for mapped in data_map.of_people:
        found = list(Reader(session, data_map, who).rows(mapped))
        assert len(found) == Reader(session, data_map, who).counts[mapped.name]
        keys = [tuple(one.row[str(c.name)] for c in mapped.keys) for one in found]
        expected = {
            key: row
            for key, row in foretold.before[mapped.name].items()
            if foretold.mine(mapped.name, key)
            or (mapped.name, key) in foretold.reached
            or (mapped.name != "people" and foretold.names(mapped.name, row))
        }
        assert sorted(map(str, keys)) == sorted(map(str, expected)), mapped.name
        for key, one in zip(keys, found, strict=True):
            row = expected[key]
            own = foretold.mine(mapped.name, key) or (mapped.name, key) in foretold.reached
            about_others = {
                name
                for name, rule in mapped.personal_columns.items()
                if rule.third_party is own and row[name] is not None
            }
            if own and foretold.names(mapped.name, row):
                about_others = set()
            assert set(one.redacted) == about_others
            assert one.row == {k: None if k in about_others else v for k, v in row.items()}


# ---------------------------------------------------------------- one claim each


def rows_of(session: Session, metadata: MetaData, table: str) -> dict[Any, Row]:
    return {key[0]: row for key, row in dump(session, DataMap.of(metadata))[table].items()}


def people_and(*columns: Any) -> MetaData:
    metadata = MetaData()
    people(metadata, address("email", Identity.EMAIL), address("phone", Identity.PHONE), *columns)
    return metadata


TWO = [{"id": 1, "email": "one@example.com"}, {"id": 2, "email": "two@example.com"}]


@MODES
def test_a_reply_goes_with_the_comment_it_hangs_from_and_somebody_elses_stays(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = village()
    comments = [
        {"id": 1, "person_id": 1, "content": "mine"},
        {"id": 2, "parent_id": 1, "content": "mine too"},
        {"id": 3, "person_id": 2, "parent_id": 2, "content": "theirs"},
        {"id": 4, "parent_id": 3, "content": "theirs too"},
        {"id": 5, "parent_id": 4, "content": "theirs, three deep"},
    ]
    with planted(engine, metadata, people=TWO, comments=comments) as session:
        data_map = DataMap.of(metadata)
        before = rows_of(session, metadata, "comments")
        erase(session, data_map, person(session, data_map, 1), mode)
        after = rows_of(session, metadata, "comments")
        kept = {3, 4, 5} if mode is DELETE else {1, 2, 3, 4, 5}
        assert after.keys() == kept
        cut = {"parent_id": None} if mode is DELETE else {}
        assert {n: after[n] for n in (3, 4, 5)} == {
            3: before[3] | cut, 4: before[4], 5: before[5]
        }  # fmt: skip
        for n in kept - {3, 4, 5}:
            assert (after[n]["content"], after[n]["person_id"], after[n]["parent_id"]) == (
                None, None, None
            )  # fmt: skip


@MODES
def test_a_pointer_from_people_to_a_row_of_theirs_does_not_hide_what_is_between(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = people_and(link("favourite_id", "docs.id"))
    owned(metadata, "folders", number(), link("person_id", "people.id"), said(), by="person_id")
    owned(metadata, "docs", number(), link("folder_id", "folders.id"), said(), by="folder_id")
    with planted(
        engine, metadata, people=[TWO[0] | {"favourite_id": 1}, TWO[1] | {"favourite_id": 2}],
        folders=[{"id": n, "person_id": n} for n in (1, 2)],
        docs=[{"id": n, "folder_id": n, "content": "words"} for n in (1, 2)],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        erase(session, data_map, person(session, data_map, 1), mode)
        docs = rows_of(session, metadata, "docs")
        assert [n for n, row in docs.items() if row["content"] is not None] == [2]
        assert docs.keys() == ({2} if mode is DELETE else {1, 2})


@MODES
def test_what_hangs_from_a_circle_goes_whichever_way_round_it_belongs(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = village()
    with planted(
        engine, metadata, people=TWO, wings=[{"id": 1, "person_id": 1}],
        orders=[{"id": 1, "wing_id": 1}], folders=[{"id": 1, "order_id": 1}],
        labels=[{"id": 1, "folder_id": 1}], docs=[{"id": 1, "label_id": 1}],
        attachments=[{"id": 1, "doc_id": 1, "content": "words"}],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        erase(session, data_map, person(session, data_map, 1), mode)
        attachments = rows_of(session, metadata, "attachments")
        assert attachments.keys() == (set() if mode is DELETE else {1})
        assert not [row for row in attachments.values() if row["content"] is not None]


@MODES
def test_whoever_reports_to_an_erased_person_stays_as_they_are(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = village()
    staff = [{"id": 1, "name": "boss"}, {"id": 2, "name": "a", "boss_id": 1},
             {"id": 3, "name": "b", "boss_id": 2}]  # fmt: skip
    with planted(engine, metadata, people=staff) as session:
        data_map = DataMap.of(metadata)
        before = rows_of(session, metadata, "people")
        erase(session, data_map, person(session, data_map, 1), mode)
        after = rows_of(session, metadata, "people")
        assert after[3] == before[3]
        # The link needs cutting only where the row it leads to goes.
        assert after[2] == before[2] | ({"boss_id": None} if mode is DELETE else {})


@MODES
@pytest.mark.parametrize("kind", KINDS)
def test_two_tables_in_a_circle_are_followed_to_the_end_and_no_further(
    engine: Engine, kind: str, mode: EraseMode
) -> None:
    metadata, key = people_and(), KINDS[kind]
    owned(metadata, "docs", number(key), link("person_id", "people.id"),
          link("folder_id", "folders.id"), said(), by=("person_id", "folder_id"))  # fmt: skip
    owned(metadata, "folders", number(key), link("person_id", "people.id"),
          link("doc_id", "docs.id"), said(), by=("person_id", "doc_id"))  # fmt: skip
    n = {i: key_of(key, i) for i in range(1, 10)}
    docs: list[Row] = [{"id": n[1], "person_id": 1}, {"id": n[2], "folder_id": n[1]},
            {"id": n[3], "folder_id": n[3]}, {"id": n[4], "folder_id": n[4]}]  # fmt: skip
    folders: list[Row] = [
               {"id": n[1], "doc_id": n[1]}, {"id": n[2], "doc_id": n[2]},
               # Of the other person, and of nobody: they lead to each other only.
               {"id": n[3], "person_id": 2, "doc_id": n[1]}, {"id": n[4], "doc_id": n[4]},
    ]  # fmt: skip
    for row in (*docs, *folders):
        row["content"] = "words"
    with planted(engine, metadata, people=TWO, docs=docs, folders=folders) as session:
        data_map = DataMap.of(metadata)
        erase(session, data_map, person(session, data_map, 1), mode)
        for table, mine in (("docs", {n[1], n[2]}), ("folders", {n[1], n[2]})):
            left = rows_of(session, metadata, table)
            with_words = {key for key, row in left.items() if row["content"] is not None}
            assert with_words == {n[3], n[4]}, table
            assert left.keys() - with_words == (set() if mode is DELETE else mine)


def test_a_key_that_is_an_address_becomes_a_random_one(engine: Engine) -> None:
    metadata = village()
    letters = [{"email": "one@example.com", "person_id": 1},
               {"email": "two@example.com", "person_id": 2}]  # fmt: skip
    with planted(engine, metadata, people=TWO, newsletter=letters) as session:
        data_map = DataMap.of(metadata)
        erase(session, data_map, person(session, data_map, 1), ANONYMIZE)
        keys = set(rows_of(session, metadata, "newsletter"))
        assert "two@example.com" in keys
        (fresh,) = keys - {"two@example.com"}
        assert len(fresh) == 32


@pytest.mark.parametrize("rule", ["check", "unique"])
def test_a_rule_of_the_database_that_anonymising_would_break_shows_in_the_trial(
    engine: Engine, rule: str
) -> None:
    metadata = people_and(CheckConstraint("name <> '' AND name IS NOT NULL OR id > 2", name="has"))
    if rule == "unique":
        metadata = people_and()
        owned(metadata, "seats", number(), link("person_id", "people.id"),
              said("row", on_erase=OnErase.CONSTANT, constant="-"), by="person_id")  # fmt: skip
    named = [row | {"name": "somebody"} for row in TWO]
    seats = {"seats": [{"id": n, "person_id": 1, "row": f"r{n}"} for n in (1, 2)]}
    with planted(engine, metadata, people=named, **(seats if rule == "unique" else {})) as session:
        if rule == "unique":
            session.execute(text('CREATE UNIQUE INDEX one_each ON seats ("row")'))
        data_map = DataMap.of(metadata)
        who, before = person(session, data_map, 1), dump(session, data_map)
        planned = plan(session, data_map, who, ANONYMIZE)
        with pytest.raises(ConstraintError) as refused, session.begin_nested():
            carry_out_erasure(session, data_map, planned, who, NOW)
        assert "somebody" not in str(refused.value)
        assert dump(session, data_map) == before
        erase(session, data_map, who, DELETE)
        assert rows_of(session, metadata, "people").keys() == {2}


def household() -> MetaData:
    metadata = MetaData()
    shared(metadata, "regions", number(), said())
    shared(metadata, "addresses", number(), said(), link("region_id", "regions.id"))
    people(metadata, link("address_id", "addresses.id"))
    owned(metadata, "jobs", number(), link("person_id", "people.id"),
          link("address_id", "addresses.id"), by="person_id")  # fmt: skip
    by_law(metadata, "invoices", number(), link("person_id", "people.id"),
           link("address_id", "addresses.id", statutory=True), by="person_id")  # fmt: skip
    return metadata


@MODES
def test_a_shared_address_stays_whole_until_the_last_who_needs_it_is_erased(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = household()
    with planted(
        engine, metadata,
        regions=[{"id": 1, "content": "region"}, {"id": 2, "content": "other"}],
        addresses=[{"id": 1, "content": "home", "region_id": 1},
                   {"id": 2, "content": "alone", "region_id": 1}],
        people=[{"id": 1, "address_id": 1}, {"id": 2, "address_id": 1}, {"id": 3}],
        jobs=[{"id": 1, "person_id": 3, "address_id": 1}],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        first = rows_of(session, metadata, "addresses")[1]
        for who, left in ((1, {1, 2}), (2, {1, 2}), (3, {2})):
            planned = erase(session, data_map, person(session, data_map, who), mode)
            addresses = rows_of(session, metadata, "addresses")
            assert addresses.keys() == left
            assert planned.counts["addresses"][Outcome.SHARED] == (who != 3)
            assert planned.counts["addresses"][Outcome.DELETED] == (who == 3)
            if who != 3:
                assert addresses[1] == first
        # The other address still needs the region that both were in.
        assert rows_of(session, metadata, "regions").keys() == {1, 2}


@MODES
def test_what_only_an_address_that_goes_referred_to_goes_with_it(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = household()
    with planted(engine, metadata, regions=[{"id": 1}], addresses=[{"id": 1, "region_id": 1}],
                 people=[{"id": 1, "address_id": 1}]) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        planned = erase(session, data_map, person(session, data_map, 1), mode)
        assert planned.counts["regions"][Outcome.DELETED] == 1
        after = dump(session, data_map)
        assert (after["addresses"], after["regions"]) == ({}, {})


@MODES
def test_a_shared_row_that_goes_with_the_person_whom_it_names_is_counted_once(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = village()
    with planted(
        engine, metadata, addresses=[{"id": n, "email": "one@example.com"} for n in (1, 2)],
        people=[TWO[0] | {"address_id": 1}, TWO[1] | {"address_id": 2}],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        planned = erase(session, data_map, person(session, data_map, 1), mode)
        counts = {outcome: n for outcome, n in planned.counts["addresses"].items() if n}
        assert counts == {Outcome.DELETED: 1, Outcome.REDACTED: 1}
        assert rows_of(session, metadata, "addresses").keys() == {2}


@MODES
def test_an_address_on_an_invoice_that_the_law_keeps_stays_as_long_as_the_invoice(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = household()
    with planted(
        engine, metadata, addresses=[{"id": n, "content": f"a{n}"} for n in (1, 2)],
        people=[{"id": 1}],
        invoices=[{"id": 1, "person_id": 1, "address_id": 1, "issued_on": YOUNG},
                  {"id": 2, "person_id": 1, "address_id": 2, "issued_on": OLD}],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        planned = erase(session, data_map, person(session, data_map, 1), mode)
        assert rows_of(session, metadata, "addresses").keys() == {1}
        kept = rows_of(session, metadata, "invoices")[1]
        assert (kept["address_id"], kept["person_id"]) == (1, None)
        (retained,) = planned.retained
        assert (retained.table, retained.rows) == ("invoices", 1)


def test_people_erased_together_share_nothing_with_each_other(engine: Engine) -> None:
    metadata = household()
    with planted(engine, metadata, addresses=[{"id": 1}, {"id": 2}],
                 people=[{"id": 1, "address_id": 1}, {"id": 2, "address_id": 1},
                         {"id": 3, "address_id": 2}]) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        both = Subjects.where(data_map, data_map.subject.key.in_([1, 2]))
        erase(session, data_map, both, DELETE)
        assert rows_of(session, metadata, "addresses").keys() == {2}
        assert rows_of(session, metadata, "people").keys() == {3}


@MODES
def test_a_person_on_somebody_elses_row_reads_and_erases_their_own_words_there(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = village()
    guests = [
        {"id": 1, "name": "Two", "email": "two@example.com", "phone": "+49301"},
        {"id": 2, "name": "Child", "email": "child@example.com", "phone": "+49302"},
        {"id": 3, "name": "Two again", "email": None, "phone": "+49302"},
    ]
    for row in guests:
        row |= {"order_id": 1, "content": "the owner's wish"}
    with planted(
        engine, metadata, people=[TWO[0], TWO[1] | {"phone": "+49302"}],
        wings=[{"id": 1, "person_id": 1}], orders=[{"id": 1, "wing_id": 1}], guests=guests,
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        mapped, before = data_map["guests"], rows_of(session, metadata, "guests")
        third = ("name", "email", "phone")
        for found in Reader(session, data_map, person(session, data_map, 1)).rows(mapped):
            blank = {name for name in third if before[found.row["id"]][name] is not None}
            assert (set(found.redacted), found.ground) == (blank, Ground.THIRD_PARTY)
            assert all(found.row[name] is None for name in third)
            assert found.row["content"] == "the owner's wish"
        two = person(session, data_map, 2)
        found_by_two = {
            found.row["id"]: found for found in Reader(session, data_map, two).rows(mapped)
        }
        # A family's telephone names nobody where an address of somebody else stands.
        assert found_by_two.keys() == {1, 3}
        for n, found in found_by_two.items():
            assert found == Read(before[n] | {"content": None}, ("content",), Ground.OWNER)
        planned = erase(session, data_map, two, mode)
        assert planned.counts["guests"][Outcome.REDACTED] == 2
        gone: Row = dict.fromkeys(third)
        assert rows_of(session, metadata, "guests") == {
            1: before[1] | gone, 2: before[2], 3: before[3] | gone
        }  # fmt: skip


@MODES
def test_one_of_two_people_with_the_same_telephone_can_be_erased(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = people_and()
    family = [{"id": n, "phone": "+49301", "name": f"p{n}"} for n in (1, 2)]
    with planted(engine, metadata, people=family) as session:
        data_map = DataMap.of(metadata)
        other = rows_of(session, metadata, "people")[2]
        erase(session, data_map, person(session, data_map, 1), mode)
        assert rows_of(session, metadata, "people")[2] == other


@MODES
def test_a_row_that_no_kept_row_holds_goes_though_its_table_follows_a_law(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = people_and()
    by_law(metadata, "invoices", number(), link("person_id", "people.id"), by="person_id")
    owned(metadata, "notes", number(), link("invoice_id", "invoices.id"),
          link("person_id", "people.id"), said(), by=("invoice_id", "person_id"))  # fmt: skip
    with planted(
        engine, metadata, people=TWO, invoices=[{"id": 1, "person_id": 1, "issued_on": YOUNG}],
        notes=[{"id": 1, "invoice_id": 1}, {"id": 2, "person_id": 1, "content": "no invoice"}],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        counts = erase(session, data_map, person(session, data_map, 1), mode).counts["notes"]
        gone = "deleted" if mode is DELETE else "anonymized"
        assert {k: n for k, n in counts.items() if n} == {"retained": 1, gone: 1}


def test_a_row_three_below_the_clock_is_kept_until_the_clock_s_end(engine: Engine) -> None:
    metadata = people_and()
    by_law(metadata, "invoices", number(), link("person_id", "people.id"),
           Column("no", Integer, unique=True, info=not_personal("its number")),
           by="person_id")  # fmt: skip
    owned(metadata, "lines", number(), Column("invoice_no", ForeignKey("invoices.no"),
          nullable=False, info=not_personal("parent")), by="invoice_no")  # fmt: skip
    owned(metadata, "taxes", number(), link("line_id", "lines.id", nullable=False),
          by="line_id")  # fmt: skip
    # Numbers that cross: whoever joins by the wrong column gets the old invoice.
    with planted(
        engine, metadata, people=TWO,
        invoices=[{"id": 1, "no": 2, "person_id": 1, "issued_on": YOUNG},
                  {"id": 2, "no": 1, "person_id": 1, "issued_on": OLD},
                  {"id": 7, "no": 9, "person_id": 2, "issued_on": date(2026, 5, 30)}],
        lines=[{"id": 7, "invoice_no": 2}, {"id": 2, "invoice_no": 1}],
        taxes=[{"id": 7, "line_id": 7}, {"id": 1, "line_id": 2}],
    ) as session:  # fmt: skip
        data_map = DataMap.of(metadata)
        planned = erase(session, data_map, person(session, data_map, 1), DELETE)
        end = date(2026, 5, 18) + PERIOD
        assert {(kept.table, kept.rows, kept.until) for kept in planned.retained} == {
            ("invoices", 1, end), ("lines", 1, end), ("taxes", 1, end)
        }  # fmt: skip
        assert rows_of(session, metadata, "taxes").keys() == {7}


def test_a_digest_tells_every_two_sets_of_rows_apart(engine: Engine) -> None:
    metadata = village()
    with planted(engine, metadata, people=TWO) as session:
        data_map, who = DataMap.of(metadata), person(session, DataMap.of(metadata), 1)
        table = metadata.tables["newsletter"]

        def digest_with(*emails: str) -> str:
            with session.begin_nested() as savepoint:
                for email in emails:
                    session.execute(insert(table).values(email=email, person_id=1))
                found = plan(session, data_map, who, DELETE).digest
                savepoint.rollback()
            return found

        sets = [(), ("a",), ("b",), ("a", "b"), ("a;b",), ("a,b",)]
        digests = [digest_with(*emails) for emails in sets]
        assert len(set(digests)) == len(sets)
        assert digest_with() == digests[0]
        session.execute(insert(table).values(email="c", person_id=2))
        assert digest_with() == digests[0]
        assert plan(session, data_map, who, ANONYMIZE).digest != digests[0]


@MODES
def test_the_number_of_statements_does_not_depend_on_the_number_of_rows(
    engine: Engine, mode: EraseMode
) -> None:
    metadata = village()
    wings = [{"id": 1, "person_id": 1}]
    counts = []
    for many in (10, 1000):
        ids = range(1, many + 1)
        rows: dict[str, list[Row]] = {
            "addresses": [{"id": n} for n in ids],
            "orders": [{"id": n, "wing_id": 1, "address_id": n} for n in ids],
            "guests": [{"id": n, "order_id": n, "email": "one@example.com"} for n in ids],
            "comments": [{"id": n, "person_id": 1 if n == 1 else None} for n in ids],
            "invoices": [{"id": n, "person_id": 1, "issued_on": YOUNG} for n in ids],
        }
        with planted(engine, metadata, people=TWO, wings=wings) as session:
            for table, some in rows.items():
                session.execute(insert(metadata.tables[table]), some)
            comments = metadata.tables["comments"]
            session.execute(
                update(comments).where(comments.c.id > 1).values(parent_id=comments.c.id - 1)
            )
            data_map = DataMap.of(metadata)
            who, seen = person(session, data_map, 1), list[str]()

            def note(_c: Any, _cursor: Any, statement: str, *_rest: Any, to: Any = seen) -> None:
                to.append(statement)

            event.listen(engine, "before_cursor_execute", note)
            found = [len(list(Reader(session, data_map, who).rows(t))) for t in data_map.of_people]
            planned = erase(session, data_map, who, mode)
            event.remove(engine, "before_cursor_execute", note)
            assert sum(found) == 5 * many + 2
            assert sum(n for c in planned.counts.values() for n in c.values()) == 5 * many + 2
            counts.append(len(seen))
    assert counts[0] == counts[1]


def test_no_key_of_a_person_stays_behind_in_a_temporary_table(engine: Engine) -> None:
    metadata = village()
    with planted(engine, metadata, people=TWO, addresses=[{"id": 1}],
                 comments=[{"id": 1, "person_id": 1}]) as session:  # fmt: skip
        session.execute(update(metadata.tables["people"]).values(address_id=1))
        data_map = DataMap.of(metadata)
        erase(session, data_map, person(session, data_map, 1), DELETE)
        session.commit()
        listing = {
            "sqlite": "SELECT name FROM sqlite_temp_master",
            "postgresql": "SELECT relname FROM pg_class WHERE relpersistence = 't'",
        }[engine.dialect.name]
        assert session.scalars(text(listing)).all() == []
