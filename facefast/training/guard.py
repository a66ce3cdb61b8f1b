"""What keeps numbers that are not finite out of a run: BatchNorm statistics, checkpoints, and who is to blame."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.data import Batch
from facefast.models import FaceModel
from facefast.models.spread import Named, here
from facefast.ops import AdaFace

SHOWN = 5
"""Names in a message."""


class StatisticsGuard:
    """Takes running statistics, BatchNorm's and AdaFace's, back where an update is lost: one batch that is not finite
    would spoil them for good, although no weight moved. Never waits for the device.

    Args:
        network: the model and what its objective remembers, in the modes that training uses; layers that keep their
            statistics need no guard.
    """

    def __init__(self, network: nn.Module) -> None:
        self._now = [
            statistic
            for module in network.modules()
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        ]
        for module in network.modules():
            if isinstance(module, AdaFace):
                self._now += [module.mean, module.std]
        self._counts = [
            module.num_batches_tracked
            for module in network.modules()
            if isinstance(module, _BatchNorm) and module.training and module.num_batches_tracked is not None
        ]
        self._kept = [torch.empty_like(statistic) for statistic in self._now]

    @torch.no_grad()
    def remember(self) -> None:
        """Before an update's forward passes."""
        _copy(self._kept, self._now)

    @contextlib.contextmanager
    def put_aside(self) -> Iterator[None]:
        """Within it statistics begin as `remember` saw them; afterwards they are as they were before it."""
        # A copy, for a recipe's own accumulation moves them several times in each turn.
        moved = [statistic.clone() for statistic in (*self._now, *self._counts)]
        with torch.no_grad():
            _copy(self._now, self._kept)
        yield
        with torch.no_grad():
            _copy([*self._now, *self._counts], moved)

    @torch.no_grad()
    def settle(self, finite: Tensor) -> None:
        """After them.

        Args:
            finite: scalar bool on the device, whether the update counts.
        """
        if not self._now:
            return
        # As integers, since 0 * NaN is NaN: kept + (now - kept) * finite, exact in wrapping arithmetic.
        now, kept = ([s.view(torch.int32) for s in statistics] for statistics in (self._now, self._kept))
        moved = torch._foreach_sub(now, kept)
        torch._foreach_mul_(moved, finite.to(torch.int32))
        torch._foreach_copy_(now, torch._foreach_add(kept, moved))


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, values)


def not_finite(tensors: Named) -> list[str]:
    """ "FILE NAME" of every tensor that holds a number which is not finite, here. Waits for the device, once where all
    are."""
    # A sum of finite numbers may overflow, which the exact look below clears up; one with any other number in it is not
    # finite. It reads a tensor once, where `isfinite` makes several of its size.
    found = [here(tensor) for named in tensors.values() for tensor in named.values()]
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).double() for t in found if t.is_floating_point()]
    devices = {one.device for one in sums}
    if all(bool(torch.stack([one for one in sums if one.device == device]).isfinite().all()) for device in devices):
        return []
    return [
        f"{file} {name}"
        for file, named in tensors.items()
        for name, tensor in named.items()
        if here(tensor).is_floating_point() and not bool(here(tensor).isfinite().all())
    ]


@torch.no_grad()
def culprit(model: FaceModel, batches: Sequence[Batch], autocast: torch.autocast) -> str:
    """Where numbers stop being finite on this rank's way through the model: pictures, weights or a layer. Waits for the
    device.

    Args:
        model: left in the modes that it has.
        batches: this rank's of the update in question.
        autocast: the precision of training, in which a layer may overflow that is finite otherwise.
    """
    for batch in batches:
        finite = batch.images.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            rows = batch.rows[~finite].tolist()
            return f"the pictures of rows {some(list(map(str, rows)))} are not finite"
    if broken := not_finite({"model": model.state_dict()}):
        return f"not finite: {some(broken)}"
    first: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not first and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                first.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            if batch.images.ndim == 4:  # not the cached embeddings of a frozen backbone
                with autocast:
                    model.encode(batch.images)
            if first:
                rows = batch.rows[batch.rows >= 0].tolist()
                return f"the first layer that is not finite is {first[0]}, on rows {some(list(map(str, rows)))}"
    finally:
        for handle in hooks:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return "the forward pass is finite on this rank: it is the gradients that overflow, or another rank's pictures"


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
