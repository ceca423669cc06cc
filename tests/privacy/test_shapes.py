"""Drift in what tables are made of: what changes what erasure may do is named, once."""

from collections.abc import Iterator

import pytest
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    Date,
    DateTime,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.models import DATA_MAP
from backend.privacy.catalogue import Drift, drift, unknown
from backend.privacy.shapes import declared_shape, facts, live_shapes
from tests.conftest import Service

ONLY_LIVE = "is in the database and not in the data map"
ONLY_MAPPED = "is in the data map and not in the database"
_on_postgresql = pytest.mark.parametrize("service", ["postgresql"], indirect=True)


@pytest.fixture
def session(service: Service) -> Iterator[Session]:
    """A session whose changes to the schema are rolled back."""
    with session_scope(read_only=True) as session:
        yield session


def _run(session: Session, *statements: str) -> None:
    for statement in statements:
        session.connection().exec_driver_sql(statement)


def _rebuild(session: Session, table: str, old: str, new: str) -> None:
    """Change what SQLite's ALTER TABLE cannot: make *table*, which is empty, anew."""
    query = "SELECT sql FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL ORDER BY rootpage"
    made = session.connection().exec_driver_sql(query, (table,)).scalars().all()
    (ddl,) = (sql for sql in made if sql.startswith("CREATE TABLE"))
    assert old in ddl
    others = [sql for sql in made if sql is not ddl]
    _run(session, f"DROP TABLE {table}", ddl.replace(old, new), *others)


def _alter(service: Service, session: Session, postgresql: str, *sqlite: str) -> None:
    if service.engine == "postgresql":
        _run(session, postgresql)
    elif len(sqlite) == 1:
        _run(session, *sqlite)
    else:
        _rebuild(session, *sqlite)


