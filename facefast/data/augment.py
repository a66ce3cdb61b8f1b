"""What happens to a picture: `draw` gives, per row, one matrix, one colour matrix and one erased rectangle.

The operators only apply these numbers, whatever device they run on. The randomness of a row is a function of (seed,
epoch, row) alone: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facefast.data.index import FaceIndex
from facefast.recipe import AugmentSpec, ImageSpec

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]


class Template(NamedTuple):
    """Where the five landmarks of an aligned face lie, in pixels whose centres are whole numbers (as in OpenCV)."""

    width: int
    height: int
    points: tuple[tuple[float, float], ...]


TEMPLATES = {
    # deepinsight/insightface, python-package/insightface/utils/face_align.py: arcface_dst.
    "arcface": Template(
        112,
        112,
        (
            (38.2946, 51.6963),
            (73.5318, 51.5014),
            (56.0252, 71.7366),
            (41.5493, 92.3655),
            (70.7299, 92.2041),
        ),
    ),
    # SphereFace's and MobileFaceNet's frame: the same face without 8 pixels on either side.
    "arcface_112x96": Template(
        96,
        112,
        (
            (30.2946, 51.6963),
            (65.5318, 51.5014),
            (48.0252, 71.7366),
            (33.5493, 92.3655),
            (62.7299, 92.2041),
        ),
    ),
    # Mean over 4950 pictures in CelebA's aligned frame, landmarks found by MTCNN.
    "celeba": Template(
        178,
        218,
        (
            (69.776, 111.647),
            (107.263, 111.598),
            (88.122, 134.914),
            (71.609, 151.779),
            (104.880, 151.675),
        ),
    ),
}


class Draw(NamedTuple):
    """The numbers of B rows.

    matrix: float32 [B, 2, 3], centre of an output pixel -> point of the EXIF-oriented picture, both in coordinates
    where pixel i covers [i, i + 1).
    color: float32 [B, 3, 4], normalised channels = color[:, :3] @ rgb(0..255) + color[:, 3].
    erase: int32 [B, 4], x0 y0 x1 y1 of the erased output pixels, half open; all zeros erase nothing.
    """

    matrix: NDArray[np.float32]
    color: NDArray[np.float32]
    erase: NDArray[np.int32]

    def take(self, places: NDArray[np.int64] | list[int]) -> Draw:
        """The numbers at some places, in that order."""
        return Draw(self.matrix[places], self.color[places], self.erase[places])


def draw(
    index: FaceIndex,
    rows: NDArray[np.int64],
    image: ImageSpec,
    augment: AugmentSpec | None,
    seed: int,
    epoch: int,
    sizes: NDArray[Any] | None = None,
) -> Draw:
    """The numbers that turn the pictures of `rows` into what the model sees.

    The frame is the largest rectangle of the output's shape in the middle of the template, laid over the picture by
    the least-squares similarity between its landmarks and the template's (Umeyama 1991); or in the middle of the
    picture itself where the template is none or the landmarks are missing. So `arcface` at 112 x 96 pixels equals
    `arcface_112x96`, and at 128 or 224 pixels it is the 112-pixel frame scaled about its centre, where InsightFace
    shows 8 pixels more on either side at multiples of 128.

    Args:
        index: the pictures; landmarks are in pixels of the oriented picture whose centres are whole numbers.
        rows: int64 [B], all at least 0; a row may repeat.
        image: output size, template and normalisation.
        augment: strengths; None, or all at 0, gives the aligned picture itself.
        seed, epoch: the key of the randomness, with the row.
        sizes: int [B, 2], (width, height) of the oriented pictures; the index's own by default.

    Raises:
        ValueError: the template is unknown, or a centred frame is needed and the size of a picture is not.
    """
    uniforms = _uniforms(rows, seed, epoch) if augment else np.zeros((NUM_UNIFORMS, len(rows)))
    augment = augment or AugmentSpec()
    height, width = image.shape
    # A row's numbers keep their places, so that one strength never changes what another one draws.
    (area, ratio, left, top, shift_x, shift_y, mirror, angle) = uniforms[:8]
    (brightness, contrast, saturation, hue, grey) = uniforms[8:13]

    # Random resized crop in the frame, whose centre is 0: scale (kx, ky) and centre (x, y), in output pixels. With
    # every strength at 0 this is (1, 1) and (0, 0): nothing needs to be switched off.
    area = 1 - augment.crop * area
    aspect = (1 + augment.crop_ratio) ** (2 * ratio - 1)
    kx, ky = np.sqrt(area * aspect), np.sqrt(area / aspect)
    x = width * ((1 - kx) * (left - 0.5) + augment.shift * (2 * shift_x - 1))
    y = height * ((1 - ky) * (top - 0.5) + augment.shift * (2 * shift_y - 1))

    # Points of the plane as complex numbers: a similarity is a multiplication and an addition. From an output pixel to
    # the picture, in this order: mirror, rotate about the output's centre, stretch and move to the crop, and from the
    # frame to the picture. Last comes what depends on the picture, so strengths mean the same on every picture.
    scale, centre = _frames(index, rows, image, sizes)
    radians = np.radians(augment.rotation) * (2 * angle - 1)
    cos, sin = np.cos(radians), np.sin(radians)
    right = scale * (kx * cos + 1j * (ky * sin)) * np.where(mirror < augment.flip, -1.0, 1.0)
    down = scale * (1j * (ky * cos) - kx * sin)
    origin = centre + scale * (x + 1j * y) - right * (width / 2) - down * (height / 2)
    matrix = np.empty((len(rows), 2, 3), np.float32)
    for column, vector in enumerate((right, down, origin)):
        matrix[:, 0, column], matrix[:, 1, column] = vector.real, vector.imag

    # All colour steps are linear or add grey, so they are one matrix, a sum of five fixed ones.
    brightness = 1 + augment.brightness * (2 * brightness - 1)
    contrast = 1 + augment.contrast * (2 * contrast - 1)
    chroma = np.where(grey < augment.grey, 0.0, 1 + augment.saturation * (2 * saturation - 1))
    turn = 2 * np.pi * augment.hue * (2 * hue - 1)
    gain = brightness * contrast
    parts = np.stack(
        [gain, gain * chroma * np.cos(turn), gain * chroma * np.sin(turn), 1 - contrast, np.ones_like(gain)]
    )
    color = (parts.T @ _color_basis(image)).reshape(-1, 3, 4).astype(np.float32)
    return Draw(matrix, color, _erased(uniforms[13:], augment, width, height))


NUM_UNIFORMS = 20


def _uniforms(rows: NDArray[np.int64], seed: int, epoch: int) -> Floats:
    """NUM_UNIFORMS numbers in [0, 1) for each row: [NUM_UNIFORMS, B]."""
    # A counter-based generator has no state that earlier rows would move: row and epoch are in the counter, the run's
    # seed is the key, and four numbers come at a time.
    blocks = NUM_UNIFORMS // 4
    counter = np.empty((4, blocks, len(rows)), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)[:, None]
    counter[1] = rows & 0xFFFFFFFF
    counter[2] = rows >> 32
    counter[3] = epoch
    words = philox(counter.reshape(4, -1), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.reshape(NUM_UNIFORMS, len(rows)).astype(np.float64) * 2.0**-32


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters [4, n], of 32 bits each, under one key: words [4, n] of 32 bits each."""
    # The paper's words 0 and 2 are multiplied, 1 and 3 are mixed in; here two rows each, for all counters at once.
    even, odd = counter[0::2], counter[1::2]
    for round_key in _round_keys(key):
        product = (even * _PHILOX_MULTIPLIERS)[::-1]
        even, odd = (product >> _32) ^ odd ^ round_key, product & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


