"""Linear layer and focal loss whose classes lie on several ranks, a block on each (PartialFC, An et al. 2022,
arXiv:2203.15565), exact over all of them.

What travels in a step: the embeddings of all ranks, five numbers a row, and the rows' gradients back. No logit does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from facefast.ops import native, reference
from facefast.ops.arguments import check_focal, check_labels, check_linear, row_alpha
from facefast.ops.focal import kernel_options
from facefast.ops.margins import Combined, Margin

IGNORED = -1
"""Rows that count for nothing, once labels are counted from a block's first class."""


class ShardedLoss(NamedTuple):
    """This rank's rows."""

    loss: Tensor
    """As `reduction` says; the gradients are those of the sum over all ranks."""
    leads: Tensor
    """[N] bool: the row counts, and its own class has a greater logit than any other, before the margin."""


def class_block(num_classes: int, ranks: int, rank: int) -> range:
    """The classes of one of `ranks`: neighbours, and on no rank more than one more than on another."""
    each, more = divmod(num_classes, ranks)
    first = rank * each + min(rank, more)
    return range(first, first + each + (rank < more))


def sharded_focal_loss(
    x: Tensor,  # [N, D] of this rank
    weight: Tensor,  # [K, D], the classes of this rank
    target: Tensor,  # [N] of all classes
    *,
    first: int,
    num_classes: int,
    group: dist.ProcessGroup | None = None,
    rows: int | None = None,
    average: bool = False,
    normalize: bool = False,
    margin: Margin | None = None,
    scale: float = 1.0,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int = 0,
) -> ShardedLoss:
    """`linear_focal_loss` of all ranks' rows over all ranks' classes; every rank of the group must call it.

    Each rank's backward pass gives its own rows' gradient of what all ranks' losses add up to, and that of its own
    classes' weights; every rank must run it.

    Args:
        x: [N, D] embeddings of this rank's rows; under autocast they and the weights take its dtype.
        weight: [K, D] of this rank's classes, of the same dtype and device; K may be 0.
        target: [N], int64 or int32 class numbers among all classes, whichever rank holds them.
        first: the number of the first class in `weight`; see `class_block`.
        num_classes: C, over all ranks.
        group: the ranks; None is all of them, or this process alone where there is no process group.
        rows: rows on every rank, up to which those here are filled up with some that count for nothing; None where all
            ranks have as many as this one.
        average: gives weights the mean over ranks of each rank's gradient instead of the sum, as
            DistributedDataParallel gives it to all other parameters.
        normalize: as for `linear_focal_loss`.
        margin: as for `focal_loss`; needs cosines.
        scale: factor of the logits, above 0.
        gamma: focal exponent, at least 0; 0 is cross entropy.
        alpha: weight of a row: a number, [C] by its class among all, or [N, 1] by row.
        label_smoothing: as for `focal_loss`, over all classes.
        ignore_index: rows with this label count for nothing.
        reduction: "mean" is this rank's part of the mean over all ranks' rows that count: the ranks' add up to it;
            "sum" is over this rank's rows, "none" leaves them.
        chunk: classes in a chunk; 0 chooses by the size of the cache.

    Raises:
        ValueError: an argument has a wrong type, shape, device or range.
        IndexError: a label is no class (on the CPU; on a GPU it is a device-side assertion).
        RuntimeError: the loss is differentiated twice.
    """
    check_linear(x, weight, chunk)
    if first < 0 or first + len(weight) > num_classes:
        raise ValueError(f"classes {first} to {first + len(weight)} are not all among {num_classes}")
    check_focal(x, len(x), num_classes, target, gamma, alpha, label_smoothing, margin, scale, reduction)
    check_labels(target, num_classes, ignore_index)
    own = len(x)
    if rows is not None and rows < own:
        raise ValueError(f"rows is {rows}; it must be at least the {own} rows of this rank")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
    counts = target != ignore_index
    x = torch.where(counts[:, None], x, 0)  # what counts for nothing may hold anything, and 0 * NaN is NaN
    # A wrong label stays wrong for the kernel to find, whatever rank looks at it.
    label = torch.where(counts, target.where((target >= 0) & (target < num_classes), num_classes), IGNORED).long()
    weights = _by_row(row_alpha(alpha, label.clamp(0, num_classes - 1), x), own) if alpha is not None else None
    if rows is not None and rows > own:
        x = torch.nn.functional.pad(x, (0, 0, 0, rows - own))
        label = torch.nn.functional.pad(label, (0, rows - own), value=IGNORED)
    everybody = _gather_rows(label, weights, margin, group)
    options = _Options(everybody.margin, everybody.alpha, gamma, label_smoothing, scale, normalize, chunk)
    block = _Block(everybody.label, first, num_classes, group, average)
    losses, leads = _Loss.apply(x, weight, block, options)  # type: ignore[no-untyped-call]
    losses, leads = losses[:own], leads[:own]
    if reduction == "mean":
        losses = losses.sum() / (everybody.label != IGNORED).sum().clamp(min=1)
    elif reduction == "sum":
        losses = losses.sum()
    return ShardedLoss(losses, leads)


