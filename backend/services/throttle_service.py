"""
Throttling of guessed passwords, without letting whoever guesses lock a person out.

Failures are counted for an account as tried from one address, for an address, and for an account.
An address of IPv6 is its network, and counted with its site's as well. None of the counts closes
an account: where many addresses guess at one, each of them has fewer tries, and a person at an
address from which they signed in before has as many as always.
"""

import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import structlog
from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.errors import ConfigurationError as LimitsConfigurationError
from limits.errors import StorageError
from limits.storage import RedisStorage, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from backend.crypto import keyring
from backend.crypto.blind_index import normalise_email
from backend.errors import ConfigurationError, TooManyAttemptsError, UnavailableError
from backend.settings import MAX_EMAIL_CHARS, get_settings
from backend.web_addresses import carried

log = structlog.get_logger(__name__)
# NIST SP 800-63B, 5.2.2: no more than 100 failures in a row on one account.
_ACCOUNT: Final = RateLimitItemPerHour(100, 1, "account")
_PAIR: Final = RateLimitItemPerMinute(10, 15, "pair")
_PAIR_UNDER_ATTACK: Final = RateLimitItemPerMinute(3, 15, "attacked-pair")
_ADDRESS: Final = RateLimitItemPerMinute(50, 15, "address")
# A site may be a household, or the many that a provider has given a network each, whom one
# guesser must not close it to: it has more tries than a network.
_SITE_PAIR: Final = RateLimitItemPerMinute(20, 15, "site-pair")
_SITE: Final = RateLimitItemPerMinute(200, 15, "site")
# An address from which somebody signed in stays known for so long.
_KNOWN: Final = RateLimitItemPerDay(1, 30, "known")
# Whoever has one IPv6 address has all of its network, and a site has up to 2**16 of them
# (RFC 4291, 2.5.4; RFC 6177, 2).
_NETWORK_PREFIX: Final = 64
_SITE_PREFIX: Final = 48
# How long a store may take to take a connection, and to answer.
_STORE_SECONDS: Final = 2.0
_Counted = tuple[RateLimitItem, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Try:
    """Who is tried from where, in names that tell a shared store nothing."""

    account: str
    address: str
    site: str | None

    @property
    def pairs(self) -> tuple[_Counted, _Counted]:
        pair = (self.account, self.address)
        return (_PAIR, pair), (_PAIR_UNDER_ATTACK, pair)

    @property
    def counted(self) -> Iterator[_Counted]:
        """All that a wrong password counts for."""
        yield from self.pairs
        yield _ACCOUNT, (self.account,)
        yield _ADDRESS, (self.address,)
        yield from self._of_site

    def limits(self, counts: FixedWindowRateLimiter) -> Iterator[_Counted]:
        """What a try is held against; where somebody is known, that address's own count alone."""
        pair, pair_under_attack = self.pairs
        yield pair
        if not counts.test(_KNOWN, self.account, self.address):
            return
        yield _ADDRESS, (self.address,)
        yield from self._of_site
        if not counts.test(_ACCOUNT, self.account):
            yield pair_under_attack

    @property
    def _of_site(self) -> Iterator[_Counted]:
        if self.site is not None:
            yield _SITE_PAIR, (self.account, self.site)
            yield _SITE, (self.site,)


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
        tried = _try(account, address)
        with _counts() as counts:
            for item, names in tried.limits(counts):
                if not counts.test(item, *names):
                    until = counts.get_window_stats(item, *names).reset_time
                    log.warning("sign_in_throttled", limit=item.namespace)
                    raise TooManyAttemptsError(
                        "too many wrong passwords: try again later",
                        retry_after_seconds=max(1, round(until - time.time())),
                    )

    def failed(self, account: str, address: str | None) -> None:
        """Count a wrong password."""
        tried = _try(account, address)
        with _counts() as counts:
            for item, names in tried.counted:
                counts.hit(item, *names)

    def succeeded(self, account: str, address: str | None) -> None:
        """Forget what was wrong before, and know the address from now on."""
        tried = _try(account, address)
        with _counts() as counts:
            for item, names in tried.pairs:
                counts.clear(item, *names)
            counts.clear(_KNOWN, tried.account, tried.address)
            counts.hit(_KNOWN, tried.account, tried.address)

    def prepare(self) -> None:
        """
        Get ready to count; whether a server answers shows at readiness.

        Raises:
            ConfigurationError: `THROTTLE_STORE` cannot be what counts.
        """
        _limiter(get_settings().throttle_store.get_secret_value())

    def is_answering(self) -> bool:
        """Say whether failures can be counted now."""
        try:
            return _limiter(get_settings().throttle_store.get_secret_value()).storage.check()
        except ConfigurationError:
            return False


@contextmanager
def _counts() -> Iterator[FixedWindowRateLimiter]:
    try:
        yield _limiter(get_settings().throttle_store.get_secret_value())
    # What is wrong with a setting is told at the start, and not to whoever signs in.
    except (StorageError, ConfigurationError):
        raise UnavailableError("what counts wrong passwords does not answer now") from None


@lru_cache(maxsize=1)
def _limiter(uri: str) -> FixedWindowRateLimiter:
    timeouts = {}
    if uri.startswith("redis"):
        timeouts = {"socket_timeout": _STORE_SECONDS, "socket_connect_timeout": _STORE_SECONDS}
    try:
        storage = storage_from_string(uri, wrap_exceptions=True, **timeouts)
        if isinstance(storage, RedisStorage):
            # Connects to nothing, and refuses options that are none.
            storage.storage.connection_pool.make_connection()
    except LimitsConfigurationError:
        raise ConfigurationError("THROTTLE_STORE: install the package redis") from None
    except (ValueError, TypeError):
        raise ConfigurationError("THROTTLE_STORE: not the address of a Redis server") from None
    return FixedWindowRateLimiter(storage)


def _name(kind: str, value: str) -> str:
    """Name an account or address so that a shared store learns neither."""
    return keyring.current().primary.derive("throttle", kind, value, size=16).hex()


def _account(account: str) -> str:
    # What is not looked up is nobody's, and counted as one account; what is, by the spelling
    # that it is found by, or another spelling of one account would be counted apart.
    looked_up = len(account) <= MAX_EMAIL_CHARS and account.isprintable()
    return _name("account", normalise_email(account) if looked_up else "")


def _try(account: str, address: str | None) -> _Try:
    who = _account(account)
    try:
        found = carried(ipaddress.ip_address(address or ""))
    except ValueError:
        return _Try(who, _name("address", address or "local"), None)
    if isinstance(found, ipaddress.IPv4Address):
        return _Try(who, _name("address", str(found)), None)
    network, site = (
        _name("address", str(ipaddress.ip_network((int(found), prefix), strict=False)))
        for prefix in (_NETWORK_PREFIX, _SITE_PREFIX)
    )
    return _Try(who, network, site)


@lru_cache(maxsize=1)
def get_throttle_service() -> ThrottleService:
    return ThrottleService()
