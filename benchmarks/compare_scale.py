"""How long `bifusion-diag compare` takes on two long runs, and how much memory.

    python -m benchmarks.compare_scale
    python -m benchmarks.compare_scale --steps 100000 --series 200 --folder /scratch --json compare.json

Writes two records with the program's own writer, in blocks of 32 rows as the Monitor does: losses, gradient norms,
states and update ratios by module that vary as real ones do, and of the second run some spikes and non-finite steps.
Each record ends as a run.json with its measures at full resolution. Then the command runs in a process of its own: on
the two run.json, on the two .record folders of these finished runs, and with --killed also on the folders alone, as a
killed run leaves them (that goes through every number). Peak memory is the process's own high-water mark (what
getrusage states begins with that of the process that started it). All files are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis import measure_record, measures_to_dict
from bifusion_diag.record import ModuleInfo, RecordReader, RunHeader, RunWriter

BLOCK = 32  # rows
POOL = 4096  # rows of noise that every block draws from: making new noise would take longer than writing it
LIMIT_SECONDS, LIMIT_MIB = 20.0, 2048.0
BY_MODULE = ("grads/{}/param_norm", "grads/{}/state", "updates/{}/ratio", "activations/{}/absmax")
TERMS = ("instance", "semantic", "clip_align")
FINITE = 3  # in grads/<module>/state


def names_of(series: int) -> tuple[list[str], list[ModuleInfo]]:
    """Names of so many series, and the modules that most of them are of."""
    names = ["loss/total", *(f"loss/{term}/{kind}" for term in TERMS for kind in ("raw", "weighted"))]
    names += ["train/grad_norm", "train/clip_coefficient", "train/lr"]
    count = -(-(series - len(names)) // len(BY_MODULE))
    modules = [ModuleInfo(f"part{i % 8}.layer{i}", "Linear", i, f"part{i % 8}", 1000, 1000) for i in range(count)]
    names += [pattern.format(module.name) for module in modules for pattern in BY_MODULE]
    return names[:series], modules


def noise(names: list[str], rng: np.random.Generator) -> NDArray[np.float32]:
    """A pool of rows (POOL, series): every series has a magnitude of its own and varies by a third."""
    magnitude = 10.0 ** rng.uniform(-3, 1, len(names))
    rows = (magnitude * rng.lognormal(0, 0.3, (POOL, len(names)))).astype(np.float32)
    for column, name in enumerate(names):
        if name.endswith("/state"):
            rows[:, column] = FINITE
        elif name == "train/clip_coefficient":
            rows[:, column] = np.minimum(rows[:, column], 1)
    return rows


def write(path: Path, name: str, steps: int, series: int, seed: int, bad: NDArray[np.int64]) -> float:
    """Write a run and its run.json; of the bad steps every fourth is non-finite. Returns the seconds."""
    start = time.perf_counter()
    rng = np.random.default_rng(seed)
    names, modules = names_of(series)
    pool = noise(names, rng)
    norm = names.index("train/grad_norm")
    gradients = np.asarray([i for i, one in enumerate(names) if one.endswith("/param_norm")])
    header = RunHeader(name, modules=modules, settings={"training": {"seed": seed, "batch_size": 1}})
    with RunWriter(path, header) as writer:
        for first in range(0, steps, BLOCK):
            at = np.arange(first, min(first + BLOCK, steps))
            rows = pool[rng.integers(0, POOL, at.size)]
            for number in bad[(bad >= first) & (bad < first + BLOCK)]:
                row = rows[number - first]
                factor = np.nan if number % 4 == 0 else 50.0
                row[norm] *= factor
                row[gradients] *= factor
            writer.append_block(at, names, rows)
        writer.flush()
        writer.finish("completed", measures=measures_to_dict(measure_record(RecordReader(writer.folder))))
    return time.perf_counter() - start


def timed(arguments: list[str]) -> dict[str, Any]:
    """Run the command line in a process of its own: seconds, peak memory and exit code."""
    code = (
        "import json, sys, time; start = time.perf_counter();"
        "sys.argv = ['bifusion-diag', *sys.argv[1:]];"
        "from bifusion_diag.cli.app import main\n"
        "ended = 0\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    ended = end.code or 0\n"
        "status = open('/proc/self/status').read()\n"
        "peak = int(status.split('VmHWM:')[1].split()[0]) / 1024\n"
        "print(json.dumps({'seconds': time.perf_counter() - start, 'peak_mib': peak, 'exit_code': ended}))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["exit_code"] not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_scale", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="where the records go; default: the system's folder for such files")
    parser.add_argument("--killed", action="store_true", help="also the folders without their run.json")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"steps": options.steps, "series": options.series, "cores": os.cpu_count()}
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = [Path(folder) / f"{name}.json" for name in ("baseline", "candidate")]
        bad = np.unique(np.random.default_rng(5).integers(100, options.steps, max(4, options.steps // 20_000)))
        none = np.zeros(0, np.int64)
        found["write_seconds"] = [
            write(path, path.stem, options.steps, options.series, seed, steps)
            for seed, (path, steps) in enumerate(zip(paths, (none, bad), strict=True))
        ]
        records = [path.with_suffix(".record") for path in paths]
        found["record_gb"] = sum(file.stat().st_size for one in records for file in one.iterdir()) / 1e9
        found["run_json_mb"] = [path.stat().st_size / 1e6 for path in paths]
        found["run.json"] = timed(["compare", *map(str, paths)])
        found[".record"] = timed(["compare", *map(str, records)])
        if options.killed:
            for path in paths:
                path.unlink()
            found["killed"] = timed(["compare", *map(str, records)])
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    held = [found[name] for name in ("run.json", ".record")]
    found["within"] = all(one["seconds"] < LIMIT_SECONDS and one["peak_mib"] < LIMIT_MIB for one in held)
    found["limits"] = {"seconds": LIMIT_SECONDS, "peak_mib": LIMIT_MIB}
    found["own_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0 if found["within"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
