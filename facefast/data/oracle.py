"""The readable picture path: decode, filter, colour and erase in PIL and numpy, from the same numbers as the native
one, which is held against it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from facefast.data.augment import Draw, draw
from facefast.data.index import FaceIndex
from facefast.data.together import Encoded
from facefast.recipe import AugmentSpec, ImageSpec, Reading
from facefast.runtime.untrusted import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""What both decoders read; PIL alone would try dozens of formats, and their parsers' faults."""

LARGEST = 1 << 27
"""Bytes of an encoded picture."""
Picture = NDArray[np.uint8]


def decode(source: bytes | str | os.PathLike[str], max_pixels: int = Reading.max_pixels, least: int = 0) -> Picture:
    """A file, or its bytes, as uint8 [H, W, 3] RGB as DALI gives it: upright by EXIF, alpha dropped, 16 bits rounded
    to 8.

    With `least`, a large JPEG comes at a half, a quarter or an eighth of its size, as long as its long side keeps so
    many pixels: that takes a fraction of the time.

    Raises:
        ValueError: the file cannot be read, is no picture, is damaged, or has more than `max_pixels` pixels.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as encoded,
            Image.open(encoded, formats=FORMATS) as file,
        ):
            if file.width * file.height > max_pixels:  # from the header: nothing has been decoded yet
                raise ValueError(f"{file.width} x {file.height} pixels, more than the {max_pixels} allowed")
            if least and max(file.size) > least:
                # A size above the file's own in neither direction: libjpeg takes the next that is at least as large.
                part = least / max(file.size)
                file.draft(None, (math.ceil(file.width * part), math.ceil(file.height * part)))
            picture = ImageOps.exif_transpose(file)
            deep_pnm = picture.mode == "I" and file.format == "PPM"
            if picture.mode.startswith("I;16") or deep_pnm:  # 16-bit grey, which PIL would clip at 255
                values = np.rint(np.asarray(picture, np.float64) / 257).astype(np.uint8)
                return np.repeat(values[..., None], 3, axis=2)
            if "transparency" in picture.info:  # PIL warns where a palette loses it on the way to RGB
                picture = picture.convert("RGBA")
            return np.array(picture.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # a damaged picture makes Pillow's parsers raise nearly anything
        raise ValueError(f"cannot decode {name}: {error}") from error


def apply(
    picture: Picture,
    matrix: NDArray[np.float32],
    color: NDArray[np.float32],
    erase: NDArray[np.int32],
    image: ImageSpec,
) -> Tensor:
    """One row of a `Draw` applied to its picture: float32 [3, H, W], what the native operator computes.

    Per source axis, one output pixel steps over R = max(1, length of the matrix row) pixels. The filter is a tent of
    radius R, which is bilinear interpolation at R = 1; from R = 4 on, means over blocks of floor(R / 2) pixels, rounded
    to bytes, come first. Outside the picture is black.

    Args:
        picture: uint8 [h, w, 3], upright RGB.
        matrix, color, erase: [2, 3], [3, 4] and [4], as in `Draw`.
        image: the output's size.
    """
    height, width = image.shape
    linear = matrix.astype(np.float64)
    # Never below 1: enlarging is plain interpolation, and a rotation alone must not blur.
    steps = np.maximum(1.0, np.hypot(linear[:, 0], linear[:, 1]))
    blocks = np.where(steps < 4, 1, steps // 2).astype(int)
    reduced = _block_means(picture, blocks[0], blocks[1])

    y, x = np.mgrid[:height, :width] + 0.5  # centres of output pixels
    column, column_weight = _taps(linear[0], x, y, steps[0], blocks[0], reduced.shape[1])
    line, line_weight = _taps(linear[1], x, y, steps[1], blocks[1], reduced.shape[0])
    pixels = reduced.reshape(-1, 3)
    # One line of taps at a time: all of them at once would be T^2 pictures.
    rgb = np.zeros((height, width, 3))
    for j in range(len(line)):
        taps = pixels.take(line[j] * reduced.shape[1] + column, axis=0)  # [T, H, W, 3]
        rgb += np.einsum("thw,thwc->hwc", line_weight[j] * column_weight, taps)

    out = rgb @ color[:, :3].astype(np.float64).T + color[:, 3]
    x0, y0, x1, y1 = erase
    out[y0:y1, x0:x1] = 0
    return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1), dtype=np.float32))


def _block_means(picture: Picture, across: int, down: int) -> NDArray[np.float64]:
    """Means over blocks of the picture, which black pixels complete, rounded half up."""
    # Rounded to whole levels as the operators do, of which the CPU's keeps reduced pictures as bytes.
    height, width = picture.shape[:2]
    if across == down == 1:
        return picture.astype(np.float64)
    padded = np.pad(picture, ((0, -height % down), (0, -width % across), (0, 0)))
    lines = padded.reshape(-1, down, padded.shape[1] * 3).sum(1, dtype=np.float64)
    sums = lines.reshape(len(lines), -1, across, 3).sum(2)
    return np.asarray(np.floor(sums / (across * down) + 0.5))


def _taps(
    row: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    step: float,
    block: int,
    size: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where an axis is read for every output pixel, and how heavily: [T, H, W] each; the weights outside are 0."""
    at = (row[0] * x + row[1] * y + row[2]) / block - 0.5
    radius = step / block
    first = np.floor(at - radius).astype(np.int64) + 1
    taps = first + np.arange(np.ceil(2 * radius), dtype=np.int64)[:, None, None]
    weights = np.maximum(0.0, 1 - np.abs(taps - at) / radius)
    weights /= weights.sum(0)  # over all taps, those outside included: the border fades to black
    return taps.clip(0, size - 1), weights * ((taps >= 0) & (taps < size))


