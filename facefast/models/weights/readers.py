"""Reading a file of weights as tensors by name, whatever program wrote it.

A file is data here, never a program: pickles are read by torch's weights-only loader and by nothing else, NumPy's
archives without pickles, HDF5 without links to other files, Torch7's objects without their code. All but safetensors
are read in a process of its own (`isolated`), and give no more bytes of tensors than `untrusted.may_hold`.
"""

from __future__ import annotations

import importlib
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from facefast.models.weights import caffe, torch7
from facefast.models.weights.isolated import read_apart
from facefast.runtime.untrusted import may_hold, open_regular, read_npz, require_dense

LARGEST_HEADER = 8 << 20
"""Bytes of names and shapes in a safetensors file; a hundred thousand tensors have as many."""
LARGEST_PICKLE = 64 << 20
"""Bytes of what says where a torch file's tensors are."""
# Where training programs keep the network inside a checkpoint, the surest name first.
CONTAINERS = (
    "net_state_dict",
    "state_dict_backbone",
    "model_state_dict",
    "state_dict",
    "backbone",
    "model",
    "net",
    "weights",
)
MAX_NESTING = 4
SHOWN = 4
HDF5 = (".h5", ".hdf5")
# The end of a Keras variable's name. Keras 1 calls a kernel W and a variance running_std, and numbers them.
VARIABLE = re.compile(
    r"(?:^|[/_])(kernel|bias|gamma|beta|moving_mean|moving_variance|running_mean|running_std|W|b)(?:_\d+)?(?::0)?$"
)
OLD_VARIABLES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file: by its suffix safetensors, NumPy's .npz, Keras' .h5, .caffemodel, Torch7's .t7, else
    what `torch.save` wrote, however a training program wrapped it.

    Raises:
        ValueError: no such file, a damaged one, one that holds more than tensors or makes its reader crash, one that
            announces more than it holds, no state dict in it, or h5py is missing for .h5.
    """
    if not path.is_file():
        raise ValueError(
            f"source weights {path}: no such file; give a weights file, a run or checkpoint folder, imagenet or none"
        )
    # By the suffix alone: a reader that tried formats in turn would hand a hostile file to every parser.
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    readers = {".npz": _read_npz, ".caffemodel": caffe.read, ".t7": torch7.read} | dict.fromkeys(HDF5, _read_keras)
    reader = readers.get(path.suffix, _read_torch)
    if reader is _read_keras:
        _h5py(path)  # its absence is no fault of the file
    try:
        require_dense(path)
        return read_apart(path, reader)
    except OSError as error:
        raise ValueError(f"source weights {path} cannot be read: {error.strerror}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, in pages that are read when they are first looked at.

    Raises:
        ValueError: it is damaged, its header is too long, or it consists of holes.
    """
    # The library checks that shapes and places fit the file; what a header itself costs is checked here.
    try:
        require_dense(path)
        with open_regular(path) as file:
            start = file.read(8)
        header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if header > LARGEST_HEADER:
            raise ValueError(f"its header has {header} bytes; at most {LARGEST_HEADER} are read")
        return safetensors.torch.load_file(path)
    except Exception as error:  # its Python part raises nearly anything for types that it does not know
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    # The weights-only unpickler builds tensors and plain containers; any other name in the file, which is how a pickle
    # runs programs, is refused before it is looked up.
    try:
        _check_archive(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        if "failed locating file data.pkl" in str(error):
            raise ValueError(
                f"{path} holds no weights that can be loaded: it is a torch.export or TorchScript program, or damaged; "
                "give the run that it came from, or its export to safetensors or onnx"
            ) from error
        # torch's own message recommends the unsafe loader; ours must not.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than tensors ({reason}), and "
            "a pickle can run any program. Where you trust the file, save its state dict alone, "
            "best as safetensors, or a pickled dictionary of arrays with numpy.savez(NAME.npz, **arrays)"
        ) from error
    return _find_state(value, path)


