"""linear_focal_loss against the readable version, at every size of chunk, in memory, and at the edges."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facefast.ops import AdaFace, Arc, Combined, Cos, linear_focal_loss, reference
from facefast.ops.margins import Margin
from tests.support.derive import derive
from tests.support.memory import peak_bytes

REDUCTIONS = ("none", "mean", "sum")
MARGINS: dict[str, Callable[[int], Margin | None]] = {
    "none": lambda rows: None,
    "cos": lambda rows: Cos(0.2),
    "arc": lambda rows: Arc(0.4),
    "arc detached": lambda rows: Arc(0.4, gradient="detached"),
    "combined": lambda rows: Combined(1.1, 0.2, 0.1),
    "adaface": lambda rows: AdaFace()(torch.linspace(1, 90, rows)),
}


def operands(
    rows: int, classes: int, dim: int, dtype: torch.dtype = torch.float64, length: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and labels; the products are cosines times length^2, so that margins mean something without norms."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (rows, classes))
    x, weight = (length * F.normalize(t).to(dtype) for t in (x, weight))
    return x, weight, torch.arange(rows) * 7 % classes


def run(
    x: Tensor, weight: Tensor, y: Tensor, *, plain: bool = False, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """The loss, x.grad and weight.grad, of the readable version if `plain`."""
    function = reference.linear_focal_loss if plain else linear_focal_loss
    return derive(partial(function, target=y, **options), x, weight, upstream=upstream)


# ---------------------------------------------------------------------------------------------
# Against the readable version


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("normalize", (False, True))
def test_every_option_agrees_with_the_readable_version_at_every_chunk(normalize: bool, name: str) -> None:
    rows, classes = 9, 11
    x, weight, y = operands(rows, classes, 4)
    y[3] = 255
    weight, margin = 0.9 * weight, MARGINS[name](rows)
    generator = torch.Generator().manual_seed(2)
    alphas = (None, 0.3, torch.rand(classes, generator=generator), torch.rand(rows, 1, generator=generator))
    for alpha, smoothing, reduction in itertools.product(alphas, (0.0, 0.1), REDUCTIONS):
        options: dict[str, Any] = {"normalize": normalize, "margin": margin, "alpha": alpha, "reduction": reduction}
        options |= {"gamma": 1.5, "scale": 4.0, "ignore_index": 255, "label_smoothing": smoothing}
        upstream = torch.randn(rows if reduction == "none" else (), dtype=torch.float64, generator=generator)
        wanted = run(x, weight, y, plain=True, upstream=upstream, **options)
        for chunk in (0, 1, 2, 3, 5, 10, 11, 100):
            results = run(x, weight, y, upstream=upstream, chunk=chunk, **options)
            torch.testing.assert_close(results, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("classes", (1, 2, 7, 16, 33))
def test_every_gamma_and_number_of_classes_agrees(classes: int, normalize: bool) -> None:
    x, weight, y = operands(21, classes, 6)
    for gamma, chunk in itertools.product((0.0, 0.3, 0.5, 1.0, 2.0, 5.0), (0, 4)):
        options: dict[str, Any] = {"gamma": gamma, "normalize": normalize, "scale": 8.0, "reduction": "none"}
        wanted = run(x, weight, y, plain=True, **options)
        torch.testing.assert_close(run(x, weight, y, chunk=chunk, **options), wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("chunk", range(1, 25))
def test_a_label_may_be_any_column_of_any_chunk(chunk: int, normalize: bool) -> None:
    classes = 23
    x, weight, _ = operands(classes, classes, 5)
    options: dict[str, Any] = {"normalize": normalize, "scale": 6.0, "label_smoothing": 0.1, "reduction": "none"}
    wanted = run(x, weight, torch.arange(classes), plain=True, **options)
    results = run(x, weight, torch.arange(classes), chunk=chunk, **options)
    torch.testing.assert_close(results, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("chunk", (0, 1023, 1024, 1025, 2049, 2499, 2500))
def test_chunks_wider_than_a_step_of_the_online_softmax(chunk: int, normalize: bool) -> None:
    """Within a chunk the statistics take 1024 columns at a time; here labels lie on both sides of every seam."""
    y = torch.tensor([0, 1022, 1023, 1024, 1025, 2046, 2047, 2048, 2049, 2498, 2499])
    x, weight, _ = operands(len(y), 2500, 3)
    options: dict[str, Any] = {"normalize": normalize, "scale": 8.0, "label_smoothing": 0.1, "reduction": "none"}
    wanted = run(x, weight, y, plain=True, **options)
    torch.testing.assert_close(run(x, weight, y, chunk=chunk, **options), wanted, rtol=1e-10, atol=1e-13)


def test_the_chunk_it_chooses_itself_is_one_of_several_when_there_are_many_rows() -> None:
    """2048 rows of float64 leave 256 classes to a chunk; the last of three is narrower."""
    x, weight, y = operands(2048, 600, 4)
    for normalize in (False, True):
        wanted = run(x, weight, y, plain=True, normalize=normalize, scale=8.0)
        torch.testing.assert_close(run(x, weight, y, normalize=normalize, scale=8.0), wanted, rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------------------------------------
# Precision


def faces(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows far from their class (a cosine of about 0), on top of it (about 1), and between, as training meets them."""
    generator = torch.Generator().manual_seed(3)
    weight, noise = (torch.randn(n, 64, generator=generator) for n in (500, 48))
    y = torch.arange(48) * 10
    near = torch.linspace(0, 4, 48)[:, None]
    return (3 * (near * weight[y] + noise)).to(dtype), weight.to(dtype), y


