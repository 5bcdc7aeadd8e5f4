"""Does training learn? Validation mIoU and AP50 on rooms that no step has seen, in the course of a run.

    python -m benchmarks.learning [--steps 800] [--out docs/learning]

Trains `baseline-5cm` and `bifusion` side by side, one process and one thread each, with `examples/learning.yaml`, and
prints both metrics before the first step and after the last. With --out, the curve (SVG) and its numbers (JSON) are
written. CLIP's weights are random and the rooms are synthetic: the curve shows that training learns, not how well the
model does on real scenes.
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

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from bifusion_diag.record import Run, load_run

MODELS = ("baseline-5cm", "bifusion")
METRICS = {"eval/miou": "mIoU, 200 classes", "eval/ap50": "AP50, class-agnostic"}
Curve = tuple[np.ndarray, np.ndarray]  # steps, values

CONFIG = Path(__file__).parent.parent / "examples" / "learning.yaml"


def train(folder: Path, steps: int | None) -> dict[str, float]:
    """Train every model at the same time; seconds of wall time until each has ended."""
    began = time.perf_counter()
    extra = [] if steps is None else ["--steps", str(steps)]
    running = {}
    for model in MODELS:
        arguments = ["train", "--model", model, "--config", str(CONFIG), *extra, "--out", str(folder / f"{model}.json")]
        log = (folder / f"{model}.log").open("w")
        running[model] = subprocess.Popen(
            [sys.executable, "-m", "bifusion_diag", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=log
        )
    seconds = {}
    while running:
        for model, process in list(running.items()):
            if process.poll() is not None:
                if process.returncode:
                    raise SystemExit(f"{model} failed:\n{(folder / f'{model}.log').read_text()[-2000:]}")
                seconds[model] = time.perf_counter() - began
                del running[model]
        time.sleep(0.5)
    return seconds


def curve(run: Run, name: str) -> Curve:
    """Steps and values at which a metric was measured."""
    series = run.series(name)
    if series is None:
        raise SystemExit(f"{name} was not recorded")
    measured = np.isfinite(series.value)
    return series.steps[measured], series.value[measured]


def draw(curves: dict[str, dict[str, Curve]], path: Path) -> None:
    """One panel a metric, one line a model."""
    matplotlib.rcParams.update({"svg.hashsalt": "bifusion-diag", "font.size": 9})
    figure, axes = plt.subplots(1, len(METRICS), figsize=(8, 2.8), layout="constrained")
    for axis, (name, title) in zip(axes, METRICS.items(), strict=True):
        for model, found in curves.items():
            axis.plot(*found[name], marker="o", markersize=3, label=model)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Train, print the table, and write the curve where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="instead of those of examples/learning.yaml")
    parser.add_argument("--out", type=Path, help="write OUT.svg and OUT.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = train(Path(folder), options.steps)
        runs = {model: load_run(Path(folder) / f"{model}.json") for model in MODELS}
    curves = {model: {name: curve(run, name) for name in METRICS} for model, run in runs.items()}
    print(f"{'model':<16}{'minutes':>9}" + "".join(f"{title:>30}" for title in METRICS.values()))
    for model in MODELS:
        cells = (f"{values[0]:.4f} -> {values[-1]:.4f}" for _, values in curves[model].values())
        print(f"{model:<16}{seconds[model] / 60:>9.1f}" + "".join(f"{cell:>30}" for cell in cells))
    if options.out:
        draw(curves, options.out.with_suffix(".svg"))
        report = {
            model: {
                "minutes": round(seconds[model] / 60, 1),
                "provenance": run.provenance,
                **{name: {"steps": x.tolist(), "values": y.tolist()} for name, (x, y) in curves[model].items()},
            }
            for model, run in runs.items()
        }
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
