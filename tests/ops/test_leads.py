"""Which rows a head names rightly, told by linear_focal_loss; and which heads take that loss."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facefast.ops import Arc, linear_focal_loss, native, reference
from facefast.ops.linear_focal import MEASURED, fused_type, linear_focal_leads
from tests.support.derive import derive

OPTIONS: dict[str, Any] = {
    "normalize": True,
    "margin": None,
    "scale": 8.0,
    "gamma": 1.5,
    "alpha": None,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "reduction": "sum",
    "chunk": 0,
    "keep": None,
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def operands(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x near its label's weight in every other row, labels of which every fifth does not count."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(classes, 8, generator=generator)
    y = torch.randint(classes, (rows,), generator=generator)
    x = torch.randn(rows, 8, generator=generator)
    x[::2] = weight[y[::2]] + 0.2 * x[::2]
    y[::5] = -100
    return x.to(dtype), weight.to(dtype), y


@pytest.fixture(params=("native", "plain"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Computed by the kernels, and by plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(native, "DEVICES", frozenset())
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_leads_where_its_class_has_the_greatest_cosine_whatever_the_margin(way: str, dtype: torch.dtype) -> None:
    x, weight, y = operands(60, 37, dtype)
    # Far enough from a tie for every rounding: exactness is tested on integers below.
    cosines = F.normalize(x.double()) @ F.normalize(weight.double()).T
    first, second = cosines.topk(2, dim=1).values.unbind(1)
    sure = first - second > 0.02
    wanted = (cosines.argmax(1) == y) & (y >= 0)
    assert 10 < int((wanted & sure).sum()) < int(sure.sum()) - 10
    # A margin of 0.5 puts many rows behind: it must not count here.
    for margin, smoothing, chunk, keep in itertools.product((None, Arc(0.5)), (0.0, 0.1), (0, 1, 8, 37), (False, True)):
        options = OPTIONS | {"margin": margin, "label_smoothing": smoothing, "chunk": chunk, "keep": keep}
        found = linear_focal_leads(x.requires_grad_(), weight, y, **options).leads
        assert found.dtype == torch.bool and torch.equal(found[sure], wanted[sure]), (way, margin, chunk)
        assert not found[y < 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tie_is_no_lead_and_the_next_number_is_one(way: str, dtype: torch.dtype) -> None:
    x = torch.eye(3).to(dtype)
    weight = torch.tensor([[4.0, 0, 1], [4, 1, 0], [1, 1, 1], [-2, 2, 0]]).to(dtype)
    options = OPTIONS | {"normalize": False}
    columns = (x @ weight.T).tolist()
    assert columns == [[4, 4, 1, -2], [0, 1, 1, 2], [1, 0, 1, 0]]
    for y, wanted in (([0, 3, 2], [False, True, False]), ([1, 2, 0], [False, False, False])):
        assert linear_focal_leads(x, weight, torch.tensor(y), **options).leads.tolist() == wanted, way
    weight[1, 0] = float(torch.nextafter(torch.tensor(4, dtype=dtype), torch.tensor(0, dtype=dtype)))
    assert linear_focal_leads(x, weight, torch.tensor([0, 2, 2]), **options).leads.tolist() == [True, False, False]
    alone = linear_focal_leads(x, weight[3:], torch.tensor([0, -100, 0]), **options).leads  # -2 and 0, before nobody
    assert alone.tolist() == [True, False, True]
    weight[1] = torch.nan  # nobody leads where nothing can be compared
    for y in ([0, 3, 2], [1, 1, 1]):
        assert linear_focal_leads(x, weight, torch.tensor(y), **options).leads.tolist() == [False] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_and_its_gradients_are_those_without_the_leads_to_the_last_bit(way: str, dtype: torch.dtype) -> None:
    x, weight, y = operands(20, 37, dtype)
    both = [
        derive(lambda a, b: linear_focal_leads(a, b, y, **OPTIONS).loss, x, weight),
        derive(partial(linear_focal_loss, target=y, **OPTIONS), x, weight),
    ]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), way


def test_it_is_one_graph_to_the_compiler() -> None:
    x, weight, y = operands(20, 37, torch.float32)
    compiled = torch.compile(lambda *of: linear_focal_leads(*of, **OPTIONS), backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x.requires_grad_(), weight, y), linear_focal_leads(x, weight, y, **OPTIONS), strict=True):
        assert torch.equal(a, b)


def test_statistics_of_plain_pytorch_are_the_kernels() -> None:
    x, weight, y = operands(20, 37, torch.float64)
    plain = reference.block_statistics(x, weight, y, 0.0, 8.0, -100, 37, True).stats
    kernels = torch.ops.facefast.block_statistics(x, weight, y, 0.0, 8.0, -100, 37, True, 0)[0]
    torch.testing.assert_close(kernels, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_finds_the_same_leads(dtype: torch.dtype, keep: bool) -> None:
    x, weight, y = operands(60, 2051, dtype)
    first, second = (F.normalize(x.double()) @ F.normalize(weight.double()).T).topk(2, dim=1).values.unbind(1)
    sure = first - second > 0.02
    for margin, chunk in itertools.product((None, Arc(0.5)), (0, 8, 500)):
        options = OPTIONS | {"margin": margin, "chunk": chunk, "keep": keep}
        wanted = linear_focal_leads(x, weight, y, **options).leads
        found = linear_focal_leads(x.cuda().requires_grad_(), weight.cuda(), y.cuda(), **options).leads
        assert torch.equal(found.cpu()[sure], wanted[sure]) and wanted[sure].any()


class OnGpu:
    """What the choice asks of embeddings on a GPU."""

    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_sixteen_bits_of_many_classes_on_a_gpu_are_fused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(dtype: torch.dtype, classes: int) -> torch.dtype | None:
        return fused_type(cast(Tensor, OnGpu(dtype)), classes)

    monkeypatch.setattr(native, "DEVICES", frozenset({"cpu", "cuda"}))
    fewest = min(known.classes for known in MEASURED)
    for dtype in (torch.bfloat16, torch.float16):
        assert chosen(dtype, fewest) == chosen(dtype, 1_000_000) == dtype
        assert chosen(dtype, fewest // 2) is None, "nothing so small was measured"
        assert fused_type(torch.zeros(4, 8, dtype=dtype), fewest) is None, "nothing was measured on a CPU"
    assert chosen(torch.float32, fewest) is None and chosen(torch.float64, fewest) is None
    with monkeypatch.context() as under_autocast:  # torch refuses to enable it without a GPU
        under_autocast.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        under_autocast.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
        assert chosen(torch.float32, fewest) == torch.float16
        assert chosen(torch.float64, fewest) is None, "autocast leaves float64 as it is"
    monkeypatch.setattr(native, "DEVICES", frozenset({"cpu"}))
    assert chosen(torch.bfloat16, fewest) is None, "without kernels for it"
