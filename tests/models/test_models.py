"""Backbones, heads and the face model built from them."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import StochasticDepth

from facefast.models import FaceModel, build_model, iresnet
from facefast.models.backbones import build_backbone
from facefast.models.heads import START_SCALE, CosineHead, LinearHead
from facefast.recipe import ImageSpec, ModelConfig

SMALL = ImageSpec(size=48, width=32)
VIT = "timm/vit_tiny_patch16_224"
CONVNET = "timm/mobilenetv3_small_050"
DROPPING = (
    "mobilefacenet",
    "mobilefacenet_short",
    "mobilefacenet_half",
    "insightface_mbf",
    "iresnet18",
    "adaface_ir18",
)
EVERY_KIND = (
    *DROPPING,
    "vggface",
    "vggface2_resnet50",
    "vggface2_senet50",
    "inception_resnet_v1",
    "resnet18",
    "resnet50",
    CONVNET,
    VIT,
)


def model(backbone: str = "mobilefacenet", classes: int = 5, image: ImageSpec = SMALL, **config: object) -> FaceModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone=backbone, **config), classes, image)  # type: ignore[arg-type]


def pictures(count: int = 2, image: ImageSpec = SMALL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *image.shape, generator=generator)


def pixels(count: int = 2, image: ImageSpec = SMALL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, *image.shape), generator=generator, dtype=torch.uint8)


def smallest(name: str) -> ImageSpec:
    """Pictures as small as a backbone takes them: Inception-ResNet needs more than the others."""
    return ImageSpec(size=75) if name == "inception_resnet_v1" else SMALL


@pytest.mark.parametrize("name", EVERY_KIND)
def test_backbones_learn_in_every_parameter(name: str) -> None:
    network = model(name, image=smallest(name), dropout=0.1, embedding=16)
    assert network.embedding_size == 16
    logits = network(pictures(image=smallest(name)))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(("shape", "grid"), [((112, 112), (7, 7)), ((112, 96), (7, 6))])
def test_mobilefacenet_takes_its_last_kernel_from_the_picture(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    with torch.device("meta"):
        network = build_backbone("mobilefacenet", shape).module
        assert network(torch.zeros(2, 3, *shape)).shape == (2, 128)
    assert network.get_parameter("linear7.conv.weight").shape == (512, 1, *grid)


def test_iresnet_has_the_names_of_insightface() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"}
    expected |= {f"{layer}.{name}" for layer in ("bn1", "bn2", "features") for name in norm}
    for stage, blocks in enumerate((2, 2, 2, 2), start=1):
        for block in range(blocks):
            start = f"layer{stage}.{block}."
            expected |= {start + f"{name}.weight" for name in ("conv1", "conv2", "prelu")}
            expected |= {start + f"bn{k}.{name}" for k in (1, 2, 3) for name in norm}
        expected.add(f"layer{stage}.0.downsample.0.weight")
        expected |= {f"layer{stage}.0.downsample.1.{name}" for name in norm}
    with torch.device("meta"):
        assert set(build_backbone("iresnet18", (112, 112)).module.state_dict()) == expected


def test_fixed_scale_batchnorm_is_batchnorm_that_learns_its_bias_only() -> None:
    ours, theirs = iresnet.FixedScaleBatchNorm(6), nn.BatchNorm1d(6)
    x = torch.randn(8, 6)
    assert torch.equal(ours(x), theirs(x))
    assert [name for name, _ in ours.named_parameters()] == ["bias"]
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_an_unknown_backbone_is_refused_with_names_that_exist() -> None:
    with pytest.raises(ValueError, match="'resnet19' is unknown.*resnet18"):
        model("resnet19")
    with pytest.raises(ValueError, match="no model 'resnet51'.*close to it: resnet"):
        model("timm/resnet51")


def test_a_timm_model_that_cannot_take_the_pictures_says_so() -> None:
    with pytest.raises(ValueError, match="cannot take pictures of 16x16"):
        model("timm/inception_resnet_v2", image=ImageSpec(size=16))


@pytest.mark.parametrize(("name", "size"), [("vggface", 31), ("inception_resnet_v1", 74)])
def test_a_backbone_of_ours_that_cannot_take_the_pictures_says_so(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot take pictures of {size}x{size} pixels.*at least {size + 1}"):
        build_backbone(name, (size, size))


def test_the_half_mobilefacenet_has_half_the_channels_and_nothing_but_relu() -> None:
    with torch.device("meta"):
        half, whole = (build_backbone(name, (112, 112)).module for name in ("mobilefacenet_half", "mobilefacenet"))
    whole_shapes = {key: tuple(value.shape) for key, value in whole.state_dict().items()}
    for key, value in half.state_dict().items():
        if value.ndim and not key.startswith("linear1.bn."):  # an embedding is as long
            assert value.shape[0] == whole_shapes[key][0] // (1 if key == "linear1.conv.weight" else 2), key
    kinds = {type(module) for module in half.modules()}
    assert nn.PReLU not in kinds and nn.ReLU in kinds
    assert sum(isinstance(m, nn.ReLU) for m in half.modules()) == sum(isinstance(m, nn.PReLU) for m in whole.modules())


@pytest.mark.parametrize("name", DROPPING)
def test_stochastic_depth_grows_with_depth_and_changes_no_name(name: str) -> None:
    with torch.device("meta"):
        plain, dropping = build_backbone(name, (112, 112)).module, build_backbone(name, (112, 112), 0, 0.2).module
    assert list(plain.state_dict()) == list(dropping.state_dict())
    rates = [module.p for module in dropping.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.2 * (k + 1) / len(rates) for k in range(len(rates))])
    assert len(rates) == {"iresnet18": 8, "adaface_ir18": 8, "mobilefacenet_short": 6}.get(name, 12)
    assert not any(isinstance(module, StochasticDepth) for module in plain.modules())


@pytest.mark.parametrize("name", DROPPING)
def test_stochastic_depth_leaves_out_residual_branches_in_training_only(name: str) -> None:
    torch.manual_seed(0)
    network = build_backbone(name, SMALL.shape, 16, 0.5).module.eval().double()
    images = pictures(1).double().expand(6, -1, -1, -1)
    with torch.no_grad():
        whole = network(images)
        assert_close(whole, whole[:1].expand(6, -1))
        for module in network.modules():
            module.training = isinstance(module, StochasticDepth)
        found = network(images)
    differing = {tuple(row) for row in (found / whole.abs().max()).round(decimals=3).tolist()}
    assert len(differing) > 1, "each picture of a batch has a depth of its own"


def test_stochastic_depth_leaves_the_shortcut_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = iresnet.Block(8, 8, 1, StochasticDepth(0.5, "row")).eval()
    x = torch.randn(1, 8, 4, 4).expand(32, -1, -1, -1)
    with torch.no_grad():
        branch = block(x) - x
        block.drop.train()
        factors = ((block(x) - x) / branch).flatten(1).median(1).values
    assert_close(factors.unique(), torch.tensor([0.0, 2.0]), atol=1e-4, rtol=0)


def test_stochastic_depth_is_timms_own_in_a_timm_model() -> None:
    network = model(CONVNET, drop_path=0.2).backbone
    rates: list[Any] = [module.drop_prob for module in network.modules() if hasattr(module, "drop_prob")]
    assert 0 < max(rates) <= 0.2


@pytest.mark.parametrize("name", ["resnet50", "vggface", "vggface2_senet50", "inception_resnet_v1", "timm/vgg11"])
def test_stochastic_depth_without_effect_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"model.drop_path 0.1 has no effect on {name}; choose one of mobilefacenet"):
        build_backbone(name, (96, 96), 0, 0.1)
    with pytest.raises(ValueError, match="model.drop_path is 1"):
        build_backbone("iresnet18", (32, 32), 0, 1.0)


def test_the_embedding_layer_is_added_only_where_the_backbone_has_none() -> None:
    added = model("resnet18", embedding=24)
    assert [type(layer) for layer in added.embedding.children()] == [nn.Linear, nn.BatchNorm1d]
    assert isinstance(model("resnet18").embedding, nn.Identity)
    own = model("mobilefacenet", embedding=24)
    assert isinstance(own.embedding, nn.Identity)
    assert own.encode(pictures()).shape == added.encode(pictures()).shape == (2, 24)


def test_dropout_acts_before_the_head_and_only_in_training() -> None:
    network = model(dropout=0.5, classes=64)
    embeddings = torch.randn(4, 128)
    assert not torch.equal(network.classify(embeddings), network.classify(embeddings))
    network.eval()
    assert network.head is not None
    assert torch.equal(network.classify(embeddings), network.head(embeddings))


def test_the_cosine_head_gives_cosines_whatever_the_lengths() -> None:
    head = CosineHead(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0, 0], [0, 3, 0]]))
    found = head(torch.tensor([[5.0, 0, 0], [0.6, 0.8, 0], [-1e-3, 0, 0]]))
    assert_close(found, torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]]))


def test_the_cosine_head_has_exact_gradients_and_a_finite_one_at_zero() -> None:
    head = CosineHead(4, 3).double()
    embeddings = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (embeddings,))
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    head(zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cosine_head_stays_in_float32_under_autocast(dtype: torch.dtype) -> None:
    head, embeddings = CosineHead(64, 7), torch.randn(5, 64)
    exact = head(embeddings)
    with torch.autocast("cpu", dtype):
        found = head(embeddings)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)
    # Embeddings that come in half precision with large lengths overflow nowhere.
    assert head((embeddings * 1000).to(dtype)).isfinite().all()


@pytest.mark.parametrize("head", [LinearHead(32, 40), CosineHead(32, 40)])
def test_a_head_that_starts_from_class_means_starts_right(head: LinearHead | CosineHead) -> None:
    means = F.normalize(torch.randn(40, 32), dim=1)
    embeddings = 7 * F.normalize(means + 0.05 * torch.randn(40, 32), dim=1)
    head.start_from(means, 7.0)
    logits = head(embeddings)
    scale = START_SCALE if isinstance(head, LinearHead) else 1
    assert_close(logits / scale, F.normalize(embeddings, dim=1) @ means.T, atol=1e-5, rtol=0)
    loss = F.cross_entropy(logits * START_SCALE / scale, torch.arange(40))
    assert loss < 0.1 < math.log(40)


def test_random_heads_start_with_equal_classes() -> None:
    for kind in ("linear", "cosine"):
        network = model(classes=100, head=kind)
        loss = F.cross_entropy(network(pictures(8)), torch.arange(8))
        assert loss.item() == pytest.approx(math.log(100), rel=0.05)


def test_embeddings_have_length_1_and_join_the_mirror_image() -> None:
    network = model().eval()
    images = pictures()
    one, both = network.embed(images, mirror=False), network.embed(images)
    assert_close(both.norm(dim=1), torch.ones(2))
    assert_close(one, F.normalize(network.encode(images), dim=1))
    assert_close(both, F.normalize(network.encode(images) + network.encode(images.flip(3)), dim=1))
    assert_close(network.embed(images.flip(3)), both)
    assert not both.requires_grad and not both.is_inference()


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_uint8_pixels_are_normalised_as_the_image_spec_says(color: str) -> None:
    mean, std = (10.0, 20.0, 30.0), (2.0, 4.0, 8.0)
    image = ImageSpec(size=48, width=32, mean=mean, std=std, color=color)  # type: ignore[arg-type]
    network = model(image=image).eval()
    ordered = pixels().flip(1) if color == "bgr" else pixels()
    normalised = torch.stack([(ordered[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert_close(network.embed(pixels()), network.embed(normalised))
    assert torch.equal(network.predict(pixels()).labels, network.predict(normalised).labels)


def test_pictures_of_another_size_are_refused_with_both_sizes() -> None:
    network = model().eval()
    for images in (pictures(image=ImageSpec(size=64)), pixels(image=ImageSpec(size=64))):
        with pytest.raises(ValueError, match=r"\[2, 3, 64, 64\].*\[B, 3, 48, 32\]"):
            network.embed(images)
    with pytest.raises(ValueError, match=r"\[3, 48, 32\]"):
        network.predict(pixels()[0])


def test_embedding_in_training_mode_or_of_integers_is_refused() -> None:
    network = model()
    with pytest.raises(ValueError, match="training mode"):
        network.embed(pictures())
    with pytest.raises(ValueError, match=r"torch.int64"):
        network.eval().embed(pixels().long())


def test_predictions_have_names_and_probabilities() -> None:
    torch.manual_seed(0)
    names = ("Ada", "Bob", "Cy")
    config = ModelConfig(backbone="mobilefacenet", head="cosine")
    network = build_model(config, 3, SMALL, names).eval()
    flat = network.predict(pixels(4))
    network.scale = 30.0
    found = network.predict(pixels(4))
    assert found.names == tuple(names[k] for k in found.labels)
    assert_close(found.probabilities.sum(1), torch.ones(4))
    assert torch.equal(found.probabilities.argmax(1), found.labels)
    assert (found.probabilities.amax(1) > flat.probabilities.amax(1)).all()
    assert model().eval().predict(pixels(1)).names[0] in "01234"


@pytest.mark.parametrize("name", EVERY_KIND)
def test_stages_hold_every_parameter_exactly_once(name: str) -> None:
    network = model(name, image=smallest(name), embedding=16)
    stages = network.stages()
    held = [p for modules in stages.values() for m in modules for p in m.parameters()]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in network.parameters()}
    names = list(stages)
    assert names[0] == "stem" and names[-2:] == ["embedding", "head"]
    assert names[1:-2] == [f"stage{k + 1}" for k in range(len(names) - 3)]


def test_stages_of_a_copy_are_the_copys() -> None:
    network = model()
    copied = copy.deepcopy(network)
    held = {id(p) for modules in copied.stages().values() for m in modules for p in m.parameters()}
    assert held == {id(p) for p in copied.parameters()}


def test_a_model_comes_back_from_its_config_and_state() -> None:
    torch.manual_seed(0)
    image = ImageSpec(size=48, width=32, template="celeba", mean=(1, 2, 3), std=(4, 5, 6))
    config = ModelConfig(backbone="resnet18", embedding=8, head="cosine", dropout=0.25)
    first = build_model(config, 3, image, ("a", "b", "c")).eval()
    first.scale = 16.0
    again = FaceModel.from_config(json.loads(json.dumps(first.to_config()))).eval()
    again.load_state_dict(first.state_dict())
    assert again.to_config() == first.to_config()
    assert (again.image, again.config, again.class_names) == (image, config, ("a", "b", "c"))
    assert torch.equal(again(pictures()), first(pictures()))
    assert not any(key.startswith("pixel") for key in first.state_dict())


def test_a_config_that_is_not_ours_is_refused() -> None:
    config = model().to_config()
    with pytest.raises(ValueError, match="format 2"):
        FaceModel.from_config(config | {"format": 2})
    with pytest.raises(ValueError, match="wrong or missing entries: depth"):
        FaceModel.from_config(config | {"depth": 3})
    with pytest.raises(ValueError, match="wrong or missing entries: image"):
        FaceModel.from_config({key: value for key, value in config.items() if key != "image"})
    with pytest.raises(ValueError, match="head is 'mlp'"):
        FaceModel.from_config(config | {"head": "mlp"})


def test_new_classes_replace_the_head_alone() -> None:
    network = model()
    kept = network.encode(pictures()).detach()
    network.set_classes(9, [str(k) for k in range(9)])
    assert network(pictures()).shape == (2, 9)
    assert torch.equal(network.encode(pictures()), kept)
    with pytest.raises(ValueError, match="2 class names for 9 classes"):
        network.set_classes(9, ["x", "y"])


def test_a_model_without_classes_embeds_and_refuses_to_name() -> None:
    network = model(classes=0).eval()
    assert network.embed(pixels()).shape == (2, 128)
    assert list(network.stages()) == ["stem", "stage1", "stage2", "stage3", "embedding"]
    for ask in (network, network.predict):
        with pytest.raises(ValueError, match="has no classes"):
            ask(pictures())


@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18", "resnet18", "vggface", "vggface2_senet50"])
def test_channels_last_gives_the_same_numbers(name: str) -> None:
    network = model(name).eval()
    with torch.inference_mode():
        expected = network(pictures())
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        found = network(pictures().to(memory_format=torch.channels_last))
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_bfloat16_autocast_stays_close(head: str) -> None:
    network = model(head=head).eval()
    with torch.inference_mode():
        expected = network.embed(pictures())
        with torch.autocast("cpu", torch.bfloat16):
            found = network.embed(pictures())
            logits = network(pictures())
    assert found.dtype == torch.float32
    assert (found * expected).sum(1).min() > 0.99
    assert logits.isfinite().all()


def test_the_model_compiles_into_one_graph() -> None:
    network = model("resnet18", embedding=16, head="cosine", dropout=0.1).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert_close(compiled(pictures()), network(pictures()))


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device() -> None:
    network = model(head="cosine", dropout=0.1).cuda()
    images = pictures().cuda()
    network(images).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            network(images).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
