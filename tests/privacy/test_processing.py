"""Records of processing and the shown map: every fact follows the declaration that it is from."""

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from sqlalchemy import Column, Date, ForeignKey, Integer, MetaData, String, Table

from backend.crypto.columns import Encrypted
from backend.db_utils import session_scope
from backend.models import DATA_MAP, ColumnMigration
from backend.models.base import UtcDateTime
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import (
    Disclosure,
    Identity,
    OnErase,
    Personal,
    Retention,
    TableRole,
    not_personal,
    owned_table,
    personal,
    shared_table,
    subject_table,
)
from backend.privacy.periods import Period
from backend.privacy.processing import (
    Clock,
    Controller,
    Measure,
    Protection,
    Records,
    category_words,
    records,
)
from backend.privacy.processing_page import page
from backend.services.map_service import get_map_service, protection_of
from tests.conftest import Service

NOW = datetime(2026, 11, 25, 8, 30, tzinfo=UTC)
DECLARED: dict[str, Any] = {
    "by": "person_id",
    "purpose": "Selling things",
    "basis": "contract",
    "source": "the person",
    "retention": Retention("thing", "sold_on"),
}


def _id() -> Column[int]:
    return Column("id", Integer, primary_key=True, info=not_personal("row number"))


def _mark() -> Column[Any]:
    return Column("anonymized_at", UtcDateTime, info=not_personal("when"))


def _link(name: str, to: str) -> Column[Any]:
    return Column(name, ForeignKey(f"{to}.id"), info=personal("user.unique_id"))


def small_map(*more: Column[Any], firm: dict[str, Any] | None = None, **thing: Any) -> DataMap:
    """People, the things that they buy, with *more* columns, parts of these, and shared firms."""
    metadata = MetaData()
    Table(
        "people", metadata, _id(), _mark(),
        Column("seen_at", UtcDateTime, info=personal("user.behavior")),
        info=subject_table(purpose="Accounts", basis="contract", source="the person",
                           retention=Retention("person", "seen_at", only={"kind": "guest"})),
    )  # fmt: skip
    Table(
        "things", metadata, _id(), _mark(), _link("person_id", "people"), _link("firm_id", "firms"),
        Column("sold_on", Date, nullable=False, info=personal("user.behavior", OnErase.MONTH)),
        *more,
        info=owned_table(**(DECLARED | thing)),
    )  # fmt: skip
    Table(
        "parts", metadata, _id(), _mark(), _link("thing_id", "things"), _link("part_id", "parts"),
        info=owned_table(by=("thing_id", "part_id"), purpose="Selling things", basis="contract",
                         source="the shop"),
    )  # fmt: skip
    Table(
        "firms", metadata, _id(),
        Column("contact_mail", String(80), info=personal(
            "user.contact.email", third_party=True, identity=Identity.EMAIL)),
        info=shared_table(**({"purpose": "Billing", "basis": "contract", "source": "a guest"}
                             | (firm or {}))),
    )  # fmt: skip
    return DataMap.of(metadata)


def drawn(data_map: DataMap, **changes: Any) -> Records:
    clocks = {
        "person": Clock(Period.parse("P2Y"), "anonymize", enabled=True),
        "thing": Clock(Period.parse("P18M"), "delete", enabled=True),
    }
    protections = {
        (mapped.name, str(column.name)): protection_of(column)
        for mapped in data_map.of_people
        for column in mapped.table.columns
    }
    facts: dict[str, Any] = {
        "controller": Controller("A shop", "privacy@example.com"),
        "clocks": clocks,
        "protections": protections,
        "measures": (Measure("backups", "encrypted"),),
        "now": NOW,
    }
    return records(data_map, **(facts | changes))


def test_tables_of_one_purpose_are_one_activity_and_the_peoples_comes_first() -> None:
    found = drawn(small_map())
    assert [one.purpose for one in found.activities] == ["Accounts", "Billing", "Selling things"]
    selling = found.activities[2]
    assert selling.tables == ("things", "parts")
    assert (selling.lawful_bases, selling.sources) == (("contract",), ("the person", "the shop"))
    split = drawn(small_map(purpose="Lending things")).activities
    assert [one.tables for one in split] == [("people",), ("firms",), ("things",), ("parts",)]


