"""
Who may call which route: every one declares it, or the application is not built.

What is whose is asked in the endpoint (`require_self_or_admin`); here is asked for rights.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from backend.api.dependencies import CurrentSignIn
from backend.api.problems import invalid
from backend.errors import ForbiddenError, StaleSignInError
from backend.models import Role
from backend.services import approval_service
from backend.services.approval_service import get_approval_service
from backend.services.audit_service import Actor
from backend.settings import get_settings


class Anyone:
    """A route that needs no token: probes, the API page, sign-in."""

    async def __call__(self) -> None:
        """Let everybody through."""


class Permit:
    """
    A route for those who are signed in with one of *roles*; without any, with whichever.

    Args:
        fresh: Who asks has to have signed in lately.
        grave: The act cannot be undone, or decides on many people's data: the sign-in has to be
            fresh, and where `SECOND_ADMIN` is set another admin has to approve.
    """

    def __init__(self, *roles: Role, fresh: bool = False, grave: bool = False) -> None:
        self.roles = frozenset(roles) or frozenset(Role)
        self.fresh = fresh or grave
        self.grave = grave

    async def __call__(self, request: Request, signed_in: CurrentSignIn) -> Actor:
        """
        Return who asks.

        Raises:
            ForbiddenError: Not with these rights.
            StaleSignInError: The sign-in is too long ago.
            ApprovalNeededError: A second admin has to approve first.
            TooManyWaitingError: As many requests as are kept wait for that already.
            RequestValidationError: The body is not what the route takes.
        """
        actor = signed_in.actor
        if actor.role not in self.roles:
            raise ForbiddenError(f"only {self._names} may do this")
        if self.fresh:
            limit = timedelta(minutes=get_settings().step_up_minutes)
            if datetime.now(UTC) - signed_in.sign_in.at > limit:
                raise StaleSignInError("this needs a sign-in of the last minutes: sign in again")
        if self.grave and get_settings().second_admin:
            await _require_approval(request, actor)
        return actor

    @property
    def _names(self) -> str:
        return " or ".join(f"an {role}" for role in sorted(self.roles))


ANYONE: Final = Anyone()
# Every role may what is one's own; the endpoint asks whose it is.
OwnActor = Annotated[Actor, Depends(Permit())]
FreshActor = Annotated[Actor, Depends(Permit(fresh=True))]
AdminActor = Annotated[Actor, Depends(Permit(Role.ADMIN))]
FreshAdminActor = Annotated[Actor, Depends(Permit(Role.ADMIN, fresh=True))]
GraveAdminActor = Annotated[Actor, Depends(Permit(Role.ADMIN, grave=True))]
# Runs backups and retention, and is nobody to whom personal data is shown.
RunnerActor = Annotated[Actor, Depends(Permit(Role.ADMIN, Role.OPERATOR))]
GraveRunnerActor = Annotated[Actor, Depends(Permit(Role.ADMIN, Role.OPERATOR, grave=True))]
# Reads what was done, and changes nothing.
ReaderActor = Annotated[Actor, Depends(Permit(Role.ADMIN, Role.AUDITOR))]
# What runners need to see, and auditors too.
ObserverActor = Annotated[Actor, Depends(Permit(Role.ADMIN, Role.OPERATOR, Role.AUDITOR))]


def require_declared(router: APIRouter) -> None:
    """
    Refuse a router with a route that says not, or twice, who may call it.

    Raises:
        TypeError: Names the route.
    """
    for route in router.routes:
        if not isinstance(route, APIRoute) or len(list(_policies(route.dependant))) != 1:
            raise TypeError(f"{getattr(route, 'path', route)} does not declare who may call it")


def _policies(dependant: Dependant) -> Iterator[Anyone | Permit]:
    if isinstance(dependant.call, Anyone | Permit):
        yield dependant.call
    for needed in dependant.dependencies:
        yield from _policies(needed)


async def _require_approval(request: Request, actor: Actor) -> None:
    body, is_dry_run = await _asked(request)
    if not is_dry_run:
        waiting = approval_service.Request(_act(request), body)
        await run_in_threadpool(get_approval_service().require, actor, waiting)


async def _asked(request: Request) -> tuple[str, bool]:
    """Return the body, and whether it asks for a dry run; nobody approves one that is none."""
    field = request.scope["route"].body_field
    if field is None:
        # What comes along with an act that takes no body says nothing, and is not read.
        return "", False
    value = await request.json() if await request.body() else None
    # FastAPI itself looks at a body after who sends it.
    asked, errors = field.validate(value, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    # Without what is between the words, of which a body may be full.
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return body, getattr(asked, "dry_run", False)


def _act(request: Request) -> str:
    """Name method and path; the path is not checked yet, and the record keeps it."""
    try:
        ids = {name: UUID(value) for name, value in request.path_params.items()}
    except ValueError:
        raise invalid("path", "Input should be a valid UUID") from None
    return f"{request.method} {request.scope['route'].path.format(**ids)}"
