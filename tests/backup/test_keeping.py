"""Which backups stay: by rule, by hold, by proof; and none of them beyond its maximum age."""

from datetime import UTC, datetime, time, timedelta
from typing import Final
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select

from backend.db_utils import session_scope
from backend.errors import ConflictError, NotFoundError, RefusedError
from backend.models import AuditEvent, BackupRecord, BackupStatus
from backend.privacy.declarations import EraseMode
from backend.services.audit_service import COMMAND_LINE
from backend.services.catalogue_service import get_catalogue_service
from backend.services.checkpoint_service import is_checkpoint
from backend.services.compliance_service import get_compliance_service
from backend.services.pruning_service import Verdict, get_pruning_service
from backend.services.restore_service import get_restore_service
from backend.services.store_service import store
from tests.backup.lives import Configure, aged, change, configured, create, listed
from tests.conftest import Run, Service
from tests.privacy.people import dump, plant

__all__ = ["configured"]  # a fixture
pytestmark = pytest.mark.usefixtures("sqlite_service")
LAST_GOOD: Final = "the last good one"


def prune(*, dry_run: bool = False, now: datetime | None = None) -> list[Verdict]:
    return get_pruning_service().prune(COMMAND_LINE, dry_run=dry_run, now=now)


def reasons(now: datetime | None = None) -> dict[UUID, tuple[bool, str]]:
    return {v.backup_id: (v.keep, v.reason) for v in prune(dry_run=True, now=now)}


def files(service: Service) -> dict[str, bytes]:
    found = sorted((service.folder / "backups").iterdir())
    return {path.name: path.read_bytes() for path in found if not is_checkpoint(path.name)}


def test_without_rules_nothing_goes_but_by_age(sqlite_service: Service, now: datetime) -> None:
    new, old, older = aged(0, 89, 90.5, now=now)
    assert reasons(now) == {
        new: (True, LAST_GOOD),
        old: (True, "no keep rule is set"),
        older: (False, "older than 90 days"),
    }
    prune(now=now)
    assert listed() == [new, old]


def test_rules_are_those_of_the_settings_in_the_operators_time_zone(
    configured: Configure, now: datetime
) -> None:
    configured(backup_keep_daily=2, timezone="Europe/Berlin")
    # 21:30 and 22:30 in UTC are of two days in Berlin, in summer.
    noon = datetime(2026, 7, 10, 12, tzinfo=UTC)
    first, second, third = aged(1.5625 / 24, 13.5 / 24, 14.5 / 24, now=noon)
    assert reasons(noon) == {
        first: (True, LAST_GOOD),
        second: (False, "kept by no rule"),
        third: (True, "daily"),
    }


def test_the_newest_that_was_proven_goes_by_no_rule(configured: Configure, now: datetime) -> None:
    configured(backup_keep_last=1)
    new, between, proven, older = aged(0, 1, 2, 3, now=now)
    for backup_id in (proven, older):
        change(backup_id, verified_at=now)
    assert reasons(now) == {
        new: (True, LAST_GOOD),
        between: (False, "kept by no rule"),
        proven: (True, LAST_GOOD),
        older: (False, "kept by no rule"),
    }


def test_damaged_ones_do_not_count_as_kept_and_go(configured: Configure, now: datetime) -> None:
    configured(backup_keep_last=2)
    damaged, good, other, last = aged(0, 1, 2, 3, now=now)
    change(damaged, error="backup_damaged", verified_at=None)
    assert reasons(now) == {
        damaged: (False, "damaged"),
        good: (True, LAST_GOOD),
        other: (True, "last"),
        last: (False, "kept by no rule"),
    }


def test_the_maximum_age_beats_every_reason_to_stay(configured: Configure, now: datetime) -> None:
    configured(backup_keep_last=5, backup_keep_yearly=5)
    (only,) = aged(90.1, now=now)
    change(only, verified_at=now, held_until=now + timedelta(days=5))
    assert reasons(now) == {only: (False, "older than 90 days")}
    prune(now=now)
    assert listed() == []


