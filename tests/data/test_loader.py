from __future__ import annotations

from collections import Counter

import pytest
import torch

from bifusion_diag.config.settings import AugmentSettings, DataSettings
from bifusion_diag.data.loader import BatchLoader
from bifusion_diag.errors import UserError


class Scenes:
    """A source of small scenes that are told apart by their names."""

    def __init__(self, make_scene, count):
        self.scenes = [make_scene(30, seed=k, name=str(k)) for k in range(count)]

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        return self.scenes[index]

    def describe(self):
        return {"kind": "test", "scenes": len(self)}


def same(one, other):
    return all(
        torch.equal(value, vars(other)[name]) if isinstance(value, torch.Tensor) else value == vars(other)[name]
        for name, value in vars(one).items()
    )


def test_a_batch_is_a_pure_function_of_seed_and_step(make_scene):
    settings = DataSettings(max_points=20)
    forward = BatchLoader(Scenes(make_scene, 5), settings, batch_size=2, seed=3)
    backward = BatchLoader(Scenes(make_scene, 5), settings, batch_size=2, seed=3)
    ascending = [forward.batch(step) for step in range(6)]
    descending = [backward.batch(step) for step in reversed(range(6))][::-1]
    assert all(same(one, other) for one, other in zip(ascending, descending, strict=True))
    assert not same(ascending[0], BatchLoader(Scenes(make_scene, 5), settings, batch_size=2, seed=4).batch(0))


def test_every_epoch_visits_every_scene_once_in_an_order_of_its_own(make_scene):
    loader = BatchLoader(Scenes(make_scene, 7), DataSettings(), batch_size=3, seed=0)
    assert loader.scenes_per_epoch == 7
    visits = [int(name) for step in range(7) for name in loader.batch(step).names]
    epochs = [visits[k : k + 7] for k in (0, 7, 14)]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_visit_is_cut_and_moved_anew_while_xyz_stays(make_scene):
    loader = BatchLoader(Scenes(make_scene, 1), DataSettings(max_points=20), batch_size=2, seed=0)
    batch = loader.batch(0)
    assert batch.names == ("0", "0")
    assert not torch.equal(batch.xyz[:20], batch.xyz[20:])
    assert not torch.equal(batch.coords[:20], batch.coords[20:])
    known = {tuple(row) for row in loader.source[0].points[:, :3].tolist()}
    assert all(tuple(row) in known for row in batch.xyz.tolist())


def test_without_augmentation_coords_are_xyz(make_scene):
    still = AugmentSettings(flip=0, rotate=False, scale=(1, 1), translate_std=0, elastic=0)
    batch = BatchLoader(Scenes(make_scene, 2), DataSettings(augment=still), batch_size=2, seed=0).batch(0)
    assert torch.equal(batch.coords, batch.xyz)


def test_a_source_without_scenes_is_refused(make_scene):
    with pytest.raises(UserError, match=r"the data source has no scenes: .*'kind': 'test'"):
        BatchLoader(Scenes(make_scene, 0), DataSettings(), batch_size=1, seed=0)


def test_a_scene_without_points_is_stood_in_for_by_the_next_one(make_scene):
    source = Scenes(make_scene, 3)
    source.scenes[1] = make_scene(0, name="1", notes=("no depth reading",))
    loader = BatchLoader(source, DataSettings(), batch_size=3, seed=0)
    batch = loader.batch(0)
    assert sorted(batch.names) == ["0", "2", "2"]
    assert [note for notes in batch.notes for note in notes] == ["stands in for '1', which has no points"]


def test_scenes_none_of_which_has_points_are_an_error(make_scene):
    source = Scenes(make_scene, 2)
    source.scenes = [make_scene(0, name=str(k)) for k in range(2)]
    with pytest.raises(UserError, match="none of the 2 scenes has a point"):
        BatchLoader(source, DataSettings(), batch_size=1, seed=0).batch(0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_batches_of_several_ranks_are_those_of_one_process_with_the_joint_batch(make_scene, ranks):
    settings = DataSettings(max_points=20)
    one = BatchLoader(Scenes(make_scene, 7), settings, batch_size=2 * ranks, seed=3)
    many = [
        BatchLoader(Scenes(make_scene, 7), settings, batch_size=2, seed=3, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for step in range(5):  # into a third epoch
        parts, joint = [loader.batch(step) for loader in many], one.batch(step)
        assert sum((part.names for part in parts), ()) == joint.names
        for field in ("xyz", "coords", "color", "semantic", "images", "depth", "pose"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(joint, field))
