"""Snapshots of α in a record: what is kept of a scene, that it survives, and that it stays small."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

from bifusion_diag.record import RecordError, RunHeader, RunWriter, Snapshot, alpha_numbers, capture, load_run
from bifusion_diag.record.scene_files import MAX_BYTES, SCENES_FILE
from bifusion_diag.record.scenes import MAX_IMAGE_BYTES, MAX_POINTS, MAX_SIDE, NO_VIEW, half, kept

SCHEMA = json.loads(resources.files("bifusion_diag.record").joinpath("run.schema.json").read_text(encoding="utf-8"))


def snapshot(
    done: int, moment: str = "", *, seed: int = 0, points: int = 50, size: int = 40, views: int = 1
) -> Snapshot:
    """α of a scene of noise, which no image format packs."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (views, 3, size, size), dtype=np.uint8)
    valid = rng.random(points) < 0.8
    scene, rows = capture(
        f"noise {seed}",
        rng.normal(500, 2, (points, 3)),
        images,
        rng.uniform(0, size - 1, (points, views, 2)),
        valid,
        intrinsics=np.broadcast_to(np.eye(3), (views, 3, 3)),
        pose=np.full((views, 4, 4), -np.inf),  # lost tracking
        provenance={"kind": "noise"},
    )
    alpha = np.random.default_rng(done).random(points)
    alpha[:2] = np.nan, np.inf
    return Snapshot(done, moment, scene, half(alpha[rows]), alpha_numbers(alpha, valid))


def write(path: Path, snapshots: list[Snapshot], *, resume_at: int | None = None) -> RunWriter:
    writer = RunWriter(path, RunHeader("run"), resume_at=resume_at)
    writer.append([resume_at or 0], {"loss/total": [1.0]})
    for one in snapshots:
        writer.snapshot(one)
    writer.flush()
    return writer


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    assert (one.done, one.moment, one.numbers) == (other.done, other.moment, other.numbers)
    np.testing.assert_array_equal(one.alpha, other.alpha)
    for field in dataclasses.fields(one.scene):
        left, right = getattr(one.scene, field.name), getattr(other.scene, field.name)
        if field.name == "views":
            assert [(view.image, view.size) for view in left] == [(view.image, view.size) for view in right]
            for mine, theirs in zip(left, right, strict=True):
                np.testing.assert_array_equal(mine.intrinsics, theirs.intrinsics)
                np.testing.assert_array_equal(mine.pose, theirs.pose)
        else:
            np.testing.assert_array_equal(left, right, err_msg=field.name)


