"""Reading a file of weights as tensors by name, whatever program wrote it.

A file is data here, never a program: pickles are read by torch's weights-only loader and by nothing else, NumPy's
archives without pickles, HDF5 without links to other files, Torch7's objects without their code.
"""

from __future__ import annotations

import importlib
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from facefast.models.weights import torch7

HDF5 = (".h5", ".hdf5")
# The end of a Keras variable's name. Keras 1 calls a kernel W and a variance running_std, and numbers them.
VARIABLE = re.compile(
    r"(?:^|[/_])(kernel|bias|gamma|beta|moving_mean|moving_variance|running_mean|running_std|W|b)(?:_\d+)?(?::0)?$"
)
OLD_VARIABLES = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}


def read(path: Path) -> Any:
    """What a file holds: by its suffix safetensors, NumPy's .npz, Keras' .h5, .caffemodel, Torch7's .t7, else what
    `torch.save` wrote.

    Raises:
        ValueError: no such file, a damaged one, one that holds more than tensors, or h5py is missing for .h5.
    """
    if not path.is_file():
        raise ValueError(
            f"source weights {path}: no such file; give a weights file, a run or checkpoint folder, imagenet or none"
        )
    # By the suffix alone: a reader that tried formats in turn would hand a hostile file to every parser.
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a sound safetensors file: {error}") from error
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix in HDF5:
        return _read_keras(path)
    if path.suffix == ".caffemodel":
        from facefast.models.weights import caffe  # brings protocol buffers along, which nothing else here needs

        return caffe.read(path)
    if path.suffix == ".t7":
        return torch7.read(path)
    # Everything else is taken for a pickle. The weights-only unpickler builds tensors and plain containers; any other
    # name in the file, which is how a pickle runs programs, is refused before it is looked up.
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own message recommends the unsafe loader; ours must not.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than tensors ({reason}), and "
            "a pickle can run any program. Where you trust the file, save its state dict alone, "
            "best as safetensors, or a pickled dictionary of arrays with numpy.savez(NAME.npz, **arrays)"
        ) from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of numbers by their names."""
    try:
        # An array of objects in an .npz is a pickle. The arrays are read in here, where an error is this file's.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{path} was refused: it is not a sound .npz file, or holds more than arrays of numbers ({error}); write "
            "it with numpy.savez(NAME.npz, **arrays)"
        ) from error
    return {name: _tensor(array) for name, array in arrays.items() if array.dtype.kind in "fiub"}


def _read_keras(path: Path) -> dict[str, Tensor]:
    """Weights as Keras' save_weights and save write them in HDF5: LAYER/VARIABLE, in the order of the layers."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise ValueError(
            f"{path} is in HDF5, which needs a package that is missing: pip install h5py; or save the weights as "
            ".safetensors or .npz"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            return _keras_tensors(file, path)
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not a sound HDF5 file of Keras weights: {error}") from error


def _keras_tensors(file: Any, path: Path) -> dict[str, Tensor]:
    group = file.get("model_weights", file)  # all of a model, or its weights only
    if "layer_names" not in group.attrs:
        raise ValueError(
            f"{path} names no layers: it holds {', '.join(list(file)[:4])}, not weights as Keras 1 and 2 save them; "
            "save the weights as .npz, one array per LAYER/VARIABLE"
        )
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
            tensors[key] = _tensor(dataset[()])
    return tensors


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _tensor(array: Any) -> Tensor:
    """A tensor of its own, in this machine's byte order."""
    array = np.asarray(array)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
