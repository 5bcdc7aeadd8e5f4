"""Healthy trainings: what do the rules say where nothing is wrong?

    python -m benchmarks.healthy                    20 trainings, about ten minutes
    python -m benchmarks.healthy --only 3 7         some of them, by number
    python -m benchmarks.healthy --json healthy.json --keep runs/healthy

Presets, seeds, schedules, stages, learning rates, batch sizes and evaluation differ; the rooms are synthetic, without
flaws but for two runs whose settings are made to cope with them, and CLIP's weights are random. Every probe is on. The
findings of each run are those that `bifusion-diag report` shows. Exits with 1 if any has the severity "error": a run is
as healthy as its preset, and nothing was broken.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bifusion_diag.config import load_settings
from bifusion_diag.diagnosis import assess_run, load_measured
from bifusion_diag.diagnosis.findings import SEVERITIES
from bifusion_diag.training import start_training

STEPS = 60
SMALL: Mapping[str, Any] = {
    "training.steps": STEPS,
    "training.batch_size": 2,
    "training.threads": 1,
    "training.device": "cpu",
    "data.scenes": 24,
    "data.max_points": 2000,
    "data.image_height": 120,
    "data.image_width": 160,
}
FLAWS = {"data.flaws.lost_tracking": 0.1, "data.flaws.colour_outliers": 0.1}
VIEWS = {"data.views": 2, "data.point_views": 3}

#: Preset and what differs from it.
RUNS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("bifusion", {}),
    ("bifusion", {"training.seed": 1}),
    ("bifusion", {"training.seed": 2, **VIEWS}),
    ("bifusion", {"losses.schedule": "constant", "training.stages": "none"}),
    ("bifusion", {"losses.schedule": "progressive_clip", "training.seed": 3}),
    ("bifusion", {"training.stages": "three_phase", "model.clip.tune": "blocks"}),
    ("bifusion", {"optim.schedule": "constant", "training.batch_size": 4}),
    ("bifusion", {"optim.lr": 1e-3, "evaluation.every": 20, "evaluation.scenes": 4}),
    ("bifusion", {**FLAWS, **VIEWS, "training.seed": 4}),
    ("bifusion-lite", {}),
    ("bifusion-lite", {"training.seed": 1, "training.batch_size": 4}),
    ("bifusion-simple", {}),
    ("bifusion-safe", {"training.seed": 5}),
    ("bifusion-safe", {**FLAWS, "training.seed": 6}),
    ("baseline-5cm", {}),
    ("baseline-5cm", {"training.seed": 1, "optim.lr": 1e-3, "training.batch_size": 4}),
    ("baseline", {"training.seed": 2}),
    ("oneformer3d", {}),
    ("mask3d", {}),
    ("mask3d", {"training.seed": 1, "training.batch_size": 4}),
)


@dataclass(frozen=True)
class Found:
    """What the rules say of one run."""

    run: str
    state: str
    findings: tuple[tuple[str, str, str], ...]  # severity, rule, title
    seconds: float

    def count(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(found[0] == severity for found in self.findings)


def train(number: int, folder: Path) -> Found:
    """One training with every probe, and its findings."""
    preset, changes = RUNS[number]
    began = time.perf_counter()
    settings = load_settings(preset, scale="small", values={**SMALL, **changes})
    out = folder / f"{number:02d}-{preset}.json"
    start_training(settings, out, probes=["all"], command=[], console=Console(file=io.StringIO()))
    assessment = assess_run(load_measured(out))
    found = tuple((finding.severity, finding.rule, str(finding.title)) for finding in assessment.findings)
    name = ", ".join([preset, *(f"{key.split('.')[-1]}={value}" for key, value in changes.items())])
    return Found(name, assessment.verdict.state, found, time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the findings; 1 if there is an error among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, choices=range(len(RUNS)), metavar="N", help="these runs alone")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--keep", type=Path, help="keep the records in this folder")
    options = parser.parse_args(arguments)
    chosen = range(len(RUNS)) if options.only is None else options.only
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number in chosen:
            found = train(number, folder)
            results.append(found)
            counts = ", ".join(f"{found.count(severity)} {severity}s" for severity in SEVERITIES)
            print(f"{number:2d} {found.run}: {found.state}; {counts}; {found.seconds:.0f} s")
            for severity, rule, title in found.findings:
                print(f"     {severity:8s} {rule:30s} {title}", flush=True)
    rules = Counter(one for found in results for one in {(severity, rule) for severity, rule, _ in found.findings})
    print()
    for (severity, rule), count in sorted(rules.items(), key=lambda item: (SEVERITIES.index(item[0][0]), -item[1])):
        print(f"{severity:8s} {rule:30s} in {count} of {len(results)} runs")
    errors = sum(found.count("error") for found in results)
    bad = sum(found.count("error") > 0 for found in results)
    print(f"findings of severity error: {errors}, in {bad} of {len(results)} healthy runs")
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in results], ensure_ascii=False, indent=1) + "\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
