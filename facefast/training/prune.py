"""Weights taken out by magnitude while a phase trains, so that the others make up for them.

Magnitude pruning (Han et al. 2015, arXiv:1506.02626) on the gradual schedule of Zhu and Gupta (2017,
arXiv:1710.01878). A checkpoint holds nothing of it: a pruned weight is one that is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from facefast.models import FaceModel

RAMP = 0.75
"""Part of the phase in which the sparsity rises; the rest lets the weights that are left settle."""
LEVELS = 100
"""Steps in which it rises. Each sorts all weights, which every update need not do."""


def scheduled_sparsity(target: float, progress: float) -> float:
    """s_f (1 - (1 - t)^3): fast at first, while most weights are redundant, and slow at last.

    Args:
        target: s_f, the part of the weights that is 0 in the end.
        progress: part of the phase that is done, in [0, 1]; t is 1 from `RAMP` on, and moves in `LEVELS` steps.
    """
    level = min(LEVELS, int(progress / RAMP * LEVELS))
    return float(target * (1 - (1 - level / LEVELS) ** 3))


def prunable(model: FaceModel) -> dict[str, Tensor]:
    """Names and weights that pruning takes from: full convolutions and linear layers from the second to the embedding.

    Not the head, which other people replace; not depthwise convolutions, which hold one or two of a hundred weights,
    9 per channel, each of them needed; not the first layer, which is as small and sees the picture.
    """
    layers = [
        (f"{part}.{name}".rstrip(".") + ".weight", module.weight)
        for part, network in (("backbone", model.backbone), ("embedding", model.embedding))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    return dict(layers[1:])


@torch.no_grad()
def sparsity_of(model: FaceModel) -> float:
    """The part of the `prunable` weights that is 0, in [0, 1]. Waits for the device."""
    weights = list(prunable(model).values())
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / max(1, sum(weight.numel() for weight in weights))


class Pruner:
    """Keeps a growing part of each layer's weights, the smallest ones, at 0.

    Each layer gives the same part: under BatchNorm a layer's magnitudes mean nothing beside another's. Make it after
    the phase's layers are frozen (what does not learn is not pruned: it could not make up for it), and after a
    checkpoint is loaded, or call `adopt` then.

    Args:
        target: part of the weights that is 0 at the end of the phase.

    Raises:
        ValueError: `target` is outside (0, 1), or no layer that may be pruned learns.
    """

    def __init__(self, model: FaceModel, target: float) -> None:
        if not 0 < target < 1:
            raise ValueError(f"sparsity is {target}; it must lie between 0 and 1, for instance 0.5")
        found = {name: weight for name, weight in prunable(model).items() if weight.requires_grad}
        if not found:
            raise ValueError(
                "nothing can be pruned: no convolution or linear layer after the first and before the head learns in "
                "this phase; set its trainable to all, or its sparsity to 0"
            )
        self.target = target
        self._names, self._weights = list(found), list(found.values())
        self._sparsity = -1.0
        self.adopt()

    @torch.no_grad()
    def adopt(self) -> None:
        """Takes the weights that are 0 now as pruned."""
        self._sparsity = -1.0
        self._kept: list[Tensor] = [weight != 0 for weight in self._weights]

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """After an optimiser step: what was pruned is 0 again, and where the schedule says so more is. Never waits
        for the device.

        Args:
            progress: part of the phase that is done, this step included.

        Raises:
            ValueError: `progress` is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}; it must lie in [0, 1]")
        for weight, kept in zip(self._weights, self._kept, strict=True):
            weight.mul_(kept)  # momentum moved it
        sparsity = scheduled_sparsity(self.target, progress)
        if sparsity != self._sparsity:
            # After a resume this runs once more at the same sparsity and finds what is 0 already.
            # The threshold stays on the device. Weights equal to it go too, so a layer may lose a few more than asked.
            for weight in self._weights:
                magnitudes = weight.abs()
                number = round(sparsity * weight.numel())
                if number:  # sort, unlike kthvalue, is deterministic on a GPU
                    weight.mul_(magnitudes > magnitudes.flatten().sort().values[number - 1])
            self._sparsity = sparsity
            self._kept = [weight != 0 for weight in self._weights]

    @torch.no_grad()
    def apply_to(self, model: FaceModel) -> None:
        """Prunes the same weights of a model of the same architecture, such as the moving average."""
        theirs = prunable(model)
        for name, kept in zip(self._names, self._kept, strict=True):
            theirs[name].mul_(kept)
