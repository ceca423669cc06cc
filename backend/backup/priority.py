"""How work that nobody waits for makes room for what somebody does."""

import os
import sys
import threading
from typing import Final

_STEPS_BACK: Final = 15


def step_back(process_id: int | None = None) -> None:
    """Have a process, or the thread that asks, work only when nobody waits for an answer."""
    if process_id is not None:
        os.setpriority(os.PRIO_PROCESS, process_id, _STEPS_BACK)
    elif sys.platform == "linux":
        # Elsewhere this would be about the whole process, and for good.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _STEPS_BACK)
