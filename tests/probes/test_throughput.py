"""Times of a step's phases, against sleeps inside and a stopwatch outside of them."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bifusion_diag.probes import Monitor
from bifusion_diag.probes.throughput import HostClock, ThroughputProbe

FORWARD, BACKWARD, UPDATE, DATA, REST = 0.03, 0.04, 0.02, 0.05, 0.01
ROUNDED = 1 + 1e-6  # a record holds float32


class Sleepy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(BACKWARD)
        return gradient


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(Sleepy.apply(self.inner(x))).sum()


class SlowSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        time.sleep(UPDATE)
        return super().step(closure)


def rows(micro: int = 1, steps: int = 3, **options: Any) -> list[tuple[dict[str, float | None], float]]:
    """The row of each step, and how long its block took by a stopwatch."""
    model = Slow()
    optimizer = SlowSGD(model.parameters(), lr=0.1)
    found = []
    with Monitor(model, optimizer, probes=[ThroughputProbe(**options)]) as monitor:
        for _ in range(steps):
            time.sleep(DATA)
            began = time.perf_counter()
            with monitor.step():
                for _ in range(micro):
                    model(torch.ones(1, 2)).backward()
                time.sleep(REST)
                optimizer.step()
            took = time.perf_counter() - began
            monitor.end_step()
            found.append(({key.split("/")[1]: value for key, value in monitor.latest().items()}, took))
    return found


@pytest.mark.parametrize("micro", [1, 2])
def test_every_phase_lies_between_its_sleep_and_what_the_others_leave(micro: int) -> None:
    asleep = {"forward": FORWARD * micro, "backward": BACKWARD * micro, "update": UPDATE}
    for row, took in rows(micro):
        times = {key.removesuffix("_seconds"): value for key, value in row.items() if key.endswith("_seconds")}
        known = {key: value for key, value in times.items() if value is not None}
        assert known["step"] <= took * ROUNDED
        assert known["step"] >= sum(known[phase] for phase in asleep) + REST * 0.99
        for phase, least in asleep.items():
            others = sum(value for other, value in asleep.items() if other != phase) + REST
            assert least <= known[phase] * ROUNDED <= (took - others) * ROUNDED**2, phase


def test_data_is_what_lies_between_the_blocks() -> None:
    ends, begins, measured = [], [], []
    with Monitor(nn.Linear(1, 1), probes=[ThroughputProbe()]) as monitor:
        for _ in range(3):
            time.sleep(DATA)
            with monitor.step():
                begins.append(time.perf_counter())
                time.sleep(REST)
                ends.append(time.perf_counter())
            monitor.end_step()
            measured.append(monitor.latest()["throughput/data_seconds"])
    assert measured[0] is None
    for step in (1, 2):
        assert measured[step] * ROUNDED >= DATA  # type: ignore[operator]
        assert measured[step] <= (begins[step] - ends[step - 1]) * ROUNDED  # type: ignore[operator]


def test_without_neighbours_there_is_no_data_time() -> None:
    found = [row.get("data_seconds") for row, _ in rows(steps=5, every=lambda step: step != 2)]
    assert [value is None for value in found] == [True, False, True, True, False]  # step 2 has no row of its own


def test_a_step_of_a_forward_alone() -> None:
    model = Slow()
    with Monitor(model, probes=[ThroughputProbe()]) as monitor:
        with monitor.step():
            model(torch.ones(1, 2))
        monitor.end_step()
        row = monitor.latest()
    assert [row[f"throughput/{phase}_seconds"] for phase in ("forward", "backward", "update")] == [None] * 3
    assert row["throughput/step_seconds"] >= FORWARD * 0.99  # type: ignore[operator]


def test_two_optimizers_and_an_exception() -> None:
    model = Slow()
    optimizers = [SlowSGD([p], lr=0.1) for p in model.parameters()]
    with Monitor(model, optimizers, probes=[ThroughputProbe()]) as monitor:
        with pytest.raises(RuntimeError, match="broken"), monitor.step():
            raise RuntimeError("broken")
        with monitor.step():
            model(torch.ones(1, 2)).backward()
            for optimizer in optimizers:
                optimizer.step()
        monitor.end_step()
        row = monitor.latest()
    assert row["throughput/data_seconds"] is None
    assert row["throughput/update_seconds"] * ROUNDED >= 2 * UPDATE  # type: ignore[operator]


def test_memory_is_that_of_the_process() -> None:
    row, _ = rows(steps=1)[0]
    status = Path("/proc/self/status").read_text()
    now = int(status.split("VmRSS:")[1].split()[0]) / 1024
    assert row["resident_mib"] == pytest.approx(now, abs=30)  # pages come and go between the two readings
    assert row["peak_resident_mib"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, abs=30)
    assert (row["device_mib"], row["device_peak_mib"]) == (None, None)


def test_of_a_device_that_lags_a_row_holds_the_latest_finished_step() -> None:
    class Late(HostClock):
        """Stands for a device that has done only so much."""

        done = 0.0

        def has_passed(self, mark: float) -> bool:
            return mark <= self.done

    clock = Late()
    model = nn.Linear(1, 1)
    probe = ThroughputProbe()
    took: list[float | None] = []
    with Monitor(model, probes=[probe]) as monitor:
        probe._clock = clock
        for step, nap in enumerate((0.02, 0.0, 0.03, 0.0)):
            if step in (1, 3):
                clock.done = time.perf_counter()  # all steps before this one are done
            with monitor.step():
                time.sleep(nap)
            monitor.end_step()
            took.append(monitor.latest()["throughput/step_seconds"])
    assert took[0] is None
    assert took[2] is None
    assert took[1] is not None
    assert took[3] is not None
    assert took[1] >= 0.02 * 0.99
    assert took[3] >= 0.03 * 0.99


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_waits_and_times_are_those_of_the_device() -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4096, 2048, device="cuda")
    with Monitor(model, optimizer, probes=[ThroughputProbe()]) as monitor:
        for step in range(6):
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            with monitor.step():
                model(x).square().mean().backward()
                optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            took = time.perf_counter() - began
            monitor.end_step()
    row = monitor.latest()
    seconds = row["throughput/step_seconds"]
    assert seconds is not None
    assert 0.3 * took < seconds < 1.5 * took
    assert row["throughput/device_mib"] == pytest.approx(torch.cuda.memory_allocated() / 2**20, rel=0.5)
