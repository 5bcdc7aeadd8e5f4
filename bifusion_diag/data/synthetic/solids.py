"""What a synthetic room is made of: simple solids with a material, grouped to labelled objects.

World frame: z up, the floor at z = 0, the room's corner at the origin [m].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

Vector = tuple[float, float, float]
Shape = Literal["box", "cylinder", "ellipsoid"]
SHAPES: tuple[Shape, ...] = ("box", "cylinder", "ellipsoid")


@dataclass(frozen=True)
class Material:
    """A procedural surface; see :mod:`bifusion_diag.data.synthetic.texture` for the kinds."""

    kind: str
    first: Vector  # colours in 0..1
    second: Vector
    scale: float  # size of a tile, stripe, ... [m]
    seed: int  # of its random detail


@dataclass(frozen=True)
class Solid:
    """A box, an upright (elliptic) cylinder, or an ellipsoid."""

    shape: Shape
    centre: Vector  # [m]
    half: Vector  # half of its extent along its own axes [m]
    material: Material
    yaw: float = 0.0  # rotation of its axes about z [rad]


@dataclass
class Thing:
    """One labelled object: a ScanNet200 class and the solids that it consists of."""

    name: str
    solids: list[Solid] = field(default_factory=list)

    def box(self, base: Vector, size: Vector, material: Material) -> Thing:
        """Add a box with the centre of its bottom at ``base``."""
        return self._add("box", base, size, material)

    def cylinder(self, base: Vector, radius: float, height: float, material: Material) -> Thing:
        """Add an upright cylinder with the centre of its bottom at ``base``."""
        return self._add("cylinder", base, (2 * radius, 2 * radius, height), material)

    def ellipsoid(self, base: Vector, size: Vector, material: Material) -> Thing:
        """Add an ellipsoid that touches the ground of its bounding box at ``base``."""
        return self._add("ellipsoid", base, size, material)

    def legs(self, size: tuple[float, float], height: float, thickness: float, material: Material) -> Thing:
        """Add four legs at the corners of a rectangle around the origin."""
        x, y = (side / 2 - thickness for side in size)
        for sx, sy in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            self.box((sx * x, sy * y, 0.0), (thickness, thickness, height), material)
        return self

    def _add(self, shape: Shape, base: Vector, size: Vector, material: Material) -> Thing:
        centre = (base[0], base[1], base[2] + size[2] / 2)
        self.solids.append(Solid(shape, centre, (size[0] / 2, size[1] / 2, size[2] / 2), material))
        return self

    def placed(self, x: float, y: float, z: float, yaw: float) -> Thing:
        """A copy, turned about z by ``yaw`` and then moved."""
        cos, sin = float(np.cos(yaw)), float(np.sin(yaw))

        def move(solid: Solid) -> Solid:
            cx, cy, cz = solid.centre
            centre = (x + cos * cx - sin * cy, y + sin * cx + cos * cy, z + cz)
            return replace(solid, centre=centre, yaw=solid.yaw + yaw)

        return Thing(self.name, [move(solid) for solid in self.solids])
