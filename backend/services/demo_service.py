"""
The main job, whole, told step by step: what a person sees when they try Holdfast for the first
time, and a proof at each step that it really happened.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from backend.db_utils import session_scope
from backend.errors import SubjectNotFoundError
from backend.models import DATA_MAP, Booking, Invoice, User
from backend.privacy.declarations import EraseMode
from backend.privacy.export import ExportFormat
from backend.privacy.periods import Period
from backend.privacy.walk import rows_of
from backend.services.audit_service import COMMAND_LINE, Actor
from backend.services.backup_service import get_backup_service
from backend.services.compliance_service import get_compliance_service
from backend.services.consent_service import get_consent_service
from backend.services.policy_service import get_policy_service
from backend.services.restore_service import get_restore_service
from backend.services.retention_service import get_retention_service
from backend.services.sample_service import Progress, get_sample_service
from backend.settings import RetentionAction

_ACTOR = COMMAND_LINE
_MAX_DAYS = 36_500


@dataclass(frozen=True, slots=True)
class Chapter:
    """One step: what was done, in a sentence; what was seen; whether it is as promised."""

    title: str
    text: str
    facts: dict[str, Any]
    ok: bool = True
    seconds: float = field(default=0.0)


@dataclass(slots=True)
class _Cast:
    """Who the story is about: one guest who is erased, one who withdraws consent."""

    erased: int = 0
    withdrawing: int = 0
    backup: UUID | None = None
    others: str = ""
    erased_rows: dict[str, list[int]] = field(default_factory=dict)


class DemoService:
    """Tells the story on a database that was prepared and is empty."""

    def tell(self, bookings: Path | None, progress: Progress) -> Iterator[Chapter]:
        """Yield the chapters as they happen; a broken promise has `ok` false."""
        cast_ = _Cast()
        acts: tuple[Callable[[], Chapter], ...] = (
            lambda: self._load(cast_, bookings, progress),
            lambda: self._export(cast_),
            lambda: self._give_consent(cast_),
            self._try_retention,
            self._apply_retention,
            lambda: self._back_up(cast_),
            lambda: self._withdraw_consent(cast_),
            lambda: self._erase(cast_),
            lambda: self._restore(cast_),
            lambda: self._prove_gone(cast_),
            lambda: self._prove_unchanged(cast_),
        )
        for act in acts:
            started = time.perf_counter()
            chapter = act()
            yield Chapter(
                chapter.title, chapter.text, chapter.facts, chapter.ok,
                round(time.perf_counter() - started, 2),
            )  # fmt: skip

    def _load(self, cast_: _Cast, bookings: Path | None, progress: Progress) -> Chapter:
        with session_scope() as session:
            loaded = get_sample_service().load(
                session, _ACTOR, bookings=bookings, progress=progress
            )
            cast_.erased, cast_.withdrawing = _choose_guests(session)
            sealed = session.execute(text("SELECT full_name FROM users LIMIT 1 OFFSET 1")).scalar()
        facts = {name: getattr(loaded, name) for name in loaded.__slots__}
        return Chapter(
            "Load the bookings",
            "Every booking is in, with generated guests; contact, documents and free text are "
            "encrypted. This is how a name looks to someone who has the disk only.",
            facts | {"stored name": f"{str(sealed)[:40]}…"},
            str(sealed).startswith("enc1."),
        )

    def _export(self, cast_: _Cast) -> Chapter:
        with session_scope() as session:
            document = _export(session, cast_.erased)
        counts = {name: rows for name, rows in document["counts"].items() if rows}
        name = document["data"]["users"][0]["full_name"]
        return Chapter(
            "A guest asks for their data",
            f"{name}, person {cast_.erased}, gets everything that is held about them, in plain.",
            counts,
            bool(name) and counts.get("bookings", 0) > 0,
        )

    def _give_consent(self, cast_: _Cast) -> Chapter:
        return self._consent(
            cast_, granted=True, title="Another guest consents to marketing",
            text_=f"Person {cast_.withdrawing} says yes.",
        )  # fmt: skip

    def _withdraw_consent(self, cast_: _Cast) -> Chapter:
        return self._consent(
            cast_, granted=False, title="The consent is withdrawn",
            text_=f"Person {cast_.withdrawing} changes their mind, after the backup was made.",
        )  # fmt: skip

    def _consent(self, cast_: _Cast, *, granted: bool, title: str, text_: str) -> Chapter:
        user_id = cast_.withdrawing
        # The guest's own act: the demo stands in for their sign-in.
        guest = Actor(_ACTOR.name, _ACTOR.role, user_id)
        with session_scope() as session:
            get_consent_service().record(
                session, guest, user_id, purpose="marketing", granted=granted
            )
        state = _marketing(user_id)
        return Chapter(title, text_, {"marketing": _said(state)}, state is granted)

    def _try_retention(self) -> Chapter:
        with session_scope() as session:
            period = _half_of_the_past(session)
            for data_type in DATA_MAP.by_data_type:
                action = (
                    RetentionAction.DELETE if data_type == "feedback" else RetentionAction.ANONYMIZE
                )
                get_policy_service().set(session, _ACTOR, data_type, period, action, enabled=True)
        run = get_retention_service().apply(_ACTOR, dry_run=True)
        facts = {r.data_type: f"{r.affected} due" for r in run.results}
        return Chapter(
            "Retention, tried first",
            f"Everything may be kept for {period.words}: chosen so that the older half of these "
            "bookings is past its time. The dry run changes nothing.",
            facts | {"plan": run.plan_digest[:16]},
            run.affected > 0,
        )

    def _apply_retention(self) -> Chapter:
        service = get_retention_service()
        with session_scope(read_only=True) as session:
            before = _count(session, Booking)
        tried = service.apply(_ACTOR, dry_run=True)
        run = service.apply(_ACTOR, dry_run=False, plan_digest=tried.plan_digest)
        left = service.apply(_ACTOR, dry_run=True).affected
        with session_scope(read_only=True) as session:
            anonymous = _count(session, Booking, Booking.anonymized_at.is_not(None))
        return Chapter(
            "Retention, applied",
            "Exactly what the dry run announced was made anonymous or deleted; nothing is due now.",
            {
                "changed": run.affected,
                "bookings made anonymous": anonymous,
                "bookings kept as they are": before - anonymous,
                "still due": left,
            },
            run.affected == tried.affected and left == 0 and 0 < anonymous < before,
        )

    def _back_up(self, cast_: _Cast) -> Chapter:
        record = get_backup_service().create(_ACTOR, "demo")
        cast_.backup = record.id
        verified = get_backup_service().verify(record.id, _ACTOR)
        return Chapter(
            "A backup, and the proof that it restores",
            "Consistent, compressed, encrypted, stored whole; then rebuilt beside and checked.",
            {
                "backup": str(record.id),
                "size": f"{(record.size_bytes or 0) / 1e6:.1f} MB",
                "sha256": f"{(record.sha256 or '')[:16]}…",
            },
            verified.verified_at is not None,
        )

    def _erase(self, cast_: _Cast) -> Chapter:
        with session_scope() as session:
            cast_.erased_rows = _row_numbers(session, cast_.erased)
            cast_.others = _digest_of_others(session, cast_.erased_rows)
        with session_scope() as session:
            erasure = get_compliance_service().erase(
                session, _ACTOR, cast_.erased, EraseMode.DELETE, reason="demo", dry_run=False
            )
        facts: dict[str, Any] = {
            table: ", ".join(f"{rows} {outcome}" for outcome, rows in counts.items() if rows)
            for table, counts in erasure.plan.counts.items()
            if any(counts.values())
        }
        for kept in erasure.plan.retained:
            facts[f"{kept.table} kept"] = f"{kept.rows}, until {kept.until:%Y-%m-%d}"
        return Chapter(
            "The first guest asks to be forgotten",
            f"Person {cast_.erased} is erased in one transaction. What tax law keeps stays, "
            "restricted and unlinked.",
            facts,
            _is_gone(cast_.erased) and bool(erasure.plan.retained),
        )

    def _restore(self, cast_: _Cast) -> Chapter:
        if cast_.backup is None:
            raise ValueError("there is no backup to restore")
        restored = get_restore_service().restore(cast_.backup, _ACTOR, dry_run=False, confirm=True)
        again = restored.reapplied
        return Chapter(
            "Disaster: the backup is restored",
            "It was made before the erasure and before the withdrawal, so it still held both.",
            {
                "erasures applied again": again.erasures,
                "consent events applied again": again.consents,
                "old database kept at": Path(str(restored.previous)).name,
            },
            again.erasures == 1 and again.consents == 1,
        )

    def _prove_gone(self, cast_: _Cast) -> Chapter:
        gone, consent = _is_gone(cast_.erased), _marketing(cast_.withdrawing)
        return Chapter(
            "Still forgotten, still withdrawn",
            "The restore brought back neither the person nor the consent.",
            {
                f"person {cast_.erased}": "gone" if gone else "BACK",
                f"marketing for person {cast_.withdrawing}": _said(consent),
            },
            gone and not consent,
        )

    def _prove_unchanged(self, cast_: _Cast) -> Chapter:
        with session_scope(read_only=True) as session:
            after = _digest_of_others(session, cast_.erased_rows)
        return Chapter(
            "Everyone else is untouched",
            "A digest over every row of every other guest, as stored, before the erasure and now.",
            {"before": cast_.others[:32], "after": after[:32]},
            after == cast_.others,
        )


def _choose_guests(session: Session) -> tuple[int, int]:
    """Pick the guest with the newest invoice, so that the law still keeps it, and another one."""
    newest = select(Invoice.user_id).order_by(Invoice.issued_on.desc(), Invoice.id.desc()).limit(1)
    erased = session.scalar(newest)
    other = session.scalar(select(func.max(User.id)).where(User.id != erased))
    if erased is None or other is None:
        raise SubjectNotFoundError("the bookings have no guest with an invoice")
    return erased, other


def _half_of_the_past(session: Session) -> Period:
    """Return the period after which the older half of the bookings is due."""
    half = (_count(session, Booking)) // 2
    middle = session.scalar(
        select(Booking.check_out).order_by(Booking.check_out).offset(half).limit(1)
    )
    today = datetime.now(UTC).date()
    days = (today - middle).days if middle else 1
    return Period.of_days(min(max(days, 1), _MAX_DAYS))


def _export(session: Session, user_id: int) -> dict[str, Any]:
    chunks = get_compliance_service().export(session, _ACTOR, user_id, ExportFormat.JSON)
    session.flush()
    return dict(orjson.loads(b"".join(chunks)))


def _is_gone(user_id: int) -> bool:
    with session_scope(read_only=True) as session:
        left = sum(len(keys) for keys in _row_numbers(session, user_id).values())
        return left == 0 and session.get(User, user_id) is None


def _marketing(user_id: int) -> bool:
    with session_scope(read_only=True) as session:
        return get_consent_service().of(session, user_id).purposes["marketing"].granted


def _said(granted: bool) -> str:
    return "given" if granted else "not given"


def _count(session: Session, model: type[Any], *where: Any) -> int:
    return session.scalar(select(func.count()).select_from(model).where(*where)) or 0


def _row_numbers(session: Session, user_id: int) -> dict[str, list[int]]:
    """Return the numbers of a person's rows, per table."""
    mine = DATA_MAP.subject.key == user_id
    return {
        mapped.name: list(
            session.scalars(select(mapped.key).where(rows_of(DATA_MAP, mapped, mine)))
        )
        for mapped in DATA_MAP.of_people
    }


def _digest_of_others(session: Session, leave_out: dict[str, list[int]]) -> str:
    """Digest every stored row of every table of people, but those in *leave_out*."""
    hasher = hashlib.sha256()
    for mapped in DATA_MAP.of_people:
        if mapped.rule.carried_over:
            # Consents and holds go on after a backup: they are not what it brings back.
            continue
        stored = (
            select(text("*"))
            .select_from(mapped.table)
            .where(mapped.key.not_in(leave_out[mapped.name]))
            .order_by(mapped.key)
            .execution_options(yield_per=1_000)
        )
        for row in session.execute(stored):
            hasher.update(repr(tuple(row)).encode())
    return hasher.hexdigest()


@lru_cache(maxsize=1)
def get_demo_service() -> DemoService:
    return DemoService()
