"""What an export is made from, beside the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from backend.privacy.notice import Terms
from backend.privacy.walk import Subjects


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """
    Whose export, made when, and what goes into it beside the rows.

    Attributes:
        subject: How the person is named in the export: `user_id`, which may be `None`.
        requests: What was asked about the person before, and how it ended.
    """

    subject: Mapping[str, Any]
    subjects: Subjects
    generated_at: datetime
    consents: Mapping[str, Any]
    requests: Sequence[Mapping[str, Any]]
    terms: Terms

    @property
    def consented(self) -> list[str]:
        """The purposes for which the person's consent stands."""
        return [name for name, state in self.consents["purposes"].items() if state["granted"]]
