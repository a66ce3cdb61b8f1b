"""Paints one drawn face: `draw(who, shot)` turns an `Identity` and a `Shot` into pixels and five landmarks."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from facefast.data.drawn.canvas import (
    HEIGHT,
    WIDTH,
    Array,
    Canvas,
    Point,
    above,
    bell,
    coarse,
    fine,
    linear,
    record,
    step,
)
from facefast.data.drawn.occluders import BLUSH, occlude
from facefast.data.drawn.persona import Identity, Shot, mix

_RADII = (66.0, 60.2, 49.4, 44.6, 48.5, 58.5, 63.0)  # the mean outline every 30 degrees, chin to crown
_OUTLINE_Y = 6.0  # its middle
_TO_POLYNOMIAL = np.linalg.inv(np.vander(np.cos(np.arange(7) * math.pi / 6), increasing=True))
_TIP_RISE = 9.0  # how far the tip of the nose stands off the face
_INK = (0.10, 0.06, 0.06)
_WHITE = (1.0, 1.0, 1.0)


class Portrait:
    """One person in one shot: each method paints one part, and `paint` calls them back to front."""

    def __init__(self, who: Identity, shot: Shot) -> None:
        self.who, self.shot = who, shot
        self.canvas = c = Canvas(shot)
        self.skin, self.hair = linear(who.skin), linear(who.hair)
        self.smile = max(shot.smile, 0.0)
        # The head's outline in polar form: a polynomial in the cosine of the angle from the chin.
        extra = (who.chin, who.chin_side, who.jaw, who.cheek, who.temple, who.forehead, who.crown)
        jaw_drop = np.array((0.7, 0.4, 0, 0, 0, 0, 0)) * shot.mouth_open
        factors = _TO_POLYNOMIAL @ (np.array(_RADII) + extra + jaw_drop)
        down = c.y - _OUTLINE_Y
        self.radius: Array = np.sqrt(c.x * c.x + down * down) + 1e-3
        self.downward: Array = down / self.radius  # 1 towards the chin, -1 towards the crown
        self.outline: Array = np.full_like(self.radius, factors[-1])
        for factor in factors[-2::-1].tolist():
            self.outline *= self.downward
            self.outline += factor
        self.reach: Array = self.radius / self.outline  # 1 on the outline
        self.strands = self._strands()

    def paint(self) -> NDArray[np.uint8]:
        """The finished picture, uint8 [H, W, 3]."""
        for part in (
            self._background,
            self._hair_behind,
            self._body,
            self._ears,
            self._head,
            self._complexion,
            self._nose,
            self._beard,
            self._mouth,
            self._eyes,
            self._brows,
            self._hair_front,
            self._glasses,
            self._hat,
        ):
            part()
        occlude(self.canvas, self.who, self.shot, self.reach)
        return record(self.canvas.lit(self.shot, step(1.2, 0.95, self.reach)), self.shot)

    def landmarks(self) -> Array:
        """Left eye, right eye, nose, left and right mouth corner as seen, float32 [5, 2] in pixels."""
        who, project = self.who, self.canvas.project
        half, rise = self._mouth_corner()
        level = who.mouth_level - rise
        points = (
            project(-who.eye_gap, who.eye_level),
            project(who.eye_gap, who.eye_level),
            project(0.0, who.nose_length - 3, _TIP_RISE),
            project(-half, level),
            project(half, level),
        )
        return np.array(points, np.float32)

    def _mouth_corner(self) -> Point:
        """Half the mouth's width, and how far its corners stand above its middle line."""
        lift = 3.6 * self.shot.smile + self.who.mouth_curve
        return self.who.mouth_width * (1 + 0.14 * self.shot.smile), 0.65 * lift

    def _strands(self) -> Array:
        """Hair texture in about [-1, 1]: lines that leave the parting, waved by the hair's curl."""
        across, down = self.canvas.x - self.shot.hair_part, self.canvas.y + 96
        reach = np.sqrt(across * across + down * down)
        place = across / reach * 150
        if self.who.hair_curl > 0.05:
            place += (9 * self.who.hair_curl) * np.sin(reach * 0.17 + place * 0.035)
        return 0.55 * fine(place) + 0.6 * coarse(place * 3 + reach * 0.9)

    def _background(self) -> None:
        """Soft colour fields with a few hard-edged things in them."""
        c, rng = self.canvas, np.random.Generator(np.random.Philox(self.shot.clutter_seed))
        knots = rng.uniform(0.03, 0.8, (1, 4, 4)) + rng.uniform(-0.2, 0.2, (3, 1, 4))
        knots = np.square(knots.clip(0.02, 0.95)).astype(np.float32)
        c.albedo[:] = np.matmul(np.matmul(_UP_ROWS, knots), _UP_COLUMNS)
        px = np.arange(WIDTH, dtype=np.float32)[None, :]
        py = np.arange(HEIGHT, dtype=np.float32)[:, None]
        for _ in range(int(rng.poisson(1.6))):
            x, y, lean = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(-1.6, 1.6)
            wide, tall, soft = rng.uniform(4, 30), rng.uniform(20, 90), float(rng.uniform(1, 8))
            tone = linear(tuple((rng.uniform(0.1, 0.9) + rng.uniform(-0.15, 0.15, 3)).clip(0, 1)))
            reach = math.hypot(wide, tall) + soft
            at = (
                slice(max(int(y - reach), 0), int(y + reach) + 1),
                slice(max(int(x - reach), 0), int(x + reach) + 1),
            )
            cos, sin = math.cos(lean), math.sin(lean)
            dx, dy = px[:, at[1]] - np.float32(x), py[at[0]] - np.float32(y)
            off = np.maximum(np.abs(dx * cos + dy * sin) - wide, np.abs(dy * cos - dx * sin) - tall)
            c.paint(at, c.edge(off, soft) * float(rng.uniform(0.4, 0.9)), tone)

    def _hair_behind(self) -> None:
        """Long hair that falls behind the neck."""
        who, shot, c = self.who, self.shot, self.canvas
        if shot.hair_length < 12 or who.is_bald:
            return
        at = c.head_window(-74, -40, 74, min(shot.hair_length + 32, 130))
        x, y = c.x[at], c.y[at]
        n = self.strands[at]
        side = np.abs(x)
        wide = 44 + who.cheek + who.hair_side + 0.3 * shot.hair_volume + 9 * step(0, 70, y)
        off = side - wide - (1.5 + 2.5 * who.hair_curl) * n
        np.maximum(off, y - shot.hair_length - 20 - 4 * n, out=off)
        np.maximum(off, side + above(-0.45 * (y + 5)) - wide, out=off)
        alpha = c.edge(off, 2.5)
        c.paint(at, alpha, self.hair * ((0.62 + 0.35 * n) * (1 - 0.5 * step(48, 24, side))))
        c.raise_to(at, alpha, 9 - 0.004 * x * x + 0.9 * n)
        c.polish(at, alpha, 0.10)

    def _body(self) -> None:
        """Neck and shoulders."""
        who, shot, c = self.who, self.shot, self.canvas
        at = c.head_window(-130, 25, 130, 140)
        x, y = c.x[at] + 6 * c.turn[0], c.y[at]
        side = np.abs(x)
        wide = who.neck + 0.006 * np.square(above(y - 60))
        neck = c.edge(side - wide, 1.5)
        c.paint(at, neck, self.skin * 0.86)
        c.raise_to(at, neck, 16 * np.sqrt(above(1.05 - np.square(side / wide), 0.1)) - 6)
        c.polish(at, neck, 0.05)
        c.darken(at, 0.6 * step(1.32, 0.98, self.reach[at]) * neck)
        top = 85 + 0.12 * side + 0.0026 * side * side + 11 * bell(side, 19)
        cloth = c.edge(top - y, 1.5)
        folds = 0.08 * coarse(side * 8 + y * 5)
        c.darken(at, 0.3 * step(5, 0, top - y) * neck)
        c.paint(at, cloth, linear(shot.cloth) * (0.9 + folds))
        c.raise_to(at, cloth, 8 - 0.0012 * x * x + 12 * folds)
        c.polish(at, cloth, 0.0)

    def _ears(self) -> None:
        """Both ears; the one that the head turns towards us shows more."""
        who, c = self.who, self.canvas
        rosy = linear(mix(who.skin, BLUSH, 0.16))
        rx, ry = 7.0 * who.ear_size, 13.5 * who.ear_size
        for side in (-1.0, 1.0):
            x = side * (43.5 + who.cheek + who.ear_out - side * 13 * c.turn[0])
            y = 6.0 - 9 * c.turn[1]
            at = c.head_window(x - rx - 5, y - ry - 3, x + rx + 5, y + ry + 3)
            lean = (c.x[at] - x) * side + 0.22 * (c.y[at] - y)
            far = np.sqrt(np.square(lean / rx) + np.square((c.y[at] - y) / ry))
            alpha = c.edge((far - 1) * rx)
            c.paint(at, alpha, rosy * (0.92 - 0.4 * bell(far - 0.45, 0.22)))
            c.raise_to(at, alpha, 9 * (1 - 0.6 * far))
            c.polish(at, alpha, 0.03)

    def _head(self) -> None:
        """The skin of the head and its relief."""
        who, shot, c, smile = self.who, self.shot, self.canvas, self.smile
        at = c.head_window(-58, -75, 58, 84)
        alpha = c.edge(self.radius[at] - self.outline[at], 1.5)
        mottle = coarse(c.u[at] * 31 + 700 * np.sin(c.v[at] * 0.11))
        c.paint(at, alpha, self.skin * (1 + 0.025 * mottle))
        c.raise_to(at, alpha, 42 * np.sqrt(above(1.09 - np.square(self.reach[at]), 0.02)))
        c.polish(at, alpha, 0.07)
        for x, y, rx, ry, rise in (
            (who.eye_gap, who.eye_level - 3, 11, 8, -who.socket),
            (who.eye_gap, who.eye_level + 1, 7, 5, 2.2),
            (who.eye_gap - 1, who.brow_level + 1, 14, 5, who.brow_ridge),
            (28, 20 - 3 * smile, 11, 9, who.cheekbone + 1.6 * smile),
            (27, 42, 9, 11, -who.hollow),
            (39, -14, 7, 12, -1.2),
            (who.nose_width * 0.85, who.nose_length - 2.5, 3.6, 3.4, 2.6),
            (16 + 2 * smile, who.mouth_level, 3, 4, -0.6 - 0.7 * smile),
        ):
            c.bump(x, y, rx, ry, rise, pair=True)
        c.bump(0, 65, 11, 7, who.chin_boss)
        c.bump(0, 66, 2.0, 4, -who.chin_cleft)
        c.bump(0, who.mouth_level + 9 + 0.5 * shot.mouth_open, 11, 3, -1.6)
        c.bump(0, -28, 26, 14, 1.0)

    def _complexion(self) -> None:
        """Redness, freckles, moles and the lines of age and expression."""
        who, shot, c, smile = self.who, self.shot, self.canvas, self.smile
        red = linear(mix(who.skin, BLUSH, 0.6))
        nose, level, gap = who.nose_length, who.mouth_level, who.eye_gap
        for x, y, rx, ry in ((27.0, 22.0, 13, 10), (0, nose - 2, 9, 7), (0, 64, 10, 6)):
            at, weight = c.blob(x, y, rx, ry, pair=x > 0)
            c.paint(at, min(0.4, 0.5 * who.ruddy) * weight, red)
        rng = np.random.Generator(np.random.Philox(who.freckle_seed))
        freckles = rng.normal((0, 14, 0.85), (20, 9, 0.2), (int(40 * who.freckles), 3))
        for (x, y, r), opacity, tone in (
            *((f, 0.5, mix(who.skin, (0.42, 0.22, 0.12), 0.7)) for f in freckles.tolist()),
            *((mark, 0.95, (0.22, 0.13, 0.10)) for mark in who.marks),
        ):
            at, weight = c.blob(x, y, max(r, 0.5), max(r, 0.5))
            c.paint(at, opacity * weight, linear(tone))
        fold = min(0.45, 0.03 + 0.6 * who.lines**2 + 0.13 * smile)
        under = who.eye_level + 7.5
        corner = who.mouth_width + 5 + 2 * smile
        start, end = (who.nose_width + 3, nose - 2), (corner, level + 3)
        c.crease(start, (corner - 2.5, level - 8), end, 1.8, fold)
        c.crease((gap - 8, under - 1), (gap - 1, under + 1.8), (gap + 8, under - 1), 1.3, 0.5 * who.bags)
        c.shade(gap - 2, under - 1, 9, 3.5, 0.25 * who.bags, pair=True)
        for tilt in (-3.0, 0.5, 4.0) if who.lines > 0.4 else ():
            x, y = gap + 12, who.eye_level + tilt
            c.crease((x, y), (x + 3, y + 0.4 * tilt), (x + 6, y + tilt), 0.7, 0.4 * who.lines)
        ridges = min(0.45, 0.6 * max(0.0, who.lines - 0.35) + 0.06 * max(shot.brow_raise, 0.0))
        for y in (-20.0, -25.5, -31.0) if ridges > 0.06 else ():
            c.crease((-8, y - 2), (8, y - 1), (24, y + 1), 0.8, ridges)

    def _nose(self) -> None:
        """The nose's relief, wings, nostrils and shade."""
        who, c, length = self.who, self.canvas, self.who.nose_length
        wide = who.nose_width * (1 + 0.1 * self.smile)
        # The tip stands off the face, so it moves further when the head turns.
        lean_x, lean_y = _TIP_RISE * c.turn[0], _TIP_RISE * c.turn[1]
        at = c.window(-24, -14, 24, length + 14)
        fall = ((c.v[at] + 4) / (length + 4)).clip(0, 1.15)
        u = c.u[at] - fall * (lean_x + who.nose_bend * np.sin(fall * 3))
        v = c.v[at] - fall * lean_y
        width = who.nose_bridge + (who.nose_tip - who.nose_bridge) * fall
        profile = fall * fall * (0.45 + 0.35 * fall) * who.nose_height
        profile += who.nose_hump * bell(v - 9, 6) + 1.6 * step(-12, -2, v)
        under = step(length + 5.5, length - 3, v)
        c.height[at] += profile * under * bell(u / width, 1.25)
        tip = bell(u, who.nose_tip + 1.5) * bell(v - length + 3.5, who.nose_tip + 0.5)
        c.height[at] += 0.22 * who.nose_height * tip
        c.darken(at, 0.12 * bell(np.abs(u) - width - 2.5, 2.4) * step(-6, 4, v) * under)
        y = length + 1.8 + lean_y
        for side in (-1.0, 1.0):
            c.shade(side * wide * 0.52 + lean_x, y, 2.5, 1.3, 0.75)
        wing = np.abs(c.u[at] - 0.7 * lean_x) - wide - 1.0 + 0.12 * np.square(c.v[at] - y + 3.2)
        c.darken(at, 0.4 * bell(wing, 1.0) * bell(c.v[at] - y + 3.2, 2.8))
        c.shade(lean_x, y - 0.2, wide * 0.5, 1.0, 0.25)
        c.shade(lean_x * 0.7, length + 4.4, wide * 0.9, 2.2, 0.22)
        c.shade(0, length + 9, 2.0, 4.5, 0.07)

    def _beard(self) -> None:
        """Shaved shadow, beard and moustache."""
        who, shot, c = self.who, self.shot, self.canvas
        shaved = 0.16 * max(0.0, who.male) * who.brow_dark
        if max(shaved, shot.beard, shot.moustache) < 0.02:
            return
        at = c.window(-48, 8, 48, 84)
        u, v = c.u[at], c.v[at]
        side = np.abs(u)
        dark = linear(mix(who.hair, (0.16, 0.12, 0.10), 0.35))
        grain = fine(u * 397 + v * 0.9)
        line = 22 + 16 * who.beard_depth + 0.35 * above(34 - side) - 0.9 * above(side - 34)
        lips = np.square(u / (who.mouth_width + 2)) + np.square((v - who.mouth_level - 1) / 8.5)
        chin = step(-2, 5, v - line) * step(0.7, 1.25, lips) * step(1.05, 0.97, self.reach[at])
        chin *= min(0.92, 0.35 + 0.6 * shot.beard) if shot.beard else shaved
        c.paint(at, (chin * (1 + 0.25 * grain)).clip(0, 1), dark * (1 + 0.3 * grain))
        c.polish(at, 0.8 * chin, 0.0)
        if shot.beard:
            c.height[at] += chin * (1.5 + 0.4 * grain)
        if shot.moustache:
            half = who.mouth_width + 2.5
            droop = 0.016 * u * u
            top, low = who.nose_length + 6 + droop, who.mouth_level - 0.4 * who.lip_upper + 0.7 * droop
            off = np.maximum(np.maximum(top - v, v - low), side - half + np.abs(v - low + 2) * 0.5)
            hair = c.edge(off, 4.0) * min(0.95, 0.5 + 0.5 * shot.moustache)
            c.paint(at, (hair * (1 + 0.2 * grain)).clip(0, 1), dark * (1 + 0.4 * grain))
            c.height[at] += hair * 1.5

    def _mouth(self) -> None:
        """Lips, the line between them, teeth."""
        who, shot, c, gap, y = self.who, self.shot, self.canvas, self.shot.mouth_open, self.who.mouth_level
        half, rise = self._mouth_corner()
        at = c.window(-half - 5, y - 14, half + 5, y + 17 + gap)
        u, v = c.u[at], c.v[at]
        t = (u * (1 / half)).clip(-1, 1)
        bow = above(1 - t * t)
        line = y - (rise / 0.65) * (t * t - 0.35)
        top, bottom = line - 0.25 * gap * bow, line + 0.75 * gap * bow
        thin = 1 - 0.18 * self.smile
        dip = who.cupid * (bell(u, 2.2) - 0.5 * bell(np.abs(u) - 5, 3))
        upper = top - who.lip_upper * thin * np.sqrt(bow) * (0.6 + 0.4 * bow) + dip
        lower = bottom + who.lip_lower * thin * np.sqrt(bow) * (0.5 + 0.5 * bow)
        over = np.abs(u) - half
        lips = c.edge(np.maximum(np.maximum(upper - v, v - lower), over), 1.8)
        shape = 0.8 + 0.2 * step(-0.8, 0.8, v - line) * (1 + 0.6 * bell(v - bottom - 0.45 * who.lip_lower, 1.6))
        colour = linear(mix(who.lip, shot.makeup, shot.lipstick))
        c.paint(at, lips * (0.85 + 0.15 * shot.lipstick), colour * shape)
        c.height[at] += lips * 1.8
        c.gloss[at] += lips * (0.08 + 0.2 * shot.lipstick)
        if gap > 0.6:
            inner = np.maximum(np.maximum(top - v, v - bottom), over + 1.5)
            hole = c.edge(inner)
            c.paint(at, hole, linear((0.22, 0.06, 0.06)))
            teeth = c.edge(np.maximum(inner, v - top - 1.0 - 0.62 * gap)) * step(1.0, 0.75, np.abs(t))
            c.paint(at, teeth, linear((0.92, 0.89, 0.83)) * (1 - 0.35 * t * t))
            c.height[at] -= hole * 2.5
        c.darken(at, (0.72 if gap < 0.6 else 0.35) * bell(v - top, 0.85) * step(1.8, -0.8, over))
        c.shade(half + 0.6, y - rise, 2.2, 1.8, 0.38, pair=True)
        c.shade(0, y + gap + who.lip_lower + 2.5, 9, 2.2, 0.25)

    def _eyes(self) -> None:
        """Sockets, balls, irises, lids and lashes of both eyes."""
        who, shot, c, wide = self.who, self.shot, self.canvas, self.who.eye_size
        dark = linear(mix(who.skin, _INK, 0.8))
        up = who.eye_open * shot.lids * 1.15
        low = who.eye_open * (0.35 + 0.5 * shot.lids - 0.2 * self.smile)
        gap, y = who.eye_gap, who.eye_level
        # Both eyes at once: `across` grows outwards, `sign` is the side.
        at = c.window(-gap - 17, y - 13, gap + 17, y + 11)
        across, sign = c.side[at] - gap, np.sign(c.u[at])
        down = c.v[at] - y + who.eye_tilt * across
        t = (across * (1 / wide)).clip(-1, 1)
        bow = 1 - t * t
        top = -up * np.sqrt(bow) * (0.35 + 0.65 * bow) * (1 - 0.16 * t)
        bottom, over = low * bow, np.abs(across) - wide
        # The upper lid's fold and the socket's shade.
        fold = bell(down - top * 1.15 + 2.6 + 0.8 * who.lid_crease, 0.9) * step(3, -1, over)
        c.darken(at, 0.5 * who.lid_crease * fold)
        c.darken(at, 0.22 * bell(across + 1, 11) * bell(down + 3.5, 4))
        ball = c.edge(np.maximum(np.maximum(top - down, down - bottom), over))
        c.paint(at, ball, linear((0.93, 0.91, 0.89)) * (0.92 - 0.35 * t * t))
        gx, gy = across + 0.3 - shot.gaze[0] * sign, down - shot.gaze[1] + 0.4
        far = np.sqrt(gx * gx + gy * gy)
        ring = (0.55 + 0.9 * bell(far - 2.6, 1.3)) * (1 - 0.75 * step(3.5, 4.7, far))
        c.paint(at, ball * c.edge(far - 4.7), linear(who.iris) * ring)
        c.paint(at, ball * c.edge(far - 2.0), linear((0.03, 0.03, 0.03)))
        c.darken(at, 0.5 * ball * step(2.4, 0, down - top))
        spark = bell(gx * sign - 1.5 * shot.light[0], 0.9) * bell(gy + 1.6, 0.9)
        c.paint(at, 0.95 * ball * spark, linear(_WHITE))
        # Lashes, thicker outwards, and the lower lid.
        lash = bell((down - top + 0.4) / (0.75 + who.lashes * (0.55 + 0.55 * t)), 1.0)
        c.paint(at, lash * step(1.8, -0.6, over) * (0.55 + 0.45 * who.lashes), dark)
        c.paint(at, 0.35 * bell(down - bottom - 0.3, 0.7) * step(0.8, -1.5, over), dark)

    def _brows(self) -> None:
        who, c, half, gap = self.who, self.canvas, self.who.brow_length, self.who.eye_gap + 0.8
        y = who.brow_level - self.shot.brow_raise + 0.6 * who.eye_level
        at = c.window(-gap - half - 4, y - 11, gap + half + 4, y + 9)
        across = c.side[at] - gap
        t = across * (1 / half)
        curve = y - who.brow_arch * (1 - np.square(t - 0.25)) - who.brow_tilt * across
        thick = who.brow_thick * (1 - np.square((t + 0.25) / 1.3)).clip(0.1, 1)
        grain = fine(across * 2.4 + c.v[at] * 1.3)
        off = np.maximum(np.abs(c.v[at] - curve) - thick, (np.abs(t) - 1) * half)
        colour = linear(mix(who.hair, (0.14, 0.10, 0.08), 0.45))
        c.paint(at, c.edge(off, 2.4) * (who.brow_dark + 0.2 * grain).clip(0, 1), colour)

    def _hair_front(self) -> None:
        """Hair on the head, down to the hairline and the temples, with or without bangs."""
        who, shot, c = self.who, self.shot, self.canvas
        long = shot.hair_length > 12
        at = c.head_window(-72, -92, 72, 62 if long else 26)
        u, v = c.u[at], c.v[at]
        if who.is_bald:
            fringe = step(16, 4, np.abs(v - 2)) * step(36, 44, np.abs(u)) * step(1.06, 0.98, self.reach[at])
            c.paint(at, 0.7 * fringe, self.hair)
            return
        n = self.strands[at]
        downward, radius, outline = self.downward[at], self.radius[at], self.outline[at]
        on_top, above_jaw = (-1.1 * downward).clip(0, 1), (0.6 - 1.3 * downward).clip(0, 1)
        volume = (who.hair_side + (shot.hair_volume - who.hair_side) * on_top) * above_jaw
        low = 16.0 if long else 4.0 + 0.2 * shot.hair_length
        # The hairline falls from `brink` to `low` at the temples: a blend of a square and a sixth power.
        wide, bend = 43.5 + 0.6 * who.cheek + 0.4 * who.temple, who.hairline_shape
        reach = (np.abs(u - 0.12 * shot.hair_part) * (1 / wide)).clip(0, 1.25)
        square = reach * reach
        fourth = square * square
        brink = who.brow_level - 4.0 if shot.bangs else who.hairline - 3.2 * max(0.0, who.bald + 1.0)
        line = brink + (low - brink) * square * (1 - bend + bend * fourth) + 2.0 * n
        line += who.hair_sweep * u * above(1 - reach)
        if shot.bangs:
            line += 3.0 * coarse(u * 22)
        steep = ((low - brink) / wide) * reach * (2 - 2 * bend + 6 * bend * fourth)
        off = (v - line) / np.sqrt(1 + steep * steep)
        np.maximum(off, radius - outline - volume - (0.6 + 2.4 * who.hair_curl) * n, out=off)
        np.maximum(off, c.y[at] - (60.0 if long else low + 6), out=off)
        c.darken(at, 0.4 * c.edge(off, 18) * c.edge(radius - outline + 2, 4))
        alpha = c.edge(off, 2.2)
        sheen = 1 + 0.35 * bell(radius - 54, 7)
        c.paint(at, alpha, self.hair * ((0.9 + 0.45 * n) * sheen))
        dome = 47 * np.sqrt(above(1.08 - np.square(radius / (outline + volume)), 0.03))
        c.raise_to(at, alpha, dome + 0.9 * n)
        c.polish(at, alpha, 0.14)

    def _glasses(self) -> None:
        """The person's own frame, or dark glasses."""
        who, shot, c = self.who, self.shot, self.canvas
        if not (shot.glasses or shot.sunglasses):
            return
        rx, ry, gap, thick = who.glasses_width, who.glasses_height, who.eye_gap + 0.6, who.glasses_thick
        y = who.eye_level + 1.5
        at = c.window(-50, y - 21, 50, y + 21)
        u, v = c.u[at] - 6 * c.turn[0], c.v[at] - y - 6 * c.turn[1]
        side = np.abs(u)
        corner = who.glasses_round * min(rx, ry)
        qx, qy = np.abs(side - gap) - rx + corner, np.abs(v) - ry + corner
        lens = np.sqrt(np.square(above(qx)) + np.square(above(qy))) - corner
        lens -= above(-np.maximum(qx, qy))
        rim = np.abs(lens) - thick
        bridge = np.maximum(np.abs(v + 2.5 - 0.02 * side * side) - 0.8 * thick, side - gap + rx)
        arms = np.maximum(np.abs(v + 3) - 0.9 * thick, gap + rx - side)
        arms = np.maximum(arms, (self.reach[at] - 1.0) * 45)
        glass = c.edge(lens)
        if shot.sunglasses:
            c.paint(at, 0.93 * glass, linear((0.09, 0.08, 0.09)) * (1 + 0.06 * v))
        else:
            glare = bell(u * 0.7 + v + 6 - 8 * shot.light[0], 3.0)
            c.paint(at, glass * (0.05 + 0.22 * glare), linear(_WHITE))
        c.gloss[at] += glass * 0.1
        c.darken(at, 0.22 * bell(above(rim) - 1, 1.8))
        metal = linear(mix((0.75, 0.66, 0.50), (0.07, 0.05, 0.05), who.glasses_dark))
        c.paint(at, c.edge(np.minimum(np.minimum(rim, bridge), arms)), metal)

    def _hat(self) -> None:
        """A knitted hat with a band."""
        shot, c = self.shot, self.canvas
        if not shot.hat:
            return
        at = c.head_window(-72, -96, 72, 8)
        u, v, downward = c.u[at], c.v[at], self.downward[at]
        brim = v + 24 - 0.004 * u * u + 5 * c.turn[1]
        full = self.outline[at] + 10 + 4 * step(-0.4, -1, downward)
        alpha = c.edge(np.maximum(self.radius[at] - full, brim), 1.5)
        c.darken(at, 0.45 * step(13, 0, brim) * step(1.0, 0.9, self.reach[at]))
        knit, band = fine(u * 3.6 + 0.3 * v), step(-10.5, -9, brim)
        c.paint(at, alpha, linear(shot.hat_colour) * (0.95 + 0.12 * knit - 0.25 * band))
        dome = 48 * np.sqrt(above(1.08 - np.square(self.radius[at] / full), 0.03))
        c.raise_to(at, alpha, dome + 2.0 * band)
        c.polish(at, alpha, 0.0)


def _bilinear(length: int, knots: int) -> Array:
    """Interpolation matrix [length, knots]."""
    at = np.linspace(0, knots - 1, length)[:, None]
    weights: Array = np.maximum(0, 1 - np.abs(at - np.arange(knots))).astype(np.float32)
    return weights


_UP_ROWS, _UP_COLUMNS = _bilinear(HEIGHT, 4), _bilinear(WIDTH, 4).T


def draw(who: Identity, shot: Shot) -> tuple[NDArray[np.uint8], Array]:
    """One picture of one person.

    Returns:
        The picture, uint8 [218, 178, 3], and its landmarks, float32 [5, 2] in picture pixels: left eye, right eye,
        nose, left mouth corner, right mouth corner, left and right as seen in the picture.
    """
    portrait = Portrait(who, shot)
    return portrait.paint(), portrait.landmarks()
