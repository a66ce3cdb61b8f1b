"""How a phase begins: the source and the teacher, what the recipe left open, names for pictures without one, the head,
and the source model's embeddings for what it does untrained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.corrections import Label, read_labels, write_labels
from facefast.data.divide import PhaseData
from facefast.evaluation.baselines import LabelledEmbeddings, class_means
from facefast.evaluation.embed import Mirror, embed_rows, single
from facefast.labels.clustering import assign
from facefast.models import STUDENTS, FaceModel, Source, build_model, checkpoint, inherit, load_source
from facefast.models.batchnorm import takes_statistics
from facefast.models.build import DEFAULT_BACKBONE, without_memory
from facefast.models.provenance import of_run
from facefast.recipe import AdaptConfig, ImageSpec, Phase, PhasePlan, Recipe, to_json
from facefast.runtime import files
from facefast.runtime.log import RunLog
from facefast.training import sample
from facefast.training.adapt import Adaptation, Embedding, Measuring, adapt
from facefast.training.distill import Teacher, caches_teacher
from facefast.training.losses import best_probability
from facefast.training.restate import statistics_of
from facefast.training.step import SideInputs, TrainState
from facefast.training.transfer import caches_features


def find_source(recipe: Recipe) -> Source | None:
    """The source model's weights, read before anything slow happens."""
    if recipe.model.source == "none":
        return None
    return load_source(recipe.model.source, recipe.model.backbone)


def find_teacher(recipe: Recipe, source: Source | None, device: torch.device) -> FaceModel | None:
    """The model that phases distil from, in evaluation mode; None where there is none beside the source.

    Raises:
        ValueError: there is none, or the student could not start from its layers, which is found out before any
            photograph is read.
    """
    if recipe.model.teacher in ("none", "source"):
        return None
    path = Path(recipe.model.teacher)
    if not path.exists():
        raise ValueError(f"model.teacher {path} does not exist; give a run, checkpoint or package folder, or weights")
    teacher = checkpoint.load_model(path, device)
    if any(phase.start == "teacher" for phase in recipe.phases):
        config = dataclasses.replace(recipe.model, source="none", backbone=_backbone(recipe, source, teacher))
        # Only whether names and shapes fit is of interest: tensors without memory are enough.
        with without_memory():
            inherit(build_model(config, 0, teacher.image), teacher)
    if any(phase.distill.features for phase in recipe.phases):
        teacher.stage_ends()
    return teacher


def settle(recipe: Recipe, source: Source | None, teacher: FaceModel | None, datasets: tuple[PhaseData, ...]) -> Recipe:
    """The recipe with everything that was left to the source model, the teacher or the photographs written down."""
    image = pictures_of(recipe, source, teacher)
    if image.template == "auto":
        has_landmarks = all(data.train.landmarks is not None for data in datasets)
        image = dataclasses.replace(image, template="arcface" if has_landmarks else "none")
    embedding = recipe.model.embedding or (source.embedding if source else 0)
    model = dataclasses.replace(recipe.model, backbone=_backbone(recipe, source, teacher), embedding=embedding)
    return dataclasses.replace(recipe, image=image, model=model)


def pictures_of(recipe: Recipe, source: Source | None, teacher: FaceModel | None) -> ImageSpec:
    """What the model will take: settled but for template auto, which the photographs decide."""
    # What the user typed wins where the weights do not depend on it; where they do, `settled` refuses it.
    image = recipe.image.settled(source.image, source.fixed) if source else recipe.image
    if teacher is not None:
        # Teacher and student look at one batch: every field must be the teacher's.
        image = image.settled(teacher.image, [field.name for field in dataclasses.fields(ImageSpec)])
    return image.settled()


def _backbone(recipe: Recipe, source: Source | None, teacher: FaceModel | None) -> str:
    """The user's, the source's, the next shallower than the teacher's, or MobileFaceNet."""
    if recipe.model.backbone != "auto":
        return recipe.model.backbone
    if source is not None:
        return source.backbone or DEFAULT_BACKBONE
    return STUDENTS.get(teacher.config.backbone, DEFAULT_BACKBONE) if teacher else DEFAULT_BACKBONE


