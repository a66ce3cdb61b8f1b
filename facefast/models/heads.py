"""Heads: from embeddings [B, D] to one number per identity, and to attributes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from facefast.ops import ShardedLoss, gather, sharded_focal_loss
from facefast.ops.linear_focal import LinearLoss, fused_type, linear_focal_leads
from facefast.ops.sharded import ranks_of
from facefast.recipe import AttributeSpec

# Logits per unit of cosine in a linear head that starts from class means. Measured on held-out pictures of 239
# CelebA identities with a MobileFaceNet: cross entropy 0.94 at 8, 0.14 at 24, 0.22 at 64; random weights start at
# log(239) = 5.48.
START_SCALE = 24.0
# Embeddings shorter than this are not stretched to length 1: their gradient would be.
SHORTEST = 1e-6


def unit(vectors: Tensor) -> Tensor:
    """Rows [N, D] scaled to length 1 in float32 or wider, whatever autocast says."""
    wide = torch.promote_types(vectors.dtype, torch.float32)
    return F.normalize(vectors.to(wide), dim=1, eps=SHORTEST)


class LinearHead(nn.Linear):
    """Logits of a softmax classifier, [B, D] to [B, C]."""

    def __init__(self, embedding: int, num_classes: int) -> None:
        super().__init__(embedding, num_classes)
        self.block = range(num_classes)

    def reset_parameters(self) -> None:
        """Random weights small enough that every class starts equally likely."""
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start_from(self, means: Tensor, norm: float) -> None:
        """Makes the logits `START_SCALE` times the cosine to each class mean.

        Args:
            means: [C, D] class means of length 1.
            norm: usual length of an embedding.
        """
        self.weight.copy_(means * (START_SCALE / norm))
        self.bias.zero_()


class Standing(NamedTuple):
    """How labelled embeddings stand among all classes, without a margin."""

    before: Tensor
    """[N] int64, classes that score as high as the right one or higher; 0 is right."""
    sure: Tensor
    """[N] probability of the most probable class."""
    loss: Tensor
    """[N] cross entropy in nats."""


class Drawn(NamedTuple):
    """Classes that an update is about, numbered anew over all ranks."""

    first: int
    """Number of the first one here."""
    classes: int
    """How many there are on all ranks."""
    labels: Tensor
    """[U] int64, the classes of the update's pictures, rising."""
    numbers: Tensor
    """[U] their new numbers."""


