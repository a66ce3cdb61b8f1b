"""Which model is handed on: chosen on the validation part, which was taken out of training, and reported on the test
part, which has chosen nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from facefast.data import FaceIndex
from facefast.data.divide import EvaluationSet, PhaseData
from facefast.evaluation import measured
from facefast.evaluation.baselines import (
    ADAPTED,
    ADAPTED_PROBE,
    CLASS_MEANS,
    PROBE,
    LabelledEmbeddings,
    class_means,
    linear_probe,
)
from facefast.evaluation.embed import Embed, remembering
from facefast.evaluation.measure import evaluate
from facefast.evaluation.naming import Decisions, decide
from facefast.evaluation.report import with_baselines
from facefast.models import FaceModel, Source, build_model, checkpoint
from facefast.models.heads import START_SCALE
from facefast.recipe import AdaptConfig, EvalConfig, to_json
from facefast.runtime import files
from facefast.runtime.log import RunLog
from facefast.training.begin import Start, adapted_to, embed_pictures, wants_baselines
from facefast.training.prune import RAMP
from facefast.training.step import TrainState

MEANS = "class-means"
"""The folder beside the other checkpoints in which class means are handed on."""
FOLDERS = {CLASS_MEANS: MEANS, PROBE: "linear-probe", ADAPTED_PROBE: "adapted-linear-probe"}
"""By row, the folders of what is handed on without any update and was no checkpoint before."""
ROUNDING = 1e-6
MOST_DECIDING = 20_000
"""Training pictures that thresholds are found on."""


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


def measure_untrained(state: TrainState, data: PhaseData, log: RunLog, start: Start) -> bool:
    """Measures the model before any training, the floor to beat, where it knows anything; returns whether it is the
    best so far.

    Where the source was adapted, the table gets the rows of what that does without any update.
    """
    if not wants_baselines(state, data) and state.phase.head_start != "class_mean":
        return False
    # The adapted rows need the validation pictures too: they are embedded once.
    embed = remembering(functools.partial(embed_pictures, state, state.evaluated))
    improved = measure(state, data, log, embed)
    if state.phase.adapt.active and state.evaluated.adaptation is not None and state.phase_plan.steps:
        if state.phase.name in state.validated:  # what `measure` has just found
            state.validated[ADAPTED] = state.validated[state.phase.name]
        _report(state, ADAPTED, _evaluate(state, state.evaluated, data.evaluation, embed=embed), log)
    if start.adapted is not None:
        _report_adapted_probe(state, data, start.adapted, embed, log)
    # A probe is fitted on each rank, and two kinds of processors may end a picture apart.
    state.validated = state.run.broadcast(state.validated)
    state.set_modes()
    return improved


def report_untrained(state: TrainState, source: Source | None, data: PhaseData, log: RunLog) -> None:
    """Rows of the final table for what the source does without any update, and what they reach on the validation part,
    after the phase that starts from it: no update waits for them, and a run that goes on before they are in a
    checkpoint comes by here again."""
    if not wants_baselines(state, data):
        return
    model = _untrained(state, source, data, adapted=False)
    embed = remembering(functools.partial(embed_pictures, state, model))
    known = _labelled(data.train, embed)
    state.validated |= with_baselines(_evaluate(state, model, data.validation, known, embed))
    # A probe is fitted on each rank, and two kinds of processors may end a picture apart.
    state.validated = state.run.broadcast(state.validated)
    # What chose nothing yet serves the class means too.
    if data.validation.test is not None:
        known = known.joined(_labelled(data.validation.test, embed))
    phases, state.reported = state.reported, {}
    for row, results in with_baselines(_evaluate(state, model, data.evaluation, known, embed)).items():
        _report(state, row, results, log)
    # Phases stand below in the table; what a resume reports anew is what was reported.
    state.reported |= {row: results for row, results in phases.items() if row not in state.reported}


def measure(
    state: TrainState,
    data: PhaseData,
    log: RunLog,
    embed: Embed | None = None,
) -> bool:
    """Measures the model on the validation part, on all ranks, and logs it; returns whether it is the best so far.

    Args:
        embed: as for `evaluate`.
    """
    here = (state.phase_number, state.phase_step)
    if data.validation.is_empty:  # nothing can choose: the latest is handed on
        state.chosen = here
        return True
    state.run.broadcast_buffers(state.evaluated)  # every rank measures the model that rank 0 saves
    results = _evaluate(state, state.evaluated, data.validation, embed=embed)
    state.set_modes()
    try:
        value, name = named_metric(state.recipe.eval, results)
    except ValueError:
        if state.recipe.eval.metric != "auto":
            raise
        # Too few of its pictures can be read, or its pairs are too few: as if there were none.
        log.say("note: the validation part gives no number to choose by")
        if state.best is None:
            state.chosen = here
        return state.best is None
    if state.phase.prune and not _pruned(state, here):  # the log alone has what is not yet as sparse as was asked
        log.evaluation(state.position, results, name, None, False)
        return False
    if state.phase.prune and not _pruned(state, state.chosen):
        state.best = None
    # A phase is remembered by its best evaluation; a later, worse one is in the log alone.
    before = state.validated.get(state.phase.name)
    if before is None or value >= named_metric(state.recipe.eval, before)[0]:
        state.validated[state.phase.name] = results
    # Of equals the later, which has learnt more; what was not trained at all has to be beaten, but by pairs, of which
    # a head that learns above an unchanged network names no more.
    later = state.chosen[1] > 0 or name != "top1"
    improved = state.best is None or value > state.best or (value == state.best and later)
    if improved:
        state.best, state.chosen = value, here
    log.evaluation(state.position, results, name, state.best, improved)
    return improved


def _pruned(state: TrainState, at: tuple[int, int]) -> bool:
    """Whether the model of a phase and step has all zeros that this phase was asked for."""
    number, step = at
    return number == state.phase_number and step >= RAMP * state.phase_plan.steps


def _evaluate(
    state: TrainState,
    model: FaceModel,
    on: EvaluationSet,
    known: LabelledEmbeddings | None = None,
    embed: Embed | None = None,
) -> dict[str, float]:
    return evaluate(model, on, state.recipe.eval, state.run, state.precision, state.reading, known, embed)


def _report_adapted_probe(
    state: TrainState, data: PhaseData, known: LabelledEmbeddings, embed: Embed, log: RunLog
) -> None:
    """The probe on the adapted model's embeddings: for the choice, and a row of the final table."""
    rows = with_baselines(_evaluate(state, state.evaluated, data.validation, known, embed))
    if PROBE in rows:
        state.validated[ADAPTED_PROBE] = {"top1": rows[PROBE]["top1"]}
    if data.validation.test is not None:
        known = known.joined(_labelled(data.validation.test, embed))
    rows = with_baselines(_evaluate(state, state.evaluated, data.evaluation, known, embed))
    if PROBE in rows:
        _report(state, ADAPTED_PROBE, rows[PROBE], log)


