"""Recipes: JSON both ways, contradictions refused by name, and the plan's arithmetic."""

from __future__ import annotations

import dataclasses
import json

import pytest

from facefast.recipe import (
    AugmentSpec,
    ImageSpec,
    IndexFacts,
    LossConfig,
    ModelConfig,
    Phase,
    Recipe,
    from_json,
    resolve,
    to_json,
)
from facefast.recipes import RECIPES, with_scratch_baseline

FACTS = IndexFacts(num_rows=1000, num_classes=10, fingerprint="f")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_named_recipe_survives_a_round_trip_through_json(name: str) -> None:
    recipe = RECIPES[name]("weights.pt")
    assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


def test_json_with_an_unknown_field_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="LossConfig has no field gama; it has gamma"):
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
def test_json_of_the_wrong_type_is_refused_by_name(kind: type, data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(kind, data)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(phases=(Phase(),)), "comes first: its start must be source or scratch"),
        (lambda: Recipe(phases=(Phase(start="source"),)), "model.source, which is none"),
        (
            lambda: Recipe(model=ModelConfig(source="x"), phases=(Phase(start="scratch"),)),
            "model.source x has no effect",
        ),
        (
            lambda: Recipe(phases=(Phase(start="scratch", loss=LossConfig(margin="cos", margin_size=0.1)),)),
            "needs model.head cosine",
        ),
        (lambda: LossConfig(margin="cos"), "set both or neither"),
        (lambda: LossConfig(gamma=-1), "must be at least 0"),
        (lambda: Phase(epochs=0), "must be above 0"),
        (lambda: Phase(batch_size=10, accumulate=4), "multiple of accumulate 4"),
        (lambda: AugmentSpec(flip=1.5), r"augment.flip is 1.5; it must lie in \[0, 1\]"),
        (lambda: AugmentSpec(hue=0.7), "augment.hue"),
        (lambda: ImageSpec(size=4), "image.size is 4"),
    ],
)
def test_contradictions_are_refused_with_the_value_seen(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_plan_counts_steps_over_all_processes_and_keeps_the_last_short_batch() -> None:
    recipe = Recipe(phases=(Phase(start="scratch", epochs=3, batch_size=64, accumulate=2),))
    plan = resolve(recipe, (FACTS,), world_size=4).phases[0]
    assert plan.batch_per_rank == 8
    assert plan.steps_per_epoch == 16  # 15 full batches of 64 and one of 40
    assert plan.steps == 48


def test_a_batch_that_does_not_divide_among_the_processes_is_refused() -> None:
    recipe = Recipe(phases=(Phase(start="scratch", batch_size=64),))
    with pytest.raises(ValueError, match="64 does not divide among 3 processes"):
        resolve(recipe, (FACTS,), world_size=3)


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
    recipe = with_scratch_baseline(RECIPES["finetune"]("weights.pt"))
    baseline, last = recipe.phases
    assert (baseline.name, baseline.start, baseline.head_start) == ("scratch", "scratch", "random")
    assert (baseline.epochs, baseline.batch_size, baseline.split) == (last.epochs, last.batch_size, last.split)
