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
    """Whether a signal has asked the run to end, and which. Where several processes train, a signal that one of them
    received counts once all know of it."""

    shared: bool = False  # with other processes
    received: int = 0  # number of the signal that came to this process; 0: none
    agreed: int = 0  # the one that all processes know of
    ranks: tuple[int, ...] = ()  # who received it

    @property
    def requested(self) -> bool:
        """The run should end after this step."""
        return bool(self.agreed if self.shared else self.received)

    @property
    def signal_name(self) -> str | None:
        """Of the signal that ends the run."""
        return signal.Signals(self.agreed if self.shared else self.received).name if self.requested else None

    def agree(self, number: int, ranks: tuple[int, ...]) -> None:
        """All processes know of a signal, and who received it; 0: there was none."""
        if self.shared:
            self.agreed, self.ranks = number, ranks


@contextmanager
def stop_on_signals(shared: bool = False) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, and say so; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.

    Args:
        shared: the run is several processes, which are to end at the same step.
    """
    request = StopRequest(shared)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.received:
            raise KeyboardInterrupt
        request.received = number
        name = signal.Signals(number).name
        # Straight to stderr: a handler may run in the middle of Python's own printing, which may not be entered again.
        os.write(2, f"\n{name}: ending after this step; once more ends at once\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
