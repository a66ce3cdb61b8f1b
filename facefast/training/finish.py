"""How a run ends: status.json, the best checkpoint's number, the summary, report.html, and what failed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.divide import PhaseData
from facefast.data.oracle import thumbnails
from facefast.data.prepare import left_out
from facefast.evaluation import findings, report
from facefast.evaluation.embed import embed_rows, remembering
from facefast.evaluation.report_files import EVALUATION
from facefast.models import Source, checkpoint
from facefast.models.checkpoint import FOLDER
from facefast.recipe import to_json
from facefast.recipe.jsonable import flat
from facefast.runtime import exits, files
from facefast.runtime.log import RunLog, verdict
from facefast.runtime.terminal import tell
from facefast.training.choice import best_of, hand_on, handed_on, named_metric, said
from facefast.training.step import TrainState

THUMBNAIL = 48
"""Pixels on a side of a picture in the projector."""
MOST_THUMBNAILS = 5000
"""Pictures that the projector shows: the browser holds all of them in one texture."""
SHORTER = (2000, 400, 80)
"""Letters of an error in status.json where there is no room but that of the file before."""


def write_status(folder: Path, state: str, code: int | None = None, **fields: Any) -> None:
    """status.json: what a scheduler reads, since torchrun turns every worker's exit code into 1.

    Raises:
        StorageError: not even over the file that is there.
    """
    path, status = folder / "status.json", {"state": state, "exit_code": code, **fields}
    try:
        files.write_json(path, status)
    except OSError as error:
        # A full disk: no room is needed to write over the old file. Its block holds some thousand bytes, for which a
        # long error is cut.
        for letters in SHORTER:
            if "error" in status:
                status["error"] = status["error"][:letters]
            with contextlib.suppress(OSError):
                files.overwrite_json(path, status)
                return
        raise files.refused(path, error, advice="make room, and the same command goes on") from error


def read_status(folder: Path) -> dict[str, Any]:
    """What status.json says; empty where there is none, or it is damaged."""
    return files.read_object(folder / "status.json")


def reached(folder: Path) -> dict[str, Any]:
    """Step and best of a run as its status has them, where it has: what is still true when it fails or goes on."""
    return {name: value for name, value in read_status(folder).items() if name in ("step", "best")}


def leave(folder: Path, state: TrainState, log: RunLog) -> int:
    """Ends a run that was asked to stop and whose state is on disk; returns the exit code."""
    state.saves.settle()
    log.say(f"stopped at step {state.step}; the same command goes on from there")
    log.close()
    if state.run.is_main:
        code = exits.EXIT_PREEMPTED
        write_status(folder, "preempted", code, step=state.step, best=best_of(state))
    state.run.barrier()  # torchrun ends all ranks when one leaves with this code: the status must be written by then
    return exits.EXIT_PREEMPTED


def fail(folder: Path | None, code: int, error: str) -> None:
    """Leaves the reason in the run folder, where there is one by now and it can be written.

    Where one rank fails the others fail after it, for want of an answer: the first cause stays, and one that a user can
    act on replaces a bug's (code 1), which a lost connection is taken for.
    """
    if folder is not None and folder.is_dir() and not _has_reason(folder):
        with contextlib.suppress(OSError):  # a full disk: the exit code must still be that of the first error
            write_status(folder, "failed", code, **reached(folder), error=error)


def _has_reason(folder: Path) -> bool:
    status = read_status(folder)
    return status.get("state") == "failed" and status.get("exit_code") != exits.EXIT_BUG


def finish(folder: Path, state: TrainState, source: Source | None, datasets: tuple[PhaseData, ...], log: RunLog) -> int:
    """Settles what is handed on and writes the summary on the terminal, the projector, report.html and the final
    status; returns the exit code."""
    recipe, run = state.recipe, state.run
    state.saves.settle()  # also, a folder that is gone is told before the slow part
    hand_on(folder, state, source, datasets[-1], log)
    # What travels in an update: a head that ranks share stays where it is.
    moving = (p for p in state.model.parameters() if p.requires_grad and p is not state.shared_weight)
    trained = sum(p.numel() for p in moving)
    train, test = datasets[-1].train, datasets[-1].evaluation.test
    decoded = int(3 * np.mean(train.widths.astype(np.float64) * train.heights))  # bytes: at most what travels
    # All-reduce and embedding need every rank, so none returns earlier.
    bound = verdict(log.all_speeds(), run.allreduce_seconds(trained), run.transfer_seconds(decoded))
    examine(folder, state, datasets[state.chosen[0]], log)
    if recipe.projector and test is not None:
        embeddings, seen = embed_rows(
            state.evaluated, test, run, state.precision, state.reading, batch_size=recipe.eval.batch_size
        )
        project(embeddings[seen], test.select(seen.numpy()), state, log)
    log.close()
    if run.is_main:
        tell(summary(folder, state, datasets[-1], bound))
        status = {"step": state.step, "best": best_of(state), **bound}
        before = log.failures
        write_status(folder, "done", exits.EXIT_DONE, **status, log_failures=before)  # the report shows it
        with log.tolerant("report.html"):
            report.write(folder)
        if log.failures > before:
            write_status(folder, "done", exits.EXIT_DONE, **status, log_failures=log.failures)
    run.barrier()
    return exits.EXIT_DONE


def examine(folder: Path, state: TrainState, data: PhaseData, log: RunLog) -> None:
    """Writes `evaluation.json`: what the test part tells of the model that is handed on, beyond the rows of the table;
    and what TensorBoard compares runs by. A run that was done before has it already."""
    run, path = state.run, folder / EVALUATION
    stamp = {"row": handed_on(state), "step": state.step}
    if run.broadcast(stamp.items() <= files.read_object(path).items() if run.is_main else False):
        return
    model = checkpoint.load_model(folder, run.device, state.sharing)

    def embed(index: FaceIndex) -> tuple[Tensor, Tensor]:
        return embed_rows(model, index, run, state.precision, state.reading, batch_size=state.recipe.eval.batch_size)

    asked = findings.ask(model, data, remembering(embed), run.device)
    if not run.is_main:
        return
    with log.tolerant(EVALUATION):
        files.write_json(path, stamp | findings.document(asked, data, left_out(folder / "index.npz")))
    with log.tolerant("TensorBoard's files"):
        for name, (right, scores) in findings.top_scores(asked, data).items():
            log.precision_and_recall(f"test/{name}", right, scores, state.step)
        log.outcome(dict(flat(to_json(state.recipe))), state.reported.get(handed_on(state), {}), state.step)


def project(embeddings: Tensor, test: FaceIndex, state: TrainState, log: RunLog) -> None:
    """Test embeddings for TensorBoard's projector, with small pictures where the recipe lets photographs into the run
    folder at all."""
    if not state.run.is_main:
        return
    pictures = None
    if state.recipe.pictures and len(test) <= MOST_THUMBNAILS:
        with contextlib.suppress(ValueError):  # a picture that turned bad since it was embedded
            pictures = thumbnails(test, np.arange(len(test)), state.recipe.image, THUMBNAIL)
    elif state.recipe.pictures:
        log.say(
            f"note: the projector shows no pictures of more than {MOST_THUMBNAILS} embeddings; there are {len(test)}"
        )
    log.embeddings(embeddings, [name or "unknown" for name in test.identities()], state.step, pictures)


def summary(folder: Path, state: TrainState, data: PhaseData, bound: dict[str, Any]) -> str:
    """What a person wants to know at the end of a run."""
    recipe, reported = state.recipe, state.reported
    lines = ["", *report.results_text(reported, handed_on(state)), said(state, data)]
    scratch = reported.get("scratch", {})
    if scratch and recipe.phases[-1].name != "scratch":
        split = recipe.phases[-1].split
        others = [phase.name for phase in recipe.phases if phase.split == split and phase.name != "scratch"]
        value, name = max(named_metric(recipe.eval, reported[phase]) for phase in others)
        gap = 100 * (value - named_metric(recipe.eval, scratch)[0])
        lines.append(f"transfer against training from scratch on the same budget: {gap:+.1f} points {name}")
    if bound["images_per_second"]:  # 0 without a step: nothing bound it
        lines.append(
            f"{bound['images_per_second']:.0f} images/s, bound by {bound['bound_by']} "
            f"(data wait {bound['data_wait_fraction']:.1%}); to change that: {bound['advice']}"
        )
    if recipe.data.format == "synthetic" or not recipe.data.root:
        lines.append(
            "These faces are drawn, not photographed. With your own people: "
            "facefast train --data.root DIR --model.source WEIGHTS"
        )
    lines.append(f"the model: {folder / FOLDER / 'best'}    the report: {folder / 'report.html'}")
    return "\n".join(lines)