def render(
    index: FaceIndex,
    rows: NDArray[np.int64],
    image: ImageSpec,
    augment: AugmentSpec | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Tensor:
    """What training sees of `rows` in an epoch: float32 [B, 3, H, W], normalised.

    Raises:
        ValueError: a picture cannot be decoded.
    """
    pictures = [decode(read_bytes(index, row)) for row in rows.tolist()]
    return render_pictures(pictures, draw(index, rows, image, augment, seed, epoch, sizes_of(pictures)), image)


def thumbnails(index: FaceIndex, rows: NDArray[np.int64], image: ImageSpec, size: int) -> Picture:
    """Pictures as a model sees them without augmentation, to be looked at: uint8 [B, size, size, 3], RGB; what is not
    square stands on black.

    Raises:
        ValueError: a picture cannot be decoded.
    """
    found = np.zeros((len(rows), size, size, 3), np.uint8)
    for place, row in enumerate(rows.tolist()):
        picture = Image.fromarray(to_picture(render(index, np.array([row]), image), image)[0])
        picture = ImageOps.contain(picture, (size, size))
        left, top = (size - picture.width) // 2, (size - picture.height) // 2
        found[place, top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    return found


def render_pictures(pictures: list[Picture], numbers: Draw, image: ImageSpec) -> Tensor:
    """Decoded pictures with their numbers applied: float32 [B, 3, H, W]."""
    return torch.stack(
        [
            apply(picture, matrix, color, erase, image)
            for picture, matrix, color, erase in zip(pictures, *numbers, strict=True)
        ]
    )


def sizes_of(pictures: list[Picture]) -> NDArray[np.int64]:
    """(width, height) of decoded pictures: int64 [B, 2]."""
    return np.array([picture.shape[1::-1] for picture in pictures], np.int64).reshape(-1, 2)


def read_bytes(index: FaceIndex, row: int) -> bytes:
    """The encoded picture of a row, from a file of its own or from its place in a larger one.

    Raises:
        ValueError: the file cannot be read.
    """
    offset, length = int(index.offsets[row]), int(index.lengths[row])
    try:
        with open_regular(index.path(row)) as file:
            if offset < 0 and os.fstat(file.fileno()).st_size > LARGEST:
                raise ValueError(f"{index.path(row)} has more than the {LARGEST} bytes that a picture may have")
            file.seek(max(offset, 0))
            return file.read(min(length, LARGEST) if length >= 0 else -1)
    except OSError as error:
        raise ValueError(f"cannot read {index.path(row)} (row {row}): {error}") from error


def to_picture(images: Tensor, image: ImageSpec) -> Picture:
    """Normalised pictures [B, 3, H, W] of any dtype and device as uint8 [B, H, W, 3] RGB, to be looked at."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
    values = images.float().cpu() * std + mean
    if image.color == "bgr":
        values = values.flip(1)
    return np.ascontiguousarray(values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


class OracleDecoder:
    """The oracle as a decoder: the reference for the whole loader, and slow."""

    def __init__(
        self,
        image: ImageSpec,
        source: Callable[[], Encoded],
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self._image, self._source = image, source
        self._device, self._dtype = device, dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format

    def run(self) -> Tensor:
        data, numbers, _ = self._source()
        try:
            pictures = [decode(encoded.tobytes()) for encoded in data]
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        images = render_pictures(pictures, numbers, self._image)
        return images.to(self._device, self._dtype, memory_format=self._layout)

    def reset(self) -> None:
        """Nothing is kept between batches."""

    def close(self) -> None:
        """Nothing is held."""
