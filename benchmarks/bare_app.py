"""
The limit: the same answer from the same rows, by FastAPI and SQLAlchemy and nothing else.

No audit, metrics, logs, security headers, request ids or revoked tokens: what Holdfast takes
longer than this is the price of those.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import uvicorn
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import OAuth2PasswordBearer
from jose import JWTError, jwt
from pydantic import BaseModel
from sqlalchemy import ForeignKey, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

SECRET = os.environ["JWT_SECRET_KEY"]
PURPOSES = ("marketing", "analytics", "profiling", "third_party_sharing")
CLAIMS = {f"require_{claim}": True for claim in ("exp", "iat", "nbf", "sub", "aud", "iss", "jti")}

engine = create_engine(os.environ["DATABASE_URL"])
app = FastAPI()


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
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
Token = Annotated[str, Depends(OAuth2PasswordBearer(tokenUrl="/auth/token"))]


def current_user(token: Token, session: ReadSession) -> User:
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


@app.get("/security/data/consent/{user_id}")
def read_consent(user_id: int, session: ReadSession, user: CurrentUser) -> ConsentAnswer:
    if user.id != user_id and user.role != "admin":
        raise HTTPException(403)
    statement = (
        select(DataConsent)
        .where(DataConsent.user_id == user_id)
        .order_by(DataConsent.recorded_at, DataConsent.id)
    )
    history = [
        ConsentEvent(
            id=row.id,
            purpose=row.purpose,
            granted=row.granted,
            notice_version=row.notice_version,
            method=row.method,
            recorded_at=row.recorded_at.replace(tzinfo=UTC),
        )
        for row in session.scalars(statement)
    ]
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
    uvicorn.run(
        app,
        port=int(os.environ["PORT"]),
        # As Holdfast has it, so that only the application differs.
        access_log=False,
        log_config=None,
        server_header=False,
    )
