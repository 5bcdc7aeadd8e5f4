"""Snapshots of α as JSON: lines of a .record folder while a run lasts, a part of run.json at its end."""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifusion_diag.record import codec
from bifusion_diag.record.scenes import (
    MAX_IMAGE_BYTES,
    MAX_POINTS,
    MAX_SIDE,
    AlphaNumbers,
    SceneCapture,
    SceneView,
    Snapshot,
    kept,
)

SCENES_FILE = "scenes.jsonl"
MAX_BYTES = 300_000  # of all snapshots in run.json


def snapshots_to(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """Snapshots as JSON: a scene that several share is there once. Where they are too large, those between are not."""
    chosen = list(snapshots)
    while True:
        scenes: dict[str, dict[str, Any]] = {}
        moments = [_moment_to(one, scenes) for one in chosen]
        names = list(scenes)
        for moment in moments:
            moment["scene"] = names.index(moment["scene"])
        document = {"scenes": list(scenes.values()), "moments": moments}
        if len(chosen) <= 2 or len(codec.dumps(document)) <= MAX_BYTES:
            return document
        del chosen[len(chosen) // 2]


def snapshots_from(document: Mapping[str, Any]) -> tuple[Snapshot, ...]:
    """The inverse of :func:`snapshots_to`.

    Raises:
        KeyError, TypeError, ValueError, IndexError: the document does not follow the schema.
    """
    scenes = [_scene_from(scene) for scene in document["scenes"]]
    return tuple(_moment_from(moment, scenes[moment["scene"]]) for moment in document["moments"])


def snapshot_line(snapshot: Snapshot) -> bytes:
    """A snapshot as its line of scenes.jsonl, whole in itself."""
    scenes: dict[str, dict[str, Any]] = {}
    moment = _moment_to(snapshot, scenes)
    moment["scene"] = next(iter(scenes.values()))
    return (codec.dumps(moment) + "\n").encode("utf-8")


def resume_line(step: int) -> bytes:
    """What a run that goes on from a step adds: snapshots of a later one are void."""
    return (codec.dumps({"resumed": step}) + "\n").encode("utf-8")


def read_snapshots(folder: Path) -> tuple[Snapshot, ...]:
    """The snapshots of a .record folder; a line that was cut off is left out, and so are those that a resume voids."""
    found: list[Snapshot] = []
    try:
        lines = (folder / SCENES_FILE).read_bytes().splitlines()
    except OSError:  # there are none
        return ()
    for line in lines:
        try:
            document = codec.loads(line.decode("utf-8"))
            if "resumed" in document:
                found = [one for one in found if one.done <= document["resumed"]]
            else:
                found.append(_moment_from(document, _scene_from(document["scene"])))
        except (ValueError, KeyError, TypeError, IndexError):
            continue
    return kept(found)


def _pack(values: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode("ascii")


def _unpack(text: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    size = int(np.dtype(kind).itemsize) * math.prod(shape)
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)  # no more than expected
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != size:
        raise ValueError(f"{len(raw)} bytes where {size} were expected")
    return np.frombuffer(raw, kind).reshape(shape)


def _scene_to(scene: SceneCapture) -> dict[str, Any]:
    return {
        "name": scene.name,
        "provenance": dict(scene.provenance),
        "views": [
            {
                "image": base64.b64encode(view.image).decode("ascii"),
                "size": list(view.size),
                "intrinsics": _matrix_to(view.intrinsics),
                "pose": _matrix_to(view.pose),
            }
            for view in scene.views
        ],
        "of_views": scene.of_views,
        "of_points": scene.of_points,
        "count": len(scene.xyz),
        "middle": scene.middle.tolist(),
        "offsets": _pack(scene.offsets.astype("<f2")),
        "uv": _pack(scene.uv.astype("<f2")),
        "view": _pack(scene.view),
        "valid": _pack(np.packbits(scene.valid)),
    }


def _scene_from(document: Mapping[str, Any]) -> SceneCapture:
    count = int(document["count"])
    if not 0 <= count <= MAX_POINTS:
        raise ValueError(f"a scene of {count} points")
    bits = _unpack(document["valid"], "u1", ((count + 7) // 8,))
    return SceneCapture(
        name=str(document["name"]),
        provenance={str(key): str(value) for key, value in document["provenance"].items()},
        views=tuple(_view_from(view) for view in document["views"]),
        of_views=int(document["of_views"]),
        of_points=int(document["of_points"]),
        middle=np.asarray(codec.decode(document["middle"]), np.float64).reshape(3),
        offsets=_unpack(document["offsets"], "<f2", (count, 3)).astype(np.float32),
        uv=_unpack(document["uv"], "<f2", (count, 2)).astype(np.float32),
        view=_unpack(document["view"], "u1", (count,)),
        valid=np.unpackbits(bits)[:count].astype(bool),
    )


def _view_from(document: Mapping[str, Any]) -> SceneView:
    image = base64.b64decode(document["image"], validate=True)
    width, height = map(int, document["size"])
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and len(image) <= MAX_IMAGE_BYTES):
        raise ValueError(f"an image of {width} × {height} px in {len(image)} bytes")
    return SceneView(image, (width, height), _matrix_from(document["intrinsics"], 3), _matrix_from(document["pose"], 4))


def _moment_to(snapshot: Snapshot, scenes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A snapshot whose scene is named by its digest, under which it is added to the others."""
    scene = _scene_to(snapshot.scene)
    digest = hashlib.sha256(codec.dumps(codec.encode(scene)).encode()).hexdigest()
    scenes[digest] = codec.encode(scene)
    numbers = snapshot.numbers
    return {
        "done": snapshot.done,
        "moment": snapshot.moment,
        "scene": digest,
        "alpha": _pack(snapshot.alpha.astype("<f2")),
        "points": numbers.points,
        "valid": numbers.valid,
        "nonfinite": numbers.nonfinite,
        "mean_valid": numbers.mean_valid,
        "mean_invalid": numbers.mean_invalid,
        "std_valid": numbers.std_valid,
    }


def _moment_from(document: Mapping[str, Any], scene: SceneCapture) -> Snapshot:
    counts = [int(document[key]) for key in ("points", "valid", "nonfinite")]
    means = [
        None if document[key] is None else float(document[key]) for key in ("mean_valid", "mean_invalid", "std_valid")
    ]
    alpha = _unpack(document["alpha"], "<f2", (len(scene.xyz),)).astype(np.float32)
    return Snapshot(int(document["done"]), str(document["moment"]), scene, alpha, AlphaNumbers(*counts, *means))


def _matrix_to(matrix: NDArray[np.float64] | None) -> list[list[float]] | None:
    return None if matrix is None else [[float(value) for value in row] for row in matrix]


def _matrix_from(document: Any, size: int) -> NDArray[np.float64] | None:
    if document is None:
        return None
    matrix = np.asarray(codec.decode(document), np.float64)
    if matrix.shape != (size, size):
        raise ValueError(f"a matrix of shape {matrix.shape} where {size} × {size} was expected")
    return matrix
