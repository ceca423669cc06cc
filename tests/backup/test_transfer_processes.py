"""The two processes of a transfer: neither needs much memory, and the one ends with the other."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from backend.backup.storage import LocalStore
from backend.backup.stores import StoreAddress
from tests.backup.commands import ROOT, WORKER, is_running, wait_for_child, wait_until

MIB: Final = 1024 * 1024
LIMIT_KIB: Final = 100 * 1024
# A process of its own, for its memory is measured and it may be killed.
_CARRIER: Final = """
import json, os, resource, sys
from backend.backup.archive import Stored
from backend.backup.stores import StoreAddress
from backend.crypto.files import PayloadKey
from backend.services.transfer_service import get_transfer_service
folder, descriptor = sys.argv[1:]
address, key = StoreAddress(folder), PayloadKey(bytes(32), b"context")
service, size = get_transfer_service(), 1 << 40
with os.fdopen(int(descriptor), "rb", buffering=0) as source:
    done = service.write(address, "a.hfb", source, key, size_bytes=size,
                         require_whole=lambda: None, report=lambda done: None)
with open(os.devnull, "wb") as target:
    stored = Stored("a.hfb", 0, done.plain_bytes, done.sha256)
    service.read(address, stored, target, key, report=lambda done: None)
# What the system counts for us itself begins with what our own parent had.
(own,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
carrier = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.plain_bytes, int(own), carrier]))
"""


@pytest.fixture
def address(tmp_path: Path) -> StoreAddress:
    return StoreAddress(str(tmp_path / "store"))


def carrier(address: StoreAddress, source: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _CARRIER, address.url, str(source)],
        stdout=subprocess.PIPE, text=True, pass_fds=[source],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_neither_process_needs_memory_for_what_is_carried(
    address: StoreAddress, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    with plain.open("wb") as file:
        for at in range(0, 300, 10):
            file.seek(at * MIB)
            file.write(os.urandom(2 * MIB))
        file.truncate(300 * MIB)
    with plain.open("rb") as source, carrier(address, source.fileno()) as process:
        assert process.stdout is not None
        carried, *used_kib = json.loads(process.stdout.read())
    assert carried == 300 * MIB
    assert max(used_kib) < LIMIT_KIB


def test_a_process_whose_parent_is_killed_ends_though_it_waits_for_the_dump(
    address: StoreAddress,
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb"), os.fdopen(writer, "wb"):
        with carrier(address, reader) as parent:
            worker = wait_for_child(parent.pid, WORKER)
            os.kill(worker, signal.SIGCONT)
            wait_until(lambda: list(Path(address.url).glob(".partial-*")))
            parent.kill()
        wait_until(lambda: not is_running(worker))
        assert LocalStore(address.url).sweep() == 1
