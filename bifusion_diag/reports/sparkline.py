"""A finding's evidence as one small line: min–max reduced, bad steps marked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.language import tr
from bifusion_diag.reports.reduce import line, min_max

_WIDTH, _HEIGHT, _PAD = 240.0, 48.0, 3.0
_VERTICES = 300


@dataclass(frozen=True)
class Spark:
    """The SVG element and what it shows."""

    svg: str
    caption: str


def draw_spark(run: Run, finding: Finding) -> Spark | None:
    """The first evidence's series over the whole run, on a log axis where it is a norm; None where there is none."""
    name = finding.evidence[0].series if finding.evidence else ""
    series = run.series(name)
    if series is None or len(series.steps) < 2:
        return None
    x, y = min_max(*line(series), vertices=_VERTICES)
    logarithmic = name.endswith("norm") and bool((y[np.isfinite(y)] > 0).all())
    height = np.log10(y) if logarithmic else y
    finite = height[np.isfinite(height)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    across = (x - x[0]) / max(int(x[-1] - x[0]), 1) * _WIDTH
    up = _HEIGHT - _PAD - (height - low) / (high - low or 1.0) * (_HEIGHT - 2 * _PAD)
    pieces: list[str] = []
    pen_down = False
    for left, top in zip(across, up, strict=True):
        if np.isfinite(top):
            pieces.append(f"{'L' if pen_down else 'M'}{left:.1f} {top:.1f}")
        pen_down = bool(np.isfinite(top))
    bad = series.steps[series.nonfinite > 0][:400]
    marks = "".join(f"M{(step - x[0]) / max(int(x[-1] - x[0]), 1) * _WIDTH:.1f} 0V{_HEIGHT}" for step in bad.tolist())
    svg = (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" aria-hidden="true">{_where(finding, x)}'
        f'<path d="{marks}" stroke="var(--nonfinite)" fill="none" vector-effect="non-scaling-stroke"/>'
        f'<path d="{"".join(pieces)}" stroke="var(--accent)" fill="none" vector-effect="non-scaling-stroke"/></svg>'
    )
    caption = tr(
        "{series}, log axis; steps {first}–{last}" if logarithmic else "{series}; steps {first}–{last}",
        series=name,
        first=int(x[0]),
        last=int(x[-1]),
    )
    return Spark(svg, caption)


def _where(finding: Finding, x: NDArray[np.int64]) -> str:
    """A band over the steps of the finding, unless these are all."""
    if finding.steps is None:
        return ""
    whole = max(int(x[-1] - x[0]), 1)
    left, right = ((step - x[0]) / whole * _WIDTH for step in finding.steps)
    left, right = max(left - 1, 0.0), min(right + 1, _WIDTH)
    if right - left >= _WIDTH or right <= left:
        return ""
    return f'<rect x="{left:.1f}" width="{right - left:.1f}" height="{_HEIGHT:g}" fill="var(--band)"/>'
