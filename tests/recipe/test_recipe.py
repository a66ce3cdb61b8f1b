"""Recipes: JSON both ways, contradictions refused by name, and the plan's arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from facefast.recipe import (
    AugmentSpec,
    BinaryConfig,
    DataConfig,
    DistillConfig,
    ImageSpec,
    IndexFacts,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    TaskConfig,
    from_json,
    resolve,
    to_json,
)
from facefast.recipe.named import RECIPES, Given, with_scratch_baseline

GIVEN = Given(
    model=ModelConfig(source="weights.pt", teacher="run"),
    binary=BinaryConfig(people=("ann",)),
    tasks=TaskConfig(attributes=("Male",)),
)
FACTS = IndexFacts(num_rows=1000, num_classes=10, fingerprint="f")


def run_of(**fields: object) -> Recipe:
    """A run of one phase from scratch; fields of the phase or of the recipe."""
    names = {f.name for f in dataclasses.fields(Phase)}
    phase = {name: value for name, value in fields.items() if name in names}
    rest = {name: value for name, value in fields.items() if name not in names}
    return Recipe(phases=(Phase(start="scratch", **phase),), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_named_recipe_survives_a_round_trip_through_json(name: str) -> None:
    recipe = RECIPES[name](GIVEN)
    assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


def test_json_with_an_unknown_field_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="LossConfig has no field gama; it has .*gamma, label_smoothing"):
        from_json(LossConfig, {"gama": 2.0})


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (LossConfig, {"margin": "sphere"}, "margin is 'sphere'; it must be one of none, cos, arc"),
        (LossConfig, {"gamma": "2"}, "gamma is '2'; it must be float"),
        (ImageSpec, {"mean": [1, 2]}, "mean has 2 values; it takes 3"),
        (Phase, {"epochs": 1.0, "steps": True}, "steps is True; it must be int"),
    ],
)
def test_json_of_the_wrong_type_is_refused_by_name(kind: type, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(kind, data)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(phases=(Phase(),)), "comes first: its start must be source, teacher or scratch"),
        (lambda: Recipe(phases=(Phase(start="source"),)), "model.source, which is none"),
        (
            lambda: Recipe(model=ModelConfig(source="x"), phases=(Phase(start="scratch"),)),
            "model.source x has no effect",
        ),
        (
            lambda: Recipe(phases=(Phase(start="scratch", loss=LossConfig(margin="cos", margin_size=0.1)),)),
            "needs model.head cosine",
        ),
        (lambda: run_of(distill=DistillConfig(logits=1.0)), "phase train distils, but model.teacher is none"),
        (
            lambda: Recipe(phases=(Phase(start="teacher"),)),
            "phase train starts from the teacher, but model.teacher is none",
        ),
        (
            lambda: run_of(distill=DistillConfig(embeddings=1.0), model=ModelConfig(teacher="source")),
            "model.teacher source is the model that start source begins with, and no phase has that",
        ),
        (
            lambda: Recipe(
                model=ModelConfig(source="x", teacher="source"),
                phases=(Phase(start="source"), Phase(name="then", start="teacher")),
            ),
            "start teacher needs a model.teacher of its own",
        ),
        (
            lambda: run_of(model=ModelConfig(teacher="x")),
            "model.teacher x has no effect: no phase has start teacher or",
        ),
        (lambda: run_of(l2sp=0.1), "l2sp pulls towards model.source, and no phase starts from one"),
        (lambda: run_of(loss=LossConfig(weight=0.0)), "every loss has weight 0, there is nothing to learn"),
        (lambda: run_of(loss=LossConfig(triplet=1.0)), "several pictures of a person in a batch: sampler pk"),
        (lambda: run_of(loss=LossConfig(triplet=1.0), sampler="pk", mixup=0.2), "mixup leaves no pairs"),
        (lambda: run_of(distill=DistillConfig(logits=1.0), cutmix=0.2), "cutmix and distill are not combined"),
        (lambda: run_of(mixup=0.2, tasks=TaskConfig(attributes=("Male",))), "mixup and cutmix are not combined with"),
        (lambda: run_of(tasks=TaskConfig(weighting="uncertainty")), "has no effect without tasks.attributes"),
        (lambda: TaskConfig(attributes=("a", "a")), "tasks.attributes names one twice"),
        (lambda: TaskConfig(attributes=("a",), weights=(1.0, 2.0)), "tasks.weights has 2 numbers for 1 attributes"),
        (
            lambda: TaskConfig(attributes=("a",), weights=(1.0,), weighting="uncertainty"),
            "tasks.weights .* has no effect: tasks.weighting uncertainty",
        ),
        (lambda: BinaryConfig(people=("a",), negatives="b"), "binary.people a and binary.negatives b contradict"),
        (
            lambda: run_of(binary=BinaryConfig(people=("a",))),
            "binary learns yes or no instead of names; set loss.weight",
        ),
        (
            lambda: run_of(
                binary=BinaryConfig(people=("a",)), tasks=TaskConfig(attributes=("b",)), loss=LossConfig(weight=0.0)
            ),
            "binary and tasks.attributes are not combined",
        ),
        (lambda: run_of(data=DataConfig(more=("x",))), "data.more x has no effect: nothing learns from pictures"),
        (lambda: run_of(data=DataConfig(label_fraction=0.5, labels="x")), "label_fraction hides names and data.labels"),
        (lambda: run_of(align_weight=2.0), "align_weight 2.0 has no effect with align none"),
        (lambda: run_of(pseudo_confidence=0.9), "pseudo_confidence 0.9 has no effect with labels given"),
        (lambda: run_of(labels="pseudo", sampler="balanced"), "labels pseudo names pictures when the phase starts"),
        (lambda: run_of(trainable=("head",), prune=0.5), "prune would change the backbone, which trainable head keeps"),
        (lambda: run_of(trainable=("last:1",), align="mmd"), "align would change the backbone"),
        (lambda: run_of(head_start="previous"), "head_start previous needs start previous, it is scratch"),
        (
            lambda: run_of(
                distill=DistillConfig(features=1.0), model=ModelConfig(teacher="x"), compile="always", labels="given"
            ),
            "compile always hides the stages",
        ),
        (lambda: LossConfig(weight=0.0, gamma=2.0), "loss.gamma 2.0 has no effect: loss.weight 0"),
        (lambda: LossConfig(margin="cos"), "set both or neither"),
        (lambda: LossConfig(gamma=-1), "must be at least 0"),
        (lambda: Phase(epochs=0), "must be above 0"),
        (lambda: Phase(batch_size=10, accumulate=4), "multiple of accumulate 4"),
        (lambda: AugmentSpec(flip=1.5), r"augment.flip is 1.5; it must lie in \[0, 1\]"),
        (lambda: AugmentSpec(hue=0.7), "augment.hue"),
        (lambda: ImageSpec(size=4), "image.size is 4"),
    ],
)
def test_contradictions_are_refused_with_the_value_seen(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_plan_counts_steps_over_all_processes_and_keeps_the_last_short_batch() -> None:
    recipe = Recipe(phases=(Phase(start="scratch", epochs=3, batch_size=64, accumulate=2),))
    plan = resolve(recipe, (FACTS,), world_size=4).phases[0]
    assert plan.batch_per_rank == 8
    assert plan.steps_per_epoch == 16  # 15 full batches of 64 and one of 40
    assert plan.steps == 48


def test_one_identity_is_not_enough_to_train() -> None:
    recipe = Recipe(phases=(Phase(start="scratch"),))
    with pytest.raises(ValueError, match="at least 2 are needed"):
        resolve(recipe, (dataclasses.replace(FACTS, num_classes=1),), world_size=1)


def test_what_the_user_left_open_comes_from_the_source_and_a_contradiction_is_refused() -> None:
    contract = ImageSpec(size=112, width=96, template="arcface_112x96", std=(128.0,) * 3)
    fixed = {"size", "width"}
    assert ImageSpec().settled(contract, fixed) == contract
    assert ImageSpec(size=112).settled(contract, fixed) == contract
    assert ImageSpec(template="celeba").settled(contract, fixed).template == "celeba"
    assert ImageSpec(size=160).settled().shape == (160, 160)
    assert ImageSpec().settled().shape == (112, 112)
    with pytest.raises(ValueError, match="image.size is 160, but the source model was trained with 112"):
        ImageSpec(size=160).settled(contract, fixed)


def test_the_scratch_baseline_has_the_budget_of_the_phase_it_is_compared_with() -> None:
    recipe = with_scratch_baseline(RECIPES["finetune"](GIVEN))
    baseline, *others = recipe.phases
    assert (baseline.name, baseline.start, baseline.head_start) == ("scratch", "scratch", "random")
    assert baseline.epochs == sum(phase.epochs for phase in others)
    assert {(phase.batch_size, phase.split) for phase in recipe.phases} == {(baseline.batch_size, baseline.split)}


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="phases.0.clip_grad is inf; give a finite number"):
        Recipe(phases=(Phase(start="scratch", clip_grad=float("inf")),))
