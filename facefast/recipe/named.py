"""Named recipes: plain functions returning a `Recipe`. A docstring's first line stands in the list of recipes; the
command, and what to expect, follow it.

`train` picks one when none is named: `drawn` without --data.root, `finetune` with a source model, else `scratch`. What
each of the others is good for on real faces stands in docs/transfer.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from facefast.recipe import (
    AdaptConfig,
    AugmentSpec,
    BinaryConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    ImageSpec,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    TaskConfig,
)


@dataclass(frozen=True)
class Given:
    """What the command line says of a run before its recipe is known."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    binary: BinaryConfig = BinaryConfig()
    tasks: TaskConfig = TaskConfig()


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


def drawn(given: Given) -> Recipe:
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


FLIP = AugmentSpec(flip=0.5)
LAST = Phase(
    name="last",
    start="source",
    head_start="class_mean",
    epochs=3,
    batch_size=64,
    lr=0.01,
    warmup=0.1,
    trainable=("last:3",),
    batchnorm="auto",
    loss=COSINE_SOFTMAX,
    augment=FLIP,
)
"""From a source model: the last stages, from the class means."""
ADAPT = AdaptConfig(choose="auto")
ALL = dataclasses.replace(
    LAST,
    name="all",
    start="previous",
    head_start="previous",
    epochs=0.5,
    lr=0.002,
    layer_decay=0.7,
    trainable=("all",),
)
"""After `LAST`: everything, each stage further from the head slower."""
FIXED = dataclasses.replace(
    LAST, name="fixed", epochs=10, lr=0.02, trainable=("head",), augment=AugmentSpec(), batchnorm="frozen"
)
"""The head alone, on features computed once."""


def finetune(given: Given) -> Recipe:
    """Staged fine-tuning: adaptation, class means, the last stages, then all, ever slower.

    The default where there is a source model. Each stage has to win on pictures kept out of training.

    Command: `torchrun --standalone --nproc-per-node 2 -m facefast.train --data.root DIR --model.source FILE`.
    """
    return _from_source(given, dataclasses.replace(LAST, adapt=ADAPT), ALL)


def adapt(given: Given) -> Recipe:
    """Adaptation alone, in seconds: BatchNorm statistics and whitening, then class means.

    Command: `facefast train adapt --data.root DIR --model.source FILE`.
    """
    return _from_source(given, _varied("adapt", adapt=ADAPT, epochs=0))


def fixed(given: Given) -> Recipe:
    """Fixed weights: features are computed once, only the head learns from them.

    Command: `facefast train fixed --data.root DIR --model.source FILE`.
    """
    return _from_source(given, FIXED)


def share(given: Given) -> Recipe:
    """Weight sharing: all layers start from the source, the last ones and the head learn.

    The head starts random.

    Command: `facefast train share --data.root DIR --model.source FILE [--phases.share.trainable last:2]`.
    """
    return _from_source(given, _varied("share", head_start="random", lr=0.02, epochs=4))


def twophase(given: Given) -> Recipe:
    """The classical tutorial's two phases: softmax with dropout, then focal loss, slowly.

    Adam at 3e-4, then at 3e-5, each halved every 5 epochs.

    Command: `facefast train twophase --data.root DIR --model.source FILE`.
    """
    adam = {"optimizer": "adam", "schedule": "step", "step_epochs": 5, "step_gamma": 0.5, "warmup": 0.0}
    pretrain = _varied("pretrain", head_start="random", epochs=10, lr=3e-4, weight_decay=0.0, loss=LossConfig(), **adam)
    refine = dataclasses.replace(
        pretrain, name="refine", start="previous", head_start="previous", epochs=5, lr=3e-5, loss=LossConfig(gamma=2.0)
    )
    return _from_source(given, pretrain, refine, model=ModelConfig(dropout=0.5))


def extract(given: Given) -> Recipe:
    """Feature extraction, then fine-tuning: head on fixed features, then the last stages.

    Command: `facefast train extract --data.root DIR --model.source FILE`.
    """
    return _from_source(given, FIXED, dataclasses.replace(LAST, start="previous", head_start="previous"))


