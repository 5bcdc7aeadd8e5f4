from __future__ import annotations

import numpy as np
import pytest

from bifusion_diag.errors import UserError


def test_a_well_formed_scene_passes(make_scene):
    scene = make_scene(10, views=3)
    assert scene.validate() is scene
    assert len(scene) == 10


def test_a_scene_without_points_is_representable(make_scene):
    assert len(make_scene(0).validate()) == 0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("semantic", np.zeros(9, np.int64), r"scene 'small': semantic must be int64 \(N=10\), got int64 \(9,\)"),
        ("depth", np.zeros((1, 6, 9), np.float32), r"depth must be float32 \(V=1, H=6, W=8\), got float32 \(1, 6, 9\)"),
        ("pose", np.eye(4)[None], r"pose must be float32 \(V=1, 4, 4\), got float64 \(1, 4, 4\)"),
        ("images", [1], r"images must be uint8 \(V, 3, H, W\), got list"),
        ("superpoint", np.arange(10) * 2, r"every id used, got 10 ids from 0 to 18"),
    ],
)
def test_malformed_fields_are_named(make_scene, field, value, words):
    with pytest.raises(UserError, match=words):
        make_scene(10, **{field: value}).validate()


def test_take_keeps_rows_together_and_superpoints_compact(make_scene):
    scene = make_scene(6, superpoint=np.array([0, 1, 2, 3, 3, 1]))
    taken = scene.take(np.array([5, 3, 4]), "cut")
    np.testing.assert_array_equal(taken.points, scene.points[[5, 3, 4]])
    np.testing.assert_array_equal(taken.semantic, scene.semantic[[5, 3, 4]])
    np.testing.assert_array_equal(taken.superpoint, [0, 1, 1])
    assert taken.notes == ("cut",)
    assert scene.notes == ()
