"""What stands in front of a drawn face: a hand, a scarf or a bar."""

from __future__ import annotations

import math

import numpy as np

from facefast.data.drawn.canvas import WHOLE, Array, Canvas, Point, above, coarse, linear, step
from facefast.data.drawn.persona import Identity, Shot, mix

BLUSH = (0.80, 0.33, 0.28)


def occlude(c: Canvas, who: Identity, shot: Shot, reach: Array) -> None:
    """Paints the hand, the scarf or the bar in front of the face; `reach` is 1 on the outline of the head."""
    side, level, lean = shot.occluder_place
    colour = linear(shot.occluder_colour)
    if shot.occluder == "hand":
        for k, further in enumerate((0.0, -4.0, -3.0, 3.0)):
            tip = (side * (12 + further), 20 + 16 * level + k * 9.0)
            _finger(c, who, tip, (side * 62, tip[1] + 26 - 2.0 * k + 30 * lean), 4.9 - 0.25 * k)
        _finger(c, who, (side * 54, 58 + 16 * level), (side * 84, 94 + 16 * level), 20.0)
    elif shot.occluder == "scarf":
        at = c.head_window(-66, 36, 66, 140)
        x, y = c.x[at], c.y[at]
        wave = coarse(y * 12 + 0.12 * x * x)
        over = 52 + 12 * level + 0.004 * np.square(x - 10 * lean) - y
        alpha = c.edge(np.maximum(over, np.abs(x) - 60 + 0.1 * above(70 - y)), 1.5)
        c.darken(at, 0.3 * step(5, 0, over) * step(1.0, 0.95, reach[at]))
        c.paint(at, alpha, colour * (0.85 + 0.15 * wave))
        c.raise_to(at, alpha, 30 - 0.012 * x * x + 1.5 * wave)
        c.polish(at, alpha, 0.0)
    elif shot.occluder == "bar":
        wide = 8 + 4 * level
        across = (c.x - 30 * side) * math.cos(lean) + c.y * math.sin(lean)
        alpha = c.edge(np.maximum(np.abs(across) - wide, 30 + 40 * level - c.y), 1.5)
        c.paint(WHOLE, alpha, colour)
        c.raise_to(WHOLE, alpha, 40 + 0.9 * np.sqrt(above(wide * wide - across * across, 1)))
        c.polish(WHOLE, alpha, 0.12)


def _finger(c: Canvas, who: Identity, tip: Point, root: Point, thick: float) -> None:
    """A round stick of the person's skin."""
    room = thick + 6
    left, right = min(tip[0], root[0]) - room, max(tip[0], root[0]) + room
    at = c.head_window(left, tip[1] - room, right, root[1] + room)
    dx, dy = root[0] - tip[0], root[1] - tip[1]
    px, py = c.x[at] - tip[0], c.y[at] - tip[1]
    along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clip(0, 1)
    off = np.sqrt(np.square(px - along * dx) + np.square(py - along * dy)) - thick
    c.darken(at, 0.35 * step(4, 0, off))
    alpha = c.edge(off, 1.5)
    c.paint(at, alpha, linear(mix(who.skin, BLUSH, 0.10)))
    round_ = np.sqrt(above(thick * thick - np.square(off + thick), 0.5))
    c.raise_to(at, alpha, 44 + round_)
    c.polish(at, alpha, 0.05)
