"""Two pictures laid over each other, and how well they agree piece by piece.

Crops of one photograph, mirrored or not, saved at another size, quality or brightness, agree nearly everywhere once
they lie over each other. Frames of one burst lie over each other as well, but an eye, a mouth or a strand of hair has
moved: a few pieces disagree, most of all in the face. So pieces are counted, not the whole correlated, which is above
0.98 for both.

Pure functions on grey pictures, float32 [H, W] from 0 to 255, with a long side of about `SIDE`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.float32]
Numbers = NDArray[np.float64]

SIDE = 128
"""Pixels of the longer side of what is compared."""
PIECE = 10
"""Pixels on a side of one piece."""
COARSE = 3
"""Factor by which pictures are smaller for the search."""
SCALES = 1.1 ** np.arange(-6, 7)
"""Of one picture against the other that are searched: a crop that keeps 57 % of each side."""
MIDDLE = 0.6
"""Part of each side of a picture that is looked for in the other: a crop has it whole."""
FOUND = 0.7
"""Correlation of that middle from which a place is worth a closer look."""
BLURS = (2.5, 1.2)
"""Pixels that pictures are blurred by, one after the other, while they are laid over each other: what is left to
correct must be smaller than what can be seen."""
HOPEFUL = 0.4
"""`Overlay.everywhere` after each of them, below which two photographs differ."""
ROUNDS = 12
"""Of correction after each of them, at most."""
TEXTURE = 3.0
"""Standard deviation in grey levels from which a piece shows anything that could disagree."""
DARK, BRIGHT = 4, 251
"""Grey levels beyond which exposure has cut off what was there."""
FEWEST = 12
"""Pieces that must show something."""
LEAST_OVERLAP = 0.3
"""Part of the smaller picture that must lie on the other."""
CORE = 0.5
"""Part of each side of the overlap's middle, where the face is."""


class Overlay(NamedTuple):
    """How two pictures agree, lying over each other."""

    everywhere: float
    """Correlation that four fifths of all pieces reach: a caption or a logo may cover the rest."""
    core: float
    """Correlation that 19 of 20 pieces in the middle reach."""
    overlap: float
    """Part of the second picture that lies on the first."""
    mirrored: bool


def overlay(one: Grey, other: Grey) -> Overlay | None:
    """The best way found to lay `other`, or its mirror image, over `one`; None where there is none worth a look."""
    plain, turned = _place(one, other), _place(one, other[:, ::-1])
    mirrored = turned[0] > plain[0]
    score, matrix = turned if mirrored else plain
    if score < FOUND:
        return None
    other = np.ascontiguousarray(other[:, ::-1]) if mirrored else other
    found: Overlay | None = None
    for sigma in BLURS:
        better = _refine(_blurred(one, sigma), _blurred(other, sigma), matrix)
        if better is None:
            return None
        matrix = better
        found = _agreement(one, other, matrix, mirrored)
        if found is None or found.everywhere < HOPEFUL:
            return None
    return found


def _place(one: Grey, other: Grey) -> tuple[float, Numbers]:
    """Correlation of the middle of either picture in the other, at best, and the matrix [2, 3] of `other` on `one`."""
    best = -1.0, np.eye(2, 3)
    small = _resized(one, 1 / COARSE), _resized(other, 1 / COARSE)
    for scale in SCALES.tolist():
        for inverse, (big, image) in enumerate(((small[0], other), (small[1], one))):
            scaled = _resized(image, scale / COARSE)
            height, width = (round(side * MIDDLE) for side in scaled.shape)
            y, x = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
            score, (top, left) = _search(big, scaled[y : y + height, x : x + width])
            if score > best[0]:
                shift = np.array([left - x, top - y], np.float64) * COARSE
                matrix = np.column_stack([scale * np.eye(2), shift])
                best = score, np.column_stack([np.eye(2) / scale, -shift / scale]) if inverse else matrix
    return best


