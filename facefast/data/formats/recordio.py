"""Reads InsightFace's training sets (.rec, .idx) and verification sets (.bin) without mxnet.

Formats: dmlc-core's recordio.h, mxnet's recordio.py (IRHeader), insightface's face2rec2.py and
lfw2pack.py. Pictures stay where they are: a row is a byte range.
"""

from __future__ import annotations

import itertools
import mmap
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from facefast.data.crew import Crew
from facefast.data.formats import bin_pickle
from facefast.data.index import FaceIndex, PairSet
from facefast.data.walk import top_entries
from facefast.runtime.exits import DataError
from facefast.runtime.untrusted import open_regular

MAGIC = 0xCED7230A
FRAME = 8  # bytes of magic and length
LARGEST_BIN = 4 << 30
"""Bytes of a verification set; the largest published one has a tenth of it."""
LONGEST_LINE = 1 << 10
"""Bytes of a line of an .idx, which has two numbers."""
HEADER = 24  # bytes of flag, label and two ids
EXACT = 1 << 24  # 32-bit floats tell all whole numbers below apart
RECORD = np.dtype(
    [
        ("magic", "<u4"),
        ("length", "<u4"),  # in the low 29 bits; above them, which part of a split record this is
        ("flag", "<u4"),  # floats in the array of labels after the header; 0: the label in it
        ("label", "<f4"),
        ("ids", "<u8", 2),
        ("first_label", "<f4"),
    ]
)


def read_recordio(root: str | os.PathLike[str], crew: Crew | None = None) -> FaceIndex:
    """The pictures of a .rec file; `root` is the file or its folder.

    InsightFace's header and identity records are no rows. Files of im2rec, which have neither, and
    files without an .idx are read too. A label is the record's own or the first of its array;
    those that occur are numbered from 0, and -1 is unlabelled.

    Args:
        crew: the ranks that share the records' headers; this process alone without.

    Raises:
        ValueError: the folder holds several .rec files or none.
        DataError: .rec and .idx do not belong together, or a label is no whole number.
    """
    file = _find(Path(root))
    # Mapped, not read: only headers are looked at, and a file of millions of pictures does not fit into memory.
    data = _bytes_of(file)
    keys, offsets = _keys(file, data)
    crew = crew or Crew()
    cuts = np.arange(crew.size + 1) * len(offsets) // crew.size
    found = crew.each(_headers, [(file, offsets[start:end]) for start, end in itertools.pairwise(cuts.tolist())])
    records, inside = (np.concatenate(parts) for parts in zip(*found, strict=True))
    strange = np.flatnonzero(inside & (records["magic"] != MAGIC))
    if len(strange) > 0:
        raise DataError(
            f"{len(strange)} of {len(keys)} records of {file} lack RecordIO's mark (first: "
            f"key {keys[strange[0]]}, byte {offsets[strange[0]]}); is the .idx another file's?"
        )
    part = records["length"] >> 29
    labels_bytes = 4 * records["flag"].astype(np.int64)
    starts = np.where(inside, offsets + FRAME + HEADER + labels_bytes, len(data))
    lengths = (records["length"] & 0x1FFFFFFF).astype(np.int64) - HEADER - labels_bytes
    # A record that the .idx puts outside the file stays a row, one byte past the end: the scan reports it.
    lengths = np.where(inside, np.maximum(lengths, 0), 1)
    labels = np.where(records["flag"] > 0, records["first_label"], records["label"])
    labels[~inside] = -1

    wanted = np.ones(len(keys), bool)
    if keys[0] == 0 and records["flag"][0] > 0 and lengths[0] == 0:  # InsightFace's header record
        is_identity = (records["flag"] > 0) & (lengths == 0) & inside
        end = _end(file, float(labels[0]), keys, is_identity)
        wanted = (keys >= 1) & (keys < end)
        if np.count_nonzero(wanted) != end - 1:
            raise DataError(
                f"{file} announces {end - 1} pictures and its .idx lists "
                f"{np.count_nonzero(wanted)}; take whole copies of both"
            )
        beyond = np.flatnonzero((keys >= end) & inside & ~is_identity)
        if len(beyond) > 0:
            raise DataError(
                f"{file} announces {end - 1} pictures and holds {len(beyond)} more behind them (first: key "
                f"{keys[beyond[0]]}); are these two files in one? Write them apart, or anew"
            )
    last = min([len(data), *offsets[~inside].tolist()])
    _warn_of_unlisted(file, offsets[inside], records[inside], part[inside], last)
    # The bytes of a split record are not contiguous: its data holds the mark by chance, once in
    # a million pictures.
    split = np.flatnonzero(wanted & (part != 0))
    if len(split) > 0:
        warnings.warn(
            f"{len(split)} of {np.count_nonzero(wanted)} pictures of {file} are stored in parts "
            f"and left out (first: key {keys[split[0]]})",
            stacklevel=2,
        )
        wanted[split] = False
    countable = np.isfinite(labels) & (labels == np.rint(labels)) & (labels >= -1) & (labels < EXACT)
    bad = np.flatnonzero(wanted & ~countable)
    if len(bad) > 0:
        raise DataError(
            f"{len(bad)} of {np.count_nonzero(wanted)} labels of {file} are no class numbers "
            f"(first: {labels[bad[0]]} of key {keys[bad[0]]}); they must be whole, at least -1, which is nobody, and "
            f"below {EXACT}, from where on the format's 32-bit floats take two people for one; number them anew from 0"
        )
    values, numbers = np.unique(labels[wanted].astype(np.int64), return_inverse=True)
    unlabelled = np.count_nonzero(values < 0)
    return FaceIndex.build(
        file.parent,
        np.full(len(numbers), os.fsencode(file.name)),
        numbers - unlabelled,
        [str(value) for value in values[unlabelled:]],
        offsets=starts[wanted],
        lengths=lengths[wanted],
    )


