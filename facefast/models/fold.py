"""A linear map of the embeddings, folded into the layer that gives them: what uses the model knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.models.face import FaceModel

AGREES = 1e-4
"""Part of the embeddings' size by which a folded layer may miss the map; layers that do something between them that
cannot be seen from outside miss it by far."""
PROBES = 4


class LinearMap(NamedTuple):
    """x to matrix @ x + shift."""

    matrix: Tensor
    """[D, D] float64."""
    shift: Tensor
    """[D] float64."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings [..., D] to the same, in their own precision."""
        return embeddings @ self.matrix.to(embeddings).T + self.shift.to(embeddings)


class Tail(NamedTuple):
    """The layers that end a network."""

    linear: nn.Linear | nn.Conv2d
    norm: _BatchNorm | None


def fold(model: FaceModel, mapped: LinearMap, mean: Tensor, variance: Tensor) -> bool:
    """Changes a model, in evaluation mode, so that its `encode` gives the mapped embeddings.

    A linear layer at the end, with or without BatchNorm behind it, takes the map in: the number of parameters and
    the file stay what they are, and training goes on from there. Where the network ends in something else, such as
    pooling, a linear layer follows it, which `model.json` tells.

    Args:
        model: whose parameters are changed in place.
        mapped: of its embeddings as they are, of any length.
        mean: [D] of the mapped embeddings over the user's pictures, and
        variance: [D], which BatchNorm is to expect when it trains on.

    Returns:
        Whether no layer was added.

    Raises:
        ValueError: a map of another size, or with numbers that are not finite.
    """
    size = model.embedding_size
    if mapped.matrix.shape != (size, size) or mapped.shift.shape != (size,):
        raise ValueError(f"the map is {list(mapped.matrix.shape)}, the model's embeddings have {size} numbers")
    if not all(bool(part.isfinite().all()) for part in (*mapped, mean, variance)):
        raise ValueError("the map of the embeddings holds numbers that are not finite")
    with torch.no_grad(), _evaluating(model):
        pictures = _noise(model)
        wanted = mapped(model.encode(pictures).double())
        tail = _tail(model)
        if tail is not None:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            _take_in(tail, mapped, mean.double(), variance.double())
            missed = (model.encode(pictures).double() - wanted).abs().amax() / wanted.abs().amax()
            if missed < AGREES:
                return True
            model.load_state_dict(before)  # something stands between the layers, or behind them
        model.add_linear_map()
        assert model.linear_map is not None
        model.linear_map.weight.copy_(mapped.matrix)
        model.linear_map.bias.copy_(mapped.shift)
    return False


def _take_in(tail: Tail, mapped: LinearMap, mean: Tensor, variance: Tensor) -> None:
    """Puts the map into the layers; their outputs have `mean` and `variance` afterwards."""
    linear, norm = tail
    weight = linear.weight.flatten(1).double()  # [D, inputs]
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
    if norm is None:
        _set(linear, mapped.matrix @ weight, mapped.matrix @ bias + mapped.shift)
        return
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        gain = gain * norm.weight.double()
    offset = -gain * norm.running_mean.double()
    if norm.affine:
        offset = offset + norm.bias.double()
    # BatchNorm is left to add what does not depend on the picture, and to scale by 1 as a whole: with its own
    # statistics those of the pictures, so that in training mode too it starts where it stands.
    matrix = mapped.matrix * gain
    constant = mapped.matrix @ offset + mapped.shift
    _set(linear, matrix @ weight, matrix @ bias)
    if norm.affine:
        norm.running_mean.copy_(mean - constant)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(mean)
    else:
        norm.running_mean.copy_(-constant)
        norm.running_var.fill_(1.0 - norm.eps)


def _set(linear: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight.view_as(linear.weight))
    if linear.bias is not None:
        linear.bias.copy_(bias)


def _tail(model: FaceModel) -> Tail | None:
    """The last layers with numbers that a picture passes, where they are linear; None where they are something else."""
    passed: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: passed.append(module))
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False)) or isinstance(module, _BatchNorm)
    ]
    try:
        model.encode(_noise(model))
    finally:
        for hook in hooks:
            hook.remove()
    norm = passed.pop() if isinstance(passed[-1], _BatchNorm) else None
    assert norm is None or isinstance(norm, _BatchNorm)
    if norm is not None and norm.running_mean is None:
        return None
    linear = passed[-1] if passed else None
    if not isinstance(linear, nn.Linear | nn.Conv2d) or passed.count(linear) > 1:
        return None  # one that is passed twice is not the last layer alone
    if linear.weight.shape[0] != model.embedding_size or (isinstance(linear, nn.Conv2d) and linear.groups != 1):
        return None
    if norm is None and linear.bias is None:
        return None  # it could not hold a shift
    return Tail(linear, norm)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _noise(model: FaceModel) -> Tensor:
    """Pictures of noise, the same always."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(PROBES, 3, *model.image.shape, generator=generator)
    return pictures.to(model.pixel_mean)
