"""The losses as operators of torch: registration, derivatives, compilation, autocast, errors, and life without _C."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import facefast
from facefast.ops import (
    Arc,
    Combined,
    Cos,
    FallbackWarning,
    backend,
    focal_loss,
    linear_focal_loss,
    native,
    reference,
    sigmoid_focal_loss,
)
from facefast.ops.focal import kernel_options
from tests.support.derive import derive

REDUCTIONS = ("none", "mean", "sum")
LABELS = torch.tensor([0, 4, -100, 2, 1, 3])
KINK = 0.05  # distance that numerical differentiation keeps from |cos| = 1


def logits(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale).to(dtype)


def cosines() -> Tensor:
    return (logits() / 4).clamp(-1 + KINK, 1 - KINK)


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(rows, 7, dtype=torch.float64, generator=generator) for rows in (6, 5))
    return x, weight


# Each loss as a function of one matrix [6, 5], for what holds for all of them.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "focal": lambda x, **options: focal_loss(x, LABELS, **options),
    "sigmoid": lambda x, **options: sigmoid_focal_loss(x, torch.eye(6, 5, dtype=x.dtype), **options),
    "linear": lambda x, **options: linear_focal_loss(x, torch.ones(5, 5, dtype=x.dtype).tril(), LABELS, **options),
}
EVERY_LOSS = pytest.mark.parametrize("name", LOSSES)


# ---------------------------------------------------------------------------------------------
# Registration (extension-cpp, test_extension.py: opcheck with and without requires_grad)


def operator_cases() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every operator with arguments that reach its branches."""
    ops = torch.ops.facefast
    x = cosines().float()
    per_row = torch.linspace(0.1, 0.4, 6)
    cases = {}
    for name, options in {
        "plain": {},
        "alphas": {"alpha": torch.rand(5), "label_smoothing": 0.1, "reduction": "none"},
        "margins": {"alpha": torch.rand(6, 1), "margin": Combined(m2=per_row, m3=per_row), "reduction": "sum"},
    }.items():
        settings: dict[str, Any] = {"gamma": 1.5, "alpha": None, "label_smoothing": 0.0, "ignore_index": -100}
        settings |= {"margin": None, "scale": 4.0, "reduction": "mean", **options}
        arguments = kernel_options(x, **settings)
        cases[f"focal {name}"] = (ops.focal_forward.default, (x, LABELS, *arguments))
        a, b = (t.float() for t in operands())
        cases[f"linear {name}"] = (
            ops.linear_focal_forward.default,
            (a, b, LABELS, *arguments, name == "margins", 2, False),
        )
        kept = (a, b, LABELS, *arguments, name == "margins", 2, True)
        cases[f"linear {name}, kept"] = (ops.linear_focal_forward.default, kept)
    targets = torch.eye(6, 5)
    cases["sigmoid plain"] = (ops.sigmoid_focal_forward.default, (x, targets, None, 2.0, 0.25, 1))
    cases["sigmoid alphas"] = (ops.sigmoid_focal_forward.default, (x, targets, torch.rand(5), 2.0, 0.25, 0))
    return cases


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("name", operator_cases())
def test_the_operators_pass_torchs_own_check(name: str, requires_grad: bool) -> None:
    operator, arguments = operator_cases()[name]
    tensors = 2 if name.startswith("linear") else 1
    leaves = [arg.clone().requires_grad_(requires_grad) for arg in arguments[:tensors]]
    results = torch.library.opcheck(operator, (*leaves, *arguments[tensors:]))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", operator_cases())
def test_the_backward_operators_pass_it_too(name: str) -> None:
    forward, arguments = operator_cases()[name]
    kind = name.split()[0]
    tensors = {"focal": 4, "linear": 5, "sigmoid": 3}[kind]
    loss, *state = forward(*arguments)
    backward = getattr(torch.ops.facefast, f"{forward.name().split('::')[1].removesuffix('_forward')}_backward").default
    wanted = (True, False) if kind == "linear" else ()
    passed = (torch.ones_like(loss), *arguments[:tensors], *state, *arguments[tensors:], *wanted)
    results = torch.library.opcheck(backward, passed)
    assert set(results.values()) == {"SUCCESS"}


