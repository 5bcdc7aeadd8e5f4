"""Scenes that training leaves out by their names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bifusion_diag.config import load_settings, settings_from_dict
from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data import BatchLoader, SceneSubset, open_source
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.data.synthetic import SyntheticRooms
from bifusion_diag.errors import UserError

SMALL = {"max_points": 200, "image_height": 24, "image_width": 32, "superpoint_size": 0.5}


def rooms(count: int, exclude: tuple[str, ...] = (), **more: object) -> DataSettings:
    return DataSettings(scenes=count, exclude=exclude, **SMALL, **more)  # type: ignore[arg-type]


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Seven frames of a wall, of which the second has no depth."""
    folder = tmp_path / "capture"
    folder.mkdir()
    np.savetxt(folder / "camera-intrinsics.txt", [[30.0, 0, 16], [0, 30, 12], [0, 0, 1]])
    for number in range(7):
        depth = np.full((24, 32), 0 if number == 1 else 2000 + number, np.uint16)
        Image.fromarray(depth).save(folder / f"frame-{number:06d}.depth.png")
        Image.fromarray(np.full((24, 32, 3), 20 * number, np.uint8)).save(folder / f"frame-{number:06d}.color.jpg")
        np.savetxt(folder / f"frame-{number:06d}.pose.txt", np.eye(4))
    return folder


@pytest.mark.parametrize("span", [1, 3])
def test_names_are_known_before_a_scene_is_built(capture: Path, span: int) -> None:
    sources = [
        SyntheticRooms(rooms(3), 5),
        RGBDFolder(capture, DataSettings(max_points=50, views=span)),
        SceneSubset(RGBDFolder(capture, DataSettings(max_points=50, views=span)), [1, 0]),
    ]
    for source in sources:
        assert source.names() == [source[index].name for index in range(len(source))]


def test_an_epoch_visits_every_other_scene_once_in_the_order_it_would_have_had() -> None:
    settings = rooms(9)
    source = open_source(settings, seed=1)
    whole = BatchLoader(source, settings, batch_size=2, seed=1)
    gone = {source.names()[3], source.names()[7]}
    without = settings.model_copy(update={"exclude": tuple(gone)})
    loader = BatchLoader(source, without, batch_size=2, seed=1)
    assert loader.scenes_per_epoch == 7
    visits = [source.names()[index] for step in range(7) for index in loader.scene_indices(step)]
    assert Counter(visits) == Counter({name: 2 for name in source.names() if name not in gone})
    before = [source.names()[index] for step in range(9) for index in whole.scene_indices(step)]
    assert visits == [name for name in before if name not in gone]


def test_until_the_scene_would_have_come_the_batches_are_the_same() -> None:
    settings = rooms(5)
    source = open_source(settings, seed=2)
    whole = BatchLoader(source, settings, batch_size=1, seed=2)
    (third,) = whole.scene_indices(2)
    loader = BatchLoader(source, rooms(5, (source.names()[third],)), batch_size=1, seed=2)
    for step in range(2):
        assert torch.equal(loader.batch(step).coords, whole.batch(step).coords)
    assert loader.batch(2).names == whole.batch(3).names != whole.batch(2).names


def test_a_scene_that_stands_in_for_another_is_none_that_is_left_out(capture: Path) -> None:
    data = DataSettings(source=str(capture), max_points=50, exclude=("frame-000002",))
    loader = BatchLoader(open_source(data, seed=0), data, batch_size=6, seed=0)  # an epoch a step
    served = Counter(loader.batch(0).names)
    assert served == Counter({"frame-000003": 2, **{f"frame-00000{k}": 1 for k in (0, 4, 5, 6)}})


def test_of_several_processes_each_leaves_it_out() -> None:
    settings = rooms(6, ("synthetic-000002(seed 0)",))
    source = open_source(settings, seed=0)
    alone = BatchLoader(source, settings, batch_size=2, seed=0)
    ranks = [BatchLoader(source, settings, batch_size=1, seed=0, rank=r, ranks=2) for r in range(2)]
    for step in range(5):
        assert alone.scene_indices(step) == tuple(i for one in ranks for i in one.scene_indices(step))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("synthetic-000007(seed 0)",), r"none of the 2 scenes trained on is called 'synthetic-000007\(seed 0\)'. Did"),
        (("synthetic-000001(seed 0)", "x"), "is called 'x'. Known: synthetic-000000"),
        (("synthetic-000000(seed 0)", "synthetic-000001(seed 0)"), "names all 2 scenes: none is left to train on"),
    ],
)
def test_names_that_cannot_be_left_out(names: tuple[str, ...], message: str) -> None:
    settings = rooms(2, names)
    with pytest.raises(UserError, match=message):
        BatchLoader(open_source(settings, seed=0), settings, batch_size=1, seed=0)


def test_the_setting_is_read_from_the_command_line_and_from_a_record() -> None:
    settings = load_settings("bifusion", overrides=["data.exclude=[scene0000_00, 'synthetic-000001(seed 0)']"])
    assert settings.data.exclude == ("scene0000_00", "synthetic-000001(seed 0)")
    stored = settings.model_dump(mode="json")
    assert settings_from_dict(stored, "test") == settings
    del stored["data"]["exclude"]  # a record of an earlier version
    assert settings_from_dict(stored, "test").data.exclude == ()
