"""Every setting, with its unit and default; read once from the environment and `.env`."""

import re
from enum import StrEnum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from backend.errors import ConfigurationError


class AppEnv(StrEnum):
    DEVELOPMENT = "development"
    PRODUCTION = "production"


class RetentionAction(StrEnum):
    DELETE = "delete"
    ANONYMIZE = "anonymize"


class BackupEngine(StrEnum):
    """Who makes and restores backups: this service by logical dumps, or pgBackRest."""

    HOLDFAST = "holdfast"
    PGBACKREST = "pgbackrest"


class BackupVerify(StrEnum):
    """What is done with a new backup: nothing, reading it whole, or proving that it restores."""

    OFF = "off"
    READ = "read"
    RESTORE = "restore"


# A century: a longer period is a typing error.
MAX_RETENTION_DAYS = 36_500
MIN_JWT_SECRET_CHARS = 32
MAX_EMAIL_CHARS = 254
_LOCAL_TIME = r"([01]\d|2[0-3]):[0-5]\d"
# Standard Webhooks 1.0: 24 bytes or more.
_WEBHOOK_SECRET = re.compile(r"whsec_[A-Za-z0-9+/]{32,}={0,2}")
_ADDRESS = re.compile(r"[^@\s]+@\S+")
_PLACEHOLDER = re.compile(
    r"change.?me|replace|placeholder|your.?(secret|key)|^secret", re.IGNORECASE
)


def is_address(text: str) -> bool:
    """Say whether *text* may be an e-mail address; which ones exist only their servers know."""
    return len(text) <= MAX_EMAIL_CHARS and text.isprintable() and bool(_ADDRESS.fullmatch(text))


def is_web_address(text: str, *, plain: bool) -> bool:
    """Say whether *text* is an `https://` address, or an `http://` one where *plain* may be."""
    try:
        url = urlsplit(text)
        schemes = ("https", "http") if plain else ("https",)
        return (
            url.scheme in schemes and bool(url.hostname) and url.port != 0 and url.username is None
        )
    except ValueError:
        return False


