"""The scenes themselves: poses, depth, colours, labels, points, what the views see, and what can find no query.

Legend: N points · V views · S superpoints · G objects · k superpoints inside an object.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch

from bifusion_diag.config.settings import DecoderSettings
from bifusion_diag.data import Batch, Scene, collate, crop_scene
from bifusion_diag.diagnosis.findings import Severity
from bifusion_diag.diagnosis.phrase import join, say
from bifusion_diag.diagnosis.quantity import NotMeasured
from bifusion_diag.errors import UserError
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.result import Cell, Draft, Number, Section
from bifusion_diag.experiments.audit.sanitising import SANITIZE
from bifusion_diag.model.losses.targets import scene_targets
from bifusion_diag.model.projection import PointProjection

_RIGID = 0.02  # of R Rᵀ − 1, as the reader of pose files has it
_BLANK = 0.9  # share of a depth image without a reading from which it counts as blank
_SATURATED = 65.5345  # [m] 65535 mm, which some captures write for "no reading"
_FAR = 50.0  # [m] from the scene's median: no room is that large
_EXAMPLES = 3  # names in a finding
_LIKELY = 1e-4  # chance of a scene from which it counts as one that may match no query
_SHARES = 9  # query shares over which the chance of an empty match is averaged


@dataclass
class SceneFacts:
    """What was measured of one scene, as training crops and augments it."""

    name: str
    points: int = 0
    lost_poses: int = 0
    twisted_poses: int = 0
    blank_views: int = 0
    saturated: int = 0  # depth pixels of 65535 mm
    far_points: int = 0
    bad_points: int = 0  # coordinates or colours that are not finite
    colour_low: float = 0.0
    colour_high: float = 0.0
    highest_label: int = -1
    lowest_label: int = -1
    unlabelled: float = 0.0  # share of the points
    objects: int = 0
    objects_without_class: int = 0
    valid: float | None = None  # share of points with a valid view
    valid_augmented: float | None = None  # the same with the augmented coordinates
    superpoints: int = 0
    empty_match: float = 0.0  # chance that no query lies inside any object
    coarse_voxels: int = 0  # rows of the coarsest BatchNorm


def data_scan(bench: Bench, scenes: int, seconds: float) -> Section:
    """Look at scenes, evenly spread, until there are enough or time is up."""
    draft = Draft("data", "Data")
    facts, failed = _scan(bench, scenes, seconds)
    draft.number("scenes", "scenes looked at", len(facts), "scenes", say("of {all}", all=len(bench.source)))
    if failed:
        unread = draft.number("unreadable", "scenes that cannot be served", len(failed), "scenes")
        draft.report("step-fails", "error", "Scenes cannot be made into a batch", failed[0], unread)
    if not facts:
        return draft.done()
    _poses(draft, bench, facts)
    _ranges(draft, bench, facts)
    _labels(draft, bench, facts)
    _sizes(draft, bench, facts)
    _views(draft, bench, facts)
    _matches(draft, bench, facts)
    rows: list[list[Cell]] = [[getattr(one, field.name) for field in fields(SceneFacts)] for one in facts]
    draft.table("Scenes", tuple(field.name for field in fields(SceneFacts)), rows, shown=False)
    return draft.done()


def _scan(bench: Bench, scenes: int, seconds: float) -> tuple[list[SceneFacts], list[str]]:
    count = min(scenes, len(bench.source))
    chosen = (np.arange(count) * len(bench.source) // max(count, 1)).tolist()
    began = time.monotonic()
    facts: list[SceneFacts] = []
    failed: list[str] = []
    for place, index in enumerate(chosen, start=1):
        if time.monotonic() - began > seconds and facts:
            break
        bench.say(f"scanning scene {place} of {count}")
        scene = bench.source[index]
        if not len(scene):
            facts.append(SceneFacts(scene.name))
            continue
        try:
            facts.append(look(scene, bench, index))
        except UserError as error:
            failed.append(str(error))
    return facts, failed


def look(scene: Scene, bench: Bench, index: int = 0) -> SceneFacts:
    """Measure one scene.

    Raises:
        UserError: it cannot be made into a batch.
    """
    settings = bench.settings
    facts = of_capture(scene)
    rng = np.random.default_rng([settings.training.seed, index])
    cropped = crop_scene(scene, settings.data, rng)
    batch = collate([cropped], [bench.loader.augment(cropped.points[:, :3], rng)])
    facts.points, facts.superpoints = len(batch.xyz), sum(batch.superpoint_counts)
    facts.coarse_voxels = coarse_voxels(batch, settings.model.backbone.voxel_size)
    if bench.fused:
        facts.valid = valid_share(bench, batch, batch.xyz)
        facts.valid_augmented = valid_share(bench, batch, batch.coords)
    if facts.highest_label < settings.model.decoder.semantic_classes:
        facts.empty_match = empty_match_chance(batch, settings.model.decoder)
    return facts


def of_capture(scene: Scene) -> SceneFacts:
    """What can be read off the capture alone."""
    facts = SceneFacts(scene.name, points=len(scene))
    for pose in scene.pose.astype(np.float64):
        if not np.isfinite(pose).all():
            facts.lost_poses += 1
        elif (
            np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max() > _RIGID
            or np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-4
        ):
            facts.twisted_poses += 1
    facts.blank_views = int(((scene.depth <= 0).mean(axis=(1, 2)) > _BLANK).sum())
    facts.saturated = int((scene.depth >= _SATURATED).sum())
    finite = np.isfinite(scene.points).all(axis=1)
    facts.bad_points = int((~finite).sum())
    if finite.any():
        xyz, colour = scene.points[finite, :3], scene.points[finite, 3:]
        facts.far_points = int((np.abs(xyz - np.median(xyz, axis=0)).max(axis=1) > _FAR).sum())
        facts.colour_low, facts.colour_high = float(colour.min()), float(colour.max())
    facts.lowest_label, facts.highest_label = int(scene.semantic.min()), int(scene.semantic.max())
    facts.unlabelled = float((scene.semantic < 0).mean())
    objects = np.unique(scene.instance[scene.instance >= 0])
    facts.objects = len(objects)
    with_class = np.unique(scene.instance[(scene.instance >= 0) & (scene.semantic >= 0)])
    facts.objects_without_class = len(objects) - len(with_class)
    return facts


def valid_share(bench: Bench, batch: Batch, xyz: torch.Tensor) -> float:
    """Share of points with a valid view, projected by the run's own projection from these coordinates."""
    project = PointProjection(bench.settings.model.projection)
    found = project(xyz, batch.point_counts, batch.depth, batch.intrinsics, batch.pose)
    return float(found.valid.float().mean())


