"""The data map: it covers the whole database, and a declaration with a gap is refused."""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    inspect,
)

from backend.crypto.columns import Encrypted
from backend.db_utils import get_engine, session_scope
from backend.models import DATA_MAP, Base, Installation
from backend.models.base import UtcDateTime
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import (
    NotPersonal,
    OnErase,
    Personal,
    Retention,
    TableRole,
    control_table,
    not_personal,
    owned_table,
    personal,
    subject_table,
)
from backend.privacy.mapped_tables import DataMapError
from tests.conftest import Service


def _people(metadata: MetaData, *columns: Column[Any], **options: Any) -> Table:
    return Table(
        "people",
        metadata,
        Column("id", Integer, primary_key=True, info=not_personal("row number")),
        Column("seen_at", UtcDateTime, info=personal("user.behavior")),
        Column("anonymized_at", UtcDateTime, info=not_personal("when")),
        *columns,
        info=subject_table(
            purpose="p", basis="b", source="s", retention=Retention("person", "seen_at")
        ),
        **options,
    )


def _owned(metadata: MetaData, *columns: Column[Any], **rule: Any) -> Table:
    rule = {"by": "person_id", "purpose": "p", "basis": "b", "source": "s"} | rule
    return Table(
        "things",
        metadata,
        Column("id", Integer, primary_key=True, info=not_personal("row number")),
        Column("person_id", ForeignKey("people.id"), info=personal("user.unique_id")),
        Column("bought_on", Date, info=personal("user.behavior")),
        *columns,
        info=owned_table(**rule),
    )


def _marked_anonymous() -> Column[Any]:
    return Column("anonymized_at", UtcDateTime, info=not_personal("when"))


def test_every_column_of_the_database_is_declared(service: Service) -> None:
    inspector = inspect(get_engine())
    tables = set(inspector.get_table_names()) - {"alembic_version"}
    assert tables == {mapped.name for mapped in DATA_MAP.tables}
    for name in tables:
        columns = {column["name"] for column in inspector.get_columns(name)}
        assert columns == set(DATA_MAP[name].columns), name


def test_every_declaration_says_what_it_is_for() -> None:
    for mapped in DATA_MAP.tables:
        assert mapped.rule.purpose, mapped.name
        if mapped.rule.role is not TableRole.CONTROL:
            assert mapped.rule.basis, mapped.name
            assert mapped.rule.source, mapped.name
        for name, rule in mapped.columns.items():
            said = rule.reason if isinstance(rule, NotPersonal) else rule.category
            assert said, f"{mapped.name}.{name}"


def test_every_encrypted_column_of_people_is_personal() -> None:
    sealed = {
        (mapped.name, column.name)
        for mapped in DATA_MAP.of_people
        for column in mapped.table.columns
        if isinstance(column.type, Encrypted)
    }
    assert ("users", "email") in sealed
    for table, column in sealed:
        assert isinstance(DATA_MAP[table].columns[column], Personal), f"{table}.{column}"


def test_a_row_number_of_people_is_never_given_twice() -> None:
    for mapped in DATA_MAP.of_people:
        if mapped.key.type.python_type is int:
            assert mapped.table.dialect_options["sqlite"]["autoincrement"], mapped.name


def test_the_paths_lead_to_the_person() -> None:
    for mapped in DATA_MAP.of_people:
        if mapped.rule.role is TableRole.SHARED:
            assert [*DATA_MAP.references_to(mapped)]
            continue
        at = mapped
        while at.parent is not None:
            at = at.parent
        assert at is DATA_MAP.subject
    lines = DATA_MAP["invoice_lines"]
    assert lines.parent is DATA_MAP["invoices"]
    assert lines.clock is DATA_MAP["invoices"]
    assert lines.statute == DATA_MAP["invoices"].statute is not None
    assert DATA_MAP["data_consents"].clock is None


def test_children_come_before_their_parents() -> None:
    order = [mapped.name for mapped in DATA_MAP.children_first]
    for mapped in DATA_MAP.of_people:
        if mapped.parent is not None:
            assert order.index(mapped.name) < order.index(mapped.parent.name)


def test_the_data_types_are_those_of_the_policies() -> None:
    assert set(DATA_MAP.by_data_type) == {"user", "booking", "payment", "invoice", "feedback"}


def test_a_declared_database_is_accepted() -> None:
    metadata = MetaData()
    _people(metadata, Column("name", String(40), info=personal("user.name")))
    _owned(metadata, _marked_anonymous(), retention=Retention("thing", "bought_on"), statute="law")
    rule = control_table("c")
    Table("notes", metadata, Column("id", Integer, primary_key=True, info=not_personal("n")),
          info=rule)  # fmt: skip
    data_map = DataMap.of(metadata)
    assert [mapped.name for mapped in data_map.of_people] == ["people", "things"]
    assert data_map.subject.name == "people"
    assert set(data_map["people"].personal_columns) == {"seen_at", "name"}


def test_an_undeclared_column_is_refused() -> None:
    metadata = MetaData()
    _people(metadata, Column("nickname", String(40)))
    with pytest.raises(DataMapError, match=r"people\.nickname"):
        DataMap.of(metadata)


