"""What a run is: frozen dataclasses, their JSON form, and `resolve`, which turns a recipe and the facts of the data
into a plan.

Everything a run depends on is a field here; nothing is typed twice. `train` reads it top to bottom, the checkpoint
stores it, and `evaluate`, `predict` and `export` read it back from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

RGB = tuple[float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class ImageSpec:
    """What the model sees: the only place where preprocessing is written down."""

    size: int = 0
    """Height in pixels (and width, unless `width` says otherwise); 0 is the source model's, or 112."""
    width: int = 0
    """Width in pixels; 0 means square."""
    template: str = "auto"
    """Alignment template: arcface, arcface_112x96, celeba, none; auto is arcface where the index has landmarks."""
    mean: RGB = (127.5, 127.5, 127.5)
    """Subtracted from 0..255 values, in the order of `color`."""
    std: RGB = (127.5, 127.5, 127.5)
    """Divided by after `mean`, in the order of `color`."""
    color: Literal["rgb", "bgr"] = "rgb"
    """Channel order that the model was trained with."""

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("width", self.width)):
            if value != 0 and not 8 <= value <= 4096:
                raise ValueError(f"image.{name} is {value}; it must be 0 or lie in [8, 4096] pixels")
        if min(self.std) <= 0:
            raise ValueError(f"image.std is {self.std}; every value must be above 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        assert self.size > 0, "the image size is not settled yet"
        return self.size, self.width or self.size

    def settled(self, contract: ImageSpec | None = None, fixed: Collection[str] = frozenset()) -> ImageSpec:
        """This specification with what was left open taken from a source model.

        Args:
            contract: the pictures that the source model was trained on.
            fixed: fields of it that the weights depend on.

        Raises:
            ValueError: a value typed by the user contradicts a fixed one.
        """
        if contract is None:
            return dataclasses.replace(self, size=self.size or 112)
        default, values = ImageSpec(), {}
        for f in dataclasses.fields(self):
            typed, theirs = getattr(self, f.name), getattr(contract, f.name)
            values[f.name] = theirs if typed == getattr(default, f.name) else typed
            if values[f.name] != theirs and f.name in fixed:
                raise ValueError(
                    f"image.{f.name} is {typed}, but the source model was trained with {theirs}; "
                    f"leave image.{f.name} out, or choose another model.source"
                )
        return ImageSpec(**values)


@dataclass(frozen=True)
class AugmentSpec:
    """How a training picture is varied; every strength at 0 leaves the aligned picture alone."""

    crop: float = 0.0
    """Random resized crop: the kept area is drawn from [1 - crop, 1] of the frame."""
    crop_ratio: float = 0.0
    """The crop's aspect ratio is drawn log-uniformly from [1/(1+r), 1+r] times the frame's."""
    shift: float = 0.0
    """Random shift of the frame, as a fraction of its side, each way."""
    flip: float = 0.0
    """Probability of a mirror image."""
    rotation: float = 0.0
    """Degrees each way."""
    brightness: float = 0.0
    """Factor drawn from [1 - b, 1 + b]."""
    contrast: float = 0.0
    """Factor drawn from [1 - c, 1 + c], about mid grey."""
    saturation: float = 0.0
    """Factor drawn from [1 - s, 1 + s]."""
    hue: float = 0.0
    """Rotation of the hue circle drawn from [-h, h], in turns (0.5 is half a turn)."""
    grey: float = 0.0
    """Probability of a grey picture."""
    erase: float = 0.0
    """Probability of an erased rectangle (random erasing, Zhong et al. 2017)."""
    erase_area: tuple[float, float] = (0.02, 0.2)
    """Least and greatest part of the picture that is erased."""

    def __post_init__(self) -> None:
        for name in ("crop", "flip", "grey", "erase", "shift", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augment.hue is {self.hue}; it must lie in [0, 0.5]")
        if self.rotation < 0 or self.rotation > 180:
            raise ValueError(f"augment.rotation is {self.rotation}; it must lie in [0, 180] degrees")
        if self.crop >= 1 or self.crop_ratio < 0:
            raise ValueError("augment.crop must be below 1 and augment.crop_ratio at least 0")
        low, high = self.erase_area
        if not 0 < low <= high < 1:
            raise ValueError(f"augment.erase_area is {self.erase_area}; it must rise within (0, 1)")

    @property
    def active(self) -> bool:
        """Whether any strength is above 0."""
        return any(value > 0 for name, value in dataclasses.asdict(self).items() if name not in ("erase_area",))


@dataclass(frozen=True)
class DataConfig:
    """Where the photographs are and how they are divided."""

    root: str = ""
    """Folder of photographs; empty draws faces (see `facefast.data.synthetic`)."""
    format: Literal["auto", "folder", "celeba", "afad", "lfw", "recordio", "webdataset", "synthetic"] = "auto"
    """Layout of `root`; auto recognises it."""
    test_fraction: float = 0.2
    """Part of each identity's pictures kept for testing (closed set)."""
    verify_fraction: float = 0.0
    """Part of the identities kept out of training for verification, where the recipe names no split for that."""
    max_bad_fraction: float = 0.01
    """Unreadable files tolerated before the run stops with exit code 65."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels than this are refused (decompression bombs)."""

    def __post_init__(self) -> None:
        if not 0 <= self.test_fraction < 1 or not 0 <= self.verify_fraction < 1:
            raise ValueError(
                f"data.test_fraction {self.test_fraction} and data.verify_fraction {self.verify_fraction} "
                "must lie in [0, 1)"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must lie in [0, 1]")


@dataclass(frozen=True)
class ModelConfig:
    """The network and where its weights come from."""

    backbone: str = "auto"
    """resnet18/34/50/101/152, mobilefacenet, iresnet18/34/50/100, timm/NAME; auto is the source's, else
    mobilefacenet."""
    source: str = "none"
    """Source weights: a file, a run or checkpoint folder, imagenet (torchvision's), or none."""
    embedding: int = 0
    """Numbers in an embedding; 0 is the source's, or the backbone's usual."""
    head: Literal["linear", "cosine"] = "linear"
    """linear gives logits; cosine gives cos(angle), scaled and given a margin by the loss."""
    dropout: float = 0.0
    """Dropout before the head, in training."""


@dataclass(frozen=True)
class LossConfig:
    """Softmax focal loss with face-recognition margins; gamma 0 is cross entropy."""

    gamma: float = 0.0
    """Focal exponent (Lin et al. 2017)."""
    label_smoothing: float = 0.0
    """Mass moved from the label to the uniform distribution."""
    margin: Literal["none", "cos", "arc"] = "none"
    """Margin on the label's cosine: CosFace or ArcFace; needs model.head cosine."""
    margin_size: float = 0.0
    """Cosine units for cos, radians for arc."""
    scale: float = 1.0
    """Logits are multiplied by this; margin losses use 16 to 64."""

    def __post_init__(self) -> None:
        if self.gamma < 0 or self.scale <= 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"loss.gamma {self.gamma} must be at least 0, loss.scale {self.scale} above 0 and "
                f"loss.label_smoothing {self.label_smoothing} in [0, 1)"
            )
        if (self.margin == "none") != (self.margin_size == 0):
            raise ValueError(
                f"loss.margin is {self.margin!r} but loss.margin_size is {self.margin_size}: set both or neither"
            )


@dataclass(frozen=True)
class Phase:
    """A stretch of training: which identities, what moves, how fast, for how long."""

    name: str = "train"
    """Shown in every metric line; `--phases.NAME.FIELD` reaches this phase from the command line."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Identities it trains on: all, or one part of the data set's own partition."""
    start: Literal["previous", "source", "scratch"] = "previous"
    """Weights it starts from: the phase before it, model.source, or random ones."""
    head_start: Literal["random", "class_mean"] = "random"
    """New head: random, or each class's mean embedding (the loss then starts low instead of exploding)."""
    epochs: float = 1.0
    """Passes over the training pictures; give this or `steps`."""
    steps: int = 0
    """Optimiser updates; 0 counts in epochs."""
    batch_size: int = 64
    """Pictures in one optimiser update, over all processes."""
    accumulate: int = 1
    """Forward and backward passes that make one update (same result, less memory)."""
    sampler: Literal["epoch", "balanced", "pk"] = "epoch"
    """epoch: every picture once; balanced: every identity equally often; pk: P identities x K pictures."""
    pictures_per_identity: int = 4
    """K of the pk sampler."""
    optimizer: Literal["sgd", "adam", "adamw", "lamb"] = "sgd"
    """apex's fused versions are used where apex is importable and the model is on a GPU, torch's fused ones
    otherwise."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """SGD momentum (Nesterov), or Adam's first beta."""
    weight_decay: float = 5e-4
    """Not applied to normalisation layers and biases."""
    layer_decay: float = 1.0
    """Each stage further from the head learns this much slower."""
    head_lr: float = 1.0
    """The head's rate as a multiple of `lr`."""
    schedule: Literal["constant", "step", "cosine", "poly", "onecycle"] = "cosine"
    """step multiplies by `step_gamma` every `step_epochs` epochs; the others reach 0 at the end."""
    step_epochs: int = 5
    """Epochs between the drops of the step schedule."""
    step_gamma: float = 0.5
    """Factor of each drop of the step schedule."""
    warmup: float = 0.0
    """Linear warm-up, as a part of the phase's steps."""
    trainable: tuple[str, ...] = ("all",)
    """Stages that learn: all, last:K (the head and the K - 1 stages before it), or names as `build_model(...).stages()`
    lists them."""
    batchnorm: Literal["train", "frozen"] = "train"
    """frozen keeps the source's BatchNorm statistics."""
    clip_grad: float = 0.0
    """Greatest gradient norm; 0 does not clip."""
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentSpec = field(default_factory=AugmentSpec)

    def __post_init__(self) -> None:
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise ValueError(f"phase {self.name}: epochs {self.epochs} or steps {self.steps} must be above 0")
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"phase {self.name}: batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )
        if self.lr <= 0 or not 0 <= self.warmup < 1 or not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"phase {self.name}: lr {self.lr} must be above 0, warmup {self.warmup} in [0, 1), "
                f"layer_decay {self.layer_decay} in (0, 1]"
            )


@dataclass(frozen=True)
class EvalConfig:
    """What is measured after each epoch, and which number names the best checkpoint."""

    metric: Literal["auto", "top1", "verification_accuracy", "tar@1e-2", "tar@1e-3", "auc"] = "auto"
    """Higher is better; auto is top1 where there are test pictures, else verification_accuracy."""
    split: Literal["none", "train", "val", "test"] = "none"
    """Identities kept for verification: a part of the data set's own partition."""
    pairs: int = 6000
    """Verification pairs, half of one identity, half of two."""
    folds: int = 10
    """Folds over which the verification threshold is chosen on the others."""
    batch_size: int = 128
    """Pictures in one evaluation batch, per process."""
    every: int = 1
    """Epochs between evaluations; the last epoch of a phase is always evaluated."""


@dataclass(frozen=True)
class Recipe:
    """A whole run. Named ones are functions in `facefast.recipes`."""

    data: DataConfig = field(default_factory=DataConfig)
    image: ImageSpec = field(default_factory=ImageSpec)
    model: ModelConfig = field(default_factory=ModelConfig)
    phases: tuple[Phase, ...] = (Phase(),)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Everything drawn in a run follows from it."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto is bf16 on a GPU or a CPU with bf16 instructions, else fp32."""
    channels_last: bool = True
    """Memory format of pictures and convolutions: NHWC is the faster one on GPUs and on CPUs (1.75 times measured)."""
    compile: bool = False
    """Compile the model with torch.compile."""
    ema: float = 0.0
    """Decay of the averaged weights that are evaluated and saved beside the raw ones; 0 is off."""
    threads: int = 0
    """Decoding threads per process; 0 shares the cores among the processes."""
    save_every: int = 0
    """Steps between step-N checkpoints; 0 saves after each epoch."""
    keep: int = 3
    """step-N checkpoints kept (best and last are always kept)."""
    log_every: int = 10
    """Steps between metric lines."""
    pictures: int = 16
    """Augmented training pictures shown in TensorBoard at the start of each phase; 0 keeps photographs out of the run
    folder."""
    projector: bool = False
    """Write test embeddings for TensorBoard's projector at the end."""

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"phases are named {names}; a run needs at least one and different names")
        if self.pictures < 0:
            raise ValueError(f"pictures is {self.pictures}; it must be at least 0")
        if self.keep < 1 or self.save_every < 0 or self.log_every < 1 or not 0 <= self.ema < 1:
            raise ValueError(
                f"keep {self.keep} and log_every {self.log_every} must be at least 1, save_every "
                f"{self.save_every} at least 0, ema {self.ema} in [0, 1)"
            )
        if self.phases[0].start == "previous":
            raise ValueError(f"phase {names[0]} comes first: its start must be source or scratch")
        for phase in self.phases:
            if phase.loss.margin != "none" and self.model.head != "cosine":
                raise ValueError(
                    f"phase {phase.name}: loss.margin {phase.loss.margin} needs model.head cosine, "
                    f"it is {self.model.head}"
                )
        uses_source = any(phase.start == "source" for phase in self.phases)
        if uses_source and self.model.source == "none":
            raise ValueError("a phase starts from model.source, which is none; set it to a file or a name")
        if not uses_source and self.model.source != "none":
            raise ValueError(
                f"model.source {self.model.source} has no effect: no phase has start source "
                f"(phases: {', '.join(names)})"
            )


