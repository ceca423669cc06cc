"""Settings: bad values are refused by name and never shown; secrets do not print."""

import re
from pathlib import Path
from typing import Final

import pytest
from pydantic import ValidationError

from backend.errors import ConfigurationError
from backend.settings import (
    AppEnv,
    BackupEngine,
    BackupVerify,
    RetentionAction,
    Settings,
    get_settings,
    load_settings,
)
from tests.conftest import JWT_SECRET, KEY, OTHER_KEY

ENV_EXAMPLE: Final = Path(__file__).resolve().parents[1] / "env.example"
# Part of every bad value that has room for it.
CANARY: Final = "kanarienvogel"
KEEP_RULES: Final = ("LAST", "DAILY", "WEEKLY", "MONTHLY", "YEARLY")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APP_ENV", CANARY),
        ("APP_ENV", "PRODUCTION"),
        ("TRUSTED_PROXIES", "*"),
        ("TRUSTED_PROXIES", CANARY),
        ("TRUSTED_PROXIES", f"127.0.0.1,{CANARY}"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "10.0.0.0/33"),
        ("TRUSTED_PROXIES", "127.0.0.1:8080"),
        ("TRUSTED_PROXIES", "0.0.0.0/0"),
        ("TRUSTED_PROXIES", "10.0.0.1,::/0"),
        ("WORKERS", "0"),
        ("WORKERS", "65"),
        ("WORKERS", CANARY),
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", CANARY),
        ("LOG_LEVEL", CANARY),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_BYTES", CANARY),
        *((f"BACKUP_KEEP_{rule}", "-1") for rule in KEEP_RULES),
        *((f"BACKUP_KEEP_{rule}", CANARY) for rule in KEEP_RULES),
        ("BACKUP_KEEP_LAST", "1.5"),
        ("BACKUP_ENGINE", CANARY),
        ("BACKUP_TIME", "24:00"),
        ("BACKUP_TIME", "3:00"),
        ("BACKUP_TIME", "03:00:00"),
        ("BACKUP_TIME", "OFF"),
        ("BACKUP_TIME", CANARY),
        ("BACKUP_VERIFY", "READ"),
        ("BACKUP_VERIFY", "true"),
        ("BACKUP_VERIFY", CANARY),
        ("BACKUP_LOCK_DAYS", "-1"),
        ("BACKUP_LOCK_DAYS", "36501"),
        ("BACKUP_LOCK_DAYS", CANARY),
        ("BACKUP_MAX_AGE_DAYS", "0"),
        ("BACKUP_MAX_AGE_DAYS", "36501"),
        ("ACCESS_TOKEN_MINUTES", "0"),
        ("ACCESS_TOKEN_MINUTES", "1441"),
        ("ADMIN_EMAIL", "a"),
        ("ADMIN_EMAIL", CANARY * 30),
        ("TIMEZONE", CANARY),
        ("TIMEZONE", "../etc/passwd"),
        ("RETENTION_TIME", "24:00"),
        ("RETENTION_TIME", "2:00"),
        ("RETENTION_TIME", CANARY),
        ("SCHEDULER_ENABLED", CANARY),
        ("PHONE_REGION", "de"),
        ("PHONE_REGION", "DEU"),
        ("PHONE_REGION", CANARY),
        ("CONSENT_PURPOSES", f"marketing,{CANARY} {CANARY}"),
        ("CONSENT_PURPOSES", ","),
        ("JWT_SECRET_KEY", CANARY),
        ("JWT_SECRET_KEY", "a" * 64),
        ("JWT_SECRET_KEY", f"change-me-{CANARY}-0123456789-0123456789"),
        ("JWT_SECRET_KEY", f"your_secret_{CANARY}-0123456789-0123456789"),
        ("JWT_SECRET_KEY", f"secret-{CANARY}-0123456789-0123456789"),
        *((f"RETENTION_{kind}_DAYS", "0") for kind in ("BOOKING", "PAYMENT", "INVOICE", "USER")),
        ("RETENTION_FEEDBACK_DAYS", "-1"),
        ("RETENTION_FEEDBACK_DAYS", "36501"),
        ("RETENTION_FEEDBACK_DAYS", CANARY),
        ("RETENTION_FEEDBACK_ACTION", CANARY),
    ],
)
def test_a_bad_value_is_refused_by_its_name_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refusal:
        get_settings()
    assert refusal.value.detail.startswith(f"{name}: ")
    assert CANARY not in refusal.value.detail
    # Nor does the traceback lead to it.
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APP_ENV", "production"),
        ("TRUSTED_PROXIES", "127.0.0.1"),
        ("TRUSTED_PROXIES", " 10.0.0.5 , 10.1.0.0/16, fd00::/8,::1,"),
        ("CORS_ORIGINS", "https://app.example.com,https://other.example.com:8443"),
        ("WORKERS", "64"),
        ("PORT", "0"),
        ("PORT", "65535"),
        ("LOG_LEVEL", "DEBUG"),
        ("ACCESS_TOKEN_MINUTES", "1440"),
        ("TIMEZONE", "Europe/Berlin"),
        ("RETENTION_TIME", "23:59"),
        ("SCHEDULER_ENABLED", "false"),
        ("BACKUP_TIME", "00:00"),
        ("BACKUP_TIME", "off"),
        *(("BACKUP_VERIFY", wanted) for wanted in BackupVerify),
        ("BACKUP_ENGINE", "holdfast"),
        *((f"BACKUP_KEEP_{rule}", "0") for rule in KEEP_RULES),
        ("BACKUP_KEEP_DAILY", "7"),
        ("BACKUP_LOCK_DAYS", "90"),
        ("BACKUP_GPG_RECIPIENT", "auditor.asc"),
        ("PHONE_REGION", "DE"),
        ("DATA_MAP_IGNORE", "newsletter"),
        ("CONSENT_PURPOSES", " marketing , research_2 "),
        ("JWT_SECRET_KEY", JWT_SECRET),
        ("RETENTION_FEEDBACK_DAYS", "36500"),
        ("RETENTION_FEEDBACK_ACTION", "anonymize"),
        # An empty variable is one that is not set.
        ("PORT", ""),
        ("ENCRYPTION_KEY", ""),
    ],
)
def test_a_good_value_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert isinstance(get_settings(), Settings)