def empty_match_chance(batch: Batch, decoder: DecoderSettings) -> float:
    """The chance that no drawn query lies inside any object of a scene that has some, as training draws them.

    Of S superpoints ⌈share·S⌉ become queries, the share uniform between `query_share` and 1; k superpoints lie inside
    some object: the hypergeometric chance of drawing none of them, averaged over the share.
    """
    if decoder.learnable_queries or decoder.text_queries or decoder.kind != "superpoint_queries":
        return 0.0
    (target,) = scene_targets(batch, decoder)
    if not len(target.labels):
        return 0.0
    inside, total = int(target.superpoint_masks.any(0).sum()), target.superpoint_masks.shape[1]
    shares = np.linspace(decoder.query_share, 1.0, _SHARES)
    drawn = [max(1, math.ceil(share * total)) for share in shares]
    return sum(math.comb(total - inside, n) / math.comb(total, n) for n in drawn) / len(drawn)


def coarse_voxels(batch: Batch, voxel_size: float) -> int:
    """Voxels at stride 16."""
    cells = torch.floor(torch.floor(batch.coords / voxel_size) / 16)
    return len(torch.unique(cells, dim=0))


def _total(draft: Draft, facts: list[SceneFacts], name: str, title: str, unit: str) -> tuple[Number, list[str]]:
    """A count over all scenes, and the scenes that have any."""
    noted = draft.number(name, title, sum(getattr(one, name) for one in facts), unit)
    return noted, [one.name for one in facts if getattr(one, name)]


def _poses(draft: Draft, bench: Bench, facts: list[SceneFacts]) -> None:
    lost, names = _total(draft, facts, "lost_poses", "views with a pose that is not finite", "views")
    way = bench.settings.model.projection.sanitize
    if names and bench.fused:
        strict = way == "strict"
        draft.report(
            "projection-nonfinite",
            "note" if strict else "error",
            say("{count} scenes have lost poses, and sanitize={way} is set", count=len(names), way=way)
            if not strict
            else say("{count} scenes have lost poses; their points are not valid", count=len(names)),
            {
                "strict": "A point without a finite place has no pixel and sends no gradient.",
                "replace": "The untransformed world coordinates are taken for camera coordinates: finite, and wrong.",
                "clamp": "torch.clamp bounds infinity and keeps NaN: a NaN pixel makes every feature of its scene NaN.",
                "none": "They become NaN pixels, and 0 · NaN is NaN: every feature of the scene is.",
            }[way],
            lost,
            module="encoder.projection",
            samples=_first(names),
            remedy=None if strict else {SANITIZE: "strict"},
        )
    twisted, names = _total(draft, facts, "twisted_poses", "views whose pose is no rotation and translation", "views")
    if names:
        draft.report(
            "pose-not-rigid",
            "error",
            say("{count} scenes have a pose that is not rigid", count=len(names)),
            "The inverse of a pose is taken to be its transpose. With scale, shear or a transposed matrix points land "
            "elsewhere.",
            twisted,
            samples=_first(names),
        )


