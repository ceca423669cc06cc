"""
Key services: OpenBao, HashiCorp Vault or AWS KMS keep the key that opens our encryption key.

`ENCRYPTION_KEY` may then hold a wrapped key, which is of no use without the service:

    vault:v1:BASE64     what the transit engine of OpenBao or Vault prints; v1: its key's version
    aws-kms:BASE64      a CiphertextBlob of AWS KMS, made with the context purpose=holdfast

A service is asked once, for a limited time. One that is down stops the work: nothing stands in
for it, and no key is made instead.
"""

import base64
import re
from collections.abc import Callable
from concurrent.futures import Future
from enum import StrEnum
from functools import partial
from threading import Thread
from typing import Final, Protocol, TypeVar

from backend.crypto.key_access import (
    KeyServiceRefusedError,
    KeyServices,
    KeyServiceUnavailableError,
)
from backend.crypto.key_kms import Kms
from backend.crypto.key_transit import Transit
from backend.crypto.keyring import KEY_BYTES, parse_key
from backend.errors import HoldfastError, KeyFormatError

__all__ = [
    "KeyService",
    "KeyServiceRefusedError",
    "KeyServiceUnavailableError",
    "KeyServices",
    "is_wrapped",
    "unwrap",
    "wrap",
]

# 8192 characters hold the largest CiphertextBlob, 6144 bytes (AWS KMS API reference, Decrypt).
_WRAPPED: Final = re.compile(
    r"(?:vault:v[1-9][0-9]{0,8}|aws-kms):[A-Za-z0-9+/]{1,8192}={0,2}", re.ASCII
)


class KeyService(StrEnum):
    """Services that wrap keys; the value is the prefix of what they wrapped."""

    VAULT = "vault"
    AWS_KMS = "aws-kms"


def is_wrapped(text: str) -> bool:
    """Say whether *text* is meant as a wrapped key; no spelling of a key has a colon."""
    return _bare(text).startswith(tuple(f"{service}:" for service in KeyService))


def unwrap(text: str, services: KeyServices) -> bytes:
    """
    Have the service open a wrapped key.

    Returns:
        The 32 bytes of the key.

    Raises:
        KeyServiceUnavailableError: No answer within `timeout_seconds`, sealed, or overloaded.
        KeyServiceRefusedError: A setting or library is missing, the credentials are refused, the
            key is unknown, *text* is damaged or of another key, or it does not hold 32 bytes.
        KeyFormatError: The 32 bytes are not random.
    """
    service = _service_of(text)
    wrapper = _WRAPPERS[service](services)
    key = _ask(wrapper, partial(wrapper.open, _bare(text)), services.timeout_seconds)
    if len(key) != KEY_BYTES:
        raise KeyServiceRefusedError(
            f"an encryption key has {KEY_BYTES} bytes; this wrapped one holds {len(key)}"
        )
    # What is refused as a key is refused wrapped, too.
    return parse_key(base64.b64encode(key).decode())


def wrap(key: bytes, service: KeyService, services: KeyServices) -> str:
    """
    Have *service* wrap *key*, in the form that `ENCRYPTION_KEY` accepts.

    Raises:
        KeyFormatError: *key* does not have 32 bytes.
        KeyServiceUnavailableError: No answer within `timeout_seconds`, sealed, or overloaded.
        KeyServiceRefusedError: A setting or library is missing, the credentials are refused, or
            the key is unknown or does not encrypt.
    """
    if len(key) != KEY_BYTES:
        raise KeyFormatError(f"an encryption key has {KEY_BYTES} bytes; this one has {len(key)}")
    wrapper = _WRAPPERS[service](services)
    wrapped = _ask(wrapper, partial(wrapper.seal, key), services.timeout_seconds)
    # What is handed out will be read back.
    _service_of(wrapped)
    return wrapped


def _bare(text: str) -> str:
    return text.strip().strip("\"'").strip()


def _service_of(text: str) -> KeyService:
    if not _WRAPPED.fullmatch(_bare(text)):
        raise KeyServiceRefusedError(
            "a wrapped key is vault:v1:BASE64 or aws-kms:BASE64; this one is cut or damaged"
        )
    return KeyService(_bare(text).partition(":")[0])


class _Wrapper(Protocol):
    """A service, found and not yet asked."""

    name: str

    def open(self, text: str) -> bytes: ...

    def seal(self, key: bytes) -> str: ...

    def explain(self, err: Exception) -> HoldfastError:
        """Say in our words what *err*, which a library raised, means to an operator."""


_Answer = TypeVar("_Answer", str, bytes)


def _ask(wrapper: _Wrapper, question: Callable[[], _Answer], seconds: float) -> _Answer:
    """
    Wait for the answer, and never longer than *seconds*.

    The timeouts of the libraries are per address and per packet, and looking up a name has none;
    so the question is asked in a thread that may be left behind.
    """
    answer: Future[_Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(question())
        except HoldfastError as err:
            answer.set_exception(err)
        except Exception as err:  # noqa: BLE001 - the edge of this thread
            # Made anew, not raised from *err*: its words may hold a token or a key.
            answer.set_exception(wrapper.explain(err))

    Thread(target=work, name=f"ask {wrapper.name}", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise KeyServiceUnavailableError(
            f"{wrapper.name} has not answered within {seconds:g} s"
        ) from None


_WRAPPERS: Final[dict[KeyService, Callable[[KeyServices], _Wrapper]]] = {
    KeyService.VAULT: Transit,
    KeyService.AWS_KMS: Kms,
}