def starting_model(
    state: TrainState, number: int, data: PhaseData, source: Source | None, teacher: FaceModel | None
) -> FaceModel:
    """Random weights, with those of the source model, the teacher or the phase before copied over them."""
    recipe, phase = state.recipe, state.recipe.phases[number]
    config = recipe.model if phase.start == "source" else dataclasses.replace(recipe.model, source="none")
    # By a seed of its own: the same first weights on every rank, whatever was drawn before.
    with torch.random.fork_rng():
        torch.manual_seed(state.plan.phases[number].seed)
        model = build_model(
            config,
            state.plan.phases[number].num_classes if phase.loss.weight else 0,
            recipe.image,
            data.train.class_names if phase.loss.weight else (),
            source if phase.start == "source" else None,
            data.attributes,
            state.sharing,
        )
    model.scale, model.faces = phase.loss.scale, state.faces
    model.provenance = of_run(source, recipe.model.source_licence, teacher)  # of every phase, whatever it starts from
    if model.attribute_heads is not None:
        model.attribute_heads.start_from(data.values())
    if phase.start == "teacher":
        assert teacher is not None
        inherit(model, teacher)
    # A run that goes on inside this phase has no model before it here: its weights come from the checkpoint.
    if phase.start == "previous" and number > state.phase_number:
        _take_over(model, state.evaluated, phase.head_start)
    return model


def _take_over(model: FaceModel, before: FaceModel, head_start: str) -> None:
    """The weights of the phase before; its heads too where they stand for the same and are wanted."""
    model.adaptation = before.adaptation
    model.add_layers(before.layers())
    kept = dict(before.state_dict())
    # By name and in order: row k of a head's weight stands for class k.
    same_classes = model.class_names == before.class_names and type(model.head) is type(before.head)
    if head_start != "previous" or not same_classes:
        kept = {name: value for name, value in kept.items() if not name.startswith("head.")}
    if model.to_config()["attributes"] != before.to_config()["attributes"]:
        kept = {name: value for name, value in kept.items() if not name.startswith("attribute_heads.")}
    model.load_state_dict(kept, strict=False)


def embed_pictures(
    state: TrainState, model: FaceModel, index: FaceIndex, mirror: Mirror = "mean"
) -> tuple[Tensor, Tensor]:
    """[N, D] embeddings of pictures without augmentation, as the run reads and computes, and which were readable."""
    size = state.recipe.eval.batch_size
    return embed_rows(model, index, state.run, state.precision, state.reading, batch_size=size, mirror=mirror)


@dataclasses.dataclass(frozen=True)
class Start:
    """A phase that has begun."""

    data: PhaseData
    """The phase's data, with the names that were given to pictures without one."""
    adapted: LabelledEmbeddings | None = None
    """Embeddings of it by the adapted model, where the source was adapted and the baselines are wanted."""


