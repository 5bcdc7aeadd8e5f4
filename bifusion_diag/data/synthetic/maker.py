"""Random materials and sizes for the builders of furniture."""

from __future__ import annotations

import colorsys

import numpy as np

from bifusion_diag.data.synthetic.solids import Material, Vector


class Maker:
    """Draws materials and sizes for the builders."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def size(self, low: float, high: float) -> float:
        """A length in [low, high) [m]."""
        return float(self.rng.uniform(low, high))

    def color(self, saturation: tuple[float, float] = (0.15, 0.7), value: tuple[float, float] = (0.3, 0.9)) -> Vector:
        """A random colour in 0..1."""
        return colorsys.hsv_to_rgb(self.rng.random(), self.rng.uniform(*saturation), self.rng.uniform(*value))

    def make(self, kind: str, first: Vector, second: Vector, scale: float) -> Material:
        """A material with random detail."""
        return Material(kind, first, second, scale, int(self.rng.integers(1 << 30)))

    def paint(self, first: Vector | None = None) -> Material:
        """One colour, by default a random one."""
        color = first or self.color()
        return self.make("plain", color, color, 0.3)

    def wood(self) -> Material:
        """Light or dark wood."""
        tone = self.rng.uniform(0.3, 1.0)
        first = (0.75 * tone + 0.1, 0.55 * tone + 0.06, 0.35 * tone + 0.03)
        return self.make("wood", first, (first[0] * 0.72, first[1] * 0.68, first[2] * 0.6), self.size(0.03, 0.08))

    def fabric(self) -> Material:
        """Speckled, striped or checked cloth."""
        first = self.color((0.2, 0.8))
        kind = str(self.rng.choice(["fabric", "fabric", "stripes", "checks"]))
        second = (first[0] * 0.7, first[1] * 0.7, first[2] * 0.75) if kind == "fabric" else self.color((0.1, 0.5))
        return self.make(kind, first, second, self.size(0.06, 0.14))

    def metal(self) -> Material:
        """Grey, dark or bright."""
        tone = self.size(0.15, 0.75)
        return self.paint((tone, tone, tone * 1.03))

    def white(self) -> Material:
        """Enamel and plastic."""
        tone = self.size(0.82, 0.95)
        return self.paint((tone, tone, tone * 0.98))

    def dark(self) -> Material:
        """Screens and rubber."""
        return self.paint((0.06, 0.06, 0.08))
