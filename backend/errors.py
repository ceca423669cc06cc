"""One tree of errors: each class carries the HTTP status and the stable code it answers with."""

from typing import Any, ClassVar


class HoldfastError(Exception):
    """
    Anything Holdfast refuses or fails to do.

    The message is shown to callers as it is: it carries ids only, never personal data, keys or
    tokens. *extra* becomes further members of the problem document (RFC 9457, 3.2).
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Something went wrong"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


class ConfigurationError(HoldfastError):
    """A setting, key or file on this machine keeps the service from working; exit code 2."""

    status, code, title = 503, "configuration_error", "The configuration is not usable"


class RefusedError(HoldfastError):
    """The request is understood and not acceptable."""

    status, code, title = 422, "refused", "The request was refused"


class InvalidRequestError(RefusedError):
    """The request does not have the form that is described for it."""

    code, title = "invalid_request", "The request is not valid"


class BodyTooLargeError(HoldfastError):
    """The body of the request is longer than its route takes."""

    status, code, title = 413, "content_too_large", "The request is too large"


class RequestTimeoutError(HoldfastError):
    """The request did not arrive in time."""

    status, code, title = 408, "request_timeout", "The request took too long to arrive"


class HeadTooLargeError(HoldfastError):
    """The request's line and headers are longer than any that make sense here."""

    status, code = 431, "request_header_fields_too_large"
    title = "The headers are too large"


class MalformedRequestError(HoldfastError):
    """What was sent is no HTTP."""

    status, code, title = 400, "bad_request", "The request is malformed"


class UnsupportedMediaTypeError(HoldfastError):
    """The body of the request is not said to be of the type that its route takes."""

    status, code, title = 415, "unsupported_media_type", "The type of the body is not supported"


class NotFoundError(HoldfastError):
    """What the request names does not exist."""

    status, code, title = 404, "not_found", "Not found"


class SubjectNotFoundError(NotFoundError):
    """No person has this id."""

    code = "subject_not_found"


class SubjectErasedError(HoldfastError):
    """The person was erased: only an anonymous row is left."""

    status, code, title = 410, "subject_erased", "This person was erased"


class ConflictError(HoldfastError):
    """The request does not fit what is stored now."""

    status, code, title = 409, "conflict", "The request conflicts with the present state"


class StalePlanError(ConflictError):
    """The plan changed since the dry run whose digest was given."""

    code = "stale_plan"


class LegalHoldError(ConflictError):
    """A legal hold stands in the way."""

    code = "legal_hold"


class UnauthenticatedError(HoldfastError):
    """No valid token: one answer for every reason, so that it tells an attacker nothing."""

    status, code, title = 401, "unauthenticated", "Sign in first"
    challenge: ClassVar[str] = "Bearer"


class ForbiddenError(HoldfastError):
    """Signed in, and not allowed to do this."""

    status, code, title = 403, "forbidden", "Not allowed"

    def __init__(self, detail: str, subject_id: int | None = None, **extra: Any) -> None:
        super().__init__(detail, **extra)
        # Whose data was asked for, for the record of the denial; the answer does not say it.
        self.subject_id = subject_id


class ApprovalNeededError(ForbiddenError):
    """Allowed once a second admin has approved it."""

    code = "approval_needed"


class HttpsRequiredError(ForbiddenError):
    """The request came in clear, and its token with it; a redirect would let that go on."""

    code, title = "https_required", "Use HTTPS"


class TooManyAttemptsError(HoldfastError):
    """Too many wrong passwords from this address, for this account or for many."""

    status, code, title = 429, "too_many_attempts", "Too many attempts"

    def __init__(self, detail: str, retry_after_seconds: int) -> None:
        super().__init__(detail)
        self.retry_after_seconds = retry_after_seconds


class StaleSignInError(UnauthenticatedError):
    """Signed in, and too long ago for an act of this weight (RFC 9470)."""

    code, title = "fresh_sign_in_needed", "Sign in again"
    challenge = 'Bearer error="insufficient_user_authentication"'
    # As of `ForbiddenError`: it is asked before anybody's data is.
    subject_id: ClassVar[None] = None


class UnavailableError(HoldfastError):
    """A part this depends on does not answer now; trying again later may work."""

    status, code, title = 503, "unavailable", "Not available now"
    retry_after_seconds: ClassVar[int] = 5


class BusyError(UnavailableError):
    """`MAX_CONCURRENT_REQUESTS` are under way in this process."""

    code = "busy"
    retry_after_seconds = 1


class CryptoError(HoldfastError):
    """A stored value or file could not be opened."""

    code, title = "crypto_error", "A stored value could not be opened"


class KeyFormatError(ConfigurationError):
    """A key is not 32 bytes in a form that we accept; the message gives its length only."""

    code = "key_format"


class UnknownKeyError(CryptoError):
    """The value was sealed with a key that is not configured."""

    code = "unknown_key"


class KeyDisabledError(UnknownKeyError):
    """The value was sealed with a key that was disabled here."""

    code = "key_disabled"


class ValueTooLongError(RefusedError):
    """One value holds at most 2**31 - 1 bytes; files are encrypted as streams."""

    code = "value_too_long"


class TamperedError(CryptoError):
    """The value was changed, or belongs to another place."""

    code = "tampered"


class MalformedTokenError(CryptoError):
    """This is no whole token: cut, of another version or wrongly encoded."""

    code = "malformed_token"


class NotEncryptedError(CryptoError):
    """Plain text stands where an encrypted value belongs."""

    code = "not_encrypted"


class BackupDamagedError(HoldfastError):
    """A backup is not what its manifest says."""

    status, code, title = 422, "backup_damaged", "The backup is damaged"


class SchemaMismatchError(HoldfastError):
    """The database or the backup belongs to another version of the schema."""

    status, code, title = 409, "schema_mismatch", "The schema does not fit this version"
