"""A model as a recipe describes it, with the weights of a source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from facefast.models import provenance
from facefast.models.face import FaceModel
from facefast.models.weights.source import Source, apply_source, load_source
from facefast.recipe import AttributeSpec, ImageSpec, ModelConfig
from facefast.runtime.process import World

COUNTERS = 1 << 20
LARGEST_NETWORK = 1 << 28
"""Numbers in a backbone; a ResNet-200 has half as many."""
DEFAULT_BACKBONE = "mobilefacenet"


def build_model(
    config: ModelConfig,
    num_classes: int,
    image: ImageSpec | None = None,
    class_names: Sequence[str] = (),
    source: Source | None = None,
    attributes: Sequence[AttributeSpec] = (),
    world: World | None = None,
) -> FaceModel:
    """A model as a recipe describes it, with the source's weights where there is one.

    Args:
        config: fields that the source decides may be left at their defaults.
        num_classes: identities; 0 builds a model without head, for embeddings only.
        image: the pictures that it will see; what is left open is the source's, or the usual.
        class_names: one per class, or none.
        source: `config.source`, already loaded.
        attributes: what it predicts beside names.
        world: the processes that share the classes of a cosine head; None has them all here.

    Returns:
        The model, in training mode; its `report` says what became of the source's weights.

    Raises:
        ValueError: the source does not fit or was trained on other pictures, or its architecture follows neither from
            its tensors nor from `config.backbone`.
    """
    if source is None and config.source != "none":
        source = load_source(config.source, config.backbone)
    image = image or ImageSpec()
    if source is None:
        backbone = DEFAULT_BACKBONE if config.backbone == "auto" else config.backbone
        config = dataclasses.replace(config, backbone=backbone)
        model = FaceModel(config, num_classes, image.settled(), class_names, attributes=attributes, world=world)
        model.provenance = provenance.of_run(None, config.source_licence)
        return model
    backbone = source.backbone if config.backbone == "auto" else config.backbone
    if not backbone:
        raise ValueError(
            f"{source.name}: its architecture is none that facefast recognises (tensors: "
            f"{', '.join(list(source.state)[:4])}, ...); name it with model.backbone"
        )
    config = dataclasses.replace(config, backbone=backbone, embedding=config.embedding or source.embedding)
    image = image.settled(source.image, source.fixed)
    # Counters are no weights, and older files have none; a partial source may lack a large network, and no more.
    held = sum(tensor.numel() for tensor in source.state.values()) + (LARGEST_NETWORK if config.partial else COUNTERS)
    require_numbers(lambda: FaceModel(config, 0, image), held, source.name)
    model = FaceModel(config, num_classes, image, class_names, attributes=attributes, world=world)
    model.add_layers(source.layers)
    model.report = apply_source(model, source, partial=config.partial)
    model.provenance = provenance.of_run(source, config.source_licence)
    return model


def require_numbers(build: Callable[[], FaceModel], held: int, name: str) -> None:
    """Refuses to build a model with more numbers than the weights that are to fill it.

    A description of a few hundred bytes may ask for any number of them. They are counted first, without memory.

    Args:
        build: makes the model.
        held: numbers in the weights.
        name: of where the description came from.

    Raises:
        ValueError: with both numbers; or what `build` raises.
    """
    try:
        with without_memory():
            wanted = sum(tensor.numel() for tensor in build().state_dict().values())
    except RuntimeError as error:
        if "meta" in str(error):  # a few of timm's networks compute while they are built
            return
        raise ValueError(f"{name} describes a model that cannot be built: {error}") from error
    if wanted > held:
        raise ValueError(
            f"{name} describes a model of {wanted} numbers, and its weights hold {held}; one of the two is damaged or "
            "another model's: take a whole copy of both"
        )


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it, tensors that are made have a shape and a type, and nothing is drawn for them."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """Initialisers leave tensors as they are: to draw for a tensor without memory, torch loads its compiler, which took
    longer than to read the weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def model_from_source(source: Source) -> FaceModel:
    """A source model as it is, for embeddings only.

    Raises:
        ValueError: its architecture or the pictures that it was trained on do not follow from the file.
    """
    if source.image is None:
        raise ValueError(f"{source.name} does not tell the size and normalisation of its pictures")
    return build_model(ModelConfig(), 0, source=source)
