"""What endpoints ask for: a session, a body, who is signed in."""

import re
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Final, Self

from anyio import CancelScope, CapacityLimiter, fail_after, to_thread
from fastapi import Depends, Path, Query, Request
from fastapi.security import OAuth2PasswordBearer
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from sqlalchemy.orm import Session

from backend.db_utils import (
    BUSY_TIMEOUT_SECONDS,
    get_engine,
    is_storable,
    read_session,
    session_scope,
)
from backend.errors import UnavailableError
from backend.services.auth_service import SignedIn, get_auth_service
from backend.services.subject_service import MAX_ADDRESS_CHARS, MAX_USER_ID, Who

MAX_ID: Final = MAX_USER_ID
UserId = Annotated[int, Field(strict=True, gt=0, le=MAX_ID, examples=[7])]


def _as_it_is_written(value: object) -> object:
    # Pydantic also takes 3.0, 3_0 and +3, which who reads the address before us takes for others.
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError("a number is written in digits alone")
    return value


_NUMBER: Final = re.compile("0|[1-9][0-9]{0,19}", re.ASCII)
# A number in an address: of a person, of a row, of how many to show.
InAddress = BeforeValidator(_as_it_is_written)
UserIdInPath = Annotated[int, Path(gt=0, le=MAX_ID, examples=[7]), InAddress]


def _written_out(value: object) -> object:
    # Pydantic takes a number, also one in text, for seconds since 1970.
    if not isinstance(value, str) or "T" not in value.upper():
        raise ValueError("a time is written as 2027-01-31T12:00:00Z")
    return value


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time between the years 1 and 9999, also in UTC") from None


Moment = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_written_out), AfterValidator(_in_utc)
]
PlanDigest = Annotated[
    str | None,
    Field(
        pattern="^[0-9a-f]{64}$",
        description="Of a dry run: the real run is refused if the plan has changed since.",
    ),
]

# What a list shows at once, at most, and where it begins.
Limit = Annotated[int, Query(ge=1, le=500), InAddress]
Offset = Annotated[int, Query(ge=0, le=10**9), InAddress]

ReadSession = Annotated[Session, Depends(read_session, scope="function")]
# Who waits for another writer waits here and not in a thread: the one who writes needs a thread to
# commit with, and would never get it from those who wait for that commit.
_ONE: Final = CapacityLimiter(1)
_SOME: Final = CapacityLimiter(20)


@asynccontextmanager
async def _turn() -> AsyncIterator[None]:
    # SQLite has one writer at a time anyway; half of the threads are left to others.
    turns = _ONE if get_engine().dialect.name == "sqlite" else _SOME
    mine = object()
    try:
        with fail_after(BUSY_TIMEOUT_SECONDS):
            await turns.acquire_on_behalf_of(mine)
    except TimeoutError:
        raise UnavailableError("other writers take too long") from None
    try:
        yield
    finally:
        turns.release_on_behalf_of(mine)


async def _write_session() -> AsyncIterator[Session]:
    async with _turn():
        scope = session_scope()
        # Opens nothing yet, so it takes no thread; its end does.
        session = scope.__enter__()
        try:
            yield session
        except BaseException as err:
            await _leave(scope, err)
            raise
        await _leave(scope, None)


async def _leave(scope: AbstractContextManager[Session], err: BaseException | None) -> None:
    # Shielded: the request of a caller who has hung up is cancelled.
    with CancelScope(shield=True):
        kind, trace = (None, None) if err is None else (type(err), err.__traceback__)
        await to_thread.run_sync(scope.__exit__, kind, err, trace, limiter=CapacityLimiter(1))


# scope="function": the commit happens before the answer is sent. With the default, a commit that
# fails is answered with success and the data are lost.
WriteSession = Annotated[Session, Depends(_write_session, scope="function")]

bearer = OAuth2PasswordBearer(
    tokenUrl="/auth/token", description="Sign in with e-mail (as user name) and password."
)


class Body(BaseModel):
    """A request body: unknown fields are refused, and nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _storable(cls, value: object) -> object:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if isinstance(text, str) and not is_storable(text):
            raise ValueError("not text: it holds NUL or half a surrogate pair")
        return value


class LargeBody(Body):
    """A body of up to `MAX_BODY_BYTES`: others are read to 64 KiB."""


class Named(Body):
    """A body that names a person in exactly one way."""

    user_id: UserId | None = None
    email: str | None = Field(
        default=None, min_length=3, max_length=MAX_ADDRESS_CHARS,
        description="In any spelling; finds also somebody whom only others' bookings name.",
    )  # fmt: skip
    phone: str | None = Field(
        default=None, min_length=3, max_length=40, description="In any spelling, as `email`."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if [self.user_id, self.email, self.phone].count(None) != 2:  # noqa: PLR2004 - all but one
            raise ValueError("name the person by one of user_id, email and phone")
        return self

    @property
    def who(self) -> Who:
        return Who(self.user_id, self.email, self.phone)


class Answer(BaseModel):
    """A response body."""

    model_config = ConfigDict(from_attributes=True)


def signed_in(request: Request, token: Annotated[str, Depends(bearer)]) -> SignedIn:
    found = get_auth_service().authenticate(token, request.scope["request_id"])
    # For the record, should this be denied.
    request.state.actor = found.actor
    return found


CurrentSignIn = Annotated[SignedIn, Depends(signed_in)]
