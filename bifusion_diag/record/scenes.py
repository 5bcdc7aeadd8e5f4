"""α on one scene: its images, a sample of its points and the weight of each, at a few moments of a run.

Legend: N points of the scene · K points that are kept · V views · H, W image size [px].
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

MAX_POINTS = 3000  # kept of a scene: as many as a picture of a third of a page's width can tell apart
MAX_VIEWS = 2  # kept of a scene, those that see most points
MAX_SIDE = 480  # of a kept image [px]
MAX_IMAGE_BYTES = 30_000
MAX_SNAPSHOTS = 3
NO_VIEW = 255  # in `ScenePoints.view`: the point is in no image that is kept
_SAMPLE_SEED = 4  # of the points that are kept: the same of the same scene

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SceneView:
    """An image that the scene's points were projected into.

    Attributes:
        image: PNG or JPEG.
        size: width and height of the image [px], no more than MAX_SIDE.
        intrinsics: (3, 3) of that size [px]; None where they were not told.
        pose: (4, 4) camera-to-world [m]; None where it was not told.
    """

    image: bytes
    size: tuple[int, int]
    intrinsics: NDArray[np.float64] | None
    pose: NDArray[np.float64] | None

    @property
    def media_type(self) -> str:
        """For a data address."""
        return "image/png" if self.image.startswith(b"\x89PNG") else "image/jpeg"


@dataclass(frozen=True, eq=False)
class SceneCapture:
    """What of a scene stays the same in all snapshots. Points are in the order in which they are drawn: far ones first.

    Attributes:
        name: of the scene.
        provenance: what it is: "split" (validation, training), "kind" of source, "labels", "flaws"; all may be missing.
        views: the kept images, best first.
        of_views: V.
        of_points: N.
        middle: (3,) about where the points are, in world coordinates [m].
        offsets: (K, 3) of the points from there [m], of float16 precision.
        uv: (K, 2) place in the kept image [px of its size], of float16 precision; a whole number is a pixel's centre.
        view: (K,) uint8 place in `views` of the image that the point is shown in, NO_VIEW: in none of them.
        valid: (K,) bool: the point has a 2D feature.
    """

    name: str
    provenance: Mapping[str, str]
    views: tuple[SceneView, ...]
    of_views: int
    of_points: int
    middle: NDArray[np.float64]
    offsets: Floats
    uv: Floats
    view: NDArray[np.uint8]
    valid: NDArray[np.bool_]

    @property
    def xyz(self) -> NDArray[np.float64]:
        """(K, 3) world coordinates as captured [m]."""
        return self.middle + self.offsets


@dataclass(frozen=True)
class AlphaNumbers:
    """Of all N points of a scene, not only those that are kept. None: there is no such point with a finite α."""

    points: int
    valid: int  # points with a 2D feature
    nonfinite: int  # points whose α is NaN or infinite
    mean_valid: float | None
    mean_invalid: float | None
    std_valid: float | None  # population


@dataclass(frozen=True, eq=False)
class Snapshot:
    """α of a scene at one moment of a run.

    Attributes:
        done: steps that were done: 0 is the untrained model.
        moment: which moment that was, in a few words; a later snapshot of the same moment replaces an earlier one.
        scene: what α was taken of.
        alpha: (K,) of float16 precision, NaN and ±Inf as they were.
        numbers: over all points.
    """

    done: int
    moment: str
    scene: SceneCapture
    alpha: Floats
    numbers: AlphaNumbers


def capture(
    name: str,
    xyz: ArrayLike,
    images: NDArray[np.uint8],
    uv: ArrayLike,
    valid: ArrayLike,
    *,
    view: ArrayLike | None = None,
    inside: ArrayLike | None = None,
    intrinsics: ArrayLike | None = None,
    pose: ArrayLike | None = None,
    image_size: tuple[int, int] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> tuple[SceneCapture, NDArray[np.int64]]:
    """Keep what a snapshot shows of a scene.

    Args:
        name: of the scene.
        xyz: (N, 3) world coordinates as captured [m].
        images: (V, 3, H, W).
        uv: (N, V, 2) pixels in each image.
        valid: (N,) whether a point has a 2D feature.
        view: (N,) the view that the feature of a valid point is from. None: the first.
        inside: (N, V) whether a point is in front of the camera and in the image. None: of a point that is not valid,
            that is not known, and it is shown in no image.
        intrinsics: (V, 3, 3) [px].
        pose: (V, 4, 4) camera-to-world [m].
        image_size: width and height that `uv` and `intrinsics` count in. None: those of `images`.
        provenance: see :class:`SceneCapture`.

    Returns:
        The capture, and which of the N points it keeps (K,), in its order.
    """
    places = np.asarray(xyz, np.float64)
    pixels = np.asarray(uv, np.float64)
    seen = np.asarray(valid, bool)
    points, count = len(places), len(images)
    assert pixels.shape == (points, count, 2), "uv must be (N, V, 2) of N points and V images"
    assert (places.shape, seen.shape) == ((points, 3), (points,)), "xyz must be (N, 3), valid (N,)"
    chosen = np.zeros(points, np.int64) if view is None else np.asarray(view, np.int64)
    known = np.zeros((points, count), bool) if inside is None else np.asarray(inside, bool)
    kept_views = _best_views(seen, chosen, known)
    rows = np.sort(np.random.default_rng(_SAMPLE_SEED).permutation(points)[:MAX_POINTS])
    shown = _shown_in(seen[rows], chosen[rows], known[rows], kept_views)
    width, height = image_size or (images.shape[3], images.shape[2])
    views = []
    for number in kept_views:
        image, size = _encoded(images[number])
        scale = np.array([size[0] / width, size[1] / height])
        matrix = None if intrinsics is None else _scaled(np.asarray(intrinsics, np.float64)[number], scale)
        placed = None if pose is None else np.asarray(pose, np.float64)[number]
        views.append(SceneView(image, size, matrix, placed))
    order = _far_first(places[rows], shown, views)
    rows, shown = rows[order], shown[order]
    at = pixels[rows, np.asarray([*kept_views, 0])[np.minimum(shown, len(kept_views))]]
    scales = np.array([[one.size[0] / width, one.size[1] / height] for one in views] + [[1.0, 1.0]])
    moved = (at + 0.5) * scales[np.minimum(shown, len(kept_views))] - 0.5
    moved = np.where((shown == NO_VIEW)[:, None], 0.0, moved)
    known_places = places[rows][np.isfinite(places[rows]).all(axis=1)]
    middle = np.round(np.median(known_places, axis=0), 3) if len(known_places) else np.zeros(3)
    packed = SceneCapture(
        name,
        dict(provenance or {}),
        tuple(views),
        count,
        points,
        middle,
        half(places[rows] - middle),
        half(moved),
        shown.astype(np.uint8),
        seen[rows],
    )
    return packed, rows


def alpha_numbers(alpha: ArrayLike, valid: ArrayLike) -> AlphaNumbers:
    """What α of all points is on average: alpha (N,), valid (N,)."""
    values, seen = np.asarray(alpha, np.float64), np.asarray(valid, bool)
    finite = np.isfinite(values)
    of_valid, of_others = values[finite & seen], values[finite & ~seen]
    return AlphaNumbers(
        points=len(values),
        valid=int(seen.sum()),
        nonfinite=int((~finite).sum()),
        mean_valid=float(of_valid.mean()) if of_valid.size else None,
        mean_invalid=float(of_others.mean()) if of_others.size else None,
        std_valid=float(of_valid.std()) if of_valid.size else None,
    )


def half(values: ArrayLike) -> Floats:
    """Values as a record keeps them, of float16 precision; what is too large for it is infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float16).astype(np.float32)


