"""Encoded pictures broken in every way that the scan must report, and odd ones that it must let pass."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image

from tests.support.pictures import encode, exif, odd_pictures, pnm, smooth_picture, tiff

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    """A PNG chunk; `damage` flips bits of its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damage)


def png_header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    """The beginning of a PNG up to its first chunk after IHDR."""
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def exif_segment(orientation: int, order: bytes = b"II", kind: int = 3) -> bytes:
    """A JPEG APP1 segment whose EXIF holds an orientation of TIFF type `kind` in one byte order."""
    tiff = exif_block(orientation, order, kind)
    return b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(tiff)) + b"Exif\0\0" + tiff


def exif_block(orientation: int, order: bytes = b"II", kind: int = 3) -> bytes:
    """EXIF without a prefix."""
    end = "<" if order == b"II" else ">"
    value = struct.pack(f"{end}HH", orientation, 0) if kind == 3 else struct.pack(f"{end}I", orientation)
    entry = struct.pack(f"{end}HHI", 0x112, kind, 1) + value
    return order + struct.pack(f"{end}HIH", 42, 8, 1) + entry + bytes(4)


def jpeg() -> bytes:
    """A sound picture of 120 x 90."""
    return encode(smooth_picture(90, 120))


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with other bytes at one place."""
    return data[:at] + new + data[at + len(new) :]


def frame(data: bytes) -> int:
    """Where a baseline JPEG's frame header begins."""
    return data.index(b"\xff\xc0")


def without(data: bytes, marker: bytes) -> bytes:
    """A JPEG without the segments of one marker before its scan."""
    while (at := data.find(marker, 0, data.index(b"\xff\xda"))) >= 0:
        data = data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]
    return data


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a WebP file."""
    chunks, at = {}, 12
    while at + 8 <= len(data):
        length = struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunks[data[at : at + 4]] = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return chunks


def bmp(bits: int, compression: int, pixels: bytes, width: int = 8, height: int = 8) -> bytes:
    """A BMP of one kind, with a grey palette where it needs one."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(1 << bits)) if bits <= 8 else b""
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(pixels), 0, 0, len(palette) // 4, 0
    )
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels


