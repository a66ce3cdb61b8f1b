"""Files of weights of every kind that is read, the damaged and the treacherous among them."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from facefast.models import build_model, load_source
from facefast.models.weights import foreign
from facefast.models.weights.readers import read
from facefast.recipe import ImageSpec, ModelConfig
from tests.support import foreign_files, published
from tests.support.published import Shapes, State, fill


def test_numpys_archives_are_read_without_pickles(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    arrays = {"conv1_1/0": np.arange(6, dtype=">f4").reshape(2, 3), "conv1_1/1": np.ones(2), "names": np.array(["a"])}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    found = read(path)
    assert set(found) == {"conv1_1/0", "conv1_1/1"}
    assert torch.equal(found["conv1_1/0"], torch.arange(6.0).view(2, 3))
    np.savez(tmp_path / "objects.npz", weights=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="objects.npz was refused.*numpy.savez"):
        load_source(tmp_path / "objects.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="weights.npz was refused"):
        load_source(path)


def test_a_pickle_of_arrays_is_refused_with_what_to_do(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "resnet50_ft_weight.pkl").write_bytes(pickle.dumps({"conv1.weight": np.ones((2, 2))}))
    with pytest.raises(ValueError, match=r"resnet50_ft_weight.pkl was refused.*numpy.savez\(NAME.npz"):
        load_source(tmp_path / "resnet50_ft_weight.pkl")


def test_keras_files_name_the_package_that_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", without)
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install h5py"):
        load_source(tmp_path / "weights.h5")


@pytest.mark.parametrize("names", [("kernel:0", "bias:0"), ("W_1:0", "b_1:0")], ids=["keras2", "keras1"])
@pytest.mark.parametrize("whole", [False, True], ids=["weights", "model"])
def test_keras_files_are_read_in_the_order_of_their_layers(names: tuple[str, str], whole: bool, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    layers = [f"conv2d_{k}" for k in range(1, 12)]  # in the alphabet, 10 comes before 2
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        root = file.create_group("model_weights") if whole else file
        root.attrs["layer_names"] = [name.encode() for name in ("input", *layers, "conv1/7x7_s2/bn")]
        root.create_group("input").attrs["weight_names"] = []
        for k, layer in enumerate(layers):
            full = [f"{layer}/{n}" if n.endswith("l:0") or n[:4] == "bias" else f"{layer}_{n}" for n in names]
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in full]
            group[full[0]], group[full[1]] = np.full((1, 1, 1, 2), k, "f4"), np.zeros(2, "f4")
        group = root.create_group("conv1/7x7_s2/bn")
        variables = ("gamma", "beta", "moving_mean", "moving_variance")
        group.attrs["weight_names"] = [f"conv1/7x7_s2/bn/{v}:0".encode() for v in variables]
        for v in variables:
            group[f"conv1/7x7_s2/bn/{v}:0"] = np.ones(3, "f4")
    found = read(tmp_path / "weights.h5")
    assert list(found) == [f"{layer}/{v}" for layer in layers for v in ("kernel", "bias")] + [
        f"conv1/7x7_s2/bn/{v}" for v in variables
    ]
    assert [found[f"{layer}/kernel"][0, 0, 0, 0].item() for layer in layers] == list(range(11))


def test_keras_files_that_point_elsewhere_or_hold_something_else_are_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kernel:0"] = np.ones(3)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file.attrs["layer_names"] = [b"dense"]
        group = file.create_group("dense")
        group.attrs["weight_names"] = [b"kernel:0"]
        group["kernel:0"] = h5py.ExternalLink("other.h5", "kernel:0")
    with pytest.raises(ValueError, match="points out of the file"):
        load_source(tmp_path / "link.h5")
    with pytest.raises(ValueError, match="names no layers: it holds kernel:0"):
        load_source(tmp_path / "other.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "other.h5").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.h5 is not a sound HDF5 file"):
        load_source(tmp_path / "cut.h5")


def renamed(state: State, shapes: Shapes) -> State:
    """The same numbers, one after the other, under another program's names and axes."""
    return {key: t.reshape(shape) for (key, shape), t in zip(shapes.items(), state.values(), strict=False)}