def softmax(given: Given) -> Recipe:
    """Plain softmax cross entropy on a linear head, not the default's cosine margin.

    Command: `facefast train softmax --data.root DIR --model.source FILE [--phases.softmax.loss.label-smoothing 0.1]`.
    """
    return _from_source(given, _varied("softmax", loss=LossConfig(), epochs=4), model=ModelConfig())


def focal(given: Given) -> Recipe:
    """Focal loss with class weights, for identities of very different size.

    A class weighs by the effective number of its pictures.

    Command: `facefast train focal --data.root DIR --model.source FILE`.
    """
    return _from_source(given, _with_loss("focal", gamma=2.0, class_weights="effective"))


def arcface(given: Given) -> Recipe:
    """ArcFace's angular margin.

    Command: `facefast train arcface --data.root DIR --model.source FILE`.
    """
    return _from_source(given, _with_loss("arcface", margin="arc", margin_size=0.2))


def cosface(given: Given) -> Recipe:
    """CosFace's cosine margin, as wide as its paper has it.

    Command: `facefast train cosface --data.root DIR --model.source FILE`.
    """
    return _from_source(given, _with_loss("cosface", margin_size=0.35))


def adaface(given: Given) -> Recipe:
    """AdaFace's margin, which pictures of low quality are spared.

    Command: `facefast train adaface --data.root DIR --model.source FILE`.
    """
    return _from_source(given, _with_loss("adaface", margin="ada", margin_size=0.2))


def triplet(given: Given) -> Recipe:
    """Triplets instead of classes, for sets that are only verified.

    Command: `facefast train triplet --data.root DIR --model.source FILE`; classes beside the triplets with
    --phases.triplet.loss.weight 1 --phases.triplet.head-start class_mean.
    """
    return _pairwise(given, "triplet", LossConfig(weight=0.0, triplet=1.0))


def contrastive(given: Given) -> Recipe:
    """Supervised contrastive loss instead of classes, for sets that are only verified.

    Command: `facefast train contrastive --data.root DIR --model.source FILE`.
    """
    return _pairwise(given, "contrastive", LossConfig(weight=0.0, contrastive=1.0))


def distill(given: Given) -> Recipe:
    """A shallower student learns its teacher's embeddings beside the labels.

    It starts from some of the teacher's layers.

    Command: `facefast train distill --data.root DIR --model.teacher RUN [--data.more DIR]`; a --model.backbone of
    another kind than the teacher's needs --phases.distill.start scratch.
    """
    if given.model.teacher == "none":
        raise ValueError("recipe distill needs --model.teacher RUN, the model to learn from")
    student = Phase(
        name="distill",
        start="teacher",
        head_start="class_mean",
        epochs=10,
        batch_size=64,
        lr=0.05,
        warmup=0.1,
        loss=COSINE_SOFTMAX,
        distill=DistillConfig(embeddings=20.0),
        augment=MILD,
    )
    model = ModelConfig(teacher=given.model.teacher, head="cosine")
    return Recipe(model=model, phases=(student,))


def regularised(given: Given) -> Recipe:
    """Fine-tuning on a leash: L2-SP towards the source, mixup, drop path, averaged weights.

    Command: `facefast train regularised --data.root DIR --model.source FILE`.
    """
    phase = _varied("regularised", trainable=("all",), layer_decay=0.7, l2sp=0.01, mixup=0.1)
    return _from_source(given, phase, ema=0.98, model=ModelConfig(head="cosine", drop_path=0.05))


def multitask(given: Given) -> Recipe:
    """Names and attributes at once, a head each.

    Further folders may know only attributes, such as AFAD's ages.

    Command: `facefast train multitask --data.root DIR --model.source FILE --tasks.attributes Male [--data.more AFAD]`.
    """
    if not given.tasks.attributes:
        raise ValueError("recipe multitask needs --tasks.attributes NAME..., what to learn beside names")
    return _from_source(given, _varied("multitask", epochs=4), tasks=TaskConfig(attributes=given.tasks.attributes))


