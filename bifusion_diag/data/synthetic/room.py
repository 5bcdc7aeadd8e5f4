"""The layout of a room: walls, what hangs on them, and furniture that does not overlap.

World frame: z up, the floor at z = 0, the room from (0, 0) to its width and depth [m].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bifusion_diag.data.synthetic.furniture import FURNITURE, Piece
from bifusion_diag.data.synthetic.maker import Maker
from bifusion_diag.data.synthetic.solids import Thing


class Recipe(NamedTuple):
    """What a kind of room has: pieces along the walls, pieces in the middle, and small things anywhere."""

    wall: tuple[str, ...]
    middle: tuple[str, ...]
    small: tuple[str, ...]


RECIPES: dict[str, Recipe] = {
    "bedroom": Recipe(
        ("bed", "wardrobe", "nightstand", "dresser", "desk"), ("stool",), ("plant", "boxes", "floor_lamp")
    ),
    "living room": Recipe(
        ("sofa", "tv_stand", "bookshelf", "armchair", "cabinet", "sofa"),
        ("coffee_table",),
        ("plant", "floor_lamp", "stool"),
    ),
    "office": Recipe(
        ("desk", "desk", "bookshelf", "cabinet", "desk"), ("office_chair",), ("trash_can", "boxes", "plant")
    ),
    "kitchen": Recipe(("kitchen_counter", "refrigerator", "cabinet"), ("table",), ("trash_can", "chair", "stool")),
    "bathroom": Recipe(("bathtub", "toilet", "washbasin", "washing_machine"), (), ("trash_can", "stool", "plant")),
    "dining room": Recipe(
        ("cabinet", "bookshelf", "armchair", "dresser"), ("table",), ("plant", "floor_lamp", "chair")
    ),
}

WALL = 0.2  # thickness of walls, floor and ceiling [m]
TRIES = 12  # places that are tried for a piece before it is left out


@dataclass
class Room:
    """A furnished room."""

    kind: str
    width: float  # along x [m]
    depth: float  # along y [m]
    height: float  # [m]
    things: list[Thing] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # floor rectangles x0, y0, x1, y1
    hung: list[tuple[int, float, float]] = field(default_factory=list)  # taken stretches of walls: side, from, to

    def free(self, rectangle: tuple[float, float, float, float]) -> bool:
        """Whether a rectangle of the floor is inside the room and touches no other."""
        x0, y0, x1, y1 = rectangle
        inside = x0 >= 0 and y0 >= 0 and x1 <= self.width and y1 <= self.depth
        return inside and all(x1 <= a or c <= x0 or y1 <= b or d <= y0 for a, b, c, d in self.taken)

    def stretch(self, side: int, width: float, m: Maker) -> float | None:
        """Reserve a stretch of a wall that is free and return its middle; None where a few tries find none."""
        length = _wall_length(self, side)
        for _ in range(TRIES if length > width else 0):
            x = m.size(width / 2, length - width / 2)
            if all(s != side or x + width / 2 <= a or b <= x - width / 2 for s, a, b in self.hung):
                self.hung.append((side, x - width / 2, x + width / 2))
                return x
        return None

    @property
    def light(self) -> np.ndarray:
        """(3,) position of the lamp under the ceiling [m]."""
        return np.array([self.width / 2, self.depth / 2, self.height - 0.2])


def furnish(rng: np.random.Generator) -> Room:
    """Draw a room: its kind, size, surfaces, openings and furniture."""
    m = Maker(rng)
    kind = str(rng.choice(list(RECIPES)))
    small = kind == "bathroom"
    room = Room(
        kind,
        width=m.size(2.4, 3.4) if small else m.size(3.4, 5.4),
        depth=m.size(2.2, 3.0) if small else m.size(3.2, 5.0),
        height=m.size(2.4, 2.9),
    )
    _shell(room, m)
    _openings(room, m)
    recipe = RECIPES[kind]
    for name in recipe.wall:
        _against_wall(room, FURNITURE[name](m), m)
    for name in recipe.middle:
        _in_the_middle(room, FURNITURE[name](m), m)
    for name in recipe.small * 2:
        if rng.random() < 0.6:
            _in_the_middle(room, FURNITURE[name](m), m, spread=0.5)
    return room


def _shell(room: Room, m: Maker) -> None:
    """Walls, floor, ceiling with its light."""
    w, d, h = room.width, room.depth, room.height
    tint = m.color((0.03, 0.3), (0.75, 0.95))
    paint = m.paint(tint)
    if room.kind == "bathroom":
        paint = m.make("tiles", tint, (0.55, 0.55, 0.55), m.size(0.15, 0.3))
    elif m.rng.random() < 0.25:
        paint = m.make("stripes", tint, (tint[0] * 0.88, tint[1] * 0.88, tint[2] * 0.9), m.size(0.1, 0.3))
    wood, tone = m.wood(), m.size(0.4, 0.8)
    grey = (tone, tone, tone * 0.95)
    floors = [
        m.make("planks", wood.first, wood.second, m.size(0.12, 0.2)),
        m.make("fabric", m.color((0.1, 0.5), (0.3, 0.7)), m.color((0.1, 0.4), (0.3, 0.6)), 0.05),
        m.make("tiles", grey, (tone * 0.6,) * 3, m.size(0.3, 0.5)),
        m.make("checks", grey, (tone * 0.5,) * 3, m.size(0.25, 0.4)),
    ]
    ground = floors[2 + m.rng.integers(2) if room.kind in ("bathroom", "kitchen") else m.rng.integers(2)]
    floor = Thing("floor").box((w / 2, d / 2, -WALL), (w + 2 * WALL, d + 2 * WALL, WALL), ground)
    ceiling = Thing("ceiling").box((w / 2, d / 2, h), (w + 2 * WALL, d + 2 * WALL, WALL), m.white())
    walls = Thing("wall")
    for x in (-WALL / 2, w + WALL / 2):
        walls.box((x, d / 2, 0), (WALL, d, h), paint)
    for y in (-WALL / 2, d + WALL / 2):
        walls.box((w / 2, y, 0), (w, WALL, h), paint)
    lamp = Thing("ceiling light").cylinder((w / 2, d / 2, h - 0.1), m.size(0.15, 0.25), 0.1, m.paint((1.0, 1.0, 0.95)))
    room.things += [walls, floor, ceiling, lamp]


def _openings(room: Room, m: Maker) -> None:
    """A door with the floor before it kept free, and windows, pictures and the like on the other walls."""
    sides = [int(side) for side in m.rng.permutation(4)]
    x = room.stretch(sides[0], 1.1, m)
    assert x is not None, "every wall is longer than a door is wide"
    frame, leaf = m.wood(), m.wood() if m.rng.random() < 0.5 else m.white()
    post = Thing("doorframe")
    for side in (-1, 1):
        post.box((side * 0.47, 0.03, 0), (0.07, 0.08, 2.08), frame)
    post.box((0, 0.03, 2.04), (1.01, 0.08, 0.08), frame)
    door = Thing("door").box((0, 0.02, 0), (0.87, 0.05, 2.04), leaf)
    door.box((0.34, 0.06, 1.0), (0.12, 0.05, 0.025), m.metal())
    _hang(room, sides[0], x, [post, door])
    room.taken.append(_rectangle(room, sides[0], x, 1.0, 0.8))
    for side in sides[1 : 1 + m.rng.integers(1, 3)]:
        if (x := room.stretch(side, 2.0, m)) is not None:
            _hang(room, side, x, _window(m, room.height))
    for side in sides[::-1]:
        thing, width = _decoration(room.kind, m)
        if m.rng.random() < 0.75 and (x := room.stretch(side, width, m)) is not None:
            _hang(room, side, x, [thing])


def _window(m: Maker, ceiling: float) -> list[Thing]:
    """A window with a frame, perhaps with curtains at its sides and a radiator below."""
    width, low = m.size(0.9, 1.5), m.size(0.85, 1.0)
    height, frame = min(m.size(1.0, 1.35), ceiling - low - 0.25), m.white()
    window = Thing("window").box(
        (0, 0.015, low), (width, 0.03, height), m.make("glass", (0.5, 0.7, 0.5), (0.8, 0.9, 1.0), 2.5)
    )
    for x in (-width / 2, 0.0, width / 2):
        window.box((x, 0.03, low - 0.03), (0.06, 0.06, height + 0.06), frame)
    for z in (low - 0.05, low + height - 0.01):
        window.box((0, 0.03, z), (width + 0.06, 0.06, 0.06), frame)
    things = [window]
    if m.rng.random() < 0.6:
        cloth = m.make("stripes", m.color(), m.color(), 0.06)
        for side in (-1, 1):
            x = side * (width / 2 + 0.1)
            things.append(Thing("curtain").box((x, 0.1, 0.1), (0.32, 0.07, low + height + 0.05), cloth))
    if m.rng.random() < 0.6:
        ribs = m.make("stripes", (0.9, 0.9, 0.88), (0.65, 0.65, 0.65), 0.05)
        things.append(Thing("radiator").box((0, 0.07, 0.12), (width * 0.8, 0.1, 0.6), ribs))
    return things


def _decoration(kind: str, m: Maker) -> tuple[Thing, float]:
    """Something flat on a wall, and its width [m]."""
    names = ["picture", "picture", "poster", "clock", "mirror", "bulletin board", "light switch"]
    name = str(m.rng.choice([*names, "whiteboard", "whiteboard"] if kind == "office" else names))
    width, height, low = m.size(0.5, 1.0), m.size(0.4, 0.8), m.size(1.25, 1.45)
    thing = Thing(name)
    if name == "clock":
        thing.ellipsoid((0, 0.02, 1.8), (0.3, 0.06, 0.3), m.white())
        return thing.box((0, 0.05, 1.95), (0.015, 0.01, 0.1), m.dark()), 0.3
    if name == "light switch":
        return thing.box((0, 0.01, 1.05), (0.09, 0.025, 0.13), m.white()), 0.09
    if name == "whiteboard":
        width = m.size(1.2, 1.8)
        thing.box((0, 0.015, 0.95), (width, 0.03, 1.0), m.paint((0.93, 0.94, 0.95)))
        return thing.box((0, 0.05, 0.93), (0.8, 0.07, 0.02), m.metal()), width
    face = {
        "picture": m.make("painting", m.color(), m.color(), 0.2),
        "poster": m.make("painting", m.color((0.5, 1.0)), m.color((0.0, 0.2)), 0.12),
        "mirror": m.make("glass", (0.6, 0.7, 0.75), (0.8, 0.85, 0.9), 1.5),
        "bulletin board": m.make("fabric", (0.65, 0.48, 0.3), (0.75, 0.58, 0.4), 0.03),
    }[name]
    if name != "poster":
        thing.box((0, 0.01, low - 0.03), (width + 0.06, 0.025, height + 0.06), m.wood())
    return thing.box((0, 0.02, low), (width, 0.025, height), face), width + 0.06


def _wall_length(room: Room, side: int) -> float:
    return room.width if side % 2 == 0 else room.depth


def _on_wall(room: Room, side: int, along: float, away: float) -> tuple[float, float, float]:
    """x, y and yaw of a thing ``along`` a wall and ``away`` from it [m] that faces the room; sides count from y = 0."""
    w, d = room.width, room.depth
    return (
        (along, away, 0.0),
        (w - away, along, np.pi / 2),
        (w - along, d - away, np.pi),
        (away, d - along, -np.pi / 2),
    )[side]


def _hang(room: Room, side: int, along: float, things: list[Thing]) -> None:
    x, y, yaw = _on_wall(room, side, along, 0.0)
    room.things += [thing.placed(x, y, 0.0, yaw) for thing in things]


def _rectangle(room: Room, side: int, along: float, width: float, depth: float) -> tuple[float, float, float, float]:
    """The floor rectangle of a piece whose back is at a wall."""
    x, y, _ = _on_wall(room, side, along, depth / 2)
    w, d = (width, depth) if side % 2 == 0 else (depth, width)
    return x - w / 2, y - d / 2, x + w / 2, y + d / 2


def _against_wall(room: Room, piece: Piece, m: Maker) -> None:
    """Put a piece with its back to a wall, where there is room for it."""
    for _ in range(TRIES):
        side = int(m.rng.integers(4))
        length = _wall_length(room, side)
        along, gap = m.size(piece.width / 2, max(length - piece.width / 2, piece.width / 2 + 1e-3)), 0.02
        rectangle = _rectangle(room, side, along, piece.width, piece.depth + gap)
        if room.free(rectangle):
            x, y, yaw = _on_wall(room, side, along, piece.depth / 2 + gap)
            room.taken.append(rectangle)
            room.things += [thing.placed(x, y, 0.0, yaw) for thing in piece.things]
            return


def _in_the_middle(room: Room, piece: Piece, m: Maker, spread: float = 0.2) -> None:
    """Put a piece somewhere around the middle; ``spread`` is the share of the room, to each side, it may be at."""
    for _ in range(TRIES):
        x = room.width * m.size(0.5 - spread, 0.5 + spread)
        y = room.depth * m.size(0.5 - spread, 0.5 + spread)
        yaw = float(m.rng.integers(4) * np.pi / 2 + m.rng.normal(0, 0.08))
        cos, sin = abs(np.cos(yaw)), abs(np.sin(yaw))
        w, d = piece.width * cos + piece.depth * sin, piece.width * sin + piece.depth * cos
        rectangle = (x - w / 2, y - d / 2, x + w / 2, y + d / 2)
        if room.free(rectangle):
            room.taken.append(rectangle)
            room.things += [thing.placed(x, y, 0.0, yaw) for thing in piece.things]
            return
