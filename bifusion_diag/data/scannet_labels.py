"""Labels of a ScanNet export: raw ScanNet ids to the 200 classes of the benchmark."""

from __future__ import annotations

from importlib import resources

import numpy as np

from bifusion_diag.data.scannet200 import STUFF_CLASSES

#: ScanNet's raw label id of each of the 200 classes, in their order: what `label-filt` pictures hold (0 = unlabelled).
RAW_IDS: tuple[int, ...] = tuple(
    int(line)
    for line in resources.files("bifusion_diag.data").joinpath("scannet200_raw_ids.txt").read_text("utf-8").splitlines()
)

_CLASS_OF = np.full(max(RAW_IDS) + 2, -1, dtype=np.int64)  # the last entry answers for all larger ids
_CLASS_OF[list(RAW_IDS)] = np.arange(len(RAW_IDS))


def scannet_classes(raw: np.ndarray) -> np.ndarray:
    """Class ids 0..199 of raw ScanNet ids, any shape; -1 for 0 and for ids outside the benchmark's 200."""
    return _CLASS_OF[np.minimum(raw, len(_CLASS_OF) - 1)]


def scannet_instances(raw: np.ndarray, semantic: np.ndarray) -> np.ndarray:
    """(N,) instance ids from 0 without gaps, of ScanNet's (0 = none); -1 for stuff and for unlabelled points."""
    thing = (raw > 0) & (semantic >= 0) & ~np.isin(semantic, STUFF_CLASSES)
    instance = np.full(raw.shape, -1, dtype=np.int64)
    instance[thing] = np.unique(raw[thing], return_inverse=True)[1].reshape(-1)
    return instance