def binary(given: Given) -> Recipe:
    """One output, yes or no: is this our person, or is this a face.

    --binary.people NAME... asks the first, --binary.negatives DIR the second.

    Command: `facefast train binary --data.root DIR --model.source FILE --binary.people NAME`.
    """
    if not given.binary.active:
        raise ValueError("recipe binary needs --binary.people NAME... or --binary.negatives DIR: whom to say no to")
    phase = _varied("binary", head_start="random", loss=LossConfig(weight=0.0), epochs=4)
    return _from_source(
        given,
        phase,
        binary=given.binary,
        tasks=TaskConfig(alpha=0.75),
    )


def prune(given: Given) -> Recipe:
    """Magnitude pruning with fine-tuning: half of the weights end at 0.

    The others make up for them, drawn to the embeddings of the source model with all its weights.

    Command: `facefast train prune --data.root DIR --model.source FILE [--phases.prune.prune 0.7]`.
    """
    phase = _varied("prune", trainable=("all",), prune=0.5, epochs=4, distill=DistillConfig(embeddings=20.0))
    return _from_source(given, phase, model=ModelConfig(head="cosine", teacher="source"))


def pseudolabel(given: Given) -> Recipe:
    """Named pictures first, then two rounds with the names that the model gives the others.

    Command: `facefast train pseudolabel --data.root DIR --model.source FILE [--data.more DIR]`.
    """
    first = _varied("named", epochs=2)
    rounds = [_varied(name, start="previous", labels="pseudo", epochs=2) for name in ("round1", "round2")]
    return _from_source(given, first, *rounds)


def align(given: Given) -> Recipe:
    """Brings pictures without a name, from another camera say, to those with one.

    It is the statistics of their embeddings that are brought together.

    Command: `facefast train align --data.root DIR --model.source FILE --data.more TARGET`.
    """
    return _from_source(given, _varied("align", align="coral"))


def _from_source(given: Given, *phases: Phase, **fields: Any) -> Recipe:
    model = fields.pop("model", ModelConfig(head="cosine"))
    return Recipe(model=dataclasses.replace(model, source=given.model.source), phases=phases, **fields)


def _varied(name: str, **fields: Any) -> Phase:
    return dataclasses.replace(LAST, name=name, **fields)


def _with_loss(name: str, **fields: Any) -> Phase:
    return _varied(name, loss=dataclasses.replace(COSINE_SOFTMAX, **fields), epochs=4)


def _pairwise(given: Given, name: str, loss: LossConfig) -> Recipe:
    phase = _varied(name, loss=loss, head_start="random", sampler="pk", epochs=4)
    return _from_source(given, phase, data=DataConfig(verify_fraction=0.2))


def scratch(given: Given) -> Recipe:
    """Trains from random weights: all there is without a source model, else the baseline.

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


RECIPES: dict[str, Callable[[Given], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        drawn,
        finetune,
        scratch,
        adapt,
        fixed,
        share,
        twophase,
        extract,
        softmax,
        focal,
        arcface,
        cosface,
        adaface,
        triplet,
        contrastive,
        distill,
        regularised,
        multitask,
        binary,
        prune,
        pseudolabel,
        align,
    )
}


def with_scratch_baseline(recipe: Recipe) -> Recipe:
    """The recipe preceded by a phase from random weights, on the pictures of its last phase and the budget of all."""
    last = recipe.phases[-1]
    baseline = dataclasses.replace(
        last,
        name="scratch",
        start="scratch",
        head_start="random",
        epochs=sum(phase.epochs for phase in recipe.phases) or 1.0,  # a recipe that only adapts has no budget
        adapt=AdaptConfig(),
        batchnorm="train",
        lr=0.1,
        layer_decay=1.0,
        trainable=("all",),
    )
    return dataclasses.replace(recipe, phases=(baseline, *recipe.phases))
