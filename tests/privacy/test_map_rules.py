"""What a map of any schema must keep to: each refusal beside the declaration that is accepted."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Date,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

from backend.privacy.data_map import DataMap
from backend.privacy.declarations import (
    Identity,
    OnErase,
    Retention,
    control_table,
    not_personal,
    personal,
    reference_table,
)
from backend.privacy.mapped_tables import DataMapError
from tests.privacy.odd_maps import (
    address,
    by_law,
    link,
    number,
    owned,
    people,
    said,
    shared,
    village,
)

Build = Callable[[MetaData], object]


class Size(StrEnum):
    SMALL = "small"
    NONE = "none"


def plain(name: str, *columns: Any, **column: Any) -> Column[Any]:
    return Column(name, *columns, info=not_personal("a test"), **column)


def things(*columns: Any, by: str | tuple[str, ...] = "person_id", **rule: Any) -> Build:
    def build(m: MetaData) -> None:
        owned(m, "things", *columns, by=by, **rule)

    return build


def mine(*columns: Any, **rule: Any) -> Build:
    """A table of people's things with *columns* besides."""
    return things(number(), link("person_id", "people.id"), *columns, **rule)


def both(*builds: Build) -> Build:
    return lambda m: [build(m) for build in builds]


def with_orders(m: MetaData) -> None:
    owned(m, "orders", number(), link("person_id", "people.id"), plain("no", Integer, unique=True),
          said("alias", on_erase=OnErase.RANDOM), said("code", on_erase=OnErase.KEEP),
          by="person_id")  # fmt: skip
    m.tables["orders"].append_constraint(UniqueConstraint("code"))
    m.tables["orders"].append_constraint(UniqueConstraint("alias"))


def with_shared(m: MetaData) -> None:
    shared(m, "addresses", number(), said())


def with_reference(m: MetaData) -> None:
    Table("products", m, number(), info=reference_table("what is sold"))


def composite(*columns: Any) -> Build:
    key = (plain("tenant", Integer, primary_key=True), plain("no", Integer, primary_key=True))
    return lambda m: owned(
        m, "docs", *key, *columns, link("person_id", "people.id"), by="person_id"
    )


def law(*links: Any, by: str | tuple[str, ...]) -> Build:
    return lambda m: by_law(m, "invoices", number(), *links, by=by)


