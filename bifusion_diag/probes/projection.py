"""What becomes of the points in the cameras."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from bifusion_diag.probes.base import Call
from bifusion_diag.probes.fields import FieldProbe, Key


class ProjectionProbe(FieldProbe):
    """Reads ``camera_xyz`` (N, V, 3), ``in_front``, ``inside``, ``visible`` (N, V) and ``valid`` (N,).

    Every point–view pair is one of: nan, inf, behind, outside, occluded, or visible (which is not recorded).
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
    }
    FIELDS = ("camera_xyz", "in_front", "inside", "visible", "valid")

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
        self.record(tuple(self.TABLE), [points, *(pair.sum() for pair in pairs), seen, seen / points])
