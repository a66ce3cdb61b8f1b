"""ONNX files: what they say of themselves, heads and bytes inside, and that facefast reads its own as the model they
were."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from facefast.deploy import onnx_file, package
from facefast.models import FaceModel, build_model, checkpoint, exported
from facefast.recipe import AttributeSpec, ImageSpec, ModelConfig
from facefast.runtime import files
from tests.support import small

BYTES = torch.randint(0, 256, (3, 3, small.SIZE, small.SIZE), generator=torch.Generator().manual_seed(5)).byte()
BGR = ImageSpec(size=small.SIZE, template="arcface", color="bgr", mean=(90.0, 105.0, 130.0), std=(60.0, 128.0, 50.0))


def odd_model(head: str = "cosine") -> FaceModel:
    """Blue first, a mean and a std for each channel, attributes of both kinds, and everything that is found out."""
    attributes = (AttributeSpec("Male"), AttributeSpec("age", (20.0, 30.0, 50.0)))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = ModelConfig(backbone="resnet18", embedding=16, head=head)  # type: ignore[arg-type]
        model = build_model(config, 3, BGR, ("ann", "bo", "cy"), attributes=attributes)
    model.scale = 16.0
    model.faces, model.thresholds = {"how": "landmarks"}, {"pairs": [], "naming": [], "measured_on": "nothing"}
    model.metrics = {"row": "finetune", "results": {"top1": 0.5}, "evaluation_set": None, "selected": None}
    return model.eval()


@pytest.fixture(scope="module")
def odd() -> FaceModel:
    return odd_model()


@pytest.fixture(scope="module")
def files_of(odd: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model for normalised pictures and for bytes."""
    folder = tmp_path_factory.mktemp("onnx")
    found = {kind: folder / f"{kind}.onnx" for kind in (exported.FLOAT, exported.BYTES)}
    for kind, path in found.items():
        package.export(odd, "onnx", path, {"seed": 7, "data": {"root": "/home/ann"}, "model": {}}, kind)
    return found


def run(path: Path, images: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images}), strict=True))


def test_the_outputs_are_the_models_whether_a_file_takes_normalised_pictures_or_bytes(
    odd: FaceModel, files_of: dict[str, Path]
) -> None:
    plain, whole = odd.embed(BYTES, mirror=False), odd.predict(BYTES)
    found = {
        exported.FLOAT: run(files_of[exported.FLOAT], odd.preprocess(BYTES).numpy()),
        exported.BYTES: run(files_of[exported.BYTES], BYTES.permute(0, 2, 3, 1).numpy()),
    }
    for outputs in found.values():
        assert list(outputs) == ["embeddings", "lengths", "probabilities", "attributes"]
        np.testing.assert_allclose(outputs["embeddings"], plain.numpy(), atol=1e-4)
        np.testing.assert_allclose(outputs["probabilities"], whole.probabilities.numpy(), atol=1e-4)
        male, above_20, above_30 = outputs["attributes"].T
        np.testing.assert_allclose(male, whole.attributes["Male"].numpy(), atol=1e-4)
        levels = np.array([20, 30, 50])[(above_20 > 0.5).astype(int) + (above_30 > 0.5)]
        np.testing.assert_array_equal(levels, whole.attributes["age"].numpy())
    one, other = (outputs["embeddings"] for outputs in found.values())
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert (plain @ plain.T).min() < 0.99  # pictures that are told apart


@pytest.mark.parametrize("kind", [exported.FLOAT, exported.BYTES])
def test_a_file_says_in_itself_and_beside_itself_what_it_takes(files_of: dict[str, Path], kind: str) -> None:
    path = files_of[kind]
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    beside = files.read_json(path.with_suffix(".json"))
    assert said == {name: value if isinstance(value, str) else json.dumps(value) for name, value in beside.items()}
    assert beside["input_kind"] == kind and beside["input"].startswith(f"images, {kind} [batch, ")
    shape, form = run_shape(path)
    assert ("tensor(float)" if kind == exported.FLOAT else "tensor(uint8)") == form
    assert shape[1:] == ([3, 32, 32] if kind == exported.FLOAT else [32, 32, 3])
    assert (beside["color"], beside["mean"], beside["template"]) == ("bgr", list(BGR.mean), "arcface")
    assert beside["class_names"] == ["ann", "bo", "cy"] and beside["metrics"]["results"] == {"top1": 0.5}
    assert "/home/ann" not in json.dumps(beside)


