"""Reading one file of an RGB-D frame. Whatever is wrong with it is a UserError that begins with the file's path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from bifusion_diag.errors import UserError

_NO_READING = 65535  # some Kinect captures write this instead of 0
_MILLIMETRE = np.float32(0.001)
_RIGID = 0.02  # largest deviation of R Rᵀ from the identity; trackers that accumulate float32 drift by 1e-3
_FARTHEST = 1e6  # [m] a camera beyond it leaves float32 coordinates no centimetres


def read_color(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 picture; if `size` (width, height) is given and differs, resized to it."""
    image = _open(path).convert("RGB")
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def read_depth(path: Path) -> np.ndarray:
    """(H, W) float32 [m]; 0 where there is no reading (0 or 65535 in the file, which holds 16-bit millimetres)."""
    raw = np.asarray(_sixteen_bit(path))
    return np.where(raw == _NO_READING, 0, raw).astype(np.float32) * _MILLIMETRE


def read_ids(path: Path) -> np.ndarray:
    """(H, W) int64 label or instance ids of an 8- or 16-bit picture; 0 means none."""
    image = _open(path)
    if image.mode not in ("L", "P") and not image.mode.startswith("I"):
        raise UserError(
            f"{path}: ids must be an 8- or 16-bit PNG of one channel, this one has mode '{image.mode}'; save the ids "
            "themselves, not a coloured picture of them"
        )
    return np.asarray(image).astype(np.int64)


def read_superpoints(path: Path) -> np.ndarray:
    """(H, W) int64 superpoint ids, negative = none: of a PNG its ids less 1 (0 means none), of an NPY as they are."""
    if path.suffix != ".npy":
        return read_ids(path) - 1
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: the array cannot be read (truncated or damaged?): {error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.size == 0:
        found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "an archive of several arrays"
        raise UserError(f"{path}: superpoints must be integers (H, W), an id for each pixel, this file has {found}")
    return np.asarray(ids, dtype=np.int64)


def read_pose(path: Path) -> np.ndarray:
    """(4, 4) float64 camera-to-world [m]. Non-finite numbers pass: that is how captures mark lost tracking."""
    numbers = _numbers(path)
    if len(numbers) != 16:
        raise UserError(f"{path}: a pose is a 4×4 matrix (16 numbers), this file has {len(numbers)} numbers")
    pose = numbers.reshape(4, 4)
    if np.isfinite(pose).all() and not _is_rigid(pose):
        raise UserError(
            f"{path}: not a camera-to-world pose [R t; 0 0 0 1] with a rotation R and a position t in metres, got "
            f"{pose.round(4).tolist()}. Transpose a column-major matrix, take scale out of R, or, where tracking was "
            "lost, write 16 times -inf"
        )
    return pose


def _is_rigid(pose: np.ndarray) -> bool:
    """Whether a finite (4, 4) matrix is a rotation and a translation, as the projection takes it to be."""
    deviation = np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max()
    last_row = np.allclose(pose[3], [0, 0, 0, 1], atol=1e-6)
    return bool(last_row and deviation < _RIGID and np.abs(pose[:3, 3]).max() < _FARTHEST)


def read_intrinsics(path: Path, size: tuple[int, int]) -> np.ndarray:
    """(3, 3) float64 K [px] for depth images of `size` (width, height)."""
    numbers = _numbers(path)
    if len(numbers) not in (9, 16):
        raise UserError(f"{path}: intrinsics are a 3×3 or 4×4 matrix, this file has {len(numbers)} numbers")
    side = 3 if len(numbers) == 9 else 4
    matrix = numbers.reshape(side, side)[:3, :3]
    if not np.isfinite(matrix).all() or min(matrix[0, 0], matrix[1, 1]) <= 0:
        raise UserError(f"{path}: focal lengths must be positive and all numbers finite, got {matrix.tolist()}")
    width, height = size
    if not (0 < matrix[0, 2] < width and 0 < matrix[1, 2] < height):
        raise UserError(
            f"{path}: the principal point ({matrix[0, 2]:g}, {matrix[1, 2]:g}) lies outside the depth images of "
            f"{width}×{height} px; these are the intrinsics of another size. Give those of the depth images"
        )
    return matrix


def _numbers(path: Path) -> np.ndarray:
    """All numbers of a text file, in order."""
    try:
        words = path.read_text(encoding="utf-8").replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error
    if not words:
        raise UserError(f"{path}: the file is empty; it should hold a matrix of numbers")
    try:
        return np.array([float(word) for word in words])
    except ValueError as error:
        raise UserError(f"{path}: it should hold nothing but numbers: {error}") from error


def _open(path: Path) -> Image.Image:
    """A fully decoded image, so that a truncated file is found here."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises for broken files
        raise UserError(f"{path}: the image cannot be read (truncated or damaged?): {error}") from error


def _sixteen_bit(path: Path) -> Image.Image:
    image = _open(path)
    if not image.mode.startswith("I"):
        raise UserError(
            f"{path}: depth must be a 16-bit PNG of one channel in millimetres, this one has mode '{image.mode}' "
            "(8 bit or colour)"
        )
    return image