HEADS: dict[str, dict[str, Any]] = {
    "plain": {"scale": 1 / 64},
    "cosface": {"normalize": True, "scale": 64.0, "margin": Cos(0.35)},
    "arcface": {"normalize": True, "scale": 64.0, "margin": Arc(0.5)},
    "smooth": {"normalize": True, "scale": 16.0, "label_smoothing": 0.1},
    "cross entropy": {"normalize": True, "scale": 32.0, "gamma": 0.0},
}


def errors(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    """The error of the loss and of both gradients by their norms: the greatest one alone would be luck."""
    pairs = zip(results, truth, strict=True)
    return [((value.double() - true).norm() / true.norm()).item() for value, true in pairs]


@pytest.mark.parametrize("chunk", (0, 1, 7, 64))
@pytest.mark.parametrize("name", HEADS)
def test_float32_is_close_to_the_float64_truth(name: str, chunk: int) -> None:
    x, weight, y = faces(torch.float32)
    upstream = torch.linspace(-1, 2, len(y))
    truth = run(x.double(), weight.double(), y, plain=True, reduction="none", upstream=upstream.double(), **HEADS[name])
    results = run(x, weight, y, reduction="none", upstream=upstream, chunk=chunk, **HEADS[name])
    assert all(value.dtype == torch.float32 for value in results)
    assert max(errors(results, truth)) < 2e-6
    # Confident rows, too, each relative to itself: a cosine's rounding comes back times scale * (1 + gamma).
    for value, true in zip(results[:2], truth[:2], strict=True):
        rows, true_rows = value.view(len(y), -1).double(), true.view(len(y), -1)
        assert ((rows - true_rows).abs().amax(1) < 3e-4 * true_rows.abs().amax(1)).all()


@pytest.mark.parametrize("chunk", (0, 1, 7, 64))
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_as_good_as_a_half_precision_layer(dtype: torch.dtype, name: str, chunk: int) -> None:
    """quack's rule: at most three times the error that the plain layer and loss make in the same type."""
    x, weight, y = faces(dtype)
    for reduction, upstream in (("none", torch.linspace(-1, 2, len(y))), ("mean", torch.tensor(1.0))):
        options = {"reduction": reduction, **HEADS[name]}
        truth = run(x.double(), weight.double(), y, plain=True, upstream=upstream.double(), **options)
        results = run(x, weight, y, upstream=upstream, chunk=chunk, **options)
        plain = run(x, weight, y, plain=True, upstream=upstream, **options)
        assert [value.dtype for value in results] == [torch.float32, dtype, dtype]
        # The error of one number, a mean, is luck.
        pairs = list(zip(errors(results, truth), errors(plain, truth), strict=True))[reduction == "mean" :]
        assert all(ours <= 3 * theirs for ours, theirs in pairs), pairs


def test_the_size_of_a_chunk_changes_no_more_than_rounding() -> None:
    x, weight, y = faces(torch.float32)
    options: dict[str, Any] = {"normalize": True, "scale": 32.0, "margin": Arc(0.3), "reduction": "none"}
    whole = run(x, weight, y, chunk=500, **options)
    different = 0
    for chunk in (1, 2, 3, 7, 64, 127, 128, 250, 499):
        results = run(x, weight, y, chunk=chunk, **options)
        different += not torch.equal(results[1], whole[1])
        assert max(errors(results, tuple(t.double() for t in whole))) < 2e-6
    assert different, "nothing was chunked"
    for chunk in (500, 501, 10**6, 2**62):
        assert all(torch.equal(a, b) for a, b in zip(run(x, weight, y, chunk=chunk, **options), whole, strict=True))


# ---------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("length", (0.0, 1e-13, 9e-13, 2e-12, 1e-6))
def test_a_row_shorter_than_the_floor_is_divided_by_it(length: float, dtype: torch.dtype) -> None:
    """As F.normalize: below 1e-12 the divisor is a constant, and the gradient is not projected."""
    x, weight, y = operands(6, 8, 5, dtype, length=2.0)
    x[2] *= length / 2
    weight[y[4]] *= length / 2
    options: dict[str, Any] = {"normalize": True, "scale": 4.0, "label_smoothing": 0.1, "reduction": "none"}
    wanted = run(x.double(), weight.double(), y, plain=True, **options)
    results = run(x, weight, y, chunk=3, **options)
    exact = dtype == torch.float64
    for value, true in zip(results, wanted, strict=True):
        assert value.isfinite().all()
        for row, true_row in zip(value.double(), true, strict=True):  # they differ by twelve orders
            size = true_row.abs().max().item()
            torch.testing.assert_close(row, true_row, rtol=0, atol=(1e-11 if exact else 2e-6) * size)
    assert (results[1][2].abs().max() > 1e10) == (length < 1e-11)


def test_with_norms_no_gradient_points_along_its_row() -> None:
    x, weight, y = operands(9, 20, 6, length=3.0)
    _, x_grad, weight_grad = run(x, weight, y, normalize=True, scale=8.0, chunk=7)
    for value, grad in ((x, x_grad), (weight, weight_grad)):
        assert (grad.norm(dim=1) > 1e-6).all()
        torch.testing.assert_close((value * grad).sum(1), torch.zeros(len(value)).double(), rtol=0, atol=1e-15)


def test_with_norms_lengths_change_nothing_but_the_size_of_the_gradient() -> None:
    x, weight, y = operands(9, 20, 6)
    longer = torch.linspace(0.1, 50, 9, dtype=torch.float64)[:, None]
    loss, x_grad, weight_grad = run(x, weight, y, normalize=True, scale=8.0, chunk=7)
    results = run(x * longer, weight, y, normalize=True, scale=8.0, chunk=7)
    torch.testing.assert_close(results, (loss, x_grad / longer, weight_grad), rtol=1e-11, atol=1e-15)


# ---------------------------------------------------------------------------------------------
# Gradients on demand


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("frozen", (0, 1))
def test_a_frozen_operand_gets_no_gradient_and_changes_no_bit_of_the_other(frozen: int, normalize: bool) -> None:
    x, weight, y = operands(7, 30, 5, torch.float32)
    _, *wanted = run(x, weight, y, normalize=normalize, scale=5.0, chunk=8)
    leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
    linear_focal_loss(leaves[0], leaves[1], y, normalize=normalize, scale=5.0, chunk=8).backward()
    other = leaves[1 - frozen].grad
    assert leaves[frozen].grad is None and other is not None
    assert torch.equal(other, wanted[1 - frozen])


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("layout", ("contiguous", "strided", "one number"))
def test_every_row_takes_its_own_upstream_gradient(layout: str, normalize: bool) -> None:
    """Liger's reduction_none_per_token_grad_output: it has to be applied before the rows are summed into weight.grad.
    A row without any leaves nothing behind."""
    x, weight, y = operands(7, 30, 5)
    upstream = {
        "contiguous": torch.randn(7, dtype=torch.float64),
        "strided": torch.randn(7, 3, dtype=torch.float64)[:, 1],
        "one number": torch.randn((), dtype=torch.float64).expand(7),
    }[layout]
    if layout != "one number":
        upstream[2] = 0
    options: dict[str, Any] = {"normalize": normalize, "scale": 5.0, "label_smoothing": 0.1, "chunk": 8}
    loss, x_grad, weight_grad = run(x, weight, y, reduction="none", upstream=upstream, **options)
    singles = [run(x[i : i + 1], weight, y[i : i + 1], reduction="sum", **options) for i in range(7)]
    torch.testing.assert_close(loss, torch.stack([single[0] for single in singles]), rtol=1e-12, atol=0)
    wanted = torch.cat([u * single[1] for u, single in zip(upstream, singles, strict=True)])
    torch.testing.assert_close(x_grad, wanted, rtol=1e-11, atol=1e-14)
    wanted = torch.stack([u * single[2] for u, single in zip(upstream, singles, strict=True)]).sum(0)
    torch.testing.assert_close(weight_grad, wanted, rtol=1e-11, atol=1e-14)
    assert (x_grad[2] == 0).all() == (layout != "one number")


def test_two_losses_on_one_weight_and_two_backward_passes_add_up() -> None:
    x, weight, y = operands(7, 30, 5)
    options: dict[str, Any] = {"normalize": True, "scale": 5.0, "chunk": 8}
    a, b, w = (t.clone().requires_grad_() for t in (x, x.flip(0), weight))
    total = linear_focal_loss(a, w, y, **options) + linear_focal_loss(b, w, y, gamma=0.5, reduction="sum", **options)
    total.backward(retain_graph=True)
    first, second = run(x, weight, y, **options), run(x.flip(0), weight, y, gamma=0.5, reduction="sum", **options)
    wanted = (first[1], second[1], first[2] + second[2])
    torch.testing.assert_close((a.grad, b.grad, w.grad), wanted)
    total.backward()
    torch.testing.assert_close((a.grad, b.grad, w.grad), tuple(2 * grad for grad in wanted))
    assert torch.equal(a.detach(), x) and torch.equal(w.detach(), weight), "the operands must stay as they were"


# ---------------------------------------------------------------------------------------------
# Edges


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("rows", (0, 5))
def test_empty_and_all_ignored_batches_give_zero_with_zero_gradients(
    rows: int, normalize: bool, reduction: str
) -> None:
    x, weight, _ = operands(rows, 6, 4)
    y = torch.full((rows,), -100)
    loss, *grads = run(x, weight, y, normalize=normalize, label_smoothing=0.1, chunk=4, reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert (loss == 0).all()
    assert [grad.shape for grad in grads] == [x.shape, weight.shape]
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_one_class_has_no_loss_and_no_gradient(gamma: float, normalize: bool) -> None:
    x, weight, y = operands(5, 1, 4)
    for value in run(x, weight, y, gamma=gamma, normalize=normalize):
        assert (value == 0).all()


def test_without_dimensions_all_classes_are_alike() -> None:
    loss, *grads = run(torch.zeros(3, 0), torch.zeros(7, 0), torch.tensor([0, 3, 6]), gamma=0.0, chunk=2)
    assert loss.item() == pytest.approx(math.log(7), rel=1e-6)
    assert [grad.shape for grad in grads] == [(3, 0), (7, 0)]


@pytest.mark.parametrize("normalize", (False, True))
def test_an_ignored_row_is_as_if_it_were_not_there(normalize: bool) -> None:
    x, weight, y = operands(7, 12, 5)
    kept = torch.tensor([0, 1, 3, 4, 6])
    y[2] = y[5] = -100
    options: dict[str, Any] = {"normalize": normalize, "label_smoothing": 0.1, "chunk": 5}
    loss, x_grad, weight_grad = run(x, weight, y, **options)
    wanted = run(x[kept], weight, y[kept], **options)
    torch.testing.assert_close((loss, x_grad[kept], weight_grad), wanted, rtol=1e-12, atol=1e-15)
    assert (x_grad[[2, 5]] == 0).all()


@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides_and_types_of_labels_change_no_bit(dtype: torch.dtype, normalize: bool) -> None:
    x, weight, y = operands(9, 40, 6, dtype)
    alphas = torch.rand(40)
    options: dict[str, Any] = {"normalize": normalize, "scale": 4.0, "chunk": 16, "reduction": "none"}
    wanted = run(x, weight, y, alpha=alphas, **options)
    turned = [t.t().contiguous().t() for t in (x, weight)]
    wide = [torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]] for t in (x, weight)]
    for a, b in (turned, wide):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        assert not a.is_contiguous() and not b.is_contiguous()
        labels, weights = y.int().repeat_interleave(2)[::2], alphas.repeat_interleave(2)[::2]
        loss = linear_focal_loss(a, b, labels, alpha=weights, **options)
        loss.sum().backward()
        assert a.grad is not None and b.grad is not None
        results = (loss.detach(), a.grad, b.grad)
        assert all(torch.equal(p, q) for p, q in zip(results, wanted, strict=True))


