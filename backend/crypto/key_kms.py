"""AWS KMS as a wrapper of our encryption key."""

import base64
import binascii
import logging
from contextlib import closing
from typing import Any, Final

from backend.crypto.key_access import (
    SERVER_ERRORS,
    KeyServiceRefusedError,
    KeyServices,
    KeyServiceUnavailableError,
    required,
)
from backend.errors import HoldfastError

PREFIX: Final = "aws-kms:"
# Binds a wrapped key to its use: KMS opens it for no other purpose, and its log names this one.
CONTEXT: Final = {"purpose": "holdfast"}


class Kms:
    """
    AWS KMS.

    Source: docs.aws.amazon.com/kms/latest/APIReference, Encrypt, Decrypt and CommonErrors.
    """

    name = "AWS KMS"
    _BUSY: Final = frozenset(
        {"ThrottlingException", "Throttling", "RequestLimitExceeded", "TooManyRequestsException"}
    )
    _DAMAGED: Final = (
        "the key in AWS_KMS_KEY_ID does not open this: the wrapped key is damaged, of another "
        "key, or made without the encryption context purpose=holdfast"
    )
    _CREDENTIALS: Final = "the AWS credentials are missing, wrong or expired"
    _TOO_MANY: Final = 429
    _UNKNOWN_CALLER: Final = frozenset({401, 403})
    _REFUSALS: Final = {
        "InvalidCiphertextException": _DAMAGED,
        "IncorrectKeyException": _DAMAGED,
        "NotFoundException": "AWS_KMS_KEY_ID names no key in AWS_REGION",
        "AccessDeniedException": "the AWS credentials may not use the key in AWS_KMS_KEY_ID",
        "DisabledException": "the key in AWS_KMS_KEY_ID is disabled",
        "KMSInvalidStateException": "the key in AWS_KMS_KEY_ID is disabled or to be deleted",
        "UnrecognizedClientException": _CREDENTIALS,
        "InvalidClientTokenId": _CREDENTIALS,
        "InvalidSignatureException": _CREDENTIALS,
        "ExpiredTokenException": _CREDENTIALS,
    }

    def __init__(self, services: KeyServices) -> None:
        self._services = services
        self._region = required("AWS_REGION", services.aws_region)
        # Named for opening too: KMS would otherwise take whichever key the blob names.
        self._key_id = required("AWS_KMS_KEY_ID", services.aws_kms_key_id)
        if not (services.aws_endpoint_url or "https://").startswith(("https://", "http://")):
            raise KeyServiceRefusedError("AWS_ENDPOINT_URL is no http or https address")
        try:
            import boto3.session  # Late: slow, and only who uses the service installs it.
        except ModuleNotFoundError:
            raise KeyServiceRefusedError(
                "AWS KMS needs the library boto3: pip install boto3"
            ) from None
        self._new_session = boto3.session.Session
        # At DEBUG it logs the bodies of requests and answers, and with them the key.
        logging.getLogger("botocore").setLevel(logging.WARNING)

    def open(self, text: str) -> bytes:
        blob = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        with closing(self._client()) as kms:
            answer = kms.decrypt(CiphertextBlob=blob, KeyId=self._key_id, EncryptionContext=CONTEXT)
            return bytes(answer["Plaintext"])

    def seal(self, key: bytes) -> str:
        with closing(self._client()) as kms:
            answer = kms.encrypt(Plaintext=key, KeyId=self._key_id, EncryptionContext=CONTEXT)
            return PREFIX + base64.b64encode(answer["CiphertextBlob"]).decode()

    def _client(self) -> Any:
        """Find the credentials, which may ask the machine's own service for them."""
        from botocore.config import Config

        return self._new_session().client(
            "kms",
            region_name=self._region,
            endpoint_url=self._services.aws_endpoint_url,
            config=Config(
                connect_timeout=self._services.timeout_seconds,
                read_timeout=self._services.timeout_seconds,
                retries={"total_max_attempts": 1},
            ),
        )

    def explain(self, err: Exception) -> HoldfastError:
        from botocore import exceptions as aws

        if isinstance(err, aws.ClientError):
            return self._explain_answer(err.response)
        if isinstance(err, aws.SSLError):
            return KeyServiceRefusedError(f"the certificate of {self.name} is not trusted")
        if isinstance(err, aws.ConnectionError | aws.HTTPClientError | aws.MetadataRetrievalError):
            return KeyServiceUnavailableError(f"{self.name} does not answer")
        if isinstance(err, aws.NoCredentialsError | aws.PartialCredentialsError):
            return KeyServiceRefusedError(self._CREDENTIALS)
        if isinstance(err, binascii.Error):
            return KeyServiceRefusedError("the wrapped key is cut or damaged")
        return KeyServiceRefusedError(
            f"{self.name} cannot be asked ({type(err).__name__}): check AWS_REGION, "
            "AWS_ENDPOINT_URL, AWS_KMS_KEY_ID and the AWS credentials"
        )

    def _explain_answer(self, answer: Any) -> HoldfastError:
        status: int = answer["ResponseMetadata"]["HTTPStatusCode"]
        code = str(answer["Error"]["Code"])
        if status == self._TOO_MANY or status >= SERVER_ERRORS or code in self._BUSY:
            return KeyServiceUnavailableError(f"{self.name} is overloaded (HTTP {status})")
        unnamed = (
            self._CREDENTIALS
            if status in self._UNKNOWN_CALLER
            else f"{self.name} refuses with HTTP {status}"
        )
        return KeyServiceRefusedError(self._REFUSALS.get(code, unnamed))
