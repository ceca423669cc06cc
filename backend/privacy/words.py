"""
Words to be looked for: one spelling each, and the fastest way found to look for all at once.

Case, Unicode form, white space, the escapes of JSON and the punctuation of phone numbers do not
hide a value.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

# Shorter texts stand anywhere by chance; so do seven digits, but rarely.
_CHARS_MIN: Final = 5
_DIGITS_MIN: Final = 7
# Shorter ones count only where no letter or digit touches them: "anders" is not in "andersson".
_ALONE_BELOW: Final = 8
# A number without its country's code and trunk prefix, which each spelling writes differently.
_PHONE_DIGITS: Final = 8
_PHONE_JOINT: Final = r"\W{0,3}"
_PHONE: Final = "user.contact.phone_number"
# Up to here it is faster to look for each by itself: 60 words at three times the speed.
_FEW_WORDS: Final = 200
# Below this depth a pattern's branches share nothing worth sharing.
_TREE_DEPTH: Final = 4

_ESCAPES: Final = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')


@dataclass(frozen=True, slots=True)
class OldValue:
    """A text that the person's data held, and the category of its column."""

    text: str = field(repr=False)
    category: str


def normalise(text: str) -> str:
    """Give *text*, which may be many joined by NUL, the one spelling in which it is searched."""
    if "\\" in text:
        # As JSON in a column of text spells it; what was no JSON is searched as it is, too.
        text = f"{text}\0{_ESCAPES.sub(_unescaped, text)}"
    return _folded(text)


def _unescaped(match: re.Match[str]) -> str:
    return str(json.loads(f'"{match[0]}"'))


def _folded(text: str) -> str:
    if text.isascii():
        text = text.lower()
    else:
        # Unicode 15.0, D146: folding may undo a normal form, so it is restored.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if "  " in text or "\n" in text or "\t" in text or "\r" in text:
        text = " ".join(text.split())
    return text


class _Finder:
    """Says whether a text holds one of some words or numbers, both as `_folded` gives them."""

    def __init__(self, words: Sequence[str], phones: Sequence[str]) -> None:
        short = [word for word in words if len(word) < _ALONE_BELOW]
        long = [word for word in words if len(word) >= _ALONE_BELOW]
        few = len(long) <= _FEW_WORDS
        self._long = long if few else []
        self._many = None if few else re.compile(_tree(long))
        self._short = short
        self._alone = re.compile(rf"(?<![^\W_])(?:{_tree(short)})(?![^\W_])") if short else None
        # At most three signs stand between two digits: "(0)30 / 12-34".
        self._phones = (
            re.compile(rf"(?:{_tree(phones, joint=_PHONE_JOINT)})(?!\d)") if phones else None
        )

    def is_in(self, text: str) -> bool:
        holds = text.__contains__
        if any(map(holds, self._long)):
            return True
        if self._many is not None and self._many.search(text):
            return True
        if self._phones is not None and self._phones.search(text):
            return True
        # The pattern tries every place, which is slower than to look for each word.
        return (
            self._alone is not None
            and any(map(holds, self._short))
            and bool(self._alone.search(text))
        )


class Words:
    """
    A person's old values, to be looked for.

    Attributes:
        skipped: How many values are too short to look for.
    """

    def __init__(self, values: Iterable[OldValue]) -> None:
        self.skipped = 0
        self._categories: dict[str, set[str]] = {}
        self._phones: dict[str, set[str]] = {}
        self._every: set[str] = set()
        self._by_category: dict[str | None, tuple[_Finder, _Finder]] = {}
        self._by_kin: dict[frozenset[str], tuple[_Finder, _Finder]] = {}
        for value in values:
            self._add(_folded(value.text).strip(), value.category)

    def _add(self, text: str, category: str) -> None:
        self._every.add(category)
        digits = "".join(filter(str.isdecimal, text))
        is_phone = is_below(category, _PHONE) and len(digits) >= _DIGITS_MIN
        if is_phone:
            self._phones.setdefault(digits[-_PHONE_DIGITS:], set()).add(category)
        if len(text) >= (_DIGITS_MIN if text.isdecimal() else _CHARS_MIN):
            self._categories.setdefault(text, set()).add(category)
        elif text:
            self.skipped += 1

    def finders(self, category: str | None) -> tuple[_Finder, _Finder]:
        """
        Return what is a finding in a column of *category*, and what is somebody's own there.

        A value is somebody's own in a column of its category, or of one above or below that.

        Args:
            category: None for a column that is not personal or not in the map.
        """
        if category not in self._by_category:
            kin = {one for one in self._every if category is not None and _is_kin(one, category)}
            self._by_category[category] = self._both(frozenset(kin))
        return self._by_category[category]

    def _both(self, kin: frozenset[str]) -> tuple[_Finder, _Finder]:
        # Most columns have no kin among the values, and share one pattern.
        if kin not in self._by_kin:
            self._by_kin[kin] = (self._finder(kin, own=False), self._finder(kin, own=True))
        return self._by_kin[kin]

    def _finder(self, kin: frozenset[str], *, own: bool) -> _Finder:
        words, phones = (
            sorted(one for one, of in known.items() if kin.isdisjoint(of) is not own)
            for known in (self._categories, self._phones)
        )
        return _Finder(words, phones)


def _tree(words: Sequence[str], depth: int = 0, joint: str = "") -> str:
    """
    Spell sorted *words* as one pattern that shares their beginnings.

    One branch for each word costs as many comparisons at each place: 500 words took seven times
    as long.

    Args:
        joint: Pattern of what may stand between two characters.
    """
    if len(words) <= 1 or depth == _TREE_DEPTH:
        return "|".join(joint.join(map(re.escape, word)) for word in words)
    return "|".join(
        f"{re.escape(first)}{joint}(?:{_tree([word[1:] for word in group], depth + 1, joint)})"
        for first, group in groupby(words, key=lambda word: word[:1])
    )


def _is_kin(one: str, other: str) -> bool:
    return is_below(one, other) or is_below(other, one)


def is_below(category: str, *branches: str) -> bool:
    """Say whether *category* is one of *branches* or lies below one: names end at dots."""
    return any(category == one or category.startswith(f"{one}.") for one in branches)
