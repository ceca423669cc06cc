"""What endpoints ask for: a session, who is signed in, an admin."""

from typing import Annotated, Final, Self

from fastapi import Depends, Path, Request
from fastapi.security import OAuth2PasswordBearer
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from sqlalchemy.orm import Session

from backend.db_utils import is_storable, read_session, write_session
from backend.services.audit_service import Actor
from backend.services.auth_service import SignedIn, get_auth_service, require_admin
from backend.services.subject_service import MAX_ADDRESS_CHARS, MAX_USER_ID, Who

MAX_ID: Final = MAX_USER_ID
UserId = Annotated[int, Field(strict=True, gt=0, le=MAX_ID, examples=[7])]
UserIdInPath = Annotated[int, Path(gt=0, le=MAX_ID, examples=[7])]

PlanDigest = Annotated[
    str | None,
    Field(
        pattern="^[0-9a-f]{64}$",
        description="Of a dry run: the real run is refused if the plan has changed since.",
    ),
]

ReadSession = Annotated[Session, Depends(read_session, scope="function")]
# scope="function": the commit happens before the answer is sent. With the default, a commit that
# fails is answered with success and the data are lost.
WriteSession = Annotated[Session, Depends(write_session, scope="function")]

_bearer = OAuth2PasswordBearer(
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


def signed_in(request: Request, token: Annotated[str, Depends(_bearer)]) -> SignedIn:
    return get_auth_service().authenticate(token, request.scope["request_id"])


CurrentSignIn = Annotated[SignedIn, Depends(signed_in)]


# These wait for nothing, so they need no thread of their own.
async def current_actor(sign_in: CurrentSignIn) -> Actor:
    return sign_in.actor


CurrentActor = Annotated[Actor, Depends(current_actor)]


async def admin_actor(actor: CurrentActor) -> Actor:
    require_admin(actor)
    return actor


AdminActor = Annotated[Actor, Depends(admin_actor)]
