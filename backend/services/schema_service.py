"""
The schema: which revision a database has, which one the code needs, and getting there.

Revisions are numbered, and each file of the history begins with its number.
"""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from sqlalchemy import Engine, inspect, text

from backend.errors import ConfigurationError, SchemaMismatchError
from backend.models import Base

_ROOT: Final = Path(__file__).resolve().parents[2]
_HISTORY: Final = _ROOT / "alembic" / "versions"


class SchemaService:
    """Reads and runs the schema history."""

    @property
    def wanted(self) -> str:
        """The revision that this code needs."""
        return self._known[-1]

    def revision(self, engine: Engine) -> str | None:
        """The revision that the database has; `None` before its first migration."""
        with engine.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return None if found is None else str(found)

    def require_current(self, engine: Engine) -> None:
        """
        Refuse a database that is behind or ahead of the code.

        Raises:
            ConfigurationError: It is; the message says what to do.
        """
        found = self.revision(engine)
        if found == self.wanted:
            return
        self._require_known(found)
        raise ConfigurationError(
            f"the database has schema {found or 'none'}, this version needs {self.wanted}: "
            "run `python db_cli.py init`"
        )

    def upgrade(self, engine: Engine) -> bool:
        """
        Bring the database to the revision that the code needs; say whether anything was done.

        Raises:
            ConfigurationError: The database is ahead of the code.
        """
        found = self.revision(engine)
        self._require_known(found)
        if found == self.wanted:
            return False
        # Late: it takes a tenth of the start, and most starts have nothing to migrate.
        from alembic.config import Config

        from alembic import command

        with engine.begin() as connection:
            config = Config(str(_ROOT / "alembic.ini"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        return True

    def refuse_foreign(self, engine: Engine) -> None:
        """
        Refuse a database that a newer version or another program wrote.

        Raises:
            ConfigurationError: It is one.
        """
        found = self.revision(engine)
        self._require_known(found)
        if found is None and set(inspect(engine).get_table_names()) & set(Base.metadata.tables):
            raise ConfigurationError(
                "DATABASE_URL: the database holds tables of another program under our names"
            )

    def require_known(self, revision: str) -> None:
        """
        Refuse a revision that this code does not know: it was written by a newer version.

        Raises:
            SchemaMismatchError: It is one.
        """
        if revision not in self._known:
            raise SchemaMismatchError(
                f"schema {revision} is newer than this version, which knows {self.wanted}"
            )

    def missing_in(self, revision: str) -> list[str]:
        """The revisions that a database at *revision* still has to go through."""
        return [known for known in self._known if known > revision]

    def _require_known(self, found: str | None) -> None:
        if found is not None and found not in self._known:
            raise ConfigurationError(
                f"the database has schema {found}, which is newer than this version "
                f"(it knows {self.wanted}): run the version that wrote it"
            )

    @cached_property
    def _known(self) -> list[str]:
        return sorted(path.name.split("_")[0] for path in _HISTORY.glob("[0-9]*_*.py"))


@lru_cache(maxsize=1)
def get_schema_service() -> SchemaService:
    return SchemaService()