def test_a_held_one_stays_until_its_date(configured: Configure, now: datetime) -> None:
    configured(backup_keep_last=1)
    _new, held = aged(0, 10, now=now)
    until = now + timedelta(days=3)
    with session_scope() as session:
        get_pruning_service().hold(session, held, COMMAND_LINE, until)
    kept_, why = reasons(until - timedelta(seconds=1))[held]
    assert (kept_, why) == (True, f"held until {until.isoformat(timespec='seconds')}")
    assert reasons(until + timedelta(seconds=1))[held] == (False, "kept by no rule")


def test_a_backup_that_runs_or_failed_has_no_verdict(configured: Configure, now: datetime) -> None:
    configured(backup_keep_last=1)
    (good,) = aged(0, now=now)
    with session_scope() as session:
        for status in (BackupStatus.RUNNING, BackupStatus.FAILED):
            session.add(
                BackupRecord(status=status, location="", created_at=now - timedelta(days=5))
            )
    assert reasons(now).keys() == {good}


def test_a_dry_run_says_what_the_run_then_does_and_changes_nothing(
    configured: Configure, sqlite_service: Service, run: Run, now: datetime
) -> None:
    configured(backup_keep_daily=1, backup_keep_weekly=2)
    made = aged(0, 1, 2, 8, 95, now=now)
    before, stored = dump(), files(sqlite_service)
    verdicts = prune(dry_run=True)
    told = run("backup", "prune", "--dry-run", "--json").json["items"]
    assert (dump(), files(sqlite_service)) == (before, stored)
    assert [UUID(item["backup"]) for item in told] == [v.backup_id for v in verdicts] == made
    assert [(item["verdict"], item["why"]) for item in told] == [
        ("kept" if v.keep else "would go", v.reason) for v in verdicts
    ]
    assert {item["verdict"] for item in told} == {"kept", "would go"}
    assert run("backup", "prune", "--dry-run").out.count("would go") == sum(
        not v.keep for v in verdicts
    )
    done = run("backup", "prune", "--json").json["items"]
    assert done == [
        item | {"verdict": "deleted"} if item["verdict"] == "would go" else item for item in told
    ]
    stay = [v.backup_id for v in verdicts if v.keep]
    assert listed() == stay
    left = {name.split(".")[0] for name in files(sqlite_service) if not name.endswith(".gone.json")}
    assert left == set(map(str, stay))
    with session_scope(read_only=True) as session:
        acts = select(AuditEvent.outcome).where(AuditEvent.action == "backups_pruned")
        assert session.scalars(acts.order_by(AuditEvent.id)).all() == ["begun", "done"]


def test_a_note_of_what_was_deleted_is_kept_as_long_as_it_may_be_missed(
    sqlite_service: Service, now: datetime
) -> None:
    _new, old = aged(0, 91, now=now)
    note = f"{old}.gone.json"
    prune(now=now)
    assert note in store().names("", "")
    prune(now=now + timedelta(days=89))
    assert note in store().names("", "")
    prune(now=now + timedelta(days=91))
    assert note not in store().names("", "")


def test_an_archive_whose_manifest_was_taken_away_goes_by_age_too(
    sqlite_service: Service, now: datetime
) -> None:
    (old,) = aged(91, now=now)
    (sqlite_service.folder / "backups" / f"{old}.manifest.json").unlink()
    prune(now=now)
    # With header and key it opens: it holds people who were told that it is gone.
    assert store().names(f"{old}.", ".hfb") == []


