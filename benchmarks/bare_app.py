"""
The limit: the same answers from the same rows, by FastAPI and SQLAlchemy and nothing else.

The rows are in clear. No audit, metrics, logs, security headers, request ids, revoked tokens,
redactions or notices: what Holdfast takes longer than this is the price of those.
"""

import base64
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Annotated, Any
from uuid import UUID, uuid4

import orjson
import uvicorn
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from jose import JWTError, jwt
from passlib.hash import argon2
from pydantic import BaseModel
from sqlalchemy import ColumnElement, ForeignKey, MetaData, Table, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

SECRET = os.environ["JWT_SECRET_KEY"]
PURPOSES = ("marketing", "analytics", "profiling", "third_party_sharing")
CLAIMS = {f"require_{claim}": True for claim in ("exp", "iat", "nbf", "sub", "aud", "iss", "jti")}

KEY = base64.b64decode(os.environ["ENCRYPTION_KEY"])
HASHER = argon2.using(type="ID", memory_cost=19_456, time_cost=2, parallelism=1)
LIFETIME = timedelta(minutes=30)

# Requests keep their connection while they wait for a thread: with a bound, all could wait for
# ever.
# As much patience with other writers as Holdfast has.
engine = create_engine(
    os.environ["DATABASE_URL"], pool_size=20, max_overflow=-1, connect_args={"timeout": 10}
)
app = FastAPI()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(unique=True)
    password_hash: Mapped[str | None]
    role: Mapped[str]
    is_active: Mapped[bool]


class DataConsent(Base):
    __tablename__ = "data_consents"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    purpose: Mapped[str]
    granted: Mapped[bool]
    notice_version: Mapped[str | None]
    method: Mapped[str]
    recorded_at: Mapped[datetime]


class Token(BaseModel):
    access_token: str
    token_type: str = "bearer"
    expires_in: int


class ConsentBody(BaseModel):
    purpose: str
    granted: bool


class ExportBody(BaseModel):
    user_id: int
    encrypt: bool = False


class PurposeState(BaseModel):
    granted: bool
    since: datetime | None
    notice_version: str | None


class ConsentEvent(BaseModel):
    id: UUID
    purpose: str
    granted: bool
    notice_version: str | None
    method: str
    recorded_at: datetime


class ConsentAnswer(BaseModel):
    user_id: int
    purposes: dict[str, PurposeState]
    history: list[ConsentEvent]


def open_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


ReadSession = Annotated[Session, Depends(open_session)]
BearerToken = Annotated[str, Depends(OAuth2PasswordBearer(tokenUrl="/auth/token"))]


def current_user(token: BearerToken, session: ReadSession) -> User:
    try:
        claims = jwt.decode(
            token,
            SECRET,
            algorithms=["HS256"],
            audience="holdfast-api",
            issuer="holdfast",
            options=CLAIMS,
        )
    except JWTError:
        raise HTTPException(401) from None
    user = session.get(User, int(claims["sub"]))
    if user is None or not user.is_active:
        raise HTTPException(401)
    return user


CurrentUser = Annotated[User, Depends(current_user)]


@app.get("/healthz")
def alive() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/auth/token")
def sign_in(form: Annotated[OAuth2PasswordRequestForm, Depends()], session: ReadSession) -> Token:
    user = session.scalar(select(User).where(User.email == form.username))
    if user is None or not user.is_active or not HASHER.verify(form.password, user.password_hash):
        raise HTTPException(401)
    now = datetime.now(UTC)
    claims = {
        "sub": str(user.id),
        "iss": "holdfast",
        "aud": "holdfast-api",
        "iat": now,
        "nbf": now,
        "exp": now + LIFETIME,
        "jti": secrets.token_urlsafe(16),
    }
    token = jwt.encode(claims, SECRET, algorithm="HS256")
    return Token(access_token=token, expires_in=int(LIFETIME.total_seconds()))


@app.get("/security/data/consent/{user_id}")
def read_consent(user_id: int, session: ReadSession, user: CurrentUser) -> ConsentAnswer:
    require_own(user, user_id)
    return consent_of(session, user_id)


