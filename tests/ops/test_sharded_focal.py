"""sharded_focal_loss: blocks of the classes against the whole, in one process and on several ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from facefast.ops import AdaFace, Arc, Combined, Cos, class_block, native, reference, sharded_focal_loss
from facefast.ops.focal import kernel_options
from facefast.ops.margins import Margin
from facefast.ops.sharded import merge_statistics
from tests.support.ranks import run_ranks

IGNORE = -100
MARGINS: dict[str, Callable[[Tensor], Margin | None]] = {
    "none": lambda norms: None,
    "cos": lambda norms: Cos(0.2),
    "arc": lambda norms: Arc(0.4),
    "arc detached": lambda norms: Arc(0.4, gradient="detached"),
    "arc by row": lambda norms: Arc(0.02 * norms),
    "combined": lambda norms: Combined(1.1, 0.2, 0.1),
    "adaface": lambda norms: AdaFace().eval()(norms),
}


def operands(rows: int, classes: int, dim: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, weight, labels of which each fifth is ignored, and an upstream gradient."""
    generator = torch.Generator().manual_seed(rows + 1000 * classes)
    x, weight = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (rows, classes))
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[4::5] = IGNORE
    return x.to(dtype), weight.to(dtype), labels, torch.randn(rows, dtype=torch.float64, generator=generator).to(dtype)


def every_option(rows: int, classes: int) -> Iterator[dict[str, Any]]:
    """Each margin, with and without the rest."""
    generator = torch.Generator().manual_seed(2)
    alphas = (None, 0.3, torch.rand(classes, generator=generator), torch.rand(rows, 1, generator=generator))
    more = itertools.cycle(itertools.product(alphas, (0.0, 0.1), (0.0, 1.5)))
    for name, normalize in itertools.product(MARGINS, (True, False)):
        if normalize or name == "none":
            for _ in range(4):
                alpha, smoothing, gamma = next(more)
                yield {"margin": name, "normalize": normalize, "alpha": alpha, "label_smoothing": smoothing,
                       "gamma": gamma, "scale": 8.0 if normalize else 1.0}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The three operators, a block of the classes after the other in one process


def in_blocks(x: Tensor, weight: Tensor, y: Tensor, upstream: Tensor, cuts: list[int], plain: bool, **options: Any):  # type: ignore[no-untyped-def]
    """Losses, and the gradients of x and weight, as ranks that hold the classes between the cuts compute them."""
    classes, normalize = len(weight), options.pop("normalize")
    numbers = (options["label_smoothing"], options["scale"], IGNORE, classes, normalize)
    kernels = torch.ops.facefast
    blocks = [range(a, b) for a, b in itertools.pairwise([0, *cuts, classes])]
    targets = [torch.where(y == IGNORE, IGNORE, (y - block.start) % classes) for block in blocks]
    held = [weight[block.start : block.stop] for block in blocks]
    found = [
        reference.block_statistics(x, own, target, *numbers)
        if plain
        else reference.BlockStatistics(*kernels.block_statistics(x, own, target, *numbers, 3))
        for own, target in zip(held, targets, strict=True)
    ]
    smooth = options["label_smoothing"] > 0
    tables = [torch.cat([f.stats.double(), f.sums[:, None]], 1) if smooth else f.stats.double() for f in found]
    stats, sums = merge_statistics(torch.stack(tables), options["scale"])
    stats, sums = stats.to(x.dtype), sums if smooth else sums[:0]
    passed = kernel_options(stats, options["gamma"], options["alpha"], options["label_smoothing"], IGNORE,
                            options["margin"], options["scale"], "none")  # fmt: skip
    x_grad, weight_grads, losses = torch.zeros_like(x), [], []
    for own, target, f in zip(held, targets, found, strict=True):
        if plain:
            losses.append(reference.block_losses(stats, sums, target, classes, ignore_index=IGNORE, **options))
            part, weight_grad = reference.block_backward(
                upstream, x, own, target, stats, classes, normalize=normalize, ignore_index=IGNORE, **options
            )
        else:
            losses.append(kernels.block_losses(stats, sums, target, *passed, classes)[0])
            part, weight_grad = kernels.block_backward(
                upstream, x, own, target, *passed[:2], stats, stats.new_ones(()), f.row_scale, f.col_scale,
                *passed[2:], classes, 3, True, True,
            )  # fmt: skip
        x_grad += part
        weight_grads.append(weight_grad)
    for other in losses[1:]:
        assert torch.equal(other, losses[0])
    return losses[0], x_grad, torch.cat(weight_grads)


