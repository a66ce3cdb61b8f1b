"""Files of unknown origin: what is no regular file is never opened, and no size is believed before its bytes are seen.

Arrays may take up a little more than the file that holds them, for files may be compressed; `may_hold` is the one limit
on how much more.
"""

from __future__ import annotations

import errno
import math
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

EXPANSION = 4
"""Bytes of arrays to a byte of the file that holds them. Weights hardly compress."""
FLOOR = 64 << 20
"""Bytes of arrays that any file may hold."""
LARGEST_HOLE = FLOOR
"""Bytes of holes from which on a file that has more holes than content is refused."""
_CHUNK = 1 << 20


def may_hold(file_bytes: int) -> int:
    """The most bytes of arrays that are read from a file of so many bytes."""
    return FLOOR + EXPANSION * file_bytes


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file opened for reading; a pipe, a socket or a device is never opened.

    Raises:
        ValueError: it is no regular file.
        OSError: it cannot be opened.
    """
    # To open a pipe waits for its other end, and to open a device may do something. What takes the file's place after
    # the question is not waited for (O_NONBLOCK), and asked again.
    _require_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_regular(path, os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)} is no regular file; give a file")


def read_whole(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        ValueError: it is none, or longer.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)  # it may have grown since
        if max(size, len(content)) > most:
            raise ValueError(f"{os.fspath(path)} has {max(size, len(content))} bytes; at most {most} are read")
        return content


def require_dense(path: Path) -> None:
    """Refuses a file that consists of holes: it takes no room on the disk, and all of its size in memory.

    Raises:
        ValueError: more than half of it, and more than `LARGEST_HOLE`, are holes.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        holes = size - _data_bytes(file.fileno(), size) if size > LARGEST_HOLE else 0
    if holes > max(size // 2, LARGEST_HOLE):
        raise ValueError(f"{path} has {size} bytes, {holes} of which are holes that were never written; take a copy")


def _data_bytes(descriptor: int, size: int) -> int:
    at = found = 0
    while at < size:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            # ENXIO: nothing but a hole from here on. Anything else: the file system cannot tell.
            return found if error.errno == errno.ENXIO else size
        found += at - begin
    return found


def read_npz(file: BinaryIO) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz archive by name. Neither the archive's sizes nor the arrays' own are believed: they must
    agree, and stay within `may_hold`.

    Raises:
        ValueError: it is no such archive, damaged, holds pickled objects or a name twice, or announces too much.
    """
    size = os.fstat(file.fileno()).st_size
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            announced = sum(member.file_size for member in members)
            if announced > may_hold(size):
                raise ValueError(
                    f"it announces {announced} bytes of arrays; a file of {size} bytes may hold {may_hold(size)}"
                )
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"it has {name} twice")
                # Others may ask for gigabytes before they give a byte (the dictionary of LZMA).
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{name} is compressed by method {member.compress_type}, which is not read")
                with archive.open(member) as opened:
                    arrays[name] = _read_npy(opened, name, member.file_size)
    except ValueError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise ValueError(f"it is no sound .npz archive: {error}") from error
    return arrays


def _read_npy(file: Any, name: str, size: int) -> NDArray[Any]:
    form = np.lib.format
    version = form.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} is in version {version} of NumPy's format, which is not read")
    header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled objects")
    count = math.prod(shape) if min(shape, default=0) >= 0 else -1
    left = size - file.tell()
    if count < 0 or count * dtype.itemsize != left or (count and not dtype.itemsize):
        raise ValueError(f"{name} announces shape {shape} of {dtype}, and has {left} bytes")
    data = np.empty(left, np.uint8)
    view, at = memoryview(data.data), 0
    while at < left:
        part = file.readinto(view[at : at + _CHUNK])
        if not part:
            raise ValueError(f"{name} ends after {at} of {left} bytes")
        at += part
    if not left:
        return np.empty(shape, dtype)
    if dtype.kind == "U" and data.view(np.dtype("u4").newbyteorder(dtype.byteorder)).max() > sys.maxunicode:
        raise ValueError(f"{name} holds texts with letters that do not exist")
    return data.view(dtype).reshape(shape, order="F" if fortran else "C")