def _check_archive(path: Path) -> None:
    """Refuses a zip archive that announces more than it holds; torch would make room for all of it."""
    size = path.stat().st_size
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    announced = sum(member.file_size for member in members)
    if announced > may_hold(size):
        raise ValueError(f"it announces {announced} bytes; a file of {size} bytes may hold {may_hold(size)}")
    for member in members:
        if member.filename.endswith("data.pkl") and member.file_size > LARGEST_PICKLE:
            raise ValueError(f"{member.filename} has {member.file_size} bytes; at most {LARGEST_PICKLE} are read")


def _find_state(value: Any, path: Path, depth: int = 0) -> dict[str, Tensor]:
    """The state dict in what a file holds, however a training program wrapped it."""
    # A wrapper's well-known name, the surest first; then the tensors at hand; then an unknown wrapper, if there is just
    # one: a choice among several would be a guess.
    found = value if isinstance(value, Mapping) else {}
    nested = [key for key in CONTAINERS if isinstance(found.get(key), Mapping)]
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not nested and not tensors:
        nested = [key for key, inner in found.items() if isinstance(inner, Mapping) and _has_tensors(inner)]
        nested = nested if len(nested) == 1 else []
    if nested and depth < MAX_NESTING:
        return _find_state(found[nested[0]], path, depth + 1)
    if nested or not tensors:
        holds = f"keys {_first([str(key) for key in found])}" if found else f"a {type(value).__name__}"
        raise ValueError(f"{path} holds no state dict that can be told from others: {holds}")
    return tensors


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values())


def _first(names: list[str] | tuple[str, ...]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of numbers by their names."""
    try:
        # An array of objects in an .npz is a pickle.
        with open_regular(path) as file:
            arrays = read_npz(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} was refused: it is not a sound .npz file, or holds more than arrays of numbers ({error}); write "
            "it with numpy.savez(NAME.npz, **arrays)"
        ) from error
    return {name: _tensor(array) for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _h5py(path: Path) -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise ValueError(
            f"{path} is in HDF5, which needs a package that is missing: pip install h5py; or save the weights as "
            ".safetensors or .npz"
        ) from error


def _read_keras(path: Path) -> dict[str, Tensor]:
    """Weights as Keras' save_weights and save write them in HDF5: LAYER/VARIABLE, in the order of the layers."""
    h5py = _h5py(path)
    try:
        with h5py.File(path, "r") as file:
            return _keras_tensors(file, path)
    except MemoryError:
        raise
    except ValueError as error:
        raise error if str(path) in str(error) else _unsound(path, error) from error
    except Exception as error:  # a damaged file raises nearly anything
        raise _unsound(path, error) from error


def _unsound(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is not a sound HDF5 file of Keras weights: {error}")


def _keras_tensors(file: Any, path: Path) -> dict[str, Tensor]:
    group = file.get("model_weights", file)  # all of a model, or its weights only
    if "layer_names" not in group.attrs:
        raise ValueError(
            f"{path} names no layers: it holds {', '.join(list(file)[:4])}, not weights as Keras 1 and 2 save them; "
            "save the weights as .npz, one array per LAYER/VARIABLE"
        )
    size = path.stat().st_size
    left = may_hold(size)
    tensors: dict[str, Tensor] = {}
    for layer in map(_text, group.attrs["layer_names"]):
        for name in map(_text, group[layer].attrs["weight_names"]):
            # HDF5 can link to other files, store its numbers in them, or be a view of several: a downloaded file could
            # read any file of the user's into what looks like weights.
            dataset, variable = group[layer][name], VARIABLE.search(name)
            if dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
                raise ValueError(f"{path} was refused: {layer}/{name} points out of the file")
            key = f"{layer}/{OLD_VARIABLES.get(variable[1], variable[1]) if variable else name}"
            if key in tensors:
                raise ValueError(f"{path} has {key} twice; save the weights as .npz, one array per LAYER/VARIABLE")
            left -= dataset.size * dataset.dtype.itemsize
            if left < 0 or dataset.dtype.kind not in "fiub":
                raise ValueError(
                    f"{path} was refused: with {layer}/{name}, {dataset.shape} of {dataset.dtype}, it announces more "
                    f"numbers than a file of {size} bytes may hold ({may_hold(size)} bytes), or other things"
                )
            tensors[key] = _tensor(dataset[()])
    return tensors


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _tensor(array: Any) -> Tensor:
    """A tensor of its own, in this machine's byte order."""
    array = np.asarray(array)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
