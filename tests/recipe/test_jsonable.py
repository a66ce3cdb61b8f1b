"""Recipes as JSON values: what is written comes back, and what nobody wrote is refused by the name of its field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from facefast.recipe import (
    AttributeSpec,
    AugmentSpec,
    ImageSpec,
    IndexFacts,
    LossConfig,
    ModelConfig,
    Phase,
    Plan,
    Recipe,
    from_json,
    resolve,
    to_json,
)


def again(kind: type, value: Any) -> Any:
    """A value after its way through a file."""
    return from_json(kind, json.loads(json.dumps(to_json(value))))


def test_what_a_file_holds_is_plain_json() -> None:
    recipe = Recipe(phases=(Phase(name="a", start="scratch", trainable=("head", "stage3")), Phase(name="b")))
    document = to_json(recipe)
    assert document["phases"][0]["trainable"] == ["head", "stage3"]
    assert document["image"]["mean"] == [127.5, 127.5, 127.5]
    assert json.loads(json.dumps(document)) == document  # no tuples or objects anywhere
    assert again(Recipe, recipe) == recipe


def test_a_plan_and_its_facts_come_back_too() -> None:
    recipe = Recipe(phases=(Phase(name="a", start="scratch"), Phase(name="b", accumulate=2)))
    plan = resolve(recipe, (IndexFacts(80, 4, "f", ("ann", "bo", "cy", "dan")), IndexFacts(3, 2, "g")), 2)
    assert again(Plan, plan) == plan
    assert again(AttributeSpec, AttributeSpec("age", (1.0, 2.0))) == AttributeSpec("age", (1.0, 2.0))


def test_a_field_that_is_missing_takes_its_default_at_any_depth() -> None:
    assert from_json(AugmentSpec, {}) == AugmentSpec()
    assert from_json(Recipe, {"phases": [{"start": "scratch", "loss": {"gamma": 2}}]}).phases[0].loss == LossConfig(
        gamma=2.0
    )


def test_a_whole_number_may_stand_for_a_float_and_nothing_else_for_anything() -> None:
    found = from_json(LossConfig, {"gamma": 2, "margin": "cos", "margin_size": 0.1})
    assert found.gamma == 2.0 and isinstance(found.gamma, float)
    image = from_json(ImageSpec, {"mean": [1, 2, 3]})
    assert all(isinstance(value, float) for value in image.mean)
    for kind, data, message in (
        (Phase, {"steps": 1.0}, "steps is 1.0; it must be int"),
        (Phase, {"steps": "1"}, "steps is '1'; it must be int"),
        (Phase, {"steps": None}, "steps is None; it must be int"),
        (Phase, {"lr": True}, "lr is True; it must be float"),
        (Phase, {"lr": "0.1"}, "lr is '0.1'; it must be float"),
        (Phase, {"lr": [0.1]}, r"lr is \[0.1\]; it must be float"),
        (Phase, {"name": 3}, "name is 3; it must be str"),
        (Recipe, {"channels_last": 1}, "channels_last is 1; it must be bool"),
        (Recipe, {"compile": "no"}, "compile is 'no'; it must be one of auto, never, always"),
        (Phase, {"split": "TRAIN"}, "split is 'TRAIN'; it must be one of all, train, val, test"),
        (Phase, {"split": 0}, "split is 0; it must be one of"),
        (ImageSpec, {"mean": [1, 2]}, "mean has 2 values; it takes 3"),
        (ImageSpec, {"mean": [1, 2, "3"]}, "mean is '3'; it must be float"),
        (Phase, {"trainable": ["head", 3]}, "trainable is 3; it must be str"),
        (Phase, {"loss": {"gamma": "2"}}, "gamma is '2'; it must be float"),
        (Phase, {"augment": {"flipp": 0.5}}, "AugmentSpec has no field flipp; it has .*flip"),
    ):
        with pytest.raises(ValueError, match=message):
            from_json(kind, data)


def test_values_that_contradict_each_other_are_refused_as_if_they_had_been_typed() -> None:
    with pytest.raises(ValueError, match="loss.margin is 'cos' but loss.margin_size is 0.0"):
        from_json(LossConfig, {"margin": "cos"})
    with pytest.raises(ValueError, match="a phase starts from model.source, which is none"):
        from_json(Recipe, {"phases": [{"start": "source"}]})
    with pytest.raises(ValueError, match=r"model.dropout 1.5 .* must lie in \[0, 1\)"):
        from_json(ModelConfig, {"dropout": 1.5})


def test_several_unknown_fields_are_all_named() -> None:
    with pytest.raises(ValueError, match="ModelConfig has no field depth, width; it has backbone, batchnorm"):
        from_json(ModelConfig, {"width": 2, "depth": 3, "backbone": "resnet18"})


@dataclass(frozen=True)
class Inner:
    kind: Literal[1, 2] = 1


@dataclass(frozen=True)
class Outer:
    pairs: tuple[tuple[int, str], ...] = ()
    inners: tuple[Inner, ...] = ()
    fixed: tuple[int, float] = (1, 2.0)


def test_nesting_of_any_depth_comes_back_as_it_was() -> None:
    value = Outer(pairs=((1, "a"), (2, "b")), inners=(Inner(2), Inner()), fixed=(3, 4.0))
    assert again(Outer, value) == value
    assert again(Outer, Outer()) == Outer()
    with pytest.raises(ValueError, match="pairs has 3 values; it takes 2"):
        from_json(Outer, {"pairs": [[1, "a", 2]]})
    with pytest.raises(ValueError, match="kind is 3; it must be one of 1, 2"):
        from_json(Outer, {"inners": [{"kind": 3}]})
