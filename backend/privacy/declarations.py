"""
What tables and columns say of themselves, where they are defined: the words of the data map.

A column is `personal` or `not_personal`; a table is a `subject_table`, an `owned_table`, a
`shared_table`, a `reference_table` or a `control_table`. All of it goes into SQLAlchemy's `info`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

KEY: Final = "privacy"


class OnErase(StrEnum):
    """What anonymising does to a personal column."""

    NULL = "null"
    MONTH = "month"  # A date is coarsened to the first of its month.
    RANDOM = "random"  # UNIQUE NOT NULL forces a value: a new random one, derived from nothing.
    CONSTANT = "constant"
    KEEP = "keep"  # Says nothing of anybody once the row's identifiers are gone.


class EraseMode(StrEnum):
    """What becomes of a person's rows that nothing keeps."""

    DELETE = "delete"
    ANONYMIZE = "anonymize"


class Identity(StrEnum):
    """By what a person is found who has no number here."""

    EMAIL = "email"
    PHONE = "phone"


@dataclass(frozen=True, slots=True)
class Personal:
    """
    A column that says something of a person.

    *category* is in Fides' vocabulary (fideslang data categories). *exported* is false for what
    an access request must not hand out: hashes and search terms. *statutory* columns stay while
    a law keeps their row. *third_party* columns say something of the person whom the row's
    *identity* columns name, and nothing of the one whose row it is.
    """

    category: str
    on_erase: OnErase
    exported: bool
    statutory: bool
    constant: Any
    identity: Identity | None
    third_party: bool


@dataclass(frozen=True, slots=True)
class NotPersonal:
    """A column that says nothing of a person, and why."""

    reason: str


class TableRole(StrEnum):
    SUBJECT = "subject"
    OWNED = "owned"
    SHARED = "shared"
    REFERENCE = "reference"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Retention:
    """
    The clock of a table: rows of *data_type* are counted from the column *anchor*.

    *only* restricts it to rows in which the named columns have the named values. *period* (ISO
    8601) and *mode* are the policy of a data type for which there is no setting.
    """

    data_type: str
    anchor: str
    only: Mapping[str, Any] | None = None
    period: str | None = None
    mode: EraseMode = EraseMode.ANONYMIZE


@dataclass(frozen=True, slots=True)
class Disclosure:
    """
    What a person is told beyond purpose and source; empty means that there are none.

    Attributes:
        recipients: Who else is given the data (GDPR art. 15(1)(c)).
        transfers: To which third countries, with what safeguard (art. 15(2)).
        automated_decisions: Which, by what logic, with what consequence (art. 15(1)(h)).
    """

    recipients: tuple[str, ...] = ()
    transfers: str = ""
    automated_decisions: str = ""


@dataclass(frozen=True, slots=True)
class TableRule:
    """What a table declares of itself."""

    role: TableRole
    purpose: str
    basis: str = ""
    source: str = ""
    owned_by: tuple[str, ...] = ()
    retention: Retention | None = None
    statute: str | None = None
    always_delete: bool = False
    carried_over: bool = False
    disclosure: Disclosure = Disclosure()


def personal(
    category: str,
    on_erase: OnErase = OnErase.NULL,
    *,
    exported: bool = True,
    statutory: bool = False,
    constant: Any = None,
    identity: Identity | None = None,
    third_party: bool = False,
) -> dict[str, Any]:
    """Declare a personal column; see `Personal`."""
    rule = Personal(category, on_erase, exported, statutory, constant, identity, third_party)
    return {KEY: rule}


def not_personal(reason: str) -> dict[str, Any]:
    """Declare a column that says nothing of a person, and why."""
    return {KEY: NotPersonal(reason)}


def subject_table(
    *,
    purpose: str,
    basis: str,
    source: str,
    retention: Retention,
    disclosure: Disclosure = Disclosure(),
) -> dict[str, Any]:
    """Declare the table whose rows are the people."""
    return {
        KEY: TableRule(
            TableRole.SUBJECT,
            purpose,
            basis,
            source,
            retention=retention,
            disclosure=disclosure,
        )
    }


def owned_table(  # noqa: PLR0913 - each is a fact of its own about the table
    *,
    by: str | tuple[str, ...],
    purpose: str,
    basis: str,
    source: str,
    retention: Retention | None = None,
    statute: str | None = None,
    always_delete: bool = False,
    carried_over: bool = False,
    disclosure: Disclosure = Disclosure(),
) -> dict[str, Any]:
    """
    Declare a table whose rows belong to one person each.

    Args:
        by: The foreign-key columns that lead to the person, at once or through their parent. The
            first that is not NULL decides whose a row is. The first of a table must lead to the
            person without a circle; the others may lead to the same table or in circles.
        retention: The table's own clock; without one its rows follow their parent's.
        statute: The ground on which a law keeps these rows after an erasure, until retention
            ends. A child of such a table is kept with its parent.
        always_delete: Nothing of a row is worth keeping without the person, so anonymising
            deletes it.
        carried_over: Rows outlive a restore: the live ones replace the backup's.
    """
    return {
        KEY: TableRule(
            TableRole.OWNED,
            purpose,
            basis,
            source,
            (by,) if isinstance(by, str) else by,
            retention,
            statute,
            always_delete,
            carried_over,
            disclosure,
        )
    }


def shared_table(
    *, purpose: str, basis: str, source: str, disclosure: Disclosure = Disclosure()
) -> dict[str, Any]:
    """
    Declare a table whose rows several people may refer to, as a household's address.

    A row goes when nobody refers to it any more.
    """
    return {KEY: TableRule(TableRole.SHARED, purpose, basis, source, disclosure=disclosure)}


def reference_table(purpose: str) -> dict[str, Any]:
    """Declare a table that is context only and holds nothing personal, as a price list."""
    return {KEY: TableRule(TableRole.REFERENCE, purpose)}


def control_table(purpose: str, *, carried_over: bool = True) -> dict[str, Any]:
    """Declare a table of the service's own records, which no person owns."""
    return {KEY: TableRule(TableRole.CONTROL, purpose, carried_over=carried_over)}
