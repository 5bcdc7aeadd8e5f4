"""A thread that writes, so that training never waits for a disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Job = Callable[[], None]


class Background:
    """Runs jobs in the order in which they were given, one at a time, in a thread of its own.

    Args:
        limit: bytes that may wait. A job that is more is refused.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._limit = limit
        self._jobs: deque[tuple[Job, int]] = deque()
        self._waiting = 0  # bytes
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._error: BaseException | None = None
        # A daemon: a program that ends without closing it loses what still waits, and does not hang.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job, size: int, *, small: bool = False) -> bool:
        """Have a job run later; False where the queue is full and the job will not run. Never waits.

        Args:
            size: bytes that the job holds.
            small: it may take twice the room: what is small and matters still passes when the queue is full.
        """
        with self._changed:
            assert not self._closed, "the record is finished"
            if self._jobs and self._waiting + size > self._limit * (2 if small else 1):
                return False
            self._jobs.append((job, size))
            self._waiting += size
            self._changed.notify_all()
            return True

    def wait(self) -> None:
        """Return when everything given so far has run."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._busy)

    def close(self) -> None:
        """Run what waits and end the thread. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.wait()  # a join that Ctrl-C has ended does not wait again (CPython < 3.13)
        self._thread.join()

    def take_error(self) -> BaseException | None:
        """What a job has raised, once. No job is run after it."""
        with self._changed:
            error, self._error = self._error, None
            return error

    def _run(self) -> None:
        broken = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job, size = self._jobs.popleft()
                self._busy = True
            try:
                if not broken:
                    job()
            except BaseException as error:
                broken = True
                with self._changed:
                    self._error = error
            finally:
                del job  # and the rows that it holds
                with self._changed:
                    self._busy = False
                    self._waiting -= size
                    self._changed.notify_all()