def test_every_bad_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "x")
    monkeypatch.setenv("TIMEZONE", "x")
    with pytest.raises(ConfigurationError, match=r"PORT: .*TIMEZONE: "):
        get_settings()


@pytest.mark.parametrize("name", ["SSL_CERT_PATH", "SSL_KEY_PATH"])
def test_certificate_and_key_go_together(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "file.pem")
    with pytest.raises(ConfigurationError, match="set both or neither"):
        get_settings()


def test_no_backup_is_locked_for_longer_than_it_may_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BACKUP_MAX_AGE_DAYS", "30")
    for days, refused in (("30", False), ("31", True)):
        monkeypatch.setenv("BACKUP_LOCK_DAYS", days)
        if not refused:
            assert load_settings().backup_lock_days == int(days)
            continue
        with pytest.raises(ConfigurationError, match="BACKUP_LOCK_DAYS is longer than BACKUP_MAX"):
            load_settings()


def test_pgbackrest_needs_to_be_told_its_cluster() -> None:
    with pytest.raises(ConfigurationError, match="needs PGBACKREST_CLUSTER"):
        load_settings(backup_engine="pgbackrest")
    settings = load_settings(backup_engine="pgbackrest", pgbackrest_cluster="/srv/postgresql")
    assert settings.backup_engine is BackupEngine.PGBACKREST


def test_backups_go_to_the_first_place_and_are_copied_to_the_others() -> None:
    assert load_settings().backup_locations == (str(Path.cwd() / "data" / "backups"),)
    listed = load_settings(backup_url=" /a , s3://b/c,, /a").backup_locations
    assert listed == ("/a", "s3://b/c")
    assert load_settings(backup_url=" , ").backup_locations == (
        str(Path.cwd() / "data" / "backups"),
    )


def test_secrets_do_not_print() -> None:
    url = f"postgresql://holdfast:{CANARY}@127.0.0.1/holdfast"
    settings = load_settings(
        encryption_key=KEY,
        encryption_keys_previous=OTHER_KEY,
        jwt_secret_key=JWT_SECRET,
        database_url=url,
    )
    printed = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    for secret in (KEY, OTHER_KEY, JWT_SECRET, CANARY):
        assert secret not in printed
    # And are there nevertheless.
    assert settings.sqlalchemy_url == url
    assert settings.encryption_key is not None
    assert settings.encryption_key.get_secret_value() == KEY


def test_tables_to_leave_out_are_a_list_and_by_default_there_are_none() -> None:
    assert load_settings().ignored_tables == set()
    listed = load_settings(data_map_ignore=" newsletter, crm.guests ,,").ignored_tables
    assert listed == {"newsletter", "crm.guests"}


def test_settings_do_not_change_while_the_process_runs() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc] # that mypy refuses it too is the point
    assert get_settings() is get_settings()


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()
    assert settings.app_env is AppEnv.DEVELOPMENT
    assert (settings.host, settings.port, settings.data_dir) == ("127.0.0.1", 8000, Path("data"))
    assert (settings.timezone, settings.retention_time) == ("UTC", "02:00")
    assert settings.phone_region is None
    # Nobody is believed, let in or counted beside us unless that is said.
    assert (settings.proxies, settings.allowed_origins, settings.workers) == ((), (), 1)
    assert settings.purposes == ("marketing", "analytics", "profiling", "third_party_sharing")
    assert settings.sqlalchemy_url == f"sqlite:///{Path.cwd() / 'data' / 'holdfast.db'}"
    assert (settings.backup_time, settings.backup_verify) == ("03:00", BackupVerify.RESTORE)
    assert (settings.backup_engine, settings.backup_max_age_days) == (BackupEngine.HOLDFAST, 90)
    assert (settings.backup_lock_days, settings.backup_gpg_recipient) == (0, None)
    # Without a keep rule nothing goes before its maximum age.
    assert {getattr(settings, f"backup_keep_{rule.lower()}") for rule in KEEP_RULES} == {0}
    anonymize, delete = RetentionAction.ANONYMIZE, RetentionAction.DELETE
    for data_type in ("booking", "payment", "invoice"):
        assert settings.retention_default(data_type) == (2555, anonymize)
    assert settings.retention_default("feedback") == (365, delete)
    assert settings.retention_default("user") == (3650, anonymize)


def test_a_dotenv_file_counts_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("PORT=9001\nTIMEZONE=Europe/Berlin\nNOT_OURS=1\n")
    monkeypatch.setenv("PORT", "9002")
    settings = get_settings()
    assert (settings.port, settings.timezone) == (9002, "Europe/Berlin")


def test_the_example_lists_every_setting_and_no_other() -> None:
    lines = ENV_EXAMPLE.read_text().splitlines()
    found = [m[1] for line in lines if (m := re.fullmatch(r"#? ?([A-Z][A-Z0-9_]*)=.*", line))]
    assert sorted(found) == sorted(name.upper() for name in Settings.model_fields)