@app.post("/security/data/consent/{user_id}", status_code=201)
def record_consent(
    user_id: int, body: ConsentBody, session: ReadSession, user: CurrentUser
) -> ConsentEvent:
    require_own(user, user_id)
    if body.purpose not in PURPOSES:
        raise HTTPException(422)
    row = DataConsent(
        id=uuid4(),
        user_id=user_id,
        purpose=body.purpose,
        granted=body.granted,
        notice_version=None,
        method="self",
        recorded_at=datetime.now(UTC),
    )
    event = as_event(row)
    session.add(row)
    session.commit()
    return event


@app.post("/security/data/export")
def export_data(body: ExportBody, session: ReadSession, user: CurrentUser) -> Response:
    require_own(user, body.user_id)
    data = {
        name: rows_of(session, table, of_person)
        for name, table, of_person in owned_by(body.user_id)
    }
    document = {
        "subject": {"user_id": body.user_id},
        "generated_at": datetime.now(UTC),
        "data": data,
        "consents": consent_of(session, body.user_id).model_dump(),
        "counts": {name: len(rows) for name, rows in data.items()},
    }
    text = orjson.dumps(document, default=spelled)
    if not body.encrypt:
        return Response(text, media_type="application/json")
    nonce = os.urandom(12)
    sealed = nonce + AESGCM(KEY).encrypt(nonce, text, None)
    return Response(sealed, media_type="application/octet-stream")


def require_own(user: User, user_id: int) -> None:
    if user.id != user_id and user.role != "admin":
        raise HTTPException(403)


def rows_of(session: Session, table: Table, which: ColumnElement[bool]) -> list[dict[str, Any]]:
    names = [str(column.name) for column in table.columns]
    found = session.execute(select(table).where(which))
    return [dict(zip(names, row, strict=True)) for row in found]


def owned_by(user_id: int) -> Iterator[tuple[str, Table, ColumnElement[bool]]]:
    tables = known_tables()
    bookings, invoices = tables["bookings"], tables["invoices"]
    stays = select(bookings.c.id).where(bookings.c.user_id == user_id)
    bills = select(invoices.c.id).where(invoices.c.user_id == user_id)
    addresses = select(bookings.c.billing_address_id).where(bookings.c.user_id == user_id)
    yield "users", tables["users"], tables["users"].c.id == user_id
    for name in ("bookings", "payments", "invoices", "feedback", "data_consents"):
        yield name, tables[name], tables[name].c.user_id == user_id
    for name, column, rows in (
        ("companions", "booking_id", stays),
        ("invoice_lines", "invoice_id", bills),
        ("billing_addresses", "id", addresses),
    ):
        yield name, tables[name], tables[name].c[column].in_(rows)


@lru_cache(maxsize=1)
def known_tables() -> dict[str, Table]:
    metadata = MetaData()
    metadata.reflect(engine)
    return dict(metadata.tables)


def spelled(value: Any) -> str:
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def as_event(row: DataConsent) -> ConsentEvent:
    return ConsentEvent(
        id=row.id,
        purpose=row.purpose,
        granted=row.granted,
        notice_version=row.notice_version,
        method=row.method,
        recorded_at=row.recorded_at.replace(tzinfo=UTC),
    )


def consent_of(session: Session, user_id: int) -> ConsentAnswer:
    statement = (
        select(DataConsent)
        .where(DataConsent.user_id == user_id)
        .order_by(DataConsent.recorded_at, DataConsent.id)
    )
    history = [as_event(row) for row in session.scalars(statement)]
    states = {
        purpose: PurposeState(granted=False, since=None, notice_version=None)
        for purpose in PURPOSES
    }
    for event in history:
        known = states[event.purpose]
        same = known.since is not None and known.granted == event.granted
        states[event.purpose] = PurposeState(
            granted=event.granted,
            since=known.since if same else event.recorded_at,
            notice_version=event.notice_version,
        )
    return ConsentAnswer(user_id=user_id, purposes=states, history=history)


if __name__ == "__main__":
    WORKERS = int(os.environ.get("WORKERS", "1"))
    uvicorn.run(
        # More processes import it for themselves.
        app if WORKERS == 1 else "benchmarks.bare_app:app",
        workers=WORKERS,
        port=int(os.environ["PORT"]),
        # As Holdfast has it, so that only the application differs.
        access_log=False,
        log_config=None,
        server_header=False,
    )
