"""Reading a whole folder of RGB-D frames once before a run: a bad file should end it now, not at step 4000."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bifusion_diag.data.rgbd_files import (
    read_color,
    read_depth,
    read_ids,
    read_intrinsics,
    read_pose,
    read_superpoints,
)
from bifusion_diag.data.rgbd_layouts import Frame, Layout
from bifusion_diag.data.scannet_labels import scannet_classes
from bifusion_diag.errors import UserError

_THREADS = 4  # Pillow decodes outside the interpreter lock
_STRETCH = 0.03  # largest difference of two sides' ratios: ScanNet's 1296×968 colour goes with 640×480 depth


class Survey(NamedTuple):
    """What is known of a folder after reading it.

    Attributes:
        size: width and height of the depth images [px].
        intrinsics: (3, 3) of the depth camera [px].
        tracked: (F,) bool, frames with a finite pose.
        sensed: (F,) bool, frames with a depth reading.
    """

    size: tuple[int, int]
    intrinsics: np.ndarray
    tracked: np.ndarray
    sensed: np.ndarray


class _Facts(NamedTuple):
    color_size: tuple[int, int]
    depth_size: tuple[int, int]
    tracked: bool
    sensed: bool
    labelled: bool
    known: bool
    masked: bool


def survey(layout: Layout) -> Survey:
    """Read every file of the frames.

    Raises:
        UserError: a file that cannot be read or does not fit the others, no depth in any frame, or labels that are not
            ScanNet's.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        facts = list(pool.map(_inspect, layout.frames))
    _same_size([frame.color for frame in layout.frames], [fact.color_size for fact in facts], "colour")
    _same_size([frame.depth for frame in layout.frames], [fact.depth_size for fact in facts], "depth")
    if not any(fact.sensed for fact in facts):
        raise UserError(f"{layout.frames[0].depth}: no frame of its folder has a depth reading (all 0 or 65535)")
    if any(fact.labelled for fact in facts) and not any(fact.known for fact in facts):
        raise UserError(
            f"{layout.frames[0].label}: no id in any label picture of its folder is that of a ScanNet200 class. "
            "Expected are ScanNet's raw ids (column 'id' of scannetv2-labels.combined.tsv): export label-filt again, "
            "or remove label-filt/ and instance-filt/ to train on geometric pseudo-labels"
        )
    if layout.frames[0].mask is not None and not any(fact.masked for fact in facts):
        raise UserError(
            f"{layout.frames[0].mask}: no picture of its folder has a mask (all are 0). Ids start at 1; export the "
            "masks again, or use data.superpoints=vccs"
        )
    size = facts[0].depth_size
    tracked, sensed = np.array([fact.tracked for fact in facts]), np.array([fact.sensed for fact in facts])
    return Survey(size, read_intrinsics(layout.intrinsics, size), tracked, sensed)


def _inspect(frame: Frame) -> _Facts:
    color, depth = read_color(frame.color), read_depth(frame.depth)
    tracked = bool(np.isfinite(read_pose(frame.pose)).all())
    labelled = known = False
    if frame.label is not None and frame.instance is not None:
        label, instance = read_ids(frame.label), read_ids(frame.instance)
        if label.shape != instance.shape:
            raise UserError(
                f"{frame.instance}: {instance.shape[1]}×{instance.shape[0]} px, but the labels in {frame.label} have "
                f"{label.shape[1]}×{label.shape[0]} px"
            )
        labelled, known = bool(label.any()), bool((scannet_classes(label) >= 0).any())
    masked = False
    if frame.mask is not None:
        masks = read_ids(frame.mask)
        _same_shape(frame.mask, masks, color, depth)
        masked = bool(masks.any())
    if frame.superpoint is not None:
        _same_shape(frame.superpoint, read_superpoints(frame.superpoint), color, depth)
    return _Facts(_size(color), _size(depth), tracked, bool(depth.any()), labelled, known, masked)


def _same_shape(path: Path, ids: np.ndarray, color: np.ndarray, depth: np.ndarray) -> None:
    """Ids may have any resolution, but must show what the frame shows."""
    (width, height), color_size, depth_size = _size(ids), _size(color), _size(depth)
    if all(abs(width * h / (height * w) - 1) > _STRETCH for w, h in (color_size, depth_size)):
        raise UserError(
            f"{path}: {width}×{height} px is no enlargement or reduction of the frame, whose colour image has "
            f"{color_size[0]}×{color_size[1]} px and whose depth image has {depth_size[0]}×{depth_size[1]} px; export "
            "it at the size of one of them"
        )


def _size(image: np.ndarray) -> tuple[int, int]:
    return image.shape[1], image.shape[0]


def _same_size(paths: Sequence[object], sizes: Sequence[tuple[int, int]], what: str) -> None:
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(
                f"{path}: {size[0]}×{size[1]} px, but the {what} image {paths[0]} has {sizes[0][0]}×{sizes[0][1]} px; "
                f"all {what} images of a folder must have one size"
            )
