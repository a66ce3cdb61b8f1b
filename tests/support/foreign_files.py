"""Writers of the files in which Caffe and Torch7 keep networks, from the descriptions of their formats.

Nothing here is taken from facefast; what a real file holds beside weights stands in these too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Caffe: protocol buffers, https://protobuf.dev/programming-guides/encoding.


def _varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found += bytes([number & 127 | 128])
        number >>= 7
    return found + bytes([number])


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _blob(tensor: Tensor, old: bool) -> bytes:
    if old:
        axes = b"".join(_number(k, size) for k, size in enumerate(tensor.shape, 1))
    else:
        axes = _bytes(7, _bytes(1, b"".join(map(_varint, tensor.shape))))
    double = tensor.dtype == torch.float64
    return axes + _bytes(8 if double else 5, tensor.contiguous().numpy().tobytes())


def caffemodel(blobs: Mapping[str, Tensor], old: bool) -> bytes:
    """Blobs by LAYER/NUMBER, as layers of the first generation (V1LayerParameter, `old`) or of the second."""
    layers: dict[str, dict[str, Tensor]] = {"data": {}, "relu1_1": {}}
    for key, tensor in blobs.items():
        layer, _, place = key.rpartition("/")
        layers.setdefault(layer, {})[place] = tensor
    found = _bytes(1, b"a network") + _bytes(3, b"data")
    name_field, blob_field, layer_field = (4, 6, 2) if old else (1, 7, 100)
    for name, tensors in layers.items():
        rest = _bytes(2, b"below") + (_number(5, 4) if old else _bytes(2, b"Convolution"))
        weights = b"".join(_bytes(blob_field, _blob(tensors[place], old)) for place in sorted(tensors))
        found += _bytes(layer_field, _bytes(name_field, name.encode()) + rest + weights)
    return found


# Torch7: https://github.com/torch/torch7/blob/master/File.lua, doc/serialization.md.


class Lua:
    """Values in the binary form of Torch7; each table and object is written once and referred to afterwards."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.written: dict[int, int] = {}
        self.kept: list[Any] = []

    def pack(self, form: str, *values: Any) -> None:
        self.data += struct.pack(f"<{form}", *values)

    def text(self, value: str) -> None:
        self.pack("i", len(value))
        self.data += value.encode("latin-1")

    def value(self, value: Any) -> None:
        if value is None:
            self.pack("i", 0)
        elif isinstance(value, bool):
            self.pack("ii", 5, value)
        elif isinstance(value, int | float):
            self.pack("id", 1, value)
        elif isinstance(value, str):
            self.pack("i", 2)
            self.text(value)
        elif isinstance(value, Tensor):
            self._once(value, 4, lambda: self._tensor(value))
        elif isinstance(value, Module):
            self._once(value, 4, lambda: self._module(value))
        elif isinstance(value, dict):
            self._once(value, 3, lambda: self._table(value))
        elif isinstance(value, bytes):
            self._once(value, 8, lambda: self._function(value))
        else:
            raise TypeError(type(value))

    def _once(self, value: Any, kind: int, write: Callable[[], None], name: int = 0) -> None:
        name = name or id(value)
        known = name in self.written
        index = self.written.setdefault(name, len(self.written) + 1)
        self.kept.append(value)  # so that no other value gets its id
        self.pack("ii", kind, index)
        if not known:
            write()

    def _table(self, table: dict[Any, Any]) -> None:
        self.pack("i", len(table))
        for key, value in table.items():
            self.value(key)
            self.value(value)

    def _module(self, module: Module) -> None:
        self.text("V 1")
        self.text(module.kind)
        self.value(module.fields)

    def _function(self, code: bytes) -> None:
        self.pack("i", len(code))
        self.data += code
        self.value({1: "upvalue"})

    def _tensor(self, tensor: Tensor) -> None:
        kind = {torch.float32: "Float", torch.float64: "Double"}[tensor.dtype]
        self.text("V 1")
        self.text(f"torch.{kind}Tensor")
        self.pack("i", tensor.ndim)
        self.pack(f"{2 * tensor.ndim + 1}q", *tensor.shape, *tensor.stride(), tensor.storage_offset() + 1)
        storage = tensor.untyped_storage()

        def write() -> None:
            self.text("V 1")
            self.text(f"torch.{kind}Storage")
            self.pack("q", len(storage) // tensor.element_size())
            self.data.extend(torch.empty(0, dtype=tensor.dtype).set_(storage).numpy().tobytes())

        self._once(storage, 4, write, storage.data_ptr())


class Module:
    """An object of a Torch class: its name and its fields."""

    def __init__(self, kind: str, fields: dict[Any, Any]) -> None:
        self.kind, self.fields = kind, fields


def t7(weights: Mapping[str, Tensor]) -> bytes:
    """nn.Sequential with weights by modules.NUMBER.NAME; the modules between have none."""
    last = max(int(key.split(".")[1]) for key in weights)
    modules = {place: Module("nn.ReLU", {"inplace": True, "train": False}) for place in range(last + 1, 0, -1)}
    whole = Module("nn.Sequential", {"modules": modules, "_type": "torch.FloatTensor", "forget": b"\x1bLJ code"})
    for key, tensor in weights.items():
        _, place, name = key.split(".")
        module = modules[int(place)]
        module.kind = "nn.SpatialConvolutionMM"
        module.fields |= {name: tensor, f"grad{name.title()}": torch.zeros(2), "padW": 1, "within": whole.fields}
    file = Lua()
    file.value(whole)
    return bytes(file.data)
