"""One optimiser update: autocast, scaler, accumulation, no_sync, clipping, finite check; and the state it moves.

Nothing in `train_step` reads the device, so that the host queues work ahead of the GPU; the counts that it returns stay
there until a number is wanted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
from facefast.models.batchnorm import synchronise
from facefast.models.checkpoint import pack_optimizer, read_tensors, read_weights, unpack_optimizer
from facefast.models.precision import Precision
from facefast.models.spread import Spread, own_rows
from facefast.recipe import Phase, PhasePlan, Plan, Recipe, to_json
from facefast.runtime import files
from facefast.runtime.background import Background
from facefast.runtime.log import STATS, Position
from facefast.runtime.process import Runtime, World, decode_threads, set_cudnn_benchmark
from facefast.training.distill import Teacher
from facefast.training.drawn import DrawnRows
from facefast.training.graphs import GraphRecorder, RecordedUpdates, Recorder, compiles, hold_rates, set_rate, why_not
from facefast.training.guard import StatisticsGuard
from facefast.training.objective import Counts, Objective, RowCounts
from facefast.training.optim import build_optimizer, rate_factor
from facefast.training.prune import Pruner
from facefast.training.staged import Staged
from facefast.training.transfer import (
    Anchor,
    freeze_batchnorm,
    freeze_stages,
    keeps_statistics,
    parameter_groups,
    require_statistics,
)

HEAD = "head.weight"
"""The name of the weights whose rows ranks may share, in a model."""


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
    """The source model's weights, adapted where they were, for L2-SP."""