def _ranges(draft: Draft, bench: Bench, facts: list[SceneFacts]) -> None:
    bad, names = _total(draft, facts, "bad_points", "points that are not finite", "points")
    if names:
        draft.report(
            "data-nonfinite",
            "warning",
            say("{count} scenes have points that are not finite", count=len(names)),
            "Such coordinates are dropped by the loader, such colours are not: in train mode BatchNorm takes them "
            "into its buffers already in the forward.",
            bad,
            samples=_first(names),
        )
    low = draft.number("colour_low", "smallest colour", min(one.colour_low for one in facts))
    high = draft.number("colour_high", "largest colour", max(one.colour_high for one in facts))
    names = [one.name for one in facts if one.colour_low < 0 or one.colour_high > 255]
    far, distant = _total(draft, facts, "far_points", "points more than 50 m from the middle of their scene", "points")
    wild, saturated = _total(draft, facts, "saturated", "depth readings of 65535, which means none", "pixels")
    blank, empty = _total(draft, facts, "blank_views", "views of which 90 % have no depth", "views")
    for found, title, mechanism, evidence in (
        (names, "colours outside [0, 255]", "The first convolution sees them many deviations away.", (low, high)),
        (distant, "points far outside of the room", "Each is a voxel of its own on every scale of the U-Net.", (far,)),
        (saturated, "depth readings of 65535", "They mean no reading and are taken for 65 m.", (wild,)),
        (
            empty,
            "views without depth",
            "No point is valid there, and a crop of such a capture is nearly empty.",
            (blank,),
        ),
    ):
        if found:
            draft.report(
                "data-range",
                "warning",
                say("{count} scenes have {what}", count=len(found), what=title),
                mechanism,
                *evidence,
                samples=_first(found),
            )


def _labels(draft: Draft, bench: Bench, facts: list[SceneFacts]) -> None:
    classes = bench.settings.model.decoder.semantic_classes
    highest = draft.number("highest_label", "highest semantic class", max(one.highest_label for one in facts))
    lowest = draft.number("lowest_label", "lowest semantic class", min(one.lowest_label for one in facts))
    wrong = [one.name for one in facts if one.highest_label >= classes]
    if wrong:
        draft.report(
            "labels-out-of-range",
            "error",
            say(
                "Labels go up to {highest:.0f}, and there are {classes} classes",
                highest=float(max(one.highest_label for one in facts)),
                classes=classes,
            ),
            "Such an id is neither a class nor the one that is ignored. A loss that looks it up fails, and on CUDA "
            "takes the process with it.",
            highest,
            lowest,
            samples=_first(wrong),
            remedy={"model.decoder.semantic_classes": max(one.highest_label for one in facts) + 1},
        )
    blank = float(np.mean([one.unlabelled for one in facts]))
    share = draft.number("unlabelled", "share of points without a class", blank)
    orphans, names = _total(draft, facts, "objects_without_class", "objects of which no point has a class", "objects")
    if blank > bench.thresholds.unlabelled_share or names:
        bare = [one.name for one in facts if one.unlabelled > bench.thresholds.unlabelled_share]
        severity: Severity = "warning" if blank > bench.thresholds.unlabelled_share else "note"
        draft.report(
            "labels-missing",
            severity,
            say("{share:.0%} of the points have no class", share=blank)
            if bare or not names
            else say("{count} scenes have objects without a class", count=len(names)),
            "What has no label is ignored: the semantic term learns from the rest, and an object without a class "
            "counts only where objects are class-agnostic.",
            share,
            orphans,
            samples=_first(bare or names),
        )


def _sizes(draft: Draft, bench: Bench, facts: list[SceneFacts]) -> None:
    fewest = min(facts, key=lambda one: one.points)
    points = draft.number("fewest_points", "points of the smallest crop", fewest.points, "points")
    draft.number(
        "fewest_superpoints", "superpoints of the scene with the fewest", min(one.superpoints for one in facts)
    )
    small = [one.name for one in facts if one.points < bench.thresholds.few_points]
    if small:
        count = draft.number("small_crops", "crops with few points", len(small), "scenes")
        draft.report(
            "few-points",
            "warning",
            say(
                "{count} of {all} crops have fewer than {limit} points",
                count=len(small),
                all=len(facts),
                limit=bench.thresholds.few_points,
            ),
            "Means, attention, matching and BatchNorm over so few rows are extreme. It is one step in many, and it is "
            "the step that spikes.",
            points,
            count,
            samples=_first(small),
            remedy=excluded(bench, small, facts),
        )


