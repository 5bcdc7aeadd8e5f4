"""Raw ScanNet ids, against rows of the benchmark's own table (scannetv2-labels.combined.tsv: id, raw_category)."""

from __future__ import annotations

import numpy as np
import pytest

from bifusion_diag.data.scannet200 import CLASS_NAMES, class_id
from bifusion_diag.data.scannet_labels import RAW_IDS, scannet_classes, scannet_instances


@pytest.mark.parametrize(("raw", "name"), [(1, "wall"), (2, "chair"), (3, "floor"), (22, "book"), (1163, "object")])
def test_known_rows(raw: int, name: str) -> None:
    assert scannet_classes(np.array([raw])).tolist() == [class_id(name)]


def test_every_class_has_one_raw_id() -> None:
    assert len(set(RAW_IDS)) == len(RAW_IDS) == len(CLASS_NAMES)
    assert scannet_classes(np.array(RAW_IDS)).tolist() == list(range(200))


def test_other_ids_are_unlabelled() -> None:
    assert scannet_classes(np.array([[0, 1356], [1357, 65535]])).tolist() == [[-1, -1], [-1, -1]]


def test_instances_are_things_only_and_without_gaps() -> None:
    semantic = np.array(
        [class_id("wall"), class_id("chair"), class_id("chair"), -1, class_id("table"), class_id("table")]
    )
    assert scannet_instances(np.array([3, 9, 9, 5, 4, 0]), semantic).tolist() == [-1, 1, 1, -1, 0, -1]
