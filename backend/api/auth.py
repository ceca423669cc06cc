"""Sign in, stay signed in, sign out; one's own password and one-time codes."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Final, Literal, Self, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Form, Request
from pydantic import BaseModel, Field, SecretStr, model_validator

from backend.api import examples
from backend.api.access import ANYONE, FreshActor, OwnActor
from backend.api.bodies import StrictRoute
from backend.api.dependencies import Answer, Body, CurrentSignIn, WriteSession
from backend.api.problems import problems
from backend.crypto import passwords
from backend.errors import UnavailableError
from backend.models import Role
from backend.services.account_service import token_lifetime
from backend.services.auth_service import Tokens, get_auth_service
from backend.services.credential_service import get_credential_service

router = APIRouter(prefix="/auth", tags=["auth"], route_class=StrictRoute)

_MAX_FIELD_CHARS: Final = 8192
# Whoever waits for a hash waits here, and takes no thread from other requests meanwhile.
_HASHING: Final = CapacityLimiter(passwords.AT_ONCE)
_MAX_WAITING: Final = 200
_Result = TypeVar("_Result")

Password = Annotated[SecretStr, Field(min_length=1, max_length=passwords.MAX_CHARS)]
Text = Annotated[str, Field(max_length=_MAX_FIELD_CHARS)]
Code = Annotated[str, Field(pattern="^[0-9]{6}$", examples=["123456"])]


class TokenForm(BaseModel, json_schema_extra=examples.of(examples.SIGN_IN)):
    """An OAuth2 token request (RFC 6749, 4.3 and 6); what a client sends besides is ignored."""

    grant_type: Literal["password", "refresh_token"] = "password"
    username: Text | None = Field(default=None, description="E-mail address.")
    password: SecretStr | None = Field(default=None, max_length=_MAX_FIELD_CHARS)
    otp: Text = Field(default="", description="One-time code, where the account asks for one.")
    client_secret: Text = Field(
        default="", description="As `otp`, where a page has no field of it."
    )
    refresh_token: SecretStr | None = Field(default=None, max_length=_MAX_FIELD_CHARS)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.grant_type == "password" and not (self.username and self.password):
            raise ValueError("grant_type password needs username and password")
        if self.grant_type == "refresh_token" and not self.refresh_token:
            raise ValueError("grant_type refresh_token needs refresh_token")
        return self


class Token(Answer, json_schema_extra=examples.of(examples.TOKEN)):
    access_token: str = Field(repr=False)
    token_type: Literal["bearer"] = "bearer"  # noqa: S105 - RFC 6749, 7.1
    expires_in: int = Field(description="Seconds until the access token ends.")
    refresh_token: str = Field(repr=False, description="Good for the next two tokens, once.")

    @classmethod
    def of(cls, tokens: Tokens) -> Self:
        return cls(
            access_token=tokens.access_token,
            refresh_token=tokens.refresh_token,
            expires_in=int(token_lifetime().total_seconds()),
        )


class Me(Answer, json_schema_extra=examples.of(examples.ME)):
    user_id: int | None
    role: Role


class PasswordBody(Body, json_schema_extra=examples.of(examples.PASSWORD)):
    present_password: Password
    new_password: Password


class PresentPasswordBody(Body, json_schema_extra=examples.of(examples.PRESENT_PASSWORD)):
    present_password: Password


class CodeBody(Body, json_schema_extra=examples.of(examples.CODE)):
    code: Code


class CodesAnswer(Answer, json_schema_extra=examples.of(examples.CODES)):
    secret: str = Field(repr=False, description="Base32, for an authenticator app.")
    address: str = Field(repr=False, description="The same as `otpauth://`, for a QR code.")


@router.post("/token", dependencies=[Depends(ANYONE)], responses=problems(401, 422, 429, 503))
async def sign_in(request: Request, form: Annotated[TokenForm, Form()]) -> Token:
    """Sign in with e-mail (as `username`) and password, or renew a sign-in; get bearer tokens."""
    request_id = request.scope["request_id"]
    service = get_auth_service()
    if form.refresh_token is not None and form.grant_type == "refresh_token":
        renew = partial(service.renew, form.refresh_token.get_secret_value(), request_id)
        return Token.of(await to_thread.run_sync(renew))
    begin = partial(
        service.sign_in,
        form.username or "",
        form.password.get_secret_value() if form.password else "",
        form.otp or form.client_secret,
        address=_address(request),
        request_id=request_id,
    )
    return Token.of(await _hashing(begin))


@router.get("/me", responses=problems(401))
def who_am_i(actor: OwnActor) -> Me:
    """Say who the token belongs to."""
    return Me(user_id=actor.user_id, role=actor.role)


@router.post("/logout", status_code=204, responses=problems(401))
def sign_out(session: WriteSession, sign_in: CurrentSignIn, _actor: OwnActor) -> None:
    """End this sign-in: all of its tokens are refused from now on."""
    get_auth_service().sign_out(session, sign_in)


@router.post("/logout/everywhere", status_code=204, responses=problems(401))
def sign_out_everywhere(session: WriteSession, actor: OwnActor) -> None:
    """End every sign-in of this account."""
    get_auth_service().sign_out_everywhere(session, actor)


@router.post("/password", status_code=204, responses=problems(401, 422, 429, 503))
async def change_password(request: Request, body: PasswordBody, actor: OwnActor) -> None:
    """Change one's own password; every sign-in ends, this one too."""
    change = partial(
        get_credential_service().change_password,
        actor,
        body.present_password.get_secret_value(),
        body.new_password.get_secret_value(),
        _address(request),
    )
    await _hashing(change)


@router.post("/codes", status_code=201, responses=problems(401, 403, 409, 422, 429, 503))
async def begin_codes(
    request: Request, body: PresentPasswordBody, actor: FreshActor
) -> CodesAnswer:
    """Get a secret for one-time codes; they are asked for once one of them was confirmed."""
    present = body.present_password.get_secret_value()
    begin = partial(get_credential_service().begin_codes, actor, present, _address(request))
    secret, address = await _hashing(begin)
    return CodesAnswer(secret=secret, address=address)


@router.post("/codes/confirm", status_code=204, responses=problems(401, 409, 422, 429))
def confirm_codes(request: Request, body: CodeBody, actor: FreshActor) -> None:
    """Ask for a one-time code at every sign-in from now on."""
    get_credential_service().confirm_codes(actor, body.code, _address(request))


@router.post("/codes/remove", status_code=204, responses=problems(401, 409, 422, 429))
def remove_codes(request: Request, body: CodeBody, actor: FreshActor) -> None:
    """Ask for no more one-time codes; the present one is needed for that."""
    get_credential_service().remove_codes(actor, body.code, _address(request))


def _address(request: Request) -> str | None:
    return request.client.host if request.client else None


async def _hashing(act: Callable[[], _Result]) -> _Result:
    if _HASHING.statistics().tasks_waiting >= _MAX_WAITING:
        raise UnavailableError("too many are signing in at this moment")
    return await to_thread.run_sync(act, limiter=_HASHING)
