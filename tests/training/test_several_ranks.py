"""Trainings of several ranks: what must be alike, and what they compute beside one process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from facefast import train
from facefast.data import FaceIndex
from facefast.data.drawn import synthetic
from facefast.recipe import IndexFacts, ModelConfig, Phase, Recipe, resolve
from facefast.runtime import files
from facefast.runtime.process import Runtime, World
from facefast.training.begin import batchnorm_advice
from facefast.training.step import TrainState
from tests.support.ranks import run_ranks

TINY = (
    "scratch",
    "--data.format=celeba",
    "--image.size=32",
    "--model.backbone=mobilefacenet_half",
    "--eval.pairs=12",
    "--eval.folds=2",
    "--precision=fp32",
    "--log-every=1",
    "--pictures=0",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(8, 0, 0), pictures=8, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


def training(rank: int, root: str, out: str, *more: str) -> int:
    return train.main([*TINY, f"--data.root={root}", f"--out={out}", *more])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_with_synchronised_batchnorm_one_and_two_ranks_have_the_same_loss(drawn: Path, tmp_path: Path) -> None:
    """Twenty updates with augmentation, over ends of epochs that fill a batch with other pictures (48 pictures, batches
    of 20)."""
    # So low a rate, because at a usual one a random network amplifies what fp32 rounds a thousandfold in a few updates:
    # another memory format on one process does as much.
    usual = ["--phases.scratch.batch-size=20", "--phases.scratch.steps=20", "--lr=1e-5", "--phases.scratch.clip-grad=1"]
    usual += ["--model.backbone=resnet18"]
    found = {}
    for world, mode in ((1, "rank"), (2, "sync"), (2, "rank")):
        out = tmp_path / f"{world}-{mode}"
        arguments = (str(drawn), str(out), *usual, f"--model.batchnorm={mode}")
        assert run_ranks(training, world, *arguments) == [0] * world
        found[world, mode] = torch.tensor(losses(out))
        plan = files.read_json(out / "plan.json")["phases"][0]
        assert (plan["batch_per_rank"], plan["batchnorm_batch"]) == (
            20 // world,
            10 if (world, mode) == (2, "rank") else 20,
        )
    one = found[1, "rank"]
    assert len(one) == 20
    torch.testing.assert_close(found[2, "sync"], one, rtol=1e-5, atol=0)
    assert (found[2, "rank"] / one - 1).abs().max() > 0.01


def another_on_one_rank(rank: int, root: str, out: str, *more: str) -> int:
    return training(rank, root, out, *(more if rank == 1 else ()))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--seed=3", "seed is 3 on rank 1"),
        ("--epochs=7", "phases.0.epochs is 7.0 on rank 1"),
        ("--resume=never", "resume is 'never' on rank 1"),
    ],
)
def test_another_option_on_one_rank_ends_both_with_64(drawn: Path, tmp_path: Path, more: str, said: str) -> None:
    assert run_ranks(another_on_one_rank, 2, str(drawn), str(tmp_path / "run"), more) == [64, 64]
    status = files.read_json(tmp_path / "run" / "status.json")
    assert status["exit_code"] == 64 and said in status["error"]
    assert not (tmp_path / "run" / "plan.json").exists()


def with_a_stale_index(rank: int, root: str, out: str, how: str) -> int:
    load, digest = FaceIndex.load, files.sha256
    if rank == 1 and how == "rows":
        FaceIndex.load = lambda path: load(path).select(range(8, 64))  # type: ignore[method-assign]
    if rank == 1 and how == "file":
        files.sha256 = lambda path: "0" if path.name == "index.npz" else digest(path)
    return training(rank, root, out)


@pytest.mark.parametrize(
    ("how", "said"), [("rows", "photographs of phase scratch.training is"), ("file", "index.npz is '0' on rank 1")]
)
def test_a_stale_index_on_one_rank_ends_both_with_65(drawn: Path, tmp_path: Path, how: str, said: str) -> None:
    assert run_ranks(with_a_stale_index, 2, str(drawn), str(tmp_path / "run"), how) == [65, 65]
    status = files.read_json(tmp_path / "run" / "status.json")
    assert status["exit_code"] == 65 and said in status["error"]


def state_of(world: int, whose: Literal["rank", "sync"], policy: Literal["train", "frozen"] = "train") -> TrainState:
    phase = Phase(start="scratch", batch_size=32, batchnorm=policy)
    recipe = Recipe(model=ModelConfig(backbone="mobilefacenet", batchnorm=whose), phases=(phase,), precision="fp32")
    run = Runtime(World(0, world, 0, world), torch.device("cpu"))
    return TrainState(recipe, resolve(recipe, (IndexFacts(80, 4, "f"),), world), run)


@pytest.mark.parametrize(
    ("world", "whose", "policy", "noted"),
    [
        (2, "rank", "train", True),
        (2, "sync", "train", False),
        (1, "rank", "train", False),
        (2, "rank", "frozen", False),
    ],
)
def test_a_small_batch_on_each_rank_is_noted_where_batchnorm_takes_statistics_of_it(
    world: int, whose: Literal["rank", "sync"], policy: Literal["train", "frozen"], noted: bool
) -> None:
    state = state_of(world, whose, policy)
    state.model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))  # type: ignore[assignment]
    state.model.train(policy == "train")
    found = list(batchnorm_advice(state))
    assert bool(found) == noted
    if noted:
        assert "BatchNorm sees 16 pictures on each of 2 processes, where one process would see 32" in found[0]
        assert "--model.batchnorm sync" in found[0]


def test_synchronised_batchnorm_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match="model.batchnorm sync has no effect: every phase has batchnorm frozen"):
        state_of(2, "sync", "frozen")
    recipe = Recipe(
        model=ModelConfig(source="w.pt", batchnorm="sync"), phases=(Phase(start="source", batchnorm="auto"),)
    )
    plan = resolve(recipe, (IndexFacts(80, 4, "f"),), 2)
    with pytest.raises(ValueError, match="below 100 pictures an identity"):
        TrainState(recipe, plan, Runtime(World(0, 2, 0, 2), torch.device("cpu")))
    many = dataclasses.replace(plan, phases=(dataclasses.replace(plan.phases[0], num_rows=4000),))
    assert TrainState(recipe, many, Runtime(World(0, 2, 0, 2), torch.device("cpu"))).plan is many