def whole(x: Tensor, weight: Tensor, y: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same of the readable loss over all classes at once."""
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    losses = reference.linear_focal_loss(x, weight, y, reduction="none", ignore_index=IGNORE, **options)
    losses.backward(upstream)
    assert x.grad is not None and weight.grad is not None
    return losses.detach(), x.grad, weight.grad


@pytest.mark.parametrize("plain", (False, True), ids=("kernels", "plain"))
@pytest.mark.parametrize("cuts", ([], [5], [0, 4, 4, 10], [1, 2, 3], [11]))
def test_blocks_of_any_sizes_give_what_all_classes_give_at_once(cuts: list[int], plain: bool) -> None:
    x, weight, y, upstream = operands(17, 11)
    for options in every_option(17, 11):
        margin = MARGINS[options["margin"]](x.norm(dim=1))
        options |= {"margin": margin}
        alpha = options["alpha"]
        if isinstance(alpha, Tensor) and alpha.dim() == 1:  # a block knows the weights of rows, not of all classes
            alpha = alpha[y.clamp(min=0)][:, None]
        blockwise = options | {"alpha": None if alpha is None else torch.as_tensor(alpha, dtype=x.dtype).expand(17, 1)}
        wanted = whole(x, weight, y, upstream, **options)
        found = in_blocks(x, weight, y, upstream, cuts, plain, **blockwise)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cuts", ([250], [100, 400]))
@pytest.mark.parametrize("scale", (16.0, 64.0))
def test_blocks_in_float32_are_close_to_the_float64_truth(cuts: list[int], scale: float) -> None:
    x, weight, y, upstream = operands(40, 500, 64, torch.float32)
    options: dict[str, Any] = {"margin": Arc(0.5), "scale": scale, "gamma": 2.0, "label_smoothing": 0.1}
    options |= {"normalize": True, "alpha": None}
    truth = whole(x.double(), weight.double(), y, upstream.double(), **options)
    for value, true in zip(in_blocks(x, weight, y, upstream, cuts, False, **options), truth, strict=True):
        assert value.dtype == torch.float32
        assert (value.double() - true).norm() < 1e-6 * true.norm()


def test_the_operators_know_their_shapes_without_data() -> None:
    x, weight, y, _ = operands(6, 9)
    y[y == IGNORE] = 3
    torch.library.opcheck(
        torch.ops.facefast.block_statistics.default, (x, weight, y, 0.1, 4.0, IGNORE, 30, True, 4),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    passed = kernel_options(x, 2.0, None, 0.1, IGNORE, None, 4.0, "none")
    stats, sums, row_scale, col_scale = torch.ops.facefast.block_statistics(x, weight, y, 0.1, 4.0, IGNORE, 30, True, 4)
    losses, _ = torch.ops.facefast.block_losses(stats, sums, y, *passed, 30)
    torch.library.opcheck(
        torch.ops.facefast.block_losses.default, (stats, sums, y, *passed, 30),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.facefast.block_backward.default,
        (losses, x, weight, y, None, None, stats, stats.new_ones(()), row_scale, col_scale, *passed[2:], 30, 4, True,
         False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# On several ranks


def joined(rank: int, check: Callable[[int, int], None]) -> int:
    """Runs a check in a process group of gloo."""
    dist.init_process_group("gloo")
    try:
        check(rank, dist.get_world_size())
    finally:
        dist.destroy_process_group()
    return 0


def compare(rank: int, ranks: int, rows: list[int], classes: int, plain: bool, dtype: torch.dtype) -> None:
    """Every option, on ranks with so many rows each, against all rows and classes in one process."""
    total, most = sum(rows), max(rows)
    x, weight, y, upstream = operands(total, classes, dtype=dtype)
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    block = class_block(classes, ranks, rank)
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 2e-6)
    kernels, native.DEVICES = native.DEVICES, frozenset() if plain else native.DEVICES
    for options in every_option(total, classes):
        margin, alpha = MARGINS[options["margin"]](x.norm(dim=1)), options["alpha"]
        mine = MARGINS[options["margin"]](x[own].norm(dim=1))
        by_row = isinstance(alpha, Tensor) and alpha.dim() == 2
        wanted = whole(x, weight, y, upstream, **options | {"margin": margin})
        here, held = x[own].clone().requires_grad_(), weight[block.start : block.stop].clone().requires_grad_()
        found = sharded_focal_loss(
            here, held, y[own], first=block.start, num_classes=classes, rows=most, reduction="none", chunk=3,
            **options | {"margin": mine, "alpha": alpha[own] if by_row else alpha},
        )  # fmt: skip
        found.loss.backward(upstream[own])
        seen = (found.loss.detach(), here.grad, held.grad)
        expected = (wanted[0][own], wanted[1][own], wanted[2][block.start : block.stop])
        torch.testing.assert_close(seen, expected, rtol=rtol, atol=atol)
        normalize = torch.nn.functional.normalize
        logits = normalize(x) @ normalize(weight).T if options["normalize"] else x @ weight.T
        assert torch.equal(found.leads, (logits.argmax(1) == y)[own])
    native.DEVICES = kernels


def options_on_ranks(rank: int, rows: list[int], classes: list[int], plain: bool, name: str) -> int:
    def check(rank: int, ranks: int) -> None:
        for each in classes:
            compare(rank, ranks, rows, each, plain, getattr(torch, name))

    return joined(rank, check)


@pytest.mark.parametrize("rows", ([9], [6, 6], [7, 2], [0, 5], [3, 3, 3, 3], [4, 0, 6, 1]), ids=str)
def test_every_option_on_1_2_and_4_ranks_gives_the_gradients_of_one(rows: list[int]) -> None:
    """Numbers of classes that no number of ranks divides, and fewer of them than ranks."""
    assert run_ranks(options_on_ranks, len(rows), rows, [11, 64, 3, 1], False, "float64") == [0] * len(rows)


@pytest.mark.parametrize("rows", ([9], [7, 2], [4, 0, 6, 1]), ids=str)
def test_plain_pytorch_gives_the_same_where_there_are_no_kernels(rows: list[int]) -> None:
    assert run_ranks(options_on_ranks, len(rows), rows, [11, 3], True, "float64") == [0] * len(rows)


def test_float32_on_ranks_is_float32_in_one_process() -> None:
    assert run_ranks(options_on_ranks, 2, [7, 2], [11, 501], False, "float32") == [0, 0]


def reductions(rank: int) -> int:
    def check(rank: int, ranks: int) -> None:
        x, weight, y, _ = operands(12, 10)
        block, own = class_block(10, ranks, rank), slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        for reduction, average in itertools.product(("mean", "sum"), (False, True)):
            a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = reference.linear_focal_loss(a, b, y, normalize=True, scale=4.0, reduction=reduction)
            loss.backward()
            here, held = x[own].clone().requires_grad_(), weight[block.start : block.stop].clone().requires_grad_()
            found = sharded_focal_loss(
                here, held, y[own], first=block.start, num_classes=10, normalize=True, scale=4.0,
                reduction=reduction, average=average,
            )  # fmt: skip
            found.loss.backward()
            total = found.loss.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, loss.detach())
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(here.grad, a.grad[own])
            torch.testing.assert_close(held.grad, b.grad[block.start : block.stop] / (ranks if average else 1))

    return joined(rank, check)


def test_the_ranks_parts_of_a_mean_add_up_and_average_is_what_ddp_gives() -> None:
    assert run_ranks(reductions, 3) == [0, 0, 0]


def nothing_counts(rank: int) -> int:
    def check(rank: int, ranks: int) -> None:
        x, weight, y, _ = operands(4, 7)
        x[0], block = torch.nan, class_block(7, ranks, rank)  # what does not count may hold anything
        for plain in (False, True):
            kernels, native.DEVICES = native.DEVICES, frozenset() if plain else native.DEVICES
            here, held = x.clone().requires_grad_(), weight[block.start : block.stop].clone().requires_grad_()
            found = sharded_focal_loss(
                here, held, torch.full_like(y, IGNORE), first=block.start, num_classes=7, label_smoothing=0.1
            )
            found.loss.backward()
            assert found.loss == 0 and not found.leads.any()
            assert here.grad is not None and held.grad is not None
            assert not here.grad.any() and not held.grad.any()
            native.DEVICES = kernels

    return joined(rank, check)


def test_where_no_row_of_any_rank_counts_loss_and_gradients_are_0() -> None:
    assert run_ranks(nothing_counts, 2) == [0, 0]


@pytest.mark.parametrize("ranks", (1, 2, 3, 7, 12))
@pytest.mark.parametrize("classes", (1, 7, 10, 1000))
def test_every_class_is_held_by_one_rank_and_none_holds_one_more_than_another_has(classes: int, ranks: int) -> None:
    blocks = [class_block(classes, ranks, rank) for rank in range(ranks)]
    assert [k for block in blocks for k in block] == list(range(classes))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, weight, y, _ = operands(4, 7)
    with pytest.raises(ValueError, match="classes 3 to 10 are not all among 8"):
        sharded_focal_loss(x, weight, y, first=3, num_classes=8)
    with pytest.raises(ValueError, match="rows is 3; it must be at least the 4 rows"):
        sharded_focal_loss(x, weight, y, first=0, num_classes=7, rows=3)
    with pytest.raises(IndexError, match="label 7 of row 1"):
        sharded_focal_loss(x, weight, torch.tensor([0, 7, 1, 2]), first=0, num_classes=7)


def test_it_has_no_second_derivative_and_says_so() -> None:
    x, weight, y, _ = operands(4, 7)
    loss = sharded_focal_loss(x.requires_grad_(), weight.requires_grad_(), y, first=0, num_classes=7).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, (x, weight), create_graph=True)