def _by_row(value: float | Tensor, rows: int) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(rows)


class _Everybody(NamedTuple):
    """What every rank knows of all ranks' rows."""

    label: Tensor  # [W N] int64
    alpha: Tensor | None  # [W N, 1]
    margin: Margin | None


class _Options(NamedTuple):
    margin: Margin | None
    alpha: Tensor | None  # [W N, 1]
    gamma: float
    smoothing: float
    scale: float
    normalize: bool
    chunk: int


class _Block(NamedTuple):
    label: Tensor  # [W N], of all classes
    first: int
    classes: int
    group: dist.ProcessGroup | None
    average: bool

    @property
    def target(self) -> Tensor:
        """Labels counted from the block's first class and around the end: those of other blocks lie behind it."""
        counted = (self.label - self.first).remainder(self.classes)
        return counted.where((self.label >= 0) & (self.label < self.classes), self.label)


def _gather_rows(
    label: Tensor, weights: Tensor | None, margin: Margin | None, group: dist.ProcessGroup | None
) -> _Everybody:
    """Labels, weights and margins of all ranks' rows, in one exchange; float64 holds each of them exactly."""
    if ranks_of(group) == 1:
        return _Everybody(label, None if weights is None else weights.to(label.device)[:, None], margin)
    columns = [label.double()]
    by_row = margin is not None and any(isinstance(m, Tensor) and m.dim() == 1 for m in margin.terms()[1:3])
    moved = [weights] if weights is not None else []
    if margin is not None and by_row:
        moved += [torch.as_tensor(m) for m in margin.terms()[1:3]]
    for values in moved:
        wide = values.to(label.device, torch.float64)
        wide = wide.expand(len(label)) if wide.dim() == 0 else wide
        columns.append(torch.nn.functional.pad(wide, (0, len(label) - len(wide))))
    table = gather(torch.stack(columns, dim=1), group)
    alpha = table[:, 1:2] if weights is not None else None
    if margin is not None and by_row:
        m1, _, _, detached = margin.terms()
        margin = Combined(m1, table[:, -2], table[:, -1], "detached" if detached else "exact")
    return _Everybody(table[:, 0].long(), alpha, margin)


class _Loss(torch.autograd.Function):
    """[W N] rows, a block of the classes, and what the ranks tell each other about them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, block: _Block, options: _Options) -> tuple[Tensor, Tensor]:
        own = len(x)
        x, weight = gather(x.contiguous(), block.group), weight.contiguous()
        found = _statistics(x, weight, block, options)
        stats, sums = _merged(found.stats, found.sums, options.scale, block.group)
        losses = _losses(stats, sums, block, options)
        ctx.save_for_backward(x, weight, stats, *found[2:])
        ctx.block, ctx.options, ctx.own = block, options, own
        rank = dist.get_rank(block.group) if ranks_of(block.group) > 1 else 0
        mine = slice(rank * own, (rank + 1) * own)
        leads = ((stats[:, 2] > stats[:, 0]) | (stats[:, 1] == 0)) & (block.label != IGNORED)
        ctx.mark_non_differentiable(leads)
        return losses[mine].clone(), leads[mine]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("facefast: sharded_focal_loss has no second derivative; detach its gradient")
        block: _Block = ctx.block
        need_x, need_weight = ctx.needs_input_grad[:2]
        # The gradients of what the ranks' losses add up to: each rank's upstream gradient is about its own rows.
        grad = gather(grad.contiguous(), block.group)
        ranks = ranks_of(block.group)
        if block.average:
            grad = grad / ranks
        x_grad, weight_grad = _gradients(grad, ctx.saved_tensors, block, ctx.options, need_x, need_weight)
        if need_x:
            x_grad = _scatter_sum(x_grad, ctx.own, block.group)
            if block.average:
                x_grad = x_grad * ranks
        return x_grad if need_x else None, weight_grad if need_weight else None, None, None


def _statistics(x: Tensor, weight: Tensor, block: _Block, options: _Options) -> reference.BlockStatistics:
    """What this rank's classes add to the statistics of all rows."""
    numbers = (options.smoothing, options.scale, IGNORED, block.classes, options.normalize)
    if not native.covers(x):
        return reference.block_statistics(x, weight, block.target, *numbers)
    found = torch.ops.facefast.block_statistics(x, weight, block.target, *numbers, options.chunk)
    return reference.BlockStatistics(*found)


