"""Where the time of a step goes, and the memory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.optim import Optimizer

from bifusion_diag.probes.base import Probe, Reading, Schedule, Subject

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

Phase = Literal["begin", "forward", "backward", "update", "rest"]
Mark = Any  # a moment, as a clock notes it
MIB = 1 << 20
WAITING = 64  # steps at most that a device may lag behind


class ThroughputProbe(Probe):
    """Times the phases of a step. With several forwards, backwards or updates in a step, each phase is their sum.

    On a CPU these are the host's times of the very step. A CUDA device works behind the host's back, and waiting for it
    would slow it down: there, all but data_seconds are times between CUDA events, of the latest step that the device
    had finished when this one ended. That is one step late, or a few.
    """

    prefix = "throughput"
    KEYS: ClassVar[dict[str, str]] = {
        "data_seconds": "from the end of the last step block to the beginning of this one, by the host's clock: "
        "loading, and what else the loop does there, such as evaluation; missing if the last step was not measured",
        "forward_seconds": "from the block's beginning, or the last backward's end, to the first gradient at an output "
        "that is watched: the forward and the loss",
        "backward_seconds": "from there to the end of the backward",
        "update_seconds": "in the optimisers' step(); missing if there was none",
        "step_seconds": "from the block's beginning to its end, clipping and what else is in it included",
        "resident_mib": "memory of the process on the host, at the block's end; missing where there is no /proc",
        "peak_resident_mib": "the most that it ever was, since the process began",
        "device_mib": "CUDA memory in tensors, at the block's end; missing on a CPU",
        "device_peak_mib": "the most that it was since the process began or its peak was reset; likewise",
    }

    def __init__(self, *, name: str | None = None, every: int | Schedule | None = None) -> None:
        super().__init__(name=name, every=every)
        self._ended: float | None = None  # when the last step block did
        chosen = self.every

        def noted(step: int) -> bool:
            due = chosen(step)
            if not due:
                self._ended = None  # the time since then is not that of loading one batch
            return due

        self.every = noted
        self._names = tuple(f"{self.name}/{key}" for key in self.KEYS)

    def attach(self, subject: Subject) -> None:
        parameter = next(subject.model.parameters(), None)
        device = None if parameter is None else parameter.device
        self._clock = CudaClock(device) if device is not None and device.type == "cuda" else HostClock()
        self._waiting: deque[list[tuple[Phase, Mark]]] = deque(maxlen=WAITING)
        self._ended = None

    def begin(self) -> None:
        now = time.perf_counter()
        self._data = None if self._ended is None else now - self._ended
        self._ended = None
        self._marks: list[tuple[Phase, Mark]] = []
        self._mark("begin")

    def backward_began(self) -> None:
        self._mark("forward")

    def backward_ended(self) -> None:
        self._mark("backward")

    def before_update(self, optimizer: Optimizer) -> None:
        self._mark("rest")

    def after_update(self, optimizer: Optimizer) -> None:
        self._mark("update")

    def collect(self) -> Iterator[Reading]:
        self._mark("rest")
        self._waiting.append(self._marks)
        seconds: dict[Phase, float] = {}
        while self._waiting and self._clock.has_passed(self._waiting[0][-1][1]):
            seconds = self._phases(self._waiting.popleft())
        row = (
            self._data,
            seconds.get("forward"),
            seconds.get("backward"),
            seconds.get("update"),
            sum(seconds.values()) if seconds else None,
            *_host_memory(),
            *self._clock.memory(),
        )
        values = torch.tensor([value or 0.0 for value in row], dtype=torch.float32)
        yield Reading(self._names, values, missing=np.asarray([value is None for value in row]))
        self._ended = time.perf_counter()

    def _mark(self, phase: Phase) -> None:
        """Note that a phase ends now."""
        self._marks.append((phase, self._clock.mark()))

    def _phases(self, marks: list[tuple[Phase, Mark]]) -> dict[Phase, float]:
        """Seconds by phase, of a step that the device has finished."""
        seconds: dict[Phase, float] = {}
        for (_, began), (phase, ended) in pairwise(marks):
            seconds[phase] = seconds.get(phase, 0.0) + self._clock.seconds(began, ended)
        return seconds


class HostClock:
    """Marks are times."""

    def mark(self) -> Mark:
        """Now."""
        return time.perf_counter()

    def has_passed(self, mark: Mark) -> bool:
        """Whether a mark lies in the past."""
        return True

    def seconds(self, began: Mark, ended: Mark) -> float:
        """From one mark to another."""
        return float(ended - began)

    def memory(self) -> tuple[float | None, float | None]:
        """Memory in tensors and its peak [MiB]."""
        return None, None


class CudaClock(HostClock):
    """Marks are events of the current stream. Nothing here waits for the device: its memory is counted on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def has_passed(self, mark: Mark) -> bool:
        return bool(mark.query())

    def seconds(self, began: Mark, ended: Mark) -> float:
        return float(began.elapsed_time(ended)) / 1000

    def memory(self) -> tuple[float | None, float | None]:
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)["allocated_bytes"]["all"]
        return stats["current"] / MIB, stats["peak"] / MIB


def _host_memory() -> tuple[float | None, float | None]:
    """Resident memory of the process and its peak [MiB]."""
    now: float | None = None
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * resource.getpagesize() / MIB
    if resource is None:
        return now, None
    unit = 1 if sys.platform == "darwin" else 1024
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
