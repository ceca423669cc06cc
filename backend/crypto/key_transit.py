"""The transit engine of OpenBao or HashiCorp Vault, as a wrapper of our encryption key."""

import base64
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from backend.crypto.key_access import (
    SERVER_ERRORS,
    KeyServiceRefusedError,
    KeyServices,
    KeyServiceUnavailableError,
    required,
)
from backend.errors import HoldfastError

_OK: Final = 200
_NOT_FOUND: Final = 404


class Transit:
    """
    The transit engine of OpenBao or Vault.

    Source: openbao.org/api-docs/secret/transit and /api-docs (status codes).
    """

    name = "OpenBao or Vault"
    # A replica that lags, a quota, and standbys that answer for themselves.
    _BUSY: Final = frozenset({412, 429, 472, 473})
    _STANDBY: Final = 307

    def __init__(self, services: KeyServices) -> None:
        address = required("VAULT_ADDR", services.vault_addr)
        token = required("VAULT_TOKEN", services.vault_token)
        self._where = {
            "name": required("VAULT_TRANSIT_KEY", services.vault_transit_key),
            "mount_point": required("VAULT_TRANSIT_MOUNT", services.vault_transit_mount),
        }
        if services.vault_cacert and not Path(services.vault_cacert).is_file():
            raise KeyServiceRefusedError("VAULT_CACERT names no file")
        try:
            import hvac.adapters  # Late: only who uses the service installs it.
        except ModuleNotFoundError:
            raise KeyServiceRefusedError(
                "OpenBao and Vault need the library hvac: pip install hvac"
            ) from None
        self._client = hvac.Client(
            url=address,
            token=token,
            namespace=services.vault_namespace,
            verify=str(services.vault_cacert) if services.vault_cacert else True,
            timeout=services.timeout_seconds,
            # A redirect would carry the token to a host that nobody has configured.
            allow_redirects=False,
            adapter=hvac.adapters.RawAdapter,
            ignore_exceptions=True,
        )

    def open(self, text: str) -> bytes:
        with closing(self._client.adapter):
            answer = self._client.secrets.transit.decrypt_data(ciphertext=text, **self._where)
            self._check(answer)
            return base64.b64decode(answer.json()["data"]["plaintext"], validate=True)

    def seal(self, key: bytes) -> str:
        with closing(self._client.adapter):
            transit = self._client.secrets.transit
            # `encrypt` makes a key that does not exist: a mistyped name would get one of its own.
            # A token that may not look (403) may still encrypt.
            found = transit.read_key(**self._where)
            if found.status_code == _NOT_FOUND:
                self._check(found)
            text = base64.b64encode(key).decode()
            answer = transit.encrypt_data(plaintext=text, **self._where)
            self._check(answer)
            return str(answer.json()["data"]["ciphertext"])

    def _check(self, answer: Any) -> None:
        status: int = answer.status_code
        if status == _OK:
            return
        if status in self._BUSY or status == self._STANDBY or status >= SERVER_ERRORS:
            raise KeyServiceUnavailableError(
                f"{self.name} is sealed, a standby or overloaded (HTTP {status})"
            )
        if "json" not in answer.headers.get("Content-Type", ""):
            raise KeyServiceRefusedError(
                f"what answers at VAULT_ADDR is not {self.name} (HTTP {status})"
            )
        if status == _NOT_FOUND or "key not found" in answer.text:
            raise KeyServiceRefusedError(
                "VAULT_TRANSIT_KEY names no key there; "
                "VAULT_TRANSIT_MOUNT and VAULT_NAMESPACE say where it is looked for"
            )
        raise KeyServiceRefusedError(
            {
                400: "the key in VAULT_TRANSIT_KEY does not open or make this: the wrapped key is "
                "damaged, too old or of another key, or that key wants a context",
                403: "VAULT_TOKEN is refused: it is wrong or expired, or its policy lacks `update` "
                f"on {self._where['mount_point']}/decrypt/{self._where['name']}",
            }.get(status, f"{self.name} refuses with HTTP {status}")
        )

    def explain(self, err: Exception) -> HoldfastError:
        from requests import exceptions as on_the_way  # What hvac speaks HTTP with.

        if isinstance(err, on_the_way.SSLError):
            return KeyServiceRefusedError(
                f"the certificate of {self.name} is not trusted, or VAULT_ADDR is no HTTPS "
                "address: VAULT_CACERT names the file of its authority"
            )
        cut = (on_the_way.ConnectionError, on_the_way.Timeout, on_the_way.ChunkedEncodingError)
        if isinstance(err, cut):
            return KeyServiceUnavailableError(f"{self.name} does not answer at VAULT_ADDR")
        return KeyServiceRefusedError(
            f"{self.name} cannot be asked ({type(err).__name__}): "
            "check VAULT_ADDR, VAULT_TOKEN and VAULT_NAMESPACE"
        )
