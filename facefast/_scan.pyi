"""Reads pictures in parallel and says which of them a decoder would fail on (csrc/scan/scan.cpp)."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

FAULTS: tuple[str, ...]
"""What is wrong with a picture, in words, by the number that is stored in an index; 0 is "ok"."""
KINDS: tuple[str, ...]
"""Formats of pictures by number; 0 is "unknown"."""

class _Found(TypedDict):
    fault: npt.NDArray[np.uint8]  # [N], a number of FAULTS
    kind: npt.NDArray[np.uint8]  # [N], a number of KINDS
    orientation: npt.NDArray[np.uint8]  # [N], EXIF's 1 to 8
    width: npt.NDArray[np.int32]  # [N], pixels as stored, before orientation; 0 where the header is unreadable
    height: npt.NDArray[np.int32]  # [N]
    size: npt.NDArray[np.int64]  # [N], bytes
    hash: npt.NDArray[np.uint64]  # [N, 2], `content_hash` of the picture; 0 where there is a fault

def scan(
    root: bytes,
    paths: npt.NDArray[np.bytes_] | Sequence[bytes],
    offsets: npt.NDArray[np.integer] | Sequence[int],
    lengths: npt.NDArray[np.integer] | Sequence[int],
    threads: int,
    max_pixels: int,
    progress: Callable[[int], object] | None = None,
) -> _Found:
    """Inspects N pictures; what is wrong with one is a number in its row, never an exception.

    Args:
        root: an existing folder.
        paths: [N] names below `root`.
        offsets: [N] bytes into the file where the picture begins; -1 is a file that is one picture.
        lengths: [N] bytes of the picture; -1 is up to the file's end.
        threads: 0 is one per usable core.
        max_pixels: width times height above this is the fault "too many pixels".
        progress: called in the calling thread with the rows done so far, ten times a second and at the end; what it
            raises ends the scan.

    Raises:
        OSError: `root` cannot be opened.
        ValueError: the columns differ in length, or `paths` are not bytes.
    """

def read(
    paths: npt.NDArray[np.bytes_] | Sequence[bytes],
    offsets: npt.NDArray[np.integer] | Sequence[int],
    lengths: npt.NDArray[np.integer] | Sequence[int],
    threads: int,
    max_pixels: int,
    hashes: npt.NDArray[np.uint64] | None = None,
    keep_bytes: int = 9223372036854775807,
) -> tuple[
    list[npt.NDArray[np.uint8]],
    npt.NDArray[np.uint8],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.uint8],
]:
    """Reads and inspects B pictures.

    Args:
        paths: [B] absolute ones; `offsets`, `lengths`, `threads` and `max_pixels` as for `scan`.
        hashes: [B, 2] as `scan` found them; a picture with another one has the fault "changed since it was indexed". 0
            is not known.
        keep_bytes: of the batch; a picture above 1 MiB that would make it longer is looked at and not kept.

    Returns:
        (data, fault, width, height, orientation): the encoded bytes of each picture, without what follows a JPEG's end,
        empty where its fault is not 0 or it is not kept, and columns [B] as those of `scan`.

    Raises:
        ValueError: the columns differ in length, `paths` are not bytes, or `hashes` have another shape.
    """

def inspect(data: bytes, max_pixels: int) -> tuple[int, int, int, int, int]:
    """(fault, kind, width, height, orientation) of one picture in memory, numbered and measured as `scan` does."""

def content_hash(data: bytes, seed: int = 0) -> tuple[int, int]:
    """MurmurHash3 x64 128 as two 64-bit numbers, the low one first; `seed` has 32 bits."""
