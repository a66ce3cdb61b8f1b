"""The face model: backbone, embedding, dropout, head, and everything needed to use them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from facefast.models import provenance
from facefast.models.backbones import Backbone, build_backbone
from facefast.models.heads import HEADS, AttributeHeads, CosineHead, LinearHead, unit
from facefast.models.smoothing import Smoothing
from facefast.models.weights.source import LAYERS, Report
from facefast.models.weights.source import MODEL_FORMAT as FORMAT
from facefast.ops import class_block
from facefast.recipe import AttributeSpec, ImageSpec, ModelConfig, from_json, to_json
from facefast.runtime.process import World

FINDINGS = ("faces", "adaptation", "thresholds", "calibration", "metrics", "provenance")
"""What model.json says beside the architecture, of how the model was made and what it may say."""
MOST_CLASSES = 100_000_000


class Prediction(NamedTuple):
    """The people in pictures, as the model names them."""

    labels: Tensor
    """[B] int64, the most probable class."""
    probabilities: Tensor
    """[B, C] float32."""
    names: tuple[str, ...]
    """B class names; empty ones where the model has no classes."""
    attributes: dict[str, Tensor]
    """[B] float32 by attribute: the probability of a yes, or the level of an ordinal one."""


class FaceModel(nn.Module):
    """Pictures to embeddings to one number per identity.

    Args:
        config: the architecture; `source` is not looked at and `backbone` must be a name (see `build_model`).
        num_classes: identities; 0 builds a model without head, for embeddings only.
        image: the pictures that it takes; saved with the model.
        class_names: one per class, or none.
        scale: what the loss multiplies the logits by; probabilities need it.
        attributes: what it predicts beside names.
        backbone: a network that stands in for the one that `config` names, its embedding layer included.
        world: the processes that share the classes of a cosine head; None has them all here.

    Raises:
        ValueError: an unknown backbone, or another number of names than of classes.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        num_classes: int,
        image: ImageSpec,
        class_names: Sequence[str] = (),
        scale: float = 1.0,
        attributes: Sequence[AttributeSpec] = (),
        backbone: Backbone | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__()
        self.config, self._world = config, world
        self.image = image
        self.scale = scale
        self.report: Report | None = None
        """What the source gave, where there was one."""
        self.faces: dict[str, Any] | None = None
        """How the faces that it was trained on were found and aligned; None where that is not known."""
        self.adaptation: dict[str, Any] | None = None
        """What was done to the source model in closed form, and what that gained, as JSON; None where nothing was."""
        self.thresholds: dict[str, Any] | None = None
        """`facefast.evaluation.thresholds.Thresholds` as JSON: from which score on a face is somebody, and two are one
        person; None where nothing was found out."""
        self.calibration: dict[str, Any] | None = None
        """What the temperature that `scale` holds did to the probabilities, as JSON."""
        self.metrics: dict[str, Any] | None = None
        """What it reached when it was handed on, on which pictures, and what had chosen it, as JSON."""
        self.provenance: dict[str, Any] | None = None
        """Which weights it began from and under what licence (`facefast.models.provenance`); None where nobody
        told."""
        network = backbone or build_backbone(config.backbone, image.shape, config.embedding, config.drop_path)
        self.backbone = network.module
        self.embedding: nn.Module = nn.Identity()
        self.embedding_size = network.size
        if config.embedding and not network.embeds:
            self.embedding = nn.Sequential(
                nn.Linear(network.size, config.embedding, bias=False),
                nn.BatchNorm1d(config.embedding),
            )
            self.embedding_size = config.embedding
        self.smoothing: Smoothing | None = None
        """Blurs the pictures ahead of the backbone; None where they are taken as they are."""
        self.linear_map: nn.Linear | None = None
        """Follows the embedding of a network that ends in no layer which could take such a map in."""
        self._backbone_stages = network.stages
        self.dropout = nn.Dropout(config.dropout)
        self.head: LinearHead | CosineHead | None = None
        self.set_classes(num_classes, class_names)
        self.attribute_heads = AttributeHeads(self.embedding_size, attributes) if attributes else None
        mean, std = torch.tensor(image.mean), torch.tensor(image.std)
        # Not in the state dict: the ImageSpec, which is saved with the model, is their one source.
        self.register_buffer("pixel_mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(1, 3, 1, 1), persistent=False)

    def add_linear_map(self) -> None:
        """Lets a linear layer follow the embedding, which changes nothing as yet."""
        if self.linear_map is None:
            like = next(self.backbone.parameters())
            self.linear_map = nn.Linear(self.embedding_size, self.embedding_size).to(like)
            with torch.no_grad():
                nn.init.eye_(self.linear_map.weight)
                nn.init.zeros_(self.linear_map.bias)

    def add_layers(self, document: Mapping[str, Any]) -> None:
        """Adds the layers of `LAYERS` that a model.json tells of, those that are not there yet.

        Raises:
            ValueError: what it says of one is something else.
        """
        if document.get("smoothing") is not None:
            self.smoothing = Smoothing.from_json(self.image, document["smoothing"]).to(self.pixel_mean.device)
        if document.get("linear_map", False) is not False:
            if document["linear_map"] is not True:
                raise ValueError(f"model.json: linear_map is {document['linear_map']!r:.80}; it must be true or false")
            self.add_linear_map()

    def layers(self) -> dict[str, Any]:
        """What `add_layers` adds, as a JSON value."""
        said: dict[str, Any] = {} if self.smoothing is None else {"smoothing": self.smoothing.to_json()}
        return said | ({} if self.linear_map is None else {"linear_map": True})

    def set_classes(self, num_classes: int, class_names: Sequence[str] = ()) -> None:
        """Gives the model a new head with random weights, on the device of the rest.

        Raises:
            ValueError: another number of names than of classes.
        """
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes; give one each or none")
        self.num_classes = num_classes
        self.class_names = tuple(class_names)
        self.head = None
        if num_classes:
            like = next(self.backbone.parameters(), torch.empty(0))  # an exported network has none
            if self._world is not None and self.config.head == "cosine":
                block = class_block(num_classes, self._world.size, self._world.rank)
                self.head = CosineHead(self.embedding_size, num_classes, block).to(like)
                return
            self.head = HEADS[self.config.head](self.embedding_size, num_classes).to(like)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to embeddings [B, D] as training sees them, of any length.

        Raises:
            ValueError: pictures of another size than the model's.
        """
        self._check_shape(images)
        if self.smoothing is not None:
            images = self.smoothing(images)
        embeddings: Tensor = self.embedding(self.backbone(images))
        return embeddings if self.linear_map is None else self.linear_map(embeddings)

    def classify(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] of `encode` to logits [B, C], or cosines with the cosine head.

        Raises:
            ValueError: the model has no head.
        """
        logits: Tensor = self._require_head()(self.dropout(embeddings))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pictures [B, 3, H, W] to logits [B, C], or cosines with the cosine head."""
        return self.classify(self.encode(images))

    @torch.no_grad()
    def embed(self, images: Tensor, mirror: bool = True) -> Tensor:
        """Embeddings of length 1, whose dot products are cosine similarities.

        Args:
            images: [B, 3, H, W], uint8 RGB as decoded, or float already normalised for this model.
            mirror: adds the embedding of the mirror image before the length becomes 1. On CelebA this gains half a
                point of TAR at FAR 1 %, as much as keeping both in twice the numbers.

        Returns:
            [B, D] float32.

        Raises:
            ValueError: pictures of another size or kind, or a model in training mode.
        """
        images = self._evaluated(images)
        embeddings = self.encode(images).float()
        if mirror:
            embeddings = embeddings + self.encode(images.flip(3)).float()
        return unit(embeddings)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Prediction:
        """Names the people in pictures, given as for `embed`, and predicts their attributes.

        Raises:
            ValueError: as `embed`, or the model has neither classes nor attributes.
        """
        embeddings = self.encode(self._evaluated(images))
        attributes = self.predict_attributes(embeddings)
        if self.head is None and attributes:
            nobody = torch.full((len(images),), -1, device=embeddings.device)
            return Prediction(nobody, embeddings.new_zeros(len(images), 0), ("",) * len(images), attributes)
        logits = self.classify(embeddings).float() * self.scale
        labels = logits.argmax(1)
        found = labels.tolist()
        names = tuple(self.class_names[k] if self.class_names else str(k) for k in found)
        return Prediction(labels, F.softmax(logits, dim=1), names, attributes)

    def attribute_logits(self, embeddings: Tensor) -> Tensor | None:
        """Embeddings [B, D] of `encode` to the attributes' logits [B, K]; None without such heads."""
        if self.attribute_heads is None:
            return None
        logits: Tensor = self.attribute_heads(self.dropout(embeddings))
        return logits

    def predict_attributes(self, embeddings: Tensor) -> dict[str, Tensor]:
        """Embeddings [B, D] of `encode` to [B] float32 by attribute, as in `Prediction`; none without such heads."""
        logits = self.attribute_logits(embeddings)
        if logits is None:
            return {}
        assert self.attribute_heads is not None
        values = self.attribute_heads.read(logits)
        return {spec.name: values[:, k] for k, spec in enumerate(self.attribute_heads.specs)}

    def stages(self) -> dict[str, list[nn.Module]]:
        """Stage names, from the picture to the head, and modules that together hold every parameter exactly once.

        Parameters that sit directly in a module with children (a transformer's position table) come in a
        `nn.ParameterList` of their own. Freezing and layer-wise rates go by these names.
        """
        named = dict(self.backbone.named_parameters())
        stages = {
            stage: _holders(self.backbone, [n for n in named if _belongs(n, members)])
            for stage, members in self._backbone_stages.items()
        }
        ending = [
            part
            for part in (self.embedding, self.linear_map)
            if part is not None and any(True for _ in part.parameters())
        ]
        if ending:
            stages["embedding"] = ending
        heads: list[nn.Module] = [head for head in (self.head, self.attribute_heads) if head is not None]
        if heads:
            stages["head"] = heads
        return stages

    def stage_ends(self) -> list[nn.Module]:
        """The last module of each of the backbone's stages, whose outputs can be compared with another model's.

        Raises:
            ValueError: the backbone's stages are no modules that follow each other.
        """
        modules = self._stage_modules("distill.features compares; use distill.embeddings or distill.logits")
        return [modules[members[-1]] for members in self._backbone_stages.values()]

    def blocks(self) -> dict[str, list[str]]:
        """The backbone's modules by stage, in their order; of a stage that is one sequence, what it holds.

        Raises:
            ValueError: the backbone's stages are no modules that follow each other.
        """
        modules = self._stage_modules("start teacher takes over; use start scratch")
        return {
            stage: [
                f"{member}.{child}" if child else member
                for member in members
                for child in (dict(modules[member].named_children()) if _is_sequence(modules[member]) else ("",))
            ]
            for stage, members in self._backbone_stages.items()
        }

    def _stage_modules(self, wish: str) -> dict[str, nn.Module]:
        if not self._backbone_stages:
            raise ValueError(f"this {self.config.backbone} was exported and has no stages any more, which {wish}")
        modules = dict(self.backbone.named_modules())
        missing = [name for members in self._backbone_stages.values() for name in members if name not in modules]
        if missing:
            raise ValueError(
                f"{self.config.backbone} has no stages that follow each other (first: {missing[0]}), which {wish}"
            )
        return modules

    def to_config(self) -> dict[str, Any]:
        """The architecture as a JSON value, for `model.json`; the weights are the state dict."""
        return {
            "format": FORMAT,
            "backbone": self.config.backbone,
            "embedding": self.config.embedding,
            "head": self.config.head,
            "dropout": self.config.dropout,
            "scale": self.scale,
            "image": to_json(self.image),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "attributes": to_json(self.attribute_heads.specs if self.attribute_heads else ()),
            **self.layers(),
            **{name: getattr(self, name) for name in FINDINGS},
        }

    @classmethod
    def from_config(
        cls, document: Mapping[str, Any], backbone: Backbone | None = None, world: World | None = None
    ) -> FaceModel:
        """The model that `to_config` describes, with random weights.

        Args:
            document: it.
            backbone, world: as for the class.

        Raises:
            ValueError: another format, or an entry that is missing or wrong.
        """
        require_format(document)
        fields = ("backbone", "embedding", "head", "dropout")
        wanted = {*fields, "format", "scale", "image", "num_classes", "class_names"}
        present = set(document) - {"attributes", *LAYERS, *FINDINGS}  # older files have none
        if present != wanted:
            differing = ", ".join(sorted(present ^ wanted))
            raise ValueError(f"model.json has wrong or missing entries: {differing}")
        classes, names, scale = document["num_classes"], document["class_names"], document["scale"]
        attributes = document.get("attributes", [])
        if type(classes) is not int or not 0 <= classes <= MOST_CLASSES:
            raise ValueError(f"model.json: num_classes is {classes!r:.80}; it must be 0 to {MOST_CLASSES}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("model.json: class_names must be a list of names")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ValueError(f"model.json: scale is {scale!r:.80}; it must be a number above 0")
        if not isinstance(attributes, list):
            raise ValueError("model.json: attributes must be a list")
        model = cls(
            from_json(ModelConfig, {name: document[name] for name in fields}),
            classes,
            cls.image_of(document),
            names,
            float(scale),
            [from_json(AttributeSpec, spec) for spec in attributes],
            backbone,
            world,
        )
        if backbone is None:  # an exported network holds them
            model.add_layers(document)
        for name in FINDINGS:
            value = document.get(name)
            if not isinstance(value, dict | None):
                raise ValueError(f"model.json: {name} is {value!r:.80}; it must be an object or null")
            setattr(model, name, value)
        provenance.require_sound(model.provenance)
        return model

    @staticmethod
    def image_of(document: Mapping[str, Any]) -> ImageSpec:
        """The pictures that the model of a model.json takes.

        Raises:
            ValueError: an entry is missing or wrong.
        """
        image = from_json(ImageSpec, document.get("image", {}))
        if not image.size:
            raise ValueError("model.json: image.size is 0; a model has a size")
        return image

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures as the network takes them; `embed` and `predict` do this themselves.

        Args:
            images: [B, 3, H, W] uint8 RGB of the size in `image`, aligned as its template says; or floating point that
                is normalised already.

        Returns:
            [B, 3, H, W] on the model's device, in the channel order of `image`, mean subtracted, divided by std.

        Raises:
            ValueError: another size or type.
        """
        self._check_shape(images)
        # The type says which of the two it is: bytes as decoded, or floats that a loader has normalised already.
        if images.dtype == torch.uint8:
            if self.image.color == "bgr":
                images = images.flip(1)
            return (images.to(self.pixel_mean) - self.pixel_mean) / self.pixel_std
        if not images.is_floating_point():
            raise ValueError(f"pictures are {images.dtype}; give uint8 RGB or normalised floating point")
        return images.to(self.pixel_mean)

    def _evaluated(self, images: Tensor) -> Tensor:
        if self.training:
            raise ValueError("the model is in training mode, where BatchNorm mixes pictures; call eval() first")
        return self.preprocess(images)

    def _check_shape(self, images: Tensor) -> None:
        height, width = self.image.shape
        if images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(
                f"pictures have shape {list(images.shape)}, the model takes "
                f"[B, 3, {height}, {width}]; align or resize them to its ImageSpec first"
            )

    def _require_head(self) -> LinearHead | CosineHead:
        if self.head is None:
            raise ValueError("the model has no classes, only embeddings; give it some with set_classes")
        return self.head


def require_format(document: Any) -> None:
    """Refuses the model.json of another format.

    Raises:
        ValueError: it is one, or no model.json.
    """
    found = document.get("format") if isinstance(document, Mapping) else None
    if found != FORMAT:
        newer = type(found) is int and found > FORMAT
        raise ValueError(
            f"model.json has format {found!r:.80}; this facefast reads {FORMAT}"
            + ("; use the facefast that wrote it, or a later one" if newer else "")
        )


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 0


def _belongs(name: str, members: Sequence[str]) -> bool:
    return any(name == member or name.startswith(member + ".") for member in members)


def _holders(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Modules that hold the named parameters and nothing else."""
    # A module with children would bring their parameters along, which may belong to another stage.
    modules: dict[str, nn.Module] = {}
    loose = nn.ParameterList()
    for name in names:
        owner, _, _ = name.rpartition(".")
        module = network.get_submodule(owner)
        if any(True for _ in module.children()):
            loose.append(network.get_parameter(name))
        else:
            modules[owner] = module
    return [*modules.values(), *([loose] if len(loose) else [])]
