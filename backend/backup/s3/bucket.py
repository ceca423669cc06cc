"""A bucket asked through boto3: its address, the client, and what its refusals mean here."""

import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import urlsplit

from backend.errors import (
    ConfigurationError,
    ConflictError,
    HoldfastError,
    NotFoundError,
    UnavailableError,
)

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,120}")
# docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET: Final = re.compile(r"(?!.*\.\.)(?!\d+\.\d+\.\d+\.\d+$)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# What needs no escape anywhere; a key has at most 1,024 bytes, and our names 121 of them.
_FOLDER: Final = re.compile(r"(?!\.\.?$)[\w!.*'()-]+", re.ASCII)
_MAX_PREFIX_CHARS: Final = 800

# A dead address is told after three attempts to connect, about ten seconds.
_ATTEMPTS: Final = 3
_CONNECT_SECONDS: Final = 3
_ANSWER_SECONDS: Final = 10
# A slow line may still send what it took from us, and S3 may put thousands of parts together.
_UPLOAD_SECONDS: Final = 60
_UPLOADS: Final = frozenset({"put_object", "upload_part", "complete_multipart_upload"})

_MISSING: Final = frozenset({"NoSuchKey", "NoSuchVersion", "404"})
_CONFLICTS: Final = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,64}")
_SERVER_ERRORS: Final = 500


class BucketRefusedError(UnavailableError):
    """The bucket does not do what it is asked; *reason* is its error code."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the backup store refuses: {reason}")
        self.reason = reason


class BucketFailedError(UnavailableError):
    """The bucket does not answer, or breaks off: what was asked may have been done."""


class BucketUnreachedError(BucketFailedError):
    """The bucket was not asked: there was no connection, or no request to send."""


@dataclass(frozen=True, slots=True)
class BucketAddress:
    """A bucket and what our keys in it begin with: nothing, or folders with a slash at the end."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> Self:
        """
        Read `s3://bucket/prefix`.

        Raises:
            ConfigurationError: It is none; what stands in it may be a secret, and is not shown.
        """
        scheme, _, rest = url.partition("://")
        bucket, *folders = rest.removesuffix("/").split("/")
        if scheme != "s3" or not _BUCKET.fullmatch(bucket):
            raise ConfigurationError("BACKUP_URL: a store in S3 is named s3://bucket/prefix")
        prefix = "".join(f"{folder}/" for folder in folders)
        if not all(map(_FOLDER.fullmatch, folders)) or len(prefix) > _MAX_PREFIX_CHARS:
            raise ConfigurationError(
                "BACKUP_URL: the prefix of a store in S3 has letters, digits and -_.!*'() between "
                "single slashes; credentials come from the environment"
            )
        return cls(bucket, prefix)

    def key(self, name: str) -> str:
        """
        Return the key of an object of ours.

        Raises:
            NotFoundError: *name* can be none.
        """
        if not _NAME.fullmatch(name):
            raise NotFoundError("this is no name of a stored object")
        return self.prefix + name

    def name(self, key: str) -> str | None:
        """Return the name of the object at *key*, or None if it is not one of ours."""
        name = key.removeprefix(self.prefix)
        return name if key.startswith(self.prefix) and _NAME.fullmatch(name) else None


class Bucket:
    """
    Asks one bucket; boto3 finds the credentials as every AWS tool does, at the first question.

    Raises:
        ConfigurationError: The endpoint is no http or https address, or boto3 is not installed.
    """

    def __init__(self, url: str, endpoint_url: str | None, region: str | None) -> None:
        self.address = BucketAddress.of(url)
        self._endpoint_url, self._region = _checked(endpoint_url), region
        try:
            import boto3.session  # Late: slow, and only who stores in S3 installs it.
        except ModuleNotFoundError:
            raise ConfigurationError(
                "backups in S3 need the library boto3: pip install boto3"
            ) from (None)
        self._new_session = boto3.session.Session
        self._clients: tuple[Any, Any] | None = None
        self._making = threading.Lock()
        # At DEBUG it logs the headers of requests, and with them signatures and session tokens.
        logging.getLogger("botocore").setLevel(logging.WARNING)

    def ask(self, operation: str, **parameters: Any) -> Any:
        """
        Call one operation of S3 on this bucket.

        Raises:
            NotFoundError: The object is not there.
            ConflictError: The condition that was set does not hold.
            BucketRefusedError, BucketFailedError: As they say.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            call = getattr(self._client_for(operation), operation)
            return call(Bucket=self.address.bucket, **parameters)
        except (BotoCoreError, ClientError) as err:
            # Its words may name credentials.
            raise meaning(err, self.address.name(parameters.get("Key", ""))) from None

    def pages(self, operation: str, **parameters: Any) -> Iterator[Any]:
        """Call an operation that lists, and yield each page of its answer."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            paginator = self._client_for(operation).get_paginator(operation)
            yield from paginator.paginate(Bucket=self.address.bucket, **parameters)
        except (BotoCoreError, ClientError) as err:
            raise meaning(err, None) from None

    def _client_for(self, operation: str) -> Any:
        with self._making:
            if self._clients is None:
                self._clients = self._make_clients()
        return self._clients[operation in _UPLOADS]

    def _make_clients(self) -> tuple[Any, Any]:
        """Make a client for questions and one for uploads, which may take longer."""
        from botocore.config import Config

        config = Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_ANSWER_SECONDS,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            # We send our own digests, and archives are digested and sealed as a whole: what boto3
            # adds by itself since 1.36 is not understood by every server.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        # A session of our own: the one that boto3 shares is not safe to use in threads.
        session = self._new_session()
        place = {"endpoint_url": self._endpoint_url, "region_name": self._region}
        patient = config.merge(Config(read_timeout=_UPLOAD_SECONDS))
        return tuple(session.client("s3", config=each, **place) for each in (config, patient))


def _checked(endpoint_url: str | None) -> str | None:
    if endpoint_url is None:
        return None
    try:
        parts = urlsplit(endpoint_url)
        usable = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in endpoint_url or "?" in endpoint_url:
        raise ConfigurationError("the endpoint of S3 is no plain http or https address")
    return endpoint_url


def meaning(err: Exception, name: str | None) -> HoldfastError:
    """Say what an exception of boto3 means for us, without its words."""
    from botocore import exceptions as aws

    if isinstance(err, aws.ClientError):
        return _meaning_of_answer(err.response, name)
    kind = type(err).__name__
    if isinstance(err, aws.ConnectionError):
        return BucketUnreachedError(f"the backup store does not answer ({kind})")
    if isinstance(
        err, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError
    ):
        return BucketUnreachedError(
            "the backup store cannot be asked: no AWS credentials are found"
        )
    if isinstance(err, aws.HTTPClientError | aws.IncompleteReadError):
        return BucketFailedError(f"the backup store does not answer ({kind})")
    return BucketUnreachedError(f"the backup store cannot be asked ({kind})")


def _meaning_of_answer(answer: Any, name: str | None) -> HoldfastError:
    said = str(answer["Error"]["Code"])
    code = said if _CODE.fullmatch(said) else "an unknown error"
    if code in _MISSING:
        return NotFoundError(f"{name or 'it'} is not in the backup store")
    if code in _CONFLICTS:
        return ConflictError(f"{name or 'it'} is already stored")
    if answer["ResponseMetadata"]["HTTPStatusCode"] >= _SERVER_ERRORS:
        return BucketFailedError(f"the backup store fails: {code}")
    return BucketRefusedError(code)
