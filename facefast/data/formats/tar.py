"""The members of a plain tar file, every byte of it accounted for.

Python's tarfile ends without a word where a header in the middle is damaged, and at the first of two joined files.
Here each header's checksum is verified, and nothing but zeros may follow the end mark. Formats: POSIX.1-2017, pax
(ustar and its extended headers), and GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from facefast.runtime.exits import DataError
from facefast.runtime.untrusted import open_regular

BLOCK = 512
LONGEST_NAME = 1 << 16
"""Bytes of a header that only tells another's name or facts; a longer one is refused unread."""
FILE, FOLDER, LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"07\0", b"5", b"L", b"K", b"xX", b"g"


class Member(NamedTuple):
    """What a header tells: the name as the file system would have it, "" for `odd` if it is a plain file or a folder,
    and where its bytes are."""

    name: str
    odd: str
    is_file: bool
    offset: int
    size: int


class _DamagedTar(Exception):
    """What is wrong, and at which byte."""


def members(path: Path) -> Iterator[Member]:
    """The members in order.

    Raises:
        DataError: the file is no plain tar file, damaged, cut, or goes on after its end.
    """
    try:
        with open_shard(path) as file:
            yield from _members(file, os.fstat(file.fileno()).st_size)
    except (_DamagedTar, OSError) as error:
        raise DataError(
            f"{path} is damaged or no plain tar file ({error}); take a whole copy, write joined files apart, and "
            "decompress one that is compressed: pictures are read in place"
        ) from error


def open_shard(path: Path) -> BinaryIO:
    """A file opened for reading; a pipe or a device is never opened.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return open_regular(path)
    except ValueError as error:
        raise DataError(f"{path} is no regular file; give a tar file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give its readers permission") from error


def _members(file: BinaryIO, size: int) -> Iterator[Member]:
    at, name, facts = 0, "", dict[str, str]()
    while True:
        header = _read(file, at, BLOCK)
        if len(header) < BLOCK:
            raise _DamagedTar(f"it ends at byte {at + len(header)} without an end mark" if at else "it is empty or cut")
        if not any(header):
            break
        _verify(header, at)
        kind = header[156:157]
        length = _number(header[124:136], at)
        body, at = at + BLOCK, at + BLOCK + -(-length // BLOCK) * BLOCK
        if body + length > size:
            raise _DamagedTar(f"it ends at byte {size}, in the member that begins at byte {body - BLOCK}")
        if kind in LONG_NAME + LONG_LINK + PAX + PAX_GLOBAL:
            if length > LONGEST_NAME:
                raise _DamagedTar(f"the name or the facts at byte {body} take {length} bytes, above {LONGEST_NAME}")
            content = _read(file, body, length)
            if kind in PAX:
                facts = _facts(content, body)
            elif kind in PAX_GLOBAL:
                if _facts(content, body).keys() & {"path", "size"}:
                    raise _DamagedTar(f"the header at byte {body - BLOCK} names all members alike")
            elif kind == LONG_NAME:
                name = _text(content)
            continue
        if "size" in facts:
            length = _decimal(facts["size"], body)
            at = body + -(-length // BLOCK) * BLOCK
            if body + length > size:
                raise _DamagedTar(f"it ends at byte {size}, in the member that begins at byte {body - BLOCK}")
        called = facts.get("path") or name or _name(header)
        is_folder = kind in FOLDER or (kind in FILE and called.endswith("/"))
        sparse = any(fact.startswith("GNU.sparse") for fact in facts)
        odd = "" if kind in FILE + FOLDER and not sparse else "is a link or another special file"
        if is_folder or odd:
            at = body if kind in b"123456" else at  # links and folders have no bytes, whatever their size says
        yield Member(called.rstrip("/") if is_folder else called, odd, not (is_folder or odd), body, length)
        name, facts = "", {}
    if name or facts:
        raise _DamagedTar(f"it ends at byte {at} after a name without a member")
    beyond = _first_data(file, at, size)
    if beyond is not None:
        raise _DamagedTar(f"its end mark at byte {at} is followed by something else at byte {beyond}")


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _verify(header: bytes, at: int) -> None:
    stored = _number(header[148:156], at)
    rest = header[:148] + b" " * 8 + header[156:]
    if stored != sum(rest) and stored != sum(byte - 256 if byte > 127 else byte for byte in rest):  # as some old ones
        raise _DamagedTar(f"the header at byte {at} has a wrong checksum")


def _number(field: bytes, at: int) -> int:
    """Octal digits, or GNU's binary with the highest bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _DamagedTar(f"the header at byte {at} has {field!r} for a number")
    return int(digits, 8)


def _decimal(text: str, at: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _DamagedTar(f"the facts before byte {at} have {text[:30]!r} for a size")
    return int(text)


def _facts(content: bytes, at: int) -> dict[str, str]:
    """The records "length key=value\\n" of a pax header, of which the last of a key counts (POSIX)."""
    facts, begin = {}, 0
    while begin < len(content):
        digits, blank, _ = content[begin : begin + 20].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = content[begin + len(digits) + 1 : begin + length]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n" or begin + length > len(content):
            raise _DamagedTar(f"the facts at byte {at + begin} cannot be read")
        facts[_text(key)] = _text(value)
        begin += length
    return facts


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _first_data(file: BinaryIO, at: int, size: int) -> int | None:
    """The place of the first byte that is not zero, holes of a sparse file left unread."""
    while at < size:
        try:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:  # nothing but a hole
            return None
        part = _read(file, at, 1 << 20)
        found = len(part) - len(part.lstrip(b"\0"))
        if found < len(part):
            return at + found
        at += max(len(part), 1)
    return None
