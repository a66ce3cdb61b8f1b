"""A few drawn people and models that never trained: enough for every command that takes a MODEL."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from facefast.data.drawn import synthetic
from facefast.models import FaceModel, build_model, checkpoint
from facefast.recipe import DataConfig, EvalConfig, ImageSpec, ModelConfig, Phase, Recipe, to_json
from tests.support.pictures import encode, garbled_png, smooth_picture

NAMES = ("1", "2", "3", "4")
"""The people of `draw`, as the CelebA reader names them."""
SIZE = 32


def draw(folder: Path) -> Path:
    """Four people with four pictures each, in CelebA's layout."""
    spec = synthetic.DrawnSpec(identities=(4, 0, 0), pictures=4, seed=3)
    return synthetic.write(folder, spec, processes=1, progress=False)


def make_model(
    backbone: str = "mobilefacenet", classes: tuple[str, ...] = NAMES, template: str = "arcface"
) -> FaceModel:
    """Random weights in evaluation mode, whose BatchNorm has seen pictures: two pictures give two embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = ModelConfig(backbone=backbone, embedding=16)
        model = build_model(config, len(classes), ImageSpec(size=SIZE, template=template), classes)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = None
        with torch.no_grad():
            model.encode(torch.randn(16, 3, SIZE, SIZE))
    return model.eval()


def make_uneven_model() -> FaceModel:
    """A model none of whose PReLUs are alike, and some of whose slopes are above 1, as training leaves them."""
    model = make_model()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.PReLU):
                module.weight.copy_(0.25 + 0.1 * torch.randn(module.weight.shape, generator=generator))
                module.weight[3] = 1.5
    return model.eval()


def make_recipe(root: Path, model: FaceModel) -> Recipe:
    """As if `model` had been trained on two of four pictures of each person."""
    return Recipe(
        data=DataConfig(root=str(root), format="celeba", test_fraction=0.5),
        image=model.image,
        model=dataclasses.replace(model.config, source="none"),
        phases=(Phase(start="scratch"),),
        eval=EvalConfig(pairs=12, folds=2),
        seed=7,
        precision="fp32",
    )


def save_run(folder: Path, model: FaceModel, root: Path) -> Path:
    """A run folder with one checkpoint of `model`."""
    return save_as(folder, model, to_json(make_recipe(root, model)))


def save_as(folder: Path, model: FaceModel, recipe: object) -> Path:
    """A run folder with one checkpoint of `model`, and this for a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, documents = {"model": model.state_dict()}, {"model": model.to_config(), "recipe": recipe}
    checkpoint.save(folder, 1, tensors=tensors, documents=documents, best=True, keep=1)
    return folder


PEOPLE = ("ann", "bo", "cy")
"""The people of `photographs`."""
BROKEN = 4
"""The row of `photographs` that cannot be decoded, bo's second picture; its header is sound."""


def photographs(root: Path) -> Path:
    """Three people with three pictures each of the models' own size, a folder a person and named as in LFW, without
    loss."""
    for who, name in enumerate(PEOPLE):
        (root / name).mkdir(parents=True)
        for number in (1, 2, 3):
            row = 3 * who + number - 1
            picture = encode(smooth_picture(SIZE, SIZE, 10 * who + number), "PNG")
            (root / name / f"{name}_{number:04}.png").write_bytes(garbled_png() if row == BROKEN else picture)
    return root
