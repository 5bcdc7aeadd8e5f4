"""RGB-D folders with 2D masks and with given superpoints beside them: what they do, and the words of every error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data import open_source
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.errors import UserError

HEIGHT, WIDTH = 24, 32
#: Every pixel is a point; on the wall they are 7 cm apart. The smallest piece that stays is 5 voxels large.
ALL = {"max_points": 2 * HEIGHT * WIDTH, "superpoint_voxel": 0.1, "superpoint_size": 1.0}


def depth_of() -> np.ndarray:
    """A wall 2 m away with a box half a metre before it, in millimetres."""
    depth = np.full((HEIGHT, WIDTH), 2000, np.uint16)
    depth[10:18, 8:20] = 1500
    return depth


def masks_of(number: int) -> np.ndarray:
    """The left and the right of the wall, and the box with a bit of the wall; a corner has no mask."""
    masks = np.where(np.arange(WIDTH) < 16, 300, 2)[None].repeat(HEIGHT, 0)
    masks[10:18, 8:20] = masks[12:16, 20] = 77 + number
    masks[:6, :8] = 0
    return masks.astype(np.uint16)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Two frames of one camera that stands still, in the layout of 7-Scenes, and masks at twice their size."""
    path = tmp_path / "capture"
    (path / "superpoints").mkdir(parents=True)
    (path / "masks").mkdir()
    np.savetxt(path / "camera-intrinsics.txt", np.array([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]]))
    color = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    color[10:18, 8:20] = [200, 40, 40]
    for number in range(2):
        name = f"frame-{number:06d}"
        Image.fromarray(color).save(path / f"{name}.color.png")
        Image.fromarray(depth_of()).save(path / f"{name}.depth.png")
        np.savetxt(path / f"{name}.pose.txt", np.eye(4))
        Image.fromarray(np.kron(masks_of(number), np.ones((2, 2), np.uint16))).save(path / "masks" / f"{name}.png")
    return path


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    pairs = len({*zip(one.tolist(), other.tolist(), strict=True)})
    return pairs == len(np.unique(one)) == len(np.unique(other))


def with_masks(capture: Path, **options: object) -> RGBDFolder:
    settings = {"superpoints": "masks", "masks": str(capture / "masks")}
    return RGBDFolder(capture, DataSettings(**{**ALL, **settings, **options}))


def test_masks_that_nothing_would_read_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.masks 'folder' has no effect.*set data\.superpoints=masks"):
        DataSettings(masks="folder")


def test_masks_of_a_folder_cut_and_join_the_points_of_their_pixels(capture: Path) -> None:
    source = with_masks(capture)
    scene = source[0].validate()
    clusters = RGBDFolder(capture, DataSettings(**ALL))[0]
    masks, wall = masks_of(0).ravel(), depth_of().ravel() == 2000  # every pixel is a point, in this order
    masked = masks > 0
    # the bit of the wall in the box's mask is too small to stay alone
    expected = np.where(wall, np.where(masks == 300, 0, 1), 2)
    bit = wall & (masks == 77)
    certain = masked & ~bit
    assert same_partition(scene.superpoint[certain], expected[certain])
    assert set(scene.superpoint[bit]) == set(scene.superpoint[certain & (expected == 1)])
    assert scene.superpoint[0] not in scene.superpoint[masked]  # the corner keeps its own
    for field in ("points", "semantic", "instance", "images"):  # labels rest on VCCS whatever the superpoints are
        assert np.array_equal(getattr(scene, field), getattr(clusters, field))
    assert source.describe()["superpoints"] == (
        f"VCCS (seeds 1 m apart, voxels of 0.1 m) relabelled by the masks in {capture / 'masks'}"
    )


def test_masks_of_two_frames_meet_in_space(capture: Path) -> None:
    one, both = with_masks(capture)[0], with_masks(capture, point_views=2)[0]
    assert len(both) == 2 * len(one)
    # the box is mask 77 in one frame and 78 in the other
    assert same_partition(both.superpoint, np.concatenate([one.superpoint] * 2))


def test_graph_masks_need_no_files(capture: Path) -> None:
    source = open_source(DataSettings(source=str(capture), superpoints="masks", **ALL), seed=0)
    scene = source[0]
    assert same_partition(scene.superpoint, depth_of().ravel())  # wall and box differ in colour
    assert "graph-based segmentation of the colour images" in source.describe()["superpoints"]