def test_no_operator_writes_to_its_arguments() -> None:
    for operator, _ in operator_cases().values():
        assert not operator._schema.is_mutable


# ---------------------------------------------------------------------------------------------
# Derivatives


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 2.0, 3.3))
def test_numerical_derivatives_of_the_softmax_loss(gamma: float, reduction: str) -> None:
    for smoothing, alpha in ((0.0, None), (0.2, torch.tensor([0.3, 1.0, 2.0, 0.0, 0.7]))):
        options = {"gamma": gamma, "label_smoothing": smoothing, "alpha": alpha, "reduction": reduction}
        assert torch.autograd.gradcheck(partial(LOSSES["focal"], **options), logits(scale=3).requires_grad_())


@pytest.mark.parametrize("margin", (Cos(0.3), Arc(0.4), Combined(1.3, 0.2, 0.1), Combined(1.0, -0.3, 0.2)), ids=str)
def test_numerical_derivatives_with_margins(margin: Any) -> None:
    function = partial(LOSSES["focal"], margin=margin, scale=5.0, reduction="none")
    assert torch.autograd.gradcheck(function, cosines().requires_grad_())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_numerical_derivatives_of_the_sigmoid_loss(gamma: float, reduction: str) -> None:
    soft = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    soft[0, 0] = torch.nan
    for target in (soft, soft.round()):
        for alpha in (None, 0.25, torch.linspace(0, 1, 5, dtype=torch.float64)):
            function = partial(sigmoid_focal_loss, target=target, gamma=gamma, alpha=alpha, reduction=reduction)
            assert torch.autograd.gradcheck(function, logits(scale=3).requires_grad_())


@pytest.mark.parametrize("normalize", (False, True))
def test_numerical_derivatives_of_the_linear_loss(normalize: bool) -> None:
    margin = Arc(0.3) if normalize else None

    def function(x: Tensor, weight: Tensor) -> Tensor:
        options: dict[str, Any] = {"normalize": normalize, "margin": margin, "scale": 3.0, "label_smoothing": 0.1}
        return linear_focal_loss(x, weight, LABELS, **options, reduction="none", chunk=2)

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in operands()])