def begin(
    folder: Path,
    state: TrainState,
    number: int,
    data: PhaseData,
    source: Source | None,
    teacher: FaceModel | None,
    saved: Path | None,
    log: RunLog,
) -> Start:
    """Enters a phase: its weights, its labels, its head, its optimiser; or all of them as a checkpoint has them."""
    phase, plan = state.recipe.phases[number], state.plan.phases[number]
    log.say(
        f"phase {phase.name}: {plan.num_rows} pictures of {plan.num_classes} identities, {plan.steps} steps "
        f"of {phase.batch_size}, {'goes on' if saved else 'starts from ' + phase.start}"
    )
    model = starting_model(state, number, data, source, teacher)
    if model.report is not None and not saved:
        log.say(str(model.report))
    # Ahead of `state.load`: a feature cache made below must be of the weights that the run stopped with.
    if saved:
        document = files.read_json(saved / "model.json")
        model.adaptation = document.get("adaptation")
        model.add_layers(document)
        model.load_state_dict(checkpoint.read_weights(saved, model))
        state.anchored = checkpoint.read_tensors(saved, "anchor") or None
    model.to(state.run.device)
    if state.precision.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if phase.start == "source" and not saved:
        state.anchored = None
    # A run that goes on embeds nothing: its head is in the checkpoint, the names are in a file.
    fresh: Embedded | None = None
    adapted = False
    if not saved and (phase.head_start == "class_mean" or phase.labels == "pseudo" or phase.adapt.active):
        network = model
        if phase.start == "teacher" and teacher is not None and teacher.embedding_size == model.embedding_size:
            network = teacher  # the layers that a student took over do not fit each other yet
        fresh, adapted = _embedded(state, phase, plan, network, data, log)
        if model.adaptation is not None and any(each.l2sp for each in state.recipe.phases) and adapted:
            own = model.state_dict().items()
            state.anchored = {name: tensor.clone() for name, tensor in own if not name.startswith(HEADS)}
    if phase.labels == "pseudo":
        names = None if fresh is None else (fresh.embeddings, fresh.seen)
        data = with_pseudo_labels(
            folder / f"pseudo-labels-{phase.name}.csv", state, data, phase.pseudo_confidence, names, log
        )
    # After the names were given: class weights and the warnings below are about what will be trained on.
    labels = data.labels()
    counts = labels[labels >= 0].bincount(minlength=plan.num_classes)
    for warning in advice(counts, phase):
        log.say(f"note: {warning}")
    if phase.head_start == "class_mean" and fresh is not None and model.head is not None:
        # A cosine head takes the directions; a linear one also needs the usual length of an embedding.
        block, whose = model.head.block, labels[fresh.rows]
        mine = fresh.seen & (whose >= block.start) & (whose < block.stop)
        means = class_means(fresh.embeddings, (whose - block.start).where(mine, -1), len(block))
        model.head.start_from(means, float(fresh.embeddings[fresh.seen].norm(dim=1).mean()))
    state.enter(number, model, side_inputs(state, number, model, data, source, teacher, counts))
    if saved:
        state.load(saved)
    if state.run.device.type == "cuda" and state.unrecorded and state.recipe.compile != "never":
        log.say(f"note: updates are not recorded as a CUDA graph: {state.unrecorded}")
    for warning in batchnorm_advice(state):
        log.say(f"note: {warning}")
    if fresh is None or not adapted or state.model.adaptation is None or not wants_baselines(state, data):
        return Start(data)
    return Start(data, LabelledEmbeddings(fresh.embeddings, labels.where(fresh.seen, -1), plan.num_classes))


def wants_baselines(state: TrainState, data: PhaseData) -> bool:
    """Whether this phase's final table says what the source does without any update."""
    return state.phase.start == "source" and state.recipe.eval.baselines and bool((data.labels() >= 0).any())


class Embedded(NamedTuple):
    """Embeddings of training pictures."""

    rows: Tensor
    """[K] int64, which pictures."""
    embeddings: Tensor
    """[K, D] of any length."""
    seen: Tensor
    """[K] bool, which could be read."""


def _embedded(
    state: TrainState, phase: Phase, plan: PhasePlan, model: FaceModel, data: PhaseData, log: RunLog
) -> tuple[Embedded, bool]:
    """What a phase that begins is to know of its pictures, and whether the model was adapted to them, in place.

    Training goes on from the head that class means give, for which some pictures of each person are enough. All of
    them are embedded, with their mirror images, where an adaptation may be worth it, where the model names pictures,
    and where no update follows.
    """
    seed, auto = state.recipe.seed, phase.adapt.choose == "auto"
    whole = len(data.train) <= sample.MOST or not plan.steps or phase.labels == "pseudo"
    looked: sample.Look | None = None
    if phase.adapt.active and not whole:
        if auto:
            looked = sample.look(model.eval(), data.train, *asking(state), state.run, seed)
            for text in looked.told():
                log.say(text)
        whole = looked is None or looked.promising
    if not whole:
        return _few(state, model, data, looked), False
    # Apart where the adaptation is to be chosen, for which pictures are taken as they are.
    both, seen = embed_pictures(state, model, data.train, "joined" if auto else "mean")
    fresh, plain = (single(both, model.embedding_size), seen), both[:, : model.embedding_size]
    if phase.adapt.active:
        fresh = _adapted(state, phase, model, data, fresh, plain if auto else None, log)
    return Embedded(torch.arange(len(data.train)), *fresh), phase.adapt.active


