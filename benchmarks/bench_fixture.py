"""Small parts of a training under pytest-benchmark: what is to be followed from commit to commit.

    make bench ARGS="-k fixture"                        # kept in .benchmarks, with the commit
    make bench ARGS="-k fixture --benchmark-compare"    # beside the last run that was kept

Peers, and what needs rounds in which contenders take turns, are in the other files.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facefast.data import FaceIndex, make_loader, make_sampler, read_index
from facefast.data.augment import draw
from facefast.data.drawn import synthetic
from facefast.models import build_model
from facefast.ops import Arc, focal_loss, linear_focal_loss
from facefast.recipe import ImageSpec, ModelConfig
from facefast.recipe.named import STRONG
from facefast.runtime.process import Runtime, World
from facefast.training import pace, throughput

Benchmark = Callable[..., Any]
"""pytest-benchmark's fixture: calls what it is given often enough to time it."""
IMAGE = ImageSpec(size=112, template="arcface")


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Drawn faces of twelve people."""
    with tempfile.TemporaryDirectory() as folder:
        yield synthetic.write(Path(folder) / "drawn", synthetic.DrawnSpec(identities=(12, 0, 0)), progress=False)


@pytest.fixture(scope="module")
def index(root: Path) -> FaceIndex:
    return read_index(root).scanned()


@pytest.mark.benchmark(group="data")
def test_drawing_the_numbers_of_a_batch(benchmark: Benchmark, index: FaceIndex) -> None:
    matrix, *_ = benchmark(draw, index, np.arange(128) % len(index), IMAGE, STRONG, 0, 0)
    assert len(matrix) == 128


@pytest.mark.benchmark(group="data")
def test_a_batch_of_the_loader(benchmark: Benchmark, index: FaceIndex) -> None:
    sampler = make_sampler("epoch", labels=index.labels, batch_size=64, seed=0)
    with make_loader(index, IMAGE, sampler=sampler, augment=STRONG) as loader:
        batches = (batch for epoch in itertools.count() for batch in _epoch(loader, epoch))
        # Ten at a time: one would be a queue's, not the decoder's.
        taken = benchmark.pedantic(lambda: [next(batches) for _ in range(10)], rounds=10, warmup_rounds=2)  # type: ignore[attr-defined]
    assert taken[-1].images.shape == (64, 3, 112, 112)


def _epoch(loader: Any, epoch: int) -> Iterator[Any]:
    loader.set_epoch(epoch)
    yield from loader


@pytest.mark.benchmark(group="data")
def test_reading_an_index(benchmark: Benchmark, root: Path) -> None:
    assert len(benchmark(read_index, root)) == 240


@pytest.mark.benchmark(group="losses")
@pytest.mark.parametrize(("rows", "classes"), [(256, 1000), (256, 10177)])
def test_the_focal_loss_forward_and_backward(benchmark: Benchmark, rows: int, classes: int) -> None:
    logits = torch.randn(rows, classes, requires_grad=True)
    target = torch.randint(0, classes, (rows,))

    def both_ways() -> None:
        logits.grad = None
        focal_loss(logits, target, gamma=2.0).backward()

    benchmark(both_ways)
    assert logits.grad is not None


@pytest.mark.benchmark(group="losses")
def test_a_fused_head_forward_and_backward(benchmark: Benchmark) -> None:
    x, weight = torch.randn(256, 128, requires_grad=True), torch.randn(10177, 128, requires_grad=True)
    target = torch.randint(0, 10177, (256,))

    def both_ways() -> None:
        x.grad = weight.grad = None
        linear_focal_loss(x, weight, target, normalize=True, margin=Arc(0.3), scale=32.0).backward()

    benchmark(both_ways)
    assert weight.grad is not None


@pytest.mark.benchmark(group="networks")
@pytest.mark.parametrize("backbone", ["mobilefacenet", "iresnet50"])
def test_embedding_a_batch(benchmark: Benchmark, backbone: str) -> None:
    model = build_model(ModelConfig(backbone=backbone), 0, IMAGE).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(8, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert len(benchmark(model.encode, images)) == 8


@pytest.mark.benchmark(group="training")
def test_updates_of_a_training(benchmark: Benchmark, root: Path, tmp_path: Path) -> None:
    setting = throughput.Setting("mobilefacenet", 112, 16, 4)
    throughput.write_index(root, tmp_path / "index.npz", 64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = setting.words(tmp_path / "index.npz")
    updates = pace.begun(words, "compute", tmp_path, Runtime(World(), device))
    done = benchmark.pedantic(lambda: next(updates), rounds=10, warmup_rounds=2)  # type: ignore[attr-defined]
    assert done >= setting.line and done % setting.line == 0