def animated(kind: str) -> bytes:
    """Two frames."""
    frames = [Image.fromarray(smooth_picture(90, 120, seed)) for seed in (0, 1)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def faulty_pictures() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, reason)."""
    photo = jpeg()
    picture = Image.fromarray(smooth_picture(90, 120))
    png, webp, rgb_tiff = encode(picture, "PNG"), encode(picture, "WEBP"), encode(picture, "TIFF")
    rgb, grey = np.asarray(picture), np.asarray(picture.convert("L"))
    cmyk = np.asarray(picture.convert("CMYK"))
    deep, rgba = rgb.astype(np.uint16) * 257, np.dstack([rgb, grey])
    cmyk_jpeg = encode(picture.convert("CMYK"))
    progressive = encode(picture, progressive=True)
    sof, sos, idat = frame(photo), photo.index(b"\xff\xda"), png.index(b"IDAT")
    dqt, dht = photo.index(b"\xff\xdb"), photo.index(b"\xff\xc4")
    scan = photo[sos:-2]
    exif_webp = webp_chunks(encode(picture, "WEBP", exif=exif(6)))
    odd_chunk = exif_webp[b"VP8 "] + b"\0" * (1 - len(exif_webp[b"VP8 "]) % 2)
    wide = struct.pack(">HH", 65500, 65500)
    palette = encode(picture.quantize(16), "PNG")
    plte = palette.index(b"PLTE")
    after = plte + 8 + struct.unpack(">I", palette[plte - 4 : plte])[0]
    damaged, truncated, nothing = "damaged header", "truncated", "no picture data"
    variant, colors = "unsupported: variant of its format", "unsupported: colour layout"
    levels = "unsupported: greatest value of PNM other than 255 and 65535"
    return {
        "zero bytes": (b"", "empty file"),
        "garbage": (np.random.default_rng(0).bytes(5000), "not a picture"),
        "html": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "not a picture"),
        "avi": (b"RIFF\x10\0\0\0AVI LIST" + bytes(64), "not a picture"),
        "jpeg half": (photo[: len(photo) // 2], truncated),
        "jpeg 90 %": (photo[: len(photo) * 9 // 10], truncated),
        "jpeg without its last byte": (photo[:-1], truncated),
        "jpeg header only": (photo[:sos], truncated),
        "jpeg zeros for its end": (photo[: len(photo) // 2] + bytes(len(photo) // 2), truncated),
        "jpeg with a whole thumbnail, cut": (
            (encode(picture, exif=_with_thumbnail(photo)))[: len(photo) * 3 // 2],
            truncated,
        ),
        "progressive jpeg half": (progressive[: len(progressive) // 2], truncated),
        "jpeg height 0": (patched(photo, sof + 5, b"\0\0"), "zero width or height"),
        "jpeg width 0": (patched(photo, sof + 7, b"\0\0"), "zero width or height"),
        "jpeg bomb": (patched(photo, sof + 5, wide), "too many pixels"),
        "jpeg too wide for libjpeg": (
            patched(photo, sof + 5, struct.pack(">HH", 8, 65501)),
            "too many pixels",
        ),
        "jpeg 12 bit": (patched(photo, sof + 4, b"\x0c"), variant),
        "jpeg lossless": (patched(photo, sof, b"\xff\xc3"), variant),
        "jpeg sampling 0": (patched(photo, sof + 11, b"\x00"), damaged),
        "jpeg table of component undefined": (patched(photo, sof + 12, b"\x03"), damaged),
        "jpeg frame twice": (photo[:sof] + photo[sof : sof + 19] + photo[sof:], damaged),
        "jpeg frame length": (patched(photo, sof + 2, b"\0\x14"), damaged),
        "jpeg scan of unknown component": (patched(photo, sos + 5, b"\x09"), damaged),
        "jpeg quantisation table 7": (patched(photo, dqt + 4, b"\x07"), damaged),
        "jpeg too many codes": (patched(photo, dht + 5, b"\xff" * 16), damaged),
        "jpeg without quantisation": (without(photo, b"\xff\xdb"), damaged),
        "jpeg junk between segments": (photo[:20] + b"abc" + photo[20:], damaged),
        "jpeg begun twice": (photo[:2] + photo, damaged),
        "jpeg without scan": (photo[:sos] + b"\xff\xd9", nothing),
        "jpeg empty scan": (photo[: sos + 14] + b"\xff\xd9", nothing),
        "jpeg scan bomb": (photo[:sos] + scan * 257 + b"\xff\xd9", "too many scans"),
        "jpeg exif conflict": (
            photo[:2] + exif_segment(1) + exif_segment(6) + photo[2:],
            "EXIF blocks disagree on orientation",
        ),
        "png half": (png[: len(png) // 2], truncated),
        "png without end": (png[:-12], truncated),
        "png header only": (png[:33], truncated),
        "png corrupt": (patched(png, len(png) // 2, b"\x55\xaa\x55\xaa"), "checksum mismatch"),
        "png corrupt header": (patched(png, 18, b"\x7f"), "checksum mismatch"),
        "png corrupt text": (
            png[:33] + chunk(b"tEXt", b"a\0b", 1) + png[33:],
            "checksum mismatch",
        ),
        "png bomb": (png_header(60000, 60000) + png[33:], "too many pixels"),
        "png width 0": (png_header(0, 90) + png[33:], "zero width or height"),
        "png depth 3": (png_header(120, 90, depth=3) + png[33:], damaged),
        "png unknown critical chunk": (png[:33] + chunk(b"ABCD", b"x") + png[33:], damaged),
        "png without pixels": (png[: idat - 4] + chunk(b"IEND", b""), nothing),
        "png without palette": (palette[: plte - 4] + palette[after:], nothing),
        "webp half": (webp[: len(webp) // 2], truncated),
        "webp 90 %": (webp[: len(webp) * 9 // 10], truncated),
        "webp of another size": (
            riff((b"VP8X", bytes(4) + b"\x01\0\0\x01\0\0"), *webp_chunks(webp).items()),
            damaged,
        ),
        "webp without pixels": (riff((b"VP8X", bytes(10))), nothing),
        "webp damaged frame": (riff((b"VP8 ", bytes(20))), damaged),
        "webp animated": (animated("WEBP"), "unsupported: animated WebP"),
        "webp odd chunk before exif": (
            riff((b"VP8X", exif_webp[b"VP8X"]), (b"VP8 ", odd_chunk), (b"EXIF", exif_webp[b"EXIF"])),
            "unsupported: EXIF layout of WebP",
        ),
        "webp promises exif": (
            riff((b"VP8X", exif_webp[b"VP8X"]), (b"VP8 ", exif_webp[b"VP8 "])),
            "unsupported: EXIF layout of WebP",
        ),
        "bmp half": (encode(picture, "BMP")[:5000], truncated),
        "bmp run lengths": (bmp(8, 1, b"\x08\x10\0\0" * 8 + b"\0\1"), variant),
        "bmp width 0": (bmp(24, 0, bytes(192), width=0), "zero width or height"),
        "tiff half": (rgb_tiff[: len(rgb_tiff) // 2], truncated),
        "tiff of floats": (encode(picture.convert("F"), "TIFF"), variant),
        "tiff of bits": (encode(picture.convert("1"), "TIFF"), variant),
        "big tiff": (encode(picture, "TIFF", big_tiff=True), "unsupported: other format"),
        "tiff that begins with a thumbnail": (tiff(rgb, 2, subfile=1), variant),
        "lab tiff": (tiff(rgb, 8), colors),
        "icc lab tiff": (tiff(rgb, 9), colors),
        "ycbcr tiff": (tiff(rgb, 6), colors),
        "tiff of a camera's sensor": (tiff(grey[..., None], 32803), colors),
        "inverted 16-bit grey tiff": (tiff(deep[..., :1], 0), colors),
        "grey tiff with alpha": (tiff(rgba[..., :2], 1, extra=2), colors),
        "16-bit palette tiff": (tiff(deep[..., :1], 3), colors),
        "16-bit cmyk tiff": (tiff(cmyk.astype(np.uint16) * 257, 5), colors),
        "tiff with premultiplied alpha": (tiff(rgba, 2, extra=1), colors),
        "tiff of five samples": (tiff(np.dstack([rgba, grey]), 2), colors),
        "tiff with alpha in planes": (tiff(rgba, 2, extra=2, planar=True), colors),
        "16-bit tiff in planes": (tiff(deep, 2, planar=True), colors),
        "cmyk jpeg without Adobe's mark": (without(cmyk_jpeg, b"\xff\xee"), colors),
        "bmp of other masks": (
            patched(bmp(32, 3, struct.pack("<III", 0xFF, 0xFF00, 0xFF0000) + bytes(256)), 10, b"\x42"),
            colors,
        ),
        **{f"pgm of {greatest}": (pnm(grey, greatest), levels) for greatest in (1, 15, 254, 256, 1023, 65534)},
        "ppm of 100": (pnm(rgb, 100), levels),
        "pgm short": (b"P5\n4 4\n255\n" + bytes(15), truncated),
        "pgm of words": (b"P5\nfour 4\n255\n" + bytes(16), damaged),
        "gif": (encode(picture, "GIF"), "unsupported: GIF"),
        "avif": (encode(picture, "AVIF"), "unsupported: AVIF"),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "unsupported: HEIC"),
        "jpeg 2000": (encode(picture, "JPEG2000"), "unsupported: JPEG 2000"),
        "jpeg xl": (b"\xff\x0a" + bytes(64), "unsupported: JPEG XL"),
        "icon": (encode(picture, "ICO"), "unsupported: other format"),
    }


def sound_pictures() -> dict[str, tuple[bytes, str, int, int, int]]:
    """name -> (bytes, kind, width, height, orientation) of pictures that look odd and are fine."""
    photo, picture = jpeg(), Image.fromarray(smooth_picture(90, 120))
    png = encode(picture, "PNG")
    exif_webp = webp_chunks(encode(picture, "WEBP", exif=exif(6)))
    plain = exif_segment(6).replace(b"\x12\x01", b"\x13\x01")  # EXIF without an orientation
    odd = {
        name: (data, name_kind(name), 120, 90, int(name[-1]) if "exif" in name else 1)
        for name, data in odd_pictures().items()
    }
    more = {
        "jpeg with trailing junk": (photo + b"junk" * 100, "jpeg", 1),
        "jpeg with fill bytes": (photo[:2] + b"\xff" * 5 + photo[2:], "jpeg", 1),
        "jpeg without huffman tables": (without(photo, b"\xff\xc4"), "jpeg", 1),
        "jpeg big-endian exif": (photo[:2] + exif_segment(8, b"MM") + photo[2:], "jpeg", 8),
        "jpeg exif of type LONG": (photo[:2] + exif_segment(6, b"II", 4) + photo[2:], "jpeg", 6),
        "jpeg exif 0": (photo[:2] + exif_segment(0) + photo[2:], "jpeg", 1),
        "jpeg exif 9": (photo[:2] + exif_segment(9) + photo[2:], "jpeg", 1),
        "jpeg two agreeing exif": (photo[:2] + exif_segment(6) * 2 + photo[2:], "jpeg", 6),
        "jpeg one empty exif": (photo[:2] + plain + exif_segment(3) + photo[2:], "jpeg", 3),
        "jpeg exif cut short": (photo[:2] + b"\xff\xe1\0\x10Exif\0\0II*\0\x08\0\0\0" + photo[2:], "jpeg", 1),
        "jpeg with whole thumbnail": (encode(picture, exif=_with_thumbnail(photo)), "jpeg", 1),
        "png exif": (png[:33] + chunk(b"eXIf", exif_block(5, b"MM")) + png[33:], "png", 5),
        "png exif with a prefix": (png[:33] + chunk(b"eXIf", b"Exif\0\0" + exif_block(5)) + png[33:], "png", 1),
        "png with trailing junk": (png + b"junk", "png", 1),
        "animated png": (animated("PNG"), "png", 1),
        "webp exif not announced": (
            riff((b"VP8X", b"\0" + exif_webp[b"VP8X"][1:]), *[(k, exif_webp[k]) for k in (b"VP8 ", b"EXIF")]),
            "webp",
            1,
        ),
        "tiff turned": (encode(picture, "TIFF", tiffinfo={274: 6}), "tiff", 6),
    }
    return odd | {name: (data, kind, 120, 90, turn) for name, (data, kind, turn) in more.items()}


def name_kind(name: str) -> str:
    """The format that a name of `odd_pictures` speaks of."""
    kinds = {"tiff": "tiff", "jpeg": "jpeg", "png": "png", "webp": "webp", "bmp": "bmp"}
    kinds |= dict.fromkeys(("pgm", "ppm", "pbm"), "pnm")
    return next(kind for word, kind in kinds.items() if word in name)


def _with_thumbnail(thumbnail: bytes) -> bytes:
    """EXIF with a whole JPEG inside, whose end marker is not the picture's."""
    return b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(4) + thumbnail
