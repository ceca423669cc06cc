"""One-time codes of six digits that an authenticator app shows (TOTP, RFC 6238)."""

from datetime import datetime
from typing import Final

import pyotp

_STEP_SECONDS: Final = 30
_DIGITS: Final = 6
# A clock may be off by one step (RFC 6238, 5.2).
_STEPS_OFF: Final = 1


def new_secret() -> str:
    """Return a random secret of 160 bits, in base32 (RFC 4226, 4, R6)."""
    return pyotp.random_base32()


def address(secret: str, account: str) -> str:
    """Return the `otpauth://` address that an app reads the secret from, as a QR code."""
    return pyotp.TOTP(secret).provisioning_uri(name=account, issuer_name="Holdfast")


def step_of(code: str, secret: str, now: datetime) -> int | None:
    """
    Return the step of 30 seconds that *code* belongs to, `None` if it is wrong or too old.

    Of no *secret* every code is wrong.

    Whoever takes a code keeps its step and takes none of the same or an earlier one again: a code
    that was looked at over somebody's shoulder is worth nothing (RFC 6238, 5.2).
    """
    if not secret or not (len(code) == _DIGITS and code.isascii() and code.isdigit()):
        return None
    one_time = pyotp.TOTP(secret, interval=_STEP_SECONDS, digits=_DIGITS)
    current = int(now.timestamp()) // _STEP_SECONDS
    steps = range(max(0, current - _STEPS_OFF), current + _STEPS_OFF + 1)
    # All are compared, so that the time does not tell which one it was.
    fitting = [
        step for step in steps if pyotp.utils.strings_equal(one_time.generate_otp(step), code)
    ]
    return fitting[-1] if fitting else None
