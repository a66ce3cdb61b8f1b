"""Updates recorded once and replayed: a CUDA graph launches a whole update's kernels at once, where the host takes
longer to launch them one by one than a small batch takes to compute.

What is recorded is a function of tensors that stay where they are: the batch's and how many of its rows count (what
comes is copied into them), the weights, the optimiser's slots, its rate. Whatever the host decides is either the same
in every update (a phase's options), or part of the key that a recording is found by (shapes, and how many micro-batches
there are), or happens outside (the schedule, pruning, the average).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from facefast.data import Batch
from facefast.recipe import Phase, PhasePlan, Recipe
from facefast.runtime.process import World
from facefast.runtime.terminal import tell
from facefast.training.objective import Counts

WARM_UP = 3
"""Updates of a kind that run as they are before one is recorded: libraries choose kernels and take memory in the
first ones, and the optimiser makes its slots."""
MOST = 2
"""Recordings that are kept; each holds the memory of an update's activations. An epoch has full updates and a last one,
of fewer micro-batches."""
COMPILE_FROM = 2000
"""Updates of a phase from which compiling pays under `compile auto`: it takes a minute or so. Not measured."""
Update = Callable[[Sequence[Batch], Counts], Tensor]
"""An update of the weights from micro-batches, by the device alone; its numbers."""
Held = tuple[Batch | Counts, ...]
"""What differs between updates."""
Replay = Callable[[], Tensor]


class Recorder(Protocol):
    """How updates are recorded on a device."""

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Runs a function as it is."""

    def record(self, function: Callable[[], Tensor]) -> Replay:
        """What launches again what the function launches; recording itself computes nothing."""


def compiles(recipe: Recipe, phase: Phase, plan: PhasePlan, device: torch.device) -> bool:
    """Whether a phase's network is compiled."""
    if recipe.compile == "auto":
        # By the whole phase, not by what is left of it: a run that goes on computes as the one before.
        hides = phase.distill.features > 0
        return device.type == "cuda" and plan.steps >= COMPILE_FROM and not hides
    return recipe.compile == "always"


def why_not(
    recipe: Recipe, phase: Phase, plan: PhasePlan, world: World, network: nn.Module, optimizer: torch.optim.Optimizer
) -> str | None:
    """What keeps a phase's updates from being recorded, in words; None where nothing does.

    Args:
        network: the objective, in the modes that training uses.
    """
    if recipe.compile == "never":
        return "compile is never"
    if world.size > 1:
        return "several processes share an update"
    if plan.passes > 1:
        return "one process takes the turns of several"
    if phase.mixup or phase.cutmix:
        return "mixup and cutmix draw on the host"
    if recipe.model.shard_head == "ranks":
        return "model.shard_head ranks"
    if type(optimizer).__module__.startswith("apex"):
        return "apex's optimisers take their rate from the host"
    if draws := sorted(set(_drawing(network))):
        return f"{', '.join(draws)} draws on the device"
    return None


def _drawing(network: nn.Module) -> Iterator[str]:
    """Kinds of layers that draw in training: dropout and stochastic depth, timm's included."""
    for module in network.modules():
        rates = (getattr(module, name, 0) for name in ("p", "drop_prob", "drop_rate"))
        if (
            module.training
            and "drop" in type(module).__name__.lower()
            and any(isinstance(rate, float) and rate > 0 for rate in rates)
        ):
            yield type(module).__name__


def hold_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Lets the groups' rates be tensors on the device, where a recording reads them; after a checkpoint was loaded
    again, which makes them numbers."""
    kind = torch.float32 if device.type == "cuda" else torch.float64  # as torch's fused kernels read them
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=kind, device=device)
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"


def set_rate(group: dict[str, Any], rate: float) -> None:
    """The rate of a group's next update; never waits for the device."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


class RecordedUpdates:
    """Runs updates, and after the first ones of a kind replays a recording.

    Args:
        recorder: how it is done on the device.
        recover: called where recording failed in the middle; from then on updates run as they are.
    """

    def __init__(self, recorder: Recorder, recover: Callable[[], None]) -> None:
        self._recorder, self._recover = recorder, recover
        self._seen: dict[Any, int] = {}
        self._recorded: dict[Any, tuple[Held, Replay, Update]] = {}
        self._most = MOST

    def __call__(self, update: Update, batches: Sequence[Batch], counts: Counts) -> Tensor:
        """One update; what it gives is the caller's.

        Args:
            update: the tensors that it uses beside the batches and counts stay where they are while it is kept.
        """
        # Shapes are the same in every batch, the last one of an epoch included: the loader pads it with pictures whose
        # row is -1. How many rows count, and how many of them have a name, is read on the device.
        key = tuple((batch.images.shape, batch.images.dtype) for batch in batches)
        given: Held = (*batches, counts)
        if key not in self._recorded:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM_UP or len(self._recorded) >= self._most:
                return self._recorder.warm_up(lambda: update(batches, counts))
            held = [Batch(*(torch.empty_like(column) for column in batch)) for batch in batches]
            held_counts = Counts(torch.empty_like(counts.values))
            _copy((*held, held_counts), given)
            try:
                replay = self._recorder.record(lambda: update(held, held_counts))
            except RuntimeError as error:  # too little memory, or what a recording cannot hold: nothing was computed
                tell(f"note: updates are not recorded as a CUDA graph: {error}")
                self._most = len(self._recorded)
                self._recover()
                return self._recorder.warm_up(lambda: update(batches, counts))
            self._recorded[key] = (*held, held_counts), replay, update
        kept, replay, _ = self._recorded[key]
        _copy(kept, given)
        return replay().clone()  # the next replay writes over it


def _copy(held: Held, given: Held) -> None:
    for to, tensors in zip(held, given, strict=True):
        for ours, theirs in zip(to, tensors, strict=True):
            ours.copy_(theirs, non_blocking=True)


class GraphRecorder:
    """CUDA graphs in one pool of memory: one is replayed at a time, and nothing in it outlives that."""

    def __init__(self, device: torch.device) -> None:
        # Above the usual priority: where the decoders' kernels for later batches wait as well, an update's go first. A
        # graph's kernels keep the priority of the stream that they were recorded on, wherever it is replayed.
        self._device, self._stream = device, torch.cuda.Stream(device, priority=-1)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Runs it on the stream that recording will use: autograd remembers streams."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def record(self, function: Callable[[], Tensor]) -> Replay:
        """Records what it launches."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread is bound to what may be recorded: the loader's, and the one that writes checkpoints, go on.
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            # Where CUDA itself gives a recording up torch 2.11 leaves its allocator in it, which from then on would
            # free nothing that two streams have used. Where it does not, it says that there is nothing to end.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
