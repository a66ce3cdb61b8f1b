"""Weights of a Caffe network (.caffemodel) by layer and number of blob.

Oxford's VGG_FACE.caffemodel and VGGFace2's are such files: protocol buffers
(https://protobuf.dev/programming-guides/encoding) of Caffe's schema
(https://github.com/BVLC/caffe/blob/master/src/caffe/proto/caffe.proto), of which this reads as much of NetParameter as
holds weights, in both generations of its layers. A library for protocol buffers would first build all that a file
announces; here nothing is built that has no bytes in the file, and what is not asked for is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_AXES = 16
MAX_FIELDS = 1 << 20
"""Fields in a file, of every depth; published networks have some thousand."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; the others are groups, which Caffe has none of."""
# Numbers of the fields: of layers in a net, then of the name and the blobs in such a layer.
LAYERS = {2: (4, 6), 100: (1, 7)}
OLD_AXES = (1, 2, 3, 4)  # num, channels, height, width
DATA, SHAPE, DOUBLE_DATA = 5, 7, 8

Value = int | memoryview


def read(path: Path) -> dict[str, Tensor]:
    """The blobs of every layer: conv1_1/0 its weight, conv1_1/1 its bias, four axes each in older files.

    Raises:
        ValueError: the file is cut off or damaged, or holds no layers.
    """
    try:
        found = _Reader().net(memoryview(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} is not a sound .caffemodel: {error}") from error
    if not found:
        raise ValueError(f"{path} is not a sound .caffemodel: none of its layers has weights")
    return found


class _Reader:
    """Messages of a file, whose fields are counted."""

    def __init__(self) -> None:
        self.left = MAX_FIELDS

    def net(self, message: memoryview) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, value in self.fields(message):
            if number in LAYERS and isinstance(value, memoryview):
                name, blobs = self.layer(value, *LAYERS[number])
                found |= {f"{name}/{place}": tensor for place, tensor in enumerate(blobs)}
        return found

    def layer(self, message: memoryview, name_field: int, blob_field: int) -> tuple[str, list[Tensor]]:
        name, blobs = "", []
        for number, value in self.fields(message):
            if isinstance(value, memoryview):
                if number == name_field:
                    name = bytes(value).decode()
                elif number == blob_field:
                    blobs.append(self.blob(value))
        return name, blobs

    def blob(self, message: memoryview) -> Tensor:
        old, shape = [0, 0, 0, 0], None
        parts: dict[int, list[memoryview]] = {DATA: [], DOUBLE_DATA: []}
        for number, value in self.fields(message):
            if number in parts and isinstance(value, memoryview):  # packed, so that they read as bytes at once
                parts[number].append(value)
            elif number == SHAPE and isinstance(value, memoryview):
                shape = (shape or []) + self.axes(value)
            elif number in OLD_AXES and isinstance(value, int):
                old[number - 1] = value
        shape = old if shape is None else shape
        dtype, pieces = ("<f8", parts[DOUBLE_DATA]) if parts[DOUBLE_DATA] else ("<f4", parts[DATA])
        # Shape and numbers are both the file's word, and must agree.
        if len(shape) > MAX_AXES:
            raise ValueError(f"a blob of {len(shape)} axes; at most {MAX_AXES} are read")
        numbers = np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), dtype).astype(np.float32)
        if max(shape, default=0) >= 1 << 63 or len(numbers) != math.prod(shape):
            raise ValueError(f"a blob of shape {shape} with {len(numbers)} numbers")
        return torch.from_numpy(numbers.reshape(shape))

    def axes(self, message: memoryview) -> list[int]:
        """The lengths in a BlobShape, packed or one by one."""
        found: list[int] = []
        for number, value in self.fields(message):
            if number == 1:
                found += [value] if isinstance(value, int) else self.varints(value)
            if len(found) > MAX_AXES:
                raise ValueError(f"a blob of more than {MAX_AXES} axes")
        return found

    def varints(self, packed: memoryview) -> Iterator[int]:
        at = 0
        while at < len(packed):
            number, at = self.varint(packed, at)
            yield number

    def fields(self, message: memoryview) -> Iterator[tuple[int, Value]]:
        """(number, value) of each field: an int for a number, a view of what has a length."""
        at = 0
        while at < len(message):
            tag, at = self.varint(message, at)
            number, wire = tag >> 3, tag & 7
            value: Value
            if wire == VARINT:
                value, at = self.varint(message, at)
            elif wire == BYTES:
                length, at = self.varint(message, at)
                if length > len(message) - at:
                    raise ValueError(f"{length} bytes wanted where {len(message) - at} are left")
                value, at = message[at : at + length], at + length
            elif wire in (FIXED32, FIXED64):
                width = 4 if wire == FIXED32 else 8
                if width > len(message) - at:
                    raise ValueError("it ends in the middle of a number")
                value, at = int.from_bytes(message[at : at + width], "little"), at + width
            else:
                raise ValueError(f"a field of wire type {wire}")
            yield number, value

    def varint(self, message: memoryview, at: int) -> tuple[int, int]:
        """A number of seven bits a byte, and the place after it."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        number = 0
        for place in range(10):
            if at + place >= len(message):
                raise ValueError("it ends in the middle of a number")
            byte = message[at + place]
            number |= (byte & 127) << 7 * place
            if byte < 128:
                return number, at + place + 1
        raise ValueError("a number of more than ten bytes")
