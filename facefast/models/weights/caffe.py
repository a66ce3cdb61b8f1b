"""Weights of a Caffe network (.caffemodel) by layer and number of blob.

Oxford's VGG_FACE.caffemodel and VGGFace2's are such files. Protocol buffers read them; the schema here is the part of
Caffe's that holds weights (https://github.com/BVLC/caffe/blob/master/src/caffe/proto/caffe.proto), as much of
NetParameter as both generations of its layers need.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from torch import Tensor

PACKAGE = "facefast.caffe"
# Message -> field -> (number, type, repeated). The numbers of a blob are packed, so that they read as bytes at once.
SCHEMA = {
    "Shape": {"dim": (1, "int64", True)},
    "Blob": {
        "num": (1, "int32", False),
        "channels": (2, "int32", False),
        "height": (3, "int32", False),
        "width": (4, "int32", False),
        "data": (5, "bytes", True),
        "shape": (7, "Shape", False),
        "double_data": (8, "bytes", True),
    },
    "OldLayer": {"name": (4, "string", False), "blobs": (6, "Blob", True)},
    "Layer": {"name": (1, "string", False), "blobs": (7, "Blob", True)},
    "Net": {"layers": (2, "OldLayer", True), "layer": (100, "Layer", True)},
}


def read(path: Path) -> dict[str, Tensor]:
    """The blobs of every layer: conv1_1/0 its weight, conv1_1/1 its bias, four axes each in older files.

    Raises:
        ValueError: the file is cut off or damaged, or holds no layers.
    """
    try:
        net = _net().FromString(path.read_bytes())
        found = {
            f"{layer.name}/{place}": _tensor(blob)
            for layer in (*net.layers, *net.layer)
            for place, blob in enumerate(layer.blobs)
        }
    except (DecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a sound .caffemodel: {error}") from error
    if not found:
        raise ValueError(f"{path} is not a sound .caffemodel: none of its layers has weights")
    return found


def _tensor(blob: Any) -> Tensor:
    shape = list(blob.shape.dim) if blob.HasField("shape") else [blob.num, blob.channels, blob.height, blob.width]
    # Shape and numbers are both the file's word, and must agree.
    parts, dtype = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    numbers = np.frombuffer(b"".join(parts), dtype).astype(np.float32)
    if min(shape, default=1) < 0 or len(numbers) != math.prod(shape):
        raise ValueError(f"a blob of shape {shape} with {len(numbers)} numbers")
    return torch.from_numpy(numbers.reshape(shape))


def _net() -> Any:
    """The class that reads a NetParameter."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto2")
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            field = described.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in SCHEMA:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.Net"))
