"""The canvas of a drawn face: pixels' places on a turned head, soft-edged painting, relief, light and camera.

A picture is an albedo and a height per pixel, both filled in by soft-edged shapes (signed distances in face
coordinates) and then lit once. The head's turn is a 2.5D shift: a point of the face moves by its depth along the
direction that the head faces, which is inverted in closed form, so that every shape is drawn as if frontal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facefast.data.drawn.persona import RGB, Shot

Array = NDArray[Any]
Window = tuple[slice, slice]
Point = tuple[float, float]

WIDTH, HEIGHT = 178, 218
WHOLE: Window = (slice(0, HEIGHT), slice(0, WIDTH))
_CENTRE = (88.8, 108.5)  # between the eyes of CelebA's aligned pictures, pixels
_DEPTH, _DEPTH_X, _DEPTH_Y, _MIDDLE = 36.0, 52.0, 76.0, 8.0  # the paraboloid that turns; its middle's y


def _noise(knots: int, seed: int) -> Array:
    """Periodic smooth noise in [-1, 1]: 4096 values with `knots` independent ones."""
    values = np.random.Generator(np.random.Philox(seed)).uniform(-1, 1, knots)
    at = np.arange(4096) * knots / 4096
    low, part = at.astype(int), (at % 1) ** 2 * (3 - 2 * (at % 1))
    smooth: Array = (values[low] * (1 - part) + values[(low + 1) % knots] * part).astype(np.float32)
    return smooth


_FINE, _COARSE = _noise(1024, 1), _noise(128, 2)
_GRAIN = np.random.Generator(np.random.Philox(3)).standard_normal(1 << 18, np.float32)


def fine(place: Array) -> Array:
    """Noise in [-1, 1] that changes every 4 units of `place`."""
    return _FINE.take(place.astype(np.intp), mode="wrap")


def coarse(place: Array) -> Array:
    """Noise in [-1, 1] that changes every 32 units of `place`."""
    return _COARSE.take(place.astype(np.intp), mode="wrap")


def linear(colour: RGB) -> Array:
    """Display colour in 0..1 to (approximately) linear light, [3, 1, 1]."""
    return np.square(np.array(colour, dtype=np.float32)).reshape(3, 1, 1)


def step(low: float, high: float, value: Array) -> Array:
    """Smooth step from 0 at `low` to 1 at `high` (`low` may be the greater)."""
    t = value - np.float32(low)
    t *= np.float32(1 / (high - low))
    t.clip(0, 1, out=t)
    cubic = t * -2
    cubic += 3
    cubic *= t
    cubic *= t
    return cubic


def above(value: Array, floor: float = 0.0) -> Array:
    """The greater of value and floor (np.clip is three times as fast as np.maximum with a number)."""
    return value.clip(floor, 1e9)


def bell(value: Array, width: float) -> Array:
    """Soft peak of height 1 at 0, near exp(-(value / width)^2) and exactly 0 beyond 2.24 widths."""
    t = value * np.float32(1 / width)
    t *= t
    return _fall(t)


def _fall(square: Array) -> Array:
    """(1 - square / 5)^4 down to 0, in place: near exp(-square) without its slow denormal tail."""
    square *= -0.2
    square += 1
    np.maximum(square, 0, out=square)
    square *= square
    square *= square
    return square


class Canvas:
    """The picture while it is painted. Lengths are pixels of the mean face, before the shot's scale.

    Attributes:
        x, y: place of every pixel in the head's frame, float32 [H, W].
        u, v: its place on the face as seen from the front; side is |u|, for what there is two of.
        albedo: linear light [3, H, W]; height and gloss: [H, W].
    """

    def __init__(self, shot: Shot) -> None:
        self.scale = shot.scale
        self.turn = (math.sin(shot.yaw), math.sin(shot.pitch))
        self.origin = (_CENTRE[0] + shot.shift[0], _CENTRE[1] + shot.shift[1])
        self.cos, self.sin = math.cos(shot.roll) * shot.scale, math.sin(shot.roll) * shot.scale
        px = np.arange(WIDTH, dtype=np.float32)[None, :] + np.float32(0.5 - self.origin[0])
        py = np.arange(HEIGHT, dtype=np.float32)[:, None] + np.float32(0.5 - self.origin[1])
        square = shot.scale**2
        self.x: Array = px * (self.cos / square) + py * (self.sin / square)
        self.y: Array = py * (self.cos / square) - px * (self.sin / square)
        # depth z = D (1 - |p - z e|^2), p the place and e the turn in the paraboloid's units: a quadratic in z.
        ex, ey = self.turn[0] / _DEPTH_X, self.turn[1] / _DEPTH_Y
        sx, sy = self.x * (1 / _DEPTH_X), (self.y - _MIDDLE) * (1 / _DEPTH_Y)
        inside = above(1 - sx * sx - sy * sy)
        half = 1 - (2 * _DEPTH * ex) * sx - (2 * _DEPTH * ey) * sy
        root = np.sqrt(half * half + (4 * _DEPTH**2 * (ex * ex + ey * ey)) * inside)
        # The quadratic's root in the form without a difference: it stays sound where the head faces the camera and the
        # quadratic becomes linear.
        depth = (2 * _DEPTH) * inside / above(half + root, 0.2)
        self.u: Array = self.x - depth * self.turn[0]
        self.v: Array = self.y - depth * self.turn[1]
        self.side: Array = np.abs(self.u)
        self.albedo: Array = np.zeros((3, HEIGHT, WIDTH), np.float32)
        self.height: Array = np.zeros((HEIGHT, WIDTH), np.float32)
        self.gloss: Array = np.zeros((HEIGHT, WIDTH), np.float32)

    def place(self, x: float, y: float) -> Point:
        """Picture pixel of a point of the head's frame."""
        across = self.cos * x - self.sin * y + self.origin[0]
        return across, self.sin * x + self.cos * y + self.origin[1]

    def project(self, x: float, y: float, rise: float = 0.0) -> Point:
        """Picture pixel of a face point; `rise` is its height above the paraboloid."""
        out = (x / _DEPTH_X) ** 2 + ((y - _MIDDLE) / _DEPTH_Y) ** 2
        depth = _DEPTH * max(0.0, 1 - out) + rise
        return self.place(x + depth * self.turn[0], y + depth * self.turn[1])

    def window(self, left: float, top: float, right: float, bottom: float) -> Window:
        """Pixels that a rectangle of the face can touch."""
        x, y, half, tall = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
        # The turn stretches the rectangle by the depth that changes across it.
        slope_x = (2 * abs(x) + half) * half / _DEPTH_X**2
        slope_y = (2 * abs(y - _MIDDLE) + tall) * tall / _DEPTH_Y**2
        change = _DEPTH * (slope_x + slope_y)
        half, tall = half + abs(self.turn[0]) * change, tall + abs(self.turn[1]) * change
        return self._around(self.project(x, y), half, tall)

    def head_window(self, left: float, top: float, right: float, bottom: float) -> Window:
        """Pixels that a rectangle of the head's frame can touch."""
        middle = self.place((left + right) / 2, (top + bottom) / 2)
        return self._around(middle, (right - left) / 2, (bottom - top) / 2)

    def _around(self, middle: Point, half: float, tall: float) -> Window:
        cos, sin = abs(self.cos), abs(self.sin)
        (x, y), across, down = middle, cos * half + sin * tall + 1, cos * tall + sin * half + 1
        rows = slice(max(int(y - down), 0), max(int(y + down) + 1, 0))
        return rows, slice(max(int(x - across), 0), max(int(x + across) + 1, 0))

    def edge(self, distance: Array, soft: float = 1.2) -> Array:
        """Coverage 0..1 of a signed distance in face pixels (negative inside), `soft` picture pixels wide."""
        alpha = distance * np.float32(-self.scale / soft)
        alpha += 0.5
        return alpha.clip(0, 1, out=alpha)

    def paint(self, at: Window, alpha: Array, colour: Array) -> None:
        """Lay a linear colour over the pixels with coverage `alpha` [h, w]."""
        target = self.albedo[:, at[0], at[1]]
        change = colour - target
        change *= alpha
        target += change

    def darken(self, at: Window, amount: Array) -> None:
        """Multiply the pixels by 1 - amount: creases and shade."""
        self.albedo[:, at[0], at[1]] *= 1 - amount

    def raise_to(self, at: Window, alpha: Array, height: Array) -> None:
        """Replace the relief by `height` where `alpha` covers it."""
        self.height[at] += alpha * (height - self.height[at])

    def polish(self, at: Window, alpha: Array, gloss: float) -> None:
        """Replace the gloss where `alpha` covers it."""
        self.gloss[at] += alpha * (gloss - self.gloss[at])

    def blob(self, x: float, y: float, rx: float, ry: float, pair: bool = False) -> tuple[Window, Array]:
        """A soft spot of the face (with its mirror image if `pair`): its window and its weight [h, w]."""
        reach, tall = 2.24 * rx, 2.24 * ry
        left = -x - reach if pair else x - reach
        at = self.window(left, y - tall, x + reach, y + tall)
        across = ((self.side if pair else self.u)[at] - x) * (1 / rx)
        down = (self.v[at] - y) * (1 / ry)
        across *= across
        down *= down
        across += down
        return at, _fall(across)

    def bump(self, x: float, y: float, rx: float, ry: float, height: float, pair: bool = False) -> None:
        """Raise (or dent) the relief softly."""
        at, weight = self.blob(x, y, rx, ry, pair)
        weight *= height
        self.height[at] += weight

    def shade(self, x: float, y: float, rx: float, ry: float, amount: float, pair: bool = False) -> None:
        """Darken a soft spot."""
        at, weight = self.blob(x, y, rx, ry, pair)
        weight *= amount
        self.darken(at, weight)

    def crease(self, start: Point, middle: Point, end: Point, thick: float, amount: float) -> None:
        """A pair of soft dark lines along the parabola through three points of the face's right half."""
        tall = abs(end[1] - start[1]) > abs(end[0] - start[0])
        (x0, y0), (x1, y1), (x2, y2) = (p[::-1] if tall else p for p in (start, middle, end))
        slope = (y2 - y0) / (x2 - x0)
        bow = (y1 - y0 - slope * (x1 - x0)) / ((x1 - x0) * (x1 - x2))
        left, right = min(x0, x2), max(x0, x2)
        low, high = min(y0, y1, y2) - 2 * thick, max(y0, y1, y2) + 2 * thick
        at = self.window(-high, left, high, right) if tall else self.window(-right, low, right, high)
        along, across = (self.v[at], self.side[at]) if tall else (self.side[at], self.v[at])
        after, before = along - x0, along - x2
        before *= after
        after *= slope
        off = across - y0
        off -= after
        off -= before * bow
        before *= -6 * amount / (right - left) ** 2
        self.darken(at, before.clip(0, amount) * bell(off, thick))

    def lit(self, shot: Shot, head: Array) -> Array:
        """The canvas under the shot's light: display values from 0, [3, H, W].

        `head` [H, W] says where the surface turns with the head.
        """
        h = self.height - (self.turn[0] * self.x + self.turn[1] * self.y) * head
        h[1:-1] += 0.5 * (h[2:] + h[:-2] - 2 * h[1:-1])
        h[:, 1:-1] += 0.5 * (h[:, 2:] + h[:, :-2] - 2 * h[:, 1:-1])
        dx, dy = np.zeros_like(h), np.zeros_like(h)
        np.subtract(h[:, 2:], h[:, :-2], out=dx[:, 1:-1])
        np.subtract(h[2:], h[:-2], out=dy[1:-1])
        dx *= 0.5
        dy *= 0.5
        norm = 1 / np.sqrt(1 + dx * dx + dy * dy)
        lx, ly, lz = shot.light
        diffuse = above((lz - lx * dx - ly * dy) * norm * 0.85 + 0.15)
        # Blinn's half vector between the light and the viewer, to the 16th power.
        length = math.sqrt(lx * lx + ly * ly + (lz + 1) ** 2)
        glint = above(((lz + 1) - lx * dx - ly * dy) * (norm * (1 / length)), 0.05)
        for _ in range(4):
            glint *= glint
        glint *= self.gloss
        strength = 0.85 * shot.exposure / (shot.ambient + (1 - shot.ambient) * (0.3 + 0.6 * max(lz, 0.0)))
        fill = (strength * shot.ambient) * (0.75 + 0.25 * norm)
        diffuse *= strength * (1 - shot.ambient)
        for channel, warm in zip(self.albedo, (1 + shot.warmth, 1.0, 1 - shot.warmth), strict=True):
            # The fill light comes from the sky or the room: half as far to the other side of white.
            channel *= diffuse * warm + fill * (1.5 - 0.5 * warm)
            channel += (strength * warm) * glint
        return np.sqrt(above(self.albedo))


