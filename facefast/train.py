"""The main path: photographs in, a fine-tuned and verified model out. Read it top to bottom and you know the system.

torchrun [...] -m facefast.train [RECIPE] [--data.root DIR] [--out RUN] [--phases.K.FIELD VALUE ...]
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from facefast import checkpoint, cli, ending, files, runtime
from facefast.data import Batch, Loader, Sampler, make_loader, make_sampler, oracle
from facefast.evaluate import embed_rows, evaluate
from facefast.log import Position, RunLog, environment
from facefast.models import FaceModel, Source, build_model, load_source
from facefast.prepare import Stage, prepare
from facefast.recipe import EvalConfig, Recipe, resolve, to_json
from facefast.runtime import Runtime, StorageError, decode_threads
from facefast.step import TrainState, train_step
from facefast.transfer import CachedLoader, advice, caches_features, class_means


def train(recipe: Recipe, folder: Path, resume: str, run: Runtime) -> int:
    """Runs a recipe in a run folder, from its start or from where it was stopped; returns the exit code."""
    source = find_source(recipe)
    stages = prepare(recipe, folder, run)  #                         files -> index -> splits and exams
    recipe = settle(recipe, source, stages)
    plan = resolve(recipe, tuple(stage.facts() for stage in stages), run.world.size)
    state = TrainState(recipe, plan, run)
    saved = find_saved(folder, resume, state)
    with open_log(folder, state, saved) as log:
        for number in range(state.phase, len(stages)):
            stage = stages[number]
            begin(folder, state, number, stage, source, saved, log)
            saved = None
            with open_loader(state, stage) as loader:  #             sampler -> rows -> augment -> dali -> Batch
                show_pictures(state, stage, loader.sampler, log)
                for batches, num_rows in updates(state, loader):
                    stats = train_step(state, batches, num_rows)  #  model -> logits -> focal -> step
                    log.step(where(state), stats, num_rows, loader.wait_seconds)
                    improved = exam_due(recipe.eval, state) and examine(state, stage, log)
                    stopping = run.agree(run.stop_requested)
                    if improved or stopping or save_due(recipe, state):
                        save(folder, state, improved)
                    if stopping:
                        return ending.leave(folder, state, log)
        return ending.finish(folder, state, stages, log)


def open_folder(folder: Path, run: Runtime) -> None:
    """Makes the run folder and finds out at once whether it can be written.

    Raises:
        StorageError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if run.is_main:
            ending.write_status(folder, "running")
    except OSError as error:
        raise StorageError(f"cannot write the run folder {folder}: {error}; choose another --out") from error


def find_source(recipe: Recipe) -> Source | None:
    """The source model's weights, read before anything slow happens."""
    if recipe.model.source == "none":
        return None
    return load_source(recipe.model.source, recipe.model.backbone)


def settle(recipe: Recipe, source: Source | None, stages: tuple[Stage, ...]) -> Recipe:
    """The recipe with everything that was left to the source model or to the photographs written down."""
    image = recipe.image.settled(source.image, source.fixed) if source else recipe.image.settled()
    if image.template == "auto":
        has_landmarks = all(stage.train.landmarks is not None for stage in stages)
        image = dataclasses.replace(image, template="arcface" if has_landmarks else "none")
    backbone = recipe.model.backbone
    if backbone == "auto":
        backbone = source.backbone if source and source.backbone else "mobilefacenet"
    embedding = recipe.model.embedding or (source.embedding if source else 0)
    model = dataclasses.replace(recipe.model, backbone=backbone, embedding=embedding)
    return dataclasses.replace(recipe, image=image, model=model)


def find_saved(folder: Path, resume: str, state: TrainState) -> Path | None:
    """The checkpoint to go on from, its place taken over by `state`; None starts anew.

    Raises:
        ValueError: the run folder holds another recipe or other photographs, naming what differs.
    """
    path = None
    if state.run.is_main and resume == "auto":
        path = checkpoint.newest(folder)
    elif state.run.is_main and resume != "never":
        path = checkpoint.find_model(Path(resume))
        checkpoint.verify(path)
    path = state.run.share(path)
    if path is not None:
        checkpoint.check_same_run(path, state.recipe, state.plan)
        state.phase = files.read_json(path / "state.json")["phase"]
        state.step = files.read_json(path / "state.json")["step"]
    return path