_32, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_PHILOX_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


@lru_cache(maxsize=8)
def _round_keys(key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    start = np.array(key, np.uint64).reshape(2, 1)
    return tuple((start + np.uint64(i) * _PHILOX_WEYL) & _LOW for i in range(10))


def _frames(
    index: FaceIndex, rows: NDArray[np.int64], image: ImageSpec, sizes: NDArray[Any] | None
) -> tuple[Complexes, Complexes]:
    """Where the output's frame lies in each picture: turn and scale of an output pixel, and the frame's centre."""
    points, template = index.landmarks, image.template
    if template == "auto":
        template = "none" if points is None else "arcface"
    if template != "none" and template not in TEMPLATES:
        raise ValueError(f"image.template is {template!r}; it must be auto, none or one of {', '.join(TEMPLATES)}")
    if template == "none" or points is None:
        return _centred(index, rows, image, sizes)
    height, width = image.shape
    source = points[rows].astype(np.float64, order="C").view(np.complex128)[..., 0] + (0.5 + 0.5j)  # [B, 5]
    target = _target(template, width, height)  # [5]
    with np.errstate(all="ignore"):  # NaN, infinite or coinciding landmarks: found below
        source_mean, target_mean = source.mean(1), target.mean()
        # Fitted from the picture to the template, as InsightFace fits it, and inverted: where landmarks do not match
        # the template exactly, the fit in the other direction is another one. A complex factor cannot mirror.
        source = source - source_mean[:, None]
        scale = (source.real**2 + source.imag**2).sum(1) / (source.conj() @ (target - target_mean))
        centre = source_mean - scale * target_mean
    lost = ~np.isfinite(centre)
    if lost.any():
        sizes = None if sizes is None else sizes[lost]
        scale[lost], centre[lost] = _centred(index, rows[lost], image, sizes)
    return scale, centre


def frame_points(template: str, height: int, width: int, across: int, down: int) -> Complexes:
    """[5] where a template's landmarks lie in a picture of `across` x `down` pixels whose middle is taken as it is for
    an output of `height` x `width`; in coordinates where pixel i covers [i, i + 1)."""
    scale = min(across / width, down / height)
    return np.asarray(complex(across / 2, down / 2) + scale * _target(template, width, height))


@lru_cache(maxsize=8)
def _target(template: str, width: int, height: int) -> Complexes:
    """The template's points in output pixels, from the output's centre."""
    frame = TEMPLATES[template]
    points = np.array([complex(x + 0.5, y + 0.5) for x, y in frame.points])
    scale = max(width / frame.width, height / frame.height)
    return np.asarray((points - complex(frame.width / 2, frame.height / 2)) * scale)


def _centred(
    index: FaceIndex, rows: NDArray[np.int64], image: ImageSpec, sizes: NDArray[Any] | None
) -> tuple[Complexes, Complexes]:
    """The largest frame of the output's shape in the middle of each picture."""
    if sizes is None:
        sizes = np.stack([index.widths[rows], index.heights[rows]], 1)
        sizes = np.where(index.orientations[rows, None] >= 5, sizes[:, ::-1], sizes)
    if not sizes.all():
        row = int(rows[np.argmin(sizes.all(1))])
        raise ValueError(f"the size of {index.path(row)} (row {row}) is unknown; scan the index first")
    height, width = image.shape
    scale = np.minimum(sizes[:, 0] / width, sizes[:, 1] / height)
    return scale.astype(np.complex128), sizes[:, 0] / 2 + 1j * (sizes[:, 1] / 2)


@lru_cache(maxsize=8)
def _color_basis(image: ImageSpec) -> Floats:
    """[5, 12]: the 3x4 colour matrices of luma, chroma, chroma turned by a right angle, mid grey, and normalisation.

    Hue turns the I-Q plane of YIQ, which is linear; luma and mid grey stay, so the order of the steps is free.
    """
    yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    luma = np.ones((3, 1)) * yiq[0]
    turned = np.linalg.inv(yiq) @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ yiq
    basis = np.zeros((5, 3, 4))
    basis[0, :, :3], basis[1, :, :3], basis[2, :, :3] = luma, np.eye(3) - luma, turned
    basis[3, :, 3] = 127.5
    if image.color == "bgr":
        basis = basis[:, ::-1]
    basis[4, :, 3] = -np.array(image.mean)
    return np.asarray((basis / np.array(image.std)[:, None]).reshape(5, 12))


def _erased(uniforms: Floats, augment: AugmentSpec, width: int, height: int) -> NDArray[np.int32]:
    """Random erasing (Zhong et al. 2017): int32 [B, 4]; height / width is log-uniform in [0.3, 1 / 0.3] where it
    fits."""
    hit, area, ratio, left, top = uniforms[:5]
    erase = np.zeros((len(hit), 4), np.int32)
    chosen = np.flatnonzero(hit < augment.erase)
    if not chosen.size:
        return erase
    low, high = augment.erase_area
    pixels = (low + (high - low) * area[chosen]) * (width * height)
    aspect = np.clip(0.3 ** (1 - 2 * ratio[chosen]), pixels / width**2, height**2 / pixels)
    w = np.rint(np.sqrt(pixels / aspect)).clip(1, width)
    h = np.rint(np.sqrt(pixels * aspect)).clip(1, height)
    x, y = np.floor(left[chosen] * (width - w + 1)), np.floor(top[chosen] * (height - h + 1))
    erase[chosen] = np.stack([x, y, x + w, y + h], 1)
    return erase
