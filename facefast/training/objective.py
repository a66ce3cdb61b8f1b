"""What a phase minimises: the model, and every term that its recipe names, added up over the rows of an update.

What it learns beside the model (projections, log-variances) and remembers (AdaFace's norms) is its own state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from facefast import ops
from facefast.data import Batch
from facefast.models import FaceModel
from facefast.models.heads import CosineHead
from facefast.recipe import LossConfig, Phase, TaskConfig
from facefast.training.distill import Distillation, Teacher, stage_outputs
from facefast.training.losses import (
    Mixture,
    batch_hard_triplet,
    effective_weights,
    matched_statistics,
    mix,
    supervised_contrastive,
)

IGNORED = -100


class Counts(NamedTuple):
    """`RowCounts` where the losses read them."""

    values: Tensor
    """[2 + A] float32 on the device: rows, labelled, known. What divides is at least 1."""

    @property
    def rows(self) -> Tensor:
        """Scalar."""
        return self.values[0]

    @property
    def labelled(self) -> Tensor:
        """Scalar, at least 1."""
        return self.values[1]

    @property
    def known(self) -> Tensor:
        """[A], at least 1 each."""
        return self.values[2:]

    def share(self, world: int) -> Tensor:
        """Scalar, what a row weighs in the update's mean, times the number of ranks."""
        # Not world / rows, which torch computes as the reciprocal times world: a rounding more.
        return torch.full_like(self.rows, world) / self.rows


class RowCounts(NamedTuple):
    """How many rows of one update count, over all ranks and micro-batches, as the index promises it."""

    rows: int
    """Rows that the sampler holds valid."""
    labelled: int
    """Those with an identity."""
    known: tuple[int, ...] = ()
    """Those with a value, for each attribute."""

    def on(self, device: torch.device) -> Counts:
        """For the losses: in a device's memory, because a recorded update reads there what differs between updates.
        Never waits for the device."""
        least = (max(1, number) for number in (self.labelled, *self.known))
        values = torch.tensor([self.rows, *least], dtype=torch.float32)  # exact up to 2^24
        if device.type == "cuda":
            values = values.pin_memory()
        return Counts(values.to(device, non_blocking=True))


class Terms(NamedTuple):
    """An objective's value for one micro-batch of one rank."""

    total: Tensor
    """Scalar whose gradients, averaged over ranks and added over micro-batches, are the update's."""
    parts: Tensor
    """[T] of each term, unweighted, in the order of `Objective.names`; they add up like `total`."""
    correct: Tensor
    """Scalar, labelled rows whose most probable class is theirs."""


class FusedHead(NamedTuple):
    """A head whose loss is computed without making its logits."""

    head: CosineHead
    dtype: torch.dtype
    """Of its products."""


