"""Networks that take BatchNorm, activation and residual in one pass, against the same ones layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from facefast.models.backbones import NAMES, build_backbone
from facefast.models.fused import Layers, layer_by_layer, norm_act

# One of each module of networks; the others are the same with more blocks.
NETWORKS = (
    "mobilefacenet_short",
    "mobilefacenet_half",
    "insightface_mbf",
    "iresnet18",
    "adaface_ir18",
    "vggface2_resnet50",
    "vggface2_senet50",
    "inception_resnet_v1",
    "resnet18",
    "resnet50",
)
SIZE = 80


def trained(network: nn.Module, images: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one pass both ways."""
    torch.manual_seed(5)  # dropout
    out = network(images)
    out.backward(upstream)
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients, **dict(network.named_buffers())}


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("name", NETWORKS)
def test_training_gives_what_the_layers_give_one_by_one(name: str, frozen: bool) -> None:
    assert name in NAMES
    torch.manual_seed(0)
    network = build_backbone(name, (SIZE, SIZE)).module.double().train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.train(not frozen)
    other = copy.deepcopy(network)
    images = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        upstream = torch.randn_like(copy.deepcopy(network)(images))
    found = trained(network, images, upstream)
    with layer_by_layer():
        expected = trained(other, images, upstream)
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        scale = float(value.double().abs().max()) + 1e-30
        assert float((found[part] - value).abs().max()) <= 1e-8 * scale + 1e-12, part
    # The pass is really taken: more than half of the BatchNorms leave no node of their own in the graph.
    taken = nodes(network(images))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert taken.count("NormaliseBackward") >= norms / 3, (taken.count("NormaliseBackward"), norms)
    with layer_by_layer():
        assert "NormaliseBackward" not in nodes(other(images))


def nodes(out: Tensor) -> list[str]:
    """Names of the nodes of an autograd graph."""
    seen, stack = {out.grad_fn}, [out.grad_fn]
    while stack:
        node = stack.pop()
        assert node is not None
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return [node.name() for node in seen if node is not None]


def pair() -> tuple[nn.BatchNorm2d, nn.PReLU, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    return nn.BatchNorm2d(8), nn.PReLU(8), x


def test_a_hook_on_a_layer_is_called_and_sees_the_layers_own_output() -> None:
    norm, act, x = pair()
    seen: list[Tensor] = []
    for layer in (norm, act):
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        out = norm_act(norm, act, x, training=True)
        assert len(seen) == 1
        handle.remove()
        seen.clear()
    assert torch.allclose(out, act(norm(x)), atol=1e-6)
    norm_act(norm, act, x, training=True)
    assert not seen


def test_evaluation_and_layers_of_other_kinds_go_through_the_modules() -> None:
    norm, act, x = pair()
    assert nodes(norm_act(norm, act, x, training=True)).count("NormaliseBackward") == 1
    assert "NormaliseBackward" not in nodes(norm_act(norm.eval(), act, x, training=False))
    assert nodes(norm_act(norm, act, x, training=True)).count("NormaliseBackward") == 1  # frozen, in training
    for one, other in ((nn.BatchNorm2d(8, momentum=None), act), (nn.BatchNorm2d(8), nn.SiLU()), (nn.Identity(), act)):
        assert "NormaliseBackward" not in nodes(norm_act(one, other, x, training=True))
    with torch.no_grad():
        assert torch.equal(norm_act(norm, act, x, training=True), act(norm(x)))


def test_the_statistics_move_once_a_pass() -> None:
    norm, act, x = pair()
    other = copy.deepcopy(norm)
    norm_act(norm, act, x, training=True)
    act(other(x))
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 1
    for one, expected in zip(norm.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, expected)


def test_a_sequence_of_layers_pairs_what_belongs_together_and_adds_the_residual_last() -> None:
    torch.manual_seed(2)
    layers = Layers(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).double()
    x = torch.randn(4, 8, 5, 5, dtype=torch.float64)
    out = layers(x, x)
    plain = nn.Sequential(*copy.deepcopy(layers))
    torch.testing.assert_close(out, plain(x) + x)
    assert nodes(out).count("NormaliseBackward") == 2
    assert list(layers.state_dict()) == list(plain.state_dict())
