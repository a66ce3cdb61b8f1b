"""One optimiser update: autocast, scaler, accumulation, no_sync, clipping, finite check; and the state it moves.

Nothing in `train_step` reads the device: the counts it returns stay there until `log.RunLog` needs them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from facefast.data import Batch
from facefast.models import FaceModel
from facefast.models.checkpoint import pack_optimizer, read_tensors, unpack_optimizer
from facefast.models.precision import Precision
from facefast.recipe import Phase, PhasePlan, Plan, Recipe, to_json
from facefast.runtime import files
from facefast.runtime.process import Runtime, decode_threads
from facefast.training.distill import Teacher
from facefast.training.objective import Objective, RowCounts
from facefast.training.optim import build_optimizer, rate_factor
from facefast.training.prune import Pruner
from facefast.training.transfer import Anchor, freeze_batchnorm, freeze_stages, keeps_statistics, parameter_groups


@dataclass(frozen=True)
class SideInputs:
    """What a phase learns from beside its batches; every part may be missing."""

    counts: Tensor | None = None
    """[C] training pictures of each class."""
    values: Tensor | None = None
    """[N, A] attributes of the training rows, NaN where unknown."""
    embeddings: Tensor | None = None
    """[N, D] of the training rows where a frozen backbone needs to see each picture only once; NaN for unreadable
    ones."""
    teacher: Teacher | None = None
    source: Mapping[str, Tensor] | None = None
    """The source model's weights, for L2-SP."""