def excluded(bench: Bench, names: list[str], facts: list[SceneFacts]) -> dict[str, list[str]] | None:
    """Leaving these scenes out, where that is a few of all."""
    return {"data.exclude": [*bench.settings.data.exclude, *names]} if len(names) <= _EXAMPLES < len(facts) else None


def _views(draft: Draft, bench: Bench, facts: list[SceneFacts]) -> None:
    seen = [one for one in facts if one.valid is not None and one.valid_augmented is not None]
    if not seen:
        draft.number("valid", "share of points with a valid view", NotMeasured("the model projects nothing"))
        return
    share, augmented = (float(np.mean([getattr(one, name) for one in seen])) for name in ("valid", "valid_augmented"))
    captured = draft.number("valid", "share of points with a valid view", share)
    moved = draft.number(
        "valid_augmented",
        "the same, projected from the augmented coordinates",
        augmented,
        "",
        "what a projection that does not undo the augmentation would see",
    )
    mistaken = bench.settings.model.projection.coordinates == "augmented"
    used, other = (augmented, share) if mistaken else (share, augmented)
    if other > used + bench.thresholds.augmentation_gain:
        draft.report(
            "augmentation-not-undone",
            "error",
            say(
                "{used:.0%} of the points have a valid view; with the other coordinates it is {other:.0%}",
                used=used,
                other=other,
            ),
            "The coordinates that are projected have been augmented: images and poses no longer hold for them, and "
            "points get the 2D features of other places."
            if mistaken
            else "The coordinates of the batch that are said to be augmented agree with the depth images better than "
            "those said to be as captured.",
            captured,
            moved,
            module="encoder.projection",
            remedy={"model.projection.coordinates": "captured"} if mistaken else None,
        )
    elif used < bench.thresholds.valid_share:
        worst = sorted(seen, key=lambda one: one.valid or 0.0)
        draft.report(
            "low-valid-share",
            "warning",
            say("{share:.0%} of the points have a valid view", share=used),
            "Only these get 2D features; the 2D losses are means over few points.",
            captured,
            samples=_first([one.name for one in worst]),
        )


def _matches(draft: Draft, bench: Bench, facts: list[SceneFacts]) -> None:
    instance = bench.settings.losses.instance
    none = [one.name for one in facts if not one.objects]
    draft.number("without_objects", "scenes without an object", len(none), "scenes")
    sparse = instance.matcher == "sparse" and instance.weight > 0
    chances = [one.empty_match if sparse else 0.0 for one in facts]
    likely = [one.name for one, chance in zip(facts, chances, strict=True) if chance > _LIKELY]
    worst = draft.number(
        "empty_match", "largest chance of a scene that no query matches any of its objects", max(chances)
    )
    each = draft.number("empty_match_mean", "the same, mean over the scenes", float(np.mean(chances)))
    batches = 1 - (1 - float(np.mean(chances))) ** bench.settings.training.batch_size
    run = draft.number(
        "empty_batches",
        "batches with such a scene that the run has to expect",
        batches * bench.settings.training.steps,
        "steps",
    )
    nan = instance.empty_match == "nan"
    expected = batches * bench.settings.training.steps >= bench.thresholds.expected_events
    if sparse and nan:
        draft.report(
            "empty-match",
            "error" if expected else "note",
            say(
                "{count} of {all} scenes may match no query, and the loss is NaN then",
                count=len(likely),
                all=len(facts),
            )
            if expected
            else "A scene whose objects match no query would make the loss NaN",
            join(
                [
                    "BCE and Dice are means over the matched queries: over nothing they are 0/0. Every gradient stays "
                    "finite, and skipping the step throws good ones away.",
                    say(
                        "In {steps} steps about {count:.3g} such batches are to be expected.",
                        steps=bench.settings.training.steps,
                        count=batches * bench.settings.training.steps,
                    )
                    if expected
                    else "No scene that was looked at is likely to.",
                ]
            ),
            worst,
            run,
            each,
            term="instance_bce" if instance.style != "unified" else "instance_mask",
            samples=_first(_by_chance(facts, chances)),
            remedy={"losses.instance.empty_match": "zero"},
        )
    elif sparse and expected:
        draft.report(
            "empty-match",
            "note",
            say("{count} of {all} scenes may match no query", count=len(likely), all=len(facts)),
            "This run skips such a scene in the mask losses.",
            worst,
            run,
            samples=_first(_by_chance(facts, chances)),
        )


def _by_chance(facts: list[SceneFacts], chances: list[float]) -> list[str]:
    order = sorted(range(len(facts)), key=lambda place: -chances[place])
    return [facts[place].name for place in order if chances[place] > _LIKELY]


def _first(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)[:_EXAMPLES]