def open_log(folder: Path, state: TrainState, saved: Path | None) -> RunLog:
    """Writes what the run is into its folder and opens its log."""
    recipe, plan, run = state.recipe, state.plan, state.run
    if run.is_main:
        if saved is None:
            checkpoint.discard(folder)
        files.write_json(folder / "recipe.json", to_json(recipe))
        files.write_json(folder / "plan.json", to_json(plan))
        files.write_json(folder / "environment.json", environment(run.world.size, run.device))
        ending.write_status(folder, "running", step=state.step)
    log = RunLog(
        folder,
        enabled=run.is_main,
        total_steps=plan.total_steps,
        first_step=None if saved is None else state.step,
        every=recipe.log_every,
    )
    height, width = recipe.image.shape
    log.say(
        f"{recipe.model.backbone}, {width} x {height} px, template {recipe.image.template}, "
        f"{state.precision.name}{' channels-last' if state.precision.channels_last else ''}, "
        f"{run.world.size} process{'es' if run.world.size > 1 else ''} on {run.device.type}"
    )
    if saved is not None:
        log.say(f"goes on from {saved} (step {state.step} of {plan.total_steps})")
    return log


def begin(
    folder: Path,
    state: TrainState,
    number: int,
    stage: Stage,
    source: Source | None,
    saved: Path | None,
    log: RunLog,
) -> None:
    """Enters a phase: its weights, its head, its optimiser; or all of them as a checkpoint has them."""
    phase, plan = state.recipe.phases[number], state.plan.phases[number]
    log.say(
        f"phase {phase.name}: {plan.num_rows} pictures of {plan.num_classes} identities, {plan.steps} steps "
        f"of {phase.batch_size}, {'goes on' if saved else 'starts from ' + phase.start}"
    )
    labels = torch.tensor(stage.train.labels, dtype=torch.long)
    for warning in advice(labels.bincount(), phase):
        log.say(f"note: {warning}")
    model = starting_model(state, number, stage, source)
    if saved:
        model.load_state_dict(checkpoint.read_tensors(saved, "model"))
    model.to(state.run.device)
    if state.precision.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wants_means = phase.head_start == "class_mean" and not saved
    if wants_means and model.head is not None:
        embeddings, seen = embed_training_rows(state, model, stage, mirror=True)
        means = class_means(embeddings, labels.where(seen, -1), plan.num_classes)
        model.head.start_from(means, float(embeddings[seen].norm(dim=1).mean()))
    cached = None
    if caches_features(phase):
        cached, seen = embed_training_rows(state, model, stage, mirror=False)
        cached[~seen] = torch.nan
    state.enter(number, model, cached)
    if saved:
        state.load(saved)
    elif wants_means and examine(state, stage, log):  # what there is before any training, the floor to beat
        save(folder, state, improved=True)


def starting_model(state: TrainState, number: int, stage: Stage, source: Source | None) -> FaceModel:
    """Random weights, with the source model's or those of the phase before copied over them."""
    recipe, phase = state.recipe, state.recipe.phases[number]
    config = recipe.model if phase.start == "source" else dataclasses.replace(recipe.model, source="none")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + 1000 * number)
        model = build_model(
            config,
            state.plan.phases[number].num_classes,
            recipe.image,
            stage.train.class_names,
            source if phase.start == "source" else None,
        )
    model.scale = phase.loss.scale
    if phase.start == "previous" and number > state.phase:
        weights = state.evaluated.state_dict()
        kept = {name: value for name, value in weights.items() if not name.startswith("head.")}
        model.load_state_dict(kept, strict=False)
    return model


def embed_training_rows(
    state: TrainState, model: FaceModel, stage: Stage, *, mirror: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] embeddings of the phase's training pictures without augmentation, and which rows were readable."""
    return embed_rows(
        model,
        stage.train,
        state.run,
        state.precision,
        batch_size=state.recipe.eval.batch_size,
        threads=state.recipe.threads,
        mirror=mirror,
        max_bad_fraction=state.recipe.data.max_bad_fraction,
        max_pixels=state.recipe.data.max_pixels,
    )


def open_loader(state: TrainState, stage: Stage) -> Loader | CachedLoader:
    """The phase's batches for this rank, in the order that the sampler owns."""
    recipe, run, phase = state.recipe, state.run, state.settings
    batch_size = state.phase_plan.batch_per_rank
    seed = recipe.seed + 1000 * state.phase
    sampler = make_sampler(
        phase.sampler,
        labels=stage.train.labels,
        batch_size=batch_size * run.world.size,
        seed=seed,
        pictures_per_identity=phase.pictures_per_identity,
    )
    if state.embeddings is not None:
        return CachedLoader(state.embeddings, stage.train.labels, sampler, run)
    return make_loader(
        stage.train,
        recipe.image,
        batch_size=batch_size,
        sampler=sampler,
        augment=phase.augment,
        seed=seed,
        rank=run.world.rank,
        world=run.world.size,
        device=run.device,
        dtype=state.precision.dtype,
        channels_last=state.precision.channels_last,
        threads=decode_threads(recipe.threads, run.world),
        max_bad_fraction=recipe.data.max_bad_fraction,
        max_pixels=recipe.data.max_pixels,
    )