class Settings(BaseSettings):
    """
    The configuration of one process. Secrets do not print.

    Build it through `get_settings`, which turns a bad value into a `ConfigurationError` that
    names the variable and never shows its value.
    """

    model_config = SettingsConfigDict(
        env_file=".env", frozen=True, extra="ignore", env_ignore_empty=True, case_sensitive=False
    )

    app_env: AppEnv = AppEnv.DEVELOPMENT
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    ssl_cert_path: Path | None = None
    ssl_key_path: Path | None = None
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    max_body_bytes: int = Field(default=16 * 1024 * 1024, gt=0)

    data_dir: Path = Path("data")
    database_url: SecretStr | None = None
    backup_url: str | None = None
    backup_engine: BackupEngine = BackupEngine.HOLDFAST
    backup_time: str | None = Field(default="03:00", pattern=rf"^({_LOCAL_TIME}|off)$")
    backup_verify: BackupVerify = BackupVerify.RESTORE
    backup_max_age_days: int = Field(default=90, gt=0, le=MAX_RETENTION_DAYS)
    backup_keep_last: int = Field(default=0, ge=0)
    backup_keep_daily: int = Field(default=0, ge=0)
    backup_keep_weekly: int = Field(default=0, ge=0)
    backup_keep_monthly: int = Field(default=0, ge=0)
    backup_keep_yearly: int = Field(default=0, ge=0)
    backup_lock_days: int = Field(default=0, ge=0, le=MAX_RETENTION_DAYS)
    backup_gpg_recipient: Path | None = None

    pgbackrest_cluster: Path | None = None
    pgbackrest_stanza: str = "holdfast"
    pgbackrest_repository: Path | None = None
    pgbackrest_config: Path | None = None
    pgbackrest_superuser: str = "postgres"
    pgbackrest_start_command: str | None = None
    pgbackrest_stop_command: str | None = None

    encryption_key: SecretStr | None = None
    encryption_keys_previous: SecretStr | None = None

    vault_addr: str | None = None
    vault_token: SecretStr | None = None
    vault_namespace: str | None = None
    vault_cacert: Path | None = None
    vault_transit_mount: str = "transit"
    vault_transit_key: str | None = None
    aws_region: str | None = None
    aws_endpoint_url: str | None = None
    aws_endpoint_url_s3: str | None = None
    aws_kms_key_id: str | None = None
    key_service_timeout_seconds: float = Field(default=5, gt=0, le=60)

    jwt_secret_key: SecretStr | None = None
    access_token_minutes: int = Field(default=30, gt=0, le=24 * 60)
    admin_email: str = "admin@example.com"

    timezone: str = "UTC"
    retention_time: str = Field(default="02:00", pattern=f"^{_LOCAL_TIME}$")
    scheduler_enabled: bool = True

    retention_booking_days: int = Field(default=2555, gt=0, le=MAX_RETENTION_DAYS)
    retention_booking_action: RetentionAction = RetentionAction.ANONYMIZE
    retention_payment_days: int = Field(default=2555, gt=0, le=MAX_RETENTION_DAYS)
    retention_payment_action: RetentionAction = RetentionAction.ANONYMIZE
    retention_invoice_days: int = Field(default=2555, gt=0, le=MAX_RETENTION_DAYS)
    retention_invoice_action: RetentionAction = RetentionAction.ANONYMIZE
    retention_feedback_days: int = Field(default=365, gt=0, le=MAX_RETENTION_DAYS)
    retention_feedback_action: RetentionAction = RetentionAction.DELETE
    retention_user_days: int = Field(default=3650, gt=0, le=MAX_RETENTION_DAYS)
    retention_user_action: RetentionAction = RetentionAction.ANONYMIZE
    retention_statutory_days: int = Field(default=2555, ge=0, le=MAX_RETENTION_DAYS)
    retention_notice_days: int = Field(default=0, ge=0, le=MAX_RETENTION_DAYS)
    retention_brake_percent: int = Field(default=20, gt=0, le=100)
    retention_brake_multiple: int = Field(default=10, gt=0)
    retention_brake_rows: int = Field(default=20, ge=0)

    alert_webhook_url: SecretStr | None = None
    alert_webhook_secret: SecretStr | None = None
    alert_webhook_allow_private: bool = False

    phone_region: str | None = Field(default=None, pattern="^[A-Z]{2}$")
    data_map_ignore: str = ""

    consent_purposes: str = "marketing,analytics,profiling,third_party_sharing"
    controller_name: str = "the operator of this service"
    controller_contact: str = "the address on its website"

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, name: str) -> str:
        try:
            # By opening it: the list of all takes longer than the rest of the start.
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("not a time zone of the IANA database") from None
        return name

    @field_validator("admin_email")
    @classmethod
    def _is_address(cls, text: str) -> str:
        if not is_address(text):
            raise ValueError("not an e-mail address")
        return text

    @field_validator("jwt_secret_key")
    @classmethod
    def _strong_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        value = secret.get_secret_value()
        # RFC 7518, 3.2: an HS256 key has at least the size of the hash output.
        if len(value) < MIN_JWT_SECRET_CHARS or len(set(value)) < 8 or _PLACEHOLDER.search(value):  # noqa: PLR2004 - distinct characters
            raise ValueError(
                f"needs at least {MIN_JWT_SECRET_CHARS} random characters and no placeholder "
                f"(it has {len(value)})"
            )
        return secret

    @field_validator("consent_purposes")
    @classmethod
    def _purposes_are_names(cls, text: str) -> str:
        names = [name.strip() for name in text.split(",")]
        if not all(re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) for name in names):
            raise ValueError("a comma-separated list of lower-case names")
        return ",".join(dict.fromkeys(names))

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.ssl_cert_path is None) != (self.ssl_key_path is None):
            raise ValueError("SSL_CERT_PATH and SSL_KEY_PATH go together: set both or neither")
        return self

    @model_validator(mode="after")
    def _alerts_are_signed(self) -> Self:
        if self.alert_webhook_url is None:
            return self
        url = self.alert_webhook_url.get_secret_value()
        if not is_web_address(url, plain=self.alert_webhook_allow_private):
            raise ValueError(
                "ALERT_WEBHOOK_URL is not an https:// address without a user name in it"
            )
        secret = self.alert_webhook_secret
        if secret is None or not _WEBHOOK_SECRET.fullmatch(secret.get_secret_value()):
            raise ValueError(
                "ALERT_WEBHOOK_URL needs an ALERT_WEBHOOK_SECRET: whsec_ and the base64 of 24 "
                "random bytes or more"
            )
        return self

    @model_validator(mode="after")
    def _locked_no_longer_than_kept(self) -> Self:
        # What erased people are told is when the last backup is gone.
        if self.backup_lock_days > self.backup_max_age_days:
            raise ValueError("BACKUP_LOCK_DAYS is longer than BACKUP_MAX_AGE_DAYS")
        return self

    @model_validator(mode="after")
    def _cluster_is_known(self) -> Self:
        if self.backup_engine is BackupEngine.PGBACKREST and self.pgbackrest_cluster is None:
            raise ValueError("BACKUP_ENGINE=pgbackrest needs PGBACKREST_CLUSTER: a data directory")
        return self

    @cached_property
    def purposes(self) -> tuple[str, ...]:
        return tuple(self.consent_purposes.split(","))

    @cached_property
    def ignored_tables(self) -> frozenset[str]:
        """Tables of the database that the operator keeps out of every act on people's data."""
        return frozenset(name.strip() for name in self.data_map_ignore.split(",") if name.strip())

    @cached_property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.timezone)

    @cached_property
    def sqlalchemy_url(self) -> str:
        """The database; by default a SQLite file in `DATA_DIR`."""
        if self.database_url is None:
            return f"sqlite:///{self.data_dir.absolute() / 'holdfast.db'}"
        return self.database_url.get_secret_value()

    @cached_property
    def backup_locations(self) -> tuple[str, ...]:
        """Where backups lie: the first is written to, the others get copies."""
        urls = filter(None, (url.strip() for url in (self.backup_url or "").split(",")))
        # A folder is the same one for every process, wherever it runs.
        absolute = (url if "://" in url else str(Path(url).absolute()) for url in urls)
        return tuple(dict.fromkeys(absolute)) or (str(self.data_dir.absolute() / "backups"),)

    @property
    def is_production(self) -> bool:
        return self.app_env is AppEnv.PRODUCTION

    def retention_default(self, data_type: str) -> tuple[int, RetentionAction] | None:
        """Period in days and action that the environment sets for *data_type*, if it knows it."""
        days: int | None = getattr(self, f"retention_{data_type}_days", None)
        action: RetentionAction | None = getattr(self, f"retention_{data_type}_action", None)
        return None if days is None or action is None else (days, action)


def load_settings(**overrides: object) -> Settings:
    """
    Read the environment.

    Raises:
        ConfigurationError: Names each bad variable and the rule it breaks, never its value.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type] # pydantic checks them.
    except ValidationError as err:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc']).upper() or 'settings'}: "
            f"{e['msg'].removeprefix('Value error, ')}"
            for e in err.errors(include_url=False, include_input=False, include_context=False)
        )
        raise ConfigurationError(problems) from None
    except UnicodeDecodeError:
        raise ConfigurationError(".env: not UTF-8 text") from None


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process."""
    return load_settings()