def in_one_storage(state: State) -> State:
    """Views of one long vector, as Torch7's getParameters leaves a network."""
    parts = torch.cat([t.flatten() for t in state.values()]).split([t.numel() for t in state.values()])
    return {key: part.view(t.shape) for (key, t), part in zip(state.items(), parts, strict=True)}


VGG = {key: shape for key, shape in published.vgg_torch(1).items() if not key.startswith("fc8")}
SENET = published.vggface2_torch(True)
# Size of the pictures, names and shapes as facefast has them, and what its own program writes for such weights.
FILES: dict[str, tuple[int, Shapes, Callable[[State], bytes]]] = {
    "VGG_FACE.caffemodel": (32, VGG, lambda s: foreign_files.caffemodel(renamed(s, published.vgg_caffe(1)), old=True)),
    "VGG_FACE.t7": (32, VGG, lambda s: foreign_files.t7(in_one_storage(renamed(s, published.vgg_torch7(1))))),
    "senet50_ft.caffemodel": (
        64,
        SENET,
        lambda s: foreign_files.caffemodel(published.vggface2_caffe(s, factor=0.5), old=False),
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files_of_caffe_and_torch7_give_every_weight_of_the_network(file: str, tmp_path: Path) -> None:
    size, shapes, write = FILES[file]
    state = fill(shapes)
    (tmp_path / file).write_bytes(write(state))
    model = build_model(ModelConfig(source=str(tmp_path / file)), 2, ImageSpec(size=size))
    assert model.report is not None and not model.report.missing and not model.report.unused
    ours = model.backbone.state_dict()
    assert all(torch.equal(ours[key], tensor) for key, tensor in state.items() if not key.startswith("fc."))


def test_blobs_of_double_precision_and_batchnorms_without_a_picture_are_read(tmp_path: Path) -> None:
    path = tmp_path / "double.caffemodel"
    path.write_bytes(foreign_files.caffemodel({"fc/0": torch.tensor([[1.5, 2.0]], dtype=torch.float64)}, old=False))
    assert torch.equal(read(path)["fc/0"], torch.tensor([[1.5, 2.0]]))
    statistics = {"a/bn/0": torch.ones(3), "a/bn/1": torch.ones(3), "a/bn/2": torch.zeros(1)}
    found = foreign.from_caffe(statistics)
    assert set(found) == {"a/bn.running_mean", "a/bn.running_var"} and not any(t.any() for t in found.values())


def test_cut_and_senseless_files_of_caffe_and_torch7_are_refused(tmp_path: Path) -> None:
    weights = {"modules.1.weight": torch.ones(2, 3), "modules.1.bias": torch.ones(2)}
    whole = {
        "cut.t7": foreign_files.t7(weights),
        "cut.caffemodel": foreign_files.caffemodel({"conv/0": torch.ones(2, 3), "conv/1": torch.ones(2)}, old=False),
    }
    for name, data in whole.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert len(read(path)) == 2
        for size in range(0, len(data), 7):  # a field may end there: then its blob or its numbers are missing
            path.write_bytes(data[:size])
            try:
                left = read(path)
            except ValueError as error:
                assert f"{name} is not a sound" in str(error)
            else:
                assert len(left) < 2
    other = {
        "nested.t7": b"".join(struct.pack("<4id", 3, k, 1, 1, 1.0) for k in range(10_000)),
        "beyond.t7": whole["cut.t7"].replace(struct.pack("<2q", 2, 3), struct.pack("<2q", 2, 4)),
        "negative.t7": struct.pack("<2i", 2, -5),
        "ascii.t7": b"4\n1\n3\nV 1\n13\nnn.Sequential\n",
        "half.t7": struct.pack("<3i3si", 4, 1, 3, b"V 1", 16) + b"torch.HalfTensor",
        "shape.caffemodel": whole["cut.caffemodel"].replace(b"\x0a\x02\x02\x03", b"\x0a\x02\x02\x04"),
        "text.caffemodel": b'layer { name: "conv1_1" }',
    }
    for name, data in other.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is not a sound"):
            read(tmp_path / name)
