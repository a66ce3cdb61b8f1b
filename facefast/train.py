"""The main path: photographs in, a fine-tuned and verified model out. Read it top to bottom and you know the system.

torchrun [...] -m facefast.train [RECIPE] [--data.root DIR] [--out RUN] [--phases.K.FIELD VALUE ...]
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from facefast.cluster import doctor
from facefast.data import Batch, Loader, Sampler, oracle
from facefast.data.cached import CachedLoader
from facefast.data.divide import PhaseData
from facefast.data.graphs import kept_open
from facefast.data.prepare import prepare
from facefast.faces.align import Locator
from facefast.models import FaceModel, Source, checkpoint
from facefast.recipe import EvalConfig, ImageSpec, Recipe, flags, resolve, to_json
from facefast.runtime import exits, files, process
from facefast.runtime.exits import StorageError
from facefast.runtime.log import RunLog, environment
from facefast.runtime.process import Runtime
from facefast.runtime.progress import print_line
from facefast.runtime.terminal import speaking, tell
from facefast.training.alike import same_arguments, same_checkpoint, same_start
from facefast.training.begin import begin, find_source, find_teacher, pictures_of, settle
from facefast.training.choice import has_best, measure, measure_untrained, report_phase, report_untrained
from facefast.training.decoding import settle_decoding
from facefast.training.elastic import division_said, take_division
from facefast.training.finish import fail, finish, leave, reached, read_status, write_status
from facefast.training.guard import culprit
from facefast.training.objective import RowCounts
from facefast.training.reading import phase_sampler, picture_loader
from facefast.training.saving import save
from facefast.training.step import TrainState, train_step


def train(recipe: Recipe, folder: Path, resume: str, run: Runtime) -> int:
    """Runs a recipe in a run folder, from its start or from where it was stopped; returns the exit code."""
    same_arguments(recipe, folder, resume, run)
    source = find_source(recipe)
    teacher = find_teacher(recipe, source, run.device)
    faces = face_locator(recipe, folder, pictures_of(recipe, source, teacher), run)
    begun = find_index(folder, resume)
    datasets = prepare(recipe, folder, run, begun, faces)  #           files -> index -> splits and evaluations
    state = first_state(recipe, run, source, teacher, datasets, faces)
    saved = find_saved(folder, resume, state)
    settle_decoding(state, saved, datasets)
    with open_log(folder, state, saved, faces.said()) as log, kept_open(), state.saves:
        for number in range(state.phase_number, len(datasets)):  # a run that goes on enters the phase it stopped in
            start = begin(folder, state, number, datasets[number], source, teacher, saved, log)
            data = start.data
            require_room(folder, state)
            if measure_untrained(state, data, log, start) if saved is None else not has_best(folder, state):
                save(folder, state, improved=True)
            saved = None  # it belongs to the phase it was saved in: the next one begins by its own rules
            with open_loader(state, data) as loader:  #             sampler -> rows -> augment -> dali -> Batch
                show_pictures(state, data, loader.sampler, log)
                for batches, row_counts in updates(state, loader, data):
                    stats = train_step(state, batches, row_counts)  #     model -> logits -> focal -> step
                    log_update(log, state, loader, batches, row_counts, stats)
                    # Measured before it is saved: the checkpoint holds the results, and `best` may point at it.
                    improved = evaluation_due(state.recipe.eval, state) and measure(state, data, log)
                    # A signal reaches ranks at different moments; unless all leave after the same update, those that
                    # go on would wait in their next collective operation until it times out.
                    stopping = run.agree(run.stop_requested or state.saves.failed)
                    if improved or stopping or save_due(state.recipe, state):
                        save(folder, state, improved)
                    if stopping:
                        return leave(folder, state, log)
            report_phase(folder, state, data, log)  #            the phase's chosen model on the test part, once
            report_untrained(state, source, data, log)  #        and what its source does without any update
        return finish(folder, state, source, datasets, log)


def first_state(
    recipe: Recipe,
    run: Runtime,
    source: Source | None,
    teacher: FaceModel | None,
    datasets: tuple[PhaseData, ...],
    faces: Locator,
) -> TrainState:
    """The state of a run that has not begun, with nothing left to decide: the same on every rank."""
    recipe = settle(recipe, source, teacher, datasets)
    plan = resolve(recipe, tuple(data.facts() for data in datasets), run.world.size)
    state = TrainState(recipe, plan, run)
    state.faces = faces.document()
    same_start(state, datasets, source, teacher)
    return state


def face_locator(recipe: Recipe, folder: Path, image: ImageSpec, run: Runtime) -> Locator:
    """What finds out where faces are on the photographs of a run, and cuts them out of large ones."""
    return Locator(
        image,
        recipe.data.detect,
        run,
        alone=True,
        crops=folder / "crops" if recipe.data.crops == "auto" else None,
        augments=tuple(phase.augment for phase in recipe.phases),
    )


@contextlib.contextmanager
def open_folder(folder: Path, recipe: Recipe, run: Runtime) -> Iterator[None]:
    """Makes the run folder, finds out at once whether it can be written, and keeps other runs out of it.

    A new folder says at once what was asked for and where, so that a start that fails explains itself.

    Raises:
        StorageError: it cannot.
        ValueError: another run writes to it.
    """
    with contextlib.ExitStack() as stack:
        # Every rank ends with what went wrong: one that went on would take the folder for its own.
        with run.together():
            if run.is_main:
                files.require_writable(folder, folder=True)
                with files.storing(folder, what="the run folder "):
                    folder.mkdir(parents=True, exist_ok=True)
                    run.held = stack.enter_context(files.locked(folder))
                    files.remove_leftovers(folder)
                try:
                    with files.storing(folder, what="the run folder "):
                        _begin_folder(folder, recipe, run)
                        files.require_writable(folder / checkpoint.FOLDER, folder=True)  # somebody else's, perhaps
                except StorageError as error:
                    fail(folder, exits.EXIT_STORAGE, str(error))
                    raise
        yield


def _begin_folder(folder: Path, recipe: Recipe, run: Runtime) -> None:
    write_status(folder, "running", **reached(folder))
    if not (folder / "recipe.json").exists():
        files.write_json(folder / "recipe.json", to_json(recipe))
        files.write_json(folder / "environment.json", environment(run.world.size, run.device))


def find_index(folder: Path, resume: str) -> Path | None:
    """The index of the photographs that the run to go on with began with; None where it starts from nothing."""
    if resume == "never":
        return None
    if resume == "auto":
        path = folder / "index.npz" if checkpoint.has_any(folder) else None
    else:
        path = checkpoint.run_to_resume(Path(resume)) / "index.npz"
    return path if path is not None and path.exists() else None


def find_saved(folder: Path, resume: str, state: TrainState) -> Path | None:
    """The checkpoint to go on from, its phase and step taken over by `state`; None where the run starts from nothing.

    Raises:
        ValueError: the run folder holds another recipe or other photographs, naming what differs.
    """
    path = None
    # Rank 0 looks and tells the others: all must go on from the same checkpoint.
    if state.run.is_main and resume == "auto":
        path = checkpoint.newest(folder)
    elif state.run.is_main and resume != "never":
        path = checkpoint.find_resumable(Path(resume))
    path = state.run.broadcast(path)
    same_checkpoint(path, state.run)
    if path is not None:
        checkpoint.check_same_run(path, state.recipe, state.plan)
        take_division(state, path)
        state.phase_number = files.read_json(path / "state.json")["phase"]
        state.step = files.read_json(path / "state.json")["step"]
    return path


def open_log(folder: Path, state: TrainState, saved: Path | None, said: Sequence[str] = ()) -> RunLog:
    """Writes recipe, plan and environment into the run folder and opens its log, in which `said` comes first."""
    recipe, plan, run = state.recipe, state.plan, state.run
    with run.together():
        if run.is_main:
            with files.storing(folder, what="the run folder "):
                if saved is None:  # checkpoints of an earlier run would be taken for this one's by the next resume
                    checkpoint.discard(folder)
                files.write_json(folder / "recipe.json", to_json(recipe))
                files.write_json(folder / "plan.json", to_json(plan))
                files.write_json(folder / "environment.json", environment(run.world.size, run.device))
            write_status(folder, "running", **({} if saved is None else reached(folder)) | {"step": state.step})
    log = RunLog(
        folder,
        enabled=run.is_main,
        total_steps=plan.total_steps,
        first_step=None if saved is None else state.step,
        every=recipe.log_every,
    )
    for text in said:
        log.say(text)
    height, width = recipe.image.shape
    log.say(
        f"{recipe.model.backbone}, {width} x {height} px, template {recipe.image.template}, "
        f"{state.precision.name}{' channels-last' if state.precision.channels_last else ''}, "
        f"{run.world.size} process{'es' if run.world.size > 1 else ''} on {run.device.type}"
    )
    if saved is not None:
        log.say(f"goes on from {saved} (step {state.step} of {plan.total_steps})")
    for text in division_said(state, saved):
        log.say(text)
    return log


def require_room(folder: Path, state: TrainState) -> None:
    """Finds out before any update that not one checkpoint of this phase would find room.

    Raises:
        StorageError: naming what is needed and what is free.
    """
    with state.run.together():
        if state.run.is_main and state.phase_step < state.phase_plan.steps:
            checkpoint.require_room(folder, state.tensors())


def open_loader(state: TrainState, data: PhaseData) -> Loader | CachedLoader:
    """The phase's batches for this rank, in the order that the sampler owns."""
    sampler = phase_sampler(state, data)
    if state.side_inputs.embeddings is not None:
        return CachedLoader(state.side_inputs.embeddings, data.train.labels, sampler, state.run)
    return picture_loader(state, data, sampler)


