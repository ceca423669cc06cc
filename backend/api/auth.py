"""Sign in, who am I, sign out."""

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.security import OAuth2PasswordRequestForm
from pydantic import Field

from backend.api import examples
from backend.api.dependencies import Answer, CurrentActor, CurrentSignIn, WriteSession
from backend.api.problems import problems
from backend.models import Role
from backend.services.auth_service import get_auth_service, token_lifetime

router = APIRouter(prefix="/auth", tags=["auth"])


_FORM: Final = "application/x-www-form-urlencoded"


class Token(Answer, json_schema_extra=examples.of(examples.TOKEN)):
    access_token: str = Field(repr=False)
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - RFC 6749, 7.1
    expires_in: int = Field(description="Seconds until the token ends.")


class Me(Answer, json_schema_extra=examples.of(examples.ME)):
    user_id: int | None
    role: Role


@router.post(
    "/token",
    responses=problems(401, 422),
    # The form is FastAPI's own, so its example is put in here.
    openapi_extra={"requestBody": {"content": {_FORM: examples.of(examples.SIGN_IN)}}},
)
def sign_in(request: Request, form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> Token:
    """Sign in with e-mail (as `username`) and password; get a bearer token."""
    token = get_auth_service().sign_in(form.username, form.password, request.scope["request_id"])
    return Token(access_token=token, expires_in=int(token_lifetime().total_seconds()))


@router.get("/me", responses=problems(401))
def who_am_i(actor: CurrentActor) -> Me:
    """Say who the token belongs to."""
    return Me(user_id=actor.user_id, role=actor.role)


@router.post("/logout", status_code=204, responses=problems(401))
def sign_out(session: WriteSession, sign_in: CurrentSignIn) -> None:
    """Revoke this token: it is refused from now on."""
    get_auth_service().sign_out(session, sign_in.actor, sign_in.expires_at)
