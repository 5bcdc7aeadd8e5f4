"""RGB-D folders, written by the tests: both layouts, flawed frames, and the words of every error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.geometry import project, to_camera, unproject_depth
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.data.scannet200 import class_id
from bifusion_diag.errors import UserError

HEIGHT, WIDTH = 24, 32
K = np.array([[30.0, 0, 16], [0, 30, 12], [0, 0, 1]])
SETTINGS = DataSettings(max_points=200)


def _pose(number: int) -> np.ndarray:
    """A camera turned about its y axis and moved, a little more each frame."""
    angle = 0.1 * number
    pose = np.eye(4)
    pose[[0, 0, 2, 2], [0, 2, 0, 2]] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    pose[:3, 3] = [0.05 * number, -0.02 * number, 0.3]
    return pose


def _depth(number: int) -> np.ndarray:
    """A wall 2 m away with a box before it, in millimetres, and a corner without readings."""
    depth = np.full((HEIGHT, WIDTH), 2000 + 10 * number, dtype=np.uint16)
    depth[10:18, 8:20] = 1500
    depth[:4, :4], depth[-4:, -4:] = 0, 65535
    return depth


def _color(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    red = np.linspace(0, 255, width).astype(np.uint8)
    return np.stack([np.tile(red, (height, 1)), np.full((height, width), 20 * number, np.uint8)] * 2, axis=2)[..., :3]


def _write_frame(folder: Path, number: int) -> str:
    name = f"frame-{number:06d}"
    Image.fromarray(_color(number)).save(folder / f"{name}.color.jpg", quality=95)
    Image.fromarray(_depth(number)).save(folder / f"{name}.depth.png")
    np.savetxt(folder / f"{name}.pose.txt", _pose(number))
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five frames in the layout of 7-Scenes."""
    path = tmp_path / "capture"
    path.mkdir()
    np.savetxt(path / "camera-intrinsics.txt", K)
    for number in range(5):
        _write_frame(path, number)
    return path


@pytest.fixture
def scannet(tmp_path: Path) -> Path:
    """Eleven frames of a ScanNet export with colour and labels twice the size of depth."""
    path = tmp_path / "scene0000_00"
    for kind in ("color", "depth", "pose", "intrinsic", "label-filt", "instance-filt"):
        (path / kind).mkdir(parents=True)
    wide = np.eye(4)
    wide[:3, :3] = K
    np.savetxt(path / "intrinsic" / "intrinsic_depth.txt", wide)
    np.savetxt(path / "intrinsic" / "intrinsic_color.txt", wide * 2)
    for number in range(11):
        Image.fromarray(_color(number, 2 * HEIGHT, 2 * WIDTH)).save(path / "color" / f"{number}.jpg", quality=95)
        Image.fromarray(_depth(number)).save(path / "depth" / f"{number}.png")
        np.savetxt(path / "pose" / f"{number}.txt", _pose(number))
        label = np.ones((HEIGHT, WIDTH), dtype=np.uint16)  # raw id 1: wall
        label[10:18, 8:20], label[10:18, 20:24] = 2, 1357  # a chair, and something outside the 200 classes
        instance = np.full((HEIGHT, WIDTH), 1, dtype=np.uint8)
        instance[10:18, 8:14], instance[10:18, 14:24] = 7, 9
        for kind, ids in (("label-filt", label), ("instance-filt", instance)):
            Image.fromarray(np.kron(ids, np.ones((2, 2), ids.dtype))).save(path / kind / f"{number}.png")
    return path


def _pixels(source: RGBDFolder, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) u, v and (N,) depth of a scene's points, by projection into its first image."""
    scene = source[index]
    camera = to_camera(torch.from_numpy(scene.points[:, :3]), torch.from_numpy(scene.pose))
    uv = project(camera, torch.from_numpy(scene.intrinsics))
    return uv[0].numpy(), camera[0, :, 2].numpy()