def _merged(stats: Tensor, sums: Tensor, scale: float, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The statistics over all ranks' classes, the same on every rank."""
    ranks = ranks_of(group)
    if ranks == 1:
        return stats, sums
    columns = [stats.double(), *([sums[:, None]] if len(sums) else [])]
    table = gather(torch.cat(columns, dim=1), group).view(ranks, len(stats), -1)
    merged, total = merge_statistics(table, scale)
    return merged.to(stats.dtype), total if len(sums) else sums


def merge_statistics(table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Statistics [N, 3] over all classes, and [N] the sum of the values where a fourth column has it.

    Args:
        table: [R, N, 3 or 4] float64 of R disjoint blocks of classes, see `reference.BlockStatistics`.
        scale: factor of the values.
    """
    peak, mass, own = table[..., 0], table[..., 1], table[..., 2]
    filled = mass != 0  # where it is 0 there are no others, and no greatest
    highest = peak.where(filled, -torch.inf).amax(0)
    highest = highest.where(highest > -torch.inf, 0)
    total = (mass * (scale * (peak - highest).clamp(max=0)).exp()).where(filled, 0).sum(0)
    return torch.stack((highest, total, own.sum(0)), dim=1), table[..., 3:].sum((0, 2))


def _losses(stats: Tensor, sums: Tensor, block: _Block, options: _Options) -> Tensor:
    """[W N] losses from complete statistics."""
    if not native.covers(stats):
        return reference.block_losses(stats, sums, block.target, block.classes, **_plain(options))
    losses, _ = torch.ops.facefast.block_losses(stats, sums, block.target, *_for_kernels(stats, options), block.classes)
    found: Tensor = losses
    return found


def _gradients(
    grad: Tensor, saved: tuple[Tensor, ...], block: _Block, options: _Options, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """This rank's part of the gradient of all rows [W N, D], and that of its weights [K, D]."""
    x, weight, stats, row_scale, col_scale = saved
    if not native.covers(x):
        return reference.block_backward(
            grad, x, weight, block.target, stats, block.classes, normalize=options.normalize, **_plain(options)
        )
    weights, margins, *numbers = _for_kernels(stats, options)
    count = stats.new_ones(())  # no mean is taken here: it divides by nothing
    found: tuple[Tensor, Tensor] = torch.ops.facefast.block_backward(
        grad, x, weight, block.target, weights, margins, stats, count, row_scale, col_scale, *numbers, block.classes,
        options.chunk, need_x, need_weight,
    )  # fmt: skip
    return found


def _for_kernels(stats: Tensor, options: _Options) -> tuple[Any, ...]:
    return kernel_options(
        stats, options.gamma, options.alpha, options.smoothing, IGNORED, options.margin, options.scale, "none"
    )


def _plain(options: _Options) -> dict[str, Any]:
    return {
        "gamma": options.gamma,
        "alpha": options.alpha,
        "label_smoothing": options.smoothing,
        "ignore_index": IGNORED,
        "margin": options.margin,
        "scale": options.scale,
    }


# ---------------------------------------------------------------------------------------------
# Between ranks


def ranks_of(group: dist.ProcessGroup | None) -> int:
    """How many processes share the classes."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def gather(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[W N, ...] of all ranks' [N, ...], in their order; without gradient."""
    ranks = ranks_of(group)
    if ranks == 1:
        return values
    found = values.new_empty((ranks * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(found, values.contiguous(), group=group)
    return found


def _scatter_sum(parts: Tensor, own: int, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's rows [N, D] of the sum over ranks of [W N, D], added up in float32 or wider."""
    if ranks_of(group) == 1:
        return parts
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
    found = wide.new_empty((own, parts.shape[1]))
    dist.reduce_scatter_tensor(found, wide, group=group)
    return found.to(parts.dtype)