def _few(state: TrainState, model: FaceModel, data: PhaseData, looked: sample.Look | None) -> Embedded:
    """Embeddings, without mirror images, of a few pictures of each person, those that were looked at already among
    them; of all pictures of a person of whom none of these can be read."""
    labels = np.where(data.train.faults == 0, data.train.labels, -1)
    embed = asking(state).embed
    known = Embedded(torch.zeros(0, dtype=torch.long), torch.zeros(0, model.embedding_size), torch.zeros(0).bool())
    if looked is not None:
        known = Embedded(torch.from_numpy(looked.rows), looked.embeddings, looked.seen)
    wanted = sample.few_of_each(labels, sample.EACH_OF_HEAD, state.recipe.seed)
    for _ in range(2):
        rows = np.setdiff1d(wanted, known.rows.numpy())
        if len(rows):
            more = Embedded(torch.from_numpy(rows), *embed(model, data.train.select(rows), False))
            known = Embedded(*map(torch.cat, zip(known, more, strict=True)))
        readable = labels[known.rows[known.seen].numpy()]
        wanted = np.flatnonzero((labels >= 0) & ~np.isin(labels, readable))
    return known


class Asking(NamedTuple):
    """How pictures are put to a model that may be adapted."""

    embed: Embedding
    measure: Measuring


def asking(state: TrainState) -> Asking:
    """As the run reads pictures and computes."""
    run, precision, reading, seed = state.run, state.precision, state.reading, state.recipe.seed

    def embed(network: FaceModel, index: FaceIndex, mirror: bool) -> tuple[Tensor, Tensor]:
        return embed_pictures(state, network, index, "mean" if mirror else "none")

    return Asking(embed, lambda network, index: statistics_of(network, index, run, precision, reading, seed))


def _adapted(
    state: TrainState,
    phase: Phase,
    model: FaceModel,
    data: PhaseData,
    known: tuple[Tensor, Tensor],
    plain: Tensor | None,
    log: RunLog,
) -> tuple[Tensor, Tensor]:
    """Adapts the model in place as the phase wants it; returns its embeddings of the training pictures."""
    done, known = adapted_to(state, phase.adapt, model, data, known, plain)
    for text in done.told():
        log.say(text)
    if done.changes:
        model.adaptation = to_json(done)
    return known


def adapted_to(
    state: TrainState,
    config: AdaptConfig,
    model: FaceModel,
    data: PhaseData,
    known: tuple[Tensor, Tensor],
    plain: Tensor | None = None,
) -> tuple[Adaptation, tuple[Tensor, Tensor]]:
    """Adapts a source model in place to the training pictures, of which it has the embeddings `known`, and `plain`
    where those without mirror images are there, too."""
    model.eval()
    asked = asking(state)
    return adapt(
        model,
        data.train,
        data.unnamed,
        config,
        known,
        embed=asked.embed,
        measure=asked.measure,
        run=state.run,
        seed=state.recipe.seed,
        plain=plain,
    )


HEADS = ("head.", "attribute_heads.")
"""What names of their tensors begin with; L2-SP pulls at none of them."""
FEW_FOR_BATCHNORM = 32
"""Pictures below which a batch's statistics are noticeably worse than those of twice as many."""


def batchnorm_advice(state: TrainState) -> Iterator[str]:
    """A warning where several ranks train otherwise than one would, for BatchNorm's sake."""
    plan, world = state.phase_plan, state.run.world.size
    few = world > 1 and plan.batchnorm_batch < min(plan.batch_size, FEW_FOR_BATCHNORM)
    if few and takes_statistics(state.model):
        yield (
            f"BatchNorm sees {plan.batchnorm_batch} pictures on each of {world} processes, where one process would "
            f"see {plan.batch_size}: the loss differs from that of one; --model.batchnorm sync makes it the same"
        )


