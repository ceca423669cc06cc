"""The page in an export: the data and the notice as a person reads and prints them."""

import base64
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy.orm import Session

from backend.privacy.data_map import DataMap
from backend.privacy.export_csv import plain
from backend.privacy.export_request import ExportRequest
from backend.privacy.notice import notice
from backend.privacy.reading import Reader

_TEMPLATES: Final = Path(__file__).parent.parent / "web" / "templates"
# A template yields a piece for every gap in it.
_PIECES_PER_CHUNK: Final = 1_000
# Signs that a browser does not show are shown as what they are.
_CONTROL: Final = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"}


def page(
    session: Session, data_map: DataMap, request: ExportRequest, reader: Reader
) -> Iterator[bytes]:
    """Render the page; rows are read while it is written."""
    # Late: few processes write a page, and all would pay for it at their start.
    from jinja2 import Environment, FileSystemLoader, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"told": _told, "named": _named, "kind": _kind, "until": _until}
    style = (_TEMPLATES / "export.css").read_text("utf-8")
    stream = environment.get_template("export.html").stream(
        request=request,
        notice=notice(
            session, data_map, request.subjects, request.terms, counts=reader.counts,
            consented=request.consented, now=request.generated_at,
        ),
        # The person's own row first, and nothing of what holds nothing.
        tables=sorted(
            (mapped for mapped in reader.tables if reader.counts[mapped.name]),
            key=lambda mapped: mapped is not data_map.subject,
        ),
        rows=reader.rows,
        style=Markup(style),  # noqa: S704 - a file of ours
        style_hash=_hash_of(style),
    )  # fmt: skip
    stream.enable_buffering(_PIECES_PER_CHUNK)
    for text in stream:
        yield text.encode()


def _hash_of(style: str) -> str:
    """Name the only style that the page may have, as its policy wants it (CSP 3, 2.3.1)."""
    digest = hashlib.sha256(style.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _told(value: Any) -> str:
    """Spell one value for a reader."""
    match value:
        case bool():
            return "yes" if value else "no"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        case _:
            return plain(value).translate(_CONTROL)


def _named(field: str) -> str:
    """Name a column for a reader: money is stored in the currency's smallest unit."""
    return field.removesuffix("_minor").replace("_", " ") + (
        " (in the smallest unit, as cents)" if field.endswith("_minor") else ""
    )


def _kind(category: str) -> str:
    """Name a category of Fides' vocabulary for a reader, as `contact, address, city`."""
    return category.removeprefix("user.").replace(".", ", ").replace("_", " ")


def _until(about: dict[str, Any]) -> str:
    """Say when the last row of a table goes."""
    if about["on_hold"]:
        return "Until a legal hold on it ends"
    if about["last_due_on"] is None:
        return "No day is fixed"
    return f"The last of it until {about['last_due_on']}"
