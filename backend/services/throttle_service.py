"""
Throttling of guessed passwords, without letting whoever guesses lock a person out.

Failures are counted for an account as tried from one address, for an address, and for an account.
None of the counts closes an account: where many addresses guess at one, each of them has fewer
tries, and a person at an address from which they signed in before has as many as always.
"""

import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

import structlog
from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.errors import StorageError
from limits.storage import storage_from_string
from limits.strategies import FixedWindowRateLimiter

from backend.crypto import keyring
from backend.crypto.blind_index import normalise_email
from backend.errors import ConfigurationError, TooManyAttemptsError, UnavailableError
from backend.settings import MAX_EMAIL_CHARS, get_settings

log = structlog.get_logger(__name__)
# NIST SP 800-63B, 5.2.2: no more than 100 failures in a row on one account.
_ACCOUNT: Final = RateLimitItemPerHour(100, 1, "account")
_PAIR: Final = RateLimitItemPerMinute(10, 15, "pair")
_PAIR_UNDER_ATTACK: Final = RateLimitItemPerMinute(3, 15, "attacked-pair")
_ADDRESS: Final = RateLimitItemPerMinute(50, 15, "address")
# An address from which somebody signed in stays known for so long.
_KNOWN: Final = RateLimitItemPerDay(1, 30, "known")
# Whoever has one IPv6 address has all of its network (RFC 6177).
_IPV6_PREFIX: Final = 64


class ThrottleService:
    """Counts failures in this process, or in Redis for all replicas."""

    def require_allowed(self, account: str, address: str | None) -> None:
        """
        Refuse a try before the password is looked at.

        Args:
            account: E-mail address as it was given; whether it exists does not matter.
            address: Of the caller; `None` where there is none, as on a local socket.

        Raises:
            TooManyAttemptsError: With the time until the next try.
            UnavailableError: The counts cannot be read.
        """
        who, where = _account(account), _address(address)
        with _counts() as counts:
            known = not counts.test(_KNOWN, who, where)
            limits: list[tuple[RateLimitItem, tuple[str, ...]]] = [(_PAIR, (who, where))]
            if not known:
                limits.append((_ADDRESS, (where,)))
                if not counts.test(_ACCOUNT, who):
                    limits.append((_PAIR_UNDER_ATTACK, (who, where)))
            for item, names in limits:
                if not counts.test(item, *names):
                    until = counts.get_window_stats(item, *names).reset_time
                    log.warning("sign_in_throttled", limit=item.namespace)
                    raise TooManyAttemptsError(
                        "too many wrong passwords: try again later",
                        retry_after_seconds=max(1, round(until - time.time())),
                    )

    def failed(self, account: str, address: str | None) -> None:
        """Count a wrong password."""
        who, where = _account(account), _address(address)
        with _counts() as counts:
            counts.hit(_PAIR, who, where)
            counts.hit(_PAIR_UNDER_ATTACK, who, where)
            counts.hit(_ADDRESS, where)
            counts.hit(_ACCOUNT, who)

    def succeeded(self, account: str, address: str | None) -> None:
        """Forget what was wrong before, and know the address from now on."""
        who, where = _account(account), _address(address)
        with _counts() as counts:
            counts.clear(_PAIR, who, where)
            counts.clear(_PAIR_UNDER_ATTACK, who, where)
            counts.clear(_KNOWN, who, where)
            counts.hit(_KNOWN, who, where)


@contextmanager
def _counts() -> Iterator[FixedWindowRateLimiter]:
    try:
        yield _limiter(get_settings().throttle_store.get_secret_value())
    except StorageError:
        raise UnavailableError("what counts wrong passwords does not answer now") from None


@lru_cache(maxsize=1)
def _limiter(uri: str) -> FixedWindowRateLimiter:
    try:
        return FixedWindowRateLimiter(storage_from_string(uri, wrap_exceptions=True))
    except LimitsConfigurationError:
        raise ConfigurationError("THROTTLE_STORE: install the package redis") from None


def _name(kind: str, value: str) -> str:
    """Name an account or address so that a shared store learns neither."""
    return keyring.current().primary.derive("throttle", kind, value, size=16).hex()


def _account(account: str) -> str:
    # What is not looked up is nobody's, and counted as one account; what is, by the spelling
    # that it is found by, or another spelling of one account would be counted apart.
    looked_up = len(account) <= MAX_EMAIL_CHARS and account.isprintable()
    return _name("account", normalise_email(account) if looked_up else "")


def _address(address: str | None) -> str:
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return _name("address", address or "local")
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    if mapped is None and isinstance(found, ipaddress.IPv6Address):
        network = ipaddress.ip_network((found, _IPV6_PREFIX), strict=False)
        return _name("address", str(network))
    return _name("address", str(mapped or found))


@lru_cache(maxsize=1)
def get_throttle_service() -> ThrottleService:
    return ThrottleService()
