"""Source models: weights from a file, a facefast checkpoint or a library, and how they enter a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from facefast.models.backbones import NAMES, RESNETS, TIMM
from facefast.models.weights.layouts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NORMALISATION,
    WHOLE_CONTRACT,
    Layout,
    recognise,
)
from facefast.models.weights.readers import read
from facefast.recipe import ImageSpec, ModelConfig, from_json
from facefast.runtime import files, manifest

IMAGENET = "imagenet"
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "net.")
HEADS = ("head.", "attribute_heads.")
CLASSIFIERS = (
    *HEADS,
    "fc.",
    "fc8.",
    "classifier.",
    "classif.",
    "last_linear.",
    "logits.",
    "margin.",
    "arc_face.",
)
SHOWN = 4
INT8 = "model-int8.onnx"
"""The network of an int8 package, in place of model.safetensors."""
MODEL_FORMAT = 1
"""Of model.json."""
LAYERS = ("smoothing", "linear_map")
"""What model.json says of layers that a backbone does not have by itself."""
EXPORTED = (
    "whose numbers can no longer be trained; give the run, the checkpoint or the safetensors package that it was made "
    "from"
)
"""What is wrong with an export as a source."""


@dataclass(frozen=True)
class Source:
    """Weights that a model can start from."""

    name: str
    """Where they came from."""
    backbone: str
    """Name for `build_backbone`; empty where neither the file nor the user names it."""
    embedding: int
    """`ModelConfig.embedding` of a model that takes every weight."""
    image: ImageSpec | None
    """The pictures they were trained on, the preprocessing contract; None where it is not known."""
    fixed: frozenset[str]
    """Fields of `image` that the weights depend on; the others are only usual."""
    state: Mapping[str, Tensor]
    """Tensors by their names in a `FaceModel`."""
    sha256: str = ""
    """Of the file they came from; empty where a library gave them."""
    provenance: Mapping[str, Any] | None = None
    """Of a facefast model: what it began from itself."""
    layers: Mapping[str, Any] = field(default_factory=dict)
    """Of a facefast model: what `FaceModel.add_layers` adds to its backbone."""


@dataclass(frozen=True)
class Report:
    """What became of a source's tensors and of a model's."""

    source: str
    used: int
    """Tensors copied."""
    total: int
    """Tensors that the backbone and the embedding layer have."""
    missing: tuple[str, ...]
    """The model's tensors that the source does not have; they keep their values."""
    unused: tuple[str, ...]
    """The source's tensors that the model has no place for."""
    classifier: tuple[str, ...]
    """The source's own classes, left out: the new identities are others."""

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.used} of {self.total} tensors used"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_first(self.missing)})")
        if self.unused:
            parts.append(f"{len(self.unused)} unused ({_first(self.unused)})")
        if self.classifier:
            parts.append(f"left out: classifier ({_first(self.classifier)})")
        return ", ".join(parts)


def load_source(source: str | Path, backbone: str = "auto") -> Source:
    """Reads source weights and finds out what they are.

    Args:
        source: a file that `readers.read` knows (safetensors, torch.save, .npz, Keras' .h5, .caffemodel, Torch7's .t7),
            a facefast run, checkpoint or package folder, or "imagenet" for the weights that torchvision or timm publish
            for `backbone`.
        backbone: its architecture where the weights do not show it; auto goes by them.

    Raises:
        ValueError: no such file, a file that holds more than tensors, no state dict in it, names that clash, or
            another architecture than `backbone`.
    """
    if str(source) == IMAGENET:
        return _from_library(backbone)
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() == ".onnx" and path.is_file():
        raise ValueError(f"{path} is an ONNX file, {EXPORTED}")
    state = strip_prefixes(read(path), path)
    try:
        layout = recognise(state, backbone) or Layout("")
        translated = layout.translate(state)
    except (IndexError, RuntimeError, ValueError) as error:
        # A layout is told by a few names and shapes; the other tensors may still have any shape at all.
        raise ValueError(f"{path} has the names of published weights, and tensors of other shapes: {error}") from error
    if backbone in NAMES and layout.backbone not in ("", backbone):
        raise ValueError(f"{path} holds a {layout.backbone}, model.backbone is {backbone}; leave that out to take it")
    return Source(
        name=str(path),
        backbone=layout.backbone if backbone == "auto" else backbone,
        embedding=layout.embedding,
        image=layout.image,
        fixed=layout.fixed,
        state={f"backbone.{key}": tensor for key, tensor in translated.items()},
        sha256=files.sha256(path),
    )


