"""Commands that fill a database with bookings and guests, and that show what is promised of it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from backend.cli import FAILED
from backend.cli.showing import AsJson, out, print_json, progress, show
from backend.db_utils import dispose_engine, session_scope
from backend.logs import configure_logs
from backend.services.audit_service import COMMAND_LINE
from backend.services.demo_service import Chapter, get_demo_service
from backend.services.encryption_service import get_encryption_service
from backend.services.sample_service import get_sample_service
from backend.services.setup_service import get_setup_service
from backend.settings import get_settings

app = typer.Typer()

Bookings = Annotated[
    Path | None, typer.Option(help="A CSV file of the hotel booking demand data set.")
]


@app.command()
def load(
    *,
    bookings: Bookings = None,
    guests: Annotated[int | None, typer.Option(min=1, help="Spread over so many guests.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Without a file: so many bookings.")] = 2_000,
    as_json: AsJson = False,
) -> None:
    """Fill the built-in model with bookings and generated guests."""
    get_setup_service().open()
    with progress("bookings") as report, session_scope() as session:
        loaded = get_sample_service().load(
            session, COMMAND_LINE, bookings=bookings, guests=guests, count=count, progress=report
        )
    show(asdict(loaded), as_json=as_json)


@app.command()
def demo(*, bookings: Bookings = None, as_json: AsJson = False) -> None:
    """Do the main job, whole, on a database of its own that is removed afterwards."""
    with _own_installation():
        get_setup_service().prepare()
        chapters = []
        with progress("bookings") as report:
            for chapter in get_demo_service().tell(bookings, report):
                chapters.append(chapter)
                if not as_json:
                    _tell(len(chapters), chapter)
    kept = all(chapter.ok for chapter in chapters)
    if as_json:
        print_json({"ok": kept, "chapters": [asdict(chapter) for chapter in chapters]})
    else:
        out.print("\nEvery promise was kept." if kept else "\nA PROMISE WAS BROKEN: see above.")
    if not kept:
        raise typer.Exit(FAILED)


@contextmanager
def _own_installation() -> Iterator[None]:
    """Work in a folder of its own, with a key of its own, whatever the environment says."""
    with tempfile.TemporaryDirectory(prefix="holdfast-demo-") as folder:
        os.environ |= {
            "DATA_DIR": folder,
            "DATABASE_URL": f"sqlite:///{folder}/holdfast.db",
            "BACKUP_URL": f"{folder}/backups",
            "APP_ENV": "development",
            "LOG_LEVEL": "ERROR",
            "ENCRYPTION_KEY": get_encryption_service().generate_key(),
            "CONSENT_PURPOSES": "marketing,analytics",
            # It lets the older half of its bookings go, however old that is.
            "RETENTION_STATUTORY_DAYS": "0",
        }
        get_settings.cache_clear()
        configure_logs(get_settings())
        try:
            yield
        finally:
            dispose_engine()


def _tell(number: int, chapter: Chapter) -> None:
    mark = "[green]✓[/green]" if chapter.ok else "[red]✗[/red]"
    out.print(f"\n{mark} [bold]{number}. {chapter.title}[/bold]  ({chapter.seconds} s)")
    print(f"  {chapter.text}")
    width = max((len(name) for name in chapter.facts), default=0)
    for name, value in chapter.facts.items():
        print(f"    {name:<{width}}  {value}")