def test_data_subjects_are_the_subject_tables_people_and_whom_third_party_columns_name() -> None:
    found = {one.purpose: one.data_subjects for one in drawn(small_map()).activities}
    (buyers,) = found["Selling things"]
    assert (buyers.who, buyers.third_party) == ("people", False)
    # The firms' only personal column is about somebody else.
    (named,) = found["Billing"]
    assert (named.who, named.third_party) == ("others whom firms name", True)
    giver = Column(
        "given_to", String(80),
        info=personal("user.contact.email", third_party=True, identity=Identity.EMAIL),
    )  # fmt: skip
    both = drawn(small_map(giver)).activities[2].data_subjects
    assert [(one.who, one.tables) for one in both] == [
        ("people", ("things", "parts")),
        ("others whom things name", ("things",)),
    ]


def test_categories_recipients_and_transfers_follow_their_declarations() -> None:
    before, after = (
        drawn(data_map).activities[2]
        for data_map in (
            small_map(),
            small_map(
                Column("notes", String(80), info=personal("user.health_and_medical")),
                disclosure=Disclosure(("the carrier",), transfers="Japan: adequacy decision"),
            ),
        )
    )
    assert (before.recipients, before.transfers) == ((), ())
    assert after.recipients == ("the carrier",)
    assert after.transfers == ("Japan: adequacy decision",)
    categories = {one.category: one.columns for one in after.data_categories}
    assert categories.pop("user.health_and_medical") == ("things.notes",)
    assert categories == {one.category: one.columns for one in before.data_categories}
    assert categories["user.unique_id"] == (
        "things.person_id", "things.firm_id", "parts.thing_id", "parts.part_id",
    )  # fmt: skip


def test_time_limits_are_those_of_the_policy_in_force_and_of_the_law() -> None:
    data_map = small_map(statute="tax law")
    people, firms, things, parts = (
        limit for one in drawn(data_map).activities for limit in one.time_limits
    )
    assert people.words == (
        "2 years from seen at, then anonymized; where that is not known, without limit; "
        "only where kind is guest, others without limit"
    )
    assert (firms.period, firms.words) == (None, "as long as a row of anybody's refers to it")
    assert (things.data_type, things.period, things.action) == ("thing", "P1Y6M", "delete")
    assert things.words == "1 year and 6 months from sold on, then deleted"
    assert parts.words == "1 year and 6 months from sold on of its row in things, then deleted"
    assert [one.kept_by_law for one in (people, firms, things, parts)] == [
        None, None, "tax law", "tax law",
    ]  # fmt: skip
    off = {
        "person": Clock(Period.parse("P2Y"), "anonymize", enabled=True),
        "thing": Clock(Period.parse("P18M"), "delete", enabled=False),
    }
    unenforced = drawn(data_map, clocks=off).activities[2].time_limits[0]
    assert unenforced.action is None
    assert unenforced.words == "1 year and 6 months from sold on; not enforced: the policy is off"
    without = drawn(small_map(retention=None)).activities[2].time_limits[0]
    assert (without.data_type, without.words) == (None, "as long as the person's row in people")


def test_encryption_is_counted_from_the_types_of_the_columns() -> None:
    note = personal("user.content")
    plain = drawn(small_map(Column("note", String(80), info=note)))
    sealed = drawn(small_map(Column("note", Encrypted(), info=note)))
    assert plain.activities[2].protection[Protection.ENCRYPTED] == ()
    assert sealed.activities[2].protection[Protection.ENCRYPTED] == ("things.note",)
    assert sealed.activities[2].protection_words == (
        "6 personal columns: 1 encrypted, 5 not encrypted"
    )
    words = {one.name: one.words for one in sealed.measures}
    assert words == {
        "encryption of columns": "8 personal columns: 1 encrypted, 7 not encrypted",
        "backups": "encrypted",
    }


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ("user.name", "Name"),
        ("user.contact.address.postal_code", "Contact: address, postal code"),
        ("user.device.ip_address", "Device: IP address"),
        ("user.unique_id", "Unique ID"),
        ("system.operations", "System: operations"),
    ],
)
def test_a_category_is_spelled_for_a_reader(category: str, words: str) -> None:
    assert category_words(category) == words