@EVERY_LOSS
def test_a_second_derivative_is_refused_in_words(name: str) -> None:
    x = logits().requires_grad_()
    (grad,) = torch.autograd.grad(LOSSES[name](x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; detach its gradient"):
        grad.sum().backward()


@EVERY_LOSS
def test_a_gradient_for_later_use_is_the_gradient(name: str) -> None:
    x = logits().requires_grad_()
    (kept,) = torch.autograd.grad(LOSSES[name](x), x, create_graph=True)
    assert torch.equal(kept.detach(), derive(LOSSES[name], x)[1])


@EVERY_LOSS
def test_without_grad_nothing_is_kept(name: str) -> None:
    x = logits().requires_grad_()
    with torch.no_grad():
        assert LOSSES[name](x).grad_fn is None
    with torch.inference_mode():
        inferred = LOSSES[name](x)
    assert torch.equal(inferred, LOSSES[name](x))
    assert not LOSSES[name](x.detach()).requires_grad


@EVERY_LOSS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstream_gradients_of_every_layout_count(name: str, reduction: str) -> None:
    """quack's stride-0 upstream gradient, Liger's not_last_layer (a factor other than 1), and strided ones."""
    x, function = logits(), partial(LOSSES[name], reduction=reduction)
    like, ones = derive(function, x)
    assert torch.equal(derive(function, x, upstream=torch.ones(()).double().expand(like.shape))[1], ones)
    torch.testing.assert_close(derive(lambda leaf: function(leaf) * 3, x)[1], 3 * ones)
    upstream = torch.randn(like.shape, dtype=like.dtype)
    strided = torch.stack((upstream, upstream), -1)[..., 0]
    assert torch.equal(derive(function, x, upstream=strided)[1], derive(function, x, upstream=upstream)[1])
    if upstream.dim() == 2:
        turned = upstream.t().contiguous().t()
        assert torch.equal(derive(function, x, upstream=turned)[1], derive(function, x, upstream=upstream)[1])
        half = upstream[:, :1].expand(like.shape)
        assert torch.equal(derive(function, x, upstream=half)[1], derive(function, x, upstream=half.contiguous())[1])


def test_a_changed_input_is_noticed_before_the_backward_pass() -> None:
    x = logits().requires_grad_()
    y = x * 1
    loss = focal_loss(y, LABELS)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------
# Compilation and autocast


@EVERY_LOSS
def test_one_graph_serves_every_batch_size(name: str) -> None:
    """torch.compile(fullgraph=True, dynamic=True): forward and backward as they are without it, to the last bit."""
    functions = {
        "focal": lambda x, y: focal_loss(x, y, gamma=1.5, label_smoothing=0.1, alpha=x.detach()[0].abs()),
        "sigmoid": lambda x, y: sigmoid_focal_loss(x, (x.detach() > 0).to(x.dtype), reduction="sum"),
        "linear": lambda x, y: linear_focal_loss(x, x[:5], y, normalize=True, margin=Cos(0.2), scale=8.0),
    }
    eager = functions[name]
    torch.compiler.reset()
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend=count)
    first = 0
    for rows in (6, 9, 31):
        x, y = torch.randn(rows, 8), torch.arange(rows) % 5
        results = [derive(partial(function, y=y), x) for function in (eager, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        first = first or graphs  # the first call may take two attempts: torch tries scalar defaults as tensors
    assert graphs == first > 0
    torch.compiler.reset()


def test_the_default_compiler_takes_margins_per_row() -> None:
    """With AdaFace's kind of margins, and something to fuse before and after; extension-cpp's and kornia's dynamo."""

    def step(x: Tensor, y: Tensor, m: Tensor) -> Tensor:
        cosine = torch.nn.functional.normalize(x)
        return focal_loss(cosine, y, margin=Combined(m2=-m, m3=m), scale=16.0, reduction="none").square().mean()

    torch.compiler.reset()
    x, y, m = torch.randn(6, 5), LABELS.clamp(min=0), torch.linspace(0, 0.4, 6)
    results = [derive(partial(function, y=y, m=m), x) for function in (step, torch.compile(step, fullgraph=True))]
    torch.testing.assert_close(results[1], results[0])
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast_reads_logits_as_they_are(dtype: torch.dtype) -> None:
    """No up-cast, which is what doubles torch's traffic: the loss is float32, the gradient has the logits' type."""
    x, weight = (t.float() for t in operands())
    with torch.autocast("cpu", dtype):
        for function in (LOSSES["focal"], LOSSES["sigmoid"]):
            half = logits(dtype)
            loss, grad = derive(function, half)
            assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
        linear = partial(linear_focal_loss, target=LABELS, normalize=True)
        loss, *grads = derive(lambda a, b: linear(a, weight=b), x, weight)
        assert [t.dtype for t in (loss, *grads)] == [torch.float32] * 3
        wide = derive(LOSSES["focal"], logits())
        assert wide[0].dtype == torch.float64
    narrow, *_ = derive(lambda a, b: linear(a, weight=b), x.to(dtype), weight.to(dtype))
    assert torch.equal(loss, narrow), "under autocast the operands of the product take its type, as in F.linear"


def test_a_loss_scale_passes_through_without_overflow() -> None:
    """apex folds its normaliser in late; here 2^16 times a mean over rows meets one rounding to float16."""
    x = logits(torch.float16, scale=4)
    _, plain = derive(LOSSES["focal"], x.float())
    _, scaled = derive(LOSSES["focal"], x, upstream=torch.tensor(2.0**12))
    torch.testing.assert_close(scaled.float() / 2**12, plain, rtol=2**-10, atol=2.0**-24 / 2**12)


# ---------------------------------------------------------------------------------------------
# Errors

X, Y = torch.randn(6, 5), LABELS.clamp(min=0)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "integer logits": (lambda: focal_loss(X.long(), Y), "logits is torch.int64; it must be float32"),
    "one dimension": (lambda: focal_loss(X[0], Y), r"logits has shape \(5,\); it must be \[N, C\]"),
    "three dimensions": (lambda: focal_loss(X[None], Y), r"logits has shape \(1, 6, 5\)"),
    "no class": (lambda: focal_loss(X[:, :0], Y), "there are 0 classes; at least 1"),
    "float labels": (lambda: focal_loss(X, Y.float()), "target is torch.float32; it must be int64 or int32"),
    "byte labels": (lambda: focal_loss(X, Y.byte()), "target is torch.uint8; it must be int64 or int32"),
    "too few labels": (lambda: focal_loss(X, Y[:3]), r"target has shape \(3,\); it must be \[N\] = \[6\]"),
    "one-hot labels": (lambda: focal_loss(X, torch.eye(6, 5).long()), r"target has shape \(6, 5\)"),
    "labels elsewhere": (lambda: focal_loss(X, Y.to("meta")), "target is on meta and logits on cpu; move"),
    "gamma below 0": (lambda: focal_loss(X, Y, gamma=-0.1), "gamma is -0.1; it must be a finite number of at least 0"),
    "gamma not a number": (lambda: focal_loss(X, Y, gamma=float("nan")), "gamma is nan"),
    "scale 0": (lambda: focal_loss(X, Y, scale=0.0), "scale is 0.0; it must be a finite number above 0"),
    "all smooth": (lambda: focal_loss(X, Y, label_smoothing=1.0), r"label_smoothing is 1.0; it must lie in \[0, 1\)"),
    "reduction": (lambda: focal_loss(X, Y, reduction="xyz"), "reduction is 'xyz'; it must be 'none', 'mean' or 'sum'"),
    "alpha below 0": (lambda: focal_loss(X, Y, alpha=-1.0), "alpha is -1.0; it must be a finite number of at least 0"),
    "alpha's length": (lambda: focal_loss(X, Y, alpha=torch.ones(4)), r"alpha has shape \(4,\); .* \[C\] = \[5\]"),
    "alpha by row": (lambda: focal_loss(X, Y, alpha=torch.ones(5, 1)), r"alpha has shape \(5, 1\); .* \[6, 1\]"),
    "alpha's type": (lambda: focal_loss(X, Y, alpha=torch.ones(5).long()), "alpha is torch.int64; it must be floating"),
    "alpha's gradient": (lambda: focal_loss(X, Y, alpha=torch.ones(5, requires_grad=True)), "alpha requires grad"),
    "alpha elsewhere": (lambda: focal_loss(X, Y, alpha=torch.ones(5, device="meta")), "alpha is on meta"),
    "margin's rows": (lambda: focal_loss(X, Y, margin=Cos(torch.ones(4))), "additive margin has 4 rows .* logits 6"),
    "sigmoid shapes": (lambda: sigmoid_focal_loss(X, X[:3]), r"target has shape \(3, 5\) and logits \(6, 5\)"),
    "sigmoid alpha": (lambda: sigmoid_focal_loss(X, X > 0, alpha=1.5), r"alpha is 1.5; it must lie in \[0, 1\]"),
    "sigmoid alphas": (lambda: sigmoid_focal_loss(X, X > 0, alpha=torch.ones(6)), r"alpha has shape \(6,\)"),
    "sigmoid mask": (lambda: sigmoid_focal_loss(X, X > 0, mask=X), "mask is torch.float32 .* it must be bool"),
    "sigmoid reduction": (lambda: sigmoid_focal_loss(X, X > 0, reduction="xyz"), "reduction is 'xyz'"),
    "linear shapes": (lambda: linear_focal_loss(X, X[:, :4], Y), r"x has shape \(6, 5\) and weight \(6, 4\)"),
    "linear types": (lambda: linear_focal_loss(X, X.double(), Y), "x is torch.float32 .* weight torch.float64"),
    "linear chunk": (lambda: linear_focal_loss(X, X, Y, chunk=-1), "chunk is -1; it must be at least 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_what_is_allowed(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("label", (-1, 5, -(2**63), 2**63 - 1))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", (focal_loss, reference.focal_loss), ids=("native", "reference"))
def test_a_label_that_is_no_class_is_an_index_error(
    function: Callable[..., Tensor], reduction: str, label: int
) -> None:
    """Liger's out_of_bounds_target; mmcv lets C pass and reads past the row, flash-attn calls it a loss of 0."""
    target = LABELS.clone()
    target[4] = label
    with pytest.raises(IndexError, match=rf"label {label} of row 4 is outside \[0, 5\) and is not ignore_index -100"):
        function(X, target, reduction=reduction)


def test_the_linear_loss_checks_labels_as_well() -> None:
    with pytest.raises(IndexError, match=r"label 6 of row 1 is outside \[0, 6\)"):
        linear_focal_loss(X, X, torch.tensor([0, 6, 0, 0, 0, 0]))


@pytest.mark.parametrize("function", (sigmoid_focal_loss, reference.sigmoid_focal_loss), ids=("native", "reference"))
def test_a_sigmoid_target_outside_0_to_1_is_an_index_error(function: Callable[..., Tensor]) -> None:
    with pytest.raises(IndexError, match=r"target -0\.5.* of element 7 is outside \[0, 1\]; NaN marks an unknown"):
        function(X, torch.zeros(6, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-0.5)))


def test_the_operators_themselves_trust_no_caller() -> None:
    """Whoever calls torch.ops.facefast directly gets an error rather than a read outside its tensors."""
    forward, arguments = operator_cases()["focal plain"]
    x, target, *rest = arguments
    for wrong in ((x, target[:3], *rest), (x[None], target, *rest), (x.t(), target[:5], *rest)):
        with pytest.raises(RuntimeError, match="must be|contiguous"):
            forward(*wrong)
    with pytest.raises(RuntimeError, match="alphas must be"):
        forward(x, target, torch.ones(3), *rest[1:])
    with pytest.raises(RuntimeError, match="margins must be"):
        forward(x, target, None, torch.ones(6, 3, dtype=torch.float64), *rest[2:])


# ---------------------------------------------------------------------------------------------
# Without the kernels


def test_the_kernels_are_built_here() -> None:
    assert backend("cpu") == "native"
    assert backend("meta") == "reference"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@EVERY_LOSS
def test_plain_torch_computes_the_same(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = partial(LOSSES[name], gamma=1.5, reduction=reduction)
    natively = derive(function, logits(scale=3))
    monkeypatch.setattr(native, "DEVICES", frozenset())
    assert backend("cpu") == "reference"
    torch.testing.assert_close(derive(function, logits(scale=3)), natively, rtol=1e-10, atol=1e-14)


def test_a_stale_or_missing_module_warns_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "KERNEL_VERSION", 99)
    with pytest.warns(FallbackWarning, match="is of version .*, not 99; .* rebuild with: python setup.py"):
        assert native._load() == frozenset()
    monkeypatch.setitem(sys.modules, "facefast._C", None)
    monkeypatch.delattr(facefast, "_C")
    with pytest.warns(FallbackWarning, match="facefast._C cannot be loaded .* plain PyTorch, slower"):
        assert native._load() == frozenset()
    monkeypatch.setenv("FACEFAST_REQUIRE_NATIVE", "1")
    with pytest.raises(ImportError, match="FACEFAST_REQUIRE_NATIVE is 1"):
        native._load()


def test_a_device_without_kernels_warns_once(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(native, "_warned", set())
    with pytest.warns(FallbackWarning, match="has no kernels for meta"):
        assert not native.covers(torch.empty(0, device="meta"))
    assert not native.covers(torch.empty(0, device="meta"))
    assert not recwarn.list


def test_the_losses_work_in_a_process_that_has_no_kernels() -> None:
    program = """
import sys, warnings
sys.modules["facefast._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, facefast.ops as ops
assert [w.category for w in caught if issubclass(w.category, ops.FallbackWarning)], caught
assert ops.backend() == "reference"
print(ops.focal_loss(torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([1])).item())
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(facefast.__file__).parents[1],
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(focal_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([1])).item())