def _chosen(folder: Path, state: TrainState) -> Path:
    """The checkpoint that was chosen: `best` is another one where the class means were handed on, or where a run was
    killed between writing it and pointing there."""
    number, updates = state.chosen
    return checkpoint.of_step(folder, updates + sum(phase.steps for phase in state.plan.phases[:number]))


def has_best(folder: Path, state: TrainState) -> bool:
    """Whether the run folder holds what the run that goes on has chosen so far; `best` points there afterwards.

    Where it is not there, as in a new folder that a run is taken over into, the choice is forgotten: what the run goes
    on from is the best until something better comes.
    """
    if state.best is None and not state.chosen[1]:  # nothing was chosen yet
        return True
    if not state.run.broadcast(_chosen(folder, state).exists()):
        state.best, state.chosen = None, (state.phase_number, state.phase_step)
        state.validated.pop(state.phase.name, None)
    path, best = _chosen(folder, state), folder / checkpoint.FOLDER / "best"
    there = state.run.broadcast(path.exists())
    with state.run.together():
        if state.run.is_main and there and best.resolve().name not in (path.name, *FOLDERS.values()):
            with files.storing(best):
                files.replace_link(best, path.name)
    return there


def report_phase(folder: Path, state: TrainState, data: PhaseData, log: RunLog) -> None:
    """A row of the final table: the phase's model on the test part.

    The model is the best checkpoint where that is one of this phase, else the phase's last.
    """
    model = state.evaluated
    state.saves.settle()  # rank 0 may still be writing it
    if state.chosen[0] == state.phase_number and not _chose_adapted(state):  # which has a row of its own
        model = checkpoint.load_model(_chosen(folder, state), state.run.device, state.sharing)
    state.run.broadcast_buffers(model)
    results = _evaluate(state, model, data.evaluation)
    state.set_modes()
    _report(state, state.phase.name, results, log)