def recognises_recordio(root: Path) -> bool:
    """Whether `root` is a .rec file or holds one."""
    return bool(_rec_files(root)) if root.is_dir() else root.suffix.lower() == ".rec"


def read_bin(path: str | os.PathLike[str]) -> tuple[FaceIndex, PairSet]:
    """An InsightFace verification set (lfw.bin, agedb_30.bin, ...): 2P pictures, and their P pairs.

    The pickle may hold bytes, numbers, lists, tuples and numpy arrays, and is refused if it holds anything else; the
    pictures stay where they are in the file.

    Raises:
        DataError: the file is damaged, holds anything else, or its pictures are not stored raw.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_BIN:
                raise ValueError(f"it has {size} bytes; at most {LARGEST_BIN} are read")
            if not size:
                raise ValueError("it is empty")
            # Mapped: where the pictures lie is all that is wanted of them.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                pictures, same = bin_pickle.read(content)
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{os.fspath(path)} is no verification set ({error}); it must be a pickle of "
            "(pictures, is_same) as InsightFace writes it"
        ) from error
    flags = np.array(same, bool)
    if len(pictures) != 2 * len(flags):
        raise DataError(
            f"{os.fspath(path)} has {len(pictures)} pictures for {len(flags)} pairs; it must have two for each"
        )
    raw = [picture for picture in pictures if picture is not None]
    packed = len(pictures) - len(raw)
    if packed > 0:
        raise DataError(
            f"{packed} of {len(pictures)} pictures of {os.fspath(path)} are not stored raw; "
            "load it in Python 3 and write it again with pickle.dump(..., protocol=4)"
        )
    index = FaceIndex.build(
        os.path.dirname(os.path.abspath(path)),
        [os.fsencode(os.path.basename(path))] * len(pictures),
        None,
        (),
        offsets=[picture.begin for picture in raw],
        lengths=[picture.length for picture in raw],
    )
    rows = np.arange(len(pictures))
    return index, PairSet.of(rows[0::2], rows[1::2], flags)


def _rec_files(root: Path) -> list[Path]:
    return [root / os.fsdecode(entry.name) for entry in top_entries(root) if entry.name.lower().endswith(b".rec")]


def _bytes_of(file: Path) -> NDArray[np.uint8]:
    """The file, mapped."""
    try:
        with open_regular(file) as opened:
            if not os.fstat(opened.fileno()).st_size:
                raise DataError(f"{file} is empty; take a whole copy")
            return np.memmap(opened, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give its readers permission") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def _end(file: Path, announced: float, keys: NDArray[np.int64], is_identity: NDArray[np.bool_]) -> int:
    """The first key that is no picture's. The header record has it as a 32-bit float, which is off by a few in sets of
    17 million pictures: there the first identity record decides."""
    if not (np.isfinite(announced) and announced == np.rint(announced) and announced >= 1):
        raise DataError(f"{file} announces {announced - 1:g} pictures in its first record; it is damaged")
    if announced < EXACT:
        return int(announced)
    after = keys[is_identity & (keys >= 1)]
    end = int(after.min() if len(after) else keys.max() + 1)
    return end if abs(end - announced) <= np.spacing(np.float32(announced)) else int(announced)


def _warn_of_unlisted(
    file: Path, offsets: NDArray[np.int64], records: NDArray[np.void], part: NDArray[Any], size: int
) -> None:
    """Says how many bytes no line of the .idx accounts for: pictures, if it was cut or belongs to an older file."""
    order = np.argsort(offsets)
    begins = offsets[order]
    ends = begins + FRAME + ((records["length"][order] & 0x1FFFFFFF).astype(np.int64) + 3) // 4 * 4
    gaps = np.append(begins[1:], size) - ends
    gaps[part[order] != 0] = 0  # the other parts follow, unlisted
    first = np.flatnonzero(gaps > 0)
    if len(offsets) and len(first):
        lost = int(gaps[first].sum())
        warnings.warn(
            f"{lost} of {size} bytes of {file} are in no record that its .idx lists (first: byte {ends[first[0]]}); "
            "their pictures are left out. If that is not meant, remove the .idx, and the .rec is read alone",
            stacklevel=3,
        )


def _find(root: Path) -> Path:
    if root.is_file():
        return root
    files = _rec_files(root)
    train = [file for file in files if file.name == "train.rec"] or files
    if len(train) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{root} must hold one .rec file, or train.rec; it has {names}")
    return train[0]


def _keys(file: Path, data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and offsets of the records, from the .idx or, without one, from the .rec itself."""
    listing = file.with_suffix(".idx")
    if not listing.exists():
        offsets = _walk(file, data)
        return np.arange(len(offsets)), offsets
    try:
        with warnings.catch_warnings(action="ignore"):  # of an empty file, which is refused below
            _require_lines(listing)
            table = np.loadtxt(listing, np.int64, ndmin=2)
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"{listing} must have a key and an offset on each line: {error}") from error
    if table.shape[1:] != (2,) or len(table) == 0 or table.min() < 0:
        raise DataError(f"{listing} must have a key and an offset on each line; it is {table.shape}")
    for column, what in enumerate(("key", "offset")):
        values, counts = np.unique(table[:, column], return_counts=True)
        if (counts > 1).any():
            raise DataError(f"{listing} has {what} {values[counts > 1][0]} more than once; it is damaged")
    table = table[np.argsort(table[:, 0], kind="stable")]  # key 0, InsightFace's header, comes first
    return table[:, 0], table[:, 1]


