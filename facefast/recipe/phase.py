"""A stretch of training: what it minimises, what moves, how fast, for how long."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from facefast.recipe.image import AugmentSpec
from facefast.recipe.ranges import MOST, require


@dataclass(frozen=True)
class LossConfig:
    """The losses on identities: softmax focal loss with margins, triplets and contrasts, mixed by weight."""

    weight: float = 1.0
    """Weight of the softmax loss; 0 trains embeddings without classes, for verification alone."""
    gamma: float = 0.0
    """Focal exponent (Lin et al. 2017); 0 is cross entropy."""
    label_smoothing: float = 0.0
    """Mass moved from the label to the uniform distribution."""
    margin: Literal["none", "cos", "arc", "ada"] = "none"
    """Margin on the label's cosine: CosFace, ArcFace or AdaFace; needs model.head cosine."""
    margin_size: float = 0.0
    """Cosine units for cos, radians for arc, AdaFace's m for ada."""
    scale: float = 1.0
    """Logits are multiplied by this; margin losses use 16 to 64."""
    negatives: float = 1.0
    """Part of the classes that an update's softmax is taken over, drawn anew for each, beside those in its batch (An et
    al. 2022); below 1 needs model.shard_head ranks, and only the classes drawn move."""
    class_weights: Literal["none", "effective"] = "none"
    """effective: each class weighs the inverse of its effective number of pictures (Cui et al. 2019), 1 on average."""
    effective_beta: float = 0.99
    """How fast further pictures of a class stop counting; 0 weighs all classes alike, near 1 by the inverse number."""
    triplet: float = 0.0
    """Weight of the batch-hard triplet loss on embeddings of length 1 (Hermans et al. 2017); needs sampler pk."""
    triplet_margin: float = 0.3
    """In units of Euclidean distance, of which two unit vectors have at most 2."""
    contrastive: float = 0.0
    """Weight of the supervised contrastive loss (Khosla et al. 2020); needs sampler pk."""
    temperature: float = 0.1
    """Temperature of the contrastive loss."""

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
        for name in ("weight", "triplet", "contrastive"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 < self.negatives <= 1:
            raise ValueError(f"loss.negatives is {self.negatives}; it must lie in (0, 1]")
        if self.negatives < 1 and self.label_smoothing:
            raise ValueError(
                f"loss.label_smoothing {self.label_smoothing} is over all classes and loss.negatives {self.negatives} "
                "draws some; leave one out"
            )
        if not 0 <= self.effective_beta < 1 or self.triplet_margin <= 0 or self.temperature <= 0:
            raise ValueError(
                f"loss.effective_beta {self.effective_beta} must lie in [0, 1), loss.triplet_margin "
                f"{self.triplet_margin} and loss.temperature {self.temperature} above 0"
            )
        if self.weight == 0:
            for name, neutral in SOFTMAX_FIELDS.items():
                if getattr(self, name) != neutral:
                    raise ValueError(
                        f"loss.{name} {getattr(self, name)} has no effect: loss.weight 0 turns the softmax loss off"
                    )

    @property
    def pairwise(self) -> bool:
        """Whether embeddings of one batch are compared with each other."""
        return self.triplet > 0 or self.contrastive > 0


SOFTMAX_FIELDS = {
    "gamma": 0.0,
    "label_smoothing": 0.0,
    "margin": "none",
    "negatives": 1.0,
    "class_weights": "none",
}


@dataclass(frozen=True)
class DistillConfig:
    """What is learnt from `model.teacher`, beside the labels; each number is the weight of one loss, 0 is off."""

    logits: float = 0.0
    """Kullback-Leibler divergence to the teacher's softened probabilities (Hinton et al. 2015), times temperature
    squared; the teacher needs the same identities."""
    temperature: float = 4.0
    """Softens both sides' logits."""
    embeddings: float = 0.0
    """1 - cosine between the embeddings, the student's through a learnt projection where their lengths differ."""
    features: float = 0.0
    """Distance between the outputs of the stages."""
    match: Literal["attention", "projected"] = "attention"
    """attention compares where the stages look (Zagoruyko & Komodakis 2017); projected compares their channels through
    learnt 1 x 1 convolutions (FitNets, Romero et al. 2015)."""

    def __post_init__(self) -> None:
        if min(self.logits, self.embeddings, self.features) < 0 or self.temperature <= 0:
            raise ValueError(
                f"distill.logits {self.logits}, distill.embeddings {self.embeddings} and distill.features "
                f"{self.features} must be at least 0, distill.temperature {self.temperature} above 0"
            )

    @property
    def active(self) -> bool:
        """Whether anything is learnt from the teacher."""
        return max(self.logits, self.embeddings, self.features) > 0


@dataclass(frozen=True)
class AdaptConfig:
    """What the source model is told of the pictures in closed form, before any training: how noisy they are, BatchNorm
    statistics and how the embeddings of one person scatter."""

    choose: Literal["none", "auto", "given"] = "none"
    """auto tries several amounts on people left out and takes none that gains nothing there; given is what
    those below say; none leaves the source as it is."""
    luma: float = 0.0
    """Standard deviation of a blur of lightness ahead of the network, in pixels of a picture 112 high, up to 16."""
    chroma: float = 0.0
    """The same for colour, which bears more of it."""
    batchnorm: float = 0.0
    """Weight of these pictures' BatchNorm statistics in place of the source's (AdaBN, Li et al. 2016), 0 to 1, at the
    first layer."""
    batchnorm_last: float = 0.0
    """The same at the last layer; layers between them lie on a line."""
    centre: bool = False
    """Subtracts the mean of these pictures' embeddings."""
    shrinkage: float = 1.0
    """Of the within-person covariance that embeddings are whitened by (WCCN, Hatch et al. 2006), towards a multiple of
    the identity: 1 whitens nothing, 0.1 nearly everything."""

    def __post_init__(self) -> None:
        weights = min(self.batchnorm, self.batchnorm_last), max(self.batchnorm, self.batchnorm_last)
        if not (weights[0] >= 0 and weights[1] <= 1 and LEAST_SHRINKAGE <= self.shrinkage <= 1):
            raise ValueError(
                f"adapt.batchnorm {self.batchnorm} and adapt.batchnorm_last {self.batchnorm_last} must lie in [0, 1], "
                f"adapt.shrinkage {self.shrinkage} in [{LEAST_SHRINKAGE}, 1]"
            )
        if not (0 <= self.luma <= MOST_BLUR and 0 <= self.chroma <= MOST_BLUR):
            raise ValueError(
                f"adapt.luma {self.luma} and adapt.chroma {self.chroma} must lie in [0, {MOST_BLUR:g}]: pixels of a "
                "picture of ArcFace's size"
            )
        neutral = weights[1] == self.luma == self.chroma == 0 and self.shrinkage == 1 and not self.centre
        if (self.choose == "given") == neutral:
            raise ValueError(
                f"adapt.choose {self.choose} with adapt.luma {self.luma:g}, adapt.chroma {self.chroma:g}, "
                f"adapt.batchnorm {self.batchnorm:g}, adapt.batchnorm_last {self.batchnorm_last:g}, adapt.centre "
                f"{str(self.centre).lower()} and adapt.shrinkage {self.shrinkage:g}: give an amount of one of them "
                "together with choose given, and only then"
            )

    @property
    def active(self) -> bool:
        """Whether anything may be done."""
        return self.choose != "none"


LEAST_SHRINKAGE = 0.01
MOST_BLUR = 16.0


@dataclass(frozen=True)
class Phase:
    """A stretch of training: which identities, what moves, how fast, for how long."""

    name: str = "train"
    """Shown in every metric line; `--phases.NAME.FIELD` reaches this phase from the command line."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Identities it trains on: all, or one part of the data set's own partition."""
    start: Literal["previous", "source", "teacher", "scratch"] = "previous"
    """Weights it starts from: the phase before it, model.source, those layers of model.teacher that a shallower model
    has too, or random ones."""
    head_start: Literal["random", "class_mean", "previous"] = "random"
    """Head: random, each class's mean embedding (the loss then starts low instead of exploding), by the teacher where
    the phase starts from it, or that of the phase before."""
    epochs: float = 1.0
    """Passes over the training pictures; give this or `steps`. 0 only adapts."""
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
    """Factor on the rate for each stage further from the head."""
    head_lr: float = 1.0
    """The head's rate as a multiple of `lr`."""
    schedule: Literal["constant", "step", "cosine", "poly", "onecycle"] = "cosine"
    """Course of the rate: step multiplies it by `step_gamma` every `step_epochs` epochs; cosine, poly and onecycle fall
    to 0, or nearly, at the end."""
    step_epochs: int = 5
    """Epochs between the drops of the step schedule."""
    step_gamma: float = 0.5
    """Factor of each drop of the step schedule."""
    warmup: float = 0.0
    """Linear warm-up, as a part of the phase's steps."""
    trainable: tuple[str, ...] = ("all",)
    """Stages that learn: all, last:K (the head and the K - 1 stages before it), or names as `build_model(...).stages()`
    lists them."""
    batchnorm: Literal["train", "frozen", "auto"] = "train"
    """frozen keeps the source's BatchNorm statistics; auto does so below 100 pictures an identity."""
    clip_grad: float = 0.0
    """Greatest gradient norm; 0 does not clip."""
    labels: Literal["given", "pseudo"] = "given"
    """pseudo also trains on pictures without a name, under those that the model gives them when the phase starts."""
    pseudo_confidence: float = 0.5
    """Least confidence of a name given that way."""
    l2sp: float = 0.0
    """Pull of the backbone's weights towards those of the source model, instead of weight decay (L2-SP, Li et al.
    2018)."""
    mixup: float = 0.0
    """Pictures are mixed in parts drawn from Beta(m, m) (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """As mixup, by exchanging a rectangle (Yun et al. 2019); with both, each batch draws one."""
    align: Literal["none", "coral", "mmd"] = "none"
    """Matches the embeddings' statistics of pictures without a name, the target domain, to those of the others: CORAL
    (Sun & Saenko 2016) or the maximum mean discrepancy of Gaussian kernels (Long et al. 2015)."""
    align_weight: float = 1.0
    """Weight of that term."""
    prune: float = 0.0
    """Part of the convolutions' weights that is 0 in the end, the smallest ones (Zhu & Gupta 2017)."""
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    augment: AugmentSpec = field(default_factory=AugmentSpec)

    def __post_init__(self) -> None:
        # It is a part of options, of file names and of TensorBoard's tags.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", self.name):
            raise ValueError(f"a phase is named {self.name!r}; give it letters, digits, - and _, a letter first")
        if self.steps < 0 or self.epochs < 0 or (self.steps == 0 and self.epochs == 0 and not self.adapt.active):
            raise ValueError(
                f"phase {self.name}: epochs {self.epochs} or steps {self.steps} must be above 0; only a phase that "
                "adapts (adapt.choose) may do without updates"
            )
        if self.adapt.active and self.start != "source":
            raise ValueError(
                f"phase {self.name}: adapt.choose {self.adapt.choose} adapts the source model, but the phase starts "
                f"from {self.start}; set phases.{self.name}.start source"
            )
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"phase {self.name}: batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )
        if self.lr <= 0 or not 0 <= self.warmup < 1 or not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"phase {self.name}: lr {self.lr} must be above 0, warmup {self.warmup} in [0, 1), "
                f"layer_decay {self.layer_decay} in (0, 1]"
            )
        prefix, anything = f"phase {self.name}: ", (0, math.inf)
        require(self, prefix, l2sp=anything, mixup=anything, cutmix=anything, align_weight=anything)
        require(self, prefix, weight_decay=anything, head_lr=anything, clip_grad=anything, step_gamma=anything)
        require(self, prefix, momentum=(0, 1), steps=(0, MOST), batch_size=(1, MOST), step_epochs=(1, MOST))
        require(self, prefix, pictures_per_identity=(1, MOST))
        if not 0 <= self.prune < 1 or not 0 <= self.pseudo_confidence <= 1:
            raise ValueError(
                f"phase {self.name}: prune {self.prune} must lie in [0, 1), pseudo_confidence {self.pseudo_confidence} "
                "in [0, 1]"
            )
        # What follows contradicts itself or would have no effect. Running it all the same would let its user believe in
        # an option that did nothing.
        mixes = "mixup" if self.mixup else "cutmix"
        if self.loss.pairwise and (self.mixup or self.cutmix):
            raise ValueError(f"phase {self.name}: {mixes} leaves no pairs of one person to loss.triplet or contrastive")
        if self.distill.active and (self.mixup or self.cutmix):
            raise ValueError(f"phase {self.name}: {mixes} and distill are not combined; leave one out")
        if self.loss.pairwise and self.sampler != "pk":
            raise ValueError(
                f"phase {self.name}: loss.triplet and loss.contrastive need several pictures of a person in a batch: "
                f"sampler pk, it is {self.sampler}"
            )
        if self.head_start == "previous" and self.start != "previous":
            raise ValueError(f"phase {self.name}: head_start previous needs start previous, it is {self.start}")
        if self.loss.weight == 0 and self.head_start == "class_mean":
            raise ValueError(f"phase {self.name}: head_start class_mean has no effect: loss.weight 0 leaves no head")
        if self.align == "none" and self.align_weight != 1:
            raise ValueError(f"phase {self.name}: align_weight {self.align_weight} has no effect with align none")
        if self.labels == "given" and self.pseudo_confidence != 0.5:
            raise ValueError(
                f"phase {self.name}: pseudo_confidence {self.pseudo_confidence} has no effect with labels given"
            )
        if self.labels == "pseudo" and self.sampler != "epoch":
            raise ValueError(
                f"phase {self.name}: labels pseudo names pictures when the phase starts, sampler {self.sampler} counts "
                "them before; use sampler epoch"
            )
        if self.trains_only_head and (names := [n for n in BACKBONE_FIELDS if self._sets(n)]):
            raise ValueError(
                f"phase {self.name}: {', '.join(names)} would change the backbone, which trainable "
                f"{', '.join(self.trainable)} keeps as it is"
            )

    @property
    def trains_only_head(self) -> bool:
        """Whether the backbone is fixed."""
        return self.trainable in (("head",), ("last:1",))

    @property
    def uses_unnamed(self) -> bool:
        """Whether it learns from pictures without a name."""
        return self.labels == "pseudo" or self.align != "none" or self.distill.active

    def _sets(self, name: str) -> bool:
        value = self.distill if name.startswith("distill.") else self.loss if name.startswith("loss.") else self
        return getattr(value, name.rpartition(".")[2]) not in (0, "none")


BACKBONE_FIELDS = (
    "l2sp",
    "align",
    "prune",
    "distill.embeddings",
    "distill.features",
    "loss.triplet",
    "loss.contrastive",
)
"""Fields that act on the backbone alone."""
