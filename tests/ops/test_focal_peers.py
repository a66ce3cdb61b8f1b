"""What the test suites of public focal losses ask, asked anew of these; each section names a peer and its file.

The suites of fused cross entropies are in test_cross_entropy_peers.py.
A peer's case that is missing below is held elsewhere, or asks for something that is not offered:

    apex xentropy   perf                          benchmarks/bench_focal.py
    torchvision     reduction_mode                test_a_wrong_argument_is_named_with_what_is_allowed
                    jit (fvcore too)              no scripting; test_one_graph_serves_every_batch_size
    fvcore          the FL* mirror of each        no FL*, only FL
    mmcv            grad_softmax, grad_sigmoid    test_numerical_derivatives_of_the_{softmax,sigmoid}_loss
                    p = 1 with gamma < 1: NaN     test_loss_and_gradient_are_exact_at_every_gap (kornia #918 too)
                    label C passes its check      test_a_label_that_is_no_class_is_an_index_error
                    (N,) upstream over columns    test_a_random_upstream_gradient_scales_every_row_by_its_own_number
    kornia          gradcheck (+ ignored)         test_numerical_derivatives_of_the_{softmax,sigmoid}_loss
                    dynamo                        test_one_graph_serves_every_batch_size
                    spatial logits, modules       [N, C] only, functions only
    Liger           not_last_layer                test_upstream_gradients_of_every_layout_count
                    out_of_bounds_target          test_a_label_that_is_no_class_is_an_index_error
                    forward_only                  test_without_grad_nothing_is_kept
                    logits overwritten (#272)     test_two_losses_on_one_matrix_and_two_backward_passes_add_up
                    weight with smoothing         alpha weighs the row, not each class; test_the_kernels_agree_with_...
                    softcap, z-loss, bias, predicted tokens, token accuracy, structured output: not offered
                    megatron                      not vocab-parallel
    quack           empty forward and backward    test_empty_and_all_ignored_batches_give_zero_with_zero_gradient
                    stride-0 dloss                test_upstream_gradients_of_every_layout_count
                    compile, linear compile       test_one_graph_serves_every_batch_size
                    linear no_grad                test_without_grad_nothing_is_kept; gradients are the other operator's
                    lse_partial, lse returned, gradient in the forward pass or in place, (B, L, d): not offered
    flash-attn      z-loss, precomputed lse, in-place gradient, process_group: not offered
    CCE             test_cce_lse                  no lse returned; it is in every loss of the forward test below
                    softcap, bias, shift, z-loss, vocab parallel: not offered; shift is a slice of the caller's
    extension-cpp   opcheck, gradients            test_the_operators_pass_torchs_own_check, ..._backward_operators_...
                    myadd_out                     test_no_operator_writes_to_its_arguments
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from facefast.ops import focal_loss, sigmoid_focal_loss
from tests.support.derive import derive
from tests.support.peers import EVERY_DTYPE, EVERY_REDUCTION, HALVES, close, drawn, labels, textbook

# ---------------------------------------------------------------------------------------------
# NVIDIA/apex: apex/contrib/test/focal_loss/test_focal_loss.py


def test_a_batch_and_its_rows_one_by_one_give_torchvisions_sum() -> None:
    x, target = drawn(12, 8, seed=42), F.one_hot(labels(12, 8, seed=42), 8).float()
    options: dict[str, Any] = {"alpha": 0.24, "gamma": 2.0, "reduction": "sum"}

    def row_by_row(leaf: Tensor) -> Tensor:
        return sum(
            (sigmoid_focal_loss(leaf[i : i + 1], target[i : i + 1], **options) for i in range(12)), torch.zeros(())
        )

    theirs = derive(lambda leaf: torchvision_loss(leaf, target, **options), x)
    for ours in (lambda leaf: sigmoid_focal_loss(leaf, target, **options), row_by_row):
        torch.testing.assert_close(derive(ours, x), theirs, rtol=1.3e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# NVIDIA/apex: apex/contrib/test/xentropy/test_label_smoothing.py


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_smoothing_at_half_precision_with_a_sixth_of_the_rows_padding(dtype: torch.dtype) -> None:
    x, y = drawn(24, 32320, seed=1234, dtype=dtype), labels(24, 32320, seed=1234)
    y[::6] = 0
    options: dict[str, Any] = {"label_smoothing": 0.1, "ignore_index": 0, "reduction": "sum"}
    loss, grad = derive(lambda leaf: focal_loss(leaf, y, gamma=0.0, **options), x)
    true_loss, true_grad = derive(lambda leaf: F.cross_entropy(leaf, y, **options), x.double())
    close(loss, true_loss, rtol=1.3e-6, atol=0)
    close(grad, true_grad, rtol=1e-3, atol=0)


def test_class_0_counts_unless_it_is_said_to_be_padding() -> None:
    """apex's padding_idx is 0 by default."""
    x, y = drawn(5, 7), torch.zeros(5, dtype=torch.int64)
    assert (focal_loss(x, y, reduction="none") > 0).all()
    assert focal_loss(x, y, ignore_index=0, reduction="sum") == 0


