"""What the test suites of fused cross entropies ask, asked anew of the losses at gamma 0 and above.

Each section names a peer and its file; test_focal_peers.py has the table of what is missing here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facefast.ops import focal_loss, linear_focal_loss, sigmoid_focal_loss
from tests.support.derive import derive
from tests.support.peers import (
    EVERY_DTYPE,
    EVERY_REDUCTION,
    HALVES,
    as_exact_as_theirs,
    close,
    drawn,
    head,
    labels,
    linear_cross_entropy,
    textbook,
    triple,
)

# ---------------------------------------------------------------------------------------------
# linkedin/Liger-Kernel: test/transformers/test_cross_entropy.py


@EVERY_REDUCTION
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("ignore_index, smoothing", ((-100, 0.0), (2, 0.0), (-123, 0.0), (1, 0.1), (-300, 0.2)))
@pytest.mark.parametrize("rows, classes", ((9, 32000), (4, 8), (63, 41)))
def test_cross_entropy_of_language_models(
    rows: int, classes: int, ignore_index: int, smoothing: float, dtype: torch.dtype, reduction: str
) -> None:
    """correctness, functional, ignore_index, label_smoothing and both; bfloat16 is held to float32's tolerance."""
    x, y = drawn(rows, classes, dtype=dtype), labels(rows, classes)
    y[1::3] = ignore_index
    options: dict[str, Any] = {"label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
    ours = derive(lambda leaf: focal_loss(leaf, y, gamma=0.0, **options), x)
    theirs = derive(lambda leaf: F.cross_entropy(leaf, y, **options), x.double())
    for found, truth in zip(ours, theirs, strict=True):
        close(found, truth, rtol=1e-6, atol=1e-8)


@EVERY_REDUCTION
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_class_weights_weigh_rows_and_leave_the_mean_over_rows(dtype: torch.dtype, reduction: str) -> None:
    """weight: as torch's but for "mean", which torch divides by the sum of the weights."""
    x, y = drawn(9, 32000, seed=1, dtype=dtype), labels(9, 32000, seed=1)
    weight = torch.rand(32000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = derive(partial(focal_loss, target=y, gamma=0.0, alpha=weight.float(), reduction=reduction), x)
    theirs = derive(
        lambda leaf: (
            F.cross_entropy(leaf, y, weight=weight, reduction="sum" if reduction == "mean" else reduction)
            / (len(y) if reduction == "mean" else 1)
        ),
        x.double(),
    )
    for found, truth in zip(ours, theirs, strict=True):
        close(found, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gamma", (0.0, 2.0))
def test_bfloat16_is_computed_in_float32_over_128256_classes(gamma: float) -> None:
    """float32_internal."""
    x, y = drawn(4, 128256, seed=2, dtype=torch.bfloat16), labels(4, 128256, seed=2)
    loss, grad = derive(partial(focal_loss, target=y, gamma=gamma, reduction="none"), x)
    wide_loss, wide_grad = derive(partial(focal_loss, target=y, gamma=gamma, reduction="none"), x.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide_loss, rtol=1e-6, atol=0)
    close(grad, wide_grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("gamma", (0.0, 2.0))
def test_a_confident_rows_gradient_is_not_p_minus_1_after_rounding(gamma: float, dtype: torch.dtype) -> None:
    """true_class_grad_confident_predictions: p rounds to 1, the gradient of its class still has the type's digits."""
    scale = 2.0**36 if gamma else 2.0**12  # keeps (1 - p)^(gamma + 1) among float16's numbers
    x, y = drawn(8, 1000, seed=3, spread=0.1, dtype=dtype), torch.arange(8)
    x[y, y] = torch.linspace(16, 18, 8).to(dtype)
    assert (x.double().softmax(1)[y, y].to(dtype) == 1).all()
    _, grad = derive(partial(focal_loss, target=y, gamma=gamma, reduction="none"), x, upstream=torch.full((8,), scale))
    _, truth = derive(lambda leaf: scale * textbook(leaf, y, gamma=gamma, reduction="none"), x.double())
    close(grad[y, y], truth[y, y], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------
# linkedin/Liger-Kernel: test/transformers/test_fused_linear_cross_entropy.py


@EVERY_REDUCTION
@EVERY_DTYPE
@pytest.mark.parametrize("ignore_index, smoothing", ((-100, 0.0), (42, 0.1)))
@pytest.mark.parametrize("rows, classes, width, chunk", ((188, 123, 31, 0), (64, 409, 128, 64), (63, 41, 41, 7)))
def test_the_linear_loss_is_a_linear_layer_and_cross_entropy(
    rows: int,
    classes: int,
    width: int,
    chunk: int,
    ignore_index: int,
    smoothing: float,
    dtype: torch.dtype,
    reduction: str,
) -> None:
    """correctness, with shapes that are multiples of nothing and chunks that end inside the classes."""
    x, weight = head(rows, classes, width, dtype)
    y = labels(rows, classes)
    y[torch.arange(rows) % 3 == 1] = ignore_index
    options: dict[str, Any] = {"label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
    ours = partial(linear_focal_loss, target=y, gamma=0.0, chunk=chunk, **options)
    theirs = partial(linear_cross_entropy, target=y, **options)
    triples = triple(ours, theirs, x, weight)
    as_exact_as_theirs(triples)
    if dtype == torch.float32:
        for found, _, truth in triples:
            torch.testing.assert_close(found.double(), truth.double(), rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_under_autocast_the_linear_loss_is_as_exact_as_the_layer(dtype: torch.dtype) -> None:
    """amp: forward and backward inside the context."""
    x, weight = head(188, 123, 31, torch.float32)
    y = labels(188, 123)
    with torch.autocast("cpu", dtype):
        ours = derive(lambda a, b: linear_focal_loss(a, b, y, gamma=0.0), x, weight)
        theirs = derive(lambda a, b: linear_cross_entropy(a, b, y), x, weight)
    truth = derive(lambda a, b: linear_cross_entropy(a, b, y), x.double(), weight.double())
    as_exact_as_theirs(list(zip(ours, theirs, truth, strict=True)))


@pytest.mark.parametrize("gamma", (0.0, 2.0))
@pytest.mark.parametrize("chunk", (0, 1, 50, 1000))
def test_every_rows_own_upstream_gradient_reaches_the_weights(chunk: int, gamma: float) -> None:
    """reduction_none_per_token_grad_output: it must be in the logits' gradient before the rows are summed."""
    x, weight = head(30, 123, 31, torch.float64)
    y, upstream = labels(30, 123), drawn(30, seed=4, dtype=torch.float64)
    y[::7] = -100
    ours = derive(
        lambda a, b: linear_focal_loss(a, b, y, gamma=gamma, reduction="none", chunk=chunk),
        x,
        weight,
        upstream=upstream,
    )
    theirs = derive(
        lambda a, b: textbook(F.linear(a, b), y, gamma=gamma, reduction="none"), x, weight, upstream=upstream
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ("none", "sum"))
def test_a_weight_for_each_token_is_alpha_by_row(reduction: str) -> None:
    """token_scaling, also with ignored rows: each loss times the detached probability of its label."""
    x, weight = head(8, 16, 8, torch.float64)
    y = torch.tensor([0, 10, -100, 15, -100, 9, 3, 1])
    p = F.linear(x, weight).softmax(1).gather(1, y.clamp(min=0)[:, None])
    ours = derive(lambda a, b: linear_focal_loss(a, b, y, gamma=0.0, alpha=p, reduction=reduction), x, weight)

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        loss = linear_cross_entropy(a, b, y, reduction="none") * p[:, 0]
        return loss if reduction == "none" else loss.sum()

    torch.testing.assert_close(ours, derive(theirs, x, weight), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_gradients_of_many_chunks_are_summed_in_float32(dtype: torch.dtype) -> None:
    """accum_dtype (#512): the embeddings' gradient gathers 200 chunks and is no worse for it."""
    x, weight = head(24, 400, 16, dtype)
    y = labels(24, 400)
    found = [derive(lambda a, b, c=chunk: linear_focal_loss(a, b, y, chunk=c), x, weight) for chunk in (400, 2)]
    truth = derive(lambda a, b: linear_focal_loss(a, b, y), x.double(), weight.double())
    whole, split = ((side[1].double() - truth[1]).norm() for side in found)
    assert 0 < split <= 1.5 * whole


# ---------------------------------------------------------------------------------------------
# Dao-AILab/quack: tests/test_cross_entropy.py, tests/test_cross_entropy_weight.py

WIDTHS = (192, 256, 512, 760, 1024, 1128, 2048, 4096, 8192, 16384, 32768, 65536, 128256, 131072, 256128, 262144)
SIZES = [(rows, classes) for classes in WIDTHS for rows in ((1, 77, 289) if classes < 1000 else (1, 3))]


@EVERY_DTYPE
@pytest.mark.parametrize("rows, classes", SIZES)
def test_cross_entropy_at_every_width_up_to_262144(rows: int, classes: int, dtype: torch.dtype) -> None:
    """cross_entropy, with one class ignored: loss and gradient under a random upstream gradient."""
    x, y = drawn(rows, classes, spread=0.1, dtype=dtype), labels(rows, classes)
    upstream = drawn(rows, seed=9)
    y[2::3] = classes - 1
    for ignore_index in (-100, classes - 1):
        ours = partial(focal_loss, target=y, gamma=0.0, ignore_index=ignore_index, reduction="none")
        theirs = partial(F.cross_entropy, target=y, ignore_index=ignore_index, reduction="none")
        loss, grad = derive(ours, x, upstream=upstream)
        true_loss, true_grad = derive(theirs, x.double(), upstream=upstream.double())
        assert loss.shape == (rows,)
        assert loss.dtype == torch.float32
        assert torch.equal(loss == 0, y == ignore_index)
        assert (loss >= 0).all()
        close(loss, true_loss, rtol=1e-6, atol=0)
        close(grad, true_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("gamma", (0.0, 2.0))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("value", (10.0, -10.0))
def test_equal_logits_of_any_size_share_the_probability(value: float, dtype: torch.dtype, gamma: float) -> None:
    """extreme_values: all large, all small."""
    x, y = torch.full((16, 1024), value, dtype=dtype), labels(16, 1024)
    loss, grad = derive(partial(focal_loss, target=y, gamma=gamma, reduction="none"), x)
    wanted = (1 - 1 / 1024) ** gamma * math.log(1024)
    torch.testing.assert_close(loss, torch.full((16,), wanted), rtol=1e-6, atol=0)
    close(grad, derive(partial(textbook, target=y, gamma=gamma, reduction="none"), x.double())[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
def test_one_large_logit_leaves_exactly_the_rest(dtype: torch.dtype) -> None:
    """extreme_values: one-hot, where quack asks for less than 1."""
    x, y = torch.full((16, 1024), -10.0, dtype=dtype), labels(16, 1024)
    x[torch.arange(16), y] = 10.0
    wanted = torch.full((16,), math.log1p(1023 * math.exp(-20)))
    torch.testing.assert_close(focal_loss(x, y, gamma=0.0, reduction="none"), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", (0.0, 2.0))
def test_a_shift_of_all_logits_changes_nothing(gamma: float) -> None:
    """numerical_stability; logits in steps of 2^-14, so that adding 100 is exact."""
    x, y = (drawn(8, 512, seed=5) * 2**14).round() / 2**14, labels(8, 512, seed=5)
    assert torch.equal((x + 100) - 100, x)
    loss = partial(focal_loss, target=y, gamma=gamma, reduction="none")
    torch.testing.assert_close(derive(loss, x + 100), derive(loss, x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gamma", (0.0, 2.0))
@pytest.mark.parametrize("classes", (1024, 1023, 2))
@pytest.mark.parametrize("last", (False, True))
def test_the_first_and_the_last_class_are_classes(last: bool, classes: int, gamma: float) -> None:
    """edge_targets."""
    x, y = drawn(16, classes, seed=6, spread=0.1), torch.full((16,), (classes - 1) * last)
    ours = derive(partial(focal_loss, target=y, gamma=gamma, reduction="none"), x)
    theirs = derive(partial(textbook, target=y, gamma=gamma, reduction="none"), x.double())
    for found, truth in zip(ours, theirs, strict=True):
        close(found, truth, rtol=1e-5, atol=1e-9)


def test_an_ignore_index_of_no_row_and_of_all_rows() -> None:
    """ignore_index_edge_cases: with -1 nothing is ignored, with the only label everything."""
    x, y = drawn(16, 1024, seed=7, spread=0.1), labels(16, 1024, seed=7)
    assert torch.equal(focal_loss(x, y, ignore_index=-1), focal_loss(x, y))
    for reduction in ("none", "mean", "sum"):
        loss, grad = derive(partial(focal_loss, target=y * 0, ignore_index=0, reduction=reduction), x)
        assert (loss == 0).all() and (grad == 0).all()


@EVERY_REDUCTION
@EVERY_DTYPE
@pytest.mark.parametrize("gamma", (0.0, 2.0))
@pytest.mark.parametrize("rows, classes", ((77, 192), (5, 32768), (2, 128256)))
def test_class_weights_with_and_without_ignored_rows(
    rows: int, classes: int, gamma: float, dtype: torch.dtype, reduction: str
) -> None:
    """weight, weight_with_ignore_index, weight_reduction; the mean is over rows."""
    x, y = drawn(rows, classes, spread=0.1, dtype=dtype), labels(rows, classes)
    alpha = torch.rand(classes, generator=torch.Generator().manual_seed(8)) + 0.1
    y[1::3] = classes - 1
    for ignore_index in (-100, classes - 1):
        options: dict[str, Any] = {"gamma": gamma, "ignore_index": ignore_index, "reduction": reduction}
        ours = derive(lambda leaf, o=options: focal_loss(leaf, y, alpha=alpha, **o), x)
        theirs = derive(lambda leaf, o=options: textbook(leaf, y, alpha=alpha.double(), **o), x.double())
        for found, truth in zip(ours, theirs, strict=True):
            close(found, truth, rtol=1e-5, atol=1e-9)


@EVERY_REDUCTION
def test_weights_of_one_are_no_weights_to_the_last_bit(reduction: str) -> None:
    """weight_uniform, and quack's linear unit_weights_square_dx: by class and by row."""
    x, weight = head(21, 130, 16, torch.float32)
    y = labels(21, 130)
    y[::4] = -100
    plain = derive(lambda a, b: linear_focal_loss(a, b, y, reduction=reduction, chunk=64), x, weight)
    dense = derive(partial(focal_loss, target=y, reduction=reduction), x @ weight.T)
    for ones in (torch.ones(130), torch.ones(21, 1), 1.0):
        options: dict[str, Any] = {"alpha": ones, "reduction": reduction}
        same = derive(lambda a, b, o=options: linear_focal_loss(a, b, y, chunk=64, **o), x, weight)
        assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True))
        same = derive(partial(focal_loss, target=y, **options), x @ weight.T)
        assert all(torch.equal(a, b) for a, b in zip(same, dense, strict=True))


# ---------------------------------------------------------------------------------------------
# Dao-AILab/quack: tests/test_linear_cross_entropy.py


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", (32000, 50264, 128256))
def test_the_error_over_many_classes_is_that_of_the_type(classes: int, dtype: torch.dtype, reduction: str) -> None:
    """chunked_linear_cross_entropy."""
    x, weight = drawn(8, 32, spread=0.1, dtype=dtype), drawn(classes, 32, seed=1, spread=32**-0.5, dtype=dtype)
    y = labels(8, classes)
    ours = partial(linear_focal_loss, target=y, gamma=0.0, reduction=reduction)
    theirs = partial(linear_cross_entropy, target=y, reduction=reduction)
    as_exact_as_theirs(triple(ours, theirs, x, weight))


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("ignore_index", (-100, 1535))
@pytest.mark.parametrize("rows, chunk", ((32, 1536), (150, 256), (256, 100)))
def test_chunks_of_any_size_with_ignored_rows(rows: int, chunk: int, ignore_index: int, reduction: str) -> None:
    """scaled_exp_linear_cross_entropy, chunked_linear_cross_entropy_ignore_index: one chunk, whole and ragged ones."""
    x, weight = drawn(rows, 48, spread=0.1), drawn(1536, 48, seed=1, spread=48**-0.5)
    x, weight, y = x.bfloat16(), weight.bfloat16(), labels(rows, 1536)
    y[torch.rand(rows, generator=torch.Generator().manual_seed(2)) < 0.2] = ignore_index
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    ours = partial(linear_focal_loss, target=y, gamma=0.0, chunk=chunk, **options)
    theirs = partial(linear_cross_entropy, target=y, **options)
    as_exact_as_theirs(triple(ours, theirs, x, weight))


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES, torch.float64), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_the_weight_of_an_ignored_row_may_be_nan(reduction: str, dtype: torch.dtype) -> None:
    """token_weights: of any type, some of them 0, NaN where the label is ignored."""
    x, weight = head(40, 96, 24, torch.float64)
    y = labels(40, 96)
    y[::9] = -100
    alpha = torch.rand(40, 1, generator=torch.Generator().manual_seed(3)).to(dtype)
    alpha[::7] = 0
    clean = alpha.masked_fill(y[:, None] == -100, 0.0).double()
    alpha[y == -100] = torch.nan
    ours = derive(lambda a, b: linear_focal_loss(a, b, y, gamma=0.0, alpha=alpha, reduction=reduction), x, weight)

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        loss = (linear_cross_entropy(a, b, y, reduction="none") * clean[:, 0]).sum()
        return loss / (y != -100).sum() if reduction == "mean" else loss

    torch.testing.assert_close(ours, derive(theirs, x, weight), rtol=1e-10, atol=1e-14)
    dense = derive(partial(focal_loss, target=y, gamma=0.0, alpha=alpha, reduction=reduction), x @ weight.T)
    torch.testing.assert_close(dense[0], ours[0], rtol=1e-10, atol=1e-14)
    assert dense[1].isfinite().all()


@pytest.mark.parametrize("chunk", (256, 1024))
@pytest.mark.parametrize("frozen", ("x", "weight"))
def test_a_frozen_operand_gets_no_gradient_and_the_other_keeps_its_own(frozen: str, chunk: int) -> None:
    """partial_grad; CCE's test_loss_partials."""
    operands = dict(zip(("x", "weight"), head(32, 512, 48, torch.bfloat16), strict=True))
    y = labels(32, 512)
    loss = partial(linear_focal_loss, target=y, gamma=0.0, chunk=chunk)
    _, *both = derive(loss, *operands.values())
    leaves: dict[str, Any] = {name: value.clone().requires_grad_(name != frozen) for name, value in operands.items()}
    loss(**leaves).backward()
    assert leaves.pop(frozen).grad is None
    (other,) = leaves.values()
    assert torch.equal(other.grad, both[frozen == "x"])


# ---------------------------------------------------------------------------------------------
# Dao-AILab/flash-attention: tests/losses/test_cross_entropy.py, test_cross_entropy_parallel.py


@EVERY_DTYPE
@pytest.mark.parametrize("smoothing", (0.0, 0.9))
@pytest.mark.parametrize("scale", (1.0, 0.7))
@pytest.mark.parametrize(
    "classes, spread, reduction",
    ((50257, 1.0, "mean"), (131072, 1.0, "mean"), (128256, 1.0, "mean"), (50264, 10.0, "none"), (262144, 10.0, "none")),
)
def test_scaled_logits_with_strong_smoothing(
    classes: int, spread: float, reduction: str, scale: float, smoothing: float, dtype: torch.dtype
) -> None:
    """cross_entropy_loss, and the losses of cross_entropy_loss_parallel without the ranks."""
    x, y = drawn(3, classes, spread=spread, dtype=dtype), labels(3, classes)
    y[1] = -100
    upstream = drawn(3, seed=5) if reduction == "none" else torch.tensor(-1.7)
    ours = derive(
        lambda leaf: focal_loss(leaf, y, gamma=0.0, scale=scale, label_smoothing=smoothing, reduction=reduction),
        x,
        upstream=upstream,
    )
    theirs = derive(
        lambda leaf: F.cross_entropy(leaf * scale, y, label_smoothing=smoothing, reduction=reduction),
        x.double(),
        upstream=upstream.double(),
    )
    close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    close(ours[1], theirs[1], rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------------------------------
# apple/ml-cross-entropy: tests/test_cce_loss_forward.py, test_cce_loss_backward.py, test_vocab_parallel.py

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("invalid", (False, True))
@pytest.mark.parametrize("rows, classes, width", ((256, 512, 128), (252, 507, 128), (252, 507, 123)))
def test_every_element_is_as_exact_as_plain_torchs(
    rows: int, classes: int, width: int, invalid: bool, dtype: torch.dtype, reduction: str
) -> None:
    """loss_forward, loss_backward: no block of small gradients is left out; chunks of 64, the last one ragged."""
    x, weight = head(rows, classes, width, dtype)
    y = labels(rows, classes)
    if invalid:
        y[torch.randperm(rows, generator=torch.Generator().manual_seed(4))[: rows // 5]] = -100
    share = 1.0 if reduction == "mean" else 1 / rows  # each row's part, as in a mean
    upstream = torch.full((rows,), share) if reduction == "none" else None

    def ours(a: Tensor, b: Tensor) -> Tensor:
        loss = linear_focal_loss(a, b, y, gamma=0.0, chunk=64, reduction=reduction)
        return loss * share if reduction == "sum" else loss

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        loss = linear_cross_entropy(a, b, y, reduction=reduction)
        return loss * share if reduction == "sum" else loss

    triples = triple(ours, theirs, x, weight, upstream=upstream)
    for found, allowed, truth in triples:
        slack = TOLERANCE[dtype] * truth.abs().max().clamp(max=1)
        assert ((found.double() - truth).abs() <= (allowed.double() - truth).abs() + slack).all()


@pytest.mark.parametrize("ignore_index", (507, 510, 511, 512))
def test_an_ignored_label_past_the_last_class_is_no_column_of_the_last_chunk(ignore_index: int) -> None:
    """PR 59: a sentinel that matches a padded column made the loss infinite; 507 classes in chunks of 64."""
    x, weight = head(12, 507, 16, torch.float64)
    y = torch.tensor([506, 448, 447, 0] * 3)
    y[4:6] = ignore_index
    ours = partial(linear_focal_loss, target=y, gamma=0.0, chunk=64, ignore_index=ignore_index, reduction="none")
    theirs = partial(linear_cross_entropy, target=y, ignore_index=ignore_index, reduction="none")
    sides = [derive(function, x, weight) for function in (ours, theirs)]
    torch.testing.assert_close(*sides, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# pytorch/extension-cpp: test/test_extension.py


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's graph trees record one of themselves
@pytest.mark.parametrize("size", (1000, 5000, 10000))
@pytest.mark.parametrize("after_a_layer", (False, True))
def test_a_replayed_graph_computes_on_the_current_stream(after_a_layer: bool, size: int, device: str = "cuda") -> None:
    """TestTorchCompileStreamSync (pytorch #157363): a kernel on another stream reads its input before it is there."""
    layer = torch.nn.Linear(size, size, device=device) if after_a_layer else torch.nn.Identity()
    y, target = torch.tensor([size - 1], device=device), torch.ones(1, size, device=device)

    def model(x: Tensor) -> Tensor:
        z = layer(x)
        return focal_loss(z, y, reduction="none") + sigmoid_focal_loss(z, target, reduction="none").mean(1)

    torch.compiler.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):  # the first two calls compile and record, the others replay
            x = drawn(1, size, seed=seed).to(device)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=1e-5, atol=1e-6)
    torch.compiler.reset()
