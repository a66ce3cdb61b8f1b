"""A whole run, and what contradicts itself in one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from facefast.recipe.config import BinaryConfig, DataConfig, EvalConfig, ModelConfig, TaskConfig
from facefast.recipe.image import ImageSpec
from facefast.recipe.jsonable import not_finite
from facefast.recipe.phase import Phase
from facefast.recipe.ranges import LARGEST_SEED, MOST, require


@dataclass(frozen=True)
class Recipe:
    """A whole run. Named ones are functions in `facefast.recipe.named`."""

    data: DataConfig = field(default_factory=DataConfig)
    image: ImageSpec = field(default_factory=ImageSpec)
    model: ModelConfig = field(default_factory=ModelConfig)
    phases: tuple[Phase, ...] = (Phase(),)
    tasks: TaskConfig = field(default_factory=TaskConfig)
    binary: BinaryConfig = field(default_factory=BinaryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    """Everything drawn in a run follows from it."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto is bf16 on a GPU or a CPU with bf16 instructions, else fp32."""
    channels_last: bool = True
    """Memory format of pictures and convolutions: NHWC is the faster one on GPUs and on CPUs (1.75 times measured)."""
    compile: Literal["auto", "never", "always"] = "auto"
    """auto: on a GPU an update is recorded as a CUDA graph, and the network of a long phase compiled (torch.compile);
    always compiles on any device and in any phase; never does neither."""
    cudnn_benchmark: bool = False
    """On a GPU cuDNN measures its algorithms for each shape of a convolution and takes the fastest; a run that goes on
    may choose others, and then ends with other last bits than one that never stopped."""
    ema: float = 0.0
    """Decay of averaged weights, evaluated and saved beside the raw ones; 0 is off."""
    threads: int = 0
    """Decoding threads per process; 0 shares the cores among the processes."""
    rank_timeout: float = 120.0
    """Seconds after which a process that no longer answers is named and ends the run, to go on later; 0 waits."""
    save_every: int = 0
    """Steps between step-N checkpoints; 0 saves after each epoch."""
    keep: int = 3
    """step-N checkpoints kept (best and last are always kept)."""
    log_every: int = 10
    """Steps between metric lines."""
    pictures: int = 16
    """Augmented training pictures that TensorBoard shows of each phase; 0 keeps photographs out of the run folder."""
    projector: bool = False
    """Write test embeddings for TensorBoard's projector at the end."""

    FORMER: ClassVar[dict[str, dict[bool, str]]] = {"compile": {False: "never", True: "always"}}
    """What options that were true or false are now called, for recipes of then."""

    def __post_init__(self) -> None:
        names = [phase.name for phase in self.phases]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"phases are named {names}; a run needs at least one and different names")
        for name, value in not_finite(self):
            raise ValueError(f"{name} is {value}; give a finite number (0 turns most options off)")
        require(self, seed=(0, LARGEST_SEED), pictures=(0, MOST), threads=(0, MOST))
        require(self, keep=(1, MOST), log_every=(1, MOST), save_every=(0, MOST))
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must lie in [0, 1)")
        if self.rank_timeout < 0:
            raise ValueError(f"rank_timeout is {self.rank_timeout}; it must be at least 0 seconds (0 waits for ever)")
        if self.phases[0].start == "previous":
            raise ValueError(f"phase {names[0]} comes first: its start must be source, teacher or scratch")
        for phase in self.phases:
            if phase.loss.margin != "none" and self.model.head != "cosine":
                raise ValueError(
                    f"phase {phase.name}: loss.margin {phase.loss.margin} needs model.head cosine, "
                    f"it is {self.model.head}"
                )
        # An option without effect is an error: it is refused here, before anything slow happens.
        if self.model.batchnorm == "sync" and all(phase.batchnorm == "frozen" for phase in self.phases):
            raise ValueError("model.batchnorm sync has no effect: every phase has batchnorm frozen")
        self._check_source_and_teacher()
        self._check_tasks()
        self._check_shards()

    def _check_source_and_teacher(self) -> None:
        names = ", ".join(phase.name for phase in self.phases)
        uses_source = any(phase.start == "source" for phase in self.phases)
        if uses_source and self.model.source == "none":
            raise ValueError("a phase starts from model.source, which is none; set it to a file or a name")
        if not uses_source and self.model.source != "none":
            raise ValueError(
                f"model.source {self.model.source} has no effect: no phase has start source (phases: {names})"
            )
        if self.model.partial and self.model.source == "none":
            raise ValueError("model.partial has no effect without model.source")
        if self.model.source_licence and self.model.source == self.model.teacher == "none":
            raise ValueError(
                f"model.source_licence {self.model.source_licence!r:.80} has no effect: there are no source weights"
            )
        asks = [phase for phase in self.phases if phase.distill.active or phase.start == "teacher"]
        if asks and self.model.teacher == "none":
            does = "distils" if asks[0].distill.active else "starts from the teacher"
            raise ValueError(
                f"phase {asks[0].name} {does}, but model.teacher is none; set it to a run folder or a file"
            )
        if not asks and self.model.teacher != "none":
            raise ValueError(
                f"model.teacher {self.model.teacher} has no effect: no phase has start teacher or sets distill.logits, "
                f"distill.embeddings or distill.features (phases: {names})"
            )
        if self.model.teacher == "source" and not uses_source:
            raise ValueError("model.teacher source is the model that start source begins with, and no phase has that")
        if self.model.teacher == "source" and any(phase.start == "teacher" for phase in self.phases):
            raise ValueError(
                "start teacher needs a model.teacher of its own; layers of the source come by start source"
            )
        if self.compile == "always" and any(phase.distill.features for phase in self.phases):
            raise ValueError("compile always hides the stages' outputs that distill.features compares; leave one out")
        pulled = [phase.name for phase in self.phases if phase.l2sp]
        if pulled and not uses_source:
            raise ValueError(f"phase {pulled[0]}: l2sp pulls towards model.source, and no phase starts from one")

    def _check_tasks(self) -> None:
        for phase in self.phases:
            learns = phase.loss.weight > 0 or phase.loss.pairwise or phase.distill.active or self.learns_attributes
            if not learns:
                raise ValueError(f"phase {phase.name}: every loss has weight 0, there is nothing to learn")
            if self.learns_attributes and (phase.mixup or phase.cutmix):
                raise ValueError(f"phase {phase.name}: mixup and cutmix are not combined with tasks or binary")
            if self.binary.active and (phase.loss.weight > 0 or phase.loss.pairwise or phase.labels == "pseudo"):
                raise ValueError(
                    f"phase {phase.name}: binary learns yes or no instead of names; set loss.weight, loss.triplet and "
                    "loss.contrastive to 0 and labels to given, or take the recipe binary"
                )
        if self.binary.active and self.tasks.attributes:
            raise ValueError("binary and tasks.attributes are not combined; leave one out")
        if self.tasks.weighting == "uncertainty" and not self.learns_attributes:
            raise ValueError("tasks.weighting uncertainty has no effect without tasks.attributes")
        unlabelled = any(phase.uses_unnamed for phase in self.phases)
        if self.data.label_fraction < 1 and self.data.labels:
            raise ValueError("data.label_fraction hides names and data.labels gives some; leave one out")
        if self.data.more and not (self.learns_attributes or unlabelled):
            raise ValueError(
                f"data.more {', '.join(self.data.more)} has no effect: nothing learns from pictures without a name; "
                "set tasks.attributes, phases.K.labels pseudo, phases.K.distill or phases.K.align"
            )

    def _check_shards(self) -> None:
        """What a head that lies on several processes cannot do, none of which holds it whole."""
        if self.model.shard_head == "none":
            for phase in self.phases:
                if phase.loss.negatives < 1:
                    raise ValueError(
                        f"phase {phase.name}: loss.negatives {phase.loss.negatives} needs model.shard_head ranks"
                    )
            return
        if self.model.head != "cosine":
            raise ValueError(f"model.shard_head ranks needs model.head cosine, it is {self.model.head}")
        if all(phase.loss.weight == 0 for phase in self.phases):
            raise ValueError("model.shard_head ranks has no effect: no phase has a head (loss.weight is 0)")
        for phase in self.phases:
            if phase.optimizer == "lamb":
                raise ValueError(
                    f"phase {phase.name}: optimizer lamb goes by the length of a whole tensor, of which "
                    "model.shard_head ranks leaves a process a part; take sgd, adam or adamw"
                )
            if phase.distill.logits:
                raise ValueError(
                    f"phase {phase.name}: distill.logits compares the logits of all classes, which model.shard_head "
                    "ranks gives to no process; use distill.embeddings"
                )
        if self.eval.baselines and any(phase.start == "source" for phase in self.phases):
            raise ValueError(
                "eval.baselines compares with class means of all people, which model.shard_head ranks gives to no "
                "process; set eval.baselines False"
            )

    @property
    def learns_attributes(self) -> bool:
        """Whether there are heads beside the identities' one."""
        return bool(self.tasks.attributes) or self.binary.active
