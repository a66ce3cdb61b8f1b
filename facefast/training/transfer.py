"""Which parameters move and how fast: freezing, BatchNorm policy, layer-wise rates, class-mean heads, the feature
cache."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.data import Batch, Sampler
from facefast.models import FaceModel
from facefast.recipe import LossConfig, Phase
from facefast.runtime.process import Runtime


def freeze_stages(model: FaceModel, trainable: tuple[str, ...]) -> None:
    """Leaves only the named stages learning; "all" is every stage, "last:3" the head and the two stages before it.

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
    """Keeps BatchNorm's statistics: everywhere, or only in layers whose own parameters do not learn."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and (everywhere or not _learns(module)):
            module.eval()


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


FEW_PICTURES = 100
"""An identity: below it, `batchnorm auto` keeps the source's statistics."""


def keeps_statistics(phase: Phase, num_rows: int, num_classes: int) -> bool:
    """Whether BatchNorm's statistics stay as they are in the whole model: few pictures of a person make worse ones than
    the millions that the source model has seen."""
    if phase.batchnorm == "auto":
        return phase.start not in ("scratch", "teacher") and num_rows < FEW_PICTURES * max(1, num_classes)
    return phase.batchnorm == "frozen"


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
    for depth, (name, modules) in enumerate(reversed(stages)):
        rate = phase.lr * (phase.head_lr if name == "head" else phase.layer_decay**depth)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decayed]
            if chosen:
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
        self._start = [source[name].to(p) for name, p in named.items()]
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


def class_means(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[C, D] unit vectors: the normalised mean of each class's normalised embeddings.

    Args:
        embeddings: [N, D].
        labels: [N] int64; rows with a negative label do not count.

    Raises:
        ValueError: a class without a single picture.
    """
    known = labels >= 0
    unit = nn.functional.normalize(embeddings[known].float(), dim=1)
    counts = torch.bincount(labels[known], minlength=num_classes)
    if bool((counts == 0).any()):
        empty = int((counts == 0).sum())
        raise ValueError(f"{empty} of {num_classes} classes have no readable picture; a class mean needs one")
    sums = torch.zeros(num_classes, unit.shape[1]).index_add_(0, labels[known], unit)
    return nn.functional.normalize(sums, dim=1)


def advice(counts: Tensor, phase: Phase) -> Iterator[str]:
    """Warnings a careful colleague would give about a label distribution, [C] pictures per class."""
    scarce = int((counts <= 2).sum())
    if scarce:
        yield f"{scarce} of {len(counts)} identities have one or two pictures: their accuracy says little"
    if len(counts) and int(counts.max()) > 20 * int(counts.clamp(min=1).min()):
        yield (
            f"the largest identity has {int(counts.max())} pictures, the smallest {int(counts.min())}: "
            f"consider --phases.{phase.name}.sampler balanced"
        )
    reachable = best_probability(phase.loss, len(counts))
    if reachable < 0.9:
        yield (
            f"loss.margin {phase.loss.margin} {phase.loss.margin_size} at loss.scale {phase.loss.scale} is too much "
            f"for {len(counts)} identities: a model that separates them perfectly would be {reachable:.0%} sure; "
            "lower the margin, or raise the scale"
        )


def best_probability(loss: LossConfig, num_classes: int) -> float:
    """The label's probability, margin included, where embeddings and classes stand as far apart as they can: cosine 1
    to one's own class and -1 / (C - 1) to each other one (Wang et al. 2018, arXiv:1801.09414, section 3.3)."""
    if loss.margin == "none" or num_classes < 2:
        return 1.0
    own = math.cos(loss.margin_size) if loss.margin == "arc" else 1 - loss.margin_size
    others = math.log(num_classes - 1) - loss.scale / (num_classes - 1)
    return 1 / (1 + math.exp(min(700.0, others - loss.scale * own)))


class CachedLoader:
    """A `Loader` whose pictures were replaced by the frozen backbone's embeddings, computed once."""

    wait_seconds = 0.0

    def __init__(self, embeddings: Tensor, labels: NDArray[np.int32], sampler: Sampler, run: Runtime) -> None:
        self.sampler = sampler
        self._run = run
        self._embeddings = embeddings.to(run.device)  # [N, D] by row of the training index; NaN could not be read
        self._readable = self._embeddings.isfinite().all(1)
        self._labels = torch.tensor(labels, dtype=torch.long).to(run.device)
        self._epoch = self._start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Where the next iteration starts."""
        self._epoch, self._start_step = epoch, start_step

    def __iter__(self) -> Iterator[Batch]:
        world = self._run.world
        for step in range(self._start_step, self.sampler.steps_per_epoch):
            local = self.sampler.local(self._epoch, step, world.rank, world.size)
            rows = torch.from_numpy(local).to(self._run.device)
            some = rows.clamp(min=0)
            rows = rows.where(self._readable[some], -1)
            labels = self._labels[some].masked_fill(rows < 0, -100)
            yield Batch(self._embeddings[some].nan_to_num(0.0), labels, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None
