"""The history of the schema and the models say the same, on both engines."""

from collections.abc import Iterator
from typing import Any

import pytest
from alembic.config import Config
from alembic.config import main as alembic
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

from backend.db_utils import get_engine, make_engine
from backend.errors import ConfigurationError, SchemaMismatchError
from backend.models import Base
from backend.services.schema_service import _ROOT, get_schema_service
from tests.conftest import Service, clear_caches, set_environment

Schema = dict[str, dict[str, Any]]


@pytest.fixture
def empty(
    service: Service, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> Iterator[Engine]:
    """A database without a table beside the prepared one; the settings point to it."""
    url = f"sqlite:///{tmp_path}/empty.db"
    server = name = None
    if service.engine == "postgresql":
        server = request.getfixturevalue("postgres_server")
        name = f"{service.url.rpartition('/')[2]}_empty"
        server.run(f"CREATE DATABASE {name}")
        url = server.url(name)
    set_environment(monkeypatch, service.folder, url)
    yield get_engine()
    clear_caches()
    if server is not None:
        server.run(f"DROP DATABASE {name} WITH (FORCE)")


def _alembic(*arguments: str) -> None:
    alembic(["-c", str(_ROOT / "alembic.ini"), *arguments])


def _schema(engine: Engine) -> Schema:
    """Everything that a database says of its tables, in an order of its own."""
    found = inspect(engine)
    schema = {}
    for table in found.get_table_names():
        if table == "alembic_version":
            continue
        columns = {
            column["name"]: (
                str(column["type"]), column["nullable"], str(column["default"]),
                str(column.get("identity")),
            )
            for column in found.get_columns(table)
        }  # fmt: skip
        schema[table] = {
            "columns": columns,
            "order": [*columns],
            "primary key": found.get_pk_constraint(table),
            "foreign keys": _sorted(_named(engine, found.get_foreign_keys(table))),
            "unique": _sorted(found.get_unique_constraints(table)),
            "checks": _sorted(found.get_check_constraints(table)),
            "indexes": _sorted(found.get_indexes(table)),
            "autoincrement": _autoincrement(engine, table),
        }
    return schema


def _named(engine: Engine, keys: Any) -> Any:
    # A column that was added to a table of SQLite has its key beside it, where the inspector
    # reads no name.
    return [key | {"name": None} for key in keys] if engine.dialect.name == "sqlite" else keys


def _sorted(items: Any) -> list[str]:
    return sorted(repr(sorted(item.items())) for item in items)


def _autoincrement(engine: Engine, table: str) -> bool:
    if engine.dialect.name != "sqlite":
        return False
    with engine.connect() as connection:
        made = text("SELECT sql FROM sqlite_master WHERE name = :name")
        return "AUTOINCREMENT" in str(connection.execute(made, {"name": table}).scalar())


def test_the_migrations_make_what_the_models_declare(empty: Engine, service: Service) -> None:
    prepared = make_engine(service.url)
    migrated = _schema(prepared)
    prepared.dispose()
    Base.metadata.create_all(empty)
    assert set(migrated) == set(Base.metadata.tables)
    assert migrated == _schema(empty)
    if service.engine == "sqlite":
        # Else a new person would get an erased one's number.
        assert migrated["users"]["autoincrement"]


def test_alembic_alone_gives_what_init_gives(empty: Engine, service: Service) -> None:
    _alembic("upgrade", "head")
    prepared = make_engine(service.url)
    assert _schema(empty) == _schema(prepared)
    prepared.dispose()
    assert get_schema_service().revision(empty) == get_schema_service().wanted
    assert get_schema_service().upgrade(empty) is False


def test_alembic_check_finds_no_difference_and_would_find_one(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    _alembic("check")
    with get_engine().begin() as connection:
        connection.execute(text("ALTER TABLE feedback DROP COLUMN staff_response"))
    with pytest.raises(SystemExit):
        _alembic("check")
    assert "staff_response" in "".join(capsys.readouterr())


def test_downgrading_to_the_base_leaves_nothing_but_alembics_table(service: Service) -> None:
    _alembic("downgrade", "base")
    assert inspect(get_engine()).get_table_names() == ["alembic_version"]
    if service.engine == "postgresql":
        assert inspect(get_engine()).get_sequence_names() == []
    _alembic("upgrade", "head")
    assert set(_schema(get_engine())) == set(Base.metadata.tables)


def test_a_revision_is_known_or_refused(sqlite_service: Service) -> None:
    schema = get_schema_service()
    schema.require_known(schema.wanted)
    schema.require_current(get_engine())
    with pytest.raises(SchemaMismatchError, match="9999"):
        schema.require_known("9999")
    with get_engine().begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for refused in (schema.require_current, schema.upgrade, schema.refuse_foreign):
        with pytest.raises(ConfigurationError, match="9999"):
            refused(get_engine())
    with get_engine().begin() as connection:
        connection.execute(text("DELETE FROM alembic_version"))
    with pytest.raises(ConfigurationError, match="init"):
        schema.require_current(get_engine())


def test_the_numbers_of_the_files_are_alembics_own_history() -> None:
    scripts = ScriptDirectory.from_config(Config(str(_ROOT / "alembic.ini")))
    ours = get_schema_service()
    assert ours.wanted == scripts.get_current_head()
    assert ours._known == [script.revision for script in reversed([*scripts.walk_revisions()])]
