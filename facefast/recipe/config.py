"""Where photographs and weights come from, what is learnt beside names, and what is measured."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Literal, get_args

from facefast.recipe.ranges import MOST, require


def is_remote(root: str | os.PathLike[str]) -> bool:
    """Whether a root is an address such as s3://bucket/folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(root)) is not None


@dataclass(frozen=True)
class BinaryConfig:
    """Yes or no instead of names: is this our person, is this a face. Set one of the two fields."""

    people: tuple[str, ...] = ()
    """Identities of `data.root` to say yes to; all other people in it are negatives. A part of those is kept out of
    training, since strangers are what such a model will meet."""
    negatives: str = ""
    """Folder of pictures to say no to, faces or not; every picture of `data.root` is then a yes."""

    def __post_init__(self) -> None:
        if self.people and self.negatives:
            raise ValueError(
                f"binary.people {', '.join(self.people)} and binary.negatives {self.negatives} contradict each other: "
                "people makes everybody else in data.root a negative, negatives makes everybody in data.root a yes"
            )

    @property
    def active(self) -> bool:
        """Whether the run learns yes or no."""
        return bool(self.people or self.negatives)


LARGEST_EMBEDDING = 1 << 16


Place = Literal["gpu", "regions", "cpu"]
"""Where pictures for a GPU are decoded: there, whole or what the network sees of them; or by the processor's cores."""
HW_DECODER_LOAD = 0.65
"""Part of the pictures that a GPU's JPEG hardware takes where nothing was measured: DALI's own choice."""


@dataclass(frozen=True)
class Reading:
    """How files are read and decoded, and how many of them may be bad."""

    threads: int = 0
    """For reading and for decoding, per process; 0 is one per core."""
    max_bad_fraction: float = 0.01
    """Unreadable files tolerated before the run stops with exit code 65."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels than this are refused (decompression bombs)."""
    decoding: Place = "gpu"
    """Where pictures for a GPU are decoded; without one it has no effect."""
    hw_decoder_load: float = HW_DECODER_LOAD
    """Part of the pictures that the GPU's JPEG hardware takes; its cores take the others."""

    def __post_init__(self) -> None:
        require(self, threads=(0, MOST), max_bad_fraction=(0, 1), max_pixels=(1, MOST), hw_decoder_load=(0, 1))
        if self.decoding not in get_args(Place):
            raise ValueError(f"decoding is {self.decoding!r}; it must be {', '.join(get_args(Place))}")


@dataclass(frozen=True)
class Photographs:
    """Where the photographs are, and what is known of the people in them."""

    root: str = ""
    """Folder of photographs, or the address of shards in an object store (s3://BUCKET/FOLDER); training draws faces
    where it is empty (see `facefast.data.drawn`)."""
    format: Literal["auto", "folder", "celeba", "afad", "lfw", "recordio", "webdataset", "crops", "synthetic"] = "auto"
    """Layout of `root`; auto recognises it."""
    corrections: str = ""
    """suspects.csv of `facefast audit`: rows to leave out, labels to change, identities to merge."""
    labels: str = ""
    """CSV of `facefast label` with identities for pictures that have none."""
    detect: str = "auto"
    """Where faces are: auto takes the data set's landmarks, finds out whether pictures without them are aligned, and
    looks for faces where they are not; mtcnn, or the .onnx file of YuNet, looks through all pictures; none takes the
    middle of pictures without landmarks."""
    max_bad_fraction: float = Reading.max_bad_fraction
    """Unreadable files tolerated before the run stops with exit code 65."""
    max_pixels: int = Reading.max_pixels
    """Pictures with more pixels than this are refused (decompression bombs)."""
    cache: str = ""
    """Folder of this machine, or one that machines share, for what is fetched from an object store; empty is
    facefast/remote in the user's cache."""
    cache_gib: float = 0.0
    """GiB that it may take: what no run reads makes room, the longest unused first; 0 is what the disk has."""

    def __post_init__(self) -> None:
        require(self, "data.", max_bad_fraction=(0, 1), max_pixels=(1, MOST), cache_gib=(0, MOST))
        roots = (self.root, *getattr(self, "more", ()))
        if (self.cache or self.cache_gib) and not any(map(is_remote, roots)):
            raise ValueError(
                f"data.cache {self.cache or self.cache_gib!r} has no effect: data.root {self.root or 'empty'} is no "
                "address of an object store; leave it out"
            )
        if not self.detect:
            raise ValueError("data.detect is empty; it must be auto, mtcnn, none, or a file of YuNet")

    def reading(self, threads: int) -> Reading:
        """How these files are read by so many threads."""
        return Reading(threads, self.max_bad_fraction, self.max_pixels)