def _report(state: TrainState, row: str, results: dict[str, float], log: RunLog) -> None:
    chose = state.validated.get(row)
    if chose is not None:
        results = results | {"validation": named_metric(state.recipe.eval, chose)[0]}
    state.reported[row] = results
    log.report(state.position, row, results)


def _chose_adapted(state: TrainState) -> bool:
    """Whether the best checkpoint is the adapted source before any update."""
    phase = state.recipe.phases[state.chosen[0]]
    adapted = phase.adapt.active and ADAPTED in state.validated and not state.recipe.learns_attributes
    return state.chosen[1] == 0 and adapted


def handed_on(state: TrainState) -> str:
    """The row of the final table whose model `best` is: a phase's, the adapted source's before any update, or what took
    no update at all, which all of them have to beat."""
    phase = state.recipe.phases[state.chosen[0]]
    if state.recipe.learns_attributes or phase.prune:  # whose heads the class means would lack, or whose zeros
        return phase.name
    row, best = phase.name, state.best
    if _chose_adapted(state):
        row = ADAPTED
    if best is None or named_metric(state.recipe.eval, state.validated[phase.name])[1] != "top1":
        return row
    # Fine-tuning has to name one picture more than what took no update, not to be ahead by a rounding; and so has the
    # source as it is over what was adapted, which people left out have already spoken for.
    adapted = {ADAPTED, ADAPTED_PROBE} & state.validated.keys()
    least = best + ROUNDING if adapted and state.chosen[1] == 0 else best - ROUNDING
    for other in (ADAPTED_PROBE, CLASS_MEANS, PROBE):
        top = state.validated.get(other, {}).get("top1", -1.0)
        if top >= least:
            row, least = other, top + ROUNDING
    return row


def best_of(state: TrainState) -> dict[str, Any] | None:
    """The best checkpoint of this phase and those it goes on from, for status.json; None before any evaluation.

    `value` is what the test part gives, once it was asked; `validation` is what has chosen, the same number but for
    pairs of known people where only those could choose.
    """
    row = handed_on(state)
    seen = state.validated.get(row) or state.reported.get(row)
    if seen is None:
        return None
    try:
        _, name = named_metric(state.recipe.eval, seen)
    except ValueError:  # nothing could be told of its pictures
        return None
    asked = state.reported.get(row, {})
    name = next((known for known in (name, name.removeprefix("known_")) if known in asked), name)
    # What took no update may have named more than the best checkpoint.
    validation = state.validated[row]["top1"] if row in FOLDERS else state.best
    return {"phase": row, "metric": name, "value": asked.get(name), "validation": validation}


def said(state: TrainState, data: PhaseData) -> str:
    """What the marked row of the table is, and what chose it, for people."""
    if state.best is None:
        return "* handed on: the last, since no picture could be spared to choose by"
    name = named_metric(state.recipe.eval, state.validated[handed_on(state)])[1]
    count, part = _choosing(data, name)
    return (
        f"* handed on as checkpoints/best: {name} of {count} {part} pictures chose it; all other numbers are of the "
        "test part, which chose nothing"
    )


