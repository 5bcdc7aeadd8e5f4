from __future__ import annotations

import pytest

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data import open_source
from bifusion_diag.data.scannet200 import CLASS_NAMES, class_id
from bifusion_diag.data.synthetic import SyntheticRooms
from bifusion_diag.errors import UserError


def test_synthetic_is_built_in():
    source = open_source(DataSettings(scenes=3), seed=5)
    assert isinstance(source, SyntheticRooms)
    assert (len(source), source.seed) == (3, 5)


def test_an_unknown_source_says_what_would_be_right(tmp_path):
    with pytest.raises(UserError, match=r"data.source 'sinthetic': no such folder.*Did you mean 'synthetic'\?"):
        open_source(DataSettings(source="sinthetic"), seed=0)
    (tmp_path / "capture.zip").touch()
    with pytest.raises(UserError, match=r"capture.zip': not a folder. Give an existing folder of RGB-D frames"):
        open_source(DataSettings(source=str(tmp_path / "capture.zip")), seed=0)


def test_class_names_are_those_of_the_benchmark():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 200
    assert [class_id(name) for name in ("wall", "floor", "chair", "table", "ceiling", "mattress")] == [
        0,
        1,
        2,
        3,
        35,
        199,
    ]
    with pytest.raises(UserError, match=r"'chiar' is not a ScanNet200 class. Did you mean 'chair'"):
        class_id("chiar")


def test_every_class_that_a_room_uses_exists():
    rooms = SyntheticRooms(DataSettings(scenes=60), 1)
    used = {thing.name for index in range(60) for thing in rooms.room(index).things}
    assert used <= set(CLASS_NAMES)
    assert len(used) > 40, "rooms are varied"
