"""Which files of a folder are RGB-D frames: the two layouts that are read, and what may lie beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bifusion_diag.errors import UserError, near_matches

EXPECTED = (
    "Expected either camera-intrinsics.txt with frame-*.color.jpg, frame-*.depth.png and frame-*.pose.txt (7-Scenes), "
    "or the folders color/ depth/ pose/ intrinsic/ of a ScanNet export"
)
_COLOUR_ENDINGS = (".jpg", ".jpeg", ".png")
_SUPERPOINTS = "superpoints"  # folder of given superpoints, in that of the frames


class Frame(NamedTuple):
    """The files of one frame; labels only in a ScanNet export that has them, masks and superpoints if asked for."""

    name: str
    color: Path
    depth: Path
    pose: Path
    label: Path | None = None
    instance: Path | None = None
    mask: Path | None = None
    superpoint: Path | None = None


class Layout(NamedTuple):
    """The frames of a folder in the order of their numbers, and the file of the depth camera's intrinsics."""

    kind: str
    frames: tuple[Frame, ...]
    intrinsics: Path


def find_layout(folder: Path) -> Layout:
    """Recognise the layout of a folder and collect its frames.

    Raises:
        UserError: no frames, a frame that lacks one of its files, or no intrinsics.
    """
    if any((folder / name).is_dir() for name in ("color", "depth", "pose")):
        layout = _scannet(folder)
    else:
        layout = _seven_scenes(folder)
    if not layout.frames:
        raise UserError(f"{folder}: no RGB-D frames here. {EXPECTED}")
    if not layout.intrinsics.is_file():
        raise UserError(
            f"{layout.intrinsics}: missing. Put the 3×3 (or 4×4) matrix of the depth camera there, in pixels"
        )
    return layout


def with_masks(layout: Layout, folder: Path) -> Layout:
    """Give every frame its label picture, ``folder/<frame name>.png``.

    Raises:
        UserError: no such folder, or it lacks a frame's picture.
    """
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise UserError(
            f"data.masks '{folder}': {problem}. Give a folder with a label PNG for every frame, or 'graph' to segment "
            "the colour images." + near_matches(str(folder), ["graph"])
        )
    frames = []
    for frame in layout.frames:
        path = folder / f"{frame.name}.png"
        if not path.is_file():
            raise UserError(
                f"{path}: missing. data.masks needs a label PNG for every frame; add it (all 0 if the frame has no "
                "mask), or use data.masks=graph"
            )
        frames.append(frame._replace(mask=path))
    return layout._replace(frames=tuple(frames))


def with_superpoints(layout: Layout, folder: Path) -> Layout:
    """Give every frame its picture of superpoints, ``superpoints/<frame name>.png`` or ``.npy`` in its folder.

    Raises:
        UserError: a frame has neither, or has both.
    """
    frames = []
    for frame in layout.frames:
        paths = [folder / _SUPERPOINTS / f"{frame.name}{ending}" for ending in (".png", ".npy")]
        found = [path for path in paths if path.is_file()]
        if len(found) == 2:
            raise UserError(f"{found[0]}: the frame has superpoints in {found[1].name} too; remove one of the two")
        if not found:
            raise UserError(
                f"{paths[0]}: missing. data.superpoints=files needs a PNG or NPY with an id for each pixel for every "
                "frame; add it, or use data.superpoints=vccs"
            )
        frames.append(frame._replace(superpoint=found[0]))
    return layout._replace(frames=tuple(frames))


def _seven_scenes(folder: Path) -> Layout:
    colors = {}
    for ending in _COLOUR_ENDINGS:
        colors.update(_numbered(folder, ".color" + ending))
    files = {
        "color.jpg": colors,
        "depth.png": _numbered(folder, ".depth.png"),
        "pose.txt": _numbered(folder, ".pose.txt"),
    }
    names = _complete(folder, files, lambda name, kind: f"{name}.{kind}")
    frames = (Frame(name, *(files[kind][name] for kind in files)) for name in names)
    return Layout("7-Scenes", tuple(frames), folder / "camera-intrinsics.txt")


def _scannet(folder: Path) -> Layout:
    colors = {}
    for ending in _COLOUR_ENDINGS:
        colors.update(_numbered(folder / "color", ending))
    endings = {"color": ".jpg", "depth": ".png", "pose": ".txt"}
    files = {"color": colors, "depth": _numbered(folder / "depth", ".png"), "pose": _numbered(folder / "pose", ".txt")}
    names = _complete(folder, files, lambda name, kind: f"{kind}/{name}{endings[kind]}")
    frames = [Frame(name, *(files[kind][name] for kind in files)) for name in names]
    if any((folder / kind).is_dir() for kind in ("label-filt", "instance-filt")):
        frames = [_with_labels(folder, frame) for frame in frames]
    return Layout("ScanNet export", tuple(frames), folder / "intrinsic" / "intrinsic_depth.txt")


def _with_labels(folder: Path, frame: Frame) -> Frame:
    label, instance = (folder / kind / f"{frame.name}.png" for kind in ("label-filt", "instance-filt"))
    for path in (label, instance):
        if not path.is_file():
            raise UserError(
                f"{path}: missing. Labels need label-filt/ and instance-filt/ with a file for every frame; add it, or "
                "remove both folders to train on geometric pseudo-labels"
            )
    return frame._replace(label=label, instance=instance)


def _numbered(folder: Path, ending: str) -> dict[str, Path]:
    """Files with an ending, by the rest of their name."""
    return {path.name[: -len(ending)]: path for path in folder.glob("*" + ending)} if folder.is_dir() else {}


def _complete(folder: Path, files: dict[str, dict[str, Path]], path_of: Callable[[str, str], str]) -> list[str]:
    """Frame names in the order of their numbers, once every frame is known to have a file of every kind."""
    names = sorted(set().union(*files.values()), key=lambda name: (len(name), name))  # 2 before 10
    for name in names:
        for kind, found in files.items():
            if name not in found:
                counts = ", ".join(f"{len(paths)} {kind.split('.')[0]}" for kind, paths in files.items())
                raise UserError(
                    f"{folder / path_of(name, kind)}: missing. The folder has {counts} files, and every frame needs "
                    f"one of each; add the file or remove the others of frame '{name}'"
                )
    return names