def run_shape(path: Path) -> tuple[list[Any], str]:
    (given,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
    return given.shape, given.type


@pytest.mark.parametrize("kind", [exported.FLOAT, exported.BYTES])
def test_facefast_reads_its_own_file_as_the_model_it_was(odd: FaceModel, files_of: dict[str, Path], kind: str) -> None:
    read = checkpoint.load_model(files_of[kind])
    assert read.to_config() == odd.to_config() and not read.training and exported.is_exported(read)
    for model in (read, copy.deepcopy(read)):
        torch.testing.assert_close(model.embed(BYTES), odd.embed(BYTES), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            model.encode(odd.preprocess(BYTES)), odd.encode(odd.preprocess(BYTES)), atol=1e-3, rtol=0
        )
        ours, theirs = model.predict(BYTES), odd.predict(BYTES)
        assert ours.names == theirs.names
        torch.testing.assert_close(ours.probabilities, theirs.probabilities, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.attributes, theirs.attributes, rtol=0, atol=1e-4)
    assert checkpoint.read_recipe(files_of[kind]) == {"seed": 7, "data": {"root": ""}, "model": {}}
    assert {name for name in read.state_dict() if name.startswith("backbone.")} == {"backbone.graph"}


def test_a_linear_head_sees_the_length_that_embeddings_had(tmp_path: Path) -> None:
    model = odd_model("linear")
    with torch.no_grad():
        assert model.head is not None
        model.head.weight.mul_(20)
    package.export(model, "onnx", tmp_path / "model.onnx")
    outputs = run(tmp_path / "model.onnx", model.preprocess(BYTES).numpy())
    expected = model.predict(BYTES).probabilities
    np.testing.assert_allclose(outputs["probabilities"], expected.numpy(), atol=1e-4)
    assert expected.std() > 0.05  # no matter of course
    found = checkpoint.load_model(tmp_path / "model.onnx").predict(BYTES).probabilities
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def spoilt(path: Path, out: Path, how: str) -> Path:
    """A file that something is wrong with."""
    model = onnx.load(path)
    said = {entry.key: entry.value for entry in model.metadata_props}
    if how == "truncated":
        out.write_bytes(path.read_bytes()[:5000])
        return out
    if how == "another program's":
        said = {}
    if how == "newer":
        said["format"] = "facefast ONNX 99"
    if how == "older":
        said["format"] = "facefast ONNX 1"
    if how == "newer model":
        said["model_format"] = "99"
    if how == "no names":
        del said["class_names"]
    if how == "other pictures":
        said["image"] = json.dumps(json.loads(said["image"]) | {"size": 64})
    if how == "no head":
        kept = [tensor for tensor in model.graph.initializer if tensor.name != "head.weight"]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
    if how == "a huge head":
        said["num_classes"], said["class_names"] = "90000000", "[]"
    if how == "weights elsewhere":
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    onnx.helper.set_model_props(model, said)
    out.write_bytes(model.SerializeToString())
    return out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "is no ONNX file"),
        ("another program's", "does not say what its pictures and answers are; facefast reads what it exported itself"),
        ("newer", "format 'facefast ONNX 99'; this facefast reads 'facefast ONNX 2'; use the facefast that wrote it"),
        ("older", "format 'facefast ONNX 1'; .*; export the model anew"),
        ("newer model", "format 99; this facefast reads 1; use the facefast that wrote it, or a later one"),
        ("no names", "is damaged, or no export of facefast's: 'class_names'"),
        ("other pictures", r"not from pictures \[3, 64, 64\]"),
        ("no head", "weights of its heads are missing or too many: head.weight|describes a model of"),
        ("a huge head", "describes a model of"),
        ("weights elsewhere", "keeps its weights in other files"),
    ],
)
def test_a_file_that_is_no_sound_export_of_ours_is_refused_by_name(
    files_of: dict[str, Path], tmp_path: Path, how: str, message: str
) -> None:
    path = spoilt(files_of[exported.FLOAT], tmp_path / "spoilt.onnx", how)
    with pytest.raises(ValueError, match=f"spoilt.onnx.*({message})"):
        checkpoint.load_model(path)


def test_bytes_that_a_file_gets_back_from_normalised_pictures_are_those_that_went_in() -> None:
    model = odd_model()
    network = exported.Exported.__new__(exported.Exported)
    torch.nn.Module.__init__(network)
    network.image, network.kind = dataclasses.replace(BGR), exported.BYTES
    seen: list[Any] = []

    class Session:
        def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
            seen.append(feed["images"])
            return [np.zeros((3, 16), np.float32), np.ones((3, 1), np.float32)]

    network._session = Session()
    network(model.preprocess(BYTES))
    np.testing.assert_array_equal(seen[0], BYTES.permute(0, 2, 3, 1).numpy())


def test_a_batch_of_any_size_goes_through(files_of: dict[str, Path], odd: FaceModel) -> None:
    read = checkpoint.load_model(files_of[exported.FLOAT])
    for number in (1, 2, 7):
        images = torch.randn(number, 3, small.SIZE, small.SIZE, generator=torch.Generator().manual_seed(number))
        channels_last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(read.embed(channels_last), odd.embed(images), rtol=0, atol=1e-4)


def test_an_export_has_no_stages_to_start_from(files_of: dict[str, Path]) -> None:
    read = checkpoint.load_model(files_of[exported.FLOAT])
    for asked in (read.stage_ends, read.blocks):
        with pytest.raises(ValueError, match="was exported and has no stages any more"):
            asked()


def test_heads_do_not_change_what_the_network_gives(odd: FaceModel) -> None:
    graph = onnx_file.network_of(odd)
    names = [output.name for output in graph.graph.output]
    onnx_file.complete(graph, odd)
    assert [output.name for output in graph.graph.output] == [*names, "probabilities", "attributes"]
    onnx.checker.check_model(graph)
