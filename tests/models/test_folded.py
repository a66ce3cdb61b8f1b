"""A network whose BatchNorm is folded gives the same embeddings, and is only taken where it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from facefast.models import FaceModel, build_model
from facefast.models.folded import folded
from facefast.recipe import ImageSpec, ModelConfig

SIZE = 32


def model_of(backbone: str) -> FaceModel:
    """Random weights, and statistics of nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build_model(ModelConfig(backbone=backbone), 3, ImageSpec(size=SIZE)).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def left(model: FaceModel) -> int:
    return sum(type(module) is nn.BatchNorm2d for module in model.modules())


@pytest.mark.parametrize(
    ("backbone", "most"), [("mobilefacenet", 0), ("mobilefacenet_half", 0), ("resnet18", 0), ("iresnet18", 10)]
)
@torch.inference_mode()
def test_folded_networks_give_the_same_embeddings_and_the_model_stays_what_it_is(backbone: str, most: int) -> None:
    model, images = model_of(backbone), torch.randn(5, 3, SIZE, SIZE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count, network = left(model), folded(model, images[:2])
    assert left(network) <= most < count == left(model)  # IResNets have some in front of a convolution
    expected = model.encode(images)
    torch.testing.assert_close(network.encode(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert network.head is model.head  # nobody copies it
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Read(nn.Module):
    """A convolution before a BatchNorm, whose output somebody else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, SIZE), nn.BatchNorm2d(16)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.conv(images)
        return torch.flatten(self.norm(found) + found, 1)


class Twice(Read):
    """A convolution that is used twice, once without the BatchNorm."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.flatten(self.norm(self.conv(images)) + self.conv(images.flip(3)), 1)


@pytest.mark.parametrize("network", [Read, Twice])
@torch.inference_mode()
def test_a_convolution_that_others_read_is_left_as_it_is(network: type[nn.Module]) -> None:
    model, images = model_of("mobilefacenet"), torch.randn(2, 3, SIZE, SIZE)
    model.backbone = network().eval()
    model.backbone.norm.running_var.fill_(4.0)  # type: ignore[union-attr, operator]
    model.embedding = nn.Identity()
    assert folded(model, images) is model


@torch.inference_mode()
def test_embeddings_that_are_no_numbers_are_those_of_the_model_itself() -> None:
    model, images = model_of("mobilefacenet"), torch.randn(2, 3, SIZE, SIZE)
    next(iter(model.parameters()))[0] = torch.nan
    assert folded(model, images) is model
