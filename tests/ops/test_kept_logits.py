"""linear_focal_loss with its logits kept for the backward pass: the same numbers, when, and for which shapes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facefast.ops import linear_focal, linear_focal_loss
from facefast.ops.linear_focal import MEASURED, Measured, keeps_logits
from tests.support.derive import derive
from tests.support.memory import peak_bytes

ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "linear_focal.jsonl"


def operands(rows: int, classes: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and labels."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (rows, classes))
    return F.normalize(x).to(dtype), F.normalize(weight).to(dtype), torch.arange(rows) * 7 % classes


def run(x: Tensor, weight: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The loss, x.grad and weight.grad."""
    return derive(partial(linear_focal_loss, target=y, **options), x, weight)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("chunk", (0, 1, 8, 37))
def test_kept_logits_change_no_bit_of_loss_and_gradients(chunk: int, normalize: bool, dtype: torch.dtype) -> None:
    x, weight, y = operands(7, 37, 5, dtype)
    options: dict[str, Any] = {"normalize": normalize, "scale": 5.0, "label_smoothing": 0.1, "chunk": chunk}
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(x, weight, y, keep=True, **options), run(x, weight, y, **options), strict=True)
    )


def test_kept_logits_serve_every_backward_pass() -> None:
    """They are read, never written over: a second pass finds what the first found."""
    x, weight, y = operands(7, 37, 5, torch.float32)
    leaf = x.clone().requires_grad_()
    loss = linear_focal_loss(leaf, weight, y, normalize=True, scale=5.0, chunk=8, keep=True)
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_logits_are_kept_for_a_backward_pass_alone(tmp_path: Path) -> None:
    """As a whole where one follows, and there alone; without keeping them the meter sees no such matrix."""
    rows, classes = 256, 20_000
    x, weight, y = operands(rows, classes, 16, torch.float32)
    whole = 4 * rows * classes
    peak = partial(peak_bytes, trace=tmp_path / "trace.json")
    assert peak(lambda: linear_focal_loss(x.requires_grad_(), weight, y, keep=True)) > whole
    with torch.no_grad():
        assert peak(lambda: linear_focal_loss(x, weight, y, keep=True)) < whole // 2


class OnGpu:
    """What the choice asks of bfloat16 embeddings on a GPU."""

    device = torch.device("cuda")

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def element_size(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("rows", "classes", "wanted"),
    ((4096, 10_177, False), (1024, 100_000, False), (4096, 100_000, True), (4096, 1_000_000, True), (64, 500, False)),
)
def test_logits_are_kept_where_the_separate_way_was_measured_to_be_faster(
    rows: int, classes: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_focal, "memory_of", lambda device: 80 << 30)
    like = cast(Tensor, OnGpu(rows))
    assert keeps_logits(like, classes) is wanted
    assert not keeps_logits(torch.zeros(rows, 1), classes), "nothing was measured on a CPU"
    turned = tuple(one._replace(fused=one.separate, separate=one.fused) for one in MEASURED)
    assert keeps_logits(like, classes, turned) is not wanted, "another machine's table decides for it"


def test_logits_are_not_kept_where_they_take_more_than_an_eighth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    like, classes = cast(Tensor, OnGpu(4096)), 1_000_000
    for memory, wanted in ((8 * 2 * 4096 * classes, True), (8 * 2 * 4096 * classes - 1, False)):
        monkeypatch.setattr(linear_focal, "memory_of", lambda device, memory=memory: memory)
        assert keeps_logits(like, classes) is wanted


def of_rows(lines: list[dict[str, Any]]) -> set[Measured]:
    """The table that rows of benchmarks/bench_linear_focal.py give: of each shape the last of each contender on an H100
    in bfloat16. Keeping the logits is what is chosen, so its row counts where there is one, before that of the loss
    after a layer."""
    last: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if "H100" in line["machine"].get("gpu", "") and (line["dtype"], line["dim"]) == ("bfloat16", 512):
            last.setdefault((line["rows"], line["classes"]), {})[line["contender"]] = line
    found = set()
    for (rows, classes), of in last.items():
        ways = of["fused"], of.get("kept", of["facefast"])
        times = (round(way["milliseconds"], 3) for way in ways)
        found.add(Measured(rows, classes, *times, *(way["peak_mebibytes"] for way in ways)))
    return found


def test_the_table_that_chooses_is_what_the_last_rows_say() -> None:
    assert set(MEASURED) == of_rows([json.loads(line) for line in ROWS.read_text().splitlines()])


def test_a_later_row_and_that_of_what_is_chosen_count() -> None:
    def row(contender: str, milliseconds: float, gpu: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
        shape = {"rows": 8, "classes": 9, "dim": 512, "dtype": "bfloat16"}
        return {"contender": contender, "milliseconds": milliseconds, "peak_mebibytes": 1.5, **shape} | {
            "machine": {"gpu": gpu}
        }

    lines = [row("fused", 3), row("facefast", 2), row("fused", 4), row("fused", 5, "NVIDIA H200")]
    assert of_rows(lines) == {Measured(8, 9, 4, 2, 1.5, 1.5)}
    assert of_rows([*lines, row("kept", 1.0004)]) == {Measured(8, 9, 4, 1.0, 1.5, 1.5)}
