"""Wall time and peak memory of the main job on real RGB-D frames, at full scale.

    python -m benchmarks.real_frames --frames FOLDER [--steps 20] [--threads 2] [--json out.json]

Trains `baseline-5cm` and `bifusion` with every probe on, compares them, and prints for each command its wall time and
its peak resident memory, as the operating system counts them for the finished process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "bifusion_diag"]


def timed(arguments: list[str], threads: int) -> dict[str, float]:
    """Run a command to its end; seconds of wall time and GiB of peak resident memory."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with exit code {process.returncode}: bifusion-diag {' '.join(arguments)}")
    return {"seconds": time.perf_counter() - began, "peak_gib": usage.ru_maxrss / 2**20}


def main() -> None:
    """Run the commands and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        records = {model: f"{folder}/{model}.json" for model in ("baseline-5cm", "bifusion")}
        for model, record in records.items():
            arguments = ["train", "--model", model, "--data", str(options.frames), "--steps", str(options.steps)]
            results[f"train {model}"] = timed([*arguments, "--probe", "all", "--out", record], options.threads)
        compare = ["compare", *records.values(), "--html", f"{folder}/report.html"]
        results["compare"] = timed(compare, options.threads)
    print(f"{'command':<24}{'wall [s]':>10}{'peak [GiB]':>12}")
    for name, result in results.items():
        print(f"{name:<24}{result['seconds']:>10.1f}{result['peak_gib']:>12.2f}")
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
