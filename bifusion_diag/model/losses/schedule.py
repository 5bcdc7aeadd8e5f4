"""How the weights of the loss groups change in the course of a run.

=================  =========================================================================  =========
schedule           weights                                                                    document
=================  =========================================================================  =========
constant           each term's own weight
staged             semantic, instance, clip and aux by progress: 0–30, 30–70, 70–100 %         003
progressive_clip   clip 0, 0.001, 0.01 in the epochs 0–10, 11–20, 21+ of 128                   000, 002
=================  =========================================================================  =========

A term whose own weight is 0 is off under every schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

from bifusion_diag.config.settings import LossSettings

#: 003, "dynamic weight schedule": (progress from which the row holds [%], semantic, instance, clip, aux).
STAGES = ((0, 0.3, 0.4, 0.2, 0.1), (30, 0.4, 0.5, 0.08, 0.02), (70, 0.45, 0.5, 0.04, 0.01))

#: 000, "progressive CLIP loss": (epoch from which the weight holds, clip).
CLIP_EPOCHS = ((0, 0.0), (11, 0.001), (21, 0.01))
RUN_EPOCHS = 128  # length of the run that these epochs belong to (001: its last phase ends at epoch 128)


def group_weights(settings: LossSettings, step: int, total_steps: int) -> dict[str, float]:
    """Weights of the groups at a step.

    Args:
        settings: own weights and the schedule.
        step: steps done, 0 ≤ step < total_steps (a later step counts as the last phase).
        total_steps: length of the run; the documents' percentages and epochs are scaled to it, and each phase gets at
            least one step of a run that has as many.

    Returns:
        Weights of ``semantic``, ``instance`` (multiplies its parts), ``clip_align``, ``spatial_consistency`` and
        ``no_view``.
    """
    own = {
        "semantic": settings.semantic.weight,
        "instance": settings.instance.weight,
        "clip_align": settings.clip_align.weight,
        "spatial_consistency": settings.spatial_consistency.weight,
        "no_view": settings.no_view.weight,
    }
    scheduled = dict(own)
    if settings.schedule == "staged":
        row = STAGES[_phase([row[0] for row in STAGES], 100, step, total_steps)]
        _, scheduled["semantic"], scheduled["instance"], scheduled["clip_align"], aux = row
        both = own["spatial_consistency"] + own["no_view"]
        for name in ("spatial_consistency", "no_view"):
            scheduled[name] = aux * own[name] / both if both else 0.0
    elif settings.schedule == "progressive_clip":
        phase = _phase([row[0] for row in CLIP_EPOCHS], RUN_EPOCHS, step, total_steps)
        scheduled["clip_align"] = CLIP_EPOCHS[phase][1]
    return {name: weight if own[name] else 0.0 for name, weight in scheduled.items()}


def _phase(begins: Sequence[int], whole: int, step: int, total_steps: int) -> int:
    """Which phase holds at a step, where phase i begins at the share ``begins[i] / whole`` of the run."""
    phase, first = 0, 0
    for place, begin in enumerate(begins[1:], start=1):
        # rounded up in whole numbers, so that the boundary falls on the same step whatever the machine; early enough
        # for a step of each phase that follows
        first = max(first + 1, min(-(-begin * total_steps // whole), total_steps - (len(begins) - place)))
        if step >= first:
            phase = place
    return phase
