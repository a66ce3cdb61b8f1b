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


def pnm(values: NDArray[np.uint8], greatest: int = 255) -> bytes:
    """A PGM of [H, W] or a PPM of [H, W, 3] values of 255, rewritten for another greatest value."""
    scaled = np.rint(values / 255 * greatest).astype(">u2" if greatest > 255 else "u1")
    kind = 6 if values.ndim == 3 else 5
    return b"P%d\n%d %d\n%d\n" % (kind, values.shape[1], values.shape[0], greatest) + scaled.tobytes()


def tiff(
    samples: NDArray[np.uint8] | NDArray[np.uint16],
    photometric: int,
    *,
    extra: int | None = None,
    planar: bool = False,
    subfile: int = 0,
) -> bytes:
    """An uncompressed little-endian TIFF of [H, W, C] samples that are said to mean `photometric`."""
    height, width, channels = samples.shape
    strips = channels if planar else 1
    data = (samples.transpose(2, 0, 1) if planar else samples).astype(samples.dtype.newbyteorder("<")).tobytes()
    short, long = "H", "I"
    tags: dict[int, tuple[str, list[int]]] = {
        254: (long, [subfile]), 256: (long, [width]), 257: (long, [height]),
        258: (short, [8 * samples.itemsize] * channels), 259: (short, [1]), 262: (short, [photometric]),
        273: (long, [0] * strips), 277: (short, [channels]), 278: (long, [height]),
        279: (long, [len(data) // strips] * strips), 284: (short, [2 if planar else 1]),
    }  # fmt: skip
    if extra is not None:
        tags[338] = (short, [extra])
    values_at = 8 + 2 + 12 * len(tags) + 4
    lengths = {tag: struct.calcsize(f"<{len(values)}{kind}") for tag, (kind, values) in tags.items()}
    data_at = values_at + sum(length for length in lengths.values() if length > 4)
    tags[273] = (long, [data_at + k * len(data) // strips for k in range(strips)])
    directory = outside = b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", values_at + len(outside))
        outside += packed if len(packed) > 4 else b""
        directory += struct.pack("<HHI", tag, 3 if kind == short else 4, len(values)) + place
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory + bytes(4) + outside + data


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
    grey = np.asarray(picture.convert("L"))
    cmyk = np.asarray(picture.convert("CMYK"))
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
        "pgm": pnm(grey),
        "ppm": pnm(rgb),
        "16-bit pgm": pnm(grey, 65535),
        "16-bit ppm": pnm(rgb, 65535),
        "pbm": encode(picture.convert("1"), "PPM"),
        "tiff": encode(rgb, "TIFF"),
        "lzw tiff": encode(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg in tiff": encode(rgb, "TIFF", compression="jpeg"),
        "grey tiff": tiff(grey[..., None], 1),
        "inverted grey tiff": tiff(grey[..., None], 0),
        "16-bit grey tiff": tiff(deep[..., :1], 1),
        "palette tiff": encode(palette, "TIFF"),
        "16-bit tiff": tiff(deep, 2),
        "tiff with alpha": tiff(np.array(rgba), 2, extra=2),
        "16-bit tiff with alpha": tiff(np.dstack([deep, alpha]), 2, extra=2),
        "tiff in planes": tiff(rgb, 2, planar=True),
        "cmyk tiff": tiff(cmyk, 5),
        "cmyk tiff in planes": tiff(cmyk, 5, planar=True),
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


def as_taken(celeba: Path, count: int = 6) -> tuple[list[Path], NDArray[np.float32]]:
    """Photographs as they were taken, from CelebA's own folder of them, and the landmarks [N, 5, 2] that another
    detector found on them."""
    lines = (celeba / "list_landmarks_celeba.txt").read_text().splitlines()[2 : 2 + count]
    paths = [celeba / "img_celeba" / line.split()[0] for line in lines]
    return paths, np.array([line.split()[1:] for line in lines], np.float32).reshape(-1, 5, 2)
