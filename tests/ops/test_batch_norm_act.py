"""Batch normalisation with its activation: kernels against the readable reference and torch's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facefast.ops import batch_norm_act, prelu, reference_norm
from facefast.ops.batch_norm_act import takes

KINDS = ("none", "relu", "prelu", "residual", "residual relu")
# Channels: fewer than lanes of a vector, a multiple of 16 bytes, and more than a block's columns on a GPU.
# Places: one picture's single pixel would have no variance; 19 * 19 leaves a rest in every division into blocks.
SHAPES = ((6, 8, 1, 1), (3, 40, 19, 19), (2, 264, 7, 5), (70, 16, 3, 3))
FORMATS = (torch.channels_last, torch.contiguous_format)


def tensors(shape: tuple[int, ...], kind: str, dtype: torch.dtype, form: torch.memory_format) -> dict[str, Any]:
    """Arguments whose mean is large beside their deviation, a negative slope among them."""
    torch.manual_seed(len(kind) + shape[1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual, grad = ((5 + 2 * torch.randn(3, *shape, dtype=wide)).to(dtype)).unbind()
    weight, bias, mean, var = torch.rand(4, shape[1], dtype=wide).add(0.1).unbind()
    found = {"x": x, "weight": weight, "bias": bias - 0.5}
    if "prelu" in kind:
        found["slope"] = torch.rand(shape[1], dtype=wide) - 0.3
    if "residual" in kind:
        found["residual"] = residual - 5
    for name in ("x", "residual"):
        if name in found:
            found[name] = found[name].contiguous(memory_format=form)
    found |= {"running_mean": mean.clone(), "running_var": var.clone(), "grad": (grad - 5).contiguous()}
    return found


def both_ways(function: Any, given: dict[str, Any], relu: bool, training: bool = True) -> dict[str, Tensor]:
    """Output, gradients and running statistics; the gradient from behind is never channels last."""
    own = {
        name: value.clone(memory_format=torch.preserve_format)
        if name in ("grad", "running_mean", "running_var")
        else value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, value in given.items()
    }
    grad = own.pop("grad")
    y = function(**own, relu=relu, training=training, momentum=0.3, eps=1e-3)
    y.backward(grad)
    found = {f"gradient of {name}": value.grad for name, value in own.items() if value.requires_grad}
    return {"y": y.detach(), "mean": own["running_mean"], "var": own["running_var"], **found}


def torchs(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, **rest: Any) -> Tensor:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, rest["training"], rest["momentum"], rest["eps"])
    if rest.get("residual") is not None:
        y = y + rest["residual"]
    if rest["relu"]:
        y = F.relu(y)
    return y if rest.get("slope") is None else F.prelu(y, rest["slope"].to(y.dtype))


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_double_precision_the_kernels_give_what_torch_and_the_reference_give(
    kind: str, shape: tuple[int, ...], form: torch.memory_format, training: bool
) -> None:
    given = tensors(shape, kind, torch.float64, form)
    assert takes(given["x"], given["weight"], given.get("slope"), residual=given.get("residual"))
    found = both_ways(batch_norm_act, given, "relu" in kind.split(), training)
    for truth in (torchs, reference_norm.batch_norm_act):
        expected = both_ways(truth, given, "relu" in kind.split(), training)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
    assert found["y"].stride() == given["x"].stride()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_as_close_to_the_truth_as_one_rounding(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = tensors(shape, kind, dtype, torch.channels_last)
    wide = {name: value.double() for name, value in given.items()}
    found = both_ways(batch_norm_act, given, "relu" in kind.split())
    expected = both_ways(torchs, wide, "relu" in kind.split())
    unit = torch.finfo(dtype).eps
    for name, truth in expected.items():
        value = found[name].double()
        exact = 16 * torch.finfo(torch.float32).eps  # sums, and values before they are rounded, are single precision
        size = truth.abs().amax()
        # A few values so near 0 that float32 does not tell their side, or a gradient a last bit off, are let be.
        wrong = (value - truth).abs() > unit * truth.abs() + 8 * exact * size + 2.0**-24
        assert wrong.double().mean() <= 0.002, (name, float((value - truth).abs().max()), float(size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", (True, False))
def test_numerical_derivatives_agree_with_the_gradient(kind: str, training: bool) -> None:
    given = tensors((3, 4, 3, 2), kind, torch.float64, torch.channels_last)
    mean, var = given["running_mean"], given["running_var"]
    names = [name for name in ("x", "weight", "bias", "slope", "residual") if name in given]

    def function(*values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True)) | {"running_mean": mean.clone(), "running_var": var.clone()}
        return batch_norm_act(**own, relu="relu" in kind.split(), training=training)  # type: ignore[arg-type]

    torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in names])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("slopes", (1, 24))
def test_prelu_alone_gives_what_torchs_gives(dtype: torch.dtype, form: torch.memory_format, slopes: int) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 5, 24, 9, 7).to(dtype).unbind()
    x = x.contiguous(memory_format=form)
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, 1.0]).to(dtype)
    slope = torch.linspace(-0.2, 1.2, slopes).to(torch.float64 if dtype == torch.float64 else torch.float32)
    answers = []
    for function, theirs in ((prelu, slope), (F.prelu, slope.double()), (reference_norm.prelu, slope)):
        wide = torch.float64 if function is F.prelu else dtype
        one, other = x.to(wide, copy=True).requires_grad_(), theirs.clone().requires_grad_()
        y = function(one, other)
        y.backward(grad.to(wide))
        answers.append((y, one.grad, other.grad))
    for found in (answers[0], answers[2]):
        for mine, truth in zip(found, answers[1], strict=True):
            assert mine is not None and truth is not None
            close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}[dtype]
            torch.testing.assert_close(mine.double(), truth, rtol=close, atol=close)


def test_running_statistics_and_the_count_of_batches_move_as_torchs_do() -> None:
    theirs = nn.BatchNorm2d(24, momentum=0.3)
    mean, var, batches = torch.zeros(24), torch.ones(24), torch.tensor(0)
    for scale in (1.0, 100.0, 1e-3):
        x = scale * (7 + torch.randn(4, 24, 6, 6)).contiguous(memory_format=torch.channels_last)
        theirs(x)
        batch_norm_act(x, None, None, mean, var, batches=batches, momentum=0.3)
    torch.testing.assert_close(mean, theirs.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var, theirs.running_var, rtol=2e-6, atol=0)
    assert theirs.num_batches_tracked is not None
    assert int(batches) == int(theirs.num_batches_tracked) == 3
    batch_norm_act(x, None, None, mean, var, batches=batches, training=False)
    assert int(batches) == 3


def test_a_mean_a_thousand_times_the_deviation_leaves_the_variance_right() -> None:
    x = (1e3 + torch.randn(64, 16, 14, 14, dtype=torch.float64)).float()
    for form in FORMATS:
        _, var = torch.ops.facefast.batch_statistics(x.contiguous(memory_format=form), None, None, None, 0.1)
        torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_an_outlier_in_the_first_place_leaves_the_variance_right() -> None:
    x = torch.randn(64, 16, 14, 14)
    x[0, :, 0, 0] = 1e4
    for form in FORMATS:
        mean, var = torch.ops.facefast.batch_statistics(x.contiguous(memory_format=form), None, None, None, 0.1)
        torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_is_neither_hidden_nor_spread_over_channels() -> None:
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    x[1, 3, 2, 2] = torch.nan
    y = batch_norm_act(x, None, None, None, None, relu=True)
    assert y[:, 3].isnan().all() and y[:, :3].isfinite().all() and y[:, 4:].isfinite().all()
    grad = torch.ones(2, 8, 5, 5)
    x = torch.full((2, 8, 5, 5), -1.0).requires_grad_()
    grad[0, 0, 0, 0] = torch.inf  # behind a ReLU that lets nothing through, as torch's gives 0
    batch_norm_act(x, None, None, torch.zeros(8), torch.ones(8), relu=True, training=False).backward(grad)
    assert x.grad is not None and not x.grad.any()


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    given = tensors((33, 24, 20, 20), "prelu", torch.float32, torch.channels_last)
    answers = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            answers.append(both_ways(batch_norm_act, given, relu=False))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(value, answers[1][name]) for name, value in answers[0].items())


def test_frozen_parameters_get_no_gradient_and_cost_no_pass() -> None:
    given = tensors((4, 8, 5, 5), "prelu", torch.float32, torch.channels_last)
    x = given["x"].requires_grad_()
    y = batch_norm_act(
        x,
        given["weight"],
        given["bias"],
        given["running_mean"],
        given["running_var"],
        slope=given["slope"],
        training=False,
    )
    y.sum().backward()
    assert x.grad is not None and given["weight"].grad is None
    numbers = (None, 1e-5, 2, False, True, False, False)
    own = [given[name] for name in ("running_mean", "running_var", "weight", "bias", "slope")]
    by_x, *rest = torch.ops.facefast.normalise_backward(torch.ones_like(y), x.detach(), *own, *numbers)
    torch.testing.assert_close(by_x, x.grad)
    assert [part.numel() for part in rest] == [0, 0, 0, 0]


def test_other_layouts_and_types_are_computed_by_the_reference() -> None:
    x = torch.randn(4, 6, 8, 8)[:, ::2]
    assert not takes(x) and not takes(torch.randn(4, 6, 8, 8), torch.ones(6, dtype=torch.bfloat16))
    assert not takes(torch.randn(4, 6, 2), residual=torch.randn(4, 6, 2).double())
    batches = torch.tensor(4)
    y = batch_norm_act(x, None, None, None, None, batches=batches)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    assert int(batches) == 5


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 1, 1\): one value a channel has no variance"):
        batch_norm_act(x, None, None, None, None)
    with pytest.raises(ValueError, match="no running statistics to normalise by"):
        batch_norm_act(x, None, None, None, None, training=False)
    with pytest.raises(ValueError, match="relu and slope are both given"):
        batch_norm_act(x, None, None, x[0, :, 0, 0], x[0, :, 0, 0], training=False, relu=True, slope=torch.ones(4))
    with pytest.raises(RuntimeError, match="dense, channels last or contiguous"):
        torch.ops.facefast.normalise_forward(torch.ones(4, 6, 8)[:, ::2], *[None] * 6, 0.0, 0, False)
    with pytest.raises(RuntimeError, match=r"mean must be contiguous \[4\]"):
        torch.ops.facefast.normalise_forward(x, torch.ones(5), *[None] * 5, 0.0, 0, False)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(batch_norm_act(x, None, None, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_act has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ("prelu", "residual relu"))
def test_operators_keep_torchs_contract(kind: str) -> None:
    given = tensors((4, 8, 5, 3), kind, torch.float32, torch.channels_last)
    names = ("running_mean", "running_var", "weight", "bias", "slope")
    own = [given.get(name) for name in names]
    activation = 2 if kind == "prelu" else 1
    ops = torch.ops.facefast
    learned = [t if t is None or i < 2 else t.clone().requires_grad_() for i, t in enumerate(own)]
    inputs = (given["x"].clone().requires_grad_(), *learned, given.get("residual"), 1e-3, activation, True)
    torch.library.opcheck(ops.normalise_forward.default, inputs)
    torch.library.opcheck(ops.batch_statistics.default, (given["x"], own[0], own[1], torch.tensor(0), 0.1))
    output = given["x"].relu() if kind == "residual relu" else None
    grad = torch.ones_like(given["x"])
    torch.library.opcheck(
        ops.normalise_backward.default, (grad, given["x"], *own, output, 1e-3, activation, True, True, True, True)
    )


def test_a_compiled_graph_holds_all_of_it() -> None:
    given = tensors((4, 8, 9, 9), "prelu", torch.float32, torch.channels_last)

    def step(**own: Any) -> Tensor:
        return batch_norm_act(**own) * 2

    compiled = torch.compile(step, fullgraph=True)
    eager, found = both_ways(step, given, relu=False), both_ways(compiled, given, relu=False)
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_gives_what_the_cpu_gives(kind: str, dtype: torch.dtype) -> None:
    given = tensors((32, 64, 28, 28), kind, dtype, torch.channels_last)
    on_gpu = {name: value.cuda() for name, value in given.items()}
    assert takes(on_gpu["x"], on_gpu["weight"], residual=on_gpu.get("residual"))
    expected = both_ways(batch_norm_act, given, "relu" in kind.split())
    found, again = (both_ways(batch_norm_act, on_gpu, "relu" in kind.split()) for _ in range(2))
    for name, value in expected.items():
        assert torch.equal(found[name], again[name]), name
        size = float(value.abs().max())
        wrong = (found[name].cpu().double() - value.double()).abs() > (
            2 * torch.finfo(dtype).eps * value.double().abs() + 2e-5 * size
        )
        assert wrong.double().mean() <= 0.002, name
