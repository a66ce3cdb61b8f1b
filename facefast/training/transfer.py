"""Which parameters move and how fast: freezing, BatchNorm policy, layer-wise rates, L2-SP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.models import FaceModel
from facefast.recipe import Phase, Plan, Recipe


def freeze_stages(model: FaceModel, trainable: tuple[str, ...]) -> None:
    """Lets only the named stages learn; "all" is every stage, "last:3" the head and the two stages before it.

    Raises:
        ValueError: a name that the model does not have.
    """
    stages = model.stages()
    learning: set[str] = set()
    for name in trainable:
        last = re.fullmatch(r"last:([1-9]\d*)", name)
        if name == "all":
            learning |= set(stages)
        elif name in stages:
            learning.add(name)
        elif last and int(last[1]) <= len(stages):
            learning |= set(list(stages)[-int(last[1]) :])
        else:
            raise ValueError(
                f"trainable names {name}, which {model.config.backbone} does not have; it has all, "
                f"last:1 to last:{len(stages)}, {', '.join(stages)}"
            )
    for name, modules in stages.items():
        for module in modules:
            module.requires_grad_(name in learning)


def freeze_batchnorm(model: nn.Module, *, everywhere: bool) -> None:
    """Keeps BatchNorm's statistics: everywhere, or only in layers whose own parameters do not learn; where a layer has
    none, those beside it count."""
    for parent in model.modules():
        for module in parent.children():
            if isinstance(module, _BatchNorm):
                weights = list(module.parameters()) or parent.parameters()
                if everywhere or not any(weight.requires_grad for weight in weights):
                    module.eval()


FEW_PICTURES = 100
"""Pictures an identity on average; below it, `batchnorm auto` keeps the source's statistics."""


def keeps_statistics(phase: Phase, num_rows: int, num_classes: int) -> bool:
    """Whether BatchNorm's statistics stay as they are in the whole model: few pictures of a person make worse ones than
    the millions that the source model has seen."""
    if phase.batchnorm == "auto":
        return phase.start not in ("scratch", "teacher") and num_rows < FEW_PICTURES * max(1, num_classes)
    return phase.batchnorm == "frozen"


def require_statistics(recipe: Recipe, plan: Plan) -> None:
    """Refuses synchronised BatchNorm where no phase takes statistics of its batches.

    Raises:
        ValueError: so it is, by `batchnorm auto` and the number of pictures.
    """
    keeping = (
        phase.trains_only_head or keeps_statistics(phase, each.num_rows, each.num_classes)
        for phase, each in zip(recipe.phases, plan.phases, strict=True)
    )
    if recipe.model.batchnorm == "sync" and all(keeping):
        raise ValueError(
            "model.batchnorm sync has no effect: every phase keeps the source's BatchNorm statistics (batchnorm auto "
            f"does below {FEW_PICTURES} pictures an identity); set phases.K.batchnorm train, or leave it out"
        )


def parameter_groups(model: FaceModel, phase: Phase, own: Sequence[nn.Parameter] = ()) -> list[dict[str, Any]]:
    """Groups for the optimiser, each with `lr`, `peak_lr` and `weight_decay`.

    The head learns at `lr * head_lr`; a stage k steps away from the head at `lr * layer_decay**k`. Weight decay leaves
    out everything one-dimensional, biases and normalisation layers, and with L2-SP all but the head.

    Args:
        own: what the objective learns beside the model; at the head's rate.

    Raises:
        ValueError: nothing is left to learn.
    """
    groups = []
    stages = list(model.stages().items())
    # From the head backwards: the further from it, the more general a stage is, and the less it should move.
    for depth, (name, modules) in enumerate(reversed(stages)):
        rate = phase.lr * (phase.head_lr if name == "head" else phase.layer_decay**depth)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decayed]
            if chosen:
                # L2-SP pulls towards the source; a pull towards 0 beside it would move where they balance.
                decay = phase.weight_decay if decayed and not (phase.l2sp and name != "head") else 0.0
                groups.append({"params": chosen, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    if not groups:
        raise ValueError(f"phase {phase.name}: trainable {', '.join(phase.trainable)} leaves nothing to learn")
    if own:
        rate = phase.lr * phase.head_lr
        groups.append({"params": list(own), "lr": rate, "peak_lr": rate, "weight_decay": 0.0})
    return groups


class Anchor:
    """Pulls the backbone towards the source's weights: the gradient of l2sp / 2 * |w - w0|^2 (Li et al. 2018,
    arXiv:1802.01483), added to what the loss gives.

    Args:
        model: what learns, frozen as the phase wants it.
        source: the source's tensors by their names in a `FaceModel`.
        strength: l2sp.

    Raises:
        ValueError: the source has none of the weights that learn.
    """

    def __init__(self, model: FaceModel, source: Mapping[str, Tensor], strength: float) -> None:
        named = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name in source and not name.startswith(("head.", "attribute_heads."))
        }
        if not named:
            raise ValueError("l2sp has no effect: no weight of the source model learns in this phase")
        self._parameters = list(named.values())
        self._start = [source[name].to(p) for name, p in named.items()]  # the source's, not where this phase starts
        self._strength = strength

    @torch.no_grad()
    def pull(self) -> None:
        """Adds to the gradients; those that are missing stay so."""
        pairs = [(p, start) for p, start in zip(self._parameters, self._start, strict=True) if p.grad is not None]
        if pairs:
            parameters, starts = zip(*pairs, strict=True)
            away = torch._foreach_sub(list(parameters), list(starts))
            torch._foreach_add_([p.grad for p in parameters], away, alpha=self._strength)


def caches_features(phase: Phase) -> bool:
    """Whether the backbone sees the same pictures in the same state every epoch, so that once is enough."""
    return phase.trains_only_head and not phase.augment.active and not (phase.mixup or phase.cutmix)
