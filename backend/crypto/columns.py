"""
Encrypted columns: what they hold, and where it belongs.

A column's values are bound to its table and column: one moved elsewhere does not open.
`RowEncrypted` binds them to their row, too, where its key is known before it is inserted.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn, cast

from sqlalchemy import (
    Column,
    ColumnElement,
    Dialect,
    Table,
    Text,
    Uuid,
    event,
    func,
    type_coerce,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeDecorator

from backend.crypto import keyring
from backend.crypto.codecs import CODECS
from backend.crypto.rows import RowValue, row_key
from backend.crypto.values import TEXT_PREFIX, Cipher, Scope, column_scope

# Columns that are being encrypted, by table and name: see `allow_plaintext`.
_in_plain: set[tuple[str, str]] = set()


def allow_plaintext(places: Iterable[tuple[str, str]]) -> None:
    """
    Let this process read plain values in *places*, table and column, and nowhere else.

    Only while such a column is being encrypted: otherwise plain text where a token belongs is an
    attack or a fault, and is refused.
    """
    _in_plain.clear()
    _in_plain.update(places)


class Encrypted(TypeDecorator[Any]):
    """
    A column stored as `enc1.` tokens and read as *codec*, one of `CODECS`.

    `None` stays NULL and the empty string encrypts. Comparing raises: each sealing of a value
    differs, so a comparison would silently match nothing.
    """

    impl = Text
    cache_ok = True
    row_bound: ClassVar = False

    def __init__(self, codec: str = "str", table: str = "", column: str = "") -> None:
        super().__init__()
        self.codec = codec
        self.table = table
        self.column = column

    @property
    def python_type(self) -> type[Any]:
        return CODECS[self.codec].kind

    @property
    def scope(self) -> Scope:
        """Where the values belong, for whoever seals them anew."""
        return column_scope(self.table, self.column)

    def _is_plain(self, value: str) -> bool:
        declared = (self.table, self.column) in _in_plain
        return declared and not value.startswith(TEXT_PREFIX)

    def place(self, table: str, column: str) -> "Encrypted":
        """Return this type for the column that it stands in."""
        return type(self)(self.codec, table, column)

    class Comparator(TypeDecorator.Comparator[Any]):
        def operate(self, op: Any, *other: Any, **kwargs: Any) -> Any:
            match other:
                case [None] if op in (operators.is_, operators.is_not):
                    return super().operate(op, *other, **kwargs)
                # SQLAlchemy looks the column up in dictionaries of its own, which ask for `==`.
                case [ColumnElement() as same] if op is operators.eq and hash(same) == hash(
                    self.expr
                ):
                    return super().operate(op, *other, **kwargs)
            return self._refuse()

        def reverse_operate(self, op: Any, other: Any, **kwargs: Any) -> Any:  # noqa: ARG002 - its signature
            return self._refuse()

        def _refuse(self) -> NoReturn:
            raise InvalidRequestError(
                f"{self.expr} is encrypted and cannot be compared: look it up by its blind index"
            )

    comparator_factory = Comparator

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        encode, scope = CODECS[self.codec].encode, self.scope

        def seal(value: Any) -> str | None:
            if value is None:
                return None
            return keyring.current().cipher(scope).seal_text(encode(value))

        return seal

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        decode, scope = CODECS[self.codec].decode, self.scope
        # Looked up once per statement, not once per cell.
        known: list[tuple[keyring.Keyring, Cipher]] = []

        def unseal(value: Any) -> Any:
            if value is None:
                return None
            keys = keyring.current()
            if not known or known[0][0] is not keys:
                known[:] = [(keys, keys.cipher(scope))]
            if _in_plain and self._is_plain(value):
                return decode(value.encode())
            return decode(known[0][1].open_text(value))

        return unseal

    def literal_processor(self, dialect: Dialect) -> NoReturn:  # noqa: ARG002 - its signature
        # Here and not at the value: SQLAlchemy would show that in its own error.
        raise InvalidRequestError("an encrypted value cannot be written into SQL text")


@event.listens_for(Column, "before_parent_attach")
def _bind_to_place(column: Column[Any], parent: Any) -> None:
    """Tell an encrypted column's type where it stands, as soon as that is known."""
    if isinstance(column.type, Encrypted) and isinstance(parent, Table):
        column.type = column.type.place(parent.name, column.name)


class RowEncrypted(Encrypted):
    """
    An encrypted column whose values open in their own row only.

    For tables whose single primary key is made before the insert. Values are set through the ORM
    or as parameters of an insert; a statement that does not tell the row is refused.
    """

    cache_ok = True
    row_bound: ClassVar = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        encode, scope = CODECS[self.codec].encode, self.scope

        def seal(value: Any) -> str | None:
            match value:
                case None:
                    return None
                case RowValue():
                    cipher = keyring.current().cipher(scope)
                    return cipher.seal_text(encode(value.value), value.row)
                case _:
                    raise InvalidRequestError(
                        f"{self.table}.{self.column} is bound to its row: set it through the ORM "
                        "or as a parameter of an insert, with the row's key"
                    )

        return seal

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        # The row's key comes along with the token, whatever else the statement selects.
        key = row_key(cast("Column[Any]", column).table)
        label: ColumnElement[str] = sql_cast(key, Text)
        if isinstance(key.type, Uuid):
            label = func.replace(label, "-", "")
        return type_coerce(label + " " + type_coerce(column, Text), self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        decode, scope = CODECS[self.codec].decode, self.scope

        def unseal(value: Any) -> Any:
            if value is None:
                return None
            row, _, token = value.partition(" ")
            if _in_plain and self._is_plain(token):
                return decode(token.encode())
            return decode(keyring.current().cipher(scope).open_text(token, row.encode()))

        return unseal