@pytest.mark.parametrize("ending", ["png", "npy"])
def test_given_superpoints_stand_across_frames(capture: Path, ending: str) -> None:
    ids = np.where(depth_of() == 2000, 40, 7)
    ids[:, 24:] = -1
    for number in range(2):
        path = capture / "superpoints" / f"frame-{number:06d}.{ending}"
        if ending == "npy":
            np.save(path, ids.astype(np.int32))
        else:
            Image.fromarray((ids + 1).astype(np.uint8)).save(path)
    options = {**ALL, "point_views": 2}
    source = RGBDFolder(capture, DataSettings(**options, superpoints="files"))
    label = source[0].validate().superpoint.reshape(2, HEIGHT, WIDTH)
    given = np.stack([ids, ids])
    assert same_partition(label[given >= 0], given[given >= 0])
    clusters = RGBDFolder(capture, DataSettings(**options))[0].superpoint.reshape(2, HEIGHT, WIDTH)
    assert same_partition(label[given < 0], clusters[given < 0])
    assert not set(label[given >= 0]) & set(label[given < 0])
    assert source.describe()["superpoints"].startswith("files in superpoints/, VCCS")


def ones(capture: Path) -> None:
    for number in range(2):
        np.save(capture / "superpoints" / f"frame-{number:06d}.npy", np.ones((HEIGHT, WIDTH), np.int64))


def blank(capture: Path) -> None:
    for path in (capture / "masks").iterdir():
        Image.new("L", (WIDTH, HEIGHT)).save(path)


MASK_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        lambda f: (f / "masks").rename(f / "other"),
        r"data\.masks '.*masks': no such folder\. Give a folder",
    ),
    "a frame without": (
        lambda f: (f / "masks" / "frame-000001.png").unlink(),
        r"masks.frame-000001\.png: missing\. data\.masks needs a label PNG for every frame; add it \(all 0",
    ),
    "coloured": (
        lambda f: Image.new("RGB", (WIDTH, HEIGHT)).save(f / "masks" / "frame-000001.png"),
        r"frame-000001\.png: ids must be an 8- or 16-bit PNG .* mode 'RGB'; save the ids themselves",
    ),
    "of another shape": (
        lambda f: Image.new("L", (40, 40)).save(f / "masks" / "frame-000001.png"),
        r"frame-000001\.png: 40×40 px is no enlargement .* colour image has 32×24 px and .* depth image has 32×24",
    ),
    "truncated": (
        lambda f: (f / "masks" / "frame-000001.png").write_bytes(b"\x89PNG"),
        r"frame-000001\.png: the image cannot be read",
    ),
    "empty": (blank, r"masks.frame-000000\.png: no picture of its folder has a mask \(all are 0\)\. Ids start at 1"),
}


@pytest.mark.parametrize("damage", MASK_DAMAGE)
def test_bad_masks_are_named(capture: Path, damage: str) -> None:
    break_it, words = MASK_DAMAGE[damage]
    break_it(capture)
    with pytest.raises(UserError, match=words):
        with_masks(capture)


def test_a_mistyped_graph_is_no_folder(capture: Path) -> None:
    with pytest.raises(UserError, match=r"data\.masks 'grpah': no such folder.* Did you mean 'graph'"):
        with_masks(capture, masks="grpah")


ID_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a frame without": (
        lambda f: (f / "superpoints" / "frame-000001.npy").unlink(),
        r"superpoints.frame-000001\.png: missing\. data\.superpoints=files needs a PNG or NPY",
    ),
    "two of one frame": (
        lambda f: Image.new("L", (WIDTH, HEIGHT)).save(f / "superpoints" / "frame-000001.png"),
        r"frame-000001\.png: the frame has superpoints in frame-000001\.npy too; remove one",
    ),
    "fractions": (
        lambda f: np.save(f / "superpoints" / "frame-000001.npy", np.ones((HEIGHT, WIDTH))),
        r"frame-000001\.npy: superpoints must be integers \(H, W\), .* float64 \(24, 32\)",
    ),
    "a list": (
        lambda f: np.save(f / "superpoints" / "frame-000001.npy", np.arange(40)),
        r"frame-000001\.npy: superpoints must be integers \(H, W\), .* int64 \(40,\)",
    ),
    "objects": (
        lambda f: np.save(f / "superpoints" / "frame-000001.npy", np.array([{}]), allow_pickle=True),
        r"frame-000001\.npy: the array cannot be read",
    ),
    "of another shape": (
        lambda f: np.save(f / "superpoints" / "frame-000001.npy", np.ones((HEIGHT, HEIGHT), int)),
        r"frame-000001\.npy: 24×24 px is no enlargement",
    ),
}


@pytest.mark.parametrize("damage", ID_DAMAGE)
def test_bad_superpoints_are_named(capture: Path, damage: str) -> None:
    ones(capture)
    RGBDFolder(capture, DataSettings(superpoints="files"))
    break_it, words = ID_DAMAGE[damage]
    break_it(capture)
    with pytest.raises(UserError, match=words):
        RGBDFolder(capture, DataSettings(superpoints="files"))


def test_real_frames_with_graph_masks(real_frames: Path) -> None:
    scene = RGBDFolder(real_frames, DataSettings(superpoints="masks"))[0].validate()
    clusters = RGBDFolder(real_frames, DataSettings())[0]
    assert np.array_equal(scene.semantic, clusters.semantic)
    assert 30 < scene.superpoint.max() + 1 < 600
    assert scene.superpoint.max() != clusters.superpoint.max()
