"""How a run ends: status.json, the best checkpoint's number, the summary, report.html, and what failed."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from facefast.data.prepare import PhaseData
from facefast.evaluation import report
from facefast.evaluation.embed import embed_rows
from facefast.models.checkpoint import FOLDER
from facefast.recipe import EvalConfig
from facefast.runtime import exits, files
from facefast.runtime.log import RunLog, tell, verdict
from facefast.training.step import TrainState


def named_metric(config: EvalConfig, results: dict[str, float]) -> tuple[float, str]:
    """The value and the name of the number that chooses the best checkpoint.

    Raises:
        ValueError: the evaluation did not give that number, or had too few pairs for it.
    """
    wishes = (config.metric,) if config.metric != "auto" else ("top1", "verification_accuracy", "tasks")
    for name in wishes:
        for candidate in (name, f"known_{name}"):
            if math.isnan(results.get(candidate, 0)):  # no later evaluation would ever count as better
                if config.metric == "auto":
                    continue
                raise ValueError(
                    f"eval.metric is {config.metric}, for which the evaluation has too few pairs; "
                    f"raise eval.pairs, which is {config.pairs}, or choose another metric"
                )
            if candidate in results:
                return results[candidate], candidate
    given = [name for name, value in results.items() if not math.isnan(value)]
    raise ValueError(
        f"eval.metric is {config.metric}, but the evaluation gives only {', '.join(given) or 'nothing'}; "
        "set data.test_fraction, data.verify_fraction or eval.split"
    )


def best_of(state: TrainState) -> dict[str, Any] | None:
    """The best checkpoint of this phase and those it goes on from, for status.json; None before any evaluation."""
    if state.best is None:
        return None
    first = max(k for k in range(state.phase_number + 1) if not state.continues(k))
    for phase in state.recipe.phases[first : state.phase_number + 1]:
        if phase.name in state.results:
            value, name = named_metric(state.recipe.eval, state.results[phase.name])
            if value == state.best:
                return {"phase": phase.name, "metric": name, "value": value}
    raise AssertionError("the best number is that of an evaluation")


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
    with contextlib.suppress(OSError, ValueError, RecursionError):
        status = files.read_json(folder / "status.json")
        return dict(status) if isinstance(status, dict) else {}
    return {}


def reached(folder: Path) -> dict[str, Any]:
    """Step and best of a run as its status has them, where it has: what is still true when it fails or goes on."""
    return {name: value for name, value in read_status(folder).items() if name in ("step", "best")}


def leave(folder: Path, state: TrainState, log: RunLog) -> int:
    """Ends a run that was asked to stop and whose state is on disk; returns the exit code."""
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


def finish(folder: Path, state: TrainState, datasets: tuple[PhaseData, ...], log: RunLog) -> int:
    """Writes the summary on the terminal, the projector, report.html and the final status; returns the exit code."""
    recipe, run = state.recipe, state.run
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    train, test = datasets[-1].train, datasets[-1].evaluation.test
    decoded = int(3 * np.mean(train.widths.astype(np.float64) * train.heights))  # bytes: at most what travels
    # All-reduce and embedding need every rank, so none returns earlier.
    bound = verdict(log.all_speeds(), run.allreduce_seconds(trained), run.transfer_seconds(decoded))
    if recipe.projector and test is not None:
        embeddings, seen = embed_rows(
            state.evaluated, test, run, state.precision, state.reading, batch_size=recipe.eval.batch_size
        )
        names = [test.class_names[label] if label >= 0 else "unknown" for label in test.labels[seen.numpy()]]
        log.embeddings(embeddings[seen], names, state.step)
    log.close()
    if run.is_main:
        tell(summary(folder, state, bound))
        status = {"step": state.step, "best": best_of(state), **bound}
        before = log.failures
        write_status(folder, "done", exits.EXIT_DONE, **status, log_failures=before)  # the report shows it
        with log.tolerant("report.html"):
            report.write(folder)
        if log.failures > before:
            write_status(folder, "done", exits.EXIT_DONE, **status, log_failures=log.failures)
    run.barrier()
    return exits.EXIT_DONE


def summary(folder: Path, state: TrainState, bound: dict[str, Any]) -> str:
    """What a person wants to know at the end of a run."""
    recipe, results = state.recipe, state.results
    lines = ["", *report.results_text(results)]
    if "scratch" in results and recipe.phases[-1].name != "scratch":
        split = recipe.phases[-1].split
        others = [phase.name for phase in recipe.phases if phase.split == split and phase.name != "scratch"]
        value, name = max(named_metric(recipe.eval, results[phase]) for phase in others)
        gap = 100 * (value - named_metric(recipe.eval, results["scratch"])[0])
        lines.append(f"transfer against training from scratch on the same budget: {gap:+.1f} points {name}")
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
