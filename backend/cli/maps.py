"""Commands for the data map."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from backend.cli import FAILED
from backend.cli.showing import AsJson, out, print_json, print_table, refuse_existing, write_new
from backend.db_utils import session_scope
from backend.errors import RefusedError
from backend.models import DATA_MAP
from backend.privacy.declarations import OnErase
from backend.privacy.export_schema import schema
from backend.privacy.processing import Protection, Records
from backend.privacy.processing_page import page
from backend.services.map_service import ColumnFacts, TableFacts, get_map_service
from backend.services.setup_service import get_setup_service

app = typer.Typer(
    help="The data map: shown, checked, as records of processing.", no_args_is_help=True
)


@app.command()
def show(*, as_json: AsJson = False) -> None:
    """Show every table, how it leads to the person, and every column; needs no database."""
    facts = get_map_service().describe()
    if as_json:
        print_json(facts)
        return
    for position, table in enumerate(facts.tables):
        if position:
            print()
        for line in _about(table):
            print(line)
        # Piped, each line names its table: it may be read alone.
        prefix = "" if out.is_terminal else f"{table.name}."
        rows = [(prefix + column.name, *_cells(column)) for column in table.columns]
        print_table(("column", "category", "on erase", "notes"), rows)


@app.command()
def check(*, as_json: AsJson = False) -> None:
    """Compare the database with the map; exit code 1 where they differ."""
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        checked = get_map_service().check(session)
    if as_json:
        print_json(checked)
    else:
        for name in checked.left_out:
            print(f"left out by DATA_MAP_IGNORE: {name}")
        for one in checked.drift:
            print(f"{one.where}: {one.what}")
        if not checked.drift:
            print("no drift")
    if checked.drift:
        raise typer.Exit(FAILED)


@app.command("schema")
def show_schema() -> None:
    """Print the JSON Schema that every JSON export follows; needs no database."""
    print_json(schema(DATA_MAP))


@app.command("records")
def show_records(
    *,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the page to this new file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the records of processing (GDPR art. 30), or write them as a page."""
    if output is not None:
        if as_json:
            raise RefusedError("give either --json or -o FILE, which is a page")
        refuse_existing(output)
    get_setup_service().open()
    with session_scope(read_only=True) as session:
        found = get_map_service().records(session)
    if as_json:
        print_json(found)
    elif output is not None:
        write_new(output, iter([page(found).encode()]))
        print(f"written to {output}")
    else:
        for line in _told(found):
            print(line)


def _about(table: TableFacts) -> Iterator[str]:
    yield f"{table.name} ({table.role}): {table.purpose}"
    for position, way in enumerate(table.ways):
        name = "to the person" if position == 0 else "or, where that is NULL"
        yield f"  {name}: {' > '.join(way.steps)}{' (in a circle)' if way.in_circle else ''}"
    for column in table.referred_by:
        yield f"  referred to by: {column}"
    if table.lawful_basis:
        yield f"  lawful basis: {table.lawful_basis}"
    if table.data_type:
        counted = f"{table.clock}.{table.anchor}"
        yield f"  retention: policy {table.data_type}, counted from {counted}"
    if table.kept_by_law:
        yield f"  kept by law: {table.kept_by_law}"
    if table.carried_over:
        yield "  outlives a restore"


def _cells(column: ColumnFacts) -> tuple[str, str, str]:
    rule = column.personal
    category, on_erase = ("not personal", "") if rule is None else (rule.category, rule.on_erase)
    notes = [column.not_personal_because]
    if rule is not None:
        notes += [
            "about a third party" if rule.third_party else "",
            "kept by law" if rule.statutory else "",
            "" if rule.exported else "not exported",
            f"finds by {rule.identity}" if rule.identity else "",
            f"becomes {rule.constant!r}" if rule.on_erase is OnErase.CONSTANT else "",
        ]
    if column.protection is not Protection.NOT_ENCRYPTED:
        notes.append(column.protection.words)
    return category, on_erase, ", ".join(note for note in notes if note)


def _told(found: Records) -> Iterator[str]:
    yield f"controller: {found.controller.name}, {found.controller.contact}"
    for one in found.activities:
        yield ""
        yield one.purpose
        parts = (
            ("people", [subjects.who for subjects in one.data_subjects]),
            ("data", [category.words for category in one.data_categories]),
            ("recipients", one.recipients),
            ("transfers", one.transfers),
            ("lawful basis", one.lawful_bases),
            ("source", one.sources),
            ("kept", [f"{limit.table}: {limit.words}" for limit in one.time_limits]),
            ("protected", [one.protection_words]),
        )
        for name, texts in parts:
            yield f"  {name}: {'; '.join(texts) or 'none declared'}"
    yield ""
    for measure in found.measures:
        yield f"{measure.name}: {measure.words}"