class TrainState:
    """All that training changes. `enter` begins a phase; `tensors`, `documents` and `load` are its checkpoint form."""

    model: FaceModel
    objective: Objective
    network: nn.Module
    """The objective as DDP wants it."""
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    average: AveragedModel | None
    pruner: Pruner | None
    anchor: Anchor | None
    side_inputs: SideInputs

    def __init__(self, recipe: Recipe, plan: Plan, run: Runtime) -> None:
        self.recipe, self.plan, self.run = recipe, plan, run
        self.reading = recipe.data.reading(decode_threads(recipe.threads, run.world))
        self.precision = Precision.choose(recipe.precision, recipe.model.backbone, recipe.channels_last, run.device)
        self.step = 0  # updates done in the whole run
        self.phase_number = 0
        self.phase_step = 0  # updates done in this phase
        self.best: float | None = None  # the named metric's best value in this phase and those it goes on from
        self.results: dict[str, dict[str, float]] = {}  # the best evaluation of each phase: that of its best checkpoint

    def enter(self, number: int, model: FaceModel, side: SideInputs | None = None) -> None:
        """Begins phase `number` with `model`: what learns, how fast, and the objective as DDP and the compiler want
        it."""
        if not self.continues(number):
            self.best = None
        self.phase_number, self.phase_step = number, 0
        self.model, self.side_inputs = model, side or SideInputs()
        phase, device, side = self.phase, self.run.device, self.side_inputs
        freeze_stages(model, phase.trainable)
        self.objective = Objective(
            model,
            phase,
            self.recipe.tasks,
            counts=side.counts,
            cached=side.embeddings is not None,
            teacher=side.teacher,
            autocast=self.precision.autocast(device),
            compile=self.recipe.compile,
        ).to(device)
        self.values = torch.zeros(0, 0) if side.values is None else side.values.to(device)
        own = [parameter for _, parameter in self.objective.own_parameters()]
        self.optimizer = build_optimizer(phase, parameter_groups(model, phase, own), device)
        # One mechanism for all precisions: the scaler's check on the device guards bf16 and fp32 too, at scale 1.
        scale = 2.0**14 if self.precision.name == "fp16" else 1.0
        self.scaler = GradScaler(device.type, init_scale=scale)
        self.average = None
        if self.recipe.ema:
            decay = get_ema_multi_avg_fn(self.recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        self.anchor = Anchor(model, side.source, phase.l2sp) if phase.l2sp and side.source else None
        self.pruner = Pruner(model, phase.prune) if phase.prune else None
        self.network = self.objective
        if self.run.world.size > 1:
            self.network = DistributedDataParallel(
                self.objective,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self.set_modes()

    def continues(self, number: int) -> bool:
        """Whether phase `number` goes on from the weights of the one before and is measured on the same set, so
        that the best of both is the best."""
        phases = self.recipe.phases
        return number > 0 and phases[number].start == "previous" and phases[number].split == phases[number - 1].split

    def set_modes(self) -> None:
        """Training mode, with BatchNorm as the phase says; to be called again after an evaluation."""
        self.network.train()
        plan = self.phase_plan
        freeze_batchnorm(self.model, everywhere=keeps_statistics(self.phase, plan.num_rows, plan.num_classes))

    def values_of(self, rows: Tensor) -> Tensor:
        """[B, A] attributes of training rows [B]; those of a row below 0 are another row's, and count for nothing."""
        return self.values[rows.clamp(min=0)] if len(self.values) else self.values.new_zeros(len(rows), 0)

    @property
    def phase(self) -> Phase:
        """The recipe's words on this phase."""
        return self.recipe.phases[self.phase_number]

    @property
    def phase_plan(self) -> PhasePlan:
        """The plan's numbers for this phase."""
        return self.plan.phases[self.phase_number]

    @property
    def lr(self) -> float:
        """The schedule's rate for the next update, before the groups' own factors."""
        plan = self.phase_plan
        return self.phase.lr * rate_factor(self.phase, self.phase_step, plan.steps, plan.steps_per_epoch)

    @property
    def epoch(self) -> float:
        """Passes over the phase's pictures so far."""
        return self.phase_step / self.phase_plan.steps_per_epoch

    @property
    def evaluated(self) -> FaceModel:
        """The model that is measured and handed on: the averaged one where there is one."""
        if self.average is None:
            return self.model
        assert isinstance(self.average.module, FaceModel)
        return self.average.module

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Named tensors by file."""
        found = {"model": self.model.state_dict(), "optimizer": pack_optimizer(self.optimizer)[0]}
        if own := self.objective.own_state():
            found["objective"] = own
        if self.average is not None:
            found["ema"] = self.evaluated.state_dict()
        return found

    def documents(self) -> dict[str, Any]:
        """JSON values by file. Generators need none: every update seeds them from (seed, step, rank)."""
        return {
            "model": self.model.to_config(),
            "recipe": to_json(self.recipe),
            "plan": to_json(self.plan),
            "state": {
                "step": self.step,
                "phase": self.phase_number,
                "phase_step": self.phase_step,
                "best": self.best,
                "results": self.results,
                "scaler": self.scaler.state_dict(),
                "averaged": 0 if self.average is None else int(self.average.n_averaged),
                "optimizer": pack_optimizer(self.optimizer)[1],
            },
        }

    def load(self, path: Path) -> None:
        """Takes over a checkpoint of this phase; call after `enter`."""
        document = files.read_json(path / "state.json")
        self.model.load_state_dict(read_tensors(path, "model"))
        self.objective.load_state_dict(read_tensors(path, "objective"), strict=False)
        if self.pruner is not None:
            self.pruner.adopt()
        unpack_optimizer(self.optimizer, read_tensors(path, "optimizer"), document["optimizer"])
        self.scaler.load_state_dict(document["scaler"])
        if self.average is not None:
            self.evaluated.load_state_dict(read_tensors(path, "ema"))
            self.average.n_averaged.fill_(document["averaged"])
        for name in ("step", "phase_step", "best", "results"):
            setattr(self, name, document[name])


def train_step(state: TrainState, batches: Sequence[Batch], row_counts: RowCounts) -> Tensor:
    """One update from the micro-batches of this rank.

    Args:
        batches: accumulated one after the other; together with the other ranks' they are the update's batch.
        row_counts: what the losses' means are taken over. Rows that turn out unreadable are taken out of the divisor
            afterwards, on the device.

    Returns:
        [5 + T] float32 on the device, summed over ranks: `log.STATS`, then the objective's terms.
    """
    phase, world = state.phase, state.run.world
    torch.manual_seed(_seed(state.recipe.seed, state.step, world.rank))
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * state.lr / phase.lr
    stats = torch.zeros(5 + len(state.objective.names), device=state.run.device)
    for number, batch in enumerate(batches):
        with _no_sync(state.network, number < len(batches) - 1):
            terms = state.network(batch, state.values_of(batch.rows), row_counts, world.size)
            state.scaler.scale(terms.total).backward()
        with torch.no_grad():
            per_row = row_counts.rows / world.size
            stats[0] += terms.total * per_row
            stats[1] += terms.correct
            stats[2] += (batch.rows >= 0).sum()
            stats[4] += (batch.labels >= 0).sum()
            stats[5:] += terms.parts * per_row
    if world.size > 1:
        dist.all_reduce(stats)
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    factor = row_counts.rows / stats[2].clamp(min=1)
    norm = nn.utils.get_total_norm(gradients) * factor
    if phase.clip_grad:
        factor = factor * (phase.clip_grad / norm.clamp(min=phase.clip_grad))
    torch._foreach_mul_(gradients, factor)
    if state.anchor is not None:
        state.anchor.pull()
    state.scaler.step(state.optimizer)
    if state.precision.name == "fp16":
        state.scaler.update()
    else:
        state.scaler.update(1.0)
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.phase_step += 1
    if state.pruner is not None:
        state.pruner.update(state.phase_step / state.phase_plan.steps)
    if state.average is not None:
        state.average.update_parameters(state.model)
        if state.pruner is not None:
            assert isinstance(state.average.module, FaceModel)
            state.pruner.apply_to(state.average.module)
    finite = torch.isfinite(norm)
    stats[3] = 1 - finite.float()
    return torch.where(torch.isfinite(stats), stats, 0)


def _no_sync(network: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    if skip and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def _seed(seed: int, step: int, rank: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
