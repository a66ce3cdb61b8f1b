"""A linear map of the embeddings inside the model's own layers gives what it gives outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.models import FaceModel, build_model, checkpoint
from facefast.models.fold import LinearMap, fold
from facefast.recipe import ImageSpec, ModelConfig

FOLDING = ("mobilefacenet", "insightface_mbf", "iresnet18", "adaface_ir18")


def model_of(backbone: str, size: int = 112, embedding: int = 0) -> FaceModel:
    torch.manual_seed(1)
    model = build_model(ModelConfig(backbone=backbone, embedding=embedding), 0, ImageSpec(size=size)).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # as if it had been trained
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def map_of(model: FaceModel) -> LinearMap:
    generator = torch.Generator().manual_seed(2)
    size = model.embedding_size
    matrix = torch.eye(size, dtype=torch.float64)
    matrix += torch.randn(size, size, generator=generator, dtype=torch.float64) / (2 * size**0.5)
    return LinearMap(matrix, 0.1 * torch.randn(size, generator=generator, dtype=torch.float64))


@torch.no_grad()
def folded(model: FaceModel, mapped: LinearMap) -> tuple[bool, torch.Tensor, torch.Tensor]:
    """Whether no layer was added, the mapped embeddings of pictures [B, D], and what the changed model gives."""
    pictures = torch.randn(8, 3, *model.image.shape, generator=torch.Generator().manual_seed(3))
    wanted = mapped(model.encode(pictures).double())
    inside = fold(model, mapped, wanted.mean(0), wanted.var(0, correction=0))
    return inside, wanted, model.encode(pictures)


@pytest.mark.parametrize("backbone", FOLDING)
def test_map_is_taken_into_the_last_layers_and_agrees_with_the_one_outside(backbone: str) -> None:
    model = model_of(backbone)
    names = set(model.state_dict())
    inside, wanted, given = folded(model, map_of(model))
    assert inside and set(model.state_dict()) == names
    directions = torch.nn.functional.normalize
    assert (directions(given.double(), dim=1) - directions(wanted, dim=1)).abs().max() < 1e-6


def test_layer_is_added_where_the_network_ends_in_pooling_and_model_json_tells(tmp_path: Path) -> None:
    model = model_of("resnet18", size=64)
    inside, wanted, given = folded(model, map_of(model))
    assert not inside
    torch.testing.assert_close(given.double(), wanted, rtol=1e-5, atol=1e-5)
    again = FaceModel.from_config(model.to_config()).eval()
    again.load_state_dict(model.state_dict())
    pictures = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.encode(pictures), model.encode(pictures))
    assert "linear_map" not in model_of("resnet18", size=64).to_config()  # other models' files stay as they are


def test_batchnorm_in_training_mode_starts_from_the_same_embeddings() -> None:
    # Statistics of the mapped embeddings: a later phase that trains BatchNorm does not begin with a jump.
    model = model_of("mobilefacenet")
    pictures = torch.randn(64, 3, *model.image.shape, generator=torch.Generator().manual_seed(4))
    mapped = map_of(model)
    with torch.no_grad():
        wanted = mapped(model.encode(pictures).double())
        fold(model, mapped, wanted.mean(0), wanted.var(0, correction=0))
        model.backbone.get_submodule("linear1.bn").train()
        given = model.encode(pictures)
    torch.testing.assert_close(given.double(), wanted, rtol=1e-3, atol=1e-3)


def test_folding_twice_is_folding_the_product() -> None:
    model = model_of("mobilefacenet")
    mapped = map_of(model)
    _, wanted, _ = folded(model, mapped)
    _, twice, given = folded(model, mapped)
    directions = torch.nn.functional.normalize
    assert (directions(twice, dim=1) - directions(mapped(wanted), dim=1)).abs().max() < 1e-6
    assert (directions(given.double(), dim=1) - directions(twice, dim=1)).abs().max() < 1e-6


def test_map_of_another_size_or_with_numbers_that_are_not_finite_is_refused() -> None:
    model = model_of("mobilefacenet")
    size = model.embedding_size
    numbers = torch.zeros(size)
    with pytest.raises(ValueError, match=f"embeddings have {size} numbers"):
        fold(model, LinearMap(torch.eye(3).double(), torch.zeros(3).double()), numbers, numbers)
    broken = LinearMap(torch.full((size, size), torch.nan).double(), torch.zeros(size).double())
    with pytest.raises(ValueError, match="not finite"):
        fold(model, broken, numbers, numbers)


def test_adapted_checkpoint_is_read_as_any_other(tmp_path: Path) -> None:
    model = model_of("mobilefacenet")
    folded(model, map_of(model))
    documents = {"model": model.to_config()}
    path = checkpoint.save(tmp_path, 0, tensors={"model": model.state_dict()}, documents=documents, best=True, keep=1)
    again = checkpoint.load_model(tmp_path if path is None else path)
    pictures = torch.randint(0, 255, (2, 3, 112, 112), dtype=torch.uint8)
    assert torch.equal(again.embed(pictures), model.embed(pictures))
