"""The rights of GDPR art. 15(1)(e) and (f), as they stand for one person's data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Told = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Right:
    """A right, and the letters of GDPR art. 6(1) that data must rest on for it; empty for any."""

    name: str
    article: str
    how: str
    letters: str = ""


_RIGHTS: Final = (
    _Right(
        "access",
        "GDPR art. 15",
        "This document is the answer. Signed in, you get a new one at any time; or write to "
        "{contact}.",
    ),
    _Right(
        "rectification",
        "GDPR art. 16",
        "Write to {contact} what is wrong and what is right.",
    ),
    _Right(
        "erasure",
        "GDPR art. 17",
        "Write to {contact}. What a law or a legal hold keeps stays until that ends, and is used "
        "for nothing else.",
    ),
    _Right(
        "restriction",
        "GDPR art. 18",
        "Write to {contact} when the data is disputed, is used unlawfully, or is needed by you "
        "alone: it is then kept and not used.",
    ),
    _Right(
        "portability",
        "GDPR art. 20",
        "Take export.json or the tables, which programs can read, wherever you like.",
        "ab",
    ),
    _Right(
        "objection",
        "GDPR art. 21",
        "Write to {contact} and say what in your situation speaks against the use; against "
        "advertising no reason is needed.",
        "ef",
    ),
    _Right(
        "withdrawal of consent",
        "GDPR art. 7(3)",
        "Your consent stands for: {consented}. Signed in, withdraw it as you gave it; or write to "
        "{contact}. What was done until then stays lawful.",
        "a",
    ),
    _Right(
        "complaint",
        "GDPR art. 77",
        "Write to a data protection authority: where you live, where you work, or where you think "
        "that the rules were broken.",
    ),
)


def rights(tables: Mapping[str, Told], contact: str, consented: Sequence[str]) -> list[Told]:
    """
    Return each right with its article, how to use it, and the tables that it reaches.

    Args:
        tables: What the notice says of each table that holds something of the person.
        consented: The purposes for which their consent stands.
    """
    words = {"contact": contact, "consented": ", ".join(consented) or "nothing"}
    return [
        {
            "right": right.name,
            "article": right.article,
            "how": right.how.format_map(words),
            "tables": [name for name, told in tables.items() if _reaches(right, told)],
        }
        for right in _RIGHTS
    ]


def _reaches(right: _Right, told: Told) -> bool:
    if right.name == "erasure" and (told["kept_by_law_until"] or told["on_hold"]):
        return False
    return not right.letters or any(
        f"6(1)({letter})" in told["lawful_basis"] for letter in right.letters
    )
