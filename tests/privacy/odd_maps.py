"""Data maps that are not ours, rows in them, and by brute force what an erasure must do."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    Column,
    Date,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Uuid,
    insert,
    select,
    update,
)
from sqlalchemy.orm import Session

from backend.models.base import UtcDateTime
from backend.privacy.data_map import DataMap
from backend.privacy.declarations import (
    EraseMode,
    Identity,
    OnErase,
    Personal,
    Retention,
    TableRole,
    not_personal,
    owned_table,
    personal,
    reference_table,
    shared_table,
    subject_table,
)
from backend.privacy.erase import ErasurePlan, carry_out_erasure, plan_erasure
from backend.privacy.periods import Period
from backend.privacy.walk import Subjects

NOW: Final = datetime(2026, 6, 1, 12, tzinfo=UTC)
# Rows are marked with the month alone.
MARKED: Final = datetime(2026, 6, 1, tzinfo=UTC)
PERIOD: Final = timedelta(days=1000)
PERIODS: Final = {name: Period.of_days(PERIOD.days) for name in ("person", "invoice")}
YOUNG, OLD = date(2026, 5, 17), date(2019, 5, 17)
LAW: Final = "GDPR art. 17(3)(b): a law"

RANDOM: Final = "a fresh random id"

Row = dict[str, Any]
Key = tuple[Any, ...]
Dump = dict[str, dict[Key, Row]]


def number(kind: Any = Integer) -> Column[Any]:
    return Column("id", kind(), primary_key=True, info=not_personal("row number"))


def link(name: str, target: str, *, nullable: bool = True, **rule: Any) -> Column[Any]:
    info = personal("user.unique_id", **rule) if nullable else not_personal("goes with its parent")
    return Column(name, ForeignKey(target), nullable=nullable, info=info)


def said(name: str = "content", **rule: Any) -> Column[Any]:
    return Column(name, String(80), info=personal("user.content", **rule))


def mark(name: str = "anonymized_at") -> Column[Any]:
    return Column(name, UtcDateTime, info=not_personal("when"))


def address(name: str, identity: Identity, **rule: Any) -> Column[Any]:
    return said(name, identity=identity, **rule)


def people(metadata: MetaData, *columns: Any) -> Table:
    return Table(
        "people",
        metadata,
        number(),
        Column("seen_at", UtcDateTime, info=personal("user.behavior")),
        said("name"),
        mark(),
        *columns,
        info=subject_table(
            purpose="p", basis="b", source="s", retention=Retention("person", "seen_at")
        ),
    )


def owned(
    metadata: MetaData, name: str, *columns: Any, by: str | tuple[str, ...], **rule: Any
) -> Table:
    info = owned_table(by=by, purpose="p", basis="b", source="s", **rule)
    marks = () if rule.get("always_delete") else (mark(),)
    return Table(name, metadata, *columns, *marks, info=info)


def by_law(metadata: MetaData, name: str, *columns: Any, by: str | tuple[str, ...]) -> Table:
    """A table whose rows a law keeps for `PERIOD` after the day of issue."""
    return owned(
        metadata, name, *columns,
        Column("issued_on", Date, info=personal("user.financial", OnErase.MONTH, statutory=True)),
        mark("restricted_at"),
        by=by, retention=Retention("invoice", "issued_on"), statute=LAW,
    )  # fmt: skip


def shared(metadata: MetaData, name: str, *columns: Any) -> Table:
    return Table(name, metadata, *columns, info=shared_table(purpose="p", basis="b", source="s"))


def village(kind: Any = Integer) -> MetaData:
    """
    A map with every shape at once; the circle has keys of *kind*.

    Chains four deep, a circle over three tables with a child, threads that refer to themselves,
    people who refer to people, composite and personal keys, shared rows that refer to shared
    rows, third parties, a law that keeps rows with a link of theirs.
    """
    m = MetaData()
    shared(m, "regions", number(), said())
    shared(
        m, "addresses", number(), said("street"), link("region_id", "regions.id"),
        said("contact", third_party=True), address("email", Identity.EMAIL, third_party=True),
    )  # fmt: skip
    Table(
        "products", m, number(), Column("label", String(40), info=not_personal("a product")),
        info=reference_table("what is sold"),
    )  # fmt: skip
    people(
        m, address("email", Identity.EMAIL), address("phone", Identity.PHONE),
        link("address_id", "addresses.id"), link("boss_id", "people.id"),
        link("favourite_id", "docs.id"),
    )  # fmt: skip
    owned(m, "wings", number(), link("person_id", "people.id"), said(), by="person_id")
    owned(m, "orders", number(), link("wing_id", "wings.id"), said(),
          link("address_id", "addresses.id"), by="wing_id")  # fmt: skip
    owned(
        m, "order_lines",
        Column("order_id", ForeignKey("orders.id"), primary_key=True, info=not_personal("parent")),
        Column("line", Integer, primary_key=True, info=not_personal("number in its order")),
        Column("product_id", ForeignKey("products.id"), nullable=False, info=not_personal("what")),
        said(), by="order_id",
    )  # fmt: skip
    owned(
        m, "guests", number(), link("order_id", "orders.id", nullable=False), said(),
        said("name", third_party=True), address("email", Identity.EMAIL, third_party=True),
        address("phone", Identity.PHONE, third_party=True), by="order_id",
    )  # fmt: skip
    by_law(m, "invoices", number(), link("person_id", "people.id"), link("order_id", "orders.id"),
           link("address_id", "addresses.id", statutory=True), said("note"),
           said("payer", statutory=True), by=("person_id", "order_id"))  # fmt: skip
    owned(
        m, "invoice_lines",
        Column("invoice_id", ForeignKey("invoices.id"), primary_key=True, info=not_personal("p")),
        Column("line", Integer, primary_key=True, info=not_personal("number in its invoice")),
        said(statutory=True), by="invoice_id",
    )  # fmt: skip
    owned(m, "comments", number(), link("person_id", "people.id"),
          link("parent_id", "comments.id"), said(), by=("person_id", "parent_id"))  # fmt: skip
    owned(m, "docs", number(kind), link("wing_id", "wings.id"), link("label_id", "labels.id"),
          said(), by=("wing_id", "label_id"))  # fmt: skip
    owned(m, "labels", number(kind), link("person_id", "people.id"),
          link("folder_id", "folders.id"), said(), by=("person_id", "folder_id"))  # fmt: skip
    owned(m, "folders", number(kind), link("order_id", "orders.id"), link("doc_id", "docs.id"),
          said(), by=("order_id", "doc_id"))  # fmt: skip
    owned(m, "attachments", number(), link("doc_id", "docs.id"), said(), by="doc_id")
    owned(m, "likes", number(), link("comment_id", "comments.id", nullable=False), said(),
          by="comment_id", always_delete=True)  # fmt: skip
    owned(
        m, "newsletter",
        Column("email", String(80), primary_key=True,
               info=personal("user.contact.email", OnErase.RANDOM)),
        link("person_id", "people.id"), by="person_id",
    )  # fmt: skip
    return m


def key_of(kind: Any, row: int) -> Any:
    """The *row*-th key of its kind; those of text hold what a list of them is joined with."""
    return {Integer: row, Uuid: UUID(int=row << 64 | row)}.get(kind, f"{row},a;{row}")


def text_key() -> String:
    return String(20)


def put(session: Session, metadata: MetaData, rows: Mapping[str, Collection[Row]]) -> None:
    """Insert *rows*, whatever circle they refer to each other in."""
    data_map = DataMap.of(metadata)
    later = []
    for mapped in data_map.tables:
        loose = [c.name for c in mapped.table.columns if c.foreign_keys and c.nullable]
        for row in rows.get(mapped.name, ()):
            session.execute(
                insert(mapped.table).values({k: v for k, v in row.items() if k not in loose})
            )
            links = {name: row[name] for name in loose if row.get(name) is not None}
            if links:
                here = (column == row[column.name] for column in mapped.keys)
                later.append(update(mapped.table).where(*here).values(links))
    for statement in later:
        session.execute(statement)


def dump(session: Session, data_map: DataMap) -> Dump:
    return {
        mapped.name: {
            tuple(row[column.name] for column in mapped.keys): dict(row)
            for row in session.execute(select(mapped.table)).mappings()
        }
        for mapped in data_map.tables
    }


def alike(actual: Dump, foretold: Dump) -> dict[str, tuple[list[Row], list[Row]]]:
    """Say in which tables two dumps differ, and how; any fresh random id is as good as another."""
    found = {}
    for table in foretold:
        there, expected = list(actual[table].values()), list(foretold[table].values())
        if any(RANDOM in row.values() for row in expected):
            known = {v for row in expected for v in row.values()}
            there = [
                {k: RANDOM if len(str(v)) == 32 and v not in known else v for k, v in row.items()}
                for row in there
            ]
        there.sort(key=str)
        expected.sort(key=str)
        if there != expected:
            gone = [row for row in there if row not in expected]
            found[table] = (gone, [row for row in expected if row not in there])
    return found


def person(session: Session, data_map: DataMap, row: int) -> Subjects:
    """One person and what others' rows name them by, as the service hands them in."""
    table = data_map.subject.table
    (cells,) = session.execute(select(table).where(table.c.id == row)).mappings()
    terms = {
        identity: [cells[column.name]]
        for identity, column in data_map.subject.identities.items()
        if cells[column.name] is not None
    }
    return Subjects.one(data_map, row, terms)


