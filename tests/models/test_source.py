"""Source models: what is read, what is recognised, what is refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor

from facefast.models import (
    FaceModel,
    apply_source,
    build_model,
    load_source,
    model_from_source,
)
from facefast.models.backbones import build_backbone
from facefast.models.weights.layouts import recognise
from facefast.models.weights.source import PREFIXES, strip_prefixes
from facefast.recipe import ImageSpec, ModelConfig

PUBLISHED = "mobilefacenet_casia_112x96.ckpt"
TEMPLATE = ((30.2946, 51.6963), (65.5318, 51.5014), (48.0252, 71.7366), (33.5493, 92.3655))
TINY = ImageSpec(size=32)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def state_of(name: str, shape: tuple[int, int] = (112, 112), /, **more: Tensor) -> dict[str, Tensor]:
    """A state dict in the published layout, without the time that random weights take."""
    with torch.device("meta"):
        module = build_backbone(name, shape).module
    return module.state_dict() | more


@pytest.fixture(scope="module")
def tiny_state() -> dict[str, Tensor]:
    """Weights of a MobileFaceNet for pictures so small that its layout tells no template."""
    torch.manual_seed(0)
    return build_backbone("mobilefacenet", TINY.shape).module.state_dict()


def test_the_published_mobilefacenet_loads_with_every_key_used(shared_weights: Path) -> None:
    source = load_source(shared_weights / PUBLISHED)
    assert (source.backbone, source.embedding) == ("mobilefacenet", 128)
    assert source.image == ImageSpec(size=112, width=96, template="arcface_112x96", mean=(127.5,) * 3, std=(128.0,) * 3)
    assert source.fixed == {"size", "width", "template", "mean", "std", "color"}
    model = build_model(ModelConfig(source=str(shared_weights / PUBLISHED)), 239)
    assert model.report is not None
    assert (model.report.used, model.report.total) == (333, 333)
    assert not model.report.missing and not model.report.unused and not model.report.classifier
    assert str(model.report).endswith(f"{PUBLISHED}: 333 of 333 tensors used")
    raw = torch.load(shared_weights / PUBLISHED, map_location="cpu", weights_only=True)
    for key, tensor in raw["net_state_dict"].items():
        assert torch.equal(model.backbone.state_dict()[key], tensor), key


def test_the_published_mobilefacenet_knows_people_it_never_saw(shared_weights: Path, celeba: Path) -> None:
    rows = [line.split() for line in (celeba / "identity_CelebA.txt").read_text().splitlines()]
    files: dict[str, list[str]] = {}
    for file, identity in rows:
        files.setdefault(identity, []).append(file)
    people = [found[:4] for found in files.values() if len(found) >= 20][:12]
    lines = (celeba / "list_landmarks_align_celeba.txt").read_text().splitlines()[2:]
    points = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in lines}
    pictures = torch.stack([aligned(celeba / "img_align_celeba" / f, points[f]) for person in people for f in person])
    model = model_from_source(load_source(shared_weights / PUBLISHED)).eval()
    embeddings = model.embed(pictures)
    scores = (embeddings @ embeddings.T).fill_diagonal_(-1)
    person = torch.arange(12).repeat_interleave(4)
    right = (person[scores.argmax(1)] == person).float().mean()
    assert right >= 0.95, f"nearest neighbour right in {right:.2%} of 48 pictures"


def aligned(path: Path, landmarks: list[float]) -> Tensor:
    """uint8 [3, 112, 96]: the picture moved so that eyes, nose and a corner of the mouth fit."""
    rows, targets = [], []
    for (x, y), sx, sy in zip(TEMPLATE, landmarks[::2], landmarks[1::2], strict=False):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        targets += [sx, sy]
    solution = torch.linalg.lstsq(torch.tensor(rows), torch.tensor(targets)[:, None]).solution
    a, b, tx, ty = solution[:, 0].tolist()
    with Image.open(path) as picture:
        moved = picture.convert("RGB").transform(
            (96, 112), Image.Transform.AFFINE, (a, -b, tx, b, a, ty), Image.Resampling.BILINEAR
        )
    return torch.frombuffer(bytearray(moved.tobytes()), dtype=torch.uint8).view(112, 96, 3).permute(2, 0, 1)


WRAPPINGS: tuple[Callable[[dict[str, Tensor]], Any], ...] = (
    lambda s: s,
    lambda s: {"epoch": 3, "net_state_dict": s},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "best": 0.5},
    lambda s: {"model": {f"_orig_mod.module.backbone.{k}": v for k, v in s.items()}},
    lambda s: {f"module._orig_mod.net.model.{k}": v for k, v in s.items()},
    lambda s: {"state_dict_backbone": s, "state_dict_softmax_fc": {"weight": torch.ones(2, 2)}},
    lambda s: {"optimizer": {"state": {}}, "my_network": s},
    lambda s: {"model": {"state_dict": s}, "args": {"lr": 0.1}},
    lambda s: {**s, "version": 2},
)


@pytest.mark.parametrize("wrap", WRAPPINGS, ids=range(len(WRAPPINGS)))
def test_weights_are_found_in_every_usual_wrapping(
    wrap: Callable[[dict[str, Tensor]], Any], tiny_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(wrap(tiny_state), tmp_path / "weights.pth")
    source = load_source(tmp_path / "weights.pth")
    assert set(source.state) == {f"backbone.{key}" for key in tiny_state}
    assert source.backbone == "mobilefacenet"


def test_safetensors_and_torch_files_give_the_same(tiny_state: dict[str, Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(tiny_state, tmp_path / "weights.safetensors")
    torch.save(tiny_state, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    first = load_source(tmp_path / "weights.safetensors").state
    second = load_source(str(tmp_path / "weights.pt")).state
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("first", PREFIXES)
@pytest.mark.parametrize("second", PREFIXES)
def test_prefixes_are_stripped_repeated_and_in_any_order(first: str, second: str) -> None:
    one = torch.ones(1)
    for key in (first + second, second + first + second, first + first):
        found = strip_prefixes({f"{key}conv1.weight": one, "head.weight": one}, Path("x"))
        assert set(found) == {"conv1.weight", "head.weight"}


def test_prefixes_of_compiled_submodules_are_stripped_and_others_kept() -> None:
    one = torch.ones(1)
    found = strip_prefixes({"backbone.layer1._orig_mod.0.model.w": one, "network.w": one}, Path("x"))
    assert set(found) == {"layer1.0.model.w", "network.w"}


def test_two_networks_in_one_state_dict_are_refused(tmp_path: Path) -> None:
    torch.save({"model.w": torch.ones(1), "net.w": torch.ones(1)}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"model\.w and net\.w"):
        load_source(tmp_path / "two.pt")


class Evil:
    """Unpickled by an unsafe loader, it writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.ckpt", "evil.bin", "evil.safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_a_program_is_refused_and_does_not_run(name: str, form: str, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / name
    value = {"state_dict": {"conv1.weight": torch.ones(1)}, "extra": Evil(sentinel)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError) as error:
        load_source(path)
    assert str(path) in str(error.value)
    assert "weights_only=False" not in str(error.value)
    if form != "pickle" and not name.endswith("safetensors"):
        assert "asks for posix.system" in str(error.value)
    assert not sentinel.exists()
    assert pickle.loads(pickle.dumps(Evil(sentinel))) == 0  # the trap itself works
    assert sentinel.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="more than tensors.*torch.nn.modules.linear.Linear"):
        load_source(tmp_path / "module.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_and_missing_files_are_named(suffix: str, tiny_state: dict[str, Tensor], tmp_path: Path) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    if suffix == "pt":
        torch.save(tiny_state, whole)
    else:
        safetensors.torch.save_file(tiny_state, whole)
    cut.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"cut.{suffix}"):
        load_source(cut)
    with pytest.raises(ValueError, match="no such file"):
        load_source(tmp_path / f"none.{suffix}")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, "keys epoch, lr"),
        ([torch.ones(1)], "a list"),
        (
            {"student": {"w": torch.ones(1)}, "teacher": {"w": torch.ones(1)}},
            "keys student, teacher",
        ),
        ({}, "no state dict"),
    ],
)
def test_a_file_without_one_state_dict_is_refused(value: object, message: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_source(tmp_path / "other.pt")


def test_a_file_nested_without_end_is_refused(tmp_path: Path) -> None:
    value: dict[str, Any] = {}
    value["model"] = value
    torch.save(value, tmp_path / "endless.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_source(tmp_path / "endless.pt")


@pytest.mark.parametrize(
    ("shape", "width", "template"),
    [((112, 96), 96, "arcface_112x96"), ((112, 112), 0, "arcface")],
)
def test_a_mobilefacenet_tells_its_pictures_by_its_last_kernel(
    shape: tuple[int, int], width: int, template: str
) -> None:
    layout = recognise(state_of("mobilefacenet", shape))
    assert layout is not None and layout.image is not None
    assert (layout.backbone, layout.embedding) == ("mobilefacenet", 128)
    assert (layout.image.size, layout.image.width, layout.image.template) == (112, width, template)
    assert layout.image.std == (128, 128, 128)


def test_a_layer_for_other_pictures_leaves_the_contract_open() -> None:
    for name in ("mobilefacenet", "iresnet18"):
        layout = recognise(state_of(name, (64, 64)))
        assert layout is not None
        assert (layout.backbone, layout.image, layout.fixed) == (name, None, frozenset())


@pytest.mark.parametrize("name", ["iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200"])
def test_an_iresnet_is_recognised_by_its_depth(name: str) -> None:
    layout = recognise(state_of(name))
    assert layout is not None
    assert (layout.backbone, layout.embedding) == (name, 512)
    assert layout.image == ImageSpec(size=112, template="arcface", std=(127.5, 127.5, 127.5))
    assert "template" in layout.fixed


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_a_resnet_is_recognised_with_imagenets_normalisation(name: str) -> None:
    layout = recognise(state_of(name, **{"fc.weight": torch.ones(1000, 1), "fc.bias": torch.ones(1)}))
    assert layout is not None and layout.image is not None
    assert (layout.backbone, layout.embedding) == (name, 0)
    assert (layout.image.mean, layout.image.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert layout.fixed == {"mean", "std", "color"}


def test_a_resnet_with_other_classes_than_imagenets_tells_no_normalisation() -> None:
    layout = recognise(state_of("resnet18", **{"fc.weight": torch.ones(37, 512)}))
    assert layout is not None
    assert (layout.backbone, layout.image) == ("resnet18", None)


def test_networks_of_other_widths_or_kinds_are_not_mistaken() -> None:
    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2().state_dict()
        vgg = torchvision.models.vgg11().state_dict()
    assert recognise(wide) is None
    assert recognise(vgg) is None


def test_the_sources_classes_are_left_out_by_name(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    model = build_model(ModelConfig(source=str(tmp_path / "resnet18.pth")), 3, ImageSpec(size=32))
    assert model.report is not None
    assert model.report.classifier == ("backbone.fc.weight", "backbone.fc.bias")
    assert "left out: classifier" in str(model.report)
    assert not model.report.missing and not model.report.unused
    assert model.image == ImageSpec(size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert model.config.backbone == "resnet18"


def test_missing_and_unused_tensors_are_counted_and_named(tiny_state: dict[str, Tensor], tmp_path: Path) -> None:
    state = {k: v for k, v in tiny_state.items() if not k.startswith("linear1.")}
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state | {"extra.weight": torch.ones(1)}, tmp_path / "part.pt")
    model = build_model(ModelConfig(embedding=16), 2, TINY)
    report = apply_source(model, load_source(tmp_path / "part.pt"))
    assert report.missing == tuple(
        f"backbone.linear1.{name}"
        for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    )
    assert report.unused == ("backbone.extra.weight",)
    assert "5 missing (backbone.linear1.conv.weight, " in str(report)
    assert "and 1 more), 1 unused (backbone.extra.weight)" in str(report)


def test_a_shape_mismatch_names_both_shapes_and_changes_nothing(tiny_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tiny_state, tmp_path / "weights.pt")
    model = build_model(ModelConfig(embedding=64), 2, TINY)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"\[128, 512, 1, 1\].*\[64, 512, 1, 1\].*embedding"):
        apply_source(model, load_source(tmp_path / "weights.pt"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_source_for_another_architecture_is_refused(tiny_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(tiny_state, tmp_path / "weights.pt")
    config = ModelConfig(backbone="timm/mobilenetv3_small_050", source=str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="none of its 333 tensors fits.*conv1.conv.weight"):
        build_model(config, 2, TINY)


def test_a_source_of_another_depth_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds a resnet18, model.backbone is resnet34"):
        load_source(tmp_path / "weights.pt", "resnet34")


def test_an_unknown_architecture_needs_its_name(tmp_path: Path) -> None:
    name = "timm/mobilenetv3_small_050"
    torch.save(build_backbone(name, (32, 32)).module.state_dict(), tmp_path / "weights.pt")
    path = str(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="name it with model.backbone"):
        build_model(ModelConfig(source=path), 2, TINY)
    model = build_model(ModelConfig(source=path, backbone=name), 2, TINY)
    assert model.report is not None and model.report.used == model.report.total
    with pytest.raises(ValueError, match="does not tell the size"):
        model_from_source(load_source(path, name))


def test_pictures_that_contradict_the_source_are_refused(shared_weights: Path) -> None:
    config = ModelConfig(source=str(shared_weights / PUBLISHED))
    with pytest.raises(ValueError, match="image.size is 128.*trained with 112"):
        build_model(config, 2, ImageSpec(size=128))


def saved_model(folder: Path, seed: int, **files: FaceModel) -> FaceModel:
    """Writes a facefast model as a checkpoint does."""
    torch.manual_seed(seed)
    image = ImageSpec(size=32, template="celeba", std=(100.0, 101.0, 102.0))
    config = ModelConfig(backbone="resnet18", embedding=8, head="cosine")
    model = build_model(config, 3, image, ("a", "b", "c"))
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(model.to_config()))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    for stem, other in files.items():
        safetensors.torch.save_file(other.state_dict(), folder / f"{stem}.safetensors")
    return model


def test_a_facefast_model_is_a_source_with_its_whole_contract(tmp_path: Path) -> None:
    first = saved_model(tmp_path / "package", 1)
    source = load_source(tmp_path / "package")
    assert (source.backbone, source.embedding, source.image) == ("resnet18", 8, first.image)
    second = build_model(ModelConfig(source=str(tmp_path / "package")), 7)
    assert second.report is not None
    assert second.report.classifier == ("head.weight",)
    assert not second.report.missing and not second.report.unused
    assert second.embedding_size == 8 and second.num_classes == 7
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(first.eval().encode(pictures), second.eval().encode(pictures))


def test_a_run_folder_gives_its_best_model_and_averaged_weights(tmp_path: Path) -> None:
    best = saved_model(tmp_path / "run" / "checkpoints" / "best", 1)
    saved_model(tmp_path / "run" / "checkpoints" / "last", 2)
    key = "backbone.conv1.weight"
    assert torch.equal(load_source(tmp_path / "run").state[key], best.state_dict()[key])
    saved_model(tmp_path / "averaged", 3, ema=best)
    assert torch.equal(load_source(tmp_path / "averaged").state[key], best.state_dict()[key])


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no facefast model"):
        load_source(tmp_path)
    saved_model(tmp_path / "other", 1)
    (tmp_path / "other" / "model.json").write_text('{"backbone": "resnet18"}')
    with pytest.raises(ValueError, match="no entry 'embedding'"):
        load_source(tmp_path / "other")


def test_imagenet_weights_come_from_torchvisions_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    published: dict[str, Tensor] = torchvision.models.resnet18().state_dict()
    asked = []

    def get_state_dict(self: object, **options: object) -> dict[str, Tensor]:
        asked.append((str(self), options))
        return published

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    model = build_model(ModelConfig(backbone="resnet18", source="imagenet"), 2, ImageSpec(size=32))
    assert asked == [("ResNet18_Weights.IMAGENET1K_V1", {"progress": False, "check_hash": True})]
    assert torch.equal(model.state_dict()["backbone.conv1.weight"], published["conv1.weight"])
    assert model.image == ImageSpec(size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def test_imagenet_weights_out_of_reach_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object, **options: object) -> dict[str, Tensor]:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(ValueError, match="Name or service not known.*give its path"):
        load_source("imagenet", "resnet18")
    with pytest.raises(ValueError, match="no weights for backbone mobilefacenet; choose one of"):
        load_source("imagenet", "mobilefacenet")


def test_timms_own_weights_bring_their_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model
    asked = []

    def create_without_network(name: str, pretrained: bool, **options: object) -> torch.nn.Module:
        asked.append((name, pretrained))
        return create(name, pretrained=False, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(timm, "create_model", create_without_network)
    source = load_source("imagenet", "timm/inception_v4")
    assert asked == [("inception_v4", True)]
    assert source.image == ImageSpec(size=299, width=299, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))
    assert source.fixed == {"mean", "std", "color"}