def test_snapshots_come_back_as_they_were_from_the_folder_and_from_the_file(tmp_path: Path) -> None:
    given = [snapshot(0, "before"), snapshot(7, "after")]
    writer = write(tmp_path / "run.json", given)
    running = load_run(writer.folder)  # as of a run that is killed now
    writer.finish("completed")
    document = json.loads((tmp_path / "run.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert len(document["snapshots"]["scenes"]) == 1  # both are of one scene
    for run in (running, load_run(tmp_path / "run.json")):
        assert len(run.snapshots) == 2
        for one, other in zip(run.snapshots, given, strict=True):
            assert_equal(one, other)


def test_a_record_without_snapshots_has_no_trace_of_them_and_an_older_one_is_read(tmp_path: Path) -> None:
    write(tmp_path / "run.json", []).finish("completed")
    assert not (tmp_path / "run.record" / SCENES_FILE).exists()
    text = (tmp_path / "run.json").read_text()
    assert "snapshots" not in json.loads(text)
    (tmp_path / "old.json").write_text(text.replace('"schema_version":"2.1"', '"schema_version":"2.0"'))
    assert load_run(tmp_path / "old.json").snapshots == ()


def test_a_snapshot_that_a_kill_has_cut_off_costs_none_of_the_others(tmp_path: Path) -> None:
    writer = write(tmp_path / "run.json", [snapshot(0, "before"), snapshot(5, "between")])
    file = writer.folder / SCENES_FILE
    file.write_bytes(file.read_bytes()[:-100])
    shutil.copytree(writer.folder, tmp_path / "killed.record")
    writer.finish("interrupted")
    again = write(tmp_path / "killed.json", [snapshot(9, "after")], resume_at=1)
    assert [one.done for one in load_run(again.folder).snapshots] == [0, 9]
    again.finish("completed")
    assert [one.done for one in load_run(tmp_path / "killed.json").snapshots] == [0, 9]


def test_a_resume_voids_what_was_taken_after_its_step(tmp_path: Path) -> None:
    write(tmp_path / "run.json", [snapshot(0), snapshot(4), snapshot(6)]).finish("interrupted")
    write(tmp_path / "run.json", [snapshot(8)], resume_at=4).finish("completed")
    assert [one.done for one in load_run(tmp_path / "run.json").snapshots] == [0, 4, 8]


def test_of_a_moment_the_last_is_kept_and_of_many_the_first_two_and_the_last() -> None:
    def steps(*given: tuple[int, str]) -> list[int]:
        return [one.done for one in kept([snapshot(done, moment) for done, moment in given])]

    assert steps((0, "start"), (5, "end"), (3, "released"), (9, "end")) == [0, 3, 9]
    assert steps(*((step, "") for step in range(0, 60, 10))) == [0, 10, 50]


def test_the_largest_snapshots_fit_and_what_does_not_is_between(tmp_path: Path) -> None:
    largest = [snapshot(done, seed=done, points=20_000, size=500, views=3) for done in (0, 1, 2)]
    for one in largest:
        assert len(one.scene.offsets) == MAX_POINTS
        assert (len(one.scene.views), one.scene.of_views, one.scene.of_points) == (2, 3, 20_000)
        for view in one.scene.views:
            assert len(view.image) <= MAX_IMAGE_BYTES
            assert Image.open(io.BytesIO(view.image)).size == view.size
            assert max(view.size) <= MAX_SIDE
    write(tmp_path / "run.json", largest).finish("completed")
    document = json.loads((tmp_path / "run.json").read_text())
    assert len(json.dumps(document["snapshots"])) <= MAX_BYTES
    assert [one.done for one in load_run(tmp_path / "run.json").snapshots] == [0, 2]
    same = [snapshot(done, seed=0, points=20_000, size=500, views=3) for done in (0, 1, 2)]
    write(tmp_path / "same.json", same).finish("completed")
    assert [one.done for one in load_run(tmp_path / "same.json").snapshots] == [0, 1, 2]


def test_numbers_are_of_all_points_and_leave_out_what_is_not_finite() -> None:
    numbers = alpha_numbers([0.2, 0.4, np.nan, 0.1, np.inf], [True, True, True, False, False])
    assert (numbers.points, numbers.valid, numbers.nonfinite) == (5, 3, 2)
    assert numbers.mean_valid == pytest.approx(0.3)
    assert numbers.std_valid == pytest.approx(0.1)
    assert numbers.mean_invalid == pytest.approx(0.1)
    assert alpha_numbers([0.2], [True]).mean_invalid is None


def test_a_point_is_shown_in_the_image_that_its_feature_is_from_and_in_the_pixel_of_the_scaled_image() -> None:
    """One red pixel in each image; the points at them must lie on red in the kept images, which are half as large."""
    images = np.zeros((3, 3, 960, 960), np.uint8)
    uv = np.zeros((5, 3, 2))
    for view in range(3):
        column, row = 100 + 200 * view, 300
        images[view, 0, row - 4 : row + 5, column - 4 : column + 5] = 255
        uv[:, view] = column, row
    valid = np.array([True, True, True, False, False])
    inside = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    scene, rows = capture("red", np.zeros((5, 3)), images, uv, valid, view=[1, 2, 2, 0, 0], inside=inside)
    assert len(scene.views) == 2  # the views 2 and 1: most features are from them
    place = dict(zip(rows.tolist(), scene.view.tolist(), strict=True))
    assert place == {0: 1, 1: 0, 2: 0, 3: 0, 4: NO_VIEW}
    for point in range(len(rows)):
        if scene.view[point] != NO_VIEW:
            picture = np.asarray(Image.open(io.BytesIO(scene.views[scene.view[point]].image)))
            column, row = np.round(scene.uv[point]).astype(int)
            assert picture.shape[:2] == (480, 480)
            assert picture[row, column, 0] > 200


def test_a_damaged_snapshot_is_said_to_be_damaged(tmp_path: Path) -> None:
    write(tmp_path / "run.json", [snapshot(0)]).finish("completed")
    document = json.loads((tmp_path / "run.json").read_text())
    for key, value in (("offsets", "AAAA"), ("count", 10**9), ("views", 3)):
        bad = json.loads(json.dumps(document))
        bad["snapshots"]["scenes"][0][key] = value
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(RecordError, match="damaged"):
            load_run(tmp_path / "bad.json")