def apply_source(model: nn.Module, source: Source, *, partial: bool = False) -> Report:
    """Copies a source's weights into a `FaceModel`, its heads excepted.

    Args:
        partial: whether the source may lack tensors of the backbone.

    Raises:
        ValueError: a tensor of another shape, one that is missing or holds numbers that are not finite, or not one that
            fits; the model is then as it was.
    """
    # Everything is checked before anything is copied: a model half loaded would train, and nothing would say why it is
    # worse.
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(HEADS)}
    used = {key: tensor for key, tensor in source.state.items() if key in own}
    left = [key for key in source.state if key not in own]
    for key, tensor in used.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{source.name}: {key} has shape {list(tensor.shape)}, the model's has "
                f"{list(own[key].shape)}; model.backbone, model.embedding and image.size must be "
                "the source's (leave them out to take them)"
            )
    if not any(key.startswith("backbone.") for key in used):
        raise ValueError(
            f"{source.name}: none of its {len(source.state)} tensors fits the model; it has "
            f"{_first(left)}, the model {_first(tuple(own))}; choose its architecture with "
            "model.backbone"
        )
    # Files older than PyTorch 0.4.1 have no such counters, and nothing reads them.
    missing = tuple(k for k in own if k not in used and not k.endswith("num_batches_tracked"))
    lacking = tuple(key for key in missing if key.startswith("backbone."))
    if lacking and not partial:
        raise ValueError(
            f"{source.name}: {len(lacking)} of the backbone's tensors are missing ({_first(lacking)}); it is not "
            f"whole: one of several shards, or layers under other names (unused: {_first(left) or 'none'}); "
            "give the whole file, or train with --model.partial, which begins with random values in their place"
        )
    wrong = tuple(key for key, tensor in used.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    if wrong:
        raise ValueError(
            f"{source.name}: {len(wrong)} of its {len(source.state)} tensors hold numbers that are not finite "
            f"({_first(wrong)}); the file is damaged, or its training had diverged: take another one"
        )
    model.load_state_dict(used, strict=False)
    classifier = tuple(key for key in left if key.removeprefix("backbone.").startswith(CLASSIFIERS))
    return Report(
        source=source.name,
        used=len(used),
        total=len(own),
        missing=missing,
        unused=tuple(key for key in left if key not in classifier),
        classifier=classifier,
    )


def strip_prefixes(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Takes wrappers' prefixes off every key, as often as they occur and in any order.

    Raises:
        ValueError: two keys become one.
    """
    stripped: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in state.items():
        short = key
        while prefix := next((p for p in PREFIXES if short.startswith(p)), ""):
            short = short.removeprefix(prefix)
        short = short.replace("._orig_mod.", ".")
        if short in stripped:
            raise ValueError(
                f"{path} holds {origin[short]} and {key}, two networks in one; save the one you want alone"
            )
        stripped[short], origin[short] = tensor, key
    return stripped


def _from_folder(path: Path) -> Source:
    """A run's best model, a checkpoint or a package; averaged weights where there are some."""
    for folder in (path / "checkpoints" / "best", path / "checkpoints" / "last", path):
        document = folder / "model.json"
        if (folder / INT8).is_file():
            raise ValueError(f"{path} is an int8 package, {EXPORTED}")
        weights = [folder / f"{stem}.safetensors" for stem in ("ema", "model")]
        weights = [file for file in weights if file.is_file()]
        if not document.is_file() or not weights:
            continue
        manifest.verify(folder)
        config = files.read_json(document)
        if isinstance(config, dict) and type(config.get("format")) is int and config["format"] > MODEL_FORMAT:
            raise ValueError(
                f"{document} has format {config['format']}; this facefast reads {MODEL_FORMAT}; use the facefast that "
                "wrote it, or a later one"
            )
        lacking = [
            name for name in ("backbone", "embedding", "image") if not isinstance(config, dict) or name not in config
        ]
        if lacking:
            raise ValueError(f"{document} has no entry {lacking[0]!r}; it is not a facefast model")
        model = from_json(ModelConfig, {name: config[name] for name in ("backbone", "embedding")})
        return Source(
            name=str(path),
            backbone=model.backbone,
            embedding=model.embedding,
            image=from_json(ImageSpec, config["image"]),
            fixed=WHOLE_CONTRACT,
            state=read(weights[0]),
            sha256=files.sha256(weights[0]),
            provenance=config.get("provenance"),
            layers={name: config[name] for name in LAYERS if name in config},
        )
    raise ValueError(
        f"source folder {path} holds no facefast model (model.json beside model.safetensors); give "
        "a run folder, a checkpoint folder, a package or a weights file"
    )


def _from_library(backbone: str) -> Source:
    """ImageNet weights by torchvision's or timm's own loader, from its cache or the network."""
    if backbone not in RESNETS and not backbone.startswith(TIMM):
        raise ValueError(
            f"source imagenet has no weights for backbone {backbone}; choose one of {', '.join(RESNETS)} or timm/NAME"
        )
    image, fixed = ImageSpec(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD), NORMALISATION
    try:
        if backbone in RESNETS:
            import torchvision

            # Not version 2: label smoothing and mixup make features that transfer less well (Kornblith et al. 2021,
            # arXiv:2010.16402).
            weights = torchvision.models.get_model_weights(backbone)["IMAGENET1K_V1"]
            state = weights.get_state_dict(progress=False, check_hash=True)
        else:
            import timm

            name = backbone.removeprefix(TIMM)
            network: Any = timm.create_model(name, pretrained=True, num_classes=0)
            state = network.state_dict()
            config = network.pretrained_cfg
            if config.get("fixed_input_size"):
                fixed |= {"size", "width"}
            image = ImageSpec(
                size=config["input_size"][1],
                width=config["input_size"][2],
                mean=tuple(255 * m for m in config["mean"]),
                std=tuple(255 * s for s in config["std"]),
            )
    except Exception as error:
        raise ValueError(
            f"no ImageNet weights for {backbone} ({error}). Without a network, bring the file by "
            "other means and give its path as model.source"
        ) from error
    return Source(
        name=f"{IMAGENET} ({backbone})",
        backbone=backbone,
        embedding=0,
        image=image,
        fixed=fixed,
        state={f"backbone.{key}": tensor for key, tensor in state.items()},
    )


def _first(names: list[str] | tuple[str, ...]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