def show_pictures(state: TrainState, stage: Stage, sampler: Sampler, log: RunLog) -> None:
    """The phase's first pictures as training sees them, in TensorBoard."""
    recipe, epoch = state.recipe, int(state.epoch)
    if recipe.pictures == 0 or not state.run.is_main:
        return
    rows = sampler.batch(epoch, 0)[: recipe.pictures]
    seed = recipe.seed + 1000 * state.phase
    with contextlib.suppress(ValueError):  # a picture that turned bad is the loader's to count
        images = oracle.render(stage.train, rows[rows >= 0], recipe.image, state.settings.augment, seed, epoch)
        log.pictures(f"{state.settings.name}/pictures", oracle.to_picture(images, recipe.image), state.step)


def updates(state: TrainState, loader: Loader | CachedLoader) -> Iterator[tuple[list[Batch], int]]:
    """What each update of the phase consumes, from the cursor on: this rank's micro-batches, and the valid rows over
    all."""
    plan, accumulate = state.phase_plan, state.settings.accumulate
    while state.phase_step < plan.steps:
        epoch, done = divmod(state.phase_step, plan.steps_per_epoch)
        loader.set_epoch(epoch, done * accumulate)
        batches = iter(loader)
        for first in range(done * accumulate, loader.sampler.steps_per_epoch, accumulate):
            micro = list(itertools.islice(batches, accumulate))
            parts = range(first, first + len(micro))
            yield micro, sum(int((loader.sampler.batch(epoch, part) >= 0).sum()) for part in parts)
            if state.phase_step == plan.steps:
                return


def where(state: TrainState) -> Position:
    """The update just done, for the log."""
    return Position(
        step=state.step,
        phase=state.settings.name,
        epoch=state.epoch,
        lr=state.lr,
        last=state.phase_step == state.phase_plan.steps,
    )


def epoch_ends(state: TrainState, every: int = 1) -> bool:
    """Whether the phase's last update ended one of every `every` epochs, or the phase."""
    plan = state.phase_plan
    return state.phase_step == plan.steps or state.phase_step % (every * plan.steps_per_epoch) == 0


def exam_due(config: EvalConfig, state: TrainState) -> bool:
    """Whether the model is examined after this update."""
    return epoch_ends(state, config.every)


def save_due(recipe: Recipe, state: TrainState) -> bool:
    """Whether a checkpoint is written after this update."""
    if recipe.save_every and state.step % recipe.save_every == 0:
        return True
    return epoch_ends(state) if not recipe.save_every else state.phase_step == state.phase_plan.steps


def examine(state: TrainState, stage: Stage, log: RunLog) -> bool:
    """Measures the model on all ranks and logs it; returns whether it is the phase's best so far."""
    recipe = state.recipe
    state.run.share_buffers(state.evaluated)  # every rank examines the model that rank 0 saves
    results = evaluate(
        state.evaluated,
        stage.exam,
        recipe.eval,
        state.run,
        state.precision,
        threads=recipe.threads,
        max_bad_fraction=recipe.data.max_bad_fraction,
        max_pixels=recipe.data.max_pixels,
    )
    state.set_modes()
    value, name = ending.named_metric(recipe.eval, results)
    improved = state.best is None or value > state.best
    if improved:
        state.best = value
        state.results[state.settings.name] = results
    log.exam(where(state), results, name, improved)
    return improved


def save(folder: Path, state: TrainState, improved: bool) -> None:
    """One checkpoint, written by rank 0."""
    if state.run.is_main:
        checkpoint.save(
            folder,
            state.step,
            tensors=state.tensors(),
            documents=state.documents(),
            best=improved,
            keep=state.recipe.keep,
        )
        ending.write_status(folder, "running", step=state.step, best=ending.best_of(state))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    folder: Path | None = None
    with cli.exit_codes(lambda code, error: ending.fail(folder, code, error)) as outcome:
        recipe, folder, resume = cli.train_arguments(sys.argv[1:] if arguments is None else arguments)
        with runtime.start() as run:
            open_folder(folder, run)
            outcome.code = train(recipe, folder, resume, run)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