class CosineHead(nn.Module):
    """cos(angle) to each class's direction, [B, D] to [B, C]; the loss applies scale and margin.

    Gives cosines in float32 under autocast: a loss scaled by 64 turns bfloat16's rounding of a cosine into an eighth of
    a logit. `fused_loss` takes that rounding, as InsightFace's heads do in 16 bits, where many classes make it pay.

    Args:
        embedding: D.
        num_classes: C.
        block: the classes of this process, where several ranks share them; None holds them all.
    """

    def __init__(self, embedding: int, num_classes: int, block: range | None = None) -> None:
        super().__init__()
        self.num_classes, self.divided = num_classes, block is not None
        self.block = range(num_classes) if block is None else block
        self.drawn: Drawn | None = None
        """Which classes `weight` holds meanwhile, where it does not hold those of `block`."""
        self.weight = nn.Parameter(torch.empty(len(self.block), embedding))
        normal_rows(self.weight, self.block, num_classes, embedding**-0.5)  # length about 1, as after `start_from`

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of any length to cosines [B, C], float32 or wider.

        Raises:
            ValueError: other ranks hold some of the classes.
        """
        if len(self.block) < self.num_classes:
            raise ValueError(
                f"this process holds the classes {self.block.start} to {self.block.stop} of {self.num_classes}, "
                "which give no logits of all; load the checkpoint in one process"
            )
        return self._cosines(embeddings)

    def _cosines(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.linear(unit(embeddings), unit(self.weight))

    def fused_type(self, embeddings: Tensor) -> torch.dtype | None:
        """In which type embeddings [B, D] are to go to `fused_loss`; None where they are to become cosines. To be asked
        under the autocast of the forward pass."""
        return None if self.divided else fused_type(embeddings, self.num_classes)

    def fused_loss(self, embeddings: Tensor, labels: Tensor, dtype: torch.dtype, **options: Any) -> LinearLoss:
        """`facefast.ops.linear_focal_loss` of the cosines, which are never made as a whole unless that pays.

        An embedding shorter than `SHORTEST` gets no gradient and gives none, in float16 that of a constant vector.

        Args:
            embeddings: [B, D] of any length.
            labels: [B] int64.
            dtype: of the products and the gradients; sums and the loss are float32.
            options: of the loss, all but how it is computed.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            rows = embeddings.to(dtype)
            short = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float32) < SHORTEST
            # The gradient by a cosine is divided by the length: in float16 that overflows, and infinity times 0 is NaN.
            rows = rows.masked_fill(short[:, None], 1 if dtype == torch.float16 else 0)
            return linear_focal_leads(
                rows, self.weight.to(dtype), labels, normalize=True, chunk=0, keep=None, **options
            )

    def loss(self, embeddings: Tensor, labels: Tensor, **options: Any) -> ShardedLoss:
        """`facefast.ops.sharded_focal_loss` over the classes of all ranks, whose gradients DistributedDataParallel's
        other parameters may stand beside; every rank must call it with as many rows."""
        first, count = self.block.start, self.num_classes
        if self.drawn is not None:
            alpha = options.get("alpha")
            if isinstance(alpha, Tensor) and alpha.dim() == 1:  # by class, of which the drawn have other numbers
                options["alpha"] = alpha[labels.clamp(min=0)][:, None]
            first, count, known, numbers = self.drawn
            if len(known):
                place = torch.searchsorted(known, labels.clamp(min=0)).clamp(max=len(known) - 1)
                labels = torch.where(labels >= 0, numbers[place], labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            return sharded_focal_loss(
                unit(embeddings),
                self.weight,
                labels,
                first=first,
                num_classes=count,
                average=True,
                normalize=True,
                **options,
            )

    @torch.no_grad()
    def draw(self, labels: Tensor, part: float, key: int) -> Tensor:
        """Draws classes for an update, which `loss` takes from now on, until `drawn` is None again: `weight` must then
        hold their rows alone. Waits for the device.

        Args:
            labels: [M] of the update's rows on all ranks; their classes are always drawn, negative ones are none.
            part: of the other classes.
            key: with a class's number what the draw follows from: it does not depend on the number of ranks.

        Returns:
            [S] int64, places in `block`, rising.
        """
        known = labels[labels >= 0].unique()
        place = known - self.block.start
        mine = (place >= 0) & (place < len(self.block))
        classes = torch.arange(self.block.start, self.block.stop, device=labels.device)
        keep = uniform(classes, key) < part
        keep[place[mine]] = True
        chosen = keep.nonzero()[:, 0]
        counts = gather(torch.tensor([len(chosen)], device=labels.device)).tolist()
        rank = dist.get_rank() if len(counts) > 1 else 0
        numbers = torch.zeros_like(known)
        numbers[mine] = sum(counts[:rank]) + torch.searchsorted(chosen, place[mine])
        _over_ranks(numbers, dist.ReduceOp.SUM)
        self.drawn = Drawn(sum(counts[:rank]), sum(counts), known, numbers)
        return chosen

    @torch.no_grad()
    def standing(self, embeddings: Tensor, labels: Tensor, scale: float) -> Standing:
        """The same on every rank, each of which has the same embeddings [N, D] and labels [N], none of them below 0."""
        cosines = self._cosines(embeddings)  # [N, K]
        place = labels - self.block.start
        mine = ((place >= 0) & (place < len(self.block))).nonzero()[:, 0]
        own = cosines.new_zeros(len(labels))
        own[mine] = cosines[mine, place[mine]]
        peak = cosines.amax(1) if len(self.block) else torch.full_like(own, -math.inf)
        _over_ranks(own, dist.ReduceOp.SUM)
        _over_ranks(peak, dist.ReduceOp.MAX)
        before = (~(cosines < own[:, None])).sum(1)  # "not less" also holds for NaN
        mass = (scale * (cosines - peak[:, None])).exp().sum(1)
        _over_ranks(before, dist.ReduceOp.SUM)
        _over_ranks(mass, dist.ReduceOp.SUM)
        return Standing(before - 1, 1 / mass, scale * (peak - own) + mass.log())

    @torch.no_grad()
    def start_from(self, means: Tensor, norm: float) -> None:
        """Points each class's direction at its mean.

        Args:
            means: [K, D] means of length 1, of the classes in `block`.
            norm: usual length of an embedding; without effect on cosines, taken so that heads are interchangeable.
        """
        self.weight.copy_(means)


def uniform(numbers: Tensor, key: int) -> Tensor:
    """[N] float64 in [0, 1), a hash of each int64 number and the key (Steele et al. 2014, SplitMix64's finaliser)."""
    x = numbers * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 11 & (1 << 53) - 1).double() / (1 << 53)


