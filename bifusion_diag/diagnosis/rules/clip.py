"""Rules of CLIP's features and of how they meet the 3D ones."""

from __future__ import annotations

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity


def clip_out_of_range(context: Context) -> list[Finding] | NotMeasured:
    """Features past the projection head are large."""
    readings = {key: context.reading(key) for key in ("clip/head/absmax", "clip/points/absmax")}
    measured = {key: reading for key, reading in readings.items() if isinstance(reading, Quantity)}
    if not measured:
        return NotMeasured("no CLIP features past the projection head were recorded")
    limit = context.thresholds.clip_absmax
    high = {key: reading for key, reading in measured.items() if reading.value is not None and reading.value > limit}
    if not high:
        return []
    evidence = tuple(Evidence(f"largest |x|, {key.split('/')[1]}", reading, key) for key, reading in high.items())
    mechanism = f"Document 002 expects features within ±{limit:g}."
    return [Finding("clip-out-of-range", "warning", "CLIP features are out of range", evidence, mechanism)]


def scale_mismatch(context: Context) -> list[Finding] | NotMeasured:
    """2D and 3D features have very different norms."""
    ratio = context.reading("clip/ratio_2d_3d")
    if isinstance(ratio, NotMeasured):
        return ratio
    limit = context.thresholds.norm_ratio
    if ratio.value is None or 1 / limit <= ratio.value <= limit:
        return []
    small = "3D" if ratio.value > limit else "2D"
    evidence = (Evidence("median 2D : 3D norm ratio", ratio, "clip/ratio_2d_3d"),)
    mechanism = f"In the fused feature the {small} branch is drowned."
    return [Finding("scale-mismatch", "warning", "2D and 3D features differ in scale", evidence, mechanism)]
