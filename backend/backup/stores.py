"""Opening a store by its address, in whichever process needs it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from backend.backup.storage import LocalStore, Store


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """
    Where a store is: plain values, to be handed to another process.

    Attributes:
        url: A folder, or `s3://bucket/prefix`; credentials come from the environment.
        lock_days: How long a bucket with object lock keeps what is written, against everybody.
    """

    url: str
    endpoint_url: str | None = None
    region: str | None = None
    lock_days: int = 0


def open_store(address: StoreAddress) -> Store:
    """
    Open the store at *address*; nothing is made or asked before it is used.

    Raises:
        ConfigurationError: It is no address of a store.
    """
    return _bucket(address) if address.url.startswith("s3:") else LocalStore(address.url)


# Its client takes a tenth of a second to make, and may be shared.
@lru_cache(maxsize=8)
def _bucket(address: StoreAddress) -> Store:
    # Late: most stores are folders.
    from backend.backup.s3.store import S3Store

    days = timedelta(days=address.lock_days)
    return S3Store(
        address.url,
        endpoint_url=address.endpoint_url,
        region=address.region,
        lock_until=(lambda: datetime.now(UTC) + days) if days else None,
    )
