"""What a phase learns from a teacher beside its labels: logits, embeddings, the outputs of its stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facefast.models import FaceModel
from facefast.models.heads import unit
from facefast.recipe import Phase


class Teacher(NamedTuple):
    """A model whose outputs are learnt from, and which does not learn."""

    model: FaceModel
    """In evaluation mode, on the device."""
    cache: Tensor | None = None
    """[N, D] its embeddings of the training rows, where the pictures never change; NaN for unreadable rows."""


def caches_teacher(phase: Phase) -> bool:
    """Whether the teacher sees the same pictures every epoch and only its embeddings are wanted."""
    return phase.distill.active and not phase.augment.active and not phase.distill.features


def check_teacher(teacher: FaceModel, student: FaceModel, phase: Phase) -> None:
    """Refuses a teacher that the student cannot learn from.

    Raises:
        ValueError: other pictures, other identities, or no stages that could be compared.
    """
    if teacher.image != student.image:
        raise ValueError(
            f"model.teacher takes other pictures ({teacher.image}) than the student ({student.image}); leave the "
            "image options out to take the teacher's"
        )
    if phase.distill.logits and teacher.class_names != student.class_names:
        raise ValueError(
            f"phase {phase.name}: distill.logits {phase.distill.logits} compares the {student.num_classes} identities "
            f"with the teacher's {teacher.num_classes}, which are others; fine-tune the teacher on the same "
            "photographs first, or use distill.embeddings"
        )


@contextlib.contextmanager
def stage_outputs(model: FaceModel) -> Iterator[list[Tensor]]:
    """The list fills with the outputs [B, C, H, W] of the model's stages, first to last, while it encodes pictures."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, given: Any, out: Tensor) -> None:
        if out.ndim == 4 and out.shape[2] > 1:  # not an embedding
            outputs.append(out)

    handles = [module.register_forward_hook(keep) for module in model.stage_ends()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Distillation(nn.Module):
    """The losses of a `DistillConfig`, with the projections that they learn.

    Args:
        student: the model that learns; no reference to it is kept.
        teacher: the model that it learns from.
        phase: its `distill`, and the scale of the student's logits.
    """

    def __init__(self, student: FaceModel, teacher: Teacher, phase: Phase) -> None:
        super().__init__()
        check_teacher(teacher.model, student, phase)
        self.config, self.scale = phase.distill, phase.loss.scale
        self._teacher = (teacher,)  # in a tuple: its weights are not this module's
        self.projection: nn.Module = nn.Identity()
        if self.config.embeddings and student.embedding_size != teacher.model.embedding_size:
            self.projection = nn.Linear(student.embedding_size, teacher.model.embedding_size, bias=False)
        self.convolutions = nn.ModuleList()
        if self.config.features and self.config.match == "projected":
            pairs = zip(_channels(student), _channels(teacher.model), strict=False)
            self.convolutions.extend(nn.Conv2d(own, theirs, 1, bias=False) for own, theirs in pairs)

    def forward(
        self, images: Tensor, rows: Tensor, embeddings: Tensor, logits: Tensor | None, stages: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Sums over the readable rows of each loss, unweighted.

        Args:
            images: [B, 3, H, W] as the student saw them.
            rows: [B] int64, -1 where a row counts for nothing.
            embeddings: [B, D] of the student.
            logits: [B, C] of the student before the scale, where the teacher's are wanted.
            stages: outputs of the student's stages, where the teacher's are wanted.
        """
        theirs, their_stages = self._ask(images, rows)
        counts = rows >= 0
        losses: dict[str, Tensor] = {}
        if self.config.embeddings:
            own = unit(self.projection(embeddings))
            losses["distill_embeddings"] = ((1 - (own * unit(theirs)).sum(1)) * counts).sum()
        if self.config.logits:
            assert logits is not None
            model, temperature = self._teacher[0].model, self.config.temperature
            with torch.no_grad():
                soft = F.log_softmax(model.classify(theirs).float() * (model.scale / temperature), dim=1)
            own = F.log_softmax(logits.float() * (self.scale / temperature), dim=1)
            divergence = F.kl_div(own, soft, reduction="none", log_target=True).sum(1)
            # Gradients of softened logits shrink with the square of the temperature (Hinton et al. 2015, section 2).
            losses["distill_logits"] = (divergence * counts).sum() * temperature**2
        if self.config.features:
            pairs = list(zip(stages, their_stages, strict=False))  # where one has more stages, the first ones
            distances = [self._distance(k, own, other) for k, (own, other) in enumerate(pairs)]
            losses["distill_features"] = (torch.stack(distances).mean(0) * counts).sum()
        return losses

    @torch.no_grad()
    def _ask(self, images: Tensor, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        teacher = self._teacher[0]
        if teacher.cache is not None:  # NaN times a count of 0 would be NaN: unreadable rows become 0
            return teacher.cache[rows.clamp(min=0)].nan_to_num(), []
        # Only where they are compared: a network without stages that follow each other can still be asked for the rest.
        if not self.config.features:
            return teacher.model.encode(images).float(), []
        with stage_outputs(teacher.model) as stages:
            embeddings = teacher.model.encode(images).float()
        return embeddings, stages

    def _distance(self, number: int, own: Tensor, theirs: Tensor) -> Tensor:
        """[B] between two stages' outputs, brought to the size of the smaller one."""
        own, theirs = own.float(), theirs.float()
        size = (min(own.shape[2], theirs.shape[2]), min(own.shape[3], theirs.shape[3]))
        own, theirs = F.adaptive_avg_pool2d(own, size), F.adaptive_avg_pool2d(theirs, size)
        # Unit length per picture: how strongly a network responds differs between networks and is not compared.
        if self.config.match == "projected":
            own = self.convolutions[number](own)
            return (unit(own.flatten(1)) - unit(theirs.flatten(1))).square().sum(1)
        # Attention (Zagoruyko & Komodakis 2017): the energy over channels at each place, which needs no equal channels.
        look = [unit(maps.square().mean(1).flatten(1)) for maps in (own, theirs)]
        return (look[0] - look[1]).square().sum(1)


@torch.no_grad()
def _channels(model: FaceModel) -> list[int]:
    """Channels of each stage's output."""
    was_training, device = model.training, next(model.parameters()).device
    with stage_outputs(model.eval()) as outputs:
        model.encode(torch.zeros(1, 3, *model.image.shape, device=device))
    model.train(was_training)
    return [out.shape[1] for out in outputs]