def test_a_fault_in_one_row_is_seen_in_it_alone() -> None:
    x, weight, y = operands(6, 20, 4, torch.float32)
    options: dict[str, Any] = {"normalize": False, "reduction": "none", "chunk": 7}
    plain = run(x, weight, y, **options)
    for fault in (torch.nan, torch.inf):
        broken = x.clone()
        broken[3, 1] = fault
        loss, x_grad, _ = run(broken, weight, y, **options)
        kept = torch.arange(6) != 3
        assert not loss[3].isfinite()
        torch.testing.assert_close((loss[kept], x_grad[kept]), (plain[0][kept], plain[1][kept]))


@pytest.mark.parametrize("normalize", (False, True))
def test_an_ignored_row_may_hold_anything(normalize: bool) -> None:
    x, weight, y = operands(6, 20, 4, torch.float32)
    y[2] = -100
    x[2] = torch.nan
    leaf = x.clone().requires_grad_()
    loss = linear_focal_loss(leaf, weight, y, normalize=normalize, reduction="none")
    loss.sum().backward()
    assert loss.isfinite().all() and loss[2] == 0
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert leaf.grad[2].tolist() == [0, 0, 0, 0]


# Long inner dimensions: the classes for the gradient of x, the rows for that of the weight, the width for the logits.
REPEATED = (
    (64, 3000, 64),
    (8, 60_000, 16),
    (700, 500, 32),
    (1, 50_000, 8),
    (5000, 3, 256),
    (4096, 40, 24),
    (33, 2000, 700),
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("rows", "classes", "dim"), REPEATED)
def test_results_repeat_bit_for_bit_at_any_number_of_threads(
    rows: int, classes: int, dim: int, dtype: torch.dtype
) -> None:
    x, weight, y = operands(rows, classes, dim, dtype)
    try:
        results = []
        for threads in (1, 2, 3, 4, 7, 1):
            torch.set_num_threads(threads)
            results.append(run(x, weight, y, normalize=True, scale=16.0, label_smoothing=0.1, margin=Arc(0.3)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


AS_ON_INTEL = """
import sys, pytest, torch
a, b = torch.randn(8, 60_000), torch.randn(60_000, 16)
products = [(torch.set_num_threads(threads), a @ b)[1] for threads in (1, 2)]
if torch.equal(*products):
    sys.exit("MKL does not divide an inner dimension here")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "bit_for_bit and not float16", sys.argv[1]]))
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch comes without MKL")
def test_results_repeat_where_mkl_divides_inner_dimensions_among_threads(tmp_path: Path) -> None:
    """It does so on Intel's processors, and on others when a library loaded before it says that they are Intel's."""
    source, library = tmp_path / "intel.cpp", tmp_path / "intel.so"
    source.write_text('extern "C" int mkl_serv_intel_cpu_true() { return 1; }')
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    command = [sys.executable, "-c", AS_ON_INTEL, __file__]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "does not divide" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------
# Memory


def test_the_meter_sees_what_the_allocator_gives(tmp_path: Path) -> None:
    def allocate() -> None:
        for _ in range(3):
            torch.ones(1000, 1000).add(1)  # two at a time

    assert 8e6 <= peak_bytes(allocate, tmp_path / "trace.json") < 8.1e6


@pytest.mark.parametrize("normalize", (False, True))
def test_the_logits_are_never_whole(normalize: bool, tmp_path: Path) -> None:
    """Not in the forward pass, nor in the backward pass; the readable version shows that the meter would see them."""
    rows, classes, dim = 256, 60_000, 16
    x, weight, y = operands(rows, classes, dim, torch.float32)
    options: dict[str, Any] = {"normalize": normalize, "scale": 8.0, "label_smoothing": 0.1}
    peak = partial(peak_bytes, trace=tmp_path / "trace.json")
    whole = 4 * rows * classes
    leaves = 2 * 4 * dim * (rows + classes)  # `run` copies the operands, and their gradients are as large
    assert leaves < peak(lambda: run(x, weight, y, **options)) < leaves + whole // 20
    assert peak(lambda: linear_focal_loss(x, weight, y, **options)) < whole // 20
    assert peak(lambda: linear_focal_loss(x, weight, y, chunk=64, **options)) < whole // 100
    assert peak(lambda: run(x, weight, y, plain=True, **options)) > 2 * whole


def test_half_precision_keeps_no_float32_copy(tmp_path: Path) -> None:
    rows, classes, dim = 256, 30_000, 16
    x, weight, y = operands(rows, classes, dim, torch.bfloat16)
    leaves, whole = 2 * 2 * dim * (rows + classes), 2 * rows * classes
    training = peak_bytes(lambda: run(x, weight, y, normalize=True, scale=8.0), tmp_path / "trace.json")
    assert leaves < training < leaves + whole // 5