# ---------------------------------------------------------------------------------------------
# pytorch/vision: test/test_ops.py, class TestFocalLoss


def mixes(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[45, 2] logits of small, big and any probabilities, each against targets of 0, of 1 and drawn ones."""
    generator = torch.Generator().manual_seed(seed)
    p, targets = [], []
    for low, high in ((0.01, 0.2), (0.8, 0.99), (0.01, 0.99)):
        for target in (torch.zeros(5, 2), torch.ones(5, 2), torch.rand(5, 2, generator=generator).round()):
            p.append(low + (high - low) * torch.rand(5, 2, generator=generator))
            targets.append(target)
    return torch.cat(p).logit().to(dtype), torch.cat(targets)


@pytest.mark.parametrize("seed", (0, 1))
@EVERY_DTYPE
@pytest.mark.parametrize("gamma", (0.0, 2.0))
@pytest.mark.parametrize("alpha", (None, 0.0, 0.58, 1.0))
def test_the_ratio_to_cross_entropy_is_the_modulating_factor(
    alpha: float | None, gamma: float, dtype: torch.dtype, seed: int
) -> None:
    """correct_ratio, with the tolerance of float32 for every type, since every loss is float32."""
    x, target = mixes(seed, dtype)
    loss = sigmoid_focal_loss(x, target, gamma=gamma, alpha=alpha, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(x.double(), target.double(), reduction="none")
    assert (loss <= entropy * (1 + 1e-6)).all()
    p = x.double().sigmoid()
    factor = (p * (1 - target) + (1 - p) * target) ** gamma
    if alpha is not None:
        factor = factor * (alpha * target + (1 - alpha) * (1 - target))
    torch.testing.assert_close(loss / entropy, factor, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", (2, 3))
@EVERY_DTYPE
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_without_focus_and_weight_it_is_binary_cross_entropy(reduction: str, dtype: torch.dtype, seed: int) -> None:
    """equal_ce_loss: the gradients too."""
    x, target = mixes(seed, dtype)
    ours = derive(lambda leaf: sigmoid_focal_loss(leaf, target, gamma=0.0, alpha=None, reduction=reduction), x)
    entropy = partial(F.binary_cross_entropy_with_logits, target=target.double(), reduction=reduction)
    for found, truth in zip(ours, derive(entropy, x.double()), strict=True):
        close(found, truth, rtol=1.3e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# facebookresearch/fvcore: tests/test_focal_loss.py

FVCORE: dict[str, tuple[list[Any], list[Any]]] = {
    "easy positives": ([[[0.95], [0.90], [0.98], [0.99]]], [[[1], [1], [1], [1]]]),
    "two of each": ([[[0.05], [0.12], [0.89], [0.79]]], [[[1], [1], [0], [0]]]),
    "two columns": ([[0.05, 0.9], [0.52, 0.45], [0.89, 0.8], [0.39, 0.5]], [[1, 0], [1, 0], [1, 1], [0, 1]]),
    "four classes": (
        [[[0.95, 0.55, 0.12, 0.05], [0.09, 0.95, 0.36, 0.11], [0.06, 0.12, 0.56, 0.07], [0.09, 0.15, 0.25, 0.45]]],
        torch.eye(4)[None].tolist(),
    ),
}


def fvcore(name: str) -> tuple[Tensor, Tensor]:
    p, target = (torch.tensor(values, dtype=torch.float32) for values in FVCORE[name])
    return p.logit(), target


@EVERY_REDUCTION
@pytest.mark.parametrize("name", FVCORE)
def test_any_number_of_dimensions_equals_cross_entropy(name: str, reduction: str) -> None:
    """focal_loss_equals_ce_loss, its mean, its sum and multi_class."""
    x, target = fvcore(name)
    ours = derive(lambda leaf: sigmoid_focal_loss(leaf, target, gamma=0.0, alpha=None, reduction=reduction), x)
    theirs = partial(F.binary_cross_entropy_with_logits, target=target.double(), reduction=reduction)
    for found, truth in zip(ours, derive(theirs, x.double()), strict=True):
        assert found.shape == truth.shape
        close(found, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "p, alpha",
    (
        pytest.param((0.02, 0.1, 0.3, 0.6, 0.75, 0.97), None, id="easy"),
        pytest.param((0.95, 0.90, 0.6, 0.3), 0.5, id="easy weighted"),
        pytest.param((0.05, 0.12, 0.09, 0.17), None, id="hard"),
    ),
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_easy_examples_weigh_less_and_hard_ones_almost_the_same(
    p: tuple[float, ...], alpha: float | None, dtype: torch.dtype
) -> None:
    """easy_ex, easy_ex weighted, hard_ex."""
    x, one = torch.tensor(p, dtype=torch.float64).logit().to(dtype), torch.ones(len(p))
    loss = sigmoid_focal_loss(x, one, gamma=2.0, alpha=alpha, reduction="none")
    ratio = F.binary_cross_entropy_with_logits(x.double(), one.double(), reduction="none") / loss
    wanted = (1 / alpha if alpha else 1) / (1 - x.double().sigmoid()) ** 2
    torch.testing.assert_close(ratio, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("alpha, silent", ((1.0, 0), (0.0, 1)))
def test_alpha_at_its_ends_silences_one_side(alpha: float, silent: int) -> None:
    """negatives_ignored, positives_ignored: loss and gradient are 0 to the last bit."""
    x, target = fvcore("two of each")
    for result in derive(lambda leaf: sigmoid_focal_loss(leaf, target, alpha=alpha, reduction="none"), x):
        assert (result[target == silent] == 0).all()
        assert (result[target != silent] != 0).all()


# ---------------------------------------------------------------------------------------------
# open-mmlab/mmcv: tests/test_ops/test_focal_loss.py
# Inputs, labels, then loss and gradient of the softmax and of the sigmoid loss; its mean is over the rows.

MMCV: tuple[tuple[Any, ...], ...] = (
    (
        [[1.0, 0.0], [0.0, 1.0]],
        [0, 1],
        (0.00566451, [[-0.00657264, 0.00657264], [0.00657264, -0.00657264]]),
        (0.13562961, [[-0.00657264, 0.11185755], [0.11185755, -0.00657264]]),
    ),
    (
        [[1.0, 0.0, -1.0], [0.0, 1.0, 2.0]],
        [2, 1],
        (0.34956908, [[0.10165970, 0.03739851, -0.13905823], [0.01227554, -0.10298023, 0.09070466]]),
        (1.10251057, [[0.28808805, 0.11185755, -0.09602935], [0.11185755, -0.00657264, 0.40376765]]),
    ),
    (
        [[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]],
        [1, 2, 0],
        (
            0.15754992,
            [
                [0.02590877, -0.05181759, 0.02590882],
                [0.02589641, 0.02589760, -0.05179400],
                [-0.07307514, 0.02234372, 0.05073142],
            ],
        ),
        (
            0.42287254,
            [
                [0.07457182, -0.02485716, 0.07457201],
                [0.07457211, 0.07457669, -0.02483728],
                [-0.02462499, 0.08277918, 0.18050370],
            ],
        ),
    ),
)
DIGITS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
@pytest.mark.parametrize("kind", ("softmax", "sigmoid"))
@pytest.mark.parametrize("case", range(3))
def test_mmcvs_printed_values(case: int, kind: str, dtype: torch.dtype) -> None:
    numbers, classes, *wanted = MMCV[case]
    x, y = torch.tensor(numbers, dtype=dtype), torch.tensor(classes)
    if kind == "softmax":
        found = derive(partial(focal_loss, target=y, alpha=0.25), x)
    else:
        target = F.one_hot(y, x.shape[1])
        found = derive(lambda leaf: sigmoid_focal_loss(leaf, target, alpha=0.25, reduction="sum") / len(y), x)
    for value, printed in zip(found, wanted[kind == "sigmoid"], strict=True):
        printed = torch.tensor(printed, dtype=torch.float64)
        torch.testing.assert_close(value.double(), printed, rtol=DIGITS[dtype], atol=1e-8)


@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_float16_at_its_largest_numbers_is_finite(gamma: float) -> None:
    """mmcv #1488: its floor under p is 0 in float16."""
    top = torch.finfo(torch.float16).max
    x = torch.tensor([[top, -top], [top, -top]], dtype=torch.float16)
    loss, grad = derive(lambda leaf: focal_loss(leaf, torch.tensor([0, 1]), gamma=gamma, reduction="none"), x)
    assert loss.tolist() == [0.0, 2 * top]
    assert grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss, grad = derive(lambda leaf: sigmoid_focal_loss(leaf, target, gamma=gamma, alpha=None, reduction="none"), x)
    assert loss.tolist() == [[0.0, 0.0], [top, top]]
    assert grad.tolist() == [[0.0, 0.0], [1.0, -1.0]]


# ---------------------------------------------------------------------------------------------
# kornia/kornia: tests/losses/test_focal_loss.py, class TestBinaryFocalLossWithLogits


def soft(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and soft targets [2, 3, 2]."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(2, 3, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    return first, second


@EVERY_REDUCTION
@pytest.mark.parametrize("unknown", (False, True))
def test_soft_targets_without_focus_give_binary_cross_entropy(unknown: bool, reduction: str) -> None:
    """value_same_as_torch_bce_loss; where elements are unknown, of those that are left."""
    x, target = soft()
    seen = torch.ones_like(target, dtype=torch.bool)
    seen[0, 1] = not unknown
    target = target.where(seen, torch.nan)

    def theirs(leaf: Tensor) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(leaf[seen], target[seen], reduction=reduction)
        return torch.zeros_like(leaf).masked_scatter(seen, loss) if reduction == "none" else loss

    ours = derive(lambda leaf: sigmoid_focal_loss(leaf, target, gamma=0.0, alpha=None, reduction=reduction), x)
    torch.testing.assert_close(ours, derive(theirs, x), rtol=1e-12, atol=1e-15)


@EVERY_REDUCTION
def test_alphas_by_column_are_torchs_weight_and_pos_weight(reduction: str) -> None:
    """value_same_as_torch_bce_loss_pos_weight_weight, for the pairs that one number in [0, 1] can say."""
    x, target = soft()
    target, alpha = target.round(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    options: dict[str, Any] = {"weight": 1 - alpha, "pos_weight": alpha / (1 - alpha), "reduction": reduction}
    theirs = derive(lambda leaf: F.binary_cross_entropy_with_logits(leaf, target, **options), x)
    ours = derive(lambda leaf: sigmoid_focal_loss(leaf, target, gamma=0.0, alpha=alpha, reduction=reduction), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@EVERY_REDUCTION
@pytest.mark.parametrize("alpha", (None, 0.2, 0.5))
@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0))
def test_soft_targets_have_torchvisions_values_and_shapes(gamma: float, alpha: float | None, reduction: str) -> None:
    """shape_alpha_gamma, with the values."""
    x, target = soft()
    ours = derive(lambda leaf: sigmoid_focal_loss(leaf, target, gamma=gamma, alpha=alpha, reduction=reduction), x)
    options = {"gamma": gamma, "alpha": -1 if alpha is None else alpha, "reduction": reduction}
    theirs = derive(lambda leaf: torchvision_loss(leaf, target, **options), x)
    assert ours[0].shape == theirs[0].shape
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@EVERY_REDUCTION
def test_an_unknown_element_is_as_if_it_were_not_there(reduction: str) -> None:
    """shape_ignore_index, with the values; a mask says the same as NaN, and what lies under it is not read."""
    x, target = soft()
    seen = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(6)) < 0.6
    assert 0 < seen.sum() < seen.numel()
    loss = partial(sigmoid_focal_loss, gamma=0.5, alpha=0.8, reduction=reduction)
    marked = derive(lambda leaf: loss(leaf, target.where(seen, torch.nan)), x)
    masked = derive(lambda leaf: loss(leaf, target.where(seen, 255), mask=seen), x.where(seen, torch.inf))
    torch.testing.assert_close(masked, marked, rtol=0, atol=0)
    left = derive(lambda leaf: loss(leaf, target[seen]), x[seen])
    kept = [r if r.dim() == 0 else r[seen] for r in marked]
    torch.testing.assert_close(kept, list(left), rtol=1e-14, atol=0)
    assert all((r[~seen] == 0).all() for r in marked if r.dim())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_logits_of_100_are_stable_both_ways(gamma: float, dtype: torch.dtype) -> None:
    """numeric_stability, and the same with the wrong targets."""
    x = torch.tensor([[100.0, -100.0]], dtype=dtype)
    for right, wanted, slopes in ((1.0, 0.0, (0.0, 0.0)), (0.0, 100.0, (0.75, -0.25))):
        target = torch.tensor([[right, 1 - right]])
        loss, grad = derive(lambda leaf, t=target: sigmoid_focal_loss(leaf, t, gamma=gamma, reduction="none"), x)
        torch.testing.assert_close(loss.double(), torch.tensor([[0.75, 0.25]]).double() * wanted, rtol=1e-6, atol=1e-20)
        torch.testing.assert_close(grad.double(), torch.tensor([slopes]).double(), rtol=1e-6, atol=1e-20)


# ---------------------------------------------------------------------------------------------
# kornia/kornia: tests/losses/test_focal_loss.py, class TestFocalLoss


@EVERY_REDUCTION
@pytest.mark.parametrize("gamma", (0.0, 2.0))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("value", (torch.finfo(torch.float32).max, math.inf, -math.inf, math.nan), ids=str)
def test_what_an_ignored_row_holds_changes_no_bit(value: float, weighted: bool, gamma: float, reduction: str) -> None:
    """ignored_extreme_logits, ignored_non_finite_logits."""
    x, y = torch.tensor([[value, -value], [0.3, -0.2]]), torch.tensor([-100, 1])
    safe = x.clone()
    safe[0] = 0
    alpha = 0.25 * torch.tensor([0.5, 1.5]) if weighted else None
    loss = partial(focal_loss, target=y, gamma=gamma, alpha=alpha, reduction=reduction)
    for found, wanted in zip(derive(loss, x), derive(loss, safe), strict=True):
        assert torch.equal(found, wanted)
        assert wanted.abs().max() > 0


@pytest.mark.parametrize("ignore_index", (-100, 255))
def test_extreme_rows_that_are_all_ignored_are_zero_also_when_compiled(ignore_index: int) -> None:
    """all_ignored_extreme_logits, dynamo_ignored_extreme_logits."""
    top = torch.finfo(torch.float32).max
    x, y = torch.tensor([[top, -top]]), torch.tensor([ignore_index])

    def loss(leaf: Tensor) -> Tensor:
        return focal_loss(leaf, y, ignore_index=ignore_index, reduction="sum")

    torch.compiler.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        assert [result.abs().sum().item() for result in derive(function, x)] == [0.0, 0.0]
    torch.compiler.reset()


@EVERY_REDUCTION
@pytest.mark.parametrize("alpha", (None, 0.2, 0.5, (0.16, 0.4, 0.64)), ids=str)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 2.0))
def test_the_softmax_loss_is_the_formula_and_has_one_number_a_row(gamma: float, alpha: Any, reduction: str) -> None:
    """shape_alpha_gamma, shape_target_with_only_one_dim, shape_weight; one alpha weighs every class the same."""
    x, y = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7)), torch.arange(6) % 3
    weight = torch.tensor(alpha, dtype=torch.float64) if isinstance(alpha, tuple) else alpha
    ours = derive(partial(focal_loss, target=y, gamma=gamma, alpha=weight, reduction=reduction), x)
    weight = 1.0 if weight is None else weight
    theirs = derive(partial(textbook, target=y, gamma=gamma, alpha=weight, reduction=reduction), x)
    assert ours[0].shape == ((6,) if reduction == "none" else ())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ignore_index", (-100, 255))
def test_an_impossible_class_for_the_ignored_rows_changes_nothing(ignore_index: int) -> None:
    """value_ignore_index: a class whose logits are all -inf takes no part, and an ignored row has no loss."""
    x, y = drawn(12, 3, seed=8), torch.arange(12) % 3
    ignored = torch.arange(12) % 5 == 2
    y[ignored] = ignore_index
    options: dict[str, Any] = {"alpha": 0.8, "gamma": 0.5, "ignore_index": ignore_index, "reduction": "none"}
    loss, grad = derive(lambda leaf: focal_loss(leaf, y, **options), x)
    more = torch.cat([x, torch.full((12, 1), -math.inf)], dim=1)
    wide_loss, wide_grad = derive(lambda leaf: focal_loss(leaf, y, **options), more)
    torch.testing.assert_close(wide_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(wide_grad, F.pad(grad, (0, 1)), rtol=1e-6, atol=0)
    assert torch.equal(loss == 0, ignored)
