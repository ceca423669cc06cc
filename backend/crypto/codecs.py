"""How the values of an encrypted column become bytes, and come back."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any, Final

from backend.errors import RefusedError


class UnencodableError(RefusedError):
    """The value is not what the column holds, or no text; it is not shown."""

    code = "unencodable"


@dataclass(frozen=True, slots=True)
class Codec:
    """What a column's values are in Python, and how they are written."""

    kind: type[Any]
    write: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    # A flag is an int to `isinstance`, and no number to us; JSON takes many kinds.
    any_kind: bool = False

    def encode(self, value: Any) -> bytes:
        """
        Write *value* as bytes.

        Raises:
            UnencodableError: It is of another kind, or text with a lone surrogate.
        """
        if not self.any_kind and type(value) is not self.kind:
            raise UnencodableError(
                f"the column holds {self.kind.__name__}, not {type(value).__name__}"
            )
        try:
            return self.write(value)
        except (ValueError, TypeError, RecursionError):
            # `from None`: the codec's own error holds the value.
            raise UnencodableError("the value cannot be written as bytes") from None


def _write_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def encode_text(text: object) -> bytes:
    """
    Write *text* as UTF-8.

    Raises:
        UnencodableError: It is no text, or holds half a surrogate pair; it is not shown.
    """
    return CODECS["str"].encode(text)


CODECS: Final[dict[str, Codec]] = {
    "str": Codec(str, str.encode, bytes.decode),
    "bytes": Codec(bytes, bytes, bytes),
    "date": Codec(
        date, lambda day: day.isoformat().encode(), lambda raw: date.fromisoformat(raw.decode())
    ),
    # As text, so that the number of decimal places comes back.
    "decimal": Codec(
        Decimal, lambda number: str(number).encode(), lambda raw: Decimal(raw.decode())
    ),
    "json": Codec(object, _write_json, json.loads, any_kind=True),
}
