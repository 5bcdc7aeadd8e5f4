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

from bifusion_diag.config.settings import LossSettings

#: 003, "dynamic weight schedule": (progress before which the row holds [%], semantic, instance, clip, aux).
STAGES = ((30, 0.3, 0.4, 0.2, 0.1), (70, 0.4, 0.5, 0.08, 0.02), (100, 0.45, 0.5, 0.04, 0.01))

#: 000, "progressive CLIP loss": (epoch before which the weight holds, clip).
CLIP_EPOCHS = ((11, 0.0), (21, 0.001), (128, 0.01))
RUN_EPOCHS = 128  # length of the run that these epochs belong to (001: its last phase ends at epoch 128)


def group_weights(settings: LossSettings, step: int, total_steps: int) -> dict[str, float]:
    """Weights of the groups at a step.

    Args:
        settings: own weights and the schedule.
        step: steps done, 0 ≤ step < total_steps (a later step counts as the last phase).
        total_steps: length of the run; the documents' percentages and epochs are scaled to it.

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
        # Whole numbers, so that the boundary falls on the same step whatever the rounding.
        row = next((row for row in STAGES if 100 * step < row[0] * total_steps), STAGES[-1])
        _, scheduled["semantic"], scheduled["instance"], scheduled["clip_align"], aux = row
        both = own["spatial_consistency"] + own["no_view"]
        for name in ("spatial_consistency", "no_view"):
            scheduled[name] = aux * own[name] / both if both else 0.0
    elif settings.schedule == "progressive_clip":
        epoch = RUN_EPOCHS * step // total_steps
        scheduled["clip_align"] = next((clip for before, clip in CLIP_EPOCHS if epoch < before), CLIP_EPOCHS[-1][1])
    return {name: weight if own[name] else 0.0 for name, weight in scheduled.items()}