CASES: dict[str, tuple[Build, Build, str]] = {
    # What is wrong: (refused, accepted, what the refusal names).
    "no key": (
        things(link("person_id", "people.id")),
        things(plain("a", Integer, primary_key=True), plain("b", Integer, primary_key=True),
               link("person_id", "people.id")),
        "things",
    ),
    "a third party who cannot be found": (
        mine(said("name", third_party=True)),
        mine(said("name", third_party=True), address("email", Identity.EMAIL, third_party=True)),
        "things",
    ),
    "an address that is the owner's own": (
        mine(address("email", Identity.EMAIL)),
        mine(address("email", Identity.EMAIL, third_party=True)),
        r"things\.email",
    ),
    "an address that erasure would leave": (
        mine(address("email", Identity.EMAIL, third_party=True, on_erase=OnErase.KEEP)),
        mine(address("email", Identity.EMAIL, third_party=True, on_erase=OnErase.CONSTANT,
                     constant="")),
        r"things\.email",
    ),
    "an address that the law would leave": (
        lambda m: by_law(m, "things", number(), link("person_id", "people.id"),
                         address("email", Identity.EMAIL, third_party=True, statutory=True),
                         by="person_id"),
        lambda m: by_law(m, "things", number(), link("person_id", "people.id"),
                         address("email", Identity.EMAIL, third_party=True), by="person_id"),
        r"things\.email",
    ),
    "a link to what several share": (
        both(with_shared, things(number(), link("address_id", "addresses.id"), by="address_id")),
        both(with_shared, mine(link("address_id", "addresses.id"))),
        "things",
    ),
    "a link to what is nobody's": (
        both(with_reference, things(number(), link("product_id", "products.id"), by="product_id")),
        both(with_reference, mine(link("product_id", "products.id"))),
        "things",
    ),
    "a link to itself only": (
        things(number(), link("up_id", "things.id"), by="up_id"),
        mine(link("up_id", "things.id"), by=("person_id", "up_id")),
        "things",
    ),
    "a circle of rows with keys of two columns": (
        things(plain("a", Integer, primary_key=True), plain("b", Integer, unique=True,
               primary_key=True), link("person_id", "people.id"), link("up", "things.b"),
               by=("person_id", "up")),
        mine(link("up", "things.id"), by=("person_id", "up")),
        "things",
    ),
    "a circle by what is no key": (
        mine(plain("no", Integer, unique=True), link("up", "things.no"), by=("person_id", "up")),
        both(with_orders, things(number(), link("order_no", "orders.no"), by="order_no")),
        "things",
    ),
    "a further link that erasure would leave": (
        # Once the first is cut, the row would be whosever the second leads to.
        both(with_orders, mine(plain("order_id", ForeignKey("orders.id"), nullable=True),
                               by=("person_id", "order_id"))),
        both(with_orders, mine(link("order_id", "orders.id"), by=("person_id", "order_id"))),
        r"things\.order_id",
    ),
    "a link of two columns": (
        # By one of them alone it leads to other tenants' rows.
        both(composite(), things(number(), plain("tenant", Integer), plain("doc_no", Integer),
             ForeignKeyConstraint(["tenant", "doc_no"], ["docs.tenant", "docs.no"]),
             by="doc_no")),
        both(composite(plain("serial", Integer, unique=True)),
             things(number(), link("serial", "docs.serial"), by="serial")),
        "things",
    ),
    "a shared row that erasure could not let go of": (
        both(with_shared, mine(plain("address_id", ForeignKey("addresses.id"), nullable=True))),
        both(with_shared, mine(link("address_id", "addresses.id", statutory=True))),
        r"things\.address_id",
    ),
    "shared rows in a circle": (
        lambda m: shared(m, "addresses", number(), link("part_of", "addresses.id")),
        both(with_shared, lambda m: shared(m, "rooms", number(), link("at", "addresses.id"))),
        "addresses",
    ),
    "a reference that cannot be cut": (
        both(with_orders, mine(link("order_id", "orders.id", nullable=False))),
        both(with_orders, mine(link("order_id", "orders.id"))),
        r"things\.order_id",
    ),
    "a reference to what erasure changes": (
        both(with_orders, mine(link("alias", "orders.alias"))),
        both(with_orders, mine(link("code", "orders.code"))),
        r"orders\.alias",
    ),
    "a price list that refers to people": (
        lambda m: Table("products", m, number(), plain("by", ForeignKey("people.id")),
                        info=reference_table("what is sold")),
        with_reference,
        r"products\.by",
    ),
    "own records that refer to people": (
        lambda m: Table("runs", m, number(), plain("by", ForeignKey("people.id")),
                        info=control_table("runs")),
        lambda m: Table("runs", m, number(), info=control_table("runs")),
        r"runs\.by",
    ),
    "a law that keeps a row whose parent goes": (
        both(with_orders, law(link("order_id", "orders.id", nullable=False), by="order_id")),
        both(with_orders, law(link("order_id", "orders.id"), by="order_id")),
        r"invoices\.order_id",
    ),
    "a law that keeps the link to the person": (
        law(link("person_id", "people.id", statutory=True), by="person_id"),
        law(link("person_id", "people.id"), by="person_id"),
        r"invoices\.person_id",
    ),
    "a month where the key must differ": (
        things(Column("day", Date, primary_key=True, info=personal("user.behavior", OnErase.MONTH)),
               link("person_id", "people.id")),
        things(Column("email", String(80), primary_key=True,
                      info=personal("user.contact.email", OnErase.RANDOM)),
               link("person_id", "people.id")),
        r"things\.day",
    ),
    "constants where two columns together must differ": (
        mine(plain("kind", Integer), said(on_erase=OnErase.CONSTANT, constant="-"),
             UniqueConstraint("kind", "content")),
        mine(said(on_erase=OnErase.CONSTANT, constant="-"),
             UniqueConstraint("person_id", "content")),
        r"things\.kind, things\.content",
    ),
    "a constant that is too long": (
        mine(said(on_erase=OnErase.CONSTANT, constant="x" * 81)),
        mine(said(on_erase=OnErase.CONSTANT, constant="x" * 80)),
        r"things\.content",
    ),
    "a constant outside of the closed set": (
        mine(Column("size", Enum(Size), info=personal("user.content", OnErase.CONSTANT,
                                                      constant="none of them"))),
        mine(Column("size", Enum(Size), info=personal("user.content", OnErase.CONSTANT,
                                                      constant=Size.NONE))),
        r"things\.size",
    ),
    "two tables with one data type": (
        mine(Column("day", Date, info=personal("user.behavior")),
             retention=Retention("person", "day")),
        mine(Column("day", Date, info=personal("user.behavior")),
             retention=Retention("thing", "day")),
        r"person",
    ),
    "a random value outside of the closed set": (
        mine(Column("size", Enum(Size, length=40, native_enum=False),
                    info=personal("user.content", OnErase.RANDOM))),
        mine(Column("size", String(40), info=personal("user.content", OnErase.RANDOM))),
        r"things\.size",
    ),
}  # fmt: skip


def built(build: Build) -> DataMap:
    metadata = MetaData()
    people(metadata, address("email", Identity.EMAIL))
    build(metadata)
    return DataMap.of(metadata)


@pytest.mark.parametrize("case", CASES)
def test_a_map_is_refused_where_erasure_could_not_keep_to_it(case: str) -> None:
    refused, accepted, named = CASES[case]
    assert built(accepted).of_people
    with pytest.raises(DataMapError, match=named):
        built(refused)


def test_a_map_without_people_is_refused() -> None:
    metadata = MetaData()
    with_reference(metadata)
    with pytest.raises(DataMapError, match="people"):
        DataMap.of(metadata)


def test_a_map_with_two_kinds_of_people_is_refused() -> None:
    metadata, other = MetaData(), MetaData()
    people(metadata)
    people(other).to_metadata(metadata, name="customers")
    with pytest.raises(DataMapError, match=r"customers.*people"):
        DataMap.of(metadata)


def test_what_a_row_belongs_to_comes_before_it_whatever_else_refers_to_what() -> None:
    data_map = DataMap.of(village())
    order = [mapped.name for mapped in data_map.tables]
    for mapped in data_map.of_people:
        for at, way in enumerate(data_map.links(mapped)):
            if at == 0 or way.target.name not in data_map.circle(mapped):
                assert order.index(way.target.name) < order.index(mapped.name), mapped.name
    assert data_map.circle(data_map["docs"]) == {"docs", "labels", "folders"}
    assert data_map.circle(data_map["comments"]) == {"comments"}
    assert data_map.circle(data_map["attachments"]) == frozenset()
