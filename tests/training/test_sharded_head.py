"""A head whose classes lie on several ranks beside one that every rank has whole: the same training, the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from facefast import train
from facefast.data.drawn import synthetic
from facefast.models import checkpoint
from tests.support.ranks import run_ranks

IDENTITIES = 7
"""A number that neither 2 nor 4 divides."""
TINY = (
    "scratch",
    "--data.format=celeba",
    "--image.size=32",
    "--model.backbone=mobilefacenet_half",
    "--model.batchnorm=sync",
    "--model.head=cosine",
    "--model.embedding=16",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--precision=fp32",
    "--log-every=1",
    "--pictures=0",
    "--phases.scratch.batch-size=16",
    "--phases.scratch.steps=6",
    "--phases.scratch.clip-grad=1",
    "--phases.scratch.schedule=constant",
    "--lr=1e-5",  # a random network amplifies what fp32 rounds; the head, which it does not, learns a lot faster
    "--phases.scratch.head-lr=300000",
    "--phases.scratch.loss.margin-size=0.3",
    "--phases.scratch.loss.scale=8",
)
ARC = ("--phases.scratch.loss.margin=arc",)
SHARD = "--model.shard-head=ranks"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(IDENTITIES, 0, 0), pictures=8, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def training(rank: int, root: str, out: str, *more: str) -> int:
    return train.main([*TINY, f"--data.root={root}", f"--out={out}", *more])


def trained(ranks: int, drawn: Path, out: Path, *more: str) -> Path:
    assert run_ranks(training, ranks, str(drawn), str(out), *more) == [0] * ranks
    return out


def losses(run: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["split"] == "train"])


def measured(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] not in ("train",) and "top1" in line][-1]
    return {name: last[name] for name in ("loss", "top1", "top5", "ece", "per_class")}


def tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    path = checkpoint.of_step(run, step)
    return {f"{stem} {name}": t for stem in ("model", "optimizer", "ema")
            for name, t in checkpoint.read_tensors(path, stem).items()}  # fmt: skip


def assert_close(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """All tensors of two runs' last checkpoints."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "more",
    [
        (*ARC, "--ema=0.5", "--phases.scratch.accumulate=2"),
        ("--phases.scratch.loss.margin=ada", "--phases.scratch.loss.gamma=1.5", "--phases.scratch.optimizer=adamw",
         "--phases.scratch.loss.class-weights=effective", "--phases.scratch.loss.label-smoothing=0.1",
         "--phases.scratch.head-lr=3000"),
    ],
    ids=("arc sgd accumulate ema", "ada focal adamw weights smoothing"),
)  # fmt: skip
def test_ranks_that_share_a_head_train_as_ranks_that_have_it_whole(
    more: tuple[str, ...], drawn: Path, tmp_path: Path
) -> None:
    """Losses, weights, the optimiser's state, averages, and what is measured."""
    still = tensors(trained(1, drawn, tmp_path / "still", *more, "--lr=1e-20"))["model head.weight"]
    for ranks in (1, 2, 4):
        whole = trained(ranks, drawn, tmp_path / f"{ranks}-whole", *more)
        assert (tensors(whole)["model head.weight"] - still).norm(dim=1).min() > 0.01  # each class was trained
        shared = trained(ranks, drawn, tmp_path / str(ranks), *more, SHARD)
        torch.testing.assert_close(losses(shared), losses(whole), rtol=2e-5, atol=0)
        assert_close(shared, whole)
        for name, value in measured(whole).items():
            assert measured(shared)[name] == pytest.approx(value, rel=1e-3), name
        model = checkpoint.load_model(shared)
        assert model.head is not None and len(model.head.weight) == IDENTITIES
