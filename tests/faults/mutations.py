"""Damage to files: deterministic, drawn from a generator, blind to formats or aware of their lengths and checksums."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

from numpy.random import Generator

Mutation = Callable[[bytearray, Generator, Sequence[bytes]], bytearray]
NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 1 << 24, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 33)
TEXTS = (
    b"0", b"-1", b"99999999999999999999", b"1e400", b"nan", b"inf", b"../../etc/passwd", b"/dev/zero", b"\0",
    b"\xff\xfe",
    b"\n", b"\r", b'"', b",", b"[" * 3000, b"{" * 3000, b"9" * 5000, b"null", b"true", b"[]", b"{}",
    b"0x10", b"1_0", b"''",
)  # fmt: skip


def flip_bits(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    for at in rng.integers(len(data), size=rng.integers(1, 9)).tolist():
        data[at] ^= 1 << int(rng.integers(8))
    return data


def set_bytes(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    for at in rng.integers(min(len(data), int(rng.choice([64, 1024, 1 << 30]))), size=rng.integers(1, 5)).tolist():
        data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
    return data


def truncate(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    return data[: int(rng.integers(len(data)))]


def remove_run(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    begin, end = _run(data, rng)
    del data[begin:end]
    return data


def repeat_run(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    begin, end = _run(data, rng)
    data[end:end] = data[begin:end] * int(rng.choice([1, 2, 100]))
    return data


def insert_run(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    at = int(rng.integers(len(data) + 1))
    data[at:at] = bytes([int(rng.choice([0, 0x20, 0x28, 0x5B, 0xFF, int(rng.integers(256))]))]) * int(
        rng.choice([1, 7, 512, 1 << 16])
    )
    return data


def splice(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    other = seeds[int(rng.integers(len(seeds)))]
    begin, end = _run(other, rng)
    at, until = _run(data, rng)
    data[at:until] = other[begin:end]
    return data


def change_number(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    width = int(rng.choice([1, 2, 4, 8]))
    if len(data) > width:
        at = int(rng.integers(min(len(data) - width, int(rng.choice([64, 1024, 1 << 30])))))
        order = "little" if rng.integers(2) else "big"
        value = int(rng.choice(NUMBERS))
        if rng.integers(3) == 0:  # one more or less than it was
            value = int.from_bytes(data[at : at + width], order) + int(rng.choice([-1, 1]))  # type: ignore[arg-type]
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
    return data


def change_word(data: bytearray, rng: Generator, seeds: Sequence[bytes]) -> bytearray:
    words = list(re.finditer(rb"[A-Za-z_]+|-?[0-9][0-9.e+-]*", bytes(data[: 1 << 16])))
    if words:
        word = words[int(rng.integers(len(words)))]
        data[word.start() : word.end()] = TEXTS[int(rng.integers(len(TEXTS)))]
    return data


BLIND: tuple[Mutation, ...] = (
    flip_bits, set_bytes, truncate, remove_run, repeat_run, insert_run, splice, change_number, change_number,
    change_word,
)  # fmt: skip


def _run(data: bytes | bytearray, rng: Generator) -> tuple[int, int]:
    begin = int(rng.integers(len(data) + 1))
    length = int(rng.integers(1, int(rng.choice([4, 64, 4096])) + 1))
    return begin, min(len(data), begin + length)


def mutate(data: bytes, rng: Generator, seeds: Sequence[bytes]) -> bytes:
    """One to three of the blind mutations."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not changed:
            break
        changed = BLIND[int(rng.integers(len(BLIND)))](changed, rng, seeds)
    return bytes(changed)


# Formats with checksums would refuse nearly all of it at the door: here the parts are damaged and put together anew.


def inside_zip(data: bytes, rng: Generator, seeds: Sequence[bytes]) -> bytes:
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.integers(2) else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        members = old.infolist()
        chosen = int(rng.integers(len(members)))
        for place, member in enumerate(members):
            content = old.read(member)
            if place == chosen:
                begin = int(rng.choice([0, 0, min(128, len(content))]))  # the header of an array, or behind it
                end = len(content) if begin or rng.integers(2) else 128
                part = content[begin:end]
                content = content[:begin] + (mutate(part, rng, [part]) if part else part) + content[end:]
            new.writestr(zipfile.ZipInfo(member.filename), content, method)  # without the time of day
    return out.getvalue()


def inside_png(data: bytes, rng: Generator, seeds: Sequence[bytes]) -> bytes:
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    chosen = int(rng.integers(len(chunks)))
    found = data[:8]
    for place, (kind, body) in enumerate(chunks):
        if place == chosen and body:
            body = mutate(body, rng, [body])
        found += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return found


def inside_safetensors(data: bytes, rng: Generator, seeds: Sequence[bytes]) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = mutate(data[8 : 8 + length], rng, [data[8 : 8 + length]])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def inside_tar(data: bytes, rng: Generator, seeds: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = headers[int(rng.integers(len(headers)))]
    header = bytearray(
        mutate(bytes(changed[at : at + 512]), rng, [bytes(changed[at : at + 512])])[:512].ljust(512, b"\0")
    )
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    changed[at : at + 512] = header
    return bytes(changed)


def inside_json(data: bytes, rng: Generator, seeds: Sequence[bytes]) -> bytes:
    """Another value in the place of one, whatever it was."""
    document = json.loads(data)
    values: tuple[object, ...] = (
        0,
        -1,
        20_000_000,
        1 << 70,
        1e308,
        0.5,
        "",
        "../x",
        "timm/resnet18",
        None,
        True,
        [],
        {},
        [[]],
        "\ud800",
    )
    places: list[tuple[object, object]] = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(inner, dict | list):
                waiting.append(inner)
    for _ in range(int(rng.integers(1, 3))):
        container, key = places[int(rng.integers(len(places)))]
        container[key] = values[int(rng.integers(len(values)))]  # type: ignore[index]
    return json.dumps(document).encode()