class _Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_the_records_say_runs_nothing_and_loads_nothing() -> None:
    found = drawn(small_map(statute="tax law", disclosure=Disclosure(("the carrier",))))
    source = page(found)
    seen = _Page(source)
    assert source.startswith("<!doctype html>")
    assert "2026-11-25 08:30 UTC" in seen.text
    for told in ("A shop", "privacy@example.com", "the carrier", "tax law", "None declared."):
        assert told in seen.text
    for activity in found.activities:
        assert activity.purpose in seen.text
        for category in activity.data_categories:
            assert category.words in seen.text
        for limit in activity.time_limits:
            assert limit.words in seen.text
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(seen.tags)
    links = [value for name, value in seen.attributes if name in ("src", "href", "action")]
    assert links == [f"#activity-{number}" for number in (1, 2, 3)]
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import|https?://", source)


def test_a_page_shows_markup_of_any_declaration_as_text() -> None:
    evil = "<script>alert('1')</script>\"&"
    names = ("name", "contact", "purpose", "basis", "source", "recipient", "transfer", "law",
             "measure", "category")  # fmt: skip
    told = {name: f"{name} {evil}" for name in names}
    data_map = small_map(
        Column("note", String(80), info=personal(told["category"])),
        purpose=told["purpose"], basis=told["basis"], source=told["source"], statute=told["law"],
        disclosure=Disclosure((told["recipient"],), told["transfer"]),
    )  # fmt: skip
    seen = _Page(
        page(
            drawn(
                data_map,
                controller=Controller(told["name"], told["contact"]),
                measures=(Measure("m", told["measure"]),),
            )
        )
    )
    assert "script" not in seen.tags
    for name in names[:-1]:
        assert told[name] in seen.text, name
    assert category_words(told["category"]) in seen.text


# The map itself


def test_the_shown_map_holds_every_table_and_column_and_no_other() -> None:
    facts = get_map_service().describe()
    shown = {(table.name, column.name) for table in facts.tables for column in table.columns}
    assert shown == {(t.name, str(c.name)) for t in DATA_MAP.tables for c in t.table.columns}
    for table in facts.tables:
        for column in table.columns:
            rule = DATA_MAP[table.name].columns[column.name]
            assert column.personal == (rule if isinstance(rule, Personal) else None)
            assert (column.personal is None) is bool(column.not_personal_because)
        # Whoever owns rows, there is a way to them.
        assert bool(table.ways) is (table.role is TableRole.OWNED)


def test_every_link_to_the_person_is_shown_circles_included() -> None:
    facts = {table.name: table for table in get_map_service().describe(small_map()).tables}
    assert [(way.steps, way.in_circle) for way in facts["parts"].ways] == [
        (("parts.thing_id", "things.person_id", "people"), False),
        (("parts.part_id", "parts.thing_id", "things.person_id", "people"), True),
    ]
    assert facts["people"].ways == ()
    assert facts["firms"].referred_by == ("things.firm_id",)
    assert (facts["parts"].clock, facts["parts"].data_type) == ("things", "thing")


def test_a_column_of_which_rows_are_still_in_plain_is_not_called_encrypted(
    sqlite_service: Service,
) -> None:
    def told() -> dict[Protection, tuple[str, ...]]:
        with session_scope(read_only=True) as session:
            activities = get_map_service().records(session, NOW).activities
        (stay,) = (one for one in activities if "bookings" in one.tables)
        return dict(stay.protection)

    assert "bookings.staff_notes" in told()[Protection.ENCRYPTED]
    migration = ColumnMigration(
        table_name="bookings", column_name="staff_notes", started_by="test", started_at=NOW
    )
    sqlite_service.add(migration)
    assert told()[Protection.BEING_ENCRYPTED] == ("bookings.staff_notes",)
    assert "bookings.staff_notes" not in told()[Protection.ENCRYPTED]
    with session_scope() as session:
        session.merge(migration).finished_at = NOW
    assert "bookings.staff_notes" in told()[Protection.ENCRYPTED]