def hand_on(folder: Path, state: TrainState, source: Source | None, data: PhaseData, log: RunLog) -> None:
    """Settles what `best` is and what it may say: thresholds and the temperature of its probabilities.

    Where fine-tuning did not beat the class means or the probe on the validation part, `best` becomes the source model,
    or the adapted one, with these as its head; they are then taken over the validation pictures too.
    """
    state.saves.settle()  # rank 0 may still be writing it
    row = handed_on(state)
    if row not in FOLDERS:
        best = _chosen(folder, state)
        model = checkpoint.load_model(best, state.run.device, state.sharing)
        embed: Embed = functools.partial(embed_pictures, state, model)
        before = model.to_config()
        if model.thresholds is None:
            decide_for(model, state, data, embed, log)
        model.metrics = _metrics(state, data) or model.metrics
        if model.to_config() != before and state.run.is_main:
            checkpoint.amend(best, {"model": model.to_config()})
        state.run.barrier()
        return
    kind = "adapted model" if row == ADAPTED_PROBE else "source model"
    head = "class means" if row == CLASS_MEANS else "a linear probe"
    log.say(
        f"fine-tuning did not beat {head} on the validation part (top-1 {state.validated[row]['top1']:.2%}, "
        f"at best {state.best:.2%}): checkpoints/best is the {kind} with {head} as its head"
    )
    model = _untrained(state, source, data, adapted=row == ADAPTED_PROBE)
    assert model.head is not None
    embed = remembering(functools.partial(embed_pictures, state, model))
    known = _labelled(data.train, embed)
    fitted = class_means if row == CLASS_MEANS else linear_probe
    model.head.start_from(fitted(known.embeddings, known.labels, known.num_classes), 1.0)
    decide_for(model, state, data, embed, log, known)
    if data.validation.test is not None:
        known = known.joined(_labelled(data.validation.test, embed))
    model.head.start_from(fitted(known.embeddings, known.labels, known.num_classes), 1.0)
    _report(state, row, _evaluate(state, model, data.evaluation), log)
    model.metrics = _metrics(state, data)
    if state.run.is_main:
        documents = {"model": model.to_config(), "recipe": to_json(state.recipe), "plan": to_json(state.plan)}
        checkpoint.hand_on(folder, FOLDERS[row], {"model": model.state_dict()}, documents)
    state.run.barrier()


def _untrained(state: TrainState, source: Source | None, data: PhaseData, *, adapted: bool) -> FaceModel:
    """The source with a cosine head, adapted once more as it was where that is wanted."""
    config = dataclasses.replace(state.recipe.model, head="cosine")
    names = data.train.class_names
    with torch.random.fork_rng():  # whoever draws next draws what it would have drawn
        model = build_model(config, len(names), state.recipe.image, names, source).to(state.run.device).eval()
    if state.precision.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.scale, model.faces = START_SCALE, state.faces
    model.provenance = state.evaluated.provenance
    done = state.evaluated.adaptation
    if adapted and done is not None:
        known = embed_pictures(state, model, data.train)
        again = _again(done)
        adapted_to(state, again, model, data, known)
        model.adaptation = done
    return model


def _again(done: Mapping[str, Any]) -> AdaptConfig:
    """An adaptation as model.json tells of it, to be done as it was."""
    own = {field.name for field in dataclasses.fields(AdaptConfig)} - {"choose"}
    return AdaptConfig("given", **{name: value for name, value in done.items() if name in own})


