"""Every published model that can be a source: its size, its names, its pictures and its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from facefast.models import FaceModel, build_model
from facefast.models.backbones import NAMES, build_backbone
from facefast.models.weights import source as source_module
from facefast.models.weights.layouts import keep, recognise
from facefast.recipe import ImageSpec, ModelConfig
from tests.support import published
from tests.support.published import IR18, IR50, IR101, Shapes, State, fill

BGR1, BGR2 = (93.5940, 104.7624, 129.1863), (91.4953, 103.8827, 131.0912)
RGB1, RGB2 = BGR1[::-1], BGR2[::-1]
ONE, HALF = (1.0,) * 3, (127.5,) * 3
INCEPTION, PREACTIVATED = "timm/inception_resnet_v2", "timm/resnetv2_50"

# Backbone, learnt numbers, numbers it gives, size. Published are torchvision's ResNets with a 1000-way classifier,
# InsightFace's IResNets with 512 fixed scales, keras-vggface's VGG-16 with 2622 classes and its ResNet-50 with 8631,
# SE-ResNet-50 with ImageNet's 1000. The paper's MobileFaceNet of 0.99 million is the one for 112 x 96, which has
# 7 x 512 numbers less. The others are counted over the published names, see `LAYOUTS`.
TABLE = (
    ("mobilefacenet", 999_552 + 7 * 512, 128, 112),
    ("mobilefacenet_short", 684_160 + 7 * 512, 128, 112),
    ("mobilefacenet_half", 284_928, 128, 112),
    ("insightface_mbf", 2_059_520, 512, 112),
    ("iresnet18", 24_025_600 - 512, 512, 112),
    ("iresnet34", 34_139_328 - 512, 512, 112),
    ("iresnet50", 43_590_848 - 512, 512, 112),
    ("iresnet100", 65_156_160 - 512, 512, 112),
    ("iresnet200", 118_833_920 - 512, 512, 112),
    ("adaface_ir18", 24_020_352, 512, 112),
    ("adaface_ir50", 43_585_600, 512, 112),
    ("adaface_ir101", 65_150_912, 512, 112),
    ("vggface", 145_002_878 - 4097 * 2622, 4096, 224),
    ("vggface2_resnet50", 41_192_951 - 2049 * 8631, 2048, 224),
    ("vggface2_senet50", 28_088_024 - 2049 * 1000, 2048, 224),
    ("inception_resnet_v1", 23_482_624, 512, 160),
    ("resnet18", 11_689_512 - 513_000, 512, 224),
    ("resnet34", 21_797_672 - 513_000, 512, 224),
    ("resnet50", 25_557_032 - 2_049_000, 2048, 224),
    ("resnet101", 44_549_160 - 2_049_000, 2048, 224),
    ("resnet152", 60_192_808 - 2_049_000, 2048, 224),
)


@pytest.mark.parametrize(("name", "numbers", "out", "size"), TABLE, ids=[row[0] for row in TABLE])
def test_backbones_have_the_published_parameter_counts_and_output_sizes(
    name: str, numbers: int, out: int, size: int
) -> None:
    with torch.device("meta"):
        backbone = build_backbone(name, (size, size))
        found = backbone.module(torch.zeros(2, 3, size, size))
    assert sum(p.numel() for p in backbone.module.parameters()) == numbers
    assert found.shape == (2, out)
    assert backbone.size == out


def test_the_table_has_every_backbone_of_our_own() -> None:
    assert [row[0] for row in TABLE] == list(NAMES)


def timm_shapes(name: str) -> Shapes:
    import timm

    with torch.device("meta"):
        state = timm.create_model(name.removeprefix("timm/")).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}


def vggface2_caffe_shapes(squeeze: bool) -> Shapes:
    state = {k: torch.empty(shape, device="meta") for k, shape in published.vggface2_torch(squeeze).items()}
    return {key: tuple(tensor.shape) for key, tensor in published.vggface2_caffe(state).items()}


# What a file holds, the backbone that it is, size, mean, std, colour order, template, whether mean and colour are sure.
File = tuple[Callable[[], Shapes], str, int, tuple[float, ...], tuple[float, ...], str, str, bool]


def vggface2(shapes: Callable[[bool], Shapes], squeeze: bool, color: str) -> File:
    name = "vggface2_senet50" if squeeze else "vggface2_resnet50"
    return (lambda: shapes(squeeze)), name, 224, BGR2 if color == "bgr" else RGB2, ONE, color, "auto", True


LAYOUTS: dict[str, File] = {
    "vgg_face_dag.pth": (published.vgg_torch, "vggface", 224, RGB1, ONE, "rgb", "auto", False),
    "VGG_FACE.caffemodel": (published.vgg_caffe, "vggface", 224, BGR1, ONE, "bgr", "auto", True),
    "VGG_FACE.t7": (published.vgg_torch7, "vggface", 224, BGR1, ONE, "bgr", "auto", False),
    "rcmalli_vggface_tf_vgg16.h5": (published.vgg_keras, "vggface", 224, BGR1, ONE, "bgr", "auto", True),
    "vgg_face_weights.h5": (
        lambda: published.vgg_keras(numbered=True),
        "vggface",
        224,
        RGB1,
        ONE,
        "rgb",
        "auto",
        False,
    ),
    "resnet50_ft_weight.pkl": vggface2(published.vggface2_torch, False, "bgr"),
    "senet50_ft_weight.pkl": vggface2(published.vggface2_torch, True, "bgr"),
    "resnet50_ft_dag.pth": vggface2(published.vggface2_dag, False, "rgb"),
    "senet50_ft_dag.pth": vggface2(published.vggface2_dag, True, "rgb"),
    "resnet50_ft.caffemodel": vggface2(vggface2_caffe_shapes, False, "bgr"),
    "senet50_ft.caffemodel": vggface2(vggface2_caffe_shapes, True, "bgr"),
    "rcmalli_vggface_tf_resnet50.h5": vggface2(published.vggface2_keras, False, "bgr"),
    "rcmalli_vggface_tf_senet50.h5": vggface2(published.vggface2_keras, True, "bgr"),
    "adaface_ir18.ckpt": (lambda: published.adaface(IR18), "adaface_ir18", 112, HALF, HALF, "bgr", "arcface", True),
    "adaface_ir50.ckpt": (lambda: published.adaface(IR50), "adaface_ir50", 112, HALF, HALF, "bgr", "arcface", True),
    "adaface_ir101.ckpt": (lambda: published.adaface(IR101), "adaface_ir101", 112, HALF, HALF, "bgr", "arcface", True),
    "mbf.pth": (published.mbf, "insightface_mbf", 112, HALF, HALF, "rgb", "arcface", True),
    "20180402-114759-vggface2.pt": (
        published.facenet,
        "inception_resnet_v1",
        160,
        HALF,
        (128.0,) * 3,
        "rgb",
        "auto",
        True,
    ),
    "inception_resnet_v2": (lambda: timm_shapes(INCEPTION), INCEPTION, 299, HALF, HALF, "rgb", "auto", True),
    "resnetv2_50": (lambda: timm_shapes(PREACTIVATED), PREACTIVATED, 224, HALF, HALF, "rgb", "auto", True),
}
HEADS = ("fc8.", "fc.", "classifier.", "head.", "logits.", "classif.")


@pytest.mark.parametrize("file", LAYOUTS)
def test_a_published_file_is_recognised_with_its_pictures_and_every_name_has_a_place(file: str) -> None:
    shapes, name, size, mean, std, color, template, sure = LAYOUTS[file]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes().items()}
    layout = recognise(state)
    assert layout is not None and layout.image is not None
    assert layout.backbone == name
    assert layout.image == ImageSpec(size=size, mean=mean, std=std, color=color, template=template)  # type: ignore[arg-type]
    assert ({"mean", "color"} <= layout.fixed) is sure
    assert ("template" in layout.fixed) is (template == "arcface")
    translated = layout.translate(state)
    heads = [key for key in translated if key.startswith(HEADS)]
    if name.startswith("timm/"):
        own = {k: v for k, v in timm_shapes(name).items() if not k.startswith(HEADS)}
    else:
        with torch.device("meta"):
            own = {k: tuple(v.shape) for k, v in build_backbone(name, (size, size)).module.state_dict().items()}
        own = {k: shape for k, shape in own.items() if not k.endswith("num_batches_tracked")}
    assert {k: tuple(v.shape) for k, v in translated.items() if k not in heads} == own
    assert heads or "mbf" in file


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., FaceModel]:
    """A model in evaluation mode from a file's tensors, every one of which is used; the file is empty."""
    file = tmp_path / "published.file"
    file.touch()

    def from_state(state: State, size: int = 0) -> FaceModel:
        monkeypatch.setattr(source_module, "read", lambda path: state)
        model = build_model(ModelConfig(source=str(file)), 2, ImageSpec(size=size))
        assert model.report is not None
        assert not model.report.missing and not model.report.unused
        return model.eval()

    return from_state