class TrainState:
    """All that training changes. `enter` begins a phase; `tensors`, `documents` and `load` are its checkpoint form."""

    model: FaceModel
    objective: Objective
    network: nn.Module
    """The objective, inside DDP where there are several ranks."""
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    average: AveragedModel | None
    pruner: Pruner | None
    anchor: Anchor | None
    side_inputs: SideInputs
    guard: StatisticsGuard
    recorded: RecordedUpdates | None
    """What replays updates, where they are recorded."""
    unrecorded: str | None
    """Why they cannot be, in words."""

    def __init__(self, recipe: Recipe, plan: Plan, run: Runtime) -> None:
        self.recipe, self.plan, self.run = recipe, plan, run
        self.saves = Background(run)  # the checkpoint that is being written
        self.staged = Staged()  # and what it holds
        require_statistics(recipe, plan)
        self.reading = recipe.data.reading(decode_threads(recipe.threads, run.world))
        set_cudnn_benchmark(run, recipe.cudnn_benchmark)  # not before: pictures come in many shapes until they are cut
        self.precision = Precision.choose(recipe.precision, recipe.model.backbone, recipe.channels_last, run.device)
        self.faces: dict[str, Any] | None = None  # how faces were found, for the model
        self.step = 0  # updates done in the whole run
        self.phase_number = 0
        self.phase_step = 0  # updates done in this phase
        # On the validation part: the deciding number of the best checkpoint in this phase and those it goes on from,
        # where that checkpoint stands (phase number, updates done in it), and each phase's best evaluation.
        self.best: float | None = None
        self.chosen = (0, 0)
        self.validated: dict[str, dict[str, float]] = {}
        self.anchored: dict[str, Tensor] | None = None  # the adapted source's weights, for L2-SP
        self.reported: dict[str, dict[str, float]] = {}  # on the test part, which chooses nothing: rows of the table

    def enter(self, number: int, model: FaceModel, side: SideInputs | None = None) -> None:
        """Begins phase `number` with `model`: what learns, how fast, and the objective, compiled and in DDP where
        wanted."""
        if not self.continues(number):
            self.best = None
            self.validated = {}
        self.phase_number, self.phase_step = number, 0
        self.model, self.side_inputs = model, side or SideInputs()
        phase, device, side = self.phase, self.run.device, self.side_inputs
        # Everything below takes the parameters that require a gradient now: freezing comes first.
        freeze_stages(model, phase.trainable)
        if self.recipe.model.batchnorm == "sync":
            synchronise(model)
        # Before the optimiser: what the objective learns itself (projections, log-variances) is its to move too.
        self.objective = Objective(
            model,
            phase,
            self.recipe.tasks,
            counts=side.counts,
            cached=side.embeddings is not None,
            teacher=side.teacher,
            autocast=self.precision.autocast(device),
            compile=compiles(self.recipe, phase, self.phase_plan, device),
        ).to(device)
        self.values = torch.zeros(0, 0) if side.values is None else side.values.to(device)
        own = [parameter for _, parameter in self.objective.own_parameters()]
        self.optimizer = build_optimizer(phase, parameter_groups(model, phase, own), device)
        # One mechanism for all precisions: the scaler's check on the device guards bf16 and fp32 too, at scale 1.
        scale = 2.0**14 if self.precision.name == "fp16" else 1.0
        self.scaler = GradScaler(device.type, init_scale=scale)
        self.average = None
        if self.recipe.ema:  # buffers too: averaged weights need BatchNorm statistics of their own
            decay = get_ema_multi_avg_fn(self.recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        self.anchor = Anchor(model, side.source, phase.l2sp) if phase.l2sp and side.source else None
        self.pruner = Pruner(model, phase.prune) if phase.prune else None
        # DDP last: it hooks the parameters that require a gradient when it is made, and spreads rank 0's tensors.
        self.network = self.objective
        # Not the weights of which every rank has others: nothing of them is to be spread or averaged.
        own_names = {f"model.{HEAD}"} if self.shared_weight is not None else set()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.objective, own_names)
        learns = any(p.requires_grad for name, p in self.objective.named_parameters() if name not in own_names)
        if self.run.world.size > 1 and learns:
            self.network = DistributedDataParallel(
                self.objective,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self.set_modes()
        self.recorded = None
        self.unrecorded = why_not(self.recipe, phase, self.phase_plan, self.run.world, self.objective, self.optimizer)
        if device.type == "cuda" and self.unrecorded is None:
            self.record(GraphRecorder(device))

    def record(self, recorder: Recorder) -> None:
        """Lets the phase's updates be recorded and replayed."""
        self.recorded = RecordedUpdates(recorder, self._forget_gradients)
        hold_rates(self.optimizer, self.run.device)

    def _forget_gradients(self) -> None:
        """What an update that broke off has left of itself on the host."""
        self.optimizer.zero_grad(set_to_none=True)
        scaler = GradScaler(self.run.device.type)
        scaler.load_state_dict(self.scaler.state_dict())
        self.scaler = scaler

    def continues(self, number: int) -> bool:
        """Whether phase `number` goes on from the weights of the one before and is measured on the same set, so
        that the best of both is the best."""
        phases = self.recipe.phases
        return number > 0 and phases[number].start == "previous" and phases[number].split == phases[number - 1].split

    def set_modes(self) -> None:
        """Training mode, with BatchNorm as the phase says; to be called again after an evaluation, which ends with
        BatchNorm in training mode everywhere."""
        self.network.train()
        plan = self.phase_plan
        freeze_batchnorm(self.model, everywhere=keeps_statistics(self.phase, plan.num_rows, plan.num_classes))
        self.guard = StatisticsGuard(self.objective)

    def values_of(self, rows: Tensor) -> Tensor:
        """[B, A] attributes of training rows [B]; those of a row below 0 are another row's, and count for nothing."""
        return self.values[rows.clamp(min=0)] if len(self.values) else self.values.new_zeros(len(rows), 0)

    @property
    def sharing(self) -> World | None:
        """The processes that share the classes of the head, where the recipe divides them."""
        return self.run.world if self.recipe.model.shard_head == "ranks" else None

    @property
    def shared_weight(self) -> nn.Parameter | None:
        """The head's weights, where each rank has those of other classes."""
        head = self.objective.shared_head
        return None if head is None else head.weight

    @property
    def phase(self) -> Phase:
        """This phase in the recipe."""
        return self.recipe.phases[self.phase_number]

    @property
    def phase_plan(self) -> PhasePlan:
        """This phase in the plan."""
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
    def position(self) -> Position:
        """The update just done, for the log."""
        plan = self.phase_plan
        epochs = plan.steps / plan.steps_per_epoch
        return Position(self.step, self.phase.name, self.epoch, epochs, self.lr, last=self.phase_step == plan.steps)

    @property
    def evaluated(self) -> FaceModel:
        """The model that is measured and handed on: the averaged one where there is one."""
        if self.average is None:
            return self.model
        assert isinstance(self.average.module, FaceModel)
        return self.average.module

    def tensors(self) -> dict[str, dict[str, Tensor | Spread]]:
        """Named tensors by file."""
        found: dict[str, dict[str, Tensor | Spread]] = {
            "model": dict(self.model.state_dict()),
            "optimizer": dict(pack_optimizer(self.optimizer)[0]),
        }
        if own := self.objective.own_state():
            found["objective"] = dict(own)
        if self.anchored is not None:
            found["anchor"] = dict(self.anchored)
        if self.average is not None:
            found["ema"] = dict(self.evaluated.state_dict())
        if (weight := self.shared_weight) is not None:
            for file, name in self._of_shared_weight(found):
                tensor = found[file][name]
                assert isinstance(tensor, Tensor)
                if tensor.shape == weight.shape:
                    found[file][name] = Spread(tensor, self.model.num_classes)
        return found

    def _of_shared_weight(self, named: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
        """File and name of what has a row for each class: the head's weights, and what their optimiser keeps of
        them."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        places = [f"{k}." for k, parameter in enumerate(parameters) if parameter is self.shared_weight]
        return [
            (file, name)
            for file, tensors in named.items()
            for name in tensors
            if (name == HEAD if file in ("model", "ema") else file == "optimizer" and name.startswith(tuple(places)))
        ]

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
                "chosen": self.chosen,
                "validated": self.validated,
                "reported": self.reported,
                "scaler": self.scaler.state_dict(),
                "averaged": 0 if self.average is None else int(self.average.n_averaged),
                "optimizer": pack_optimizer(self.optimizer)[1],
            },
        }

    def load(self, path: Path) -> None:
        """Takes over a checkpoint of this phase; call after `enter`."""
        document = files.read_json(path / "state.json")
        # In place, tensor by tensor: the optimiser, DDP and a compiled graph hold these very parameters.
        self.model.load_state_dict(read_weights(path, self.model))
        self.objective.load_state_dict(read_tensors(path, "objective"), strict=False)  # its own part alone
        if self.pruner is not None:
            self.pruner.adopt()
        slots = read_tensors(path, "optimizer")
        if self.shared_weight is not None and self.model.head is not None:
            for _, name in self._of_shared_weight({"optimizer": slots}):
                slots[name] = own_rows(slots[name], self.model.head.block, self.model.num_classes)
        unpack_optimizer(self.optimizer, slots, document["optimizer"])
        if self.recorded is not None:
            hold_rates(self.optimizer, self.run.device)
        self.scaler.load_state_dict(document["scaler"])
        if self.average is not None:
            self.evaluated.load_state_dict(read_weights(path, self.evaluated, "ema"))
            self.average.n_averaged.fill_(document["averaged"])
        for name in ("step", "phase_step", "best"):
            setattr(self, name, document[name])
        self.chosen = (document["chosen"][0], document["chosen"][1])
        self.validated, self.reported = _numbers(document["validated"]), _numbers(document["reported"])


def _numbers(rows: dict[str, dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Evaluations out of JSON, which has null for NaN."""
    return {
        row: {name: math.nan if value is None else value for name, value in results.items()}
        for row, results in rows.items()
    }


def train_step(state: TrainState, batches: Sequence[Batch], row_counts: RowCounts) -> Tensor:
    """One update from the micro-batches of this rank.

    Args:
        batches: accumulated one after the other; together with the other ranks' they are the update's batch.
        row_counts: what the losses' means are taken over. Rows that turn out unreadable are taken out of the divisor
            afterwards, on the device.

    Returns:
        [6 + 2 T] float32 on the device, summed over ranks: `log.STATS`, then the objective's terms, then 1 for each
        term that is not finite.
    """
    phase = state.phase
    # The schedule's factor on each group's own peak, which keeps layer_decay's and head_lr's ratios.
    for group in state.optimizer.param_groups:
        set_rate(group, group["peak_lr"] * state.lr / phase.lr)
    drawn = _draw_classes(state, batches)
    # Dropout, stochastic depth and mixed pictures draw from generators that every update seeds: a resumed run draws
    # what an uninterrupted one would, and no generator's state has to be saved.
    torch.manual_seed(_seed(state.recipe.seed, state.step, state.run.world.rank))
    update = functools.partial(_update, state, state.guard)
    counts = row_counts.on(state.run.device)
    stats = update(batches, counts) if state.recorded is None else state.recorded(update, batches, counts)
    if drawn is not None:
        drawn.put_back()
    # A skipped update counts: the host does not know of it, and schedule and sampler must go on alike on every rank.
    state.step += 1
    state.phase_step += 1
    # After the optimiser, whose momentum moves pruned weights off 0; before the average, which would take that up.
    if state.pruner is not None:
        state.pruner.update(state.phase_step / state.phase_plan.steps)
    if state.average is not None:
        state.average.update_parameters(state.model)
        # An average of a weight that became 0 only comes near 0: the mask makes it exact.
        if state.pruner is not None:
            assert isinstance(state.average.module, FaceModel)
            state.pruner.apply_to(state.average.module)
    return stats


def _update(state: TrainState, guard: StatisticsGuard, batches: Sequence[Batch], counts: Counts) -> Tensor:
    """What the device does in an update; a recording replays it without the host, see `facefast.training.graphs`."""
    phase, world = state.phase, state.run.world
    # On the device: reading a loss makes the host wait for all work queued there. The log reads when a line is due.
    first, terms_end = len(STATS), len(STATS) + len(state.objective.names)
    stats = torch.zeros(terms_end + len(state.objective.names), device=state.run.device)
    guard.remember()
    for batch, is_last in _in_turn(state, batches):
        # DDP averages gradients over the ranks once per update, in the last backward pass.
        with _no_sync(state.network, not is_last):
            terms = state.network(batch, state.values_of(batch.rows), counts, world.size)
            state.scaler.scale(terms.total).backward()
        with torch.no_grad():
            # A total is this part of the update's mean times the number of ranks, by which DDP divides; times the
            # rows it is a sum, and sums can be added over passes, ranks and updates.
            per_row = counts.rows / world.size
            stats[0] += terms.total * per_row
            stats[1] += terms.correct
            stats[2] += (batch.rows >= 0).sum()
            stats[4] += (batch.labels >= 0).sum()
            stats[first:terms_end] += terms.parts * per_row
    if world.size > 1:
        dist.all_reduce(stats)
    shared = _shared_square(state)
    # First out of fp16's scale, so that `clip_grad` means the same in every precision. This also notes on the device,
    # for `step` below, whether a gradient is not finite.
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    # The losses were divided by the rows that the index promised: what other ranks and later passes would read was not
    # known yet. Rows that turned out unreadable gave nothing; this makes the mean that of the others.
    factor = stats[2].clamp(min=1).reciprocal() * counts.rows
    # One number for clipping and for the log's finite check. It is taken now, because clipping changes the gradients
    # in place, and it is not finite as soon as one of them is not.
    norm = _total_norm(state, gradients, shared) * factor
    if phase.clip_grad:
        factor = factor * (phase.clip_grad / norm.clamp(min=phase.clip_grad))
    torch._foreach_mul_(gradients, factor)
    # After clipping, like the weight decay that it replaces: the pull towards the source is no part of the loss, so it
    # neither counts in the norm nor shrinks with it.
    if state.anchor is not None:
        state.anchor.pull()
    # Changes nothing where a gradient was not finite; a fused optimiser finds that out on the device.
    state.scaler.step(state.optimizer)
    # fp16's scale follows what overflowed. bf16 and fp32 need none: 1.0 pins it, where update() alone would let it
    # grow, and clears the scaler's notes for the next update.
    if state.precision.name == "fp16":
        state.scaler.update()
    else:
        state.scaler.update(1.0)
    # None, not zeros: the next backward pass writes gradients instead of adding to them.
    state.optimizer.zero_grad(set_to_none=True)
    # Before an average, which takes statistics over as well.
    finite = torch.isfinite(norm)
    guard.settle(finite)
    stats[3] = 1 - finite.float()  # not added over ranks: after DDP all have the same gradients
    # A log line adds up several updates: a loss that is not finite counts for nothing in it, and neither do its rows.
    broken = ~torch.isfinite(stats[first:terms_end])
    sound = torch.isfinite(stats[0]) & ~broken.any()
    stats[5] = stats[2] * sound
    stats[terms_end:] = broken.float()
    stats[0] = torch.where(sound, stats[0], 0)
    stats[first:terms_end] = torch.where(sound, stats[first:terms_end], 0)
    return stats


def _in_turn(state: TrainState, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
    """The micro-batches, and whether each is the update's last one.

    A process that goes on for several which began takes the turn of each: it draws what that one would have drawn, and
    the running statistics that it keeps are those of its own turn, as rank 0's are with several.
    """
    passes, world = state.phase_plan.passes, state.run.world
    for turn in range(passes):
        if turn:
            torch.manual_seed(_seed(state.recipe.seed, state.step, turn * world.size + world.rank))
        with state.guard.put_aside() if turn else contextlib.nullcontext():
            own = batches[turn::passes]
            for number, batch in enumerate(own):
                yield batch, turn == passes - 1 and number == len(own) - 1


def _draw_classes(state: TrainState, batches: Sequence[Batch]) -> DrawnRows | None:
    """The classes of this update, where it is not about all of them."""
    head, part = state.objective.shared_head, state.phase.loss.negatives
    if head is None or part == 1:
        return None
    return DrawnRows(head, state.optimizer, batches, part, _seed(state.recipe.seed, state.step, "classes"))


def _shared_square(state: TrainState) -> Tensor | None:
    """The squared norm, float64, of the gradient of the head's weights over the ranks that share them, in the scaler's
    unit; None where each rank has all gradients.

    Where one rank's is not finite, every rank's gradients become so: all must leave out the same update.
    """
    weight = state.shared_weight
    if weight is None or not weight.requires_grad:
        return None
    square = torch.zeros((), dtype=torch.float64, device=weight.device)
    if weight.grad is not None and weight.grad.numel():
        square += torch.linalg.vector_norm(weight.grad).double() ** 2
    if state.run.world.size > 1:
        dist.all_reduce(square)
        gradients = (p.grad for group in state.optimizer.param_groups for p in group["params"])
        for grad in gradients:
            if grad is not None and grad.numel():
                grad[(0,) * grad.ndim] += square * 0  # 0, or NaN
                break  # one is enough for the scaler to see
    return square


def _total_norm(state: TrainState, gradients: Sequence[Tensor], shared: Tensor | None) -> Tensor:
    """The norm of all gradients, once out of the scaler's unit, the same on every rank."""
    if shared is None:
        return nn.utils.get_total_norm(gradients)
    weight = state.shared_weight
    others = [grad for grad in gradients if weight is None or grad is not weight.grad]
    own = nn.utils.get_total_norm(others).double() if others else torch.zeros_like(shared)
    unit = state.scaler.scale(torch.ones_like(shared))
    return (own**2 + shared / unit**2).sqrt().float()


def _no_sync(network: nn.Module, skip: bool) -> contextlib.AbstractContextManager[None]:
    if skip and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def _seed(seed: int, step: int, rank: int | str) -> int:
    """63 bits of a hash: with a sum, rank 1 would draw what rank 0 draws one step later."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
