"""Every setting, with its unit and default; read once from the environment and `.env`."""

import re
from enum import StrEnum
from functools import cached_property, lru_cache
from ipaddress import ip_network
from pathlib import Path
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from backend import token_secrets
from backend.errors import ConfigurationError
from backend.web_addresses import is_origin, is_service_address, is_web_address


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
MIN_JWT_SECRET_CHARS = token_secrets.MIN_CHARS
MAX_EMAIL_CHARS = 254
_LOCAL_TIME = r"([01]\d|2[0-3]):[0-5]\d"
# Standard Webhooks 1.0: 24 bytes or more.
_WEBHOOK_SECRET = re.compile(r"whsec_[A-Za-z0-9+/]{32,}={0,2}")
_ADDRESS = re.compile(r"[^@\s]+@\S+")


def is_address(text: str) -> bool:
    """Say whether *text* may be an e-mail address; which ones exist only their servers know."""
    return len(text) <= MAX_EMAIL_CHARS and text.isprintable() and bool(_ADDRESS.fullmatch(text))


def _listed(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _parts(secret: SecretStr | None, separator: str | None = ",") -> list[str]:
    if secret is None:
        return []
    value = secret.get_secret_value()
    return [value] if separator is None else [part.strip() for part in value.split(separator)]


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
    trusted_proxies: str = ""
    cors_origins: str = ""
    workers: int = Field(default=1, ge=1, le=64)
    log_level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    max_body_bytes: int = Field(default=16 * 1024 * 1024, gt=0)
    max_concurrent_requests: int = Field(default=256, gt=0)

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
    jwt_secret_keys_previous: SecretStr | None = None
    access_token_minutes: int = Field(default=30, gt=0, le=24 * 60)
    refresh_token_days: int = Field(default=14, gt=0, le=366)
    step_up_minutes: int = Field(default=15, gt=0, le=24 * 60)
    second_admin: bool = False
    throttle_store: SecretStr = SecretStr("memory://")
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

    @field_validator("vault_addr", "aws_endpoint_url", "aws_endpoint_url_s3")
    @classmethod
    def _is_service_address(cls, text: str | None) -> str | None:
        if text is not None and not is_service_address(text):
            raise ValueError(
                "not an http:// or https:// address without a user name in it, or a link-local "
                "one, where clouds hand out credentials"
            )
        return text

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_networks(cls, text: str) -> str:
        for name in _listed(text):
            try:
                size = ip_network(name).prefixlen
            except ValueError:
                raise ValueError(
                    "addresses and networks separated by commas, as 10.0.0.5,10.1.0.0/16"
                ) from None
            if not size:
                raise ValueError("a network of every address lets callers choose their own")
        return text

    @field_validator("jwt_secret_key", "jwt_secret_keys_previous")
    @classmethod
    def _strong_secrets(cls, secret: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        several = info.field_name == "jwt_secret_keys_previous"
        keys = {
            key
            for name in ("encryption_key", "encryption_keys_previous")
            for key in _parts(info.data.get(name))
        }
        for value in _parts(secret, separator="," if several else None):
            if token_secrets.is_weak(value):
                raise ValueError(
                    f"needs at least {MIN_JWT_SECRET_CHARS} random characters, and no placeholder "
                    f"or published example (it has {len(value)}): take what "
                    "`openssl rand -base64 48` prints"
                )
            if value.strip() in keys:
                raise ValueError("is an encryption key: tokens are signed with one of their own")
        return secret

    @field_validator("throttle_store")
    @classmethod
    def _counts_somewhere(cls, url: SecretStr) -> SecretStr:
        if not re.fullmatch(r"memory://|rediss?://\S+", url.get_secret_value()):
            raise ValueError("memory:// or the address of a Redis server")
        return url

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
    def _origins_are_exact(self) -> Self:
        plain = not self.is_production
        if not all(is_origin(origin, plain=plain) for origin in self.allowed_origins):
            raise ValueError(
                "CORS_ORIGINS: exact origins separated by commas, as https://app.example.com; "
                "http:// only in development and of this machine"
            )
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
    def previous_token_secrets(self) -> tuple[str, ...]:
        """What tokens that still count may be signed with."""
        return tuple(_parts(self.jwt_secret_keys_previous))

    @cached_property
    def ignored_tables(self) -> frozenset[str]:
        """Tables of the database that the operator keeps out of every act on people's data."""
        return frozenset(name.strip() for name in self.data_map_ignore.split(",") if name.strip())

    @cached_property
    def proxies(self) -> tuple[str, ...]:
        """Whose X-Forwarded-For and X-Forwarded-Proto count, as networks."""
        networks = [ip_network(name) for name in _listed(self.trusted_proxies)]
        # On a socket of IPv6 (HOST=::) callers over IPv4 have addresses of this form.
        mapped = (
            f"::ffff:{network.network_address}/{96 + network.prefixlen}"
            for network in networks
            if network.version == 4  # noqa: PLR2004 - of the Internet Protocol
        )
        return (*map(str, networks), *mapped)

    @cached_property
    def allowed_origins(self) -> tuple[str, ...]:
        """Origins whose pages may call this service."""
        return _listed(self.cors_origins)

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