def pictures(size: int) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def agree(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to rounding, and neither constant nor wild."""
    assert 1e-3 < expected.std() < 1e4
    assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("form", ["torch", "caffe", "torch7", "keras", "numbered"])
def test_vggface_gives_the_numbers_of_torchvisions_vgg16_or_of_keras(form: str, load: Callable[..., FaceModel]) -> None:
    cells, images = 4, pictures(64)
    with torch.no_grad():
        if form in ("keras", "numbered"):
            state = fill(published.vgg_keras(cells, numbered=form == "numbered"))
            agree(load(state, 64).encode(images), published.keras_vgg_forward(state, images))
            return
        shapes = {"torch": published.vgg_torch, "caffe": published.vgg_caffe, "torch7": published.vgg_torch7}[form]
        state = fill(shapes(cells))
        found = load(state, 64).encode(images)
        if form != "torch":
            usual = published.vgg_torch(cells).items()
            state = {key: state[given].view(shape) for given, (key, shape) in zip(state, usual, strict=True)}
        with torch.device("meta"):
            features = torchvision.models.vgg16().features
        places = [k for k, layer in enumerate(features) if isinstance(layer, torch.nn.Conv2d)]
        named = zip(places, published.VGG_NAMES, strict=True)
        weights = {f"{k}.{v}": state[f"{name}.{v}"] for k, name in named for v in ("weight", "bias")}
        features.load_state_dict(weights, assign=True)
        x = features(images).flatten(1)
        for layer in ("fc6", "fc7"):
            x = F.relu(F.linear(x, state[f"{layer}.weight"], state[f"{layer}.bias"]))
        agree(found, x)


@pytest.mark.parametrize(
    ("shapes", "size", "forward"),
    [
        (published.vggface2_torch(False), 96, published.vggface2_forward),
        (published.vggface2_torch(True), 96, published.vggface2_forward),
        (published.adaface(IR18), 112, published.adaface_forward),
        (published.mbf(), 112, published.mbf_forward),
        (published.facenet(), 96, published.facenet_forward),
    ],
    ids=["vggface2_resnet50", "vggface2_senet50", "adaface_ir18", "insightface_mbf", "inception_resnet_v1"],
)
def test_a_published_model_gives_the_numbers_of_its_own_forward_pass(
    shapes: Shapes, size: int, forward: Callable[[State, Tensor], Tensor], load: Callable[..., FaceModel]
) -> None:
    state, images = fill(shapes), pictures(size)
    with torch.no_grad():
        model = load(state, size).double()
        exact = {key: tensor.double() for key, tensor in state.items()}
        agree(model.encode(images.double()), forward(exact, images.double()), 1e-9)
        assert model.report is not None and (bool(model.report.classifier) or "mbf" in model.config.backbone)


def test_a_training_programs_checkpoint_brings_backbone_and_pictures(tmp_path: Path) -> None:
    """AdaFace's .ckpt: the network behind a prefix, its head beside it."""
    shapes = published.adaface(IR18)
    state = {k if k.startswith("head.") else f"model.{k}": torch.zeros(s) for k, s in shapes.items()}
    torch.save({"epoch": 25, "state_dict": state}, tmp_path / "adaface_ir18.ckpt")
    model = build_model(ModelConfig(source=str(tmp_path / "adaface_ir18.ckpt")), 2)
    assert model.config.backbone == "adaface_ir18" and model.embedding_size == 512
    assert model.image == ImageSpec(size=112, template="arcface", color="bgr")
    assert model.report is not None and model.report.classifier == ("backbone.head.kernel",)
    assert not model.report.missing and not model.report.unused
    assert str(model.report).endswith("left out: classifier (backbone.head.kernel)")


@pytest.mark.parametrize(("name", "size"), [(INCEPTION, 96), (PREACTIVATED, 64)])
def test_timms_own_files_give_timms_numbers(name: str, size: int, load: Callable[..., FaceModel]) -> None:
    import timm

    torch.manual_seed(0)
    theirs: Any = timm.create_model(name.removeprefix("timm/")).eval()
    images = pictures(size)
    with torch.no_grad():
        found = load(dict(theirs.state_dict()), size).encode(images)
        assert_close(found, theirs.forward_head(theirs.forward_features(images), pre_logits=True))


def test_vggface2s_other_names_give_the_same_numbers(load: Callable[..., FaceModel]) -> None:
    """Keras' kernels and the authors' names, one layer of each kind."""
    dag, keras = fill(published.vggface2_dag(True)), fill(published.vggface2_keras(True))
    ours = load(dag, 64).backbone.state_dict()
    assert torch.equal(ours["layer3.5.conv2.weight"], dag["conv4_6_3x3.weight"])
    assert torch.equal(ours["layer4.0.downsample.1.running_var"], dag["conv5_1_1x1_proj_bn.running_var"])
    ours = load(keras, 64).backbone.state_dict()
    assert torch.equal(ours["conv1.weight"][5, 2], keras["conv1/7x7_s2/kernel"][:, :, 2, 5])
    assert torch.equal(ours["layer1.2.conv2.weight"][7, 3], keras["conv2_3_3x3/kernel"][:, :, 3, 7])
    assert torch.equal(ours["layer2.1.bn3.weight"], keras["conv3_2_1x1_increase/bn/gamma"])
    assert torch.equal(ours["layer2.1.conv4.bias"], keras["conv3_2_1x1_down/bias"])


def test_vggface2s_resnet50_without_classes_needs_its_name() -> None:
    state = {k: torch.empty(s, device="meta") for k, s in published.vggface2_torch(False).items() if k[:3] != "fc."}
    unnamed, named = recognise(state), recognise(state, "vggface2_resnet50")
    assert unnamed is not None and named is not None
    assert (unnamed.backbone, named.backbone) == ("resnet50", "vggface2_resnet50")
    assert named.image is not None and named.image.color == "bgr"
    trained_otherwise = recognise(state | {"fc.weight": torch.empty(8631, 2048)}, "resnet50")
    assert trained_otherwise is not None and trained_otherwise.backbone == "resnet50"


@pytest.mark.parametrize("depth", ["18", "34", "50", "101", "152", "50d"])
def test_preactivated_resnets_are_told_by_their_depth(depth: str) -> None:
    shapes = timm_shapes(f"timm/resnetv2_{depth}")
    layout = recognise({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert layout is not None and layout.backbone == f"timm/resnetv2_{depth}"


LOOKALIKES = ("resnetv2_50t", "resnetv2_50d_gn", "resnetv2_50x1_bit", "inception_v4", "seresnet50", "resnet50d")


@pytest.mark.parametrize("other", LOOKALIKES)
def test_networks_that_only_look_alike_are_not_recognised(other: str) -> None:
    shapes = timm_shapes(other)
    assert recognise({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}) is None


def test_pictures_of_another_size_leave_the_contract_open() -> None:
    for shapes, name in ((published.vgg_torch(4), "vggface"), (published.vgg_caffe(4), "vggface")):
        layout = recognise({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        assert layout is not None and (layout.backbone, layout.image) == (name, None)
    for name in ("insightface_mbf", "adaface_ir18"):
        with torch.device("meta"):
            layout = recognise(build_backbone(name, (64, 64)).module.state_dict())
        assert layout is not None and (layout.backbone, layout.image, layout.translate) == (name, None, keep)


@pytest.mark.parametrize("name", ["mobilefacenet_short", "mobilefacenet_half"])
def test_smaller_mobilefacenets_are_told_from_a_whole_one(name: str) -> None:
    with torch.device("meta"):
        layout = recognise(build_backbone(name, (112, 112), 64).module.state_dict())
    assert layout is not None and (layout.backbone, layout.embedding, layout.image) == (name, 64, None)


def test_colours_of_a_port_that_does_not_tell_them_can_be_typed() -> None:
    layout = recognise({k: torch.empty(s, device="meta") for k, s in published.vgg_torch().items()})
    assert layout is not None
    typed = ImageSpec(mean=BGR1, color="bgr").settled(layout.image, layout.fixed)
    assert (typed.color, typed.mean, typed.size) == ("bgr", BGR1, 224)
    with pytest.raises(ValueError, match="image.size is 112, but the source model was trained with 224"):
        ImageSpec(size=112).settled(layout.image, layout.fixed)
