"""Every preset at full scale: a few training steps on synthetic rooms, each preset in a process of its own.

    python -m benchmarks.presets                             all presets, 3 steps each
    python -m benchmarks.presets --presets bifusion baseline --steps 5

Prints seconds a step, peak memory of the process, and whether losses and gradients stayed finite. Exits with 1 if a
preset fails: its run does not complete, or something is not finite that its own settings do not make so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bifusion_diag.config import load_settings, preset_names
from bifusion_diag.record import Run, load_run

_MAXRSS_PER_GIB = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
_COLUMNS = "{:18s}  {:>10s}  {:>11s}  {:>9s}  {}"


@dataclass(frozen=True)
class Measurement:
    """A run of one preset. The numbers are None where the run left no record."""

    preset: str
    seconds: float  # the whole process
    step_seconds: float | None  # median over the steps
    peak_gib: float  # largest resident memory of the process
    losses: list[float] | None
    grad_norms: list[float] | None
    problems: list[str]


def problems_of(losses: Sequence[float], grad_norms: Sequence[float], *, steps: int, may_be_nan: bool) -> list[str]:
    """What a preset's run must not show.

    Args:
        losses: total loss by step.
        grad_norms: norm of the gradient before clipping, by step.
        steps: as many as were asked for.
        may_be_nan: the preset averages over an empty match as ESAM does (``empty_match: nan``). The loss of such a step
            is NaN, its gradient is not.
    """
    problems = []
    if len(losses) != steps:
        problems.append(f"{len(losses)} of {steps} steps")
    if bad := sum(not math.isfinite(loss) for loss in losses if not (may_be_nan and math.isnan(loss))):
        problems.append(f"non-finite loss in {bad} steps")
    if bad := sum(not math.isfinite(norm) for norm in grad_norms):
        problems.append(f"non-finite gradient in {bad} steps")
    if not any(norm > 0 for norm in grad_norms):
        problems.append("no gradient")
    return problems


def measure(preset: str, *, scale: str, steps: int, batch: int) -> Measurement:
    """Train a preset in a process of its own, and read its record."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "run.json", Path(folder) / "log.txt"
        values = {"training.batch_size": batch, "data.scenes": batch}
        command = [sys.executable, "-m", "bifusion_diag", "train", "--model", preset, "--scale", scale]
        command += ["--steps", str(steps), "--out", str(out)]
        command += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
        began = time.perf_counter()
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here, for the sake of its memory
        seconds, peak = time.perf_counter() - began, usage.ru_maxrss / _MAXRSS_PER_GIB
        if process.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            problem = ": ".join([f"exit code {process.returncode}", *last])
            return Measurement(preset, seconds, None, peak, None, None, [problem])
        run = load_run(out)
    losses, norms = _values(run, "loss/total"), _values(run, "train/grad_norm")
    may_be_nan = load_settings(preset).losses.instance.empty_match == "nan"
    return Measurement(
        preset,
        seconds,
        statistics.median(_values(run, "train/step_seconds")),
        peak,
        losses,
        norms,
        problems_of(losses, norms, steps=steps, may_be_nan=may_be_nan),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=preset_names(), default=preset_names(), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="scenes a step")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    print(_COLUMNS.format("preset", "step [s]", "peak [GiB]", "run [s]", "finite"))
    measurements = []
    for preset in options.presets:
        found = measure(preset, scale=options.scale, steps=options.steps, batch=options.batch)
        measurements.append(found)
        step = "-" if found.step_seconds is None else f"{found.step_seconds:.2f}"
        finite = "FAILED: " + "; ".join(found.problems) if found.problems else _finite(found)
        print(_COLUMNS.format(preset, step, f"{found.peak_gib:.2f}", f"{found.seconds:.1f}", finite), flush=True)
    failed = [found.preset for found in measurements if found.problems]
    total = time.perf_counter() - began
    print(f"{len(measurements) - len(failed)} of {len(measurements)} presets trained, in {total:.0f} s")
    if options.json:
        report = {
            "steps": options.steps,
            "batch": options.batch,
            "scale": options.scale,
            "cpus": os.cpu_count(),
            "measurements": [_plain(found) for found in measurements],
        }
        options.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return 1 if failed else 0


def _finite(found: Measurement) -> str:
    nan = sum(math.isnan(loss) for loss in found.losses or ())
    return f"yes, but for {nan} losses over an empty match" if nan else "yes"


def _plain(found: Measurement) -> dict[str, Any]:
    """Without NaN and infinity, which JSON does not have: they become text."""
    plain = asdict(found)
    for name in ("losses", "grad_norms"):
        if plain[name] is not None:
            plain[name] = [value if math.isfinite(value) else str(value) for value in plain[name]]
    return plain


def _values(run: Run, name: str) -> list[float]:
    series = run.series(name)
    return [] if series is None else [float(value) for value in series.value]


if __name__ == "__main__":
    sys.exit(main())