def show_pictures(state: TrainState, data: PhaseData, sampler: Sampler, log: RunLog) -> None:
    """The phase's first pictures as training sees them, in TensorBoard."""
    recipe, epoch, seed = state.recipe, int(state.epoch), state.phase_plan.seed
    if recipe.pictures == 0 or not state.run.is_main:
        return
    rows = sampler.batch(epoch, 0)[: recipe.pictures]
    with contextlib.suppress(ValueError):  # a picture that turned bad is the loader's to count
        images = oracle.render(data.train, rows[rows >= 0], recipe.image, state.phase.augment, seed, epoch)
        log.pictures(f"{state.phase.name}/pictures", oracle.to_picture(images, recipe.image), state.step)


def updates(
    state: TrainState, loader: Loader | CachedLoader, data: PhaseData
) -> Iterator[tuple[list[Batch], RowCounts]]:
    """What each update of the phase consumes, from the cursor on: this rank's micro-batches, and how many rows count
    over all."""
    # The position is derived from the number of updates done, so that a resume needs no other cursor; batches that
    # were read ahead but not consumed are read again.
    plan, accumulate = state.phase_plan, state.phase_plan.accumulate
    labelled, known = data.train.labels >= 0, ~data.values().isnan().numpy()

    def place(step: int) -> tuple[int, int]:
        epoch, done = divmod(step, plan.steps_per_epoch)
        return epoch, done * accumulate

    steps_per_epoch = loader.sampler.steps_per_epoch
    batches = loader.stream(*place(state.phase_step), until=place(plan.steps))
    while state.phase_step < plan.steps:
        epoch, first = place(state.phase_step)
        last = min(first + accumulate, steps_per_epoch)  # fewer passes where the epoch ends inside an update
        micro = [batch for _, _, batch in itertools.islice(batches, last - first)]
        # The sampler is a pure function: every rank counts the rows of all ranks without asking them.
        rows = np.concatenate([loader.sampler.batch(epoch, part) for part in range(first, last)])
        rows = rows[rows >= 0]
        yield micro, RowCounts(len(rows), int(labelled[rows].sum()), tuple(known[rows].sum(0).tolist()))


