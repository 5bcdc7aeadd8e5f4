"""What there is to learn in the synthetic rooms, how far superpoints can go, and what building a scene costs.

    python -m benchmarks.synthetic_data [--rooms 64] [--seed 0] [--frames FOLDER] [--json out.json]

Purity is the share of points whose own label is the commonest one of their superpoint: what a method that labels whole
superpoints can reach at best. The parts of the cost are shares of the building time under Python's profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path
from typing import Any

import numpy as np

from bifusion_diag.config.settings import DataSettings
from bifusion_diag.data.rgbd import RGBDFolder
from bifusion_diag.data.scene import Scene
from bifusion_diag.data.source import SceneSource
from bifusion_diag.data.synthetic import SyntheticRooms

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (("vccs", {}), ("masks", {"superpoints": "masks"}))
#: Steps of building a scene that do not contain each other.
PARTS = (
    "furnish",
    "walk",
    "render",
    "sense_depth",
    "graph_masks",
    "vccs",
    "relabel_by_masks",
    "read_color",
    "read_depth",
    "estimate_normals",
    "pseudo_labels",
)
PROFILED = 4


def purity(superpoint: np.ndarray, label: np.ndarray) -> float:
    """Share of the labelled points (label ≥ 0) that have the commonest label of their superpoint."""
    labelled = label >= 0
    label = label[labelled]
    keys, count = np.unique(superpoint[labelled] * (label.max() + 1) + label, return_counts=True)
    commonest = np.zeros(superpoint.max() + 1, dtype=np.int64)
    np.maximum.at(commonest, keys // (label.max() + 1), count)
    return float(commonest.sum() / len(label))


def content(scenes: list[Scene]) -> dict[str, float]:
    """Labels of the scenes, whatever their superpoints."""
    semantic = np.concatenate([scene.semantic for scene in scenes])
    instances = [len(np.unique(scene.instance[scene.instance >= 0])) for scene in scenes]
    in_scene = [len(np.unique(scene.semantic[scene.semantic >= 0])) for scene in scenes]
    objects = {number for scene in scenes for number in np.unique(scene.semantic[scene.instance >= 0])}
    return {
        "classes": len(np.unique(semantic[semantic >= 0])),
        "classes of objects": len(objects),
        "classes a scene": float(np.mean(in_scene)),
        "instances a scene": float(np.mean(instances)),
        "fewest instances": min(instances),
        "most instances": max(instances),
        "unlabelled points": float((semantic < 0).mean()),
        "points of objects": float(np.mean([(scene.instance >= 0).mean() for scene in scenes])),
    }


def grouping(scenes: list[Scene]) -> dict[str, float]:
    """Number and purity of the superpoints; a stuff class counts as one instance."""
    rows = []
    for scene in scenes:
        things = np.where(scene.instance >= 0, scene.instance + 200, scene.semantic)
        semantic, instance = purity(scene.superpoint, scene.semantic), purity(scene.superpoint, things)
        rows.append((scene.superpoint.max() + 1, semantic, instance))
    count, semantic, instance = np.mean(rows, axis=0)
    return {"superpoints a scene": count, "semantic purity": semantic, "instance purity": instance}


def built(source: SceneSource, count: int) -> tuple[list[Scene], float]:
    """The first scenes, and the seconds that one took."""
    began = time.perf_counter()
    scenes = [source[index] for index in range(count)]
    return scenes, (time.perf_counter() - began) / count


def parts(source: SceneSource) -> dict[str, float]:
    """Share of each part in building some scenes."""
    profile = cProfile.Profile()
    profile.enable()
    for index in range(min(PROFILED, len(source))):
        source[index]
    profile.disable()
    stats = pstats.Stats(profile)
    spent = {name: cumulative for (_, _, name), (_, _, _, cumulative, _) in stats.stats.items() if name in PARTS}  # type: ignore[attr-defined]
    return {name: spent[name] / stats.total_tt for name in PARTS if name in spent}  # type: ignore[attr-defined]


def main() -> None:
    """Build and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"rooms": arguments.rooms, "seed": arguments.seed}
    for method, options in METHODS:
        settings = DataSettings(scenes=arguments.rooms, **options)
        scenes, seconds = built(SyntheticRooms(settings, arguments.seed), arguments.rooms)
        if "content" not in results:
            results["content"] = content(scenes)
        results[method] = grouping(scenes) | {"seconds a scene": seconds}
        results[f"{method}: parts"] = parts(SyntheticRooms(settings, arguments.seed))
        if arguments.frames:
            results[f"{method}: parts of a real frame"] = parts(RGBDFolder(arguments.frames, DataSettings(**options)))
    for title, table in results.items():
        print(title if isinstance(table, dict) else f"{title} {table}")
        for name, value in table.items() if isinstance(table, dict) else ():
            print(f"  {name:<22}{value:>9}" if isinstance(value, int) else f"  {name:<22}{value:>9.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