def test_points_are_the_pixels_of_the_frame(folder: Path) -> None:
    source = RGBDFolder(folder, DataSettings(max_points=HEIGHT * WIDTH))
    assert len(source) == 5
    scene = source[3]
    assert scene.name == "frame-000003"
    truth = np.where(_depth(3) == 65535, 0, _depth(3)) / 1000
    np.testing.assert_allclose(scene.depth[0], truth, rtol=1e-6)
    world = unproject_depth(*(torch.from_numpy(array) for array in (scene.depth, scene.intrinsics, scene.pose)))
    np.testing.assert_allclose(scene.points[:, :3], world[0].numpy()[truth > 0], atol=1e-5)
    uv, depth = _pixels(source, 3)
    np.testing.assert_allclose(uv, np.argwhere(truth > 0)[:, ::-1], atol=1e-3)
    np.testing.assert_allclose(depth, truth[truth > 0], rtol=1e-5)
    picture = scene.images[0].transpose(1, 2, 0)
    assert np.array_equal(scene.points[:, 3:], picture[truth > 0])
    assert np.abs(picture.astype(int) - _color(3)).mean() < 4  # JPEG


def test_scenes_of_several_frames(folder: Path) -> None:
    source = RGBDFolder(folder, DataSettings(views=2, point_views=4, max_points=500))
    assert len(source) == 2
    assert [source[i].name for i in range(2)] == ["frame-000000..frame-000003", "frame-000001..frame-000004"]
    scene = source[0]
    assert scene.images.shape == (2, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose(scene.pose, [_pose(1), _pose(3)], atol=1e-6)
    assert len(scene) == 1000  # twice max_points
    outside = [np.abs(scene.points[:, 4] - 20 * number).min() > 5 for number in range(4)]
    assert not any(outside)  # green tells the frame: points come from all four, with and without an image
    with pytest.raises(IndexError):
        source[2]
    with pytest.raises(UserError, match=r"5 frames, but a scene takes 6 .*lower these or add frames"):
        RGBDFolder(folder, DataSettings(views=1, point_views=6))


def test_scenes_are_the_same_every_time(folder: Path) -> None:
    first, second = RGBDFolder(folder, SETTINGS), RGBDFolder(folder, SETTINGS)
    assert first[2] is first[2]  # cached
    for field in ("points", "semantic", "instance", "superpoint", "images"):
        assert np.array_equal(getattr(first[2], field), getattr(second[2], field))


def test_scannet_export(scannet: Path) -> None:
    source = RGBDFolder(scannet, DataSettings(max_points=HEIGHT * WIDTH))
    scene = source[10]
    assert scene.name == "10"  # frames go by number, not by letter
    assert (scene.labels, source.describe()["labels"]) == ("ScanNet export", "ScanNet export")
    assert scene.images.shape == (1, 3, HEIGHT, WIDTH)
    np.testing.assert_allclose(scene.intrinsics[0], K)
    uv, _ = _pixels(source, 10)
    u, v = np.round(uv).astype(int).T
    box, rest = (v >= 10) & (v < 18) & (u >= 8) & (u < 20), (v >= 10) & (v < 18) & (u >= 20) & (u < 24)
    expected = np.where(box, class_id("chair"), np.where(rest, -1, class_id("wall")))
    assert np.array_equal(scene.semantic, expected)
    assert np.array_equal(scene.instance, np.where(box, np.where(u < 14, 0, 1), -1))  # stuff and unknown have none


def test_unlabelled_folders_say_so(folder: Path) -> None:
    source = RGBDFolder(folder, SETTINGS)
    assert source.describe() == {
        "kind": "rgbd",
        "layout": "7-Scenes",
        "folder": str(folder),
        "frames": 5,
        "scenes": 5,
        "frames_per_scene": 1,
        "image_size": [WIDTH, HEIGHT],
        "labels": "geometric pseudo-labels (no ground truth)",
        "labels_rest_on": "VCCS (seeds 0.25 m apart, voxels of 0.04 m)",
        "superpoints": "VCCS (seeds 0.25 m apart, voxels of 0.04 m)",
        "marked": {"non-finite pose": 0, "no depth": 0},
    }
    assert source[0].labels == "geometric pseudo-labels"


def test_lost_tracking_is_kept_marked_and_counted(folder: Path) -> None:
    np.savetxt(folder / "frame-000002.pose.txt", np.full((4, 4), -np.inf))
    source = RGBDFolder(folder, DataSettings(max_points=HEIGHT * WIDTH))
    assert source.describe()["marked"] == {"non-finite pose": 1, "no depth": 0}
    scene = source[2]
    assert not np.isfinite(scene.pose).any()
    assert scene.notes == ("non-finite pose in frame-000002: its points are in its camera's frame",)
    np.testing.assert_allclose(scene.points[:, 2], scene.depth[scene.depth > 0], rtol=1e-6)
    assert source[1].notes == ()

    several = RGBDFolder(folder, DataSettings(views=4, point_views=4, max_points=HEIGHT * WIDTH))[0]
    assert several.notes == ("non-finite pose in frame-000002: its points are left out",)
    assert not np.isfinite(several.pose[2]).any()
    assert (np.abs(several.points[:, 4] - 40) > 5).all()  # green of frame 2


def test_no_depth_is_kept_marked_and_counted(folder: Path) -> None:
    Image.fromarray(np.full((HEIGHT, WIDTH), 65535, np.uint16)).save(folder / "frame-000001.depth.png")
    source = RGBDFolder(folder, SETTINGS)
    assert source.describe()["marked"] == {"non-finite pose": 0, "no depth": 1}
    scene = source[1]
    assert len(scene) == 0
    assert scene.notes == ("no depth reading in frame-000001",)
    assert scene.images.any()
    assert not scene.depth.any()
    pair = RGBDFolder(folder, DataSettings(views=2, point_views=2))[0]
    assert len(pair) > 0
    assert pair.notes == scene.notes


def _overwrite(paths: Iterable[Path], pixels: np.ndarray) -> None:
    for path in list(paths):
        Image.fromarray(pixels).save(path)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no colour": (
        lambda f: (f / "frame-000003.color.jpg").unlink(),
        r"frame-000003\.color\.jpg: missing.* 4 color, 5 dep",
    ),
    "no depth": (
        lambda f: (f / "frame-000003.depth.png").unlink(),
        r"frame-000003\.depth\.png: missing.*add the file or",
    ),
    "no pose": (
        lambda f: (f / "frame-000003.pose.txt").unlink(),
        r"frame-000003\.pose\.txt: missing.* 4 pose files",
    ),
    "no intrinsics": (
        lambda f: (f / "camera-intrinsics.txt").unlink(),
        r"camera-intrinsics\.txt: missing\. Put the 3×3",
    ),
    "empty intrinsics": (lambda f: (f / "camera-intrinsics.txt").write_text(""), r"intrinsics\.txt: the file is empty"),
    "half of K": (lambda f: (f / "camera-intrinsics.txt").write_text("1 0 2"), r"a 3×3 or 4×4 matrix, this file has 3"),
    "negative focal": (lambda f: np.savetxt(f / "camera-intrinsics.txt", -K), r"focal lengths must be positive"),
    "K of the colour": (
        lambda f: np.savetxt(f / "camera-intrinsics.txt", 2 * K),
        r"\(32, 24\) lies outside the depth images",
    ),
    "colour cut": (
        lambda f: _truncate(f / "frame-000001.color.jpg"),
        r"frame-000001\.color\.jpg: the image cannot be read",
    ),
    "depth cut": (
        lambda f: _truncate(f / "frame-000001.depth.png"),
        r"frame-000001\.depth\.png: the image cannot be read",
    ),
    "depth empty": (
        lambda f: (f / "frame-000001.depth.png").write_bytes(b""),
        r"frame-000001\.depth\.png: the image cannot",
    ),
    "depth of 8 bits": (
        lambda f: Image.new("L", (WIDTH, HEIGHT)).save(f / "frame-000001.depth.png"),
        r"frame-000001\.depth\.png: depth must be a 16-bit PNG .* mode 'L'",
    ),
    "depth of another size": (
        lambda f: Image.fromarray(_depth(0)[:12]).save(f / "frame-000001.depth.png"),
        r"frame-000001\.depth\.png: 32×12 px, but the depth image .*frame-000000\.depth\.png has 32×24 px",
    ),
    "colour of another size": (
        lambda f: Image.new("RGB", (8, 8)).save(f / "frame-000004.color.jpg"),
        r"frame-000004\.color\.jpg: 8×8 px, but the colour image",
    ),
    "pose of 3 rows": (
        lambda f: np.savetxt(f / "frame-000001.pose.txt", np.eye(4)[:3]),
        r"frame-000001\.pose\.txt: a pose is a 4×4 matrix \(16 numbers\), this file has 12",
    ),
    "a column-major pose": (
        lambda f: np.savetxt(f / "frame-000001.pose.txt", _pose(1).T),
        r"frame-000001\.pose\.txt: not a camera-to-world pose .* Transpose a column-major matrix",
    ),
    "a pose with scale": (
        lambda f: np.savetxt(f / "frame-000001.pose.txt", _pose(1) @ np.diag([2.0, 2.0, 2.0, 1.0])),
        r"frame-000001\.pose\.txt: not a camera-to-world pose .* take scale out of R",
    ),
    "a pose of zeros": (
        lambda f: np.savetxt(f / "frame-000001.pose.txt", np.zeros((4, 4))),
        r"frame-000001\.pose\.txt: not a camera-to-world pose .* where tracking was lost, write 16 times -inf",
    ),
    "a pose beyond float32": (
        lambda f: np.savetxt(f / "frame-000001.pose.txt", _pose(1) + np.outer([1e39, 0, 0, 0], [0, 0, 0, 1])),
        r"frame-000001\.pose\.txt: not a camera-to-world pose",
    ),
    "words for a pose": (
        lambda f: (f / "frame-000001.pose.txt").write_text("tracking lost"),
        r"frame-000001\.pose\.txt: it should hold nothing but numbers: .*'tracking'",
    ),
    "bytes for a pose": (
        lambda f: (f / "frame-000001.pose.txt").write_bytes(b"\xff\xfe\x00"),
        r"frame-000001\.pose\.txt: cannot be read as text",
    ),
    "depth nowhere": (
        lambda f: _overwrite(f.glob("*.depth.png"), 0 * _depth(0)),
        r"no frame of its folder has a depth reading",
    ),
    "no frames": (
        lambda f: _remove(f.glob("frame-*")),
        r"capture: no RGB-D frames here\. Expected either camera-intrinsics\.txt",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_named(folder: Path, damage: str) -> None:
    break_it, words = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(UserError, match=words):
        RGBDFolder(folder, SETTINGS)


SCANNET_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no depth": (lambda f: (f / "depth" / "7.png").unlink(), r"depth.7\.png: missing.* 11 color, 10 depth, 11 pose"),
    "no intrinsics": (lambda f: (f / "intrinsic" / "intrinsic_depth.txt").unlink(), r"intrinsic_depth\.txt: missing"),
    "one label missing": (
        lambda f: (f / "label-filt" / "3.png").unlink(),
        r"label-filt.3\.png: missing.*remove both fold",
    ),
    "sizes of labels": (
        lambda f: Image.new("L", (8, 8)).save(f / "instance-filt" / "2.png"),
        r"instance-filt.2\.png: 8×8 px, but the labels in .*label-filt.2\.png have 64×48 px",
    ),
    "coloured labels": (
        lambda f: Image.new("RGB", (64, 48)).save(f / "label-filt" / "2.png"),
        r"label-filt.2\.png: ids must be an 8- or 16-bit PNG",
    ),
    "ids of another set": (
        lambda f: _overwrite((f / "label-filt").glob("*"), np.full((48, 64), 1357, np.uint16)),
        r"label-filt.0\.png: no id in any label picture .* is that of a ScanNet200 class",
    ),
}


@pytest.mark.parametrize("damage", SCANNET_DAMAGE)
def test_bad_files_of_an_export_are_named(scannet: Path, damage: str) -> None:
    break_it, words = SCANNET_DAMAGE[damage]
    break_it(scannet)
    with pytest.raises(UserError, match=words):
        RGBDFolder(scannet, SETTINGS)


def test_real_frames(real_frames: Path) -> None:
    source = RGBDFolder(real_frames, DataSettings())
    assert source.describe()["marked"] == {"non-finite pose": 0, "no depth": 0}
    floors = 0
    for index in range(len(source)):
        scene = source[index]
        assert len(scene) == 40_000
        assert 3 <= scene.instance.max() + 1 <= 30
        assert 50 <= scene.superpoint.max() + 1 <= 500
        assert (scene.semantic == -1).mean() < 0.1
        floors += int((scene.semantic == class_id("floor")).any())
    assert floors >= 4  # the first four frames look down at the carpet
