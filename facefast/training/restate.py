"""BatchNorm statistics of the user's pictures in place of the source's (AdaBN, Li et al. 2016, arXiv:1603.04779).

No label is needed: pictures without a name serve too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.data import FaceIndex, make_loader
from facefast.data.sampler import EpochSampler
from facefast.models import FaceModel
from facefast.models.precision import Precision
from facefast.recipe import Reading
from facefast.runtime.process import Runtime

BATCH = 64
"""Pictures whose statistics are taken at once: what a processor's caches hold."""
MOST = 1024
"""Pictures that statistics are taken of; more change them by less than they differ between people."""
Statistics = dict[str, tuple[Tensor, Tensor]]
"""By a layer's name: mean and variance [C] of what reaches it, float64."""


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """BatchNorm layers by name, those that keep statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def statistics_of(
    model: FaceModel, index: FaceIndex, run: Runtime, precision: Precision, reading: Reading, seed: int
) -> Statistics:
    """The statistics of every layer when all layers before it normalise by those of the same pictures.

    The batches are the same whatever the number of ranks, each taken by one of them, and so is the result.

    Args:
        model: unchanged afterwards.
        index: readable pictures, `MOST` of which are used.
        run: whose ranks share the batches.
        precision: as for any forward pass.
        reading: as for any loader.
        seed: which pictures, and in which order.

    Returns:
        The same on every rank.
    """
    rows = np.random.Generator(np.random.Philox(seed)).permutation(np.flatnonzero(index.faults == 0))[:MOST]
    count = max(1, round(len(rows) / BATCH))
    size = math.ceil(len(rows) / count)
    mine = [rows[k * size : (k + 1) * size] for k in range(run.world.rank, count, run.world.size)]
    network = copy.deepcopy(model)
    network.eval()  # dropout
    found = layers(network)
    # Per layer: rows, then for every channel the weighted sums of a batch's mean, its square and its variance.
    sums = {name: torch.zeros(4, layer.num_features, dtype=torch.float64) for name, layer in found.items()}
    for name, layer in found.items():
        layer.train()  # each normalises by its batch, and the next one sees what came of that
        layer.momentum = 1.0  # and remembers that batch alone
        layer.register_forward_hook(functools.partial(_add, sums[name]))
    if sum(map(len, mine)):
        # Only the last batch of all may be short, and it is the last of its rank.
        sampler = EpochSampler(np.concatenate(mine), size, shuffle=False)
        with (
            torch.inference_mode(),
            precision.autocast(run.device),
            make_loader(
                index,
                model.image,
                sampler=sampler,
                device=run.device,
                dtype=torch.float32,
                channels_last=precision.channels_last,
                **dataclasses.asdict(reading),
            ) as loader,
        ):
            for batch in loader:
                whole = batch.rows >= 0
                images = batch.images[whole]
                if len(images) > 1:
                    network.encode(images)
    if run.world.size > 1:
        for name in sums:
            on_device = sums[name].to(run.device)
            dist.all_reduce(on_device)
            sums[name] = on_device.cpu()
    return {name: _moments(total) for name, total in sums.items() if bool((total[0] > 0).all())}


def _add(sums: Tensor, layer: _BatchNorm, given: tuple[Tensor], out: Tensor) -> None:
    """Adds the statistics of what reached a layer, [B, C, ...], to its sums, as the layer itself has taken them: a pass
    of our own over every activation took longer than the network."""
    assert layer.running_mean is not None and layer.running_var is not None
    count = given[0].numel() // given[0].shape[1]
    mean, variance = layer.running_mean.double().cpu(), layer.running_var.double().cpu() * ((count - 1) / count)
    sums += len(given[0]) * torch.stack([torch.ones_like(mean), mean, mean.square(), variance])


def _moments(total: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of all batches together: within them and between them."""
    weight, mean, square, within = total[0], total[1] / total[0], total[2] / total[0], total[3] / total[0]
    assert bool((weight > 0).all())
    return mean, within + (square - mean.square()).clamp(min=0)


@torch.no_grad()
def restate(model: FaceModel, statistics: Statistics, first: float, last: float) -> None:
    """Mixes statistics into those of a model, in place.

    Args:
        model: whose BatchNorm layers are changed.
        statistics: of `statistics_of`.
        first: weight of the new ones at the first layer, 0 to 1; the rest is the source's.
        last: at the last layer; those between them lie on a line.
    """
    found = layers(model)
    weights = np.linspace(first, last, len(found))
    for (name, layer), weight in zip(found.items(), weights.tolist(), strict=True):
        if name not in statistics:
            continue
        assert layer.running_mean is not None and layer.running_var is not None
        mean, variance = (part.to(layer.running_mean) for part in statistics[name])
        layer.running_mean.lerp_(mean, weight)
        layer.running_var.lerp_(variance, weight)