class Objective(nn.Module):
    """The model and its losses.

    Attributes:
        names: the terms whose weight is above 0.

    Args:
        model: what learns.
        phase: the terms and their weights.
        tasks: the attributes' losses.
        counts: [C] training pictures of each class.
        cached: whether batches hold the backbone's embeddings instead of pictures.
        teacher: where the phase distils.
        autocast: the context of the model's forward pass.
        compile: whether the backbone is compiled.
    """

    term_weights: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        model: FaceModel,
        phase: Phase,
        tasks: TaskConfig | None = None,
        *,
        counts: Tensor | None = None,
        cached: bool = False,
        teacher: Teacher | None = None,
        autocast: torch.autocast | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.phase, self.cached = model, phase, cached
        self.tasks = tasks or TaskConfig()
        loss = phase.loss
        self._autocast = autocast or torch.autocast("cpu", enabled=False)
        self._encode = torch.compile(model.encode) if compile else model.encode
        self.distillation = Distillation(model, teacher, phase) if teacher else None
        self.margin = ops.AdaFace(loss.margin_size) if loss.margin == "ada" else None
        weights = None
        if loss.class_weights == "effective":
            assert counts is not None
            weights = effective_weights(counts, loss.effective_beta)
        self.register_buffer("class_weights", weights, persistent=False)
        self.weights = self._term_weights()
        self.names = tuple(self.weights)
        self.register_buffer("term_weights", torch.tensor(list(self.weights.values())), persistent=False)
        self.log_variances: nn.Parameter | None = None
        if self.tasks.weighting == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def _term_weights(self) -> dict[str, float]:
        loss, distill = self.phase.loss, self.phase.distill
        specs = self.model.attribute_heads.specs if self.model.attribute_heads else ()
        given = self.tasks.weights or (1.0,) * len(specs)
        weights = {
            "identity": loss.weight,
            "triplet": loss.triplet,
            "contrastive": loss.contrastive,
            **{spec.name: weight for spec, weight in zip(specs, given, strict=True)},
            "distill_embeddings": distill.embeddings,
            "distill_logits": distill.logits,
            "distill_features": distill.features,
            "align": self.phase.align_weight if self.phase.align != "none" else 0.0,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learnt beside the model."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("model."))

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the objective beside the model."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def forward(self, batch: Batch, values: Tensor, counts: Counts, world: int) -> Terms:
        """One micro-batch of one rank.

        Args:
            batch: pictures, or embeddings where they are cached.
            values: [B, A] of the attributes, NaN where unknown.
            counts: what means are taken over.
            world: number of ranks.
        """
        mixture = mix(batch.images, self.phase.mixup, self.phase.cutmix) if self._mixes else None
        images = mixture.images if mixture else batch.images
        with self._autocast:
            embeddings, stages = self._embed(images)
            shared, fused = self.shared_head, self._fused_head(embeddings)
            headed = self.model.dropout(embeddings) if shared is not None or fused is not None else None
            logits = self.model.classify(embeddings) if self.model.head is not None and headed is None else None
            attribute_logits = self.model.attribute_logits(embeddings)
        embeddings = embeddings.float()
        # Every term is this micro-batch's share of the update's mean: a sum divided by the count over all ranks and
        # micro-batches. Times the number of ranks, because DDP averages gradients over them instead of adding.
        parts: dict[str, Tensor] = {}
        correct = torch.zeros((), device=embeddings.device)
        if logits is not None:
            parts["identity"] = self._identity(logits, embeddings, batch.labels, mixture) * world / counts.labelled
            correct = ((logits.argmax(1) == batch.labels) & (batch.labels >= 0)).sum()
        elif fused is not None:
            assert headed is not None
            options = focal_options(self.phase.loss, self._margin_of(embeddings), self.class_weights)
            found_loss = fused.head.fused_loss(headed, batch.labels, fused.dtype, **options)
            parts["identity"] = found_loss.loss * world / counts.labelled
            correct = found_loss.leads.sum()
        elif shared is not None:
            assert headed is not None
            value, leads = self._identity_shared(shared, headed, embeddings, batch.labels, mixture)
            parts["identity"] = value * world / counts.labelled
            correct = leads.sum()
        if attribute_logits is not None:
            parts |= self._attributes(attribute_logits, values, batch.rows, counts, world)
        readable = batch.rows >= 0
        # This micro-batch's part of the update, for a term that no row gives: over an update these add up to 1.
        portion = readable.sum() * counts.share(world)
        parts |= self._pairwise(embeddings, batch.labels, readable, counts)
        if self.distillation:
            found = self.distillation(images, batch.rows, embeddings, logits, stages)
            parts |= {name: value * counts.share(world) for name, value in found.items()}
        # In the order of the names on every rank: the log adds them up by place.
        values_in_order = torch.stack([parts[name].float() for name in self.names])
        return Terms(self._weighed(values_in_order, portion), values_in_order.detach(), correct)

    @property
    def _mixes(self) -> bool:
        return self.phase.mixup > 0 or self.phase.cutmix > 0

    def _embed(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.cached:
            return images, []
        if self.phase.distill.features:
            with stage_outputs(self.model) as stages:
                return self._encode(images), stages
        return self._encode(images), []

    def _identity(self, logits: Tensor, embeddings: Tensor, labels: Tensor, mixture: Mixture | None) -> Tensor:
        """Sum of the labelled rows' focal losses."""
        loss, margin = self.phase.loss, self._margin_of(embeddings)
        own = focal_sum(logits, labels, loss, margin, self.class_weights)
        if mixture is None:
            return own
        other = focal_sum(logits, labels[mixture.partner], loss, margin, self.class_weights)
        return mixture.weight * own + (1 - mixture.weight) * other

    def _margin_of(self, embeddings: Tensor) -> ops.Combined | None:
        """The rows' own margins, where they depend on the embeddings' norms."""
        # Detached: the norm stands for a picture's quality, and is not to be optimised by way of the margin.
        found: ops.Combined | None = None if self.margin is None else self.margin(embeddings.detach().norm(dim=1))
        return found

    def _fused_head(self, embeddings: Tensor) -> FusedHead | None:
        """The head, where its loss is computed in one with its logits: nobody else reads them, and it pays."""
        head = self.model.head
        # A mixture's second loss reads them as well.
        if not isinstance(head, CosineHead) or head.divided or self._mixes or self.phase.distill.logits:
            return None
        dtype = head.fused_type(embeddings)
        return None if dtype is None else FusedHead(head, dtype)

    @property
    def shared_head(self) -> CosineHead | None:
        """The head, where its classes lie on several ranks."""
        head = self.model.head
        return head if isinstance(head, CosineHead) and head.divided else None

    def _identity_shared(
        self, head: CosineHead, headed: Tensor, embeddings: Tensor, labels: Tensor, mixture: Mixture | None
    ) -> tuple[Tensor, Tensor]:
        """The same by a head that no rank has whole, and [B] which rows it names rightly."""
        options = focal_options(self.phase.loss, self._margin_of(embeddings), self.class_weights)
        own = head.loss(headed, labels, **options)
        if mixture is None:
            return own.loss, own.leads
        other = head.loss(headed, labels[mixture.partner], **options)
        return mixture.weight * own.loss + (1 - mixture.weight) * other.loss, own.leads

    def _attributes(
        self, logits: Tensor, values: Tensor, rows: Tensor, counts: Counts, world: int
    ) -> dict[str, Tensor]:
        """Each attribute's mean of sigmoid focal losses over the rows that know it."""
        heads = self.model.attribute_heads
        assert heads is not None
        # A row that counts for nothing comes with some other row's picture and values.
        targets = heads.targets(values.masked_fill((rows < 0)[:, None], torch.nan))
        alpha = self.tasks.alpha if self.tasks.alpha >= 0 else None
        losses = ops.sigmoid_focal_loss(logits.float(), targets, gamma=self.tasks.gamma, alpha=alpha, reduction="none")
        found, start = {}, 0
        for spec, known in zip(heads.specs, counts.known, strict=True):
            found[spec.name] = losses[:, start : start + spec.outputs].sum() * world / known
            start += spec.outputs
        return found

    def _pairwise(self, embeddings: Tensor, labels: Tensor, readable: Tensor, counts: Counts) -> dict[str, Tensor]:
        """The terms that compare pictures with each other, over the micro-batch of all ranks."""
        loss, align = self.phase.loss, self.phase.align
        if not (loss.triplet or loss.contrastive or align != "none"):
            return {}
        # Every rank computes the same loss over all rows, so there is no factor for the number of ranks here.
        embeddings, labels, readable = of_all_ranks(embeddings, labels, readable)
        found = {}
        if loss.triplet:
            found["triplet"] = batch_hard_triplet(embeddings, labels, loss.triplet_margin)
        if loss.contrastive:
            found["contrastive"] = supervised_contrastive(embeddings, labels, loss.temperature)
        if align != "none":
            named = labels >= 0
            found["align"] = matched_statistics(embeddings, readable & ~named, readable & named, align)
        # One number for each micro-batch, which counts by its part of the update's rows.
        return {name: value * (readable.sum() / counts.rows) for name, value in found.items()}

    def _weighed(self, values: Tensor, portion: Tensor) -> Tensor:
        """The sum of the terms by the recipe's weights, or by exp(-s) with s / 2 on top, s the learnt log-variances
        (Kendall et al. 2018, arXiv:1705.07115)."""
        if self.log_variances is None:
            return (values * self.term_weights).sum()
        return ((-self.log_variances).exp() * values + self.log_variances / 2 * portion).sum()


def of_all_ranks(embeddings: Tensor, labels: Tensor, readable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of every rank, so that what compares them does not depend on how many ranks share a batch.

    Each rank computes the same loss on them. Its gradient reaches this rank's embeddings only, W times as large: DDP
    takes the mean over ranks.

    Args:
        embeddings: [B, D] of this rank.
        labels: [B] int64.
        readable: [B] bool.

    Returns:
        [W B, D], [W B] and [W B], in the order of the ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return embeddings, labels, readable
    gathered = []
    for rows in (embeddings.detach(), labels, readable.to(labels.dtype)):
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, rows.contiguous())
        gathered.append(parts)
    # The others' rows are constants here. This rank's own have their value, and W times their gradient: the second
    # term is 0, but its derivative is not.
    gathered[0][dist.get_rank()] = embeddings + (world - 1) * (embeddings - embeddings.detach())
    vectors, names, seen = map(torch.cat, gathered)
    return vectors, names, seen.bool()


def focal_sum(
    logits: Tensor,
    labels: Tensor,
    loss: LossConfig,
    margin: ops.Combined | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Sum of the focal losses of the rows that count, float32 or wider; `margin` is the rows' own where a recipe's
    depends on them."""
    return ops.focal_loss(logits, labels, **focal_options(loss, margin, class_weights))


def focal_options(loss: LossConfig, margin: ops.Combined | None, class_weights: Tensor | None) -> dict[str, Any]:
    """What a softmax loss takes beside logits and labels, for the sum over the rows that count."""
    margins = {"none": None, "cos": ops.Cos(loss.margin_size), "arc": ops.Arc(loss.margin_size), "ada": margin}
    return {
        "gamma": loss.gamma,
        "alpha": class_weights,
        "label_smoothing": loss.label_smoothing,
        "ignore_index": IGNORED,
        "margin": margins[loss.margin],
        "scale": loss.scale,
        "reduction": "sum",
    }
