"""What the report shows of α on a scene: plain data, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bifusion_diag.diagnosis.phrase import Phrase, join, say
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.record.scenes import Snapshot
from bifusion_diag.record.schema import Run
from bifusion_diag.reports.numbers import text

EVENT = "scene"  # kind of the event of a run that could take no snapshot
NO_SNAPSHOT = (
    "the record holds no snapshot of α on a scene: those before version 2.1 hold none. In training code of your own "
    "Monitor.snapshot(...) takes it"
)
NO_GATE = "the model has no gate: fusion '{fusion}'"
CONSTANT = "fusion 'simple' has no learned gate: α is ½ where a view sees a point and 0 elsewhere"
NO_PROBE = "the probe 'gate' was not on"
_KINDS = {"rgbd": "RGB-D frames"}
_SPLITS = {
    "validation": "a validation scene, not trained on",
    "training": "a scene that the run trains on, here without augmentation",
}


@dataclass(frozen=True)
class SceneRow:
    """α of all points of the scene at one moment.

    Attributes:
        moment: in words; "" where the run has no word for it.
        done: steps that were done.
        mean_valid: mean α of the points with a 2D feature; None: there is none.
        std_valid: standard deviation of the same.
        mean_invalid: mean α of the others.
        nonfinite: points whose α is NaN or infinite.
    """

    moment: str
    done: int
    mean_valid: float | None
    std_valid: float | None
    mean_invalid: float | None
    nonfinite: int


@dataclass(frozen=True)
class ScenePanel:
    """α on one scene of a run.

    Attributes:
        label: of the run.
        drawn: the snapshots that are drawn: the first and the last; one where there is only one.
        rows: the numbers of all snapshots of this scene, in their order.
        points: of the scene.
        valid_share: share of them that have a 2D feature; None where there is no point.
        provenance: what the scene is and what CLIP's weights are, in sentences.
    """

    label: str
    drawn: tuple[Snapshot, ...]
    rows: tuple[SceneRow, ...]
    points: int
    valid_share: float | None
    provenance: Phrase

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for the JSON beside the report."""
        return {
            "scene": self.drawn[0].scene.name,
            "points": self.points,
            "valid_share": self.valid_share,
            "provenance": str(self.provenance),
            "moments": [vars(row) for row in self.rows],
        }


def scene_panel(run: Run, label: str | None = None) -> ScenePanel | NotMeasured:
    """What to show of a run; `label` is its name where it is not the record's."""
    if not run.snapshots:
        return NotMeasured(_why_not(run))
    last = run.snapshots[-1]
    alike = [one for one in run.snapshots if _same_scene(one, last)]
    numbers = last.numbers
    return ScenePanel(
        label=label or run.header.name,
        drawn=(last,) if len(alike) == 1 else (alike[0], last),
        rows=tuple(
            SceneRow(
                one.moment,
                one.done,
                one.numbers.mean_valid,
                one.numbers.std_valid,
                one.numbers.mean_invalid,
                one.numbers.nonfinite,
            )
            for one in alike
        ),
        points=numbers.points,
        valid_share=numbers.valid / numbers.points if numbers.points else None,
        provenance=_provenance(run, last),
    )


def _same_scene(one: Snapshot, other: Snapshot) -> bool:
    """Whether two snapshots show the same points."""
    return one.scene.name == other.scene.name and one.scene.offsets.shape == other.scene.offsets.shape


def moment_text(row: SceneRow | Snapshot) -> Phrase:
    """When a snapshot was taken."""
    steps = text(row.done, whole=True)
    if not row.moment:
        return say("after {done} steps", done=steps)
    return say("{moment} ({done} steps done)", moment=row.moment, done=steps)


def number_text(row: SceneRow) -> Phrase:
    """The numbers of a moment in a sentence."""
    parts = [
        say(
            "α {when}: mean {mean} (standard deviation {std}) where a view sees the point",
            when=moment_text(row),
            mean=text(row.mean_valid),
            std=text(row.std_valid),
        )
        if row.mean_valid is not None
        else say("α {when}: no view sees a point", when=moment_text(row)),
        say(", {mean} elsewhere", mean=text(row.mean_invalid)) if row.mean_invalid is not None else "",
        say("; {count} are NaN or infinite", count=text(row.nonfinite, whole=True)) if row.nonfinite else "",
    ]
    return say("{what}.", what=join(parts, ""))


def _provenance(run: Run, snapshot: Snapshot) -> Phrase:
    scene = snapshot.scene
    told = scene.provenance
    kind = _KINDS.get(told.get("kind", ""), told.get("kind", ""))
    split = _SPLITS.get(told.get("split") or "", "")
    what: Sequence[str] = [part for part in (split, kind) if part]
    clip = run.provenance.get("clip_weights")
    return join(
        [
            say("Scene {name}: {what}.", name=scene.name, what=join(what, "; "))
            if what
            else say("Scene {name}.", name=scene.name),
            say("Flaws of it: {flaws}.", flaws=told["flaws"]) if told.get("flaws") else "",
            say("CLIP weights: {weights}.", weights=str(clip)) if clip else "",
            "With random CLIP weights α shows how the gate learns, and not what CLIP's features are worth."
            if clip == "random"
            else "",
        ]
    )


def _why_not(run: Run) -> str:
    failed = [event.message for event in run.events if event.kind == EVENT]
    if failed:
        return say("the run could not take one: {message}", message=failed[-1])
    model = run.settings.get("model")
    fusion = model.get("fusion") if isinstance(model, Mapping) else None
    if fusion == "none":
        return say(NO_GATE, fusion=fusion)
    if fusion == "simple":
        return CONSTANT
    if fusion is not None and not {"gate", "all"} & set(run.header.probes):
        return NO_PROBE
    return NO_SNAPSHOT
