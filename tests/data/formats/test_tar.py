"""Tar files to the last byte: every way of writing one is read, and every damage is refused."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from facefast.data.formats.tar import members
from facefast.data.formats.webdataset import read_webdataset
from facefast.runtime.exits import DataError

NAMES = ["1.jpg", "folder/2.jpg", "long " * 30 + "/3.jpg", "x" * 120 + ".jpg", "Zoë.jpg"]


def written(path: Path, format: int = tarfile.PAX_FORMAT, names: list[str] = NAMES) -> bytes:
    """A tar file whose members hold their own names."""
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name.encode())
            info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(name.encode()))
    return path.read_bytes()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_names_and_places_are_those_of_pythons_own_reader(tmp_path: Path, format: int) -> None:
    names = NAMES if format != tarfile.USTAR_FORMAT else [name for name in NAMES if len(name) < 100]
    content = written(tmp_path / "a.tar", format, names)
    found = list(members(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.name, m.offset, m.size) for m in found] == [(m.name, m.offset_data, m.size) for m in tar]
    assert [content[m.offset : m.offset + m.size].decode() for m in found if m.is_file] == names
    assert not any(m.odd for m in found)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"M", b"V"]
)
def test_what_is_neither_file_nor_folder_is_told(tmp_path: Path, kind: bytes) -> None:
    odd = tarfile.TarInfo("odd")
    odd.type = kind
    block = odd.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(block + bytes(1024))
    (member,) = members(tmp_path / "a.tar")
    assert member.odd and not member.is_file


def test_a_sparse_file_of_pax_is_told(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.jpg"}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    assert next(members(tmp_path / "a.tar")).odd


def headers(content: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset_data - 512 for member in tar]


def damaged(content: bytes) -> dict[str, bytes]:
    at = headers(content)[3]

    def put(place: int, new: bytes) -> bytes:
        return content[:place] + new + content[place + len(new) :]

    return {
        "noise in a header": put(at, random.Random(0).randbytes(512)),
        "one bit of a header": put(at + 100, bytes([content[at + 100] ^ 1])),
        "a hole of zeros": put(at, bytes(1024)),
        "cut inside a header": content[: at + 100],
        "cut between members": content[:at],
        "cut inside a member": content[: at + 515],
        "two in one": content + content,
        "bytes after the end": content + b"more",
        "bytes after a hole": content + bytes(1 << 20) + b"x",
        "a size that is no number": put(at + 124, b"12x456789012"),
        "empty": b"",
    }


@pytest.mark.parametrize(
    "kind",
    [
        "noise in a header", "one bit of a header", "a hole of zeros", "cut inside a header", "cut between members",
        "cut inside a member", "two in one", "bytes after the end", "bytes after a hole", "a size that is no number",
        "empty",
    ],
)  # fmt: skip
def test_damage_is_refused(tmp_path: Path, kind: str) -> None:
    content = written(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(damaged(content)[kind])
    with pytest.raises(DataError, match=r"a\.tar is damaged or no plain tar file"):
        list(members(tmp_path / "a.tar"))


def sealed(header: bytes) -> bytes:
    """A header with its right checksum."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (b"0", b"\xff" + b"\xff" * 11),
        (b"0", b"\x80" + b"\x7f" * 11),
        (b"L", b"\x80" + b"\0" * 6 + b"\x01" + b"\0" * 4),
        (b"x", b"77777777777\0"),
    ],
)
def test_sizes_that_lie_are_refused_unread(tmp_path: Path, kind: bytes, size: bytes) -> None:
    header = tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(sealed(header[:124] + size + header[136:156] + kind + header[157:]) + bytes(4096))
    with pytest.raises(DataError, match="damaged or no plain tar file"):
        list(members(tmp_path / "a.tar"))


@pytest.mark.parametrize("record", [b"20 size=-512\n", b"9999 path=a\n", b"path=a\n", b"13 size=1_0\n", b"0 x=\n"])
def test_facts_that_lie_are_refused(tmp_path: Path, record: bytes) -> None:
    facts = tarfile.TarInfo("facts")
    facts.type, facts.size = tarfile.XHDTYPE, len(record)
    content = facts.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    content += tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="damaged or no plain tar file"):
        list(members(tmp_path / "a.tar"))


def test_a_long_tail_of_holes_is_not_read(tmp_path: Path) -> None:
    written(tmp_path / "a.tar")
    os.truncate(tmp_path / "a.tar", 1 << 40)
    assert len(list(members(tmp_path / "a.tar"))) == len(NAMES) + 1


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="no regular file"):
        list(members(tmp_path / "a.tar"))
    with pytest.raises(DataError, match="no regular file"):
        read_webdataset(tmp_path)