# What is done on PostgreSQL; the same on SQLite, as a statement or as a table rebuilt with one
# text for another; and what must be said.
_BOOKINGS = "ALTER TABLE bookings"
_KEY = ", \n\tCONSTRAINT fk_bookings_user_id_users FOREIGN KEY(user_id) REFERENCES users (id)"
_UNIQUE = ", \n\tCONSTRAINT uq_bookings_reference UNIQUE (reference)"
_RATING = "ck_feedback_rating_one_to_five"
_CHANGES: dict[str, tuple[str, tuple[str, ...], set[tuple[str, str]]]] = {
    "null refused": (
        f"{_BOOKINGS} ALTER contact_phone SET NOT NULL",
        ("bookings", "contact_phone TEXT", "contact_phone TEXT NOT NULL"),
        {("bookings.contact_phone", "NULL is refused in the database and allowed in the data map")},
    ),
    "null allowed": (
        f"{_BOOKINGS} ALTER hotel DROP NOT NULL",
        ("bookings", "hotel VARCHAR(40) NOT NULL", "hotel VARCHAR(40)"),
        {("bookings.hotel", "NULL is allowed in the database and refused in the data map")},
    ),
    "another type": (
        f"{_BOOKINGS} ALTER status_date TYPE TEXT",
        ("bookings", "status_date DATE", "status_date TEXT"),
        {("bookings.status_date", "the type is text in the database and date in the data map")},
    ),
    "a shorter text": (
        f"{_BOOKINGS} ALTER reference TYPE VARCHAR(8)",
        ("bookings", "reference VARCHAR(32)", "reference VARCHAR(8)"),
        {
            (
                "bookings.reference",
                "the type is text (8) in the database and text (32) in the data map",
            )
        },
    ),
    "a computed column": (
        f"{_BOOKINGS} DROP staff_notes, ADD staff_notes TEXT GENERATED ALWAYS AS (hotel) STORED",
        ("bookings", "staff_notes TEXT", "staff_notes TEXT GENERATED ALWAYS AS (hotel)"),
        {
            (
                "bookings.staff_notes",
                "the value is computed in the database and stored in the data map",
            )
        },
    ),
    "a unique index": (
        index := "CREATE UNIQUE INDEX one ON bookings (country, agent)",
        (index,),
        {("bookings", f"the uniqueness of (agent, country) {ONLY_LIVE}")},
    ),
    "a partial unique index": (
        index := "CREATE UNIQUE INDEX one ON bookings (country) WHERE adults > 1",
        (index,),
        {("bookings", f"the uniqueness of (country) among some rows {ONLY_LIVE}")},
    ),
    "a unique expression": (
        index := "CREATE UNIQUE INDEX one ON bookings (lower(country))",
        (index,),
        {("bookings", f"the uniqueness of (an expression) {ONLY_LIVE}")},
    ),
    "a constraint for one column, inline": (
        f"{_BOOKINGS} ADD UNIQUE (ip_address)",
        ("bookings", "ip_address TEXT", "ip_address TEXT UNIQUE"),
        {("bookings", f"the uniqueness of (ip_address) {ONLY_LIVE}")},
    ),
    "no uniqueness": (
        f"{_BOOKINGS} DROP CONSTRAINT uq_bookings_reference",
        ("bookings", _UNIQUE, ""),
        {("bookings", f"the uniqueness of (reference) {ONLY_MAPPED}")},
    ),
    "another primary key": (
        "ALTER TABLE job_runs DROP CONSTRAINT pk_job_runs, ADD PRIMARY KEY (job)",
        ("job_runs", "PRIMARY KEY (job, due_at)", "PRIMARY KEY (job)"),
        {
            (
                "job_runs",
                "the primary key is (job) in the database and (job, due_at) in the data map",
            )
        },
    ),
    "a foreign key": (
        f"{_BOOKINGS} ADD FOREIGN KEY (booking_changes) REFERENCES users",
        ("bookings", "booking_changes INTEGER", "booking_changes INTEGER REFERENCES users"),
        {("bookings.booking_changes", f"the foreign key to users (id) {ONLY_LIVE}")},
    ),
    "no foreign key": (
        f"{_BOOKINGS} DROP CONSTRAINT fk_bookings_user_id_users",
        ("bookings", _KEY, ""),
        {("bookings.user_id", f"the foreign key to users (id) {ONLY_MAPPED}")},
    ),
    "a foreign key that cascades": (
        f"{_BOOKINGS} ADD FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE",
        ("bookings", "user_id INTEGER", "user_id INTEGER REFERENCES users ON DELETE CASCADE"),
        {("bookings.user_id", f"the foreign key to users (id) ON DELETE CASCADE {ONLY_LIVE}")},
    ),
    "a check": (
        f"{_BOOKINGS} ADD CONSTRAINT named CHECK (hotel <> 'nobody''s')",
        (
            "bookings",
            "hotel VARCHAR(40)",
            "hotel VARCHAR(40) CONSTRAINT named CHECK (hotel <> 'nobody''s')",
        ),
        {("bookings", f"the CHECK named of (hotel, nobody''s) {ONLY_LIVE}")},
    ),
    "a stricter check": (
        (
            f"ALTER TABLE feedback DROP CONSTRAINT {_RATING}, ADD CONSTRAINT {_RATING}"
            " CHECK (rating BETWEEN 2 AND 5)"
        ),
        ("feedback", "BETWEEN 1 AND 5", "BETWEEN 2 AND 5"),
        {
            (
                "feedback",
                f"the CHECK {_RATING} of (1, 5, rating) {ONLY_MAPPED}",
            ),
            ("feedback", f"the CHECK {_RATING} of (2, 5, rating) {ONLY_LIVE}"),
        },
    ),
    "a trigger": (
        (
            "CREATE TRIGGER copies BEFORE UPDATE ON users FOR EACH ROW"
            " EXECUTE FUNCTION suppress_redundant_updates_trigger()"
        ),
        ("CREATE TRIGGER copies AFTER UPDATE ON users BEGIN SELECT OLD.email; END",),
        {("users", f"the trigger copies {ONLY_LIVE}")},
    ),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_a_difference_that_changes_what_erasure_may_do_is_named(
    service: Service, session: Session, change: str
) -> None:
    postgresql, sqlite, said = _CHANGES[change]
    _alter(service, session, postgresql, *sqlite)
    assert unknown(session, DATA_MAP) == ()
    assert {(found.where, found.what) for found in drift(session, DATA_MAP)} == said


@_on_postgresql
@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("CREATE RULE r AS ON UPDATE TO users DO ALSO NOTIFY x", "the rule r"),
        ("ALTER TABLE users ENABLE ROW LEVEL SECURITY", "the row security"),
        ("ALTER TABLE users ADD CONSTRAINT x EXCLUDE (country WITH =)", "the exclusion x"),
        (
            "CREATE UNIQUE INDEX x ON users (phone) NULLS NOT DISTINCT",
            "the uniqueness of (phone), NULL counting as a value",
        ),
    ],
)
def test_what_postgresql_alone_does_behind_a_statement_is_named(
    session: Session, statement: str, what: str
) -> None:
    _run(session, statement)
    assert drift(session, DATA_MAP) == (Drift("users", f"{what} {ONLY_LIVE}"),)


