"""SECURITY.md names tests for what it promises: they are there."""

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
TEXT: Final = (ROOT / "SECURITY.md").read_text()


def threats() -> list[str]:
    section = TEXT.split("## Threats")[1].split("\n## ")[0]
    return re.findall(r"^\| [STRIDE] \|.*$", section, re.MULTILINE)


def test_it_names_fifteen_threats_of_every_kind_and_a_test_for_each() -> None:
    found = threats()
    assert len(found) == 15
    assert {row[2] for row in found} == set("STRIDE")
    for row in found:
        named = re.findall(r"`(tests/[\w/]+\.py)`", row.split("|")[4])
        assert named, row
        assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:tests|backend|benchmarks)/[\w/]+\.\w+)`", TEXT))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
