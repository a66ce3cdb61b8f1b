"""Thirty losses of a small run on the CPU, step by step: three phases with as many moving parts as so few steps hold.

python -m tests.training.golden > tests/training/golden_losses.json    # writes down what this code gives now
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from facefast import train
from facefast.models import FaceModel
from facefast.recipe import AugmentSpec, DataConfig, EvalConfig, ImageSpec, LossConfig, ModelConfig, Phase, Recipe
from facefast.runtime.process import Runtime, World
from tests.support import small

FILE = Path(__file__).with_name("golden_losses.json")
COMMAND = "python -m tests.training.golden > tests/training/golden_losses.json"

EVERYTHING = AugmentSpec(
    crop=0.2,
    crop_ratio=0.1,
    shift=0.05,
    flip=0.5,
    rotation=10,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.05,
    grey=0.1,
    erase=0.2,
)
# Rates are moderate and BatchNorm keeps its statistics (`auto`: there are few pictures), because what one CPU rounds
# otherwise than another must not grow: with statistics of eight pictures two CPUs were a factor apart at step 30.
FIRST = Phase(
    name="first",
    start="source",
    steps=10,
    batch_size=8,
    accumulate=2,
    sampler="balanced",
    lr=0.01,
    weight_decay=0.05,
    warmup=0.2,
    head_lr=5.0,
    clip_grad=1.0,
    trainable=("last:3",),
    batchnorm="auto",
    loss=LossConfig(gamma=1.0, margin="cos", margin_size=0.2, scale=8),
    augment=EVERYTHING,
)
SECOND = Phase(
    name="second",
    head_start="class_mean",
    steps=10,
    batch_size=8,
    optimizer="adamw",
    lr=4e-4,
    weight_decay=2.0,
    schedule="poly",
    warmup=0.2,
    layer_decay=0.8,
    batchnorm="auto",
    mixup=0.2,
    loss=LossConfig(scale=8, label_smoothing=0.1),
    augment=EVERYTHING,
)
THIRD = Phase(
    name="third",
    head_start="previous",
    steps=10,
    batch_size=8,
    sampler="pk",
    pictures_per_identity=2,
    optimizer="lamb",
    lr=5e-3,
    weight_decay=0.5,
    schedule="onecycle",
    trainable=("last:2",),
    batchnorm="auto",
    l2sp=1.0,
    loss=LossConfig(margin="arc", margin_size=0.2, scale=8, triplet=1.0),
    augment=EVERYTHING,
)


PHASES = (FIRST, SECOND, THIRD)


def recipe(root: Path, source: Path, phases: tuple[Phase, ...]) -> Recipe:
    """A run as `train` takes it, on drawn faces."""
    return Recipe(
        data=DataConfig(root=str(root), format="celeba", test_fraction=0.25),
        image=ImageSpec(size=small.SIZE),
        model=ModelConfig(source=str(source), head="cosine"),
        phases=phases,
        eval=EvalConfig(pairs=4, folds=2, every=100, baselines=False),
        seed=7,
        precision="fp32",
        threads=1,
        log_every=1,
        pictures=0,
    )


def make_source() -> FaceModel:
    """A network nearly without kinks. Where an activation is 0 but for rounding, a PReLU's slope decides by how much
    the gradient jumps: with usual slopes two CPUs were a tenth apart within thirty steps."""
    model = small.make_model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.PReLU):
                module.weight.fill_(0.95)
    return model


def losses(folder: Path, phases: tuple[Phase, ...] = PHASES) -> list[float]:
    """The mean loss of each update of a run in an empty folder."""
    run = Runtime(World(), torch.device("cpu"))
    drawn, out = small.draw(folder / "drawn"), folder / "run"
    source = small.save_run(folder / "source", make_source(), drawn)
    out.mkdir()
    assert train.train(recipe(drawn, source, phases), out, "never", run) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the tests have it
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        found = losses(Path(name))
    print(json.dumps([round(loss, 6) for loss in found], indent=0))