def side_inputs(
    state: TrainState,
    number: int,
    model: FaceModel,
    data: PhaseData,
    source: Source | None,
    teacher: FaceModel | None,
    counts: Tensor,
) -> SideInputs:
    """What the phase learns from beside its batches."""
    phase = state.recipe.phases[number]

    def embeddings_of(network: FaceModel) -> Tensor:
        """[N, D], NaN where a picture could not be read."""
        embeddings, seen = embed_pictures(state, network, data.train, "none")
        embeddings[~seen] = torch.nan
        return embeddings.to(state.run.device)

    # Without mirror images: the cache stands for a forward pass in training, which sees the picture as it is.
    cached = embeddings_of(model) if caches_features(phase) else None
    asked: Teacher | None = None
    if phase.distill.active:
        if state.recipe.model.teacher == "source":
            # Built again from the file: the phase's own model starts from the source and then moves.
            whole = build_model(state.recipe.model, 0, state.recipe.image, source=source)
            teacher = whole.to(state.run.device).eval()
        assert teacher is not None
        asked = Teacher(teacher, embeddings_of(teacher) if caches_teacher(phase) else None)
    # L2-SP pulls to where training starts: to the source's weights it would undo the adaptation.
    start = state.anchored or (source.state if source else None)
    return SideInputs(counts, data.values(), cached, asked, start if phase.l2sp else None)


def with_pseudo_labels(
    path: Path,
    state: TrainState,
    data: PhaseData,
    least: float,
    fresh: tuple[Tensor, Tensor] | None,
    log: RunLog,
) -> PhaseData:
    """The data with names for pictures without one, given by the model and kept in a CSV of the run folder.

    A run that goes on in the phase takes the names from the file: it must not give others in the middle.

    Args:
        path: the CSV, as `facefast label` writes it.
        least: confidence from which a name is trained on.
        fresh: embeddings [N, D] and which rows are readable; None reads the file.
    """
    index = data.train
    # Through the file on every path, fresh or resumed, on every rank: all read the same rounded confidences.
    if state.run.is_main and fresh is not None:
        embeddings, seen = fresh
        known = np.where(seen.numpy(), index.labels, -1)
        found, confidences = assign(embeddings.numpy(), known, index.num_classes)
        rows = np.flatnonzero((index.labels < 0) & seen.numpy()).tolist()
        write_labels(path, [Label(index.name(r), index.class_names[found[r]], float(confidences[r])) for r in rows])
    state.run.barrier()
    named = read_labels(index, path, least)
    before, after = int((index.labels < 0).sum()), int((named.labels < 0).sum())
    log.say(
        f"{before - after} of {before} pictures without a name got one with a confidence of {least} or more: {path}"
    )
    return dataclasses.replace(data, train=named)


def advice(counts: Tensor, phase: Phase) -> Iterator[str]:
    """Warnings about a distribution of labels, [C] pictures per class, and about a margin too wide for it."""
    scarce = int((counts <= 2).sum())
    if scarce:
        yield f"{scarce} of {len(counts)} identities have one or two pictures: their accuracy says little"
    if len(counts) and int(counts.max()) > 20 * int(counts.clamp(min=1).min()):
        yield (
            f"the largest identity has {int(counts.max())} pictures, the smallest {int(counts.min())}: "
            f"consider --phases.{phase.name}.sampler balanced"
        )
    reachable = best_probability(phase.loss, len(counts))
    if reachable < 0.9:
        yield (
            f"loss.margin {phase.loss.margin} {phase.loss.margin_size} at loss.scale {phase.loss.scale} is too much "
            f"for {len(counts)} identities: a model that separates them perfectly would be {reachable:.0%} sure; "
            "lower the margin, or raise the scale"
        )
