"""Points to measure on: real depth frames, or surfaces of rooms that are drawn at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bifusion_diag.data.geometry import unproject_depth
from bifusion_diag.data.rgbd_files import read_depth, read_intrinsics, read_pose
from bifusion_diag.data.rgbd_layouts import find_layout
from bifusion_diag.errors import UserError

POINTS_PER_SYNTHETIC_FRAME = 250_000
FURNITURE_PER_ROOM = 12
NOISE = 0.004  # [m], of the synthetic points


def frame_points(folder: Path, count: int) -> list[Tensor]:
    """(N_i, 3) [m] world coordinates of every depth reading of each of ``count`` frames spread evenly over a folder."""
    layout = find_layout(folder)
    if len(layout.frames) < count:
        raise UserError(f"{folder} has {len(layout.frames)} frames; {count} are needed")
    points = []
    for frame in layout.frames[:: len(layout.frames) // count][:count]:
        depth = read_depth(frame.depth)
        intrinsics = read_intrinsics(layout.intrinsics, (depth.shape[1], depth.shape[0]))
        arrays = (array.astype(np.float32)[None] for array in (depth, intrinsics, read_pose(frame.pose)))
        world = unproject_depth(*(torch.from_numpy(array) for array in arrays))[0]
        points.append(world[torch.from_numpy(depth > 0)])
    return points


def synthetic_frames(count: int) -> list[Tensor]:
    """``count`` corners of a room, as large as what a depth frame sees."""
    return [
        room_points(POINTS_PER_SYNTHETIC_FRAME, (2.5, 2.5, 2.0), torch.Generator().manual_seed(index))
        for index in range(count)
    ]


def room_points(count: int, size: tuple[float, float, float], generator: torch.Generator) -> Tensor:
    """(count, 3) [m] points on the floor and the four walls of a room and on boxes in it, evenly by area."""
    width, depth, height = size
    boxes = [(torch.tensor([0.0, 0.0, 0.0]), torch.tensor(size))]
    for _ in range(max(1, round(FURNITURE_PER_ROOM * width * depth / 41))):  # 41 m²: a room of 6.4 m by 6.4 m
        draw = torch.rand(6, generator=generator)
        extent = torch.tensor([0.4, 0.4, 0.4]) + draw[:3] * torch.tensor([1.2, 1.2, min(1.4, height - 0.5)])
        boxes.append((draw[3:] * torch.tensor([max(width - 1.6, 0.1), max(depth - 1.6, 0.1), 0.0]), extent))
    faces = [
        (corner, extent, axis, side)
        for index, (corner, extent) in enumerate(boxes)
        for axis in range(3)
        for side in (0, 1)
        if not (axis == 2 and side == (1 if index == 0 else 0))  # no ceiling, and no box seen from below
    ]
    areas = torch.stack([extent.prod() / extent[axis] for _, extent, axis, _ in faces])
    face = torch.multinomial(areas, count, replacement=True, generator=generator)
    points = torch.rand(count, 3, generator=generator)
    points[torch.arange(count), torch.tensor([axis for _, _, axis, _ in faces])[face]] = torch.tensor(
        [float(side) for *_, side in faces]
    )[face]
    points = torch.stack([c for c, *_ in faces])[face] + points * torch.stack([e for _, e, *_ in faces])[face]
    return points + NOISE * torch.randn(count, 3, generator=generator)


def joined(scenes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Points (N, 3) of all scenes, and the scene of each (N,) int64."""
    return torch.cat(scenes), torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(s) for s in scenes]))
