"""The records of processing as one page that a person reads and prints."""

import base64
import hashlib
from datetime import UTC
from pathlib import Path
from typing import Final

from backend.privacy.processing import Records

_TEMPLATES: Final = Path(__file__).parent.parent / "web" / "templates"


def page(found: Records) -> str:
    """Render *found* for a reader: one HTML document with no script, which loads nothing."""
    # Late: few processes write a page, and all would pay for it at their start.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["told"] = lambda at: f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return environment.get_template("processing.html").render(
        records=found,
        style=Markup(_style()),  # noqa: S704 - a file of ours
        policy=page_policy(),
    )


def page_policy() -> str:
    """Return the policy under which the page has its own style and nothing else (CSP 3, 2.3.1)."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _style() -> str:
    return (_TEMPLATES / "processing.css").read_text("utf-8")