def _require_lines(listing: Path) -> None:
    """Refuses a file without ends of lines: NumPy would take all of it for one."""
    with open_regular(listing) as file:
        while block := file.read(64 * LONGEST_LINE):
            if len(block) == 64 * LONGEST_LINE and b"\n" not in block:
                raise ValueError(f"it has a line of more than {LONGEST_LINE} bytes")


def _walk(file: Path, data: NDArray[np.uint8]) -> NDArray[np.int64]:
    offsets, at = [], 0
    while at + FRAME <= len(data):
        magic, length = data[at : at + FRAME].view("<u4").tolist()
        if magic != MAGIC:
            raise DataError(f"{file} is no RecordIO file, or damaged: no mark at byte {at}")
        if length >> 29 in (0, 1):  # whole, or the first part
            offsets.append(at)
        at += FRAME + ((length & 0x1FFFFFFF) + 3) // 4 * 4
    if not offsets:
        raise DataError(f"{file} holds no record")
    return np.array(offsets, np.int64)


def _headers(piece: tuple[Path, NDArray[np.int64]]) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    file, offsets = piece
    return _records(_bytes_of(file), offsets)


def _records(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """Record headers [N], and which of them lie inside the file (the others are zeros)."""
    records = np.zeros(len(offsets), RECORD)
    inside = offsets <= len(data) - RECORD.itemsize
    if inside.any():
        windows = sliding_window_view(data, RECORD.itemsize)
        records[inside] = windows[offsets[inside]].view(RECORD)[:, 0]
    return records, inside