@dataclass(frozen=True)
class DataConfig(Photographs):
    """The photographs of a run, and how they are divided."""

    more: tuple[str, ...] = ()
    """Further folders, their layouts recognised: pictures with attributes for `tasks`, or the target domain of
    `align`. Their identities are not classes."""
    label_fraction: float = 1.0
    """Part of each identity's training pictures that keep their name (at least one does); the others are unlabelled,
    as for `phases.K.labels pseudo`."""
    shots: int = 0
    """Training pictures of each identity at most, drawn by the seed; 0 takes all."""
    test_fraction: float = 0.2
    """Part of each identity's pictures kept for testing (closed set): reported once, and nothing is chosen by it."""
    validation_fraction: float = 0.1
    """Part of each identity's training pictures that chooses the checkpoint, the temperature and the thresholds, where
    it has five or more of them."""
    crops: Literal["auto", "never"] = "auto"
    """auto cuts the faces out of large photographs once, into the run folder, and trains on those; the space that it
    takes is said, and too little of it is a reason to decode whole photographs in every epoch."""
    verify_fraction: float = 0.0
    """Part of the identities kept out of training for verification, where the recipe names no split for that."""
    decoding: Literal["auto", "gpu", "regions", "cpu"] = "auto"
    """Where pictures for a GPU are decoded: by its JPEG hardware and its cores (gpu), there but only what the network
    sees of them (regions), or by the processor's cores (cpu); auto measures it in a long run, once per machine and kind
    of pictures. A run that goes on keeps what it began with. Without a GPU it has no effect."""
    hw_decoder_load: float = -1.0
    """Part of the pictures that the GPU's JPEG hardware takes, 0 to 1; -1 is what was measured, else DALI's 0.65."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "data.", shots=(0, MOST))
        if not (self.hw_decoder_load == -1 or 0 <= self.hw_decoder_load <= 1):
            raise ValueError(f"data.hw_decoder_load is {self.hw_decoder_load}; it must be -1 or lie in [0, 1]")
        if self.hw_decoder_load >= 0 and self.decoding == "cpu":
            raise ValueError(
                f"data.hw_decoder_load {self.hw_decoder_load} has no effect: data.decoding cpu gives the GPU no "
                "picture to decode; leave one of them out"
            )
        for name in ("test_fraction", "validation_fraction", "verify_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if not 0 < self.label_fraction <= 1:
            raise ValueError(f"data.label_fraction is {self.label_fraction}; it must lie in (0, 1]")

    def reading(self, threads: int) -> Reading:
        """How these files are read by so many threads, and decoded where nothing was measured."""
        return dataclasses.replace(
            super().reading(threads),
            decoding=Reading.decoding if self.decoding == "auto" else self.decoding,
            hw_decoder_load=HW_DECODER_LOAD if self.hw_decoder_load < 0 else self.hw_decoder_load,
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network, and where its weights come from."""

    backbone: str = "auto"
    """A name that `facefast.models.NAMES` lists, or timm/NAME; auto is the source's, else mobilefacenet."""
    source: str = "none"
    """Source weights: a file, a run or checkpoint folder, imagenet (torchvision's), or none."""
    source_licence: str = ""
    """Licence of the source weights (else of the teacher), in your words. It stays with the model and with what is made
    of it; where nobody tells, a facefast model as source does, or it is unknown."""
    partial: bool = False
    """Start from a source that lacks tensors of the backbone, which keep their random values."""
    teacher: str = "none"
    """The model that `phases.K.distill` learns from: a run, checkpoint or package folder, a weights file, source (the
    source model as it is), or none."""
    embedding: int = 0
    """Numbers in an embedding; 0 is the source's, or the backbone's usual."""
    head: Literal["linear", "cosine"] = "linear"
    """linear gives logits; cosine gives cos(angle), scaled and given a margin by the loss."""
    shard_head: Literal["none", "ranks"] = "none"
    """ranks divides the classes of a cosine head, and their optimiser's state, among the processes (An et al. 2022),
    for more people than one GPU has room for; the loss stays exact over all of them."""
    dropout: float = 0.0
    """Dropout before the heads, in training."""
    drop_path: float = 0.0
    """Stochastic depth: probability of leaving out the last residual block, falling linearly to the first."""
    batchnorm: Literal["rank", "sync"] = "rank"
    """Whose pictures BatchNorm takes its statistics of in training: each process's own, or (sync) those of all
    processes, which then train as one would with the whole batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1 or not 0 <= self.drop_path < 1:
            raise ValueError(f"model.dropout {self.dropout} and model.drop_path {self.drop_path} must lie in [0, 1)")
        require(self, "model.", embedding=(0, LARGEST_EMBEDDING))


@dataclass(frozen=True)
class TaskConfig:
    """Attributes learnt beside names: a head each on the shared embedding; unknown values count for nothing.

    An attribute with the values 0 and 1 gets a sigmoid focal loss; one with more whole numbers, such as an age, is
    ordinal (CORAL, Cao et al. 2020).
    """

    attributes: tuple[str, ...] = ()
    """Attributes by their names in the data, for instance Male, or age of AFAD."""
    weights: tuple[float, ...] = ()
    """Weight of each attribute's loss; empty is 1 for each."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """uncertainty learns one log-variance per loss, identity included (Kendall et al. 2018)."""
    gamma: float = 2.0
    """Focal exponent of the attributes' losses."""
    alpha: float = -1.0
    """Weight of an attribute's positives, 1 - alpha of its negatives (Lin et al. 2017); below 0 weighs all alike."""

    def __post_init__(self) -> None:
        if len(set(self.attributes)) != len(self.attributes):
            raise ValueError(f"tasks.attributes names one twice: {', '.join(self.attributes)}")
        if self.weights and len(self.weights) != len(self.attributes):
            raise ValueError(
                f"tasks.weights has {len(self.weights)} numbers for {len(self.attributes)} attributes; give one each "
                "or none"
            )
        if any(weight <= 0 for weight in self.weights) or self.gamma < 0 or self.alpha > 1:
            raise ValueError(
                f"tasks.weights {self.weights} must be above 0, tasks.gamma {self.gamma} at least 0 and tasks.alpha "
                f"{self.alpha} at most 1"
            )
        if self.weights and self.weighting == "uncertainty":
            raise ValueError(f"tasks.weights {self.weights} has no effect: tasks.weighting uncertainty learns them")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured after each epoch, and which number chooses the best checkpoint."""

    metric: Literal["auto", "top1", "verification_accuracy", "tar@1e-2", "tar@1e-3", "auc", "tasks"] = "auto"
    """Chooses the checkpoint on the validation part, higher is better; auto is top1 where it has pictures to name, else
    verification_accuracy, else tasks, the mean AUC of the attributes."""
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
    baselines: bool = True
    """Measure what the source model does untrained before fine-tuning it: class means, nearest neighbours and a linear
    probe on its embeddings."""

    def __post_init__(self) -> None:
        require(self, "eval.", pairs=(2, MOST), folds=(1, 32767), batch_size=(1, MOST), every=(1, MOST))

    @property
    def chooses_by_pairs(self) -> bool:
        """Whether `metric` is one of verification."""
        return self.metric not in ("auto", "top1", "tasks")


@dataclass(frozen=True)
class AttributeSpec:
    """An attribute that a model predicts."""

    name: str
    levels: tuple[float, ...] = ()
    """The values of an ordinal attribute in rising order; none for one that is 0 or 1."""

    @property
    def outputs(self) -> int:
        """Logits that it takes: one for yes or no, one for each step from a level to the next."""
        return max(1, len(self.levels) - 1)
