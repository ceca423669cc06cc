"""
The product's verbs: the only writers of rows.

With `PYTHONPATH=backend` the same modules are importable as `services.…`, so that a process has
one keyring and one scheduler, whichever way it imports them.
"""

import importlib
import sys
from pathlib import Path

_OFFERED = ("encryption_service", "compliance_service", "retention_service", "scheduler_service")

if __name__ == "services":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    for _name in _OFFERED:
        sys.modules[f"services.{_name}"] = importlib.import_module(f"backend.services.{_name}")
    sys.modules["services"] = importlib.import_module("backend.services")