def kept(snapshots: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Those of a run that are kept: of a moment the last, and of more than three the first two and the last."""
    last_of = {one.moment: place for place, one in enumerate(snapshots) if one.moment}
    rest = [one for place, one in enumerate(snapshots) if not one.moment or last_of[one.moment] == place]
    rest.sort(key=lambda one: one.done)
    return tuple(rest if len(rest) <= MAX_SNAPSHOTS else [*rest[: MAX_SNAPSHOTS - 1], rest[-1]])


def _best_views(valid: NDArray[np.bool_], view: NDArray[np.int64], inside: NDArray[np.bool_]) -> list[int]:
    """The views that most valid points have their feature from, then those that most points are in."""
    count = inside.shape[1]
    used = np.bincount(view[valid & (view >= 0) & (view < count)], minlength=count)[:count]
    order = sorted(range(count), key=lambda number: (-int(used[number]), -int(inside[:, number].sum()), number))
    return order[:MAX_VIEWS]


def _shown_in(
    valid: NDArray[np.bool_], view: NDArray[np.int64], inside: NDArray[np.bool_], kept_views: Sequence[int]
) -> NDArray[np.int64]:
    """For each point the place in `kept_views` of the image that it is shown in: of a valid one the view that its
    feature is from, of another one the first that it is in."""
    shown = np.full(len(valid), NO_VIEW, np.int64)
    for place, number in reversed(list(enumerate(kept_views))):
        shown[np.where(valid, view == number, inside[:, number])] = place
    return shown


def _scaled(intrinsics: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """K of an image of another size, whose pixel centres are whole numbers: u' = (u + ½)·s − ½."""
    change = np.array([[scale[0], 0, (scale[0] - 1) / 2], [0, scale[1], (scale[1] - 1) / 2], [0, 0, 1]])
    return change @ intrinsics


def _far_first(xyz: NDArray[np.float64], shown: NDArray[np.int64], views: Sequence[SceneView]) -> NDArray[np.int64]:
    """The order of drawing, so that near points hide far ones: by depth in the view that they are shown in, where that
    is known."""
    depth = np.zeros(len(xyz))
    for place, one in enumerate(views):
        rows = shown == place
        if one.pose is not None and np.isfinite(one.pose).all():
            depth[rows] = (xyz[rows] - one.pose[:3, 3]) @ one.pose[:3, 2]
    return np.argsort(-np.nan_to_num(depth, nan=0.0), kind="stable")


def _encoded(image: NDArray[np.uint8]) -> tuple[bytes, tuple[int, int]]:
    """An image (3, H, W) as a PNG or JPEG of at most MAX_IMAGE_BYTES, and its size."""
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    side = min(MAX_SIDE, max(picture.size))
    while True:
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        small = picture.resize(size, Image.Resampling.LANCZOS) if size != picture.size else picture
        for kind, quality in (("PNG", 0), ("JPEG", 85), ("JPEG", 65)):
            buffer = io.BytesIO()
            small.save(buffer, kind, quality=quality, optimize=True)
            if buffer.tell() <= MAX_IMAGE_BYTES:
                return buffer.getvalue(), size
        side = int(side * 0.75)