def log_update(
    log: RunLog,
    state: TrainState,
    loader: Loader | CachedLoader,
    batches: list[Batch],
    row_counts: RowCounts,
    stats: Tensor,
) -> None:
    """One update's numbers for the log, which reads the device when a line is due; asked what was wrong with it, it
    looks at the batches."""
    explain = functools.partial(culprit, state.model, batches, state.precision.autocast(state.run.device))
    waited = loader.wait_seconds
    log.step(state.position, stats, row_counts.rows, waited, state.objective.names, explain)


def epoch_ends(state: TrainState, every: int = 1) -> bool:
    """Whether the phase's last update ended one of every `every` epochs, or the phase."""
    plan = state.phase_plan
    return state.phase_step == plan.steps or state.phase_step % (every * plan.steps_per_epoch) == 0


def evaluation_due(config: EvalConfig, state: TrainState) -> bool:
    """Whether the model is measured after this update."""
    return epoch_ends(state, config.every)


def save_due(recipe: Recipe, state: TrainState) -> bool:
    """Whether a checkpoint is written after this update."""
    if recipe.save_every and state.step % recipe.save_every == 0:
        return True
    return epoch_ends(state) if not recipe.save_every else state.phase_step == state.phase_plan.steps


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    ours: Path | None = None  # the run folder, once no other run can be writing to it
    held: files.Held | None = None
    as_json = False

    def failed(code: int, error: str) -> None:
        if held is None or held.problem() is None:
            fail(ours, code, error)

    with exits.exit_codes(failed) as outcome, contextlib.ExitStack() as spoken:
        asked = flags.command_line(sys.argv[1:] if arguments is None else arguments)
        recipe, folder, as_json = asked.recipe, asked.out, asked.json
        spoken.enter_context(speaking("json" if asked.json else "quiet" if asked.quiet else "words"))
        with (
            process.start(rank_timeout=recipe.rank_timeout, on_lost=failed) as run,
            process.stop_on_signals(run),
            open_folder(folder, recipe, run),
        ):
            ours, held = folder, run.held
            run.require_same({"doctor": asked.doctor})
            if asked.doctor:
                doctor.require_sound(run, recipe.data.root, folder, tell)
            outcome.code = train(recipe, folder, asked.resume, run)
    if ours is not None and held is not None and as_json:
        print_line(read_status(ours))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
