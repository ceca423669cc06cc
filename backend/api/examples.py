"""Examples of bodies and answers for the OpenAPI document; a test sends and checks each."""

from typing import Any, Final

_BACKUP_ID: Final = "3f8a1c6b-9d2e-4f30-a5b8-c1d4e7f0a3b6"
_RUN_ID: Final = "8b0d5a52-6f5e-4f0c-9a43-0c6f5b2f1d77"
_DIGEST: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_AT: Final = "2026-11-24T02:00:00Z"

Example = dict[str, Any]

SIGN_IN: Final[Example] = {
    "grant_type": "password",
    "username": "admin@example.com",
    "password": "correct horse battery",
}
TOKEN: Final[Example] = {
    "access_token": "eyJhbGciOiJIUzI1NiIsInR5cCI6ImF0K2p3dCJ9.…",
    "token_type": "bearer",
    "expires_in": 1800,
    "refresh_token": "4a7d1ed414474e4033ac29ccb8653d9b.…",
}
ME: Final[Example] = {"user_id": 7, "role": "user"}
PASSWORD: Final[Example] = {
    "present_password": "correct horse battery",
    "new_password": "seven grey herons at noon",
}
PRESENT_PASSWORD: Final[Example] = {"present_password": "correct horse battery"}
CODE: Final[Example] = {"code": "123456"}
CODES: Final[Example] = {
    "secret": "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP",
    "address": "otpauth://totp/Holdfast:admin%40example.com?secret=JBSWY3DPEHPK3PXP&issuer=Holdfast",
}
APPROVALS: Final[Example] = {
    "items": [
        {
            "id": _RUN_ID,
            "act": "POST /security/retention/apply",
            "request": '{"dry_run": false}',
            "requested_by": "5f4dcc3b5aa765d61d8327deb882cf99",
            "requested_at": _AT,
            "expires_at": "2026-11-25T02:00:00Z",
            "approved_by": None,
            "approved_at": None,
        }
    ]
}

FIND: Final[Example] = {"phone": "+49 30 1234567"}
FOUND: Final[Example] = {
    "user_id": 7,
    "named_in": ["companions"],
    "subject_ref": _DIGEST[:32],
}
EXPORT: Final[Example] = {"user_id": 7, "format": "json"}
IMPORT: Final[Example] = {
    "user_id": 7,
    "dry_run": True,
    "export": {"format": "…", "version": 1, "subject": {"user_id": 7}, "data": {"users": []}},
}
IMPORTED: Final[Example] = {
    "user_id": 7,
    "dry_run": True,
    "tables": {"bookings": {"restored": 2, "unchanged": 1, "skipped": 0, "incomplete": 0}},
}
DELETE: Final[Example] = {
    "user_id": 7,
    "mode": "anonymize",
    "reason": "request under art. 17",
    "dry_run": True,
}
_COUNTS: Final = {"deleted": 0, "anonymized": 0, "retained": 0, "redacted": 0, "shared": 0}
DELETED: Final[Example] = {
    "erasure_id": _RUN_ID,
    "status": "complete",
    "mode": "anonymize",
    "dry_run": False,
    "plan_digest": _DIGEST,
    "tables": {
        "users": _COUNTS | {"anonymized": 1},
        "companions": _COUNTS | {"redacted": 1},
        "invoices": _COUNTS | {"retained": 3},
        "feedback": _COUNTS | {"anonymized": 2},
    },
    "retained": [
        {"table": "invoices", "rows": 3, "ground": "commercial and tax law", "until": "2033-11-24"},
    ],
    "not_reached": [],
    "backups_expire_at": "2027-02-22T02:00:00Z",
}
QUEUED: Final[Example] = {
    "request_id": _RUN_ID,
    "status": "queued",
    "mode": "delete",
    "queued_at": _AT,
    "holds": [_BACKUP_ID],
}
CONSENT: Final[Example] = {"purpose": "marketing", "granted": True, "notice_version": "2026-11"}
CONSENT_EVENT: Final[Example] = {
    "id": _RUN_ID,
    "purpose": "marketing",
    "granted": True,
    "notice_version": "2026-11",
    "method": "self",
    "recorded_at": _AT,
}
CONSENT_STATE: Final[Example] = {
    "user_id": 7,
    "purposes": {"marketing": {"granted": True, "since": _AT, "notice_version": "2026-11"}},
    "history": [CONSENT_EVENT],
}

