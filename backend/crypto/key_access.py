"""What asking a key service takes: where it is, and what may come of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from backend.errors import ConfigurationError, UnavailableError

# RFC 9110, 15.6: statuses from here on are the server's own failures.
SERVER_ERRORS: Final = 500


class KeyServiceUnavailableError(UnavailableError):
    """The service that opens the encryption key does not answer now, is sealed or overloaded."""

    code, title = "key_service_unavailable", "The key service does not answer"


class KeyServiceRefusedError(ConfigurationError):
    """The service does not open or make this wrapped key, and trying again will not help."""

    code, title = "key_service_refused", "The key service refuses"


@dataclass(frozen=True, slots=True)
class KeyServices:
    """
    Where the services are, each under the name that its own tools use.

    The credentials of AWS are not here: boto3 finds them as every AWS tool does (environment,
    `~/.aws`, the role of the machine).
    """

    vault_addr: str | None = None
    vault_token: str | None = field(default=None, repr=False)
    vault_namespace: str | None = None
    vault_cacert: str | Path | None = None
    vault_transit_mount: str = "transit"
    vault_transit_key: str | None = None
    aws_region: str | None = None
    aws_endpoint_url: str | None = None
    aws_kms_key_id: str | None = None
    timeout_seconds: float = 5


def required(name: str, value: str | None) -> str:
    """
    Return the value of a setting that the service cannot be asked without.

    Raises:
        KeyServiceRefusedError: It is empty; the message names the variable.
    """
    if not value:
        raise KeyServiceRefusedError(f"{name} is not set; the wrapped key needs it")
    return value
