"""focal_loss against 60-digit arithmetic, against torch's cross entropy, and at the edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facefast.ops import AdaFace, Arc, Combined, Cos, focal_loss, reference
from facefast.ops.margins import Margin
from tests.support.exact import Softmax, softmax_focal

GAMMAS = (0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0)
GAPS = (-80.0, -25.0, -12.0, -5.0, -1.0, 0.0, 1.0, 5.0, 12.0, 17.0, 25.0, 40.0, 80.0)
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
SMALLEST = {torch.float32: 1e-35, torch.float64: 1e-290}  # near underflow digits are lost, by definition
MARGINS: dict[str, tuple[Margin, dict[str, Any]]] = {
    "cos": (Cos(0.35), {"m3": 0.35}),
    "arc": (Arc(0.5), {"m2": 0.5}),
    "arc detached": (Arc(0.5, gradient="detached"), {"m2": 0.5, "detached": True}),
    "combined": (Combined(1.2, 0.3, 0.1), {"m1": 1.2, "m2": 0.3, "m3": 0.1}),
}


def run(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss without reduction and its gradient for an upstream gradient of ones."""
    x = x.detach().clone().requires_grad_()
    loss = focal_loss(x, y, reduction="none", **options)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def compare(x: Tensor, y: Tensor, exact: Softmax, **options: Any) -> None:
    """Holds every row's loss and gradient against the truth."""
    loss, grad = run(x, y, gamma=exact.gamma, label_smoothing=exact.smoothing, scale=exact.scale, **options)
    limit, smallest = LIMITS[x.dtype], SMALLEST[x.dtype]
    for row in range(len(x)):
        true_loss, true_grad = softmax_focal(x[row].tolist(), int(y[row]), exact)
        # With smoothing the gradient is a difference that may cancel: its error is relative to what was subtracted.
        floor = exact.scale * exact.smoothing / x.shape[1]
        pairs = zip(grad[row].tolist(), true_grad, strict=True)
        for value, truth, base in [(loss[row].item(), true_loss, 0.0), *((g, t, floor) for g, t in pairs)]:
            size = max(abs(truth), base)
            if size > smallest:
                assert abs(value - truth) <= limit * size, (row, exact, value, float(truth))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_loss_and_gradient_are_exact_at_every_gap(gamma: float, dtype: torch.dtype) -> None:
    x = torch.randn(len(GAPS), 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y = torch.arange(len(GAPS)) % 7
    for row, gap in enumerate(GAPS):
        others = torch.cat([x[row, : y[row]], x[row, y[row] + 1 :]])
        x[row, y[row]] = others.max() + gap
    compare(x, y, Softmax(gamma=gamma))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_margins_are_exact_over_the_whole_range_of_cosines(name: str, gamma: float, dtype: torch.dtype) -> None:
    margin, terms = MARGINS[name]
    own = torch.tensor([-0.999, -0.9, -0.5, 0.0, 0.3, 0.7, 0.95, 0.999], dtype=dtype)
    x = torch.rand(len(own), 5, dtype=dtype, generator=torch.Generator().manual_seed(2)) - 0.5
    y = torch.arange(len(own)) % 5
    x[torch.arange(len(own)), y] = own
    for scale in (1.0, 8.0):
        compare(x, y, Softmax(gamma=gamma, scale=scale, **terms), margin=margin)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("smoothing", (0.1, 0.5))
def test_label_smoothing_is_exact(smoothing: float, dtype: torch.dtype) -> None:
    x = 4 * torch.randn(12, 9, dtype=dtype, generator=torch.Generator().manual_seed(3))
    y = torch.arange(12) % 9
    for gamma in (0.0, 0.5, 2.0):
        compare(x, y, Softmax(gamma=gamma, smoothing=smoothing))


def test_drawn_cases_are_exact() -> None:
    draw = np.random.default_rng(0)
    for case in range(120):
        rows, classes = int(draw.integers(1, 4)), int(draw.integers(1, 30))
        dtype = (torch.float32, torch.float64)[case % 2]
        x = torch.from_numpy(draw.normal(0, draw.uniform(0.1, 30), (rows, classes))).to(dtype)
        y = torch.from_numpy(draw.integers(0, classes, rows))
        exact = Softmax(gamma=float(draw.choice([*GAMMAS, draw.uniform(0, 6)])), scale=float(draw.uniform(0.2, 2)))
        compare(x, y, exact)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("classes", (1, 2, 40, 1001))
def test_half_precision_is_the_float32_result_rounded_once(classes: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(33, classes, generator=torch.Generator().manual_seed(4))).to(dtype)
    y = torch.arange(33) % classes
    for options in ({}, {"gamma": 0.5, "label_smoothing": 0.1}, {"gamma": 0.0}):
        loss, grad = run(x, y, **options)
        wide_loss, wide_grad = run(x.float(), y, **options)
        assert loss.dtype == torch.float32
        assert grad.dtype == dtype
        torch.testing.assert_close(loss, wide_loss, rtol=1e-5, atol=1e-30)
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        torch.testing.assert_close(grad.float(), wide_grad, rtol=eps, atol=tiny)


@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("classes", (2, 3, 40, 1000, 10177))
def test_gamma_zero_is_torchs_cross_entropy(classes: int, reduction: str, smoothing: float) -> None:
    x = 3 * torch.randn(16, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    y = torch.arange(16) * 7 % classes
    y[3] = -100
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = focal_loss(ours, y, gamma=0.0, label_smoothing=smoothing, reduction=reduction)
    b = F.cross_entropy(theirs, y, label_smoothing=smoothing, reduction=reduction)
    upstream = torch.randn(a.shape, dtype=torch.float64)
    a.backward(upstream)
    b.backward(upstream)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("classes", (1, 2, 7, 16, 33, 1000))
def test_the_kernels_agree_with_the_readable_version_under_every_option(classes: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(21, classes, dtype=torch.float64, generator=generator) * 1.8 - 0.9
    y = torch.arange(21) % classes
    y[5] = 255
    alphas = (None, 0.3, torch.rand(classes, generator=generator), torch.rand(21, 1, generator=generator))
    ada = AdaFace()(torch.linspace(1, 90, 21))
    margins = (None, Cos(0.2), Arc(0.4), Arc(0.4, gradient="detached"), Combined(1.1, 0.2, 0.1), ada)
    for alpha, margin, smoothing, reduction in itertools.product(alphas, margins, (0.0, 0.1), ("none", "mean", "sum")):
        results = []
        for function in (focal_loss, reference.focal_loss):
            leaf = x.clone().requires_grad_()
            loss = function(
                leaf,
                y,
                gamma=1.5,
                alpha=alpha,
                label_smoothing=smoothing,
                ignore_index=255,
                margin=margin,
                scale=4.0,
                reduction=reduction,
            )
            loss.backward(torch.ones_like(loss) * 0.7)
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-13)


def test_infinite_logits_give_what_torch_gives() -> None:
    inf = math.inf
    x = torch.tensor(
        [[-inf, 1.0, 2.0], [3.0, -inf, -inf], [1.0, -inf, 2.0], [-inf, -inf, -inf], [1.0, inf, 0.0], [inf, 0.0, 1.0]]
    )
    y = torch.tensor([0, 0, 0, 1, 0, 0])
    ours, theirs = focal_loss(x, y, gamma=0.0, reduction="none"), F.cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(ours[:4], theirs[:4], equal_nan=True)
    assert theirs[4:].isnan().all() or theirs[4:].isinf().any()
    assert not ours[4:].isfinite().all(), "an infinite logit must be seen"
    _, grad = run(x[1:3], y[1:3])
    assert grad.isfinite().all()
    assert grad[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("rows", (0, 5))
def test_empty_and_all_ignored_batches_give_zero_with_zero_gradient(rows: int, reduction: str) -> None:
    x = torch.randn(rows, 4, requires_grad=True)
    loss = focal_loss(x, torch.full((rows,), -100), reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    loss.sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_an_ignored_row_may_hold_anything() -> None:
    x = torch.randn(3, 4)
    x[1] = torch.tensor([math.nan, math.inf, 0, -math.inf])
    loss, grad = run(x, torch.tensor([0, -100, 2]))
    assert loss[1] == 0
    assert grad[1].tolist() == [0, 0, 0, 0]
    assert loss.isfinite().all()
    assert focal_loss(x, torch.tensor([0, -100, 2])).isfinite()


def test_an_ignore_index_among_the_classes_is_still_ignored() -> None:
    x = torch.randn(4, 3)
    loss, grad = run(x, torch.tensor([0, 1, 2, 1]), ignore_index=1)
    assert (loss[[1, 3]] == 0).all() and (grad[[1, 3]] == 0).all()
    assert (loss[[0, 2]] > 0).all()


def test_one_class_has_no_loss_and_no_gradient() -> None:
    for gamma in GAMMAS:
        loss, grad = run(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64), gamma=gamma)
        assert (loss == 0).all()
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("classes", (3, 37, 1001))
def test_strides_and_alignment_change_no_bit(classes: int, dtype: torch.dtype) -> None:
    plain = torch.randn(9, classes).to(dtype)
    y = torch.arange(9) % classes
    wanted = run(plain, y)
    wide = torch.zeros(9, classes + 5, dtype=dtype)
    wide[:, 3 : 3 + classes] = plain
    turned = plain.t().contiguous().t()
    for view in (wide[:, 3 : 3 + classes], turned):
        leaf = view.detach().requires_grad_()
        loss = focal_loss(leaf, y, reduction="none")
        loss.sum().backward()
        assert torch.equal(loss.detach(), wanted[0])
        assert leaf.grad is not None and torch.equal(leaf.grad, wanted[1])
    expanded = plain[:1].expand(9, classes).detach().requires_grad_()
    assert focal_loss(expanded, y, reduction="none").shape == (9,)


def test_int32_labels_are_labels() -> None:
    x, y = torch.randn(6, 5), torch.tensor([0, 4, 2, -100, 1, 3])
    assert all(torch.equal(a, b) for a, b in zip(run(x, y), run(x, y.int()), strict=True))


def test_two_losses_on_one_matrix_and_two_backward_passes_add_up() -> None:
    x, y = torch.randn(8, 11, requires_grad=True), torch.arange(8)
    before = x.detach().clone()
    first, second = focal_loss(x, y), focal_loss(x, y, gamma=0.5, reduction="sum")
    (first + second).backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    (first + second).backward()
    torch.testing.assert_close(x.grad, 2 * once)
    assert torch.equal(x.detach(), before), "the logits must stay as they were"


def test_a_random_upstream_gradient_scales_every_row_by_its_own_number() -> None:
    x, y = torch.randn(7, 13), torch.arange(7)
    _, plain = run(x, y)
    leaf, upstream = x.clone().requires_grad_(), torch.randn(7)
    focal_loss(leaf, y, reduction="none").backward(upstream)
    torch.testing.assert_close(leaf.grad, plain * upstream[:, None])


@pytest.mark.parametrize("classes", (2, 40, 1000, 70001))
def test_results_repeat_bit_for_bit_at_any_number_of_threads(classes: int) -> None:
    x, y = torch.randn(64, classes), torch.arange(64) % classes
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        loss = focal_loss(leaf, y, label_smoothing=0.1)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    torch.set_num_threads(1)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_more_than_two_to_the_31_numbers() -> None:
    rows, classes = 2200, 1_000_000
    x = torch.zeros(rows, classes, dtype=torch.bfloat16)
    y = torch.arange(rows) + classes - rows
    x[-1, -1] = 10.0
    x.requires_grad_()
    loss = focal_loss(x, y, gamma=0.0, reduction="none")
    even = math.log(classes)
    torch.testing.assert_close(loss[[0, 1100, -2]].detach(), torch.full((3,), even), rtol=1e-6, atol=0)
    assert loss[-1].item() == pytest.approx(math.log(classes - 1 + math.exp(10)) - 10, rel=1e-6)
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad[-1, -1].item() == pytest.approx(math.exp(10) / (classes - 1 + math.exp(10)) - 1, rel=4e-3)
    assert x.grad[-2, -2].item() == pytest.approx(-1, rel=4e-3)
    assert x.grad[-2, -1].item() == pytest.approx(1e-6, rel=4e-3)


def test_adaface_on_another_device_than_the_norms_says_how_to_move_it() -> None:
    margin = AdaFace()
    with pytest.raises(ValueError, match=r"norms are on meta and .* statistics on cpu; .*margin.to\('meta'\)"):
        margin(torch.ones(3, device="meta"))
    assert margin(torch.ones(3)).m1 == 1.0