def plan(session: Session, data_map: DataMap, who: Subjects, mode: EraseMode) -> ErasurePlan:
    return plan_erasure(session, data_map, who, mode=mode, periods=PERIODS, now=NOW)


def erase(session: Session, data_map: DataMap, who: Subjects, mode: EraseMode) -> ErasurePlan:
    planned = plan(session, data_map, who, mode)
    carry_out_erasure(session, data_map, planned, who, NOW)
    return planned


@dataclass
class Foretold:
    """What must be after an erasure, worked out row by row in Python over the raw rows."""

    data_map: DataMap
    before: Dump
    person: int
    mode: EraseMode
    terms: Mapping[Identity, Collection[str]]
    after: Dump = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.after = {t: {k: dict(r) for k, r in rows.items()} for t, rows in self.before.items()}
        self.reached = self._reached()
        for table, key in list(self._rows()):
            if self.mine(table, key):
                self._erase(table, key)
        for table, key in self.reached - (staying := self._staying()):
            self._end(table, key, "deleted")
        for table, _key in staying & self._let_go():
            self._count(table, "shared")
        for table, key in list(self._rows()):
            row, role = self.before[table][key], self.data_map[table].rule.role
            if (
                role is not TableRole.SUBJECT
                and not self.mine(table, key)
                and self.names(table, row)
            ):
                self._change(table, key, lambda rule: rule.third_party)
                self._count(table, "redacted")
        there = set(self._rows())
        for table, key in there:
            for name, target in list(self._targets(table, self.after[table][key])):
                if target not in there:
                    self.after[table][key][name] = None

    def _rows(self) -> Iterator[tuple[str, Key]]:
        return ((table, key) for table, rows in self.after.items() for key in rows)

    def _targets(self, table: str, row: Row) -> Iterator[tuple[str, tuple[str, Key]]]:
        for column in self.data_map[table].table.columns:
            for foreign in column.foreign_keys:
                if row[column.name] is not None:
                    yield str(column.name), (str(foreign.column.table.name), (row[column.name],))

    def mine(self, table: str, key: Key) -> bool:
        seen = set()
        while table != "people":
            if (table, key) in seen:
                return False
            seen.add((table, key))
            targets = dict(self._targets(table, self.before[table][key]))
            by = [n for n in self.data_map[table].rule.owned_by if n in targets]
            if not by:
                return False
            table, key = targets[by[0]]
        return key == (self.person,)

    def names(self, table: str, row: Row) -> bool:
        identities = self.data_map[table].identities
        if Identity.EMAIL in identities and row["email"] is not None:
            return row["email"] in self.terms.get(Identity.EMAIL, ())
        return Identity.PHONE in identities and row["phone"] in self.terms.get(Identity.PHONE, ())

    def is_shared(self, table: str) -> bool:
        return self.data_map[table].rule.role is TableRole.SHARED

    def _reached(self) -> set[tuple[str, Key]]:
        found: set[tuple[str, Key]] = set()
        rows = [(t, k) for t, k in self._rows() if self.mine(t, k)]
        while rows:
            table, key = rows.pop()
            for _name, target in self._targets(table, self.before[table][key]):
                if self.is_shared(target[0]) and target not in found:
                    found.add(target)
                    rows.append(target)
        return found

    def _staying(self) -> set[tuple[str, Key]]:
        """The reached shared rows that a row refers to which is there to stay."""
        staying: set[tuple[str, Key]] = set()
        while True:
            needed = {
                target
                for table, key in self._rows()
                if (table, key) not in self.reached - staying
                for _name, target in self._targets(table, self.after[table][key])
            }
            if needed & self.reached <= staying:
                return staying
            staying |= needed & self.reached

    def _let_go(self) -> set[tuple[str, Key]]:
        """The rows to which a link was cut, or whose referring row is gone."""
        return {
            target
            for table, rows in self.before.items()
            for key, row in rows.items()
            for name, target in self._targets(table, row)
            if self.after[table].get(key, {}).get(name) is None
        }

    def _erase(self, table: str, key: Key) -> None:
        mapped = self.data_map[table]
        clock, row = mapped, self.before[table][key]
        if mapped.statute is not None and table == "invoice_lines":
            clock, row = self.data_map["invoices"], self.before["invoices"][(row["invoice_id"],)]
        if clock.statute is not None and row["issued_on"] in (YOUNG, None):
            self._change(table, key, lambda rule: not rule.statutory)
            if "restricted_at" in mapped.columns:
                self.after[table][key]["restricted_at"] = MARKED
            self._count(table, "retained")
        elif self.mode is EraseMode.DELETE or mapped.rule.always_delete:
            self._end(table, key, "deleted")
        else:
            self._change(table, key, lambda _rule: True)
            self.after[table][key]["anonymized_at"] = MARKED
            self._count(table, "anonymized")

    def _end(self, table: str, key: Key, outcome: str) -> None:
        del self.after[table][key]
        self._count(table, outcome)

    def _count(self, table: str, outcome: str) -> None:
        of_table = self.counts.setdefault(table, {})
        of_table[outcome] = of_table.get(outcome, 0) + 1

    def _change(self, table: str, key: Key, which: Any) -> None:
        row = self.after[table][key]
        for name, rule in self.data_map[table].personal_columns.items():
            if which(rule):
                row[name] = _erased(rule, row[name])


def _erased(rule: Personal, value: Any) -> Any:
    match rule.on_erase:
        case OnErase.KEEP:
            return value
        case OnErase.RANDOM:
            return RANDOM
        case OnErase.MONTH:
            return value and value.replace(day=1)
        case _:
            return rule.constant
