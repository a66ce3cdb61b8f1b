"""Indexes and encoded pictures that several tests need: odd formats, damaged files, a folder of drawn photographs."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facefast.data.index import FaceIndex


def make_index(
    root: str | Path,
    names: list[str],
    sizes: NDArray[np.int64] | tuple[int, int] = (0, 0),
    landmarks: NDArray[np.float32] | None = None,
    orientations: int | NDArray[np.uint8] = 1,
    labels: NDArray[np.int32] | None = None,
    offsets: NDArray[np.int64] | None = None,
    lengths: NDArray[np.int64] | None = None,
    faults: NDArray[np.uint8] | None = None,
) -> FaceIndex:
    """An index of files under `root`; `sizes` are (width, height) as stored in the files."""
    number = len(names)
    widths, heights = np.broadcast_to(np.array(sizes, np.int32), (number, 2)).T
    labels = np.arange(number, dtype=np.int32) % 4 if labels is None else labels
    whole = np.full(number, -1, np.int64)
    return FaceIndex(
        root=str(root),
        paths=np.array([name.encode() for name in names], dtype="S"),
        offsets=whole if offsets is None else offsets,
        lengths=whole if lengths is None else lengths,
        labels=labels,
        class_names=tuple(f"person {i}" for i in range(labels.max() + 1)),
        splits=np.zeros(number, np.uint8),
        widths=widths.copy(),
        heights=heights.copy(),
        orientations=np.broadcast_to(np.uint8(orientations), number).copy(),
        hashes=np.zeros((number, 2), np.uint64),
        faults=np.zeros(number, np.uint8) if faults is None else faults,
        landmarks=landmarks,
        attributes=None,
        attribute_names=(),
    )


def smooth_picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A colourful picture without hard edges: uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(picture: NDArray[np.uint8] | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    if kind in ("JPEG", "WEBP"):
        options = {"quality": 92, **options}
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG of [H, W, C] values with 1 to 4 channels, which Pillow cannot write."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def exif(orientation: int) -> bytes:
    """An EXIF block that holds nothing but an orientation."""
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags.tobytes()


def odd_pictures() -> dict[str, bytes]:
    """One file of every kind that both decoders must read alike."""
    rgb = smooth_picture(90, 120)
    picture = Image.fromarray(rgb)
    alpha = np.tile(np.linspace(0, 255, 120, dtype=np.uint8), (90, 1))
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    deep = rgb.astype(np.uint16) * 257 - np.uint16(100) * (rgb > 0)
    palette = picture.quantize(64)
    kinds = {
        "jpeg": encode(rgb),
        "progressive jpeg": encode(rgb, progressive=True),
        "jpeg 4:4:4": encode(rgb, subsampling=0),
        "grey jpeg": encode(picture.convert("L")),
        "cmyk jpeg": encode(picture.convert("CMYK")),
        "png": encode(rgb, "PNG"),
        "grey png": encode(picture.convert("L"), "PNG"),
        "palette png": encode(palette, "PNG"),
        "palette png with transparency": encode(palette, "PNG", transparency=bytes(range(64))),
        "png with alpha": encode(rgba, "PNG"),
        "grey png with alpha": encode(rgba.convert("LA"), "PNG"),
        "1-bit png": encode(picture.convert("1"), "PNG"),
        "16-bit grey png": png16(deep[..., :1]),
        "16-bit grey png with alpha": png16(np.dstack([deep[..., :1], alpha])),
        "16-bit png": png16(deep),
        "16-bit png with alpha": png16(np.dstack([deep, alpha.astype(np.uint16) * 257])),
        "webp": encode(rgb, "WEBP"),
        "lossless webp": encode(rgb, "WEBP", lossless=True),
        "webp with alpha": encode(rgba, "WEBP"),
        "bmp": encode(rgb, "BMP"),
        "palette bmp": encode(palette, "BMP"),
        "png with exif 6": encode(rgb, "PNG", exif=exif(6)),
        "webp with exif 6": encode(rgb, "WEBP", exif=exif(6)),
    }
    kinds.update({f"jpeg with exif {i}": encode(rgb, exif=exif(i)) for i in range(1, 9)})
    return kinds


def garbled_jpeg() -> bytes:
    """A JPEG with sound markers, size and end, whose Huffman tables make no sense."""
    data = bytearray(encode(smooth_picture(90, 120)))
    at = data.index(b"\xff\xc4")
    data[at + 5 : at + 21] = b"\xff" * 16  # more codes of every length than there can be
    return bytes(data)


def garbled_png() -> bytes:
    """A PNG with sound chunks and checksums around data that zlib refuses."""
    data = encode(smooth_picture(90, 120), "PNG")
    at = data.index(b"IDAT")
    length: int = struct.unpack(">I", data[at - 4 : at])[0]
    body = b"IDAT" + b"\x78\x9c" + b"\xff" * (length - 2)
    return data[:at] + body + struct.pack(">I", zlib.crc32(body)) + data[at + 8 + length :]