def _search(big: Grey, part: Grey) -> tuple[float, tuple[int, int]]:
    """Normalised cross-correlation: the best of `part` anywhere in `big`, and its top and left."""
    height, width = part.shape
    rows, columns = big.shape[0] - height + 1, big.shape[1] - width + 1
    if rows < 1 or columns < 1 or min(height, width) < 8:
        return -1.0, (0, 0)
    part = part - part.mean()
    spectrum = np.fft.rfft2(big) * np.fft.rfft2(part, big.shape).conj()
    product = np.fft.irfft2(spectrum, big.shape)[:rows, :columns]
    total, squares = (_window_sums(values, height, width) for values in (big, big.astype(np.float64) ** 2))
    spread = np.maximum(squares - total**2 / part.size, part.size)  # a plain wall correlates with nothing
    scores = product / np.sqrt(spread * max(float((part**2).sum()), part.size))
    top, left = divmod(int(scores.argmax()), columns)
    return float(scores[top, left]), (top, left)


def _window_sums(values: NDArray[np.floating], height: int, width: int) -> Numbers:
    sums = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inner: Numbers = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    return inner


def _resized(picture: Grey, factor: float) -> Grey:
    """Scaled by `factor`, each pixel the mean of what it covers."""
    for axis in (0, 1):
        length = picture.shape[axis]
        count = max(2, round(length * factor))
        edges = np.linspace(0, length, count + 1)
        # The integral of a row, read between pixels: its differences are means over parts of pixels.
        integral = np.concatenate(
            [np.zeros_like(picture.take([0], axis)), picture.cumsum(axis, dtype=np.float64)], axis
        )
        low = np.minimum(edges.astype(np.int64), length - 1)
        part = np.expand_dims(edges - low, 1 - axis)
        at = integral.take(low, axis) * (1 - part) + integral.take(low + 1, axis) * part
        picture = (np.diff(at, axis=axis) * (count / length)).astype(np.float32)
    return picture


def _blurred(picture: Grey, sigma: float) -> Grey:
    reach = round(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        padded = np.pad(picture, [(reach, reach) if k == axis else (0, 0) for k in (0, 1)], mode="edge")
        picture = np.asarray(np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis) @ kernel, np.float32)
    return picture


def _read(picture: Grey, x: Numbers, y: Numbers) -> Grey:
    """The picture between its pixels, linear; places outside read its rim."""
    left = np.clip(np.floor(x), 0, picture.shape[1] - 2).astype(np.int64)
    top = np.clip(np.floor(y), 0, picture.shape[0] - 2).astype(np.int64)
    across, down = np.clip(x - left, 0, 1), np.clip(y - top, 0, 1)
    upper = picture[top, left] * (1 - across) + picture[top, left + 1] * across
    lower = picture[top + 1, left] * (1 - across) + picture[top + 1, left + 1] * across
    return np.asarray(upper * (1 - down) + lower * down, np.float32)


def _inside(picture: Grey, x: Numbers, y: Numbers) -> NDArray[np.bool_]:
    return np.asarray((x >= 0) & (y >= 0) & (x <= picture.shape[1] - 1) & (y <= picture.shape[0] - 1))


