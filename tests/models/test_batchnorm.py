"""BatchNorm over all ranks, held against torch's own on the whole batch."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.models import build_model
from facefast.models.batchnorm import synchronise, takes_statistics
from facefast.models.iresnet import FixedScaleBatchNorm
from facefast.recipe import ImageSpec, ModelConfig
from facefast.runtime import process
from tests.support.ranks import run_ranks

KINDS = ("flat", "maps", "plain", "mean of all", "fixed scale", "no memory", "activated")


def layer(kind: str) -> _BatchNorm:
    if kind == "activated":
        return cast(_BatchNorm, timm.layers.BatchNormAct2d(5))  # type: ignore[attr-defined]
    return {
        "flat": nn.BatchNorm1d(5),
        "maps": nn.BatchNorm2d(5, momentum=0.3, eps=1e-3),
        "plain": nn.BatchNorm1d(5, affine=False),
        "mean of all": nn.BatchNorm2d(5, momentum=None),
        "fixed scale": FixedScaleBatchNorm(5),
        "no memory": nn.BatchNorm2d(5, track_running_stats=False),
    }[kind]


def compare(rank: int, kind: str) -> int:
    """Three batches through a layer over two ranks and through torch's own: outputs, gradients, statistics."""
    with process.start("cpu") as run:
        torch.manual_seed(3)
        whole = layer(kind).double()
        for parameter in whole.parameters():
            nn.init.normal_(parameter)
        part = copy.deepcopy(whole)
        synchronise(part)
        assert type(part) is not type(whole) and list(part.state_dict()) == list(whole.state_dict())
        for _ in range(3):
            flat = kind in ("flat", "plain", "fixed scale")
            x, direction = torch.randn(2, 8, 5, *(() if flat else (3, 4)), dtype=torch.float64)
            x = 1e3 + 5 * x  # a mean that is large beside the deviation
            if not flat:
                x = x.contiguous(memory_format=torch.channels_last)
            ours, theirs = x[rank::2].clone().requires_grad_(), x.clone().requires_grad_()
            expected, found = whole(theirs), part(ours)
            close(found, expected[rank::2])
            (expected * direction).sum().backward()
            (found * direction[rank::2]).sum().backward()
            assert ours.grad is not None and theirs.grad is not None
            close(ours.grad, theirs.grad[rank::2])
            for one, other in zip(part.parameters(), whole.parameters(), strict=True):
                assert one.grad is not None and other.grad is not None
                dist.all_reduce(one.grad)  # as DDP does, but for its division
                close(one.grad, other.grad)
                one.grad = other.grad = None
            for ours, theirs in zip(part.buffers(), whole.buffers(), strict=True):
                close(ours, theirs)
        part.eval()
        whole.eval()
        close(part(x[rank : rank + 1]), whole(x[rank : rank + 1]))  # no rank asks another one
        run.barrier()
    return 0


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_normalise_as_one_does_with_both_their_pictures(kind: str) -> None:
    assert run_ranks(compare, 2, kind) == [0, 0]


def test_a_synchronised_model_is_the_same_model_and_alone_gives_the_same_bits() -> None:
    image = ImageSpec(size=32, template="none")
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="iresnet18", embedding=16), 3, image)
    other = copy.deepcopy(model)
    synchronise(other)
    synchronise(other)  # a second time changes nothing
    other = copy.deepcopy(other)  # as an average of weights is made
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), other(images))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert other.to_config() == model.to_config() and list(other.state_dict()) == list(model.state_dict())
    assert takes_statistics(other) and not takes_statistics(other.eval())


def test_a_model_without_batchnorm_or_with_a_kind_of_its_own_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Any) -> Any:
            return super().forward(input) * 2

    with pytest.raises(ValueError, match=r"model\.batchnorm sync has no effect: the model has no BatchNorm"):
        synchronise(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    with pytest.raises(ValueError, match="Odd is no plain BatchNorm and cannot be synchronised"):
        synchronise(nn.Sequential(Odd(3)))