@_on_postgresql
def test_a_type_that_is_not_known_is_a_difference(session: Session) -> None:
    _run(session, "CREATE DOMAIN short AS TEXT CHECK (length(VALUE) < 9)")
    _run(session, "ALTER TABLE users ALTER country TYPE short, ALTER phone TYPE xml USING NULL")
    assert drift(session, DATA_MAP) == (
        Drift("users.country", "the type is short in the database and text (3) in the data map"),
        Drift(
            "users.phone", "the type is of no known kind in the database and text in the data map"
        ),
    )


def _intricate() -> tuple[Table, Table]:
    """Two tables with what the built-in model has none of."""
    metadata = MetaData()
    parent = Table(
        "Parent Table",
        metadata,
        Column("one", Integer, primary_key=True),
        Column("two", String(5), primary_key=True),
    )
    child = Table(
        "child",
        metadata,
        Column("id", Uuid, primary_key=True),
        Column("One", Integer),
        Column("select", String(5)),
        Column("at", DateTime(timezone=True), nullable=False),
        Column("local", DateTime),
        Column("text", Text),
        Column("day", Date),
        Column("rate", Numeric(10, 2)),
        Column("share", Float),
        Column("raw", LargeBinary),
        Column("big", BigInteger),
        Column("on", Boolean, nullable=False),
        Column("twice", Integer, Computed('"One" * 2', persisted=True)),
        ForeignKeyConstraint(["One", "select"], [parent.c.one, parent.c.two], ondelete="SET NULL"),
        UniqueConstraint("select", "One"),
        CheckConstraint("rate >= -1.5 AND \"text\" <> 'it''s' OR day IS NULL", name="odd"),
        CheckConstraint('"select" LIKE \'a%%\' AND "One" NOT IN (1, 2)', name="liked"),
    )
    there = text("big > 0")
    Index("some", child.c.big, unique=True, sqlite_where=there, postgresql_where=there)
    Index("folded", func.lower(child.c.text), unique=True)
    return parent, child


def test_a_model_is_quiet_over_the_database_that_it_made(session: Session) -> None:
    connection = session.connection()
    for table in _intricate():
        table.create(connection)
        name = str(table.name)
        (shape,) = live_shapes(connection, {name.lower(): (None, name)}).values()
        columns = [column.name for column in table.columns]
        live, declared = (
            facts(one, name, {*columns, *map(str.lower, columns)}, connection.dialect)
            for one in (shape, declared_shape(table, connection.dialect))
        )
        assert live == declared
        assert len(live) > 3 * len(columns)
