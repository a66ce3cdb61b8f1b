"""Named recipes: plain functions returning a `Recipe`. Each docstring has the command, what to expect and how long it
takes.

`train` picks one when none is named: `drawn` without --data.root, `finetune` with a source model, else `scratch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from facefast.recipe import (
    AugmentSpec,
    DataConfig,
    EvalConfig,
    ImageSpec,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
)

MILD = AugmentSpec(crop=0.1, flip=0.5, rotation=5, brightness=0.2, contrast=0.2, saturation=0.2)
STRONG = AugmentSpec(
    crop=0.2,
    crop_ratio=0.1,
    shift=0.05,
    flip=0.5,
    rotation=10,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.05,
    grey=0.05,
    erase=0.2,
)
COSINE_SOFTMAX = LossConfig(margin="cos", margin_size=0.1, scale=24)


def drawn(source: str = "none") -> Recipe:
    """Draws faces, trains a source model on some identities and moves it to others.

    Command: `make train`, or `python -m facefast.train`.
    """
    transfer = Phase(
        name="finetune",
        split="val",
        start="previous",
        epochs=4,
        batch_size=32,
        lr=0.02,
        warmup=0.1,
        loss=LossConfig(),
        augment=MILD,
    )
    return Recipe(
        data=DataConfig(format="synthetic"),
        image=ImageSpec(size=64),
        model=ModelConfig(backbone="mobilefacenet", head="linear", dropout=0.2),
        phases=(
            dataclasses.replace(transfer, name="scratch", start="scratch"),
            Phase(
                name="pretrain",
                split="train",
                start="scratch",
                epochs=4,
                batch_size=64,
                optimizer="adamw",
                lr=2e-3,
                weight_decay=0.05,
                warmup=0.1,
                augment=MILD,
            ),
            transfer,
        ),
        eval=EvalConfig(split="test", every=4),
    )


def finetune(source: str = "none") -> Recipe:
    """Moves a source model to the people in a folder of photographs: class-mean head, small rate, statistics kept.

    Command: `torchrun --standalone --nproc-per-node 2 -m facefast.train --data.root DIR --model.source FILE`.
    """
    return Recipe(
        model=ModelConfig(source=source, head="cosine"),
        phases=(
            Phase(
                name="finetune",
                start="source",
                head_start="class_mean",
                epochs=4,
                batch_size=64,
                lr=0.01,
                warmup=0.1,
                trainable=("last:3",),
                batchnorm="frozen",
                loss=COSINE_SOFTMAX,
                augment=AugmentSpec(flip=0.5),
            ),
        ),
    )


def scratch(source: str = "none") -> Recipe:
    """Trains from random weights: what there is to do without a source model, and the baseline for those who have one.

    Command: `torchrun --standalone --nproc-per-node 2 -m facefast.train --data.root DIR`.
    """
    return Recipe(
        model=ModelConfig(head="cosine"),
        phases=(
            Phase(
                name="scratch",
                start="scratch",
                epochs=20,
                batch_size=64,
                lr=0.1,
                warmup=0.1,
                loss=COSINE_SOFTMAX,
                augment=STRONG,
            ),
        ),
    )


RECIPES: dict[str, Callable[[str], Recipe]] = {f.__name__: f for f in (drawn, finetune, scratch)}


def with_scratch_baseline(recipe: Recipe) -> Recipe:
    """The recipe preceded by its last phase from random weights, on the same pictures and budget."""
    last = recipe.phases[-1]
    baseline = dataclasses.replace(
        last, name="scratch", start="scratch", head_start="random", batchnorm="train", lr=0.1, trainable=("all",)
    )
    return dataclasses.replace(recipe, phases=(baseline, *recipe.phases))