def _metrics(state: TrainState, data: PhaseData) -> dict[str, Any] | None:
    """What is handed on with the model of its own results; None before the test part was asked."""
    row, phases = handed_on(state), state.recipe.phases
    if row not in state.reported:
        return None
    # Of an earlier phase that was measured on other people, only the numbers are known here.
    same = phases[state.chosen[0]].split == phases[-1].split
    selected = None
    if state.best is not None:
        value, name = named_metric(state.recipe.eval, state.validated[row])
        count, part = _choosing(data, name)
        selected = {"metric": name, "value": value, "pictures": count, "part": part}
    return measured.document(row, state.reported[row], data.evaluation if same else None, selected)


def _choosing(data: PhaseData, metric: str) -> tuple[int, str]:
    """How many pictures chose the model by a metric, and of which part."""
    asked = data.validation.test if metric in ("top1", "tasks") else data.validation.verification
    return 0 if asked is None else len(asked), "training" if asked is data.train else "validation"


def _labelled(index: FaceIndex, embed: Embed) -> LabelledEmbeddings:
    """Embeddings of pictures with the phase's labels, those that could not be read with none."""
    embeddings, seen = embed(index)
    labels = torch.tensor(index.labels, dtype=torch.long).where(seen, -1)
    return LabelledEmbeddings(embeddings, labels, index.num_classes)


def decide_for(
    model: FaceModel,
    state: TrainState,
    data: PhaseData,
    embed: Embed,
    log: RunLog,
    known: LabelledEmbeddings | None = None,
) -> bool:
    """Gives a model its thresholds and divides its scale by the temperature; returns whether it names people at all.

    Args:
        embed: gives the model's embeddings of an index.
        known: of the training pictures, where all of them were taken already.
    """
    if model.head is None or model.num_classes < 2:
        return False
    if len(model.head.block) < model.num_classes:
        log.say(
            "note: no threshold and no temperature are found while the head lies on several processes "
            "(model.shard_head ranks): resume the finished run in one process for them"
        )
        return False
    train = data.train.select(data.train.labels >= 0)
    if len(train) > MOST_DECIDING:  # evenly over the people
        train = train.select(np.argsort(train.random_places(state.recipe.seed), kind="stable")[:MOST_DECIDING])
    train_known = _labelled(train, embed) if known is None else known
    asked = data.validation.test
    validation = None if asked is None or not (asked.labels >= 0).any() else _labelled(asked, embed)
    logits = None
    if validation is not None:  # the head's own: a linear one has lengths and a bias beside directions
        with torch.inference_mode():
            logits = model.classify(validation.embeddings.to(state.run.device)).float().cpu() * model.scale
    trained = known is None and state.chosen[1] > 0  # otherwise the head holds means, which nobody was moved away from
    decisions = decide(model.head.weight.detach().float().cpu(), train_known, validation, logits, trained=trained)
    model.thresholds = decisions.thresholds.to_json()
    if decisions.calibration is not None:
        model.scale /= decisions.calibration.temperature
        model.calibration = decisions.calibration.to_json()
    for text in told(decisions, data.train.class_names):
        log.say(text)
    return True


def told(decisions: Decisions, names: Sequence[str]) -> Iterator[str]:
    """What was found out, for people."""
    naming = decisions.thresholds.naming
    found = [f"{t.value:.3f} at FPIR {t.rate:g}" for t in naming if t.value is not None]
    yield (
        f"unknown below a score of {', '.join(found)} ({decisions.thresholds.measured_on})"
        if found
        else (f"no threshold for unknown: {naming[0].why}")
    )
    if decisions.calibration is not None:
        fit = decisions.calibration
        yield (
            f"probabilities: temperature {fit.temperature:.3g} suits {fit.rows} validation pictures best; their "
            f"calibration error is {fit.ece:.2%} with it and {fit.ece_before:.2%} without"
        )
    if decisions.twins:
        some = ", ".join(f"{names[a]} and {names[b]}" for a, b in decisions.twins[:3])
        yield (
            f"note: {len(decisions.twins)} pairs of names seem to be one person each ({some}); facefast audit looks "
            "closer, and such pairs count for no threshold"
        )
