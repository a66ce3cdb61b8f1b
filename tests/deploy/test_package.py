"""What leaves the project: the files of a package, what they tell of its owner, and exports that are not the model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import facefast
from facefast.deploy import package as packages
from facefast.deploy.onnx_file import Embedder
from facefast.models import FaceModel, build_model, load_source, provenance
from facefast.recipe import (
    BinaryConfig,
    DataConfig,
    ImageSpec,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    TaskConfig,
    from_json,
    to_json,
)
from facefast.runtime import files, manifest
from facefast.runtime.exits import StorageError
from tests.support import published, small

HERE = "/home/ann/secret"


def pictures(batch: int) -> torch.Tensor:
    """Normalised pictures, none like those that `export` itself compares with."""
    return torch.randn(batch, 3, small.SIZE, small.SIZE, generator=torch.Generator().manual_seed(batch))


def recipe_of(**fields: Any) -> dict[str, Any]:
    """The JSON form of a recipe whose owner keeps everything in one folder."""
    data = DataConfig(
        root=f"{HERE}/photographs",
        more=(f"{HERE}/others", f"{HERE}/more"),
        corrections=f"{HERE}/suspects.csv",
        max_bad_fraction=0.25,
    )
    model = ModelConfig(source=f"{HERE}/weights.pt", teacher=f"{HERE}/teacher.pt")
    phase = Phase(start="source", align="coral")
    distilled = dataclasses.replace(phase, distill=dataclasses.replace(phase.distill, embeddings=1.0))
    chosen: dict[str, Any] = {"data": data, "model": model, "phases": (distilled,)} | fields
    return dict(to_json(Recipe(**chosen)))


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return small.make_model()


@pytest.fixture(scope="module")
def package(model: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "new" / "package"
    packages.export(model, "safetensors", out, recipe_of())
    return out


def test_an_embedder_gives_directions_of_the_picture_alone(model: FaceModel) -> None:
    images = pictures(3)
    with torch.inference_mode():
        found = Embedder(model)(images)
    torch.testing.assert_close(found, model.embed(images, mirror=False))
    assert not torch.allclose(found, model.embed(images, mirror=True), atol=1e-3)


def test_a_package_is_its_four_files_and_they_fit_their_manifest(package: Path, model: FaceModel) -> None:
    assert sorted(file.name for file in package.iterdir()) == sorted(packages.PACKAGE)
    manifest.verify(package)
    assert files.read_json(package / "model.json") == json.loads(json.dumps(model.to_config()))
    images = torch.randint(0, 256, (2, 3, small.SIZE, small.SIZE), dtype=torch.uint8)
    assert torch.equal(facefast.load(package).embed(images), model.embed(images))


def test_a_damaged_package_is_no_model(package: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.json", "recipe.json"):
        out = tmp_path / name
        shutil.copytree(package, out)
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        with pytest.raises(StorageError, match=f"{name} does not match the hash"):
            facefast.load(out)


def test_a_package_tells_nothing_of_where_its_owners_files_lie(package: Path) -> None:
    assert HERE not in (package / "recipe.json").read_text()
    found = files.read_json(package / "recipe.json")
    assert (found["data"]["root"], found["data"]["more"], found["data"]["corrections"]) == ("", [], "")
    assert (found["model"]["source"], found["model"]["teacher"]) == ("weights.pt", "teacher.pt")
    assert found["data"]["max_bad_fraction"] == 0.25  # what is no path stays


def test_no_kind_of_recipe_tells_where_its_owners_files_lie(model: FaceModel, tmp_path: Path) -> None:
    plain, nameless = ModelConfig(), LossConfig(weight=0.0)
    phases = (Phase(start="scratch", loss=nameless),)
    scratch = {"model": plain, "phases": (Phase(start="scratch"),)}
    kinds = {
        "labels": scratch | {"data": DataConfig(root=HERE, labels=f"{HERE}/labels.csv")},
        "negatives": scratch
        | {"data": DataConfig(root=HERE), "phases": phases, "binary": BinaryConfig(negatives=f"{HERE}/walls")},
        "people": scratch | {"data": DataConfig(root=HERE), "phases": phases, "binary": BinaryConfig(people=("ann",))},
        "remote": scratch
        | {"data": DataConfig(root=f"s3://bucket{HERE}", cache=f"{HERE}/cache", cache_gib=5), "model": plain},
        "tasks": scratch | {"data": DataConfig(root=HERE), "tasks": TaskConfig(attributes=("Male",))},
    }
    for name, fields in kinds.items():
        packages.export(model, "safetensors", tmp_path / name, recipe_of(**fields))
        assert HERE not in (tmp_path / name / "recipe.json").read_text(), name
        from_json(Recipe, files.read_json(tmp_path / name / "recipe.json"))  # what is left contradicts nothing
    assert files.read_json(tmp_path / "negatives" / "recipe.json")["binary"]["negatives"] == "walls"
    assert files.read_json(tmp_path / "people" / "recipe.json")["binary"]["people"] == ["ann"]


def test_recipes_of_older_runs_without_some_fields_are_packed_too(model: FaceModel, tmp_path: Path) -> None:
    document = recipe_of()
    for section, name in (("data", "more"), ("data", "labels"), ("model", "teacher")):
        del document[section][name]
    del document["binary"]
    packages.export(model, "safetensors", tmp_path / "package", document)
    found = files.read_json(tmp_path / "package" / "recipe.json")
    assert "more" not in found["data"] and "teacher" not in found["model"] and "binary" not in found
    assert document["data"]["root"] == f"{HERE}/photographs"  # the caller's is as it was


def test_a_package_may_replace_a_package_and_leaves_nothing_of_it(package: Path, tmp_path: Path) -> None:
    out = tmp_path / "package"
    shutil.copytree(package, out)
    packages.export(small.make_model(classes=("ann", "bo")), "safetensors", out)
    assert facefast.load(out).class_names == ("ann", "bo")
    assert not (out / "recipe.json").exists()
    manifest.verify(out)


def test_an_export_that_gives_other_embeddings_is_refused(
    model: FaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = small.make_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    write = packages.write_package
    monkeypatch.setattr(packages, "write_package", lambda _, out, recipe: write(other, out, recipe))
    with pytest.raises(ValueError, match="other embeddings than the model: cosine .*, at least 0.9999"):
        packages.export(model, "safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch about its own loader
def test_an_export_that_gives_no_number_is_refused(tmp_path: Path) -> None:
    broken = small.make_model()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    for kind in ("safetensors", "torch", "onnx"):
        out = tmp_path / f"out.{kind}"
        with pytest.raises(ValueError, match=f"{out} gives other embeddings than the model: cosine nan"):
            packages.export(broken, kind, out)
        assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_refused_leaves_the_one_before(
    model: FaceModel, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "package"
    shutil.copytree(package, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr(packages, "LEAST_COSINE", 1.1)
    with pytest.raises(ValueError, match="other embeddings"):
        packages.export(small.make_model(classes=("ann",)), "safetensors", out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_kind_of_export_that_there_is_not_is_refused_before_anything_is_written(
    model: FaceModel, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no export to 'pt'; it must be onnx, torch, safetensors or insightface"):
        packages.export(model, "pt", tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch about its own loader
def test_a_torch_program_gives_the_models_embeddings_at_any_batch_size(tmp_path: Path) -> None:
    model = small.make_model("resnet18")
    out = tmp_path / "model.pt2"
    packages.export(model, "torch", out)
    program = torch.export.load(out).module()
    for batch in (1, 2, 5):
        images = pictures(batch)
        torch.testing.assert_close(program(images), model.embed(images, mirror=False), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="it is a torch.export or TorchScript program.*give the run"):
        facefast.load(out)


# InsightFace.


def insightface_names(depths: tuple[int, ...]) -> set[str]:
    """Names of the tensors of arcface_torch's IResNet of so many blocks a stage, by its backbones/iresnet.py."""

    def norm(name: str) -> set[str]:
        return {f"{name}.{t}" for t in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

    names = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"} | norm("bn1") | norm("bn2") | norm("features")
    for stage, count in enumerate(depths, 1):
        for block in range(count):
            at = f"layer{stage}.{block}"
            names |= {f"{at}.conv1.weight", f"{at}.conv2.weight", f"{at}.prelu.weight"}
            names |= norm(f"{at}.bn1") | norm(f"{at}.bn2") | norm(f"{at}.bn3")
        names |= {f"layer{stage}.0.downsample.0.weight"} | norm(f"layer{stage}.0.downsample.1")
    return names


def insightface_model(backbone: str, size: int = 112, **image: Any) -> FaceModel:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        fields: dict[str, Any] = {"size": size, "template": "arcface"} | image
        spec = ImageSpec(**fields)
        return build_model(ModelConfig(backbone=backbone), 2, spec, ("ann", "bo")).eval()


@pytest.mark.parametrize("backbone", ["iresnet18", "insightface_mbf"])
def test_insightfaces_names_give_the_same_embeddings_bit_for_bit(backbone: str, tmp_path: Path) -> None:
    model, out = insightface_model(backbone), tmp_path / "backbone.pth"
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(1.5)
    packages.export(model, "insightface", out)
    state = torch.load(out, weights_only=True)
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    wanted = {*published.mbf()} if backbone == "insightface_mbf" else insightface_names((2, 2, 2, 2))
    assert state.keys() - counters == {name for name in wanted if not name.endswith("num_batches_tracked")}
    assert counters and all(tensor.is_contiguous() for tensor in state.values())
    images = torch.randint(0, 256, (2, 3, 112, 112), generator=torch.Generator().manual_seed(1)).byte()
    read = facefast.load(out)
    assert read.config.backbone == backbone and torch.equal(read.embed(images), model.embed(images))
    beside = files.read_json(tmp_path / "backbone.json")
    assert (beside["network"], beside["class_names"], beside["template"]) == (backbone, ["ann", "bo"], "arcface")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: small.make_model(), "InsightFace has no mobilefacenet; it has iresnet18, .*: export to onnx"),
        (lambda: insightface_model("insightface_mbf", 96), r"shape \(96, 96\), not \(112, 112\)"),
        (lambda: insightface_model("insightface_mbf", color="bgr"), "color bgr, not rgb"),
        (lambda: insightface_model("insightface_mbf", std=(128.0,) * 3), r"std \(128.0, 128.0, 128.0\), not"),
        (lambda: insightface_model("insightface_mbf", template="none"), "template none, not arcface"),
    ],
)
def test_what_insightface_lacks_or_would_show_other_pictures_is_refused(
    model: Callable[[], FaceModel], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        packages.export(model(), "insightface", tmp_path / "backbone.pth")
    assert list(tmp_path.iterdir()) == []


def test_options_that_a_kind_of_export_does_not_have_are_refused(model: FaceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an export to torch takes float32; input uint8 is for onnx"):
        packages.export(model, "torch", tmp_path / "out", kind="uint8")
    with pytest.raises(ValueError, match="where the description of the export would go"):
        packages.export(model, "onnx", tmp_path / "out.json")
    with pytest.raises(
        ValueError, match=r"does not end in \.onnx, by which commands know such a file; give .*out\.onnx"
    ):
        packages.export(model, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# What travels.


def test_measurements_and_the_licence_travel_with_every_kind_of_export(tmp_path: Path) -> None:
    model = insightface_model("insightface_mbf", 112)
    model.metrics = {"row": "finetune", "results": {"top1": 0.5}, "evaluation_set": None, "selected": None}
    model.provenance = provenance.with_licence(None, "MIT")
    found: dict[str, dict[str, Any]] = {}
    for to, name in (("onnx", "m.onnx"), ("insightface", "b.pth"), ("torch", "t.pt2"), ("safetensors", "package")):
        packages.export(model, to, tmp_path / name)
    found["onnx"] = files.read_json(tmp_path / "m.json")
    found["insightface"] = files.read_json(tmp_path / "b.json")
    extra = {"model.json": ""}
    torch.export.load(tmp_path / "t.pt2", extra_files=extra)
    found["torch"] = json.loads(extra["model.json"])
    found["safetensors"] = facefast.load(tmp_path / "package").to_config()
    for kind, document in found.items():
        assert document["metrics"]["results"] == {"top1": 0.5}, kind
        assert document["provenance"]["licence"] == "MIT", kind


def test_a_package_of_a_newer_format_is_an_error_that_says_so(package: Path, tmp_path: Path) -> None:
    for name in ("model.json", "manifest.json"):
        out = tmp_path / name
        shutil.copytree(package, out)
        document = files.read_json(out / name)
        files.write_json(out / name, document | {"format": 99})
        if name == "model.json":
            manifest.write(out, step=0)
        else:
            document["format"] = 99
            files.write_json(out / name, document | {"digest": manifest._digest(document)})
        with pytest.raises(
            (ValueError, StorageError), match="format 99.*(use the facefast that wrote it, or a later one)"
        ):
            facefast.load(out)
        if name == "model.json":
            with pytest.raises(ValueError, match="format 99; this facefast reads 1; use the facefast that wrote it"):
                load_source(out)
