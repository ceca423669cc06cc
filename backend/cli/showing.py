"""How commands ask for things and show them: passwords, new files, progress, tables, JSON."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, TypeVar

import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from backend.errors import RefusedError

Result = TypeVar("Result")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]

_BAR_COLUMNS: Final = 50
# Piped, a table is as wide as it needs: programs read lines, not columns of 80.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def ask_password(from_stdin: bool) -> str:
    """Ask twice, without showing what is typed, or read a line that is piped in."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\n")
    if not sys.stdin.isatty():
        raise RefusedError("stdin is no terminal: give the password with --password-stdin")
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))


def ask_passphrase(*, confirm: bool = False) -> str:
    """Read a line that is piped in; on a terminal ask, without showing what is typed."""
    if sys.stdin.isatty():
        return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm))
    return sys.stdin.readline().rstrip("\n")


def ask_address() -> str:
    """Read a line that is piped in; on a terminal ask, beside what programs read."""
    if sys.stdin.isatty():
        address = str(typer.prompt("E-mail address or telephone", err=True))
    else:
        address = sys.stdin.readline()
    if not address.strip():
        raise RefusedError("an e-mail address or a telephone is read from stdin: nothing came")
    return address.strip()


def write_new(path: Path, chunks: Iterator[bytes]) -> None:
    """Write a new 0600 file, under its name only when it is whole."""

    def write(file: BinaryIO) -> None:
        file.writelines(chunks)

    write_new_with(path, write)


def write_new_with(path: Path, write: Callable[[BinaryIO], Result]) -> Result:
    """Have *write* write a new 0600 file, under its name only when it is whole."""
    refuse_existing(path)
    # A name that nobody can have put there before, and 0600.
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            result = write(file)
            file.flush()
            os.fsync(descriptor)
        # A link fails where a rename would replace.
        os.link(partial, path)
    finally:
        Path(partial).unlink()
    return result


def refuse_new(path: Path) -> None:
    """Refuse, before anything is done, a name at which no new file can be written."""
    refuse_existing(path)
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RefusedError(f"{folder} is no folder that can be written")


def refuse_existing(path: Path) -> None:
    """Refuse a name that is taken, were it by a link that leads nowhere."""
    if path.exists() or path.is_symlink():
        raise RefusedError(f"{path} exists already")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Report progress: a bar on a terminal, nothing when piped."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    error = Console(stderr=True)
    with Progress(*columns, console=error, disable=not error.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def warn(text: str) -> None:
    """Say on stderr what should be looked at, in a line of its own."""
    print(f"warning: {text}", file=sys.stderr)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something goes on: a spinner on a terminal, nothing when piped."""
    error = Console(stderr=True)
    if not error.is_terminal:
        yield
        return
    with error.status(f"{what} …"):
        yield


def show(facts: dict[str, Any], *, as_json: bool) -> None:
    """Show one thing: a line for each of its facts."""
    if as_json:
        print_json(facts)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def show_rows(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Show many things of one kind as a table; in JSON under `items`."""
    if as_json:
        print_json({"items": rows})
    elif rows:
        print_table(tuple(rows[0]), [list(row.values()) for row in rows])
    else:
        print("none")


def print_table(columns: tuple[str, ...], rows: Any) -> None:
    """Print *rows*, each as long as *columns*; what is None stays empty."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        # As text: a label with brackets is no markup.
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    out.print(table)


def print_bars(values: Sequence[tuple[str, int]]) -> None:
    """Print a bar for each of *values*, the longest as wide as there is room for."""
    most = max((value for _, value in values), default=0) or 1
    names = max(len(name) for name, _ in values)
    for name, value in values:
        # What is there at all is seen.
        bar = "█" * max(round(_BAR_COLUMNS * value / most), bool(value))
        print(f"{name:<{names}}  {bar} {value}")


def print_json(value: Any) -> None:
    """Print one document; data classes become objects, what JSON does not know its text."""

    def default(other: Any) -> Any:
        if is_dataclass(other) and not isinstance(other, type):
            return asdict(other)
        return str(other)

    options = orjson.OPT_INDENT_2 | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS
    print(orjson.dumps(value, default=default, option=options).decode())