def _soften(picture: Array, sigma: float) -> Array:
    """Separable Gaussian blur of [3, H, W]; edges are repeated."""
    if sigma < 0.25:
        return picture
    reach = max(1, round(2 * sigma))
    taps = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (1, 2):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (reach, reach)
        padded = np.pad(picture, padding, mode="edge")
        size = picture.shape[axis]
        picture = np.zeros_like(picture)
        for k, tap in enumerate(taps):
            picture += tap * (padded[:, k : k + size] if axis == 1 else padded[:, :, k : k + size])
    return picture


def record(picture: Array, shot: Shot) -> NDArray[np.uint8]:
    """What the camera makes of a lit picture: blur, saturation, contrast, noise; uint8 [H, W, 3]."""
    picture = _soften(picture, shot.blur)
    # Grain: a stretch of a fixed field that starts somewhere else in every picture.
    start = shot.clutter_seed % (_GRAIN.size - HEIGHT * WIDTH)
    grey = _GRAIN[start : start + HEIGHT * WIDTH].reshape(HEIGHT, WIDTH) * np.float32(shot.noise)
    grey += (picture[0] + picture[1] + picture[2]) * ((1 - shot.saturation) / 3 * shot.contrast)
    grey += 0.45 * (1 - shot.contrast)
    picture *= shot.saturation * shot.contrast
    picture += grey
    # Highlights roll off towards 1 instead of clipping flat.
    bright = above(picture - 0.8)
    picture -= bright
    picture += bright / (1 + 5 * bright)
    picture *= 255
    picture += 0.5
    picture.clip(0, 255, out=picture)
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for channel in range(3):
        pixels[..., channel] = picture[channel].astype(np.uint8)
    return pixels
