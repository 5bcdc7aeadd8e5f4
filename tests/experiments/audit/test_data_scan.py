"""Every flaw that a scan finds, on scenes that have it and on scenes that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from bifusion_diag.data import Scene, collate
from bifusion_diag.diagnosis.findings import Finding
from bifusion_diag.diagnosis.quantity import number
from bifusion_diag.experiments.audit.bench import Bench
from bifusion_diag.experiments.audit.data_scan import data_scan, empty_match_chance
from bifusion_diag.model.losses.targets import scene_targets

Make = Callable[..., Bench]
Change = Callable[[Scene], Scene]


def lost(scene: Scene) -> Scene:
    return replace(scene, pose=np.full_like(scene.pose, -np.inf))


def scaled(scene: Scene) -> Scene:
    pose = scene.pose.copy()
    pose[:, :3, :3] *= 1.5
    return replace(scene, pose=pose)


def coloured(scene: Scene) -> Scene:
    points = scene.points.copy()
    points[0, 3] = 400
    return replace(scene, points=points)


def distant(scene: Scene) -> Scene:
    points = scene.points.copy()
    points[0, 0] += 300
    return replace(scene, points=points)


def saturated(scene: Scene) -> Scene:
    depth = scene.depth.copy()
    depth[0, 0, 0] = 65.535
    return replace(scene, depth=depth)


def blank(scene: Scene) -> Scene:
    return replace(scene, depth=np.zeros_like(scene.depth))


def cut(scene: Scene) -> Scene:
    return scene.take(np.arange(len(scene)) < 40)


def grey(scene: Scene) -> Scene:
    points = scene.points.copy()
    points[0, 3] = np.nan
    return replace(scene, points=points)


def unlabelled(scene: Scene) -> Scene:
    return replace(scene, semantic=np.full_like(scene.semantic, -1))


def foreign(scene: Scene) -> Scene:
    return replace(scene, semantic=np.where(scene.semantic >= 0, 431, -1))


def scan(own: Bench) -> dict[str, Finding]:
    return {finding.rule: finding for finding in data_scan(own, 4, 60.0).findings}


@pytest.fixture(scope="module")
def healthy(scenes: list[Scene]) -> dict[str, Finding]:
    from tests.experiments.audit.conftest import Scenes, tiny

    return scan(Bench(tiny("baseline-5cm"), source=Scenes(scenes)))


@pytest.mark.parametrize(
    ("change", "rule", "severity"),
    [
        (scaled, "pose-not-rigid", "error"),
        (coloured, "data-range", "warning"),
        (distant, "data-range", "warning"),
        (saturated, "data-range", "warning"),
        (blank, "data-range", "warning"),
        (cut, "few-points", "warning"),
        (grey, "data-nonfinite", "warning"),
        (unlabelled, "labels-missing", "warning"),
        (foreign, "labels-out-of-range", "error"),
    ],
)
def test_a_flaw_is_reported_where_it_is(
    bench: Make, healthy: dict[str, Finding], change: Change, rule: str, severity: str
) -> None:
    found = scan(bench("baseline-5cm", change=change))
    assert found[rule].severity == severity
    assert found[rule].samples
    assert rule not in healthy


def test_a_lost_pose_is_an_error_only_where_it_is_not_sanitised(bench: Make) -> None:
    assert scan(bench(change=lost))["projection-nonfinite"].severity == "note"
    bad = scan(bench(change=lost, model__projection__sanitize="replace"))["projection-nonfinite"]
    assert (bad.severity, bad.remedy) == ("error", {"model.projection.sanitize": "strict"})
    assert "projection-nonfinite" not in scan(bench())
    assert "low-valid-share" in scan(bench(change=lost))
    assert "low-valid-share" not in scan(bench())


def test_augmented_coordinates_are_told_from_captured_ones(bench: Make) -> None:
    found = scan(bench(model__projection__coordinates="augmented"))["augmentation-not-undone"]
    assert (found.severity, found.remedy) == ("error", {"model.projection.coordinates": "captured"})
    captured, augmented = (number(one.reading) for one in found.evidence)
    assert captured is not None
    assert augmented is not None
    assert captured > 2 * augmented
    assert "augmentation-not-undone" not in scan(bench())


def one_small_object(scene: Scene) -> Scene:
    """A single object: the smallest superpoint that there is."""
    sizes = np.bincount(scene.superpoint)
    return replace(scene, instance=np.where(scene.superpoint == sizes.argmin(), 0, -1))


def test_an_empty_match_is_an_error_where_the_loss_becomes_nan(bench: Make) -> None:
    bad = scan(bench(change=one_small_object, losses__instance__empty_match="nan"))["empty-match"]
    assert (bad.severity, bad.remedy) == ("error", {"losses.instance.empty_match": "zero"})
    assert scan(bench(change=one_small_object))["empty-match"].severity == "note"
    assert scan(bench(losses__instance__empty_match="nan"))["empty-match"].severity == "note"
    assert "empty-match" not in scan(bench())


def test_the_chance_of_an_empty_match_is_that_of_the_drawing(bench: Make, scenes: list[Scene]) -> None:
    own = bench("baseline-5cm")
    scene = scenes[0]
    scene = replace(scene, instance=np.where(scene.superpoint < 2, 0, -1))  # two superpoints are inside
    batch = collate([scene], [scene.points[:, :3]])
    chance = empty_match_chance(batch, own.settings.model.decoder)
    (target,) = scene_targets(batch, own.settings.model.decoder)
    inside = target.superpoint_masks.any(0)
    torch.manual_seed(0)
    drawn = [own.model.decoder._draw_queries((len(inside),), torch.device("cpu"))[0] for _ in range(4000)]
    measured = float(np.mean([not inside[one].any() for one in drawn]))
    assert chance == pytest.approx(measured, abs=0.02)
    assert chance > 0.03


def test_the_scan_keeps_to_its_bounds(bench: Make) -> None:
    own = bench("baseline-5cm")
    assert number(data_scan(own, 3, 60.0).numbers[0].reading) == 3
    assert number(data_scan(own, 4, 0.0).numbers[0].reading) == 1
