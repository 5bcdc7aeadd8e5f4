"""Rules of what the optimiser makes of the gradients."""

from __future__ import annotations

from bifusion_diag.diagnosis.findings import Context, Evidence, Finding
from bifusion_diag.diagnosis.names import COEFFICIENT
from bifusion_diag.diagnosis.quantity import NotMeasured


def clipping_always_on(context: Context) -> list[Finding] | NotMeasured:
    """Nearly every step is clipped."""
    share = context.reading("clipped_share")
    if isinstance(share, NotMeasured):
        return share
    if share.value is None or share.value <= context.thresholds.clipped_share:
        return []
    return [
        Finding(
            "clipping-always-on",
            "note",
            "Nearly every step is clipped",
            (
                Evidence("clipped steps", share, COEFFICIENT),
                Evidence("mean shrink factor", context.reading("shrink_factor"), COEFFICIENT),
            ),
            "With clipping always on every step has the same gradient norm: its limit acts as a learning rate, and a "
            "term with a large gradient takes its share from all others.",
        )
    ]