@dataclass(frozen=True)
class IndexFacts:
    """What a plan needs to know of an index."""

    num_rows: int
    num_classes: int
    fingerprint: str
    """Hex digest over paths, labels and content."""
    class_names: tuple[str, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class PhasePlan:
    """A phase with every number that follows from the data and the world."""

    name: str
    num_rows: int
    num_classes: int
    fingerprint: str
    batch_per_rank: int
    """Pictures of one forward pass on one process."""
    steps_per_epoch: int
    steps: int


@dataclass(frozen=True)
class Plan:
    """A run with nothing left to decide; saved beside the recipe."""

    world_size: int
    phases: tuple[PhasePlan, ...]

    @property
    def total_steps(self) -> int:
        """Optimiser updates of the whole run."""
        return sum(phase.steps for phase in self.phases)


def resolve(recipe: Recipe, facts: tuple[IndexFacts, ...], world_size: int) -> Plan:
    """Turns a recipe, one `IndexFacts` per phase and the world size into a plan.

    Raises:
        ValueError: a batch does not divide among the processes, or there is nothing to learn from.
    """
    return Plan(
        world_size=world_size,
        phases=tuple(_resolve_phase(phase, fact, world_size) for phase, fact in zip(recipe.phases, facts, strict=True)),
    )


def _resolve_phase(phase: Phase, facts: IndexFacts, world_size: int) -> PhasePlan:
    passes = world_size * phase.accumulate
    if phase.batch_size % passes:
        raise ValueError(
            f"phase {phase.name}: batch_size {phase.batch_size} does not divide among {world_size} processes "
            f"x {phase.accumulate} passes; use a multiple of {passes}"
        )
    if facts.num_classes < 2:
        raise ValueError(
            f"phase {phase.name}: {facts.num_classes} identities in split {phase.split!r}; at least 2 are needed"
        )
    steps_per_epoch = math.ceil(facts.num_rows / phase.batch_size)
    return PhasePlan(
        name=phase.name,
        num_rows=facts.num_rows,
        num_classes=facts.num_classes,
        fingerprint=facts.fingerprint,
        batch_per_rank=phase.batch_size // passes,
        steps_per_epoch=steps_per_epoch,
        steps=phase.steps or max(1, round(phase.epochs * steps_per_epoch)),
    )


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and scalars as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of `to_json` for dataclass `kind`.

    Raises:
        ValueError: a key that `kind` does not have, or a value of another type.
    """
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    hints = get_type_hints(kind)
    return kind(**{name: _from_json(hints[name], value, name) for name, value in data.items()})


def _from_json(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        hints = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(hints) != len(value):
            raise ValueError(f"{name} has {len(value)} values; it takes {len(hints)}")
        return tuple(_from_json(h, item, name) for h, item in zip(hints, value, strict=True))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}; it must be {hint.__name__}")
    return value