POLICY: Final[Example] = {
    "data_type": "feedback",
    "retention_days": 365,
    "action": "delete",
    "enabled": True,
}
POLICY_IN_FORCE: Final[Example] = {
    "data_type": "invoice",
    "retention_period": "P10Y",
    "action": "anonymize",
    "enabled": True,
    "year_end": False,
    "source": "api",
    "updated_at": _AT,
    "description": "rows of invoices are made anonymous 10 years from issued on",
}
POLICY_CHANGE: Final[Example] = {
    "data_type": "invoice",
    "version": 1,
    "changed_at": _AT,
    "changed_by": "command line",
    "before": {
        "retention_period": "P2555D",
        "year_end": False,
        "action": "anonymize",
        "enabled": True,
        "source": "environment",
    },
    "after": {
        "retention_period": "P10Y",
        "year_end": True,
        "action": "anonymize",
        "enabled": True,
        "source": "api",
    },
}
FORECAST: Final[Example] = {
    "items": [
        {
            "data_type": "invoice",
            "enabled": True,
            "due_now": 12,
            "months": [{"month": "2026-11", "due": 3}, {"month": "2026-12", "due": 40}],
        }
    ]
}
NOTICES: Final[Example] = {
    "items": [
        {
            "id": _RUN_ID,
            "user_id": 7,
            "email": "jane@example.com",
            "ends_at": _AT,
            "queued_at": _AT,
            "sent_at": None,
        }
    ]
}
POLICY_STATE: Final[Example] = POLICY_IN_FORCE | {
    "rows": 340,
    "due": 12,
    "due_soon": 3,
    "held": 2,
    "last_run_at": _AT,
    "next_run_at": _AT,
}
APPLY: Final[Example] = {"dry_run": True, "data_type": "feedback"}
_RESULT: Final[Example] = {
    "data_type": "feedback",
    "action": "delete",
    "cutoff": "2025-11-24T02:00:00Z",
    "matched": 12,
    "held": 2,
    "affected": 10,
}
APPLIED: Final[Example] = {
    "run_id": _RUN_ID,
    "dry_run": False,
    "plan_digest": _DIGEST,
    "results": [_RESULT],
    "brakes": [],
}

HOLD: Final[Example] = {"scope": "person", "user_id": 7, "reason": "claim of 2026-11"}

BACKUP: Final[Example] = {"label": "before the upgrade"}
BACKED_UP: Final[Example] = {
    "id": _BACKUP_ID,
    "label": "before the upgrade",
    "status": "complete",
    "size_bytes": 4_194_304,
    "sha256": _DIGEST,
    "created_at": _AT,
    "verified_at": _AT,
    "location": f"/var/lib/holdfast/backups/{_BACKUP_ID}.hfb",
    "error": None,
    "kind": "full",
    "bytes_done": 10_485_760,
    "held_until": None,
}
BACKUP_HOLD: Final[Example] = {"until": "2026-12-24T12:00:00Z"}
RESTORE: Final[Example] = {"backup_id": _BACKUP_ID, "dry_run": True}
RESTORED: Final[Example] = {
    "backup_id": _BACKUP_ID,
    "status": "restored",
    "dry_run": False,
    "reapplied": {"erasures": 1, "consents": 1, "restrictions": 0, "retention": 3},
    "created_at": _AT,
    "tables": {"users": {"live": 120, "restored": 118, "lost": 3, "regained": 1}},
    "emptied": [],
    "migrations": [],
    "breaks": [],
    "previous": "/var/lib/holdfast/previous/holdfast-20261124T020000Z.db",
}

KEY_STATUS: Final[Example] = {
    "primary": "1f9a3c5e",
    "message_limit": 4_294_967_296,
    "keys": [
        {
            "key_id": "1f9a3c5e",
            "state": "primary",
            "values": 1500,
            "columns": {"users.email": 500, "users.full_name": 500, "users.phone": 500},
            "index_terms": 500,
            "ledger_entries": 3,
            "backups": 7,
            "limit_used": 1.2e-07,
            "may_be_disabled": False,
        }
    ],
}


def of(example: Example) -> dict[str, Example]:
    """Wrap *example* for a model's `json_schema_extra`."""
    return {"example": example}


SCHEDULER: Final[Example] = {
    "running": True,
    "jobs": [
        {
            "name": "retention",
            "at": "02:00",
            "next_due_at": _AT,
            "last_due_at": _AT,
            "last_status": "done",
            "last_attempts": 1,
            "last_finished_at": _AT,
            "last_error": None,
        }
    ],
    "alerts": [
        {
            "id": _RUN_ID,
            "kind": "retention_brake",
            "about": "feedback",
            "code": "share",
            "raised_at": _AT,
            "sent_at": None,
            "attempts": 0,
            "error": None,
        }
    ],
}

AUDIT: Final[Example] = {
    "items": [
        {
            "id": 42,
            "at": _AT,
            "action": "export",
            "outcome": "done",
            "actor_ref": _DIGEST[:32],
            "subject_ref": _DIGEST[:32],
            "request_id": "8c1f0e0f3c9d4f0e",
            "detail": {"format": "json"},
            "damaged": False,
        }
    ],
    "next_before": None,
}
AUDIT_CHECKED: Final[Example] = {
    "status": "broken",
    "events": 41,
    "older": 0,
    "last": 41,
    "breaks": [{"kind": "edited", "event_id": 42, "detail": "is not what was recorded"}],
    "losses": [],
    "checkpoints": 12,
    "checkpoint_at": _AT,
    "checkpoint_event": 57,
    "silent": [],
    "others": [],
    "public_key": "ed25519:11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
}
