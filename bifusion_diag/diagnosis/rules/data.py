"""Rules of the data's range: what a batch holds that no camera and no room gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.instruments import matching
from bifusion_diag.diagnosis.phrase import join
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity
from bifusion_diag.diagnosis.rules.declared import declared
from bifusion_diag.record.schema import Series

#: Names of fields, as batches in the wild call them; the last component of the path counts.
COLOURS = ("color", "colors", "colour", "colours", "rgb")
COORDINATES = ("xyz", "coords", "points", "positions")
DEPTHS = ("depth", "depths", "depth_map")
IMAGES = ("image", "images", "img", "imgs")
COUNTS = ("point_counts",)
NORMALISED = 3.0  # colours with ScanNet's mean and deviation taken out are within −1.69 and 2.32


class _Oddity(NamedTuple):
    """Something a field should not hold."""

    what: str
    label: str
    series: Series
    value: float
    unit: str
    steps: tuple[int, ...]  # at which it does; of a reduced record, of buckets


def data_range(context: Context) -> list[Finding] | NotMeasured:
    """Values that no sound capture holds, and crops of a handful of points: one finding each kind."""
    lows = dict(matching(context.run, r"data/(.+)/min"))
    highs = dict(matching(context.run, r"data/(.+)/max"))
    if not lows and not highs:
        return NotMeasured("the batches were not measured (probe data)")
    found = [oddity for name in highs for oddity in _oddities(context, name, lows.get(name), highs[name])]
    findings = []
    for what in dict.fromkeys(oddity.what for oddity in found):
        same = [oddity for oddity in found if oddity.what == what]
        steps = sorted({step for oddity in same for step in oddity.steps})
        exact = all(oddity.series.exact for oddity in same)
        evidence = tuple(
            Evidence(oddity.label, Quantity(oddity.value, oddity.unit), oddity.series.name) for oddity in same
        )
        if exact:
            evidence += (Evidence("steps", Quantity(len(steps), "steps"), same[0].series.name),)
        usual = what in _IN_METRES and all(_is_usual(context, oddity) for oddity in same)
        findings.append(
            Finding(
                "few-points" if what == _FEW else "data-range",
                "note" if usual else "warning",
                what,
                evidence,
                join([_OTHER_UNIT if usual else "", _MECHANISMS[what]]),
                (steps[0], steps[-1]),
                len(steps) if exact else None,
            )
        )
    return findings


_BRIGHT = "Colours are out of range"
_FAR = "Points lie far outside any room"
_NEGATIVE = "Depth is negative"
_DEEP = "Depth is larger than a depth camera reads"
_BLANK = "Images are blank"
_FEW = "Scenes have only a handful of points"
_MECHANISMS: Mapping[str, str] = {
    _BRIGHT: join(
        [
            "Colours of 8 bits are within 0 and 255, normalised ones within a few deviations.",
            "The first layer multiplies what is beyond: one such point can outweigh its scene in BatchNorm.",
        ]
    ),
    _FAR: join(
        [
            "Depth that was misread, or coordinates in another unit.",
            "What is divided by the scene's extent (the geometric encoding) shrinks to nothing for all other points.",
        ]
    ),
    _NEGATIVE: "No camera reads it; a depth image in another format, or one that was interpolated across its gaps.",
    _DEEP: "Millimetres that were not turned into metres, or the mark of no reading (65535) taken for a distance.",
    _BLANK: "All pixels of a batch have one value: the images were not read, or the camera was covered. Their 2D "
    "features say nothing.",
    _FEW: "A degenerate crop: BatchNorm takes its statistics from a handful of voxels, the masks' losses are means "
    "over a handful of points.",
}


_IN_METRES = (_FAR, _DEEP)
_OTHER_UNIT = (
    "It is so at most steps, so that these may be no metres: millimetres that the model scales, indices of voxels, or "
    "no scene at all."
)


def _is_usual(context: Context, oddity: _Oddity) -> bool:
    """Whether most batches of a loop that is not ours go beyond the limit: their unit is not known, ours is metres."""
    return not _is_ours(context) and 2 * len(oddity.steps) > int(np.isfinite(oddity.series.max).sum())


def _is_ours(context: Context) -> bool:
    return declared(context.run.settings, "model.decoder") is not None


def _oddities(context: Context, name: str, low: Series | None, high: Series) -> list[_Oddity]:
    """What is odd about one field."""
    field, found = name.rpartition(".")[2], []
    limits = context.thresholds
    if field in COLOURS:
        below, above = _colour_range(context, high)
        found += [_above(_BRIGHT, "largest colour", high, above), _below(_BRIGHT, "smallest colour", low, below)]
    elif field in COORDINATES:
        found.append(_above(_FAR, "largest coordinate", high, limits.far_coordinate, "m"))
        found.append(_below(_FAR, "smallest coordinate", low, -limits.far_coordinate, "m"))
    elif field in DEPTHS:
        found.append(_above(_DEEP, "largest depth", high, limits.far_depth, "m"))
        found.append(_below(_NEGATIVE, "smallest depth", low, 0.0, "m"))
    elif field in IMAGES and low is not None and low.exact and high.exact and len(low.value) == len(high.value):
        blank = high.steps[np.isfinite(high.value) & (low.value == high.value)]
        if blank.size:
            value = float(high.value[np.searchsorted(high.steps, blank[0])])
            found.append(_Oddity(_BLANK, "value of all pixels", high, value, "", tuple(map(int, blank))))
    elif field in COUNTS:
        found.append(_below(_FEW, "fewest points of a scene", low, limits.few_points, "points"))
    return [oddity for oddity in found if oddity is not None]


def _colour_range(context: Context, high: Series) -> tuple[float, float]:
    """Between what colours should be: of our own runs, whose colours are normalised, and of others that look so, a few
    deviations; else 8 bits."""
    middle = high.stats.p50 or 0.0
    return (-NORMALISED, NORMALISED) if _is_ours(context) or middle <= NORMALISED else (0.0, 255.0)


def _above(what: str, label: str, series: Series, limit: float, unit: str = "") -> _Oddity | None:
    steps = series.steps[series.max > limit]
    if not steps.size or series.stats.max is None:
        return None
    return _Oddity(what, label, series, series.stats.max, unit, tuple(map(int, steps)))


def _below(what: str, label: str, series: Series | None, limit: float, unit: str = "") -> _Oddity | None:
    if series is None or series.stats.min is None:
        return None
    steps = series.steps[series.min < limit]
    if not steps.size:
        return None
    return _Oddity(what, label, series, series.stats.min, unit, tuple(map(int, steps)))
