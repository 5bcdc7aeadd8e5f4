"""Rules of the projection of points to pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding, Severity
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured, Quantity, Reading
from bifusion_diag.diagnosis.rules.declared import declared, usual

SANITIZE = "model.projection.sanitize"
COORDINATES = "model.projection.coordinates"
#: Its ways other than 'strict', and what each makes of non-finite camera coordinates.
LETS_THROUGH = {
    "replace": "This run replaces such coordinates by the untransformed points: finite, and wrong.",
    "clamp": "This run clamps such coordinates, which bounds infinity and keeps NaN: a NaN pixel makes every feature "
    "of its scene NaN.",
    "none": "This run goes on with such coordinates: they give NaN pixels, which make every feature of the scene NaN.",
}
#: Why a pair of a point and a view is not visible, and where that points to.
_WHY = {
    "nan": "Most pairs that are not seen have a NaN camera coordinate: poses or points are not finite.",
    "inf": "Most pairs that are not seen have an infinite camera coordinate: poses or points are not finite.",
    "behind": "Most pairs that are not seen lie behind the camera: poses of another frame, or inverted ones, look so.",
    "outside": "Most pairs that are not seen lie outside the image: intrinsics of another image size look so, and so "
    "do points of views that are not given.",
    "occluded": "Most pairs that are not seen disagree with the depth image: depth of another unit or frame looks so, "
    "and so does a tolerance that is too small.",
}
_LABELS = {
    "nan": "pairs that are NaN",
    "inf": "pairs that are infinite",
    "behind": "pairs behind the camera",
    "outside": "pairs outside the image",
    "occluded": "pairs at which the depth disagrees",
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
    mechanism = join(
        [
            "A pose or a point of these scenes is non-finite (ScanNet marks lost tracking with a pose of −inf).",
            LETS_THROUGH.get(way, ""),
            "This run takes such points for not valid, as it should." if way == "strict" else "",
        ]
    )
    return [
        Finding(
            "projection-nonfinite",
            _severity(context, way, bad),
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


def _severity(context: Context, way: str, steps: NDArray[np.int64]) -> Severity:
    """What is let through is an error where a step is bad with it, and no incident says what else it is bad of."""
    if way == "strict":
        return "note"
    unexplained = [origin.step for origin in context.origins]
    return "error" if way in LETS_THROUGH and np.isin(unexplained, steps).any() else "warning"


def low_valid_share(context: Context) -> list[Finding] | NotMeasured:
    """Few points have a valid view."""
    share = context.reading("projection/valid_share")
    if isinstance(share, NotMeasured):
        return share
    if share.value is None or share.value >= context.thresholds.valid_share:
        return []
    evidence = [Evidence("mean valid share", share, "projection/valid_share")]
    pairs = {name: context.reading(f"projection/{name}") for name in _WHY}
    counts = {name: pair.value for name, pair in pairs.items() if isinstance(pair, Quantity) and pair.value}
    most = max(counts, key=counts.__getitem__) if counts else None
    evidence += [Evidence(_LABELS[name], pairs[name], f"projection/{name}") for name in counts]
    mechanism = join(
        [
            "Only these points receive 2D features; the 2D losses are averaged over few points.",
            "" if most is None else _WHY[most],
        ]
    )
    return [Finding("low-valid-share", "warning", "Few points have a valid view", tuple(evidence), mechanism)]


def augmentation_not_undone(context: Context) -> list[Finding] | NotMeasured:
    """What is projected are not the points as they were captured."""
    captured, augmented = (context.run.series(f"projection/off_{name}") for name in ("captured", "augmented"))
    off = usual(captured)
    if captured is None or off is None:
        return NotMeasured("the projected points were not compared with the captured ones (probe projection)")
    limit = context.thresholds.captured_distance
    if off <= limit:
        return []
    away = usual(augmented)
    evidence = [Evidence("median distance from the captured points", Quantity(off, "m"), captured.name)]
    if augmented is not None and away is not None:
        evidence.append(Evidence("median distance from the augmented points", Quantity(away, "m"), augmented.name))
    share = context.reading("projection/valid_share")
    if isinstance(share, Quantity):
        evidence.append(Evidence("mean valid share", share, "projection/valid_share"))
    is_augmented = away is not None and away <= limit
    mechanism = join(
        [
            "What is projected are the augmented points: flipped, turned and scaled, they do not lie where the pose "
            "and the images saw them."
            if is_augmented
            else say(
                "What is projected lies {off:.3g} m from where the points were captured, and is not what the "
                "augmentation made of them either: the transform to the camera is not the inverse of the pose.",
                off=off,
            ),
            "The pixel of a point shows something else, where it is in the image at all.",
        ]
    )
    remedy = {COORDINATES: "captured"} if declared(context.run.settings, COORDINATES) == "augmented" else None
    title = (
        "The augmentation is not undone before the projection"
        if is_augmented
        else "The projected points are not the captured ones"
    )
    return [Finding("augmentation-not-undone", "error", title, tuple(evidence), mechanism, remedy=remedy)]
