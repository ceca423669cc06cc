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
_FUNCTIONS: Final = frozenset({"do_execute", "do_commit", "do_rollback", "__call__"})
# Called for each page that a swap of SQLite's copies: nothing else happens between the two ends.
_PAGE: Final = "_Keeper.__call__"


class Acts:
    """The acts of this process, so far."""

    number = 0


def watch(acts: Acts, at_act: int, at_path: list[str]) -> None:
    """
    Count the acts of this process, and end it before one of them.

    Args:
        at_act: Which; 0 for none.
        at_path: Or acts that come one after the other: end before the last one of them.
    """

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            name = getattr(called, "__name__", "")
            if name not in _CALLS:
                return
        elif event == "call" and frame.f_code.co_name in _FUNCTIONS:
            name = frame.f_code.co_name
            if name == "do_execute":
                name = frame.f_locals["statement"].split()[0]
            elif name == "__call__":
                if frame.f_code.co_qualname != _PAGE:
                    return
                name = "page"
        else:
            return
        acts.number += 1
        reached = acts.number == at_act
        if at_path and at_path[0] == name:
            at_path.pop(0)
            reached = not at_path
        if reached:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(look)
    sys.setprofile(look)


def run(command: dict[str, Any], output: int) -> int:
    """Run *command* in this process, which is its own; what it says goes to *output*."""
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(command["environment"])
    if command["carried"] is not None:
        transfer_service.SMALL_BYTES = 0 if command["carried"] else 1 << 40  # type: ignore[misc] # a test's threshold
    sys.argv = ["db_cli.py", *command["arguments"]]
    acts = Acts()
    if command["watched"]:
        watch(acts, command["at_act"], command["at_path"])
    try:
        code = db_cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    sys.setprofile(None)
    say(f"acts: {acts.number}")
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
        command = json.loads(line)
        # Here, so that one that is killed at its first moment has said nothing, too.
        output = os.open(command["output"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        child = os.fork()
        if child == 0:
            os._exit(run(command, output))
        os.close(output)
        say(child)
        say(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
