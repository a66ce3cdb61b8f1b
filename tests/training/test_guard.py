"""Numbers that are not finite: two bad batches cost two updates, a run that diverges ends with 70 and a sound
checkpoint."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import pytest
import torch

from facefast import evaluate, train
from facefast.data import Batch
from facefast.models import build_model, checkpoint
from facefast.recipe import ImageSpec, IndexFacts, LossConfig, ModelConfig, Phase, Recipe, resolve
from facefast.runtime import files
from facefast.runtime.process import Runtime, World
from facefast.training.guard import culprit, not_finite
from facefast.training.objective import RowCounts
from facefast.training.step import TrainState, train_step
from tests.support import small

ROWS = RowCounts(8, 8)
PLAIN = torch.autocast("cpu", enabled=False)


def make_state(**fields: object) -> TrainState:
    recipe = Recipe(
        image=ImageSpec(size=32, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        phases=(Phase(start="scratch", batch_size=8, lr=0.01, schedule="constant"),),
        **({"precision": "fp32", "ema": 0.5} | fields),  # type: ignore[arg-type]
    )
    state = TrainState(recipe, resolve(recipe, (IndexFacts(80, 4, "f"),), 1), Runtime(World(), torch.device("cpu")))
    torch.manual_seed(1)
    state.enter(0, build_model(recipe.model, 4, recipe.image))
    return state


def make_batch(seed: int, spoilt: float | None = None) -> Batch:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    if spoilt is not None:
        images[3, 0, 5, 5] = spoilt
    return Batch(images, torch.arange(8) % 4, torch.arange(8) + 100)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_two_batches_that_are_not_finite_cost_two_updates_and_nothing_else(
    value: float, optimizer: Literal["sgd", "adamw", "lamb"]
) -> None:
    state = make_state()
    state.recipe = dataclasses.replace(
        state.recipe, phases=(dataclasses.replace(state.recipe.phases[0], optimizer=optimizer),)
    )
    state.enter(0, state.model)
    for number, spoilt in enumerate((value, None, value, None)):
        before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
        stats = train_step(state, [make_batch(number, spoilt)], ROWS)
        assert float(stats[3]) == float(spoilt is not None)
        moved = [
            name
            for name, tensor in state.model.state_dict().items()
            if not name.endswith("num_batches_tracked") and not torch.equal(tensor, before[name])
        ]
        if spoilt is None:
            assert any("running_mean" in name for name in moved) and "head.weight" in moved
        else:
            assert moved == []
            assert stats[[0, 5, 6]].tolist() == [0, 0, 0] and float(stats[7]) == 1  # no loss, no rows, a broken term
    assert not_finite(state.tensors()) == []


def test_who_is_to_blame_is_named_picture_weight_or_layer() -> None:
    state = make_state()
    modes = [module.training for module in state.model.modules()]
    assert culprit(state.model, [make_batch(0, math.nan)], PLAIN) == "the pictures of rows 103 are not finite"
    assert culprit(state.model, [make_batch(0)], PLAIN).startswith(
        "the forward pass is finite on this rank: it is the gradients that overflow"
    )
    with torch.no_grad():
        weight = state.model.get_parameter("backbone.conv1.conv.weight")
        weight.fill_(3e38)
    assert "the first layer that is not finite is backbone.conv1.conv, on rows 100, 101" in culprit(
        state.model, [make_batch(0)], PLAIN
    )
    with torch.no_grad():
        weight[0, 0, 0, 0] = math.nan
    assert culprit(state.model, [make_batch(0)], PLAIN) == "not finite: model backbone.conv1.conv.weight"
    assert [module.training for module in state.model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_search_for_the_culprit_runs_in_the_precision_of_training(dtype: torch.dtype) -> None:
    state = make_state()
    batch = make_batch(0)
    batch = batch._replace(images=batch.images.to(dtype))
    autocast = torch.autocast("cpu", dtype)
    assert culprit(state.model, [batch], autocast).startswith("the forward pass is finite")
    with torch.no_grad():
        state.model.get_parameter("backbone.conv1.conv.weight").fill_(3e38 if dtype == torch.bfloat16 else 6e4)
    assert "the first layer that is not finite is backbone." in culprit(state.model, [batch], autocast)


def test_what_adaface_remembers_survives_a_batch_that_is_not_finite() -> None:
    state = make_state()
    phase = dataclasses.replace(state.recipe.phases[0], loss=LossConfig(margin="ada", margin_size=0.2, scale=8))
    model = dataclasses.replace(state.recipe.model, head="cosine")
    state.recipe = dataclasses.replace(state.recipe, phases=(phase,), model=model)
    state.enter(0, build_model(model, 4, state.recipe.image))
    for spoilt in (math.nan, None):
        train_step(state, [make_batch(0, spoilt)], ROWS)
        assert not_finite(state.tensors()) == []


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


def test_a_run_that_diverges_ends_with_70_and_keeps_its_last_sound_checkpoint(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.format=celeba", f"--data.root={drawn}", f"--out={tmp_path}", "--data.test-fraction=0.5"]
    flags += ["--image.size=32", "--model.embedding=16", "--model.backbone=mobilefacenet_half", "--eval.pairs=12"]
    flags += ["--eval.folds=2", "--precision=fp32", "--log-every=1", "--save-every=1", "--eval.every=100", "--ema=0.5"]
    flags += ["--phases.scratch.batch-size=4", "--phases.scratch.epochs=40", "--phases.scratch.lr=1e30"]
    assert train.main(["scratch", *flags]) == 70
    error = capsys.readouterr().err
    assert "not finite" in error
    status = files.read_json(tmp_path / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 70)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        tensors = {file.stem: checkpoint.read_tensors(path, file.stem) for file in path.glob("*.safetensors")}
        assert not_finite(tensors) == []


def test_a_model_whose_embeddings_are_not_finite_is_no_matter_of_pairs(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small.make_model()
    with torch.no_grad():
        model.get_parameter("backbone.conv1.conv.weight").fill_(math.nan)
    run = small.save_run(tmp_path / "run", model, drawn)
    assert evaluate.main([str(run), f"--data.root={drawn}", "--data.format=celeba"]) == 70
    assert "embeddings of 8 of 8 pictures are not finite" in capsys.readouterr().err
