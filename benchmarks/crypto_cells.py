"""Reading encrypted cells through the ORM, from a SQLite file, beside the same cells in clear."""

import base64
import importlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Column, Dialect, Engine, Integer, Text, create_engine, insert, select
from sqlalchemy.orm import Session, registry
from sqlalchemy.types import UserDefinedType

from backend.crypto import keyring
from backend.crypto.columns import Encrypted
from benchmarks import peers
from benchmarks.report import Aim, Figure, Samples
from benchmarks.timing import Call, cpu_seconds

ROUNDS: Final = 5
CELLS: Final = 100_000
PLAINTEXT_CHARACTERS: Final = 64
# One cell a row, where making the object weighs most, and as many as our own tables have.
_CELLS_A_ROW: Final = (1, 4)
# Rows a batch: reading must not be about memory.
BATCH: Final = 1000
_AIM: Final = Aim(1.5, at_most=True)
_OURS: Final = "Holdfast"
_PLAIN: Final = "plain Text column"
_MILLISECONDS: Final = 1000

ColumnType = Callable[[], Any]


class BareColumn(UserDefinedType[str]):
    """The limit: the bare call and base64 where SQLAlchemy asks for a value, and nothing else."""

    cache_ok = True

    def __init__(self, cipher: peers.Peer) -> None:
        self.cipher = cipher

    def get_col_spec(self, **_kw: Any) -> str:
        return "TEXT"

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        seal = self.cipher.seal
        return lambda text: seal(text.encode())

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002 - its signature
        unseal = self.cipher.open
        return lambda token: unseal(token).decode()


def measure() -> tuple[list[Figure], list[str]]:
    """Return the figures, and a note for each peer that is missing."""
    keyring.install(keyring.Keyring(keyring.RootKey(os.urandom(32))))
    bare = peers.bare().in_base64()
    types: dict[str, ColumnType] = {
        _OURS: Encrypted,
        _PLAIN: Text,
        bare.name: partial(BareColumn, bare),
    }
    missing = []
    try:
        types[peers.SQLALCHEMY_UTILS] = _sqlalchemy_utils()
    except ImportError as error:
        missing.append(f"left out: {error.name} is not installed")
    figures: list[Figure] = []
    for width in _CELLS_A_ROW:
        figures += _figures(width, _read(types, width))
    return figures, missing


def _sqlalchemy_utils() -> ColumnType:
    types: Any = importlib.import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
    key = base64.b64encode(os.urandom(32)).decode()
    return lambda: types.StringEncryptedType(Text, key, types.AesGcmEngine)


def _read(types: dict[str, ColumnType], width: int) -> dict[str, Samples]:
    found: dict[str, list[float]] = {name: [] for name in types}
    with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as folder:
        path = Path(folder) / "cells.db"
        with _filled(path, types, width) as (engine, mapped):
            for number in range(ROUNDS + 1):
                for name, entity in mapped.items():
                    spent = cpu_seconds(_reading(engine, entity, width))
                    if number:
                        found[name].append(spent * _MILLISECONDS)
    return {name: Samples(samples) for name, samples in found.items()}


@contextmanager
def _filled(
    path: Path, types: dict[str, ColumnType], width: int
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """Give one table of the same values and one mapped class for each type."""
    names = [f"cell_{number}" for number in range(width)]
    values = [
        {name: secrets.token_hex(PLAINTEXT_CHARACTERS // 2) for name in names}
        for _ in range(CELLS // width)
    ]
    tables = registry()
    mapped = {
        name: _entity(tables, f"cells_{number}", names, column_type)
        for number, (name, column_type) in enumerate(types.items())
    }
    engine = create_engine(f"sqlite:///{path}")
    tables.metadata.create_all(engine)
    try:
        with Session(engine) as session:
            for entity in mapped.values():
                session.execute(insert(entity), values)
            session.commit()
        yield engine, mapped
    finally:
        engine.dispose()
        tables.dispose()


def _entity(tables: registry, table: str, names: list[str], column_type: ColumnType) -> Any:
    columns: dict[str, Any] = {name: Column(column_type(), nullable=False) for name in names}
    columns["id"] = Column(Integer, primary_key=True)
    return tables.mapped(type(table, (), {"__tablename__": table, **columns}))


def _reading(engine: Engine, entity: Any, width: int) -> Call:
    return partial(_read_all, engine, entity, width)


def _read_all(engine: Engine, entity: Any, width: int) -> None:
    last = f"cell_{width - 1}"
    characters = 0
    with Session(engine) as session:
        for row in session.scalars(select(entity).execution_options(yield_per=BATCH)):
            characters += len(getattr(row, last))
    if characters != CELLS // width * PLAINTEXT_CHARACTERS:
        raise RuntimeError("not every cell was read")


def _figures(width: int, found: dict[str, Samples]) -> list[Figure]:
    section = f"ORM, read {CELLS:,} cells, {width} a row"
    ours = found.pop(_OURS)
    return [
        Figure(section, "ms", ours, samples, _AIM if name == _PLAIN else None, against=name)
        for name, samples in found.items()
    ]
