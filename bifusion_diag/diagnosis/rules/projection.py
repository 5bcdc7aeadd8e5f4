"""Rules of the projection of points to pixels."""

from __future__ import annotations

import numpy as np

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading

SANITIZE = "model.projection.sanitize"
#: Its ways other than 'strict', and what each makes of non-finite camera coordinates.
LETS_THROUGH = {
    "replace": " This run replaces such coordinates by the untransformed points: finite, and wrong.",
    "clamp": " This run clamps such coordinates, which bounds infinity and keeps NaN: a NaN pixel makes every feature "
    "of its scene NaN.",
    "none": " This run goes on with such coordinates: they give NaN pixels, which make every feature of the scene NaN.",
}


def projection_nonfinite(context: Context) -> list[Finding] | NotMeasured:
    """Points are projected to NaN or infinity."""
    series = [context.run.series(f"projection/{name}") for name in ("nan", "inf")]
    if series[0] is None or series[1] is None:
        return NotMeasured("no projection was recorded")
    bad = np.union1d(*(one.steps[one.max > 0] for one in series if one is not None))
    if not bad.size:
        return []
    exact = all(one.exact for one in series if one is not None)  # else these are buckets of several steps
    count: Reading = Quantity(bad.size, "steps") if exact else NotMeasured("the record is reduced")
    way = str(context.settings.get(SANITIZE))
    mechanism = "A pose or a point of these scenes is non-finite (ScanNet marks lost tracking with a pose of −inf)."
    mechanism += LETS_THROUGH.get(way, "")
    return [
        Finding(
            "projection-nonfinite",
            "warning",
            "Points are projected to NaN or infinity",
            (
                Evidence("steps", count, "projection/inf"),
                Evidence("NaN coordinates", context.reading("projection/nan"), "projection/nan"),
                Evidence("infinite coordinates", context.reading("projection/inf"), "projection/inf"),
            ),
            mechanism,
            (int(bad[0]), int(bad[-1])),
            int(bad.size) if exact else None,
            remedy={SANITIZE: "strict"} if way in LETS_THROUGH else None,
        )
    ]


def low_valid_share(context: Context) -> list[Finding] | NotMeasured:
    """Few points have a valid view."""
    share = context.reading("projection/valid_share")
    if isinstance(share, NotMeasured):
        return share
    if share.value is None or share.value >= context.thresholds.valid_share:
        return []
    evidence = (Evidence("mean valid share", share, "projection/valid_share"),)
    mechanism = "Only these points receive 2D features; the 2D losses are averaged over few points."
    return [Finding("low-valid-share", "warning", "Few points have a valid view", evidence, mechanism)]