def test_an_undeclared_table_is_refused() -> None:
    metadata = MetaData()
    _people(metadata)
    Table("visits", metadata, Column("id", Integer, primary_key=True, info=not_personal("n")))
    with pytest.raises(DataMapError, match="visits"):
        DataMap.of(metadata)


@pytest.mark.parametrize(
    "column",
    [
        Column("c", String(40), nullable=False, info=personal("user.name")),
        Column("c", String(40), unique=True,
               info=personal("user.name", OnErase.CONSTANT, constant="x")),
        Column("c", String(40), info=personal("user.name", OnErase.CONSTANT)),
        Column("c", String(40), info=personal("user.name", OnErase.MONTH)),
        Column("c", Encrypted("date"), info=personal("user.name", OnErase.MONTH)),
        Column("c", Integer, info=personal("user.name", OnErase.RANDOM)),
        Column("c", DateTime, info=personal("user.name", OnErase.RANDOM)),
    ],
    ids=["null where it may not be", "one value where all differ", "no constant given",
         "a month of a text", "a month of a sealed date", "a random number", "a random time"],
)  # fmt: skip
def test_a_rule_that_the_column_cannot_follow_is_refused(column: Column[Any]) -> None:
    metadata = MetaData()
    _people(metadata, column._copy())
    with pytest.raises(DataMapError, match=r"people\.c"):
        DataMap.of(metadata)


@pytest.mark.parametrize(
    "column",
    [
        Column("c", String(40), info=personal("user.name")),
        Column("c", String(40), nullable=False,
               info=personal("user.name", OnErase.CONSTANT, constant="x")),
        Column("c", UtcDateTime, nullable=False, info=personal("user.name", OnErase.MONTH)),
        Column("c", String(32), unique=True, nullable=False,
               info=personal("user.name", OnErase.RANDOM)),
        Column("c", String(40), nullable=False, info=personal("user.name", OnErase.KEEP)),
    ],
)  # fmt: skip
def test_a_rule_that_the_column_can_follow_is_accepted(column: Column[Any]) -> None:
    metadata = MetaData()
    _people(metadata, column._copy())
    assert "c" in DataMap.of(metadata)["people"].personal_columns


@pytest.mark.parametrize(
    "constraint", [UniqueConstraint("c"), Index("ix_c", "c", unique=True)], ids=["key", "index"]
)
def test_a_constant_is_refused_where_the_table_asks_for_unique_values(
    constraint: UniqueConstraint | Index,
) -> None:
    metadata = MetaData()
    column = Column("c", String(40), info=personal("user.name", OnErase.CONSTANT, constant="x"))
    _people(metadata, column).append_constraint(constraint) if isinstance(
        constraint, UniqueConstraint
    ) else Index("ix_c", _people(metadata, column).c.c, unique=True)
    with pytest.raises(DataMapError, match=r"people\.c"):
        DataMap.of(metadata)


def test_a_random_id_that_the_column_is_too_short_for_is_refused() -> None:
    metadata = MetaData()
    _people(metadata, Column("c", String(16), info=personal("user.unique_id", OnErase.RANDOM)))
    with pytest.raises(DataMapError, match=r"people\.c"):
        DataMap.of(metadata)


def test_a_table_that_cannot_be_marked_anonymous_is_refused() -> None:
    metadata = MetaData()
    _people(metadata)
    _owned(metadata)
    with pytest.raises(DataMapError, match="things"):
        DataMap.of(metadata)


def test_a_table_that_is_always_deleted_needs_no_mark() -> None:
    metadata = MetaData()
    _people(metadata)
    _owned(metadata, always_delete=True)
    assert DataMap.of(metadata)["things"].rule.always_delete


@pytest.mark.parametrize(
    "rule",
    [
        {"statute": "a law"},
        {"by": "owner_id"},
        {"by": "bought_on"},
        {"retention": Retention("thing", "sold_on")},
    ],
    ids=["a law without a period", "no such link", "a link to nowhere", "no such anchor"],
)
def test_a_table_rule_that_leads_nowhere_is_refused(rule: dict[str, Any]) -> None:
    metadata = MetaData()
    _people(metadata)
    _owned(metadata, _marked_anonymous(), **rule)
    with pytest.raises(DataMapError, match="things"):
        DataMap.of(metadata)


def test_a_time_is_read_as_the_instant_that_was_stored(service: Service) -> None:
    moment = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
    row = Installation(created_at=moment, reference_key=b"key")
    service.add(row)
    with session_scope(read_only=True) as session:
        assert session.get_one(Installation, row.id).created_at == moment


def test_a_time_without_a_zone_is_refused(sqlite_service: Service) -> None:
    moment = datetime(2026, 3, 29, 1, 30)  # noqa: DTZ001
    with pytest.raises(Exception, match="without a zone"):
        sqlite_service.add(Installation(created_at=moment, reference_key=b"key"))


def test_a_value_outside_a_closed_set_is_refused_by_the_database(service: Service) -> None:
    closed = {
        (table.name, constraint.name)
        for table in Base.metadata.sorted_tables
        for constraint in table.constraints
        if str(constraint.name).startswith("ck_")
    }
    inspector = inspect(get_engine())
    there = {
        (name, found["name"])
        for name in inspector.get_table_names()
        for found in inspector.get_check_constraints(name)
    }
    assert closed
    assert closed <= there
