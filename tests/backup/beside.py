"""Threads that do something again and again beside a block of a test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(*works: Callable[[], None]) -> Iterator[list[Exception]]:
    """Do each of *works* in a thread of its own, again and again; yield what they raise."""
    stop, raised = threading.Event(), list[Exception]()

    def repeat(work: Callable[[], None]) -> None:
        while not stop.is_set() and not raised:
            try:
                work()
            except Exception as err:  # noqa: BLE001 - looked at by the test
                raised.append(err)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    try:
        yield raised
        time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
