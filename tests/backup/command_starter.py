"""
Runs commands in forked children, none of which waits for the imports; ends one at its nth act.

Told one command a line on its standard input; answers 0 once it is ready, then for each command
its process id, and how that ended as the system says it.
"""

import gc
import json
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Final

import db_cli
from backend.models import Base
from backend.services import transfer_service

# What changes files, locks, processes and databases, or makes a change last.
_CALLS: Final = frozenset({
    "open", "write", "flush", "fsync", "link", "rename", "replace", "unlink", "mkdir", "close",
    "flock", "fork_exec", "poll", "execute", "backup",
})  # fmt: skip
# PostgreSQL's driver is not Python that can be watched; who calls it is. A statement is called by
# its first word.
_FUNCTIONS: Final = frozenset({"do_execute", "do_commit", "do_rollback"})
# Called for each page that a swap of SQLite's copies: nothing else happens between the two ends.
_PAGE: Final = "_Keeper.__call__"


class Ending:
    """
    Counts the acts of this process, and ends it before one of them.

    Args:
        number: Which act to end before; 0 for none.
        path: Or acts that come one after the other: end before the last one of them.
    """

    def __init__(self, number: int, path: list[str]) -> None:
        self.acts = 0
        self._number, self._path = number, path

    def watch(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            name = getattr(called, "__name__", "")
            if name not in _CALLS:
                return
        elif event == "call" and frame.f_code.co_name in _FUNCTIONS:
            name = frame.f_code.co_name
            if name == "do_execute":
                name = frame.f_locals["statement"].split()[0]
        elif event == "call" and frame.f_code.co_qualname == _PAGE:
            name = "page"
        else:
            return
        self.acts += 1
        if self._path and self._path[0] == name:
            self._path.pop(0)
            if not self._path:
                self._number = self.acts
        if self.acts == self._number:
            os.kill(os.getpid(), signal.SIGKILL)


def run(command: dict[str, Any]) -> int:
    """Run *command* in this process, which is its own."""
    output = os.open(command["output"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(command["environment"])
    if command["carried"]:
        transfer_service.SMALL_BYTES = 0  # type: ignore[misc] # a test's threshold
    sys.argv = ["db_cli.py", *command["arguments"]]
    ending = Ending(command["at_act"], command["at_path"])
    if command["watched"]:
        ending.watch()
    try:
        code = db_cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    sys.setprofile(None)
    say(f"acts: {ending.acts}")
    return code


def say(words: object) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def warm_up() -> None:
    """Have the mappers worked out once, and not by every child."""
    for mapper in Base.registry.mappers:
        mapper._sorted_tables  # noqa: B018 - it is worked out at the first look
    gc.freeze()


def main() -> None:
    warm_up()
    say(0)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(json.loads(line)))
        say(child)
        say(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
