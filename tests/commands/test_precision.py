"""One file, one precision: whatever command opens a model runs it in the same number format."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast import audit, evaluate, label, predict
from facefast.evaluation.embed import embed_rows
from facefast.models import FaceModel, load_source, precision
from facefast.models.precision import Precision
from facefast.recipe import DataConfig, ImageSpec, IndexFacts, ModelConfig, Phase, Recipe, resolve, to_json
from facefast.runtime.process import Runtime, World
from facefast.training.begin import settle
from facefast.training.step import TrainState
from tests.support import small

RUN = Runtime(World(), torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def source_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileFaceNet's weights as somebody else's program saves them; nothing but their shapes says what they are."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = FaceModel(ModelConfig("mobilefacenet"), 0, ImageSpec(size=112, width=96, template="none"))
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        with torch.no_grad():
            model.encode(torch.randn(8, 3, 112, 96))
    path = tmp_path_factory.mktemp("weights") / "weights.ckpt"
    torch.save({"net_state_dict": model.backbone.state_dict()}, path)
    return path


def save_run(folder: Path, backbone: str, drawn: Path, **fields: Any) -> Path:
    """A run of a network that never trained, whose recipe has these fields."""
    model = small.make_model(backbone)
    recipe = dataclasses.replace(small.make_recipe(drawn, model), **fields)
    return small.save_as(folder, model, to_json(recipe))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Precision]:
    """What a model is run in, each time that photographs are embedded; this CPU multiplies bfloat16."""
    found: list[Precision] = []

    @functools.wraps(embed_rows)
    def spy(*arguments: Any, **more: Any) -> Any:
        (given,) = (value for value in arguments if isinstance(value, Precision))
        found.append(given)
        return embed_rows(*arguments, **more)

    for module in [module for name, module in sys.modules.items() if name.startswith("facefast.")]:
        if getattr(module, "embed_rows", None) is embed_rows:
            monkeypatch.setattr(module, "embed_rows", spy)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    return found


def with_evaluate(model: Path, drawn: Path, out: Path) -> int:
    return evaluate.main([str(model), f"--data.root={drawn}", "--eval.pairs=12", "--eval.folds=2"])


def with_predict(model: Path, drawn: Path, out: Path) -> int:
    return predict.main([str(model), str(drawn / "img_align_celeba"), f"--embeddings={out / 'vectors.npz'}"])


def with_audit(model: Path, drawn: Path, out: Path) -> int:
    return audit.main([str(model), f"--data.root={drawn}", f"--out={out / 'audit'}", "--pictures=0"])


def with_label(model: Path, drawn: Path, out: Path) -> int:
    return label.main([str(model), f"--data.root={drawn}", f"--out={out / 'labels.csv'}", "--ignore-labels"])


Command = Callable[[Path, Path, Path], int]
COMMANDS: tuple[Command, ...] = (with_evaluate, with_predict, with_audit, with_label)


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_a_mobilefacenet_are_run_in_float32_on_a_cpu_that_has_bfloat16(
    command: Command, source_file: Path, drawn: Path, tmp_path: Path, chosen: list[Precision]
) -> None:
    assert command(source_file, drawn, tmp_path) == 0
    assert [each.name for each in chosen] == ["fp32"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("backbone", "asked", "name"),
    [("resnet18", "auto", "bf16"), ("resnet18", "fp32", "fp32"), ("mobilefacenet", "auto", "fp32")],
)
def test_a_run_is_run_as_it_was_trained(
    command: Command, backbone: str, asked: str, name: str, drawn: Path, tmp_path: Path, chosen: list[Precision]
) -> None:
    run = save_run(tmp_path / "run", backbone, drawn, precision=asked, channels_last=False)
    assert command(run, drawn, tmp_path) == 0
    assert [(each.name, each.channels_last) for each in chosen] == [(name, False)]


def test_training_begins_in_what_the_other_commands_run_the_source_in(
    source_file: Path, drawn: Path, tmp_path: Path, chosen: list[Precision]
) -> None:
    data, model = DataConfig(root=str(drawn)), ModelConfig(source=str(source_file))
    recipe = settle(Recipe(data=data, model=model, phases=(Phase(start="source"),)), load_source(source_file), None, ())
    state = TrainState(recipe, resolve(recipe, (IndexFacts(16, 4, "f"),), 1), RUN)
    with_evaluate(source_file, drawn, tmp_path)
    assert chosen == [state.precision]
