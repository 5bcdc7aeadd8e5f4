"""2D masks: one integer picture a frame that says which segment each pixel belongs to, 0 where it is in none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bifusion_diag.config.settings import DataSettings, GraphMaskSettings

GRAPH = "graph"  # the value of ``data.masks`` that stands for :func:`graph_masks`


def graph_masks(image: np.ndarray, settings: GraphMaskSettings) -> np.ndarray:
    """Segment a colour image by its graph of neighbouring pixels; needs no weights.

    Args:
        image: (H, W, 3) uint8.
        settings: of the segmentation.

    Returns:
        (H, W) int64 segments from 1; every pixel is in one.

    Source:
        Felzenszwalb and Huttenlocher, Efficient graph-based image segmentation, IJCV 2004, as in scikit-image.
    """
    from skimage.segmentation import felzenszwalb  # only runs with masks of this kind wait for its import

    segments = felzenszwalb(image, scale=settings.scale, sigma=settings.sigma, min_size=settings.min_size)
    return segments.astype(np.int64) + 1


def ids_at_pixels(
    pictures: Sequence[np.ndarray], frame: np.ndarray, row: np.ndarray, column: np.ndarray, *, height: int, width: int
) -> np.ndarray:
    """Look up the id of each point's pixel, the nearest one where a picture has another size than the points' frame.

    Args:
        pictures: of each frame, (H', W') int64 ids.
        frame: (N,) index of each point's frame.
        row: (N,) pixel in the frame of ``height`` × ``width`` px.
        column: (N,) likewise.
        height: of the frames that rows and columns count in.
        width: likewise.

    Returns:
        (N,) int64.
    """
    ids = np.zeros(len(frame), dtype=np.int64)
    for number, picture in enumerate(pictures):
        here = frame == number
        y = ((row[here] + 0.5) * picture.shape[0] / height).astype(int)
        x = ((column[here] + 0.5) * picture.shape[1] / width).astype(int)
        ids[here] = picture[y, x]
    return ids


def describe_clusters(data: DataSettings) -> str:
    """How VCCS clusters a source's points, which pseudo-labels rest on too."""
    return f"VCCS (seeds {data.superpoint_size:g} m apart, voxels of {data.superpoint_voxel:g} m)"


def describe_superpoints(data: DataSettings) -> str:
    """How the superpoints of a source are made, for the run record."""
    clusters = describe_clusters(data)
    if data.superpoints == "vccs":
        return clusters
    if data.superpoints == "files":
        return f"files in superpoints/, {clusters} where these have no id"
    if data.masks != GRAPH:
        return f"{clusters} relabelled by the masks in {data.masks}"
    graph = data.graph_masks
    how = f"scale {graph.scale:g}, sigma {graph.sigma:g}, min_size {graph.min_size}"
    return f"{clusters} relabelled by graph-based segmentation of the colour images ({how})"
