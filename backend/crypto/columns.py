"""
Encrypted columns and the blind indexes by which they are searched.

A column's values are bound to its table and column: one moved elsewhere does not open.
"""

import base64
import hashlib
import hmac
import unicodedata
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from typing import Any, Final, NoReturn

from sqlalchemy import Column, ColumnElement, Dialect, Table, Text, event
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.sql import operators
from sqlalchemy.types import TypeDecorator

from backend.crypto import keyring
from backend.crypto.values import column_scope

_ENCODE: Final[dict[str, Callable[[Any], bytes]]] = {
    "str": lambda text: text.encode(),
    "date": lambda day: day.isoformat().encode(),
}
_DECODE: Final[dict[str, Callable[[bytes], Any]]] = {
    "str": bytes.decode,
    "date": lambda raw: date.fromisoformat(raw.decode()),
}
# 128 bits: among 2**32 people the chance of one false match stays below 2**-64.
_INDEX_BYTES: Final = 16


class Encrypted(TypeDecorator[Any]):
    """
    A column stored as `enc1.` tokens and read as *codec* (`str` or `date`).

    `None` stays NULL and the empty string encrypts. Comparing raises: each sealing of a value
    differs, so a comparison would silently match nothing.
    """

    impl = Text
    cache_ok = True

    def __init__(self, codec: str = "str", table: str = "", column: str = "") -> None:
        super().__init__()
        self.codec = codec
        self.table = table
        self.column = column

    @property
    def python_type(self) -> type[Any]:
        return date if self.codec == "date" else str

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
        encode, scope = _ENCODE[self.codec], column_scope(self.table, self.column)

        def seal(value: Any) -> str | None:
            if value is None:
                return None
            return keyring.current().cipher(scope).seal_text(encode(value))

        return seal

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        decode, scope = _DECODE[self.codec], column_scope(self.table, self.column)

        def unseal(value: Any) -> Any:
            if value is None:
                return None
            return decode(keyring.current().cipher(scope).open_text(value))

        return unseal

    def literal_processor(self, dialect: Dialect) -> NoReturn:  # noqa: ARG002 - its signature
        # Here and not at the value: SQLAlchemy would show that in its own error.
        raise InvalidRequestError("an encrypted value cannot be written into SQL text")


@event.listens_for(Column, "before_parent_attach")
def _bind_to_place(column: Column[Any], parent: Any) -> None:
    """Tell an encrypted column's type where it stands, as soon as that is known."""
    if isinstance(column.type, Encrypted) and isinstance(parent, Table):
        column.type = Encrypted(column.type.codec, parent.name, column.name)


def normalise_email(address: str) -> str:
    """One spelling per mailbox: case and Unicode form do not make another person."""
    return unicodedata.normalize("NFKC", address.strip()).casefold()


class BlindIndex:
    """
    Equality search over one encrypted column: HMAC-SHA256 under a key of its own.

    Stored as `bi1.` and base64url of key id (4 bytes) and digest (16 bytes). It shows which rows
    are equal, by design, and nothing to whoever lacks the key.
    """

    def __init__(self, table: str, column: str, normalise: Callable[[str], str]) -> None:
        self._names = (table, column)
        self._normalise = normalise

    def term(self, value: str) -> str:
        """The term to store, under the primary key."""
        return self._term(keyring.current().primary, value)

    def terms(self, value: str) -> list[str]:
        """The terms to look for: one per configured key, so that a rotation hides nobody."""
        return [self._term(key, value) for key in keyring.current().keys]

    def _term(self, key: keyring.RootKey, value: str) -> str:
        digest = hmac.new(
            _index_key(key, *self._names), self._normalise(value).encode(), hashlib.sha256
        ).digest()
        raw = key.key_id + digest[:_INDEX_BYTES]
        return "bi1." + base64.urlsafe_b64encode(raw).decode().rstrip("=")


@lru_cache(maxsize=64)
def _index_key(key: keyring.RootKey, table: str, column: str) -> bytes:
    return key.derive("blind index", table, column)