def _signed(number: int) -> int:
    """The int64 with the bits of a number below 2^64."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


ROWS = 4096
"""Of random weights drawn at a time: as many as torch's generator fills in the same way whatever follows."""


@torch.no_grad()
def normal_rows(weight: Tensor, block: range, rows: int, std: float) -> None:
    """Fills [K, D] with some rows of what `nn.init.normal_` puts into [rows, D], the whole of which is never held."""
    if len(block) == rows or weight.is_meta:
        nn.init.normal_(weight, std=std)
        return
    cuts = [*range(0, rows, ROWS), rows]
    if len(cuts) > 2 and cuts[-1] - cuts[-2] < 16:  # fewer numbers than 16 would be drawn in another way
        del cuts[-2]
    for first, last in zip(cuts, cuts[1:], strict=False):
        drawn = nn.init.normal_(weight.new_empty(last - first, weight.shape[1]), std=std)
        begin, end = max(first, block.start), min(last, block.stop)
        if begin < end:
            weight[begin - block.start : end - block.start] = drawn[begin - first : end - first]


def _over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    if ranks_of(None) > 1:
        dist.all_reduce(values, operation)


HEADS: dict[str, type[LinearHead] | type[CosineHead]] = {"linear": LinearHead, "cosine": CosineHead}


class AttributeHeads(nn.Module):
    """A direction per attribute on the embedding, [B, D] to logits [B, K], see `AttributeSpec.outputs`.

    The steps of an ordinal attribute share its direction and differ in their bias, so that their order cannot
    contradict itself (CORAL, Cao et al. 2020, arXiv:1901.07884).
    """

    biases: nn.Parameter
    attribute_of: Tensor
    thresholds: Tensor

    def __init__(self, embedding: int, specs: Sequence[AttributeSpec]) -> None:
        super().__init__()
        self.specs = tuple(specs)
        owners = [k for k, spec in enumerate(specs) for _ in range(spec.outputs)]
        steps = [level for spec in specs for level in (spec.levels[:-1] or (0.0,))]
        self.weight = nn.Parameter(torch.empty(len(self.specs), embedding))
        nn.init.normal_(self.weight, std=0.01)
        self.biases = nn.Parameter(torch.zeros(len(owners)))
        self.register_buffer("attribute_of", torch.tensor(owners), persistent=False)
        self.register_buffer("thresholds", torch.tensor(steps), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes in order."""
        return tuple(spec.name for spec in self.specs)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of any length to logits [B, K], float32 or wider."""
        with torch.autocast(embeddings.device.type, enabled=False):
            spread = unit(embeddings) * math.sqrt(embeddings.shape[1])  # coordinates of about 1, whatever the length
            return F.linear(spread, self.weight)[:, self.attribute_of] + self.biases

    def targets(self, values: Tensor) -> Tensor:
        """Values of the attributes [B, A] to what the logits stand for: [B, K] of 0, 1, or NaN where unknown."""
        # An ordinal value is a row of yes and no: is it above the first level, above the second, ...
        spread = values[:, self.attribute_of]
        return (spread > self.thresholds).to(values).masked_fill(spread.isnan(), torch.nan)

    def read(self, logits: Tensor) -> Tensor:
        """Logits [B, K] to [B, A]: the probability of a yes, or the level whose steps below are all likelier than
        not."""
        columns, start = [], 0
        for spec in self.specs:
            own = torch.sigmoid(logits[:, start : start + spec.outputs].float())
            start += spec.outputs
            if spec.levels:
                levels = torch.tensor(spec.levels, device=logits.device)
                columns.append(levels[(own > 0.5).sum(1)])
            else:
                columns.append(own[:, 0])
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def start_from(self, values: Tensor) -> None:
        """Biases that give how often each logit's answer is yes among values [N, A]; the loss then starts low."""
        positive = self.targets(values)
        known = ~positive.isnan()
        # One yes and one no more than there are: an answer that all pictures share must not give an infinite bias.
        rate = (positive.nan_to_num().sum(0) + 1) / (known.sum(0) + 2)
        self.biases.copy_(torch.logit(rate))