def test_a_longer_maximum_age_does_not_break_what_erased_people_were_told(
    configured: Configure, now: datetime
) -> None:
    person = plant("A")
    _new, old = aged(0, 60, now=now)
    with session_scope() as session:
        erased = get_compliance_service().erase(
            session, COMMAND_LINE, person.id, EraseMode.DELETE, reason="request", dry_run=False
        )
    told = erased.backup_expires_at
    configured(backup_max_age_days=365)
    assert reasons(told + timedelta(minutes=1))[old][0] is False


# Holds


def test_a_hold_is_set_changed_and_lifted(sqlite_service: Service, now: datetime) -> None:
    first, _second = aged(0, 1, now=now)
    pruning = get_pruning_service()
    for days_ in (3, 5):
        with session_scope() as session:
            until = now + timedelta(days=days_)
            assert pruning.hold(session, first, COMMAND_LINE, until).held_until == until
        with pytest.raises(ConflictError, match="is held"):
            pruning.delete(first, COMMAND_LINE)
    with session_scope() as session:
        assert pruning.hold(session, first, COMMAND_LINE, None).held_until is None
    pruning.delete(first, COMMAND_LINE)


def test_a_hold_ends_in_time_to_come_and_before_the_maximum_age(
    sqlite_service: Service, now: datetime
) -> None:
    first, _second = aged(1, 2, now=now)
    latest = now + timedelta(days=89)
    for until in (now - timedelta(seconds=1), latest + timedelta(seconds=1)):
        with (
            session_scope() as session,
            pytest.raises(RefusedError, match="MAX_AGE_DAYS"),
        ):
            get_pruning_service().hold(session, first, COMMAND_LINE, until)
    with session_scope() as session:
        get_pruning_service().hold(session, first, COMMAND_LINE, latest)


def test_what_is_no_whole_backup_is_not_held(sqlite_service: Service, now: datetime) -> None:
    with session_scope() as session:
        failed = BackupRecord(status=BackupStatus.FAILED, location="", created_at=now)
        session.add(failed)
    until = now + timedelta(days=1)
    for backup_id, error in ((failed.id, ConflictError), (UUID(int=1), NotFoundError)):
        with session_scope() as session, pytest.raises(error):
            get_pruning_service().hold(session, backup_id, COMMAND_LINE, until)


def test_a_hold_outlives_the_restore_of_an_older_backup(sqlite_service: Service) -> None:
    held = create()
    until = datetime.now(UTC) + timedelta(days=7)
    with session_scope() as session:
        get_pruning_service().hold(session, held, COMMAND_LINE, until)
    get_restore_service().restore(held, COMMAND_LINE, dry_run=False, confirm=True)
    with session_scope(read_only=True) as session:
        assert get_catalogue_service().get(session, held).held_until == until


def test_the_command_line_holds_until_a_day_of_the_operator_and_releases(
    configured: Configure, run: Run, now: datetime
) -> None:
    configured(timezone="Asia/Kathmandu")
    first, _second = map(str, aged(0, 1, now=now))
    day = (now + timedelta(days=10)).date()
    held = run("backup", "hold", first, "--until", day.isoformat(), "--json")
    assert held.code == 0, held.err
    # Midnight of Kathmandu, which is 5:45 hours ahead.
    midnight = datetime.combine(day, time(0), ZoneInfo("Asia/Kathmandu")).astimezone(UTC)
    assert datetime.fromisoformat(held.json["held_until"]) == midnight
    refused = run("backup", "delete", first)
    assert (refused.code, refused.err) == (
        2, f"holdfast: backup {first} is held: release it first\n",
    )  # fmt: skip
    for bad in (
        ("--until", "2020-01-01"), ("--until", "2999-01-01"), ("--until", "tomorrow"), (),
        ("--until", day.isoformat(), "--release"),
    ):  # fmt: skip
        assert run("backup", "hold", first, *bad).code == 2, bad
    assert run("backup", "hold", str(UUID(int=1)), "--release").code == 2
    assert run("backup", "hold", first, "--release", "--json").json["held_until"] is None
    assert run("backup", "delete", first).code == 0
