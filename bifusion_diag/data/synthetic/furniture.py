"""Builders of furniture.

Every builder returns things in a frame of its own: the origin on the floor under the middle of the piece, x along its
width, y towards its front (away from a wall behind it), z up [m]. What stands on a piece comes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from bifusion_diag.data.synthetic.fittings import clutter, cupboard, table_lamp, table_top
from bifusion_diag.data.synthetic.maker import Maker
from bifusion_diag.data.synthetic.solids import Thing


class Piece(NamedTuple):
    """A piece of furniture with what stands on it."""

    things: list[Thing]
    width: float  # along x [m]
    depth: float  # along y [m]


def bed(m: Maker) -> Piece:
    """Head at the wall; mattress, blanket and one or two pillows."""
    width, length, height = m.size(0.95, 1.9), m.size(1.95, 2.1), m.size(0.25, 0.4)
    frame = Thing("bed").box((0, 0, 0), (width, length, height), m.wood())
    frame.box((0, -length / 2 + 0.04, 0), (width, 0.08, m.size(0.8, 1.1)), m.wood())
    frame.box((0, 0.04, height), (width - 0.06, length - 0.12, 0.18), m.white())
    top = height + 0.18
    cover = Thing("blanket").box((0, length * 0.16, top - 0.12), (width + 0.02, length * 0.62, 0.16), m.fabric())
    pillows = 2 if width > 1.3 else 1
    cloth = m.fabric()
    things = [frame, cover]
    for k in range(pillows):
        x = (k - (pillows - 1) / 2) * width / 2
        things.append(Thing("pillow").ellipsoid((x, -length / 2 + 0.32, top - 0.03), (0.62, 0.4, 0.2), cloth))
    return Piece(things, width, length)


def sofa(m: Maker) -> Piece:
    """A couch for two or three with a cushion or two."""
    width, depth, cloth = m.size(1.5, 2.3), m.size(0.8, 0.95), m.fabric()
    couch = Thing("couch").box((0, 0, 0.06), (width, depth, 0.36), cloth)
    couch.box((0, -depth / 2 + 0.12, 0.4), (width, 0.24, m.size(0.38, 0.5)), cloth)
    for side in (-1, 1):
        couch.box((side * (width / 2 - 0.1), 0, 0.06), (0.2, depth, 0.56), cloth)
    things = [couch]
    for side in (-1, 1)[: m.rng.integers(0, 3)]:
        cushion = Thing("cushion").ellipsoid((0, 0, 0), (0.42, 0.2, 0.4), m.fabric())
        things.append(cushion.placed(side * width * 0.3, -depth / 2 + 0.33, 0.4, m.size(-0.3, 0.3)))
    return Piece(things, width, depth)


def armchair(m: Maker) -> Piece:
    """A sofa for one."""
    width, depth, cloth = m.size(0.75, 0.95), m.size(0.75, 0.9), m.fabric()
    seat = Thing("armchair").box((0, 0, 0.08), (width, depth, 0.34), cloth)
    seat.box((0, -depth / 2 + 0.1, 0.4), (width, 0.2, m.size(0.4, 0.55)), cloth)
    for side in (-1, 1):
        seat.box((side * (width / 2 - 0.08), 0, 0.08), (0.16, depth, 0.52), cloth)
    return Piece([seat], width, depth)


def chair(m: Maker) -> Piece:
    """Four legs, a seat and a back."""
    side, seat, material = m.size(0.4, 0.48), m.size(0.42, 0.48), m.wood()
    thing = Thing("chair").legs((side, side), seat, 0.045, material)
    thing.box((0, 0, seat), (side, side, 0.04), m.fabric() if m.rng.random() < 0.5 else material)
    thing.box((0, -side / 2 + 0.02, seat + m.size(0.04, 0.2)), (side, 0.035, m.size(0.28, 0.42)), material)
    return Piece([thing], side, side)


def office_chair(m: Maker) -> Piece:
    """On a column and a star of castors."""
    cloth, metal = m.fabric(), m.dark()
    thing = Thing("office chair").cylinder((0, 0, 0.05), 0.03, 0.4, metal)
    thing.box((0, 0, 0.03), (0.56, 0.06, 0.05), metal).box((0, 0, 0.03), (0.06, 0.56, 0.05), metal)
    thing.box((0, 0, 0.45), (0.48, 0.48, 0.08), cloth).box((0, -0.23, 0.58), (0.44, 0.06, m.size(0.4, 0.6)), cloth)
    for side in (-1, 1):
        thing.box((side * 0.26, 0, 0.64), (0.05, 0.3, 0.03), metal)
    return Piece([thing], 0.6, 0.6)


def table(m: Maker) -> Piece:
    """A table with clutter and chairs on two sides."""
    width, depth, height = m.size(1.1, 1.7), m.size(0.75, 0.95), m.size(0.72, 0.77)
    name = str(m.rng.choice(["table", "dining table"]))
    things = [table_top(m, name, width, depth, height), *clutter(m, width, depth, height, int(m.rng.integers(1, 5)))]
    seat = chair(m).things[0]
    for side in (-1, 1):
        for x in (-width / 4, width / 4):
            if m.rng.random() < 0.7:
                yaw = (0.0 if side < 0 else np.pi) + m.size(-0.25, 0.25)
                things.append(seat.placed(x, side * (depth / 2 + m.size(0.05, 0.25)), 0, yaw))
    return Piece(things, width, depth + 1.0)


def coffee_table(m: Maker) -> Piece:
    """Low, with clutter."""
    width, depth, height = m.size(0.8, 1.2), m.size(0.5, 0.7), m.size(0.36, 0.45)
    things = [table_top(m, "coffee table", width, depth, height)]
    return Piece(things + clutter(m, width, depth, height, int(m.rng.integers(0, 3))), width, depth)


def desk(m: Maker) -> Piece:
    """With a monitor and keyboard, or a laptop, and an office chair before it."""
    width, depth, height = m.size(1.2, 1.7), m.size(0.65, 0.8), m.size(0.72, 0.77)
    things = [table_top(m, "desk", width, depth, height)]
    if m.rng.random() < 0.7:
        screen = Thing("monitor").cylinder((0, 0, 0), 0.11, 0.015, m.dark()).box((0, 0, 0), (0.05, 0.04, 0.2), m.dark())
        screen.box((0, 0.03, 0.12), (0.56, 0.04, 0.34), m.dark())
        screen.box((0, 0.052, 0.135), (0.53, 0.005, 0.31), m.make("painting", m.color(), m.color(), 0.15))
        board = Thing("keyboard").box(
            (0, 0, 0), (0.44, 0.14, 0.025), m.make("keys", (0.1, 0.1, 0.1), (0.5,) * 3, 0.025)
        )
        mouse = Thing("mouse").ellipsoid((0, 0, 0), (0.07, 0.11, 0.05), m.dark())
        things += [screen.placed(0, -depth * 0.25, height, 0.0), board.placed(0, depth * 0.2, height, 0.0)]
        things.append(mouse.placed(0.32, depth * 0.2, height, 0.0))
    else:
        base, screen_tone = m.metal(), m.make("painting", m.color(), m.color(), 0.12)
        laptop = Thing("laptop").box((0, 0, 0), (0.34, 0.24, 0.02), base)
        laptop.box((0, -0.12, 0.02), (0.34, 0.015, 0.22), base).box((0, -0.11, 0.03), (0.31, 0.006, 0.19), screen_tone)
        things.append(laptop.placed(0, 0, height, 0.0))
    if m.rng.random() < 0.6:
        things.append(table_lamp(m).placed(-width * 0.4, -depth * 0.25, height, 0.0))
    seat = office_chair(m).things[0]
    things.append(seat.placed(m.size(-0.15, 0.15), depth / 2 + 0.3, 0, np.pi + m.size(-0.6, 0.6)))
    reach = 0.7  # of the chair
    return Piece([thing.placed(0, -reach / 2, 0, 0.0) for thing in things], width, depth + reach)


def floor_lamp(m: Maker) -> Piece:
    """As tall as a man."""
    thing = Thing("lamp").cylinder((0, 0, 0), 0.14, 0.03, m.metal()).cylinder((0, 0, 0), 0.015, 1.5, m.metal())
    return Piece([thing.cylinder((0, 0, 1.4), 0.19, 0.28, m.paint(m.color((0.1, 0.5), (0.85, 1.0))))], 0.4, 0.4)


def bookshelf(m: Maker) -> Piece:
    """Open shelves with rows of books."""
    width, depth, height, wood = m.size(0.7, 1.2), m.size(0.28, 0.36), m.size(1.3, 2.0), m.wood()
    levels = int(height / 0.36)
    step = (height - 0.06) / levels
    case = Thing("bookshelf").box((0, -depth / 2 + 0.01, 0), (width, 0.02, height), wood)
    for side in (-1, 1):
        case.box((side * (width / 2 - 0.015), 0, 0), (0.03, depth, height), wood)
    for k in range(levels + 1):
        case.box((0, 0, 0.03 + k * step), (width - 0.06, depth, 0.025), wood)
    things = [case]
    for k in range(levels):
        if m.rng.random() < 0.75:
            share = m.size(0.4, 0.95)
            row = m.make("books", (0, 0, 0), (0, 0, 0), m.size(0.025, 0.045))
            x = -(1 - share) * (width - 0.08) / 2
            size = ((width - 0.08) * share, depth * 0.7, step * m.size(0.6, 0.8))
            things.append(Thing("book").box((x, -0.02, 0.055 + k * step), size, row))
    return Piece(things, width, depth)


def wardrobe(m: Maker) -> Piece:
    """Tall, two or three doors."""
    width, depth = m.size(0.9, 1.6), m.size(0.5, 0.62)
    columns = 2 if width < 1.25 else 3
    return Piece([cupboard(m, "wardrobe", width, depth, m.size(1.8, 2.15), columns, 1)], width, depth)


def dresser(m: Maker) -> Piece:
    """Drawers, with clutter on top."""
    width, depth, height = m.size(0.8, 1.3), m.size(0.42, 0.5), m.size(0.75, 1.0)
    thing = cupboard(m, "dresser", width, depth, height, 2 if width > 1 else 1, int(m.rng.integers(3, 5)))
    return Piece([thing, *clutter(m, width, depth, height, int(m.rng.integers(0, 4)))], width, depth)


def nightstand(m: Maker) -> Piece:
    """With a lamp."""
    width, height = m.size(0.4, 0.5), m.size(0.45, 0.6)
    return Piece(
        [cupboard(m, "nightstand", width, 0.4, height, 1, 2), table_lamp(m).placed(0, -0.05, height, 0.0)], width, 0.4
    )


def cabinet(m: Maker) -> Piece:
    """Half height or a file cabinet."""
    if m.rng.random() < 0.4:
        return Piece(
            [cupboard(m, "file cabinet", 0.46, 0.6, m.size(0.7, 1.35), 1, int(m.rng.integers(2, 5)))], 0.46, 0.6
        )
    width, height = m.size(0.8, 1.4), m.size(0.8, 1.3)
    thing = cupboard(m, "cabinet", width, 0.45, height, 2, 1)
    return Piece([thing, *clutter(m, width, 0.45, height, int(m.rng.integers(0, 3)))], width, 0.45)


def tv_stand(m: Maker) -> Piece:
    """A low cupboard with a television."""
    width, height = m.size(1.2, 1.8), m.size(0.4, 0.55)
    tv = Thing("tv").box((0, 0, 0), (0.4, 0.2, 0.02), m.dark()).box((0, 0, 0), (0.06, 0.05, 0.12), m.dark())
    tv.box((0, 0, 0.08), (1.05, 0.05, 0.62), m.dark())
    return Piece([cupboard(m, "tv stand", width, 0.42, height, 3, 1), tv.placed(0, -0.02, height, 0.0)], width, 0.42)


def kitchen_counter(m: Maker) -> Piece:
    """Base cabinets with a top, a sink and a stove, wall cabinets above, perhaps a microwave."""
    width, depth = m.size(1.8, 2.6), 0.62
    base = cupboard(m, "kitchen cabinet", width, depth - 0.02, 0.86, 4, 1)
    top = Thing("counter").box(
        (0, 0, 0.86), (width + 0.02, depth + 0.02, 0.04), m.make("fabric", (0.3,) * 3, (0.5,) * 3, 0.04)
    )
    upper = cupboard(m, "kitchen cabinet", width * 0.8, 0.35, 0.65, 3, 1).placed(
        -width * 0.1, -depth / 2 + 0.17, 1.45, 0.0
    )
    sink = (
        Thing("sink").box((0, 0, 0), (0.55, 0.42, 0.015), m.metal()).box((0, 0, 0.005), (0.48, 0.34, 0.014), m.dark())
    )
    sink.cylinder((0, -0.2, 0), 0.015, 0.25, m.metal()).box((0, -0.12, 0.24), (0.025, 0.18, 0.025), m.metal())
    stove = Thing("stove").box((0, 0, 0), (0.56, 0.5, 0.012), m.dark())
    for x in (-0.13, 0.13):
        for y in (-0.11, 0.11):
            stove.cylinder((x, y, 0.01), 0.08, 0.01, m.metal())
    things = [base, top, upper, sink.placed(-width * 0.27, 0, 0.9, 0.0), stove.placed(width * 0.27, 0, 0.9, 0.0)]
    if m.rng.random() < 0.6:
        oven = Thing("microwave").box((0, 0, 0), (0.48, 0.34, 0.27), m.metal())
        things.append(oven.box((-0.05, 0.17, 0.03), (0.33, 0.02, 0.2), m.dark()).placed(0.02, -0.1, 0.9, 0.0))
    return Piece(things, width, depth)


def refrigerator(m: Maker) -> Piece:
    """Two doors, one above the other."""
    width, height, paint = m.size(0.6, 0.8), m.size(1.6, 1.9), m.white() if m.rng.random() < 0.6 else m.metal()
    thing = Thing("refrigerator").box((0, 0, 0), (width, 0.62, height), paint)
    for z, h in ((0.05, height * 0.6), (height * 0.6 + 0.07, height * 0.4 - 0.09)):
        thing.box((0, 0.32, z), (width - 0.02, 0.06, h), paint)
        thing.box((-width * 0.4, 0.37, z + h * 0.3), (0.025, 0.04, h * 0.4), m.metal())
    return Piece([thing], width, 0.7)


def toilet(m: Maker) -> Piece:
    """Bowl and tank."""
    white = m.white()
    thing = Thing("toilet").box((0, -0.24, 0.36), (0.4, 0.18, 0.4), white).box((0, -0.05, 0), (0.22, 0.45, 0.3), white)
    thing.ellipsoid((0, 0.06, 0.12), (0.4, 0.56, 0.34), white).cylinder((0, 0.06, 0.38), 0.2, 0.045, white)
    return Piece([thing], 0.45, 0.7)


def bathtub(m: Maker) -> Piece:
    """Rim of four walls around a low bottom."""
    length, width, height, white = m.size(1.5, 1.75), m.size(0.7, 0.8), m.size(0.5, 0.6), m.white()
    thing = Thing("bathtub").box((0, 0, 0), (length, width, 0.15), white)
    for side in (-1, 1):
        thing.box((side * (length / 2 - 0.05), 0, 0), (0.1, width, height), white)
        thing.box((0, side * (width / 2 - 0.04), 0), (length, 0.08, height), white)
    return Piece([thing], length, width)


def washbasin(m: Maker) -> Piece:
    """A basin on a cupboard, with a mirror above it."""
    width, height = m.size(0.6, 0.95), 0.8
    thing = Thing("sink").box((0, 0, 0), (width, 0.46, 0.1), m.white())
    thing.cylinder((0, 0.02, 0.09), 0.17, 0.014, m.metal()).cylinder((0, -0.18, 0.1), 0.015, 0.16, m.metal())
    mirror = Thing("mirror").box(
        (0, -0.22, 1.15), (width, 0.03, 0.75), m.make("glass", (0.6, 0.7, 0.75), (0.8, 0.85, 0.9), 1.5)
    )
    return Piece(
        [cupboard(m, "bathroom vanity", width, 0.44, height, 2, 1), thing.placed(0, 0, height, 0.0), mirror],
        width,
        0.48,
    )


def washing_machine(m: Maker) -> Piece:
    """A white cube with a porthole in front."""
    thing = Thing("washing machine").box((0, 0, 0), (0.6, 0.58, 0.85), m.white())
    return Piece([thing.ellipsoid((0, 0.29, 0.2), (0.38, 0.06, 0.38), m.dark())], 0.6, 0.62)


def plant(m: Maker) -> Piece:
    """A pot with foliage of several clumps."""
    green = m.make("fabric", (0.1, m.size(0.3, 0.5), 0.1), (0.25, m.size(0.55, 0.7), 0.2), 0.06)
    height = m.size(0.25, 0.4)
    thing = Thing("plant").cylinder((0, 0, 0), m.size(0.12, 0.18), height, m.paint())
    thing.cylinder((0, 0, height), 0.02, 0.3, m.wood())
    for _ in range(5):
        x, y = m.rng.normal(0, 0.1, 2)
        side = m.size(0.22, 0.4)
        thing.ellipsoid((float(x), float(y), height + m.size(0.05, 0.5)), (side, side, m.size(0.25, 0.4)), green)
    return Piece([thing], 0.45, 0.45)


def trash_can(m: Maker) -> Piece:
    """An open cylinder with a dark mouth."""
    radius, height = m.size(0.12, 0.19), m.size(0.28, 0.5)
    thing = Thing("trash can").cylinder((0, 0, 0), radius, height, m.paint())
    return Piece([thing.cylinder((0, 0, height - 0.01), radius * 0.9, 0.012, m.dark())], 2 * radius, 2 * radius)


def stool(m: Maker) -> Piece:
    """Round or padded."""
    if m.rng.random() < 0.5:
        side = m.size(0.4, 0.6)
        return Piece([Thing("ottoman").box((0, 0, 0), (side, side, m.size(0.35, 0.45)), m.fabric())], side, side)
    thing = Thing("stool").legs((0.32, 0.32), 0.45, 0.035, m.wood()).cylinder((0, 0, 0.45), 0.18, 0.04, m.fabric())
    return Piece([thing], 0.4, 0.4)


def boxes(m: Maker) -> Piece:
    """One cardboard box, or two on each other, or a suitcase."""
    card = m.make("plain", (0.7, 0.52, 0.33), (0.6, 0.45, 0.28), 0.1)
    side, height = m.size(0.35, 0.55), m.size(0.25, 0.4)
    if m.rng.random() < 0.3:
        case = Thing("suitcase").box((0, 0, 0.04), (0.45, 0.26, 0.62), m.paint())
        return Piece([case.box((0, -0.08, 0.66), (0.2, 0.02, 0.3), m.metal())], 0.5, 0.3)
    things = [Thing("box").box((0, 0, 0), (side, side * 0.8, height), card)]
    if m.rng.random() < 0.5:
        small = Thing("box").box((0, 0, 0), (side * 0.7, side * 0.6, height * 0.7), card)
        things.append(small.placed(0, 0, height, m.size(-0.4, 0.4)))
    return Piece(things, side, side)


#: Every piece of furniture by the name that the room recipes use.
FURNITURE: dict[str, Callable[[Maker], Piece]] = {
    build.__name__: build
    for build in (
        bed, sofa, armchair, chair, office_chair, table, coffee_table, desk, floor_lamp, bookshelf, wardrobe, dresser,
        nightstand, cabinet, tv_stand, kitchen_counter, refrigerator, toilet, bathtub, washbasin, washing_machine,
        plant, trash_can, stool, boxes,
    )
}  # fmt: skip
