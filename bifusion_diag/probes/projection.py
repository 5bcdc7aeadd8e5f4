"""What becomes of the points in the cameras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bifusion_diag.errors import UserError, near_matches
from bifusion_diag.probes.base import Call, Schedule
from bifusion_diag.probes.fields import ABSENT, FieldProbe, Key, get_field

SAMPLED_POINTS = 1024
_SAMPLE = f"[m], median over the views of {SAMPLED_POINTS} evenly spaced points; missing where the batch has no"
#: What the projected points are compared with, by the names of the batch's fields.
BATCH = {"captured": "xyz", "augmented": "coords", "pose": "pose", "scene": "scene_index"}


class ProjectionProbe(FieldProbe):
    """Reads ``camera_xyz`` (N, V, 3), ``in_front``, ``inside``, ``visible`` (N, V) and ``valid`` (N,).

    Every point–view pair is one of: nan, inf, behind, outside, occluded, or visible (which is not recorded).

    Where the step was given its batch, and this holds the points as captured and as augmented (N, 3), their scenes (N,)
    and the poses camera-to-world (B, V, 4, 4), the camera coordinates are taken back to the world, and their distance
    from both is measured: what is projected must be what was captured.

    Args:
        batch: where the batch keeps ``captured``, ``augmented``, ``pose`` and ``scene``, if not as in `BATCH`.
        modules, fields, name, every: as for every FieldProbe.

    Raises:
        UserError: `batch` names none of the four.
    """

    prefix = "projection"
    TABLE: ClassVar[dict[str, Key]] = {
        "points": Key("sum", "points N"),
        "nan": Key("sum", "pairs with a NaN camera coordinate"),
        "inf": Key("sum", "pairs with an infinite camera coordinate and no NaN"),
        "behind": Key("sum", "finite pairs not in front of the camera"),
        "outside": Key("sum", "finite pairs in front of the camera, outside the image"),
        "occluded": Key("sum", "finite pairs inside the image at which the depth image disagrees or is blank"),
        "valid": Key("sum", "points visible in some view"),
        "valid_share": Key("mean", "valid ÷ points; missing where there is no point"),
        "off_captured": Key("mean", f"distance of what is projected from the captured point {_SAMPLE} such points"),
        "off_augmented": Key("mean", f"its distance from the augmented point {_SAMPLE} such points"),
    }
    FIELDS = ("camera_xyz", "in_front", "inside", "visible", "valid")

    def __init__(
        self,
        *,
        batch: Mapping[str, str] | None = None,
        modules: Sequence[str] = ("*",),
        fields: Mapping[str, str | int] | None = None,
        name: str | None = None,
        every: int | Schedule | None = None,
    ) -> None:
        super().__init__(modules=modules, fields=fields, name=name, every=every)
        self.batch_fields = {**BATCH, **(batch or {})}
        for field in self.batch_fields:
            if field not in BATCH:
                raise UserError(f"projection reads no field {field!r} of a batch.{near_matches(field, BATCH)}")
        self._truth: _Truth | None = None

    def begin(self) -> None:
        super().begin()
        self._truth = None

    def batch(self, batch: Any) -> None:
        found = {field: get_field(batch, place, ABSENT) for field, place in self.batch_fields.items()}
        self._truth = _truth_of(found)

    def reads(self, output: Any) -> bool:
        return self.has(output, self.FIELDS)

    def seen(self, call: Call) -> None:
        fields = self.fields_of(call, self.FIELDS)
        if fields is None:
            return
        xyz, in_front, inside, visible, valid = (field.detach() for field in fields)
        nan = xyz.isnan().any(-1)
        inf = xyz.isinf().any(-1) & ~nan
        finite = ~(nan | inf)
        points = torch.full((), len(valid), dtype=torch.float64, device=xyz.device)
        pairs = (nan, inf, finite & ~in_front, finite & in_front & ~inside, finite & inside & ~visible)
        seen = valid.sum()
        self.record(tuple(self.TABLE)[:8], [points, *(pair.sum() for pair in pairs), seen, seen / points])
        truth, self._truth = self._truth, None  # of the first call alone: the batch is told once a step
        if truth is not None and truth.points == len(xyz) and truth.pose.shape[1] == xyz.shape[1]:
            self.record(("off_captured", "off_augmented"), truth.distances(xyz))


class _Truth(NamedTuple):
    """A sample of a batch's points: every `stride`-th of N."""

    points: int  # N
    stride: int
    captured: Tensor  # (n, 3) [m]
    augmented: Tensor  # (n, 3) [m]
    pose: Tensor  # (n, V, 4, 4) camera-to-world

    def distances(self, camera_xyz: Tensor) -> list[Tensor]:
        """Median distance of camera coordinates (N, V, 3), taken back to the world, from the captured and from the
        augmented points: () each, NaN where nothing is finite."""
        camera = camera_xyz[:: self.stride].double()
        pose = self.pose.to(camera.device).double()
        world = (pose[..., :3, :3] @ camera[..., None])[..., 0] + pose[..., :3, 3]
        found = []
        for points in (self.captured, self.augmented):
            distance = torch.linalg.vector_norm(world - points.to(camera.device).double()[:, None], dim=-1).flatten()
            found.append(distance.masked_fill(~distance.isfinite(), torch.nan).nanmedian())
        return found


def _truth_of(found: Mapping[str, Any]) -> _Truth | None:
    """The sample, None where a field is missing or has another shape."""
    captured, augmented, pose, scene = (found[field] for field in BATCH)
    if not all(isinstance(field, Tensor) for field in (captured, augmented, pose, scene)):
        return None
    points = (len(captured), 3)
    if not len(captured) or captured.shape != points or augmented.shape != points or scene.shape != points[:1]:
        return None
    if pose.dim() != 4 or pose.shape[-2:] != (4, 4):
        return None
    stride = -(-len(captured) // SAMPLED_POINTS)
    rows = slice(None, None, stride)
    return _Truth(len(captured), stride, captured[rows].detach(), augmented[rows].detach(), pose.detach()[scene[rows]])