def _refine(one: Grey, other: Grey, matrix: Numbers) -> Numbers | None:
    """Gauss-Newton on an affine matrix, a gain and a bias, pixels that disagree weighing less (Lucas and Kanade 1981;
    Geman and McClure 1987); None where pictures part or the matrix is no view of a flat picture."""
    down, right = (np.asarray(np.gradient(one, axis=axis), np.float32) for axis in (0, 1))
    y, x = (grid.ravel().astype(np.float64) for grid in np.mgrid[0 : other.shape[0] : 2, 0 : other.shape[1] : 2])
    values = other[::2, ::2].ravel().astype(np.float64)
    # Lengths from the middle in units of half a picture: all unknowns then have the same size.
    basis = np.stack([(x - x.mean()) / (SIDE / 2), (y - y.mean()) / (SIDE / 2), np.ones_like(x)], 1)
    back = np.linalg.lstsq(basis, np.stack([x, y, np.ones_like(x)], 1), rcond=None)[0].T  # pixels of basis
    forms = matrix @ back
    for _ in range(ROUNDS):
        at_x, at_y = basis @ forms[0], basis @ forms[1]
        inside = _inside(one, at_x, at_y)
        if np.count_nonzero(inside) < LEAST_OVERLAP * len(x):
            return None
        at_x, at_y, here = at_x[inside], at_y[inside], basis[inside]
        slopes = [_read(gradient, at_x, at_y)[:, None] * here for gradient in (right, down)]
        system = np.concatenate([*slopes, -values[inside, None], -np.ones((len(here), 1))], 1)
        seen = -_read(one, at_x, at_y).astype(np.float64)
        step, weights = np.zeros(8), np.ones(len(here))
        for _ in range(3):
            weighted = system * weights[:, None]
            step = np.linalg.solve(weighted.T @ system + 1e-6 * np.eye(8), weighted.T @ seen)
            errors = abs(system @ step - seen)
            weights = 1 / (1 + (errors / (1.5 * np.median(errors) + 1)) ** 2)
        forms = forms + step[:6].reshape(2, 3)
        stretch = np.linalg.svd(forms[:, :2], compute_uv=False) / (SIDE / 2)
        if not np.isfinite(forms).all() or stretch[0] > 3 or stretch[1] < 1 / 3 or stretch[0] > 1.5 * stretch[1]:
            return None
        if abs(step[:6]).max() < 0.02:
            break
    result: Numbers = forms @ np.linalg.inv(back)
    return result


def _agreement(one: Grey, other: Grey, matrix: Numbers, mirrored: bool) -> Overlay | None:
    one, other = _blurred(one, 1.0), _blurred(other, 1.0)
    y, x = (grid.astype(np.float64) for grid in np.mgrid[0 : other.shape[0], 0 : other.shape[1]])
    at_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]
    at_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]
    inside = _inside(one, at_x, at_y)
    overlap = float(inside.mean())
    if overlap < LEAST_OVERLAP:
        return None
    there = _read(one, at_x, at_y)
    left, right = _pieces(there), _pieces(other)
    # What is over- or underexposed in one of them has lost what it could agree on.
    full = inside & (np.minimum(there, other) > DARK) & (np.maximum(there, other) < BRIGHT)
    counted = _pieces(full).mean(1) > 0.9
    spreads = left.std(1), right.std(1)
    counted &= np.maximum(*spreads) >= TEXTURE
    if np.count_nonzero(counted) < FEWEST:
        return None
    products = ((left - left.mean(1, keepdims=True)) * (right - right.mean(1, keepdims=True))).mean(1)
    agree = products / np.maximum(spreads[0] * spreads[1], 1e-6)
    core = counted & _core(inside)
    everywhere = float(np.quantile(agree[counted], 0.2))
    inner = float(np.quantile(agree[core], 0.05)) if core.any() else everywhere
    return Overlay(everywhere, inner, overlap, mirrored)


def _pieces(values: NDArray[np.generic]) -> Numbers:
    """[P, PIECE * PIECE] squares side by side; what does not fill one at the right and below is left out."""
    rows, columns = (side // PIECE for side in values.shape)
    cut = values[: rows * PIECE, : columns * PIECE].reshape(rows, PIECE, columns, PIECE)
    return np.asarray(cut.transpose(0, 2, 1, 3).reshape(rows * columns, -1), np.float64)


def _core(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[P] whether a piece lies in the middle of what both pictures show."""
    y, x = np.nonzero(inside)
    middle = np.zeros(inside.shape)
    (low_y, high_y), (low_x, high_x) = (list(_middle(int(v.min()), int(v.max()) + 1)) for v in (y, x))
    middle[low_y:high_y, low_x:high_x] = 1
    return np.asarray(_pieces(middle).mean(1) >= 0.5)


def _middle(low: int, high: int) -> Iterator[int]:
    rim = (high - low) * (1 - CORE) / 2
    yield round(low + rim)
    yield round(high - rim)
