"""sigmoid_focal_loss against 60-digit arithmetic, against torch and torchvision, and at the edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from facefast.ops import reference, sigmoid_focal_loss
from tests.support.derive import derive
from tests.support.exact import sigmoid_focal

GAMMAS = (0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0)
REDUCTIONS = ("none", "mean", "sum")
SIZES = (0.0, 1e-6, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 17.0, 25.0, 40.0, 60.0, 80.0)
LOGITS = sorted({sign * size for sign in (-1, 1) for size in SIZES})
SOFT = (0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999)
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
SMALLEST = {torch.float32: 1e-37, torch.float64: 1e-290}  # below it only smallness is asked for
SHAPES = ((), (1,), (7,), (0,), (3, 5), (0, 5), (3, 0), (2, 3, 4), (2, 0, 4), (1025,), (3, 1, 50))


def run(x: Tensor, target: Tensor, *, upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    """Loss (without alpha and reduction unless they are given) and its gradient for `upstream` or ones."""
    options = {"alpha": None, "reduction": "none", **options}
    return derive(partial(sigmoid_focal_loss, target=target, **options), x, upstream=upstream)


def subtracted(x: float, target: float, gamma: float) -> mp.mpf:
    """The gradient with every difference in it made a sum: what its error is relative to where it crosses zero."""
    x, t, gamma = mp.mpf(x), mp.mpf(target), mp.mpf(gamma)
    p, q = 1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(x))
    ce = t * mp.log1p(mp.exp(-x)) + (1 - t) * mp.log1p(mp.exp(x))
    u = p * (1 - t) + q * t
    return u**gamma * (gamma * abs(1 - 2 * t) * p * q / u * ce + (1 - t) * p + t * q)


def compare(x: Tensor, target: Tensor, gamma: float, alpha: float | None = None) -> None:
    """Holds the loss and gradient of every element against the truth."""
    loss, grad = run(x, target, gamma=gamma, alpha=alpha)
    limit, smallest = LIMITS[x.dtype], SMALLEST[x.dtype]
    for each, t, a, b in zip(x.tolist(), target.to(x.dtype).tolist(), loss.tolist(), grad.tolist(), strict=True):
        true_loss, true_grad = sigmoid_focal(each, t, gamma)
        base = abs(true_grad) if t in (0, 1) else subtracted(each, t, gamma)
        weight = 1 if alpha is None else mp.mpf(alpha) * t + (1 - mp.mpf(alpha)) * (1 - mp.mpf(t))
        for value, truth, size in ((a, true_loss, true_loss), (b, true_grad, base)):
            error = abs(value - weight * truth)
            assert error <= limit * weight * size + smallest, (each, t, gamma, alpha, value, float(weight * truth))


# ---------------------------------------------------------------------------------------------
# Against the truth


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_loss_and_gradient_of_hard_targets_are_exact_from_minus_80_to_80(gamma: float, dtype: torch.dtype) -> None:
    x = torch.tensor(LOGITS, dtype=dtype)
    for target in (torch.zeros_like(x), torch.ones_like(x)):
        compare(x, target, gamma)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", SOFT)
def test_loss_and_gradient_of_soft_targets_are_exact_from_minus_80_to_80(
    target: float, gamma: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([*LOGITS, math.log(target / (1 - target))], dtype=dtype)  # p = target, too
    compare(x, torch.full_like(x, target), gamma)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("alpha", (0.0, 0.25, 0.58, 1.0))
def test_alpha_weighs_target_1_and_the_rest_of_it_target_0(alpha: float, dtype: torch.dtype) -> None:
    x, target = (t.flatten() for t in torch.meshgrid(torch.tensor(LOGITS), torch.tensor([0, 0.25, 1]), indexing="ij"))
    compare(x.to(dtype), target.to(dtype), 2.0, alpha)
    loss, grad = run(x.to(dtype), target.to(dtype), alpha=alpha)
    weightless = target == 1 - alpha
    assert (loss[weightless] == 0).all() and (grad[weightless] == 0).all()
    assert weightless.any() == (alpha in (0, 1))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_drawn_cases_are_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        x = 12 * torch.randn(60, dtype=dtype, generator=generator)
        target = torch.rand(60, dtype=dtype, generator=generator)
        target[::3] = target[::3].round()  # hard targets take their own way among soft ones
        compare(x, target, 6 * torch.rand((), generator=generator).item())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("alpha", (None, 0.25))
def test_half_precision_is_the_float32_result_rounded_once(
    alpha: float | None, gamma: float, dtype: torch.dtype
) -> None:
    x = torch.cat([torch.tensor(LOGITS), 4 * torch.randn(1000)]).to(dtype)
    for target in ((x + torch.randn_like(x) > 0).float(), torch.rand(len(x))):
        loss, grad = run(x, target, gamma=gamma, alpha=alpha)
        wide_loss, wide_grad = run(x.float(), target, gamma=gamma, alpha=alpha)
        assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
        torch.testing.assert_close(loss, wide_loss, rtol=1e-6, atol=1e-37)
        half_ulp = torch.finfo(dtype).eps / 2
        half_step = half_ulp * torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(grad.float(), wide_grad, rtol=half_ulp + 1e-6, atol=max(half_step, 1e-37))


# ---------------------------------------------------------------------------------------------
# Against others


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("hard", (False, True))
def test_gamma_zero_is_torchs_binary_cross_entropy(hard: bool, reduction: str) -> None:
    x, target = 5 * torch.randn(9, 40, dtype=torch.float64), torch.rand(9, 40, dtype=torch.float64)
    target = target.round() if hard else target
    upstream = torch.randn((9, 40) if reduction == "none" else (), dtype=torch.float64)
    ours = run(x, target, gamma=0.0, reduction=reduction, upstream=upstream)
    function = partial(F.binary_cross_entropy_with_logits, target=target, reduction=reduction)
    theirs = derive(function, x, upstream=upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)  # theirs is sigmoid(x) - target


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", (-1.0, 0.0, 0.25, 0.58, 1.0))
@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0))
def test_torchvision_computes_the_same(gamma: float, alpha: float, reduction: str) -> None:
    """Its 1 - p_t cancels, so that a wide range is for the truth above."""
    x, target = 2 * torch.randn(6, 9, dtype=torch.float64), torch.rand(6, 9, dtype=torch.float64)
    target[::2] = target[::2].round()
    theirs = derive(partial(torchvision_loss, targets=target, alpha=alpha, gamma=gamma, reduction=reduction), x)
    ours = run(x, target, gamma=gamma, alpha=None if alpha < 0 else alpha, reduction=reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", ((), (11,), (9, 7), (147, 7), (41, 100), (2, 3, 5)))
def test_the_kernels_agree_with_the_readable_version_under_every_option(shape: tuple[int, ...]) -> None:
    """(147, 7) and (41, 100) are more than one block, and columns go on from one to the next."""
    wide: dict[str, Any] = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(2)}
    x, soft = 5 * torch.randn(shape, **wide), torch.rand(shape, **wide)
    soft = torch.where(torch.rand(shape, **wide) < 0.2, torch.nan, soft)
    alphas = [None, 0.3, *([torch.rand(shape[-1], **wide)] if shape else [])]
    masks = (None, torch.rand(shape, **wide) < 0.6)
    for target, gamma, alpha, mask, reduction in itertools.product(
        (soft, soft.round()), (0.0, 0.5, 2.0), alphas, masks, REDUCTIONS
    ):
        upstream = torch.randn(shape if reduction == "none" else (), **wide)
        options: dict[str, Any] = {"target": target, "gamma": gamma, "alpha": alpha, "mask": mask}
        results = [
            derive(partial(function, **options, reduction=reduction), x, upstream=upstream)
            for function in (sigmoid_focal_loss, reference.sigmoid_focal_loss)
        ]
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-13)


def test_one_alpha_for_all_columns_is_the_number() -> None:
    x, target = torch.randn(300, 7), torch.rand(300, 7)
    by_column = run(x, target, alpha=torch.full((7,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(by_column, run(x, target, alpha=0.25), rtol=1e-6, atol=0)
    assert not torch.allclose(run(x, target, alpha=torch.linspace(0, 1, 7))[0], by_column[0])


# ---------------------------------------------------------------------------------------------
# What counts


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_and_unknown_elements_may_hold_anything_and_count_for_nothing(reduction: str) -> None:
    x, target = torch.randn(40, 5), torch.rand(40, 5).round()
    mask = torch.ones(40, 5, dtype=torch.bool)
    hidden, unknown = (torch.rand(40, 5) < 0.2), (torch.rand(40, 5) < 0.2)
    counts = ~(hidden | unknown)
    wanted = derive(lambda leaf: sigmoid_focal_loss(leaf[counts], target[counts], reduction=reduction), x)
    rubbish = torch.tensor([math.nan, math.inf, -math.inf, 3e38]).repeat(50).view(40, 5)
    x = torch.where(counts, x, rubbish)
    mask[hidden] = False
    target = torch.where(hidden, rubbish, torch.where(unknown, torch.nan, target))
    loss, grad = derive(lambda leaf: sigmoid_focal_loss(leaf, target, mask=mask, reduction=reduction), x)
    assert (grad[~counts] == 0).all() and (grad[counts] != 0).all()
    if reduction == "none":
        assert (loss[~counts] == 0).all()
        loss = loss[counts]
    torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, wanted[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", ("mask", "target"))
def test_when_nothing_counts_the_loss_is_zero_with_zero_gradient(how: str, reduction: str) -> None:
    x, target = torch.randn(4, 5), torch.ones(4, 5)
    options: dict[str, Any] = {"mask": torch.zeros(4, 5, dtype=torch.bool)} if how == "mask" else {}
    target = target if how == "mask" else target * math.nan
    loss, grad = run(x, target, reduction=reduction, **options)
    assert loss.shape == ((4, 5) if reduction == "none" else ())
    assert (loss == 0).all() and (grad == 0).all()


def test_the_mean_is_over_the_elements_that_count() -> None:
    x, target = torch.randn(6, 7), torch.rand(6, 7)
    target[1, 2:] = math.nan
    mask = torch.arange(6)[:, None].expand(6, 7) != 4
    total, total_grad = run(x, target, mask=mask, reduction="sum")
    mean, mean_grad = run(x, target, mask=mask, reduction="mean")
    torch.testing.assert_close(mean, total / 30)
    torch.testing.assert_close(mean_grad, total_grad / 30)


@pytest.mark.parametrize("dtype", (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16), ids=str)
def test_targets_of_any_real_type_are_0_and_1(dtype: torch.dtype) -> None:
    x, target = torch.randn(30, 3), torch.rand(30, 3).round()
    for alpha in (None, 0.25):
        results = [run(x, t, alpha=alpha) for t in (target, target.to(dtype))]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------------------------------------
# Shapes, strides, upstream gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_gives_what_its_elements_give_one_by_one(shape: tuple[int, ...], reduction: str) -> None:
    x, target = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    loss, grad = run(x, target, reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    assert grad.shape == shape
    singles = [run(a, b) for a, b in zip(x.flatten(), target.flatten(), strict=True)]
    share = max(1, x.numel()) if reduction == "mean" else 1
    losses, grads = ([float(pair[i]) for pair in singles] for i in (0, 1))
    wanted = losses if reduction == "none" else [math.fsum(losses) / share]
    assert loss.flatten().tolist() == pytest.approx(wanted, rel=1e-12, abs=0)
    assert grad.flatten().tolist() == pytest.approx([g / share for g in grads], rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", ((0,), (0, 5), (3, 0)), ids=str)
def test_weights_by_column_of_nothing_give_zero(shape: tuple[int, ...]) -> None:
    loss, grad = run(torch.zeros(shape), torch.zeros(shape), alpha=torch.rand(shape[-1]), reduction="mean")
    assert loss == 0
    assert grad.shape == shape


# Each gives what it is given, with other strides.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "wide": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "turned": lambda t: t.t().contiguous().t(),
    "sparse": lambda t: t.repeat_interleave(2, -1)[:, ::2],
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("masked", (False, True), ids=("", "masked"))
@pytest.mark.parametrize("name", STRIDES)
def test_strides_change_no_bit(name: str, masked: bool, dtype: torch.dtype) -> None:
    view, plain, target, alphas = STRIDES[name], torch.randn(90, 37).to(dtype), torch.rand(90, 37), torch.rand(37)
    mask = torch.rand(90, 37) < 0.8 if masked else None
    wanted = run(plain, target, alpha=alphas, mask=mask)
    leaf = view(plain).detach().requires_grad_()
    assert not leaf.is_contiguous()
    column = view(alphas[None].repeat(2, 1))[0]
    mask = None if mask is None else view(mask)
    loss = sigmoid_focal_loss(leaf, view(target), alpha=column, mask=mask, reduction="none")
    loss.sum().backward()
    assert torch.equal(loss.detach(), wanted[0])
    assert leaf.grad is not None and torch.equal(leaf.grad, wanted[1])


@pytest.mark.parametrize("name", ("logits", "target", "mask"))
def test_one_argument_alone_may_have_other_strides(name: str) -> None:
    tensors: dict[str, Any] = {"logits": torch.randn(9, 6), "target": torch.rand(9, 6), "mask": torch.rand(9, 6) < 0.8}
    wanted = sigmoid_focal_loss(**tensors, reduction="none")
    assert torch.equal(
        sigmoid_focal_loss(**tensors | {name: STRIDES["turned"](tensors[name])}, reduction="none"), wanted
    )


def test_channels_last_pictures_are_pictures() -> None:
    """Segmentation: logits, target and mask as a convolution leaves them."""
    tensors = [torch.randn(2, 3, 8, 5), torch.rand(2, 3, 8, 5), torch.rand(2, 3, 8, 5) < 0.8]
    moved = [t.to(memory_format=torch.channels_last) for t in tensors]
    results = [run(x, target, mask=mask) for x, target, mask in (tensors, moved)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_expanded_row_gathers_the_gradient_of_all_rows() -> None:
    row, target = torch.randn(1, 6, dtype=torch.float64), torch.rand(8, 1, dtype=torch.float64)
    ours = derive(lambda leaf: sigmoid_focal_loss(leaf.expand(8, 6), target.expand(8, 6), reduction="sum"), row)
    loss, grad = run(row.repeat(8, 1), target.repeat(1, 6), alpha=0.25)
    torch.testing.assert_close(ours, (loss.sum(), grad.sum(0, keepdim=True)), rtol=1e-12, atol=0)


UPSTREAM: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(6, 7),
    "turned": lambda: torch.randn(7, 6).t(),
    "by row": lambda: torch.randn(6, 1).expand(6, 7),
    "by column": lambda: torch.randn(1, 7).expand(6, 7),
    "one number": lambda: torch.randn(()).expand(6, 7),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_every_element_takes_its_own_upstream_gradient(name: str) -> None:
    upstream = UPSTREAM[name]()
    x, target = torch.randn(6, 7), torch.rand(6, 7)
    _, plain = run(x, target)
    torch.testing.assert_close(run(x, target, upstream=upstream)[1], plain * upstream, rtol=1e-6, atol=0)
    _, grad = run(x[:, 0], target[:, 0], upstream=upstream[:, 0])  # one dimension, with a stride
    torch.testing.assert_close(grad, plain[:, 0] * upstream[:, 0], rtol=1e-6, atol=0)


def test_two_losses_on_one_matrix_and_two_backward_passes_add_up() -> None:
    x, target = torch.randn(8, 11, requires_grad=True), torch.rand(8, 11)
    before = x.detach().clone(), target.clone()
    first, second = sigmoid_focal_loss(x, target), sigmoid_focal_loss(x, target.round(), gamma=0.5, reduction="sum")
    (first + second).backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    (first + second).backward()
    torch.testing.assert_close(x.grad, 2 * once)
    wanted = run(x, target, alpha=0.25, reduction="mean")[1] + run(x, target.round(), gamma=0.5, alpha=0.25)[1]
    torch.testing.assert_close(once, wanted)
    assert torch.equal(x.detach(), before[0]) and torch.equal(target, before[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("hard", (False, True))
def test_results_repeat_bit_for_bit_at_any_number_of_threads(hard: bool, reduction: str) -> None:
    """300 007 elements are 293 blocks, of which a thread takes at least 8."""
    x, target = torch.randn(300_007), torch.rand(300_007)
    target = target.round() if hard else target
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(x, target, reduction=reduction))
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---------------------------------------------------------------------------------------------
# Infinite and not a number

INFINITE = torch.tensor([math.inf, math.inf, -math.inf, -math.inf])
CERTAIN = torch.tensor([1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_an_infinite_logit_is_certain(gamma: float, dtype: torch.dtype) -> None:
    """No loss when it is right; an infinite one, whose slope is 1, when it is wrong."""
    loss, grad = run(INFINITE.to(dtype), CERTAIN, gamma=gamma)
    assert loss.tolist() == [0, math.inf, math.inf, 0]
    assert grad.tolist() == [0, 1, -1, 0]


@pytest.mark.parametrize("target", (0.0, 0.3, 0.5, 1.0))
def test_infinite_logits_have_the_derivative_that_torch_gives(target: float) -> None:
    """torch's loss is NaN where it multiplies 0 by infinity; elsewhere it is ours, and its gradient always."""
    x = INFINITE[1:3]
    ours, ours_grad = run(x, torch.full_like(x, target), gamma=0.0)
    theirs, theirs_grad = derive(
        partial(F.binary_cross_entropy_with_logits, target=torch.full_like(x, target), reduction="none"), x
    )
    known = ~theirs.isnan()
    assert ours.isnan().sum() == 0
    assert torch.equal(ours[known], theirs[known])
    torch.testing.assert_close(ours_grad, theirs_grad)


@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
@pytest.mark.parametrize("target", (0.0, 0.3, 1.0))
def test_a_logit_that_is_not_a_number_is_seen_and_spoils_no_other(target: float, gamma: float) -> None:
    x = torch.randn(20)
    plain = run(x, torch.full_like(x, target), gamma=gamma)
    x[7] = math.nan
    for value, wanted in zip(run(x, torch.full_like(x, target), gamma=gamma), plain, strict=True):
        assert value[7].isnan()
        kept = torch.arange(20) != 7
        assert torch.equal(value[kept], wanted[kept])
