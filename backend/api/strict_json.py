"""JSON that every reader takes to mean the same, read without going down into what is nested."""

import json
import math
import re
from typing import Any, Final

from backend.api.problems import invalid

# An export has 6 levels; what is in its columns may have some more.
MAX_DEPTH: Final = 32

# One without an end goes to the end: looking for others in it would take the square of its size.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKETS: Final = bytes.maketrans(b"[]{}", b"()()")
_ALL_BUT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_TOO_DEEP: Final = b"(" * (MAX_DEPTH + 1)
_HALF_PAIR: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes) -> Any:
    """
    Read *content* as JSON in UTF-8 (RFC 8259), with the limits of I-JSON on names and numbers.

    Source: RFC 7493, 2.

    Raises:
        InvalidRequestError: It is no JSON in UTF-8; it is nested deeper than `MAX_DEPTH`; a name
            comes twice in an object; a number is none, too large or too long; half a surrogate
            pair stands for a character.
    """
    _check_depth(content)
    try:
        value = _DECODER.decode(content.decode())
        if _HALF_PAIR.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("body", "holds half a surrogate pair") from None
    except UnicodeDecodeError:
        raise invalid("body", "not UTF-8 text") from None
    except json.JSONDecodeError as err:
        raise invalid("body", f"not JSON from character {err.pos} on") from None
    except ValueError:
        # Python's own limit of 4300 digits.
        raise invalid("body", "a number has too many digits") from None
    return value


def _check_depth(content: bytes) -> None:
    """Refuse deep nesting before the parser goes down into it, and without going down here."""
    if content.count(b"[") + content.count(b"{") <= MAX_DEPTH:
        return
    left = _STRING.sub(b"", content).translate(_BRACKETS, _ALL_BUT_BRACKETS)
    for _ in range(MAX_DEPTH):
        if _TOO_DEEP in left:
            break
        # Takes the innermost brackets, and so one level of each nest.
        left = left.replace(b"()", b"")
    if left:
        raise invalid("body", f"not JSON, or nested deeper than {MAX_DEPTH} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Which one counts differs from reader to reader, so a proxy may have checked the other.
        raise invalid("body", "the same name comes twice")
    return found


def _no_number(_name: str) -> float:
    raise invalid("body", "NaN and Infinity are no numbers")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise invalid("body", "a number is too large")
    return number


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
)
