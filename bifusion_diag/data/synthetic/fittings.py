"""Parts that several pieces of furniture share: cupboards, table tops, lamps and small things on tops."""

from __future__ import annotations

from bifusion_diag.data.synthetic.maker import Maker
from bifusion_diag.data.synthetic.solids import Thing


def cupboard(m: Maker, name: str, width: float, depth: float, height: float, columns: int, rows: int) -> Thing:
    """A case with doors or drawers that stand out a little, each with a handle."""
    body, front, handle = m.wood() if m.rng.random() < 0.6 else m.white(), m.wood(), m.metal()
    front = body if m.rng.random() < 0.6 else front
    thing = Thing(name).box((0, 0, 0), (width, depth - 0.02, height), body)
    w, h = width / columns, (height - 0.08) / rows
    for i in range(columns):
        for j in range(rows):
            x, z = (i + 0.5) * w - width / 2, 0.06 + j * h
            thing.box((x, depth / 2 - 0.01, z), (w - 0.02, 0.03, h - 0.02), front)
            tall = h > 0.5
            size = (0.02, 0.03, 0.14) if tall else (0.14, 0.03, 0.02)
            thing.box((x + (w * 0.35 if tall else 0), depth / 2 + 0.02, z + h / 2 - size[2] / 2), size, handle)
    return thing


def table_top(m: Maker, name: str, width: float, depth: float, height: float) -> Thing:
    material = m.wood() if m.rng.random() < 0.75 else m.white()
    thing = Thing(name).legs((width, depth), height - 0.035, 0.055, material if m.rng.random() < 0.5 else m.metal())
    return thing.box((0, 0, height - 0.035), (width, depth, 0.035), material)


def clutter(m: Maker, width: float, depth: float, height: float, count: int) -> list[Thing]:
    """Small things on a top: they may touch but hardly overlap, as each has its own stretch of the width."""
    things = []
    for k in range(count):
        x = ((k + 0.5) / count - 0.5) * width * 0.85
        y, kind = m.size(-0.25, 0.25) * depth, m.rng.integers(5)
        if kind == 0:
            thing = Thing("book").box((0, 0, 0), (0.17, 0.24, m.size(0.02, 0.06)), m.paint())
        elif kind == 1:
            thing = Thing("cup").cylinder((0, 0, 0), 0.045, 0.1, m.paint())
        elif kind == 2:
            thing = (
                Thing("bottle").cylinder((0, 0, 0), 0.035, 0.2, m.paint()).cylinder((0, 0, 0.2), 0.015, 0.07, m.dark())
            )
        elif kind == 3:
            thing = Thing("bowl").ellipsoid((0, 0, 0), (0.24, 0.24, 0.1), m.paint())
        else:
            thing = Thing("box").box((0, 0, 0), (m.size(0.1, 0.2), m.size(0.1, 0.2), m.size(0.08, 0.18)), m.paint())
        things.append(thing.placed(x, y, height, m.size(-0.6, 0.6)))
    return things


def table_lamp(m: Maker) -> Thing:
    shade = m.paint(m.color((0.1, 0.4), (0.85, 1.0)))
    return (
        Thing("lamp")
        .cylinder((0, 0, 0), 0.08, 0.02, m.metal())
        .cylinder((0, 0, 0), 0.012, 0.3, m.metal())
        .cylinder((0, 0, 0.28), 0.12, 0.17, shade)
    )
