"""Ctrl-C and SIGTERM end a run after the step under way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether a signal has asked the run to end, and which."""

    signal_name: str | None = None

    @property
    def requested(self) -> bool:
        """The run should end after this step."""
        return self.signal_name is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, and say so; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name
        # Straight to stderr: a handler may run in the middle of Python's own printing, which may not be entered again.
        os.write(2, f"\n{request.signal_name}: ending after this step; once more ends at once\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
