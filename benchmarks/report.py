"""How large a report's page is and how long a browser takes to open it, for long runs of many modules.

    python -m benchmarks.report
    python -m benchmarks.report --steps 1000000 --series 1000 --runs 3 --json report.json

Writes records with the program's own writer, as `benchmarks.compare_scale` does, and of them the page of one run and
that of all compared with the first. A page is drawn from the reduced record, which is as large for a hundred thousand
steps as for a million. Each page is opened in headless Chromium five times, each time in a new context; printed are the
medians of the time from navigation to the load event and to the first contentful paint, and the size. `--folder` keeps
records and pages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare_scale import write
from bifusion_diag.diagnosis import assess_run, compare_runs, load_measured
from bifusion_diag.reports import write_comparison, write_run

OPENED = 5  # times
LIMIT_SECONDS, LIMIT_BYTES = 1.5, 3_000_000
TIMES = """(() => {
  const [page] = performance.getEntriesByType("navigation");
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return [page.loadEventEnd / 1000, paint ? paint.startTime / 1000 : null];
})()"""


@dataclass(frozen=True)
class Opened:
    """One page. Times are medians, in seconds."""

    page: str
    bytes: int
    drawn: float  # what reading, judging and drawing took
    load: float
    first_paint: float | None
    elements: int

    @property
    def fits(self) -> bool:
        """Whether it is as small and as quick as it has to be."""
        return self.bytes < LIMIT_BYTES and max(self.load, self.first_paint or 0.0) < LIMIT_SECONDS


def open_page(browser: Any, page: Path, drawn: float) -> Opened:
    """Open it in new contexts."""
    loads, paints, elements = [], [], 0
    for _ in range(OPENED):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        tab = context.new_page()
        tab.goto(page.resolve().as_uri(), wait_until="load")
        tab.wait_for_timeout(300)  # the paint comes after the event
        load, paint = tab.evaluate(TIMES)
        loads.append(load)
        paints += [] if paint is None else [paint]
        elements = tab.evaluate("document.querySelectorAll('*').length")
        context.close()
    painted = statistics.median(paints) if paints else None
    return Opened(page.name, page.stat().st_size, drawn, statistics.median(loads), painted, elements)


def draw_pages(folder: Path, paths: Sequence[Path]) -> list[tuple[Path, float]]:
    """The page of the last run and that of all, and the seconds each took."""
    start = time.perf_counter()
    runs = [load_measured(path) for path in paths]
    read = time.perf_counter() - start
    start = time.perf_counter()
    one, *_ = write_run(assess_run(runs[-1]), runs[-1], html=folder / "run.html", source=paths[-1])
    alone = time.perf_counter() - start + read / len(runs)
    start = time.perf_counter()
    comparisons = [compare_runs(runs[0], run) for run in runs[1:]]
    both, *_ = write_comparison(comparisons, runs[0], runs[1:], html=folder / "comparison.html", sources=paths)
    return [(one, alone), (both, time.perf_counter() - start + read)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--series", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3, help="the first is the baseline")
    parser.add_argument("--folder", type=Path, help="keep records and pages there; records that are there are used")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        paths = [folder / f"run{number}.json" for number in range(options.runs)]
        for number, path in enumerate(paths):
            bad = np.sort(rng.choice(options.steps, 40 * number, replace=False))
            if not path.exists():
                write(path, path.stem, options.steps, options.series, number, bad)
        pages = draw_pages(folder, paths)
        with sync_playwright() as session:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            browser = session.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            found = [open_page(browser, page, drawn) for page, drawn in pages]
            browser.close()
    print(f"{options.runs} runs of {options.steps:,} steps and {options.series:,} series")
    print(f"{'page':18} {'bytes':>10} {'elements':>9} {'drawn':>8} {'load event':>11} {'first paint':>12}")
    for one in found:
        paint = "–" if one.first_paint is None else f"{one.first_paint:.2f} s"
        print(
            f"{one.page:18} {one.bytes:10,} {one.elements:9,} {one.drawn:6.1f} s {one.load:9.2f} s {paint:>12}"
            f"{'' if one.fits else '   over the limit'}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1), encoding="utf-8")
    return 0 if all(one.fits for one in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
