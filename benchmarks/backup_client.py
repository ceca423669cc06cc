"""
One person who asks at a steady rate, alone or while an admin has work done; a process of its own.

Reads one JSON object (`port`, `path`, `token`, `a_second`, `seconds`, and `admin_token` and `work`
where something is to be done: a `backup`, or `retention`) and writes another: `milliseconds`, how
long each answer took, and `seconds`, how long the work did. Any answer but the one that is
expected ends it with an error.
"""

import http.client
import json
import sys
import threading
import time
from typing import Any, Final

from benchmarks.client import HEADERS, Connection, spelled

# However large the database is.
_MOST_SECONDS: Final = 180
_BETWEEN_LOOKS: Final = 0.25


class Work(threading.Thread):
    """Has the service work through the API; *failure* says how that went wrong."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__(daemon=True)
        self._port = port
        own = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._headers = HEADERS | own
        self.seconds = 0.0
        self.failure = "it has not ended"

    def run(self) -> None:
        started = time.perf_counter()
        self.failure = self.work()
        self.seconds = time.perf_counter() - started

    def work(self) -> str:
        """Do it; say how it went wrong, or nothing."""
        raise NotImplementedError

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_MOST_SECONDS)
        try:
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status not in (http.HTTPStatus.OK, http.HTTPStatus.CREATED):
            self.failure = f"{method} {path} was answered {answer.status}: {text}"
            sys.exit(1)
        return json.loads(text)


class Backup(Work):
    """Makes one."""

    def work(self) -> str:
        record = self._ask("POST", "/security/backup/create", "{}")
        while record["status"] == "running":
            time.sleep(_BETWEEN_LOOKS)
            record = self._ask("GET", f"/security/backup/{record['id']}")
        return "" if record["status"] == "complete" else f"it is {record['status']}"


class Retention(Work):
    """Deletes the feedback that is due, confirmed by a dry run."""

    def work(self) -> str:
        order = {"dry_run": True, "data_type": "feedback"}
        path = "/security/retention/apply"
        digest = self._ask("POST", path, json.dumps(order))["plan_digest"]
        order |= {"dry_run": False, "plan_digest": digest}
        (done,) = self._ask("POST", path, json.dumps(order))["results"]
        return "" if done["affected"] else "nothing was due"


_WORK: Final[dict[str, type[Work]]] = {"backup": Backup, "retention": Retention}


def drive(order: dict[str, Any], work: Work | None) -> list[float]:
    """Ask until *work* has ended, or for the ordered seconds; milliseconds of each answer."""
    request = spelled(order["port"], "GET", order["path"], order["token"])
    connection = Connection(order["port"], [request])
    taken: list[float] = []
    started = answered = time.perf_counter()
    if work is not None:
        work.start()
    while answered - started < (order["seconds"] if work is None else _MOST_SECONDS):
        due = started + len(taken) / order["a_second"]
        is_late = answered > due
        time.sleep(max(0.0, due - time.perf_counter()))
        # Who would ask while the last answer is still out waits from then on; that this process
        # wakes a little late is nobody's fault.
        begun = due if is_late else time.perf_counter()
        connection.ask()
        while not connection.is_answered():
            pass
        if not connection.is_success():
            sys.exit(f"GET {order['path']} was refused")
        answered = time.perf_counter()
        taken.append((answered - begun) * 1000)
        if work is not None and not work.is_alive():
            break
    connection.socket.close()
    return taken


def main() -> None:
    order = json.load(sys.stdin)
    work = None
    if "admin_token" in order:
        work = _WORK[order.get("work", "backup")](order["port"], order["admin_token"])
    taken = drive(order, work)
    if work is not None and work.failure:
        sys.exit(f"the {order.get('work', 'backup')}: {work.failure}")
    json.dump({"milliseconds": taken, "seconds": work.seconds if work else 0}, sys.stdout)


if __name__ == "__main__":
    main()
