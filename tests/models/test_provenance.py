"""Where weights are from and under what licence: said once, inherited, and unknown where nobody told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast.models import build_model, checkpoint, load_source, provenance
from facefast.recipe import ImageSpec, ModelConfig, Phase, Recipe
from facefast.runtime import files
from tests.support import small


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "source.pt"
    torch.save(small.make_model().backbone.state_dict(), path)
    return path


def started(source: Path, licence: str = "") -> dict[str, Any]:
    config = ModelConfig(source=str(source), source_licence=licence)
    found = build_model(config, 2, ImageSpec(size=small.SIZE)).provenance
    assert found is not None
    return found


def test_a_model_knows_the_file_it_began_from_and_what_was_told_of_its_licence(weights: Path) -> None:
    silent, told = started(weights), started(weights, "CC BY-NC 4.0")
    assert silent["source"] == "source.pt" and silent["sha256"] == files.sha256(weights)  # no path of its owner's
    assert silent["licence"] is None and told["licence"] == "CC BY-NC 4.0"
    assert "licence unknown: nobody told" in provenance.sentence(silent)
    assert f"source weights source.pt (SHA-256 {silent['sha256'][:12]}...), licence CC BY-NC 4.0" == (
        provenance.sentence(told)
    )


def test_a_model_of_a_model_inherits_its_licence_unless_one_is_told(weights: Path, tmp_path: Path) -> None:
    config = ModelConfig(source=str(weights), source_licence="MIT")
    first = build_model(config, 2, ImageSpec(size=small.SIZE)).eval()
    first.config = dataclasses.replace(first.config, source_licence="")  # of the recipe that `save_run` makes up
    run = small.save_run(tmp_path / "run", first, Path("nowhere"))
    second, third = started(run), started(run, "GPL")
    assert (second["licence"], third["licence"]) == ("MIT", "GPL")
    assert second["source"] == "run" and second["before"] == first.provenance
    assert checkpoint.load_model(run).provenance == first.provenance
    assert load_source(run).sha256 == files.sha256(run / "checkpoints" / "best" / "model.safetensors")


def test_random_weights_have_no_licence_and_a_students_is_its_teachers(weights: Path) -> None:
    scratch = build_model(ModelConfig(), 2, ImageSpec(size=small.SIZE))
    assert provenance.sentence(scratch.provenance) == "trained from random weights"
    teacher = small.make_model()
    teacher.provenance = started(weights, "MIT")
    student = provenance.of_run(None, teacher=teacher)
    assert provenance.licence_of(student) == "MIT" and "distilled from a teacher (source.pt)" in (
        provenance.sentence(student)
    )
    assert provenance.licence_of(provenance.of_run(None, "GPL", teacher)) == "GPL"
    teacher.provenance = None
    assert "licence unknown" in provenance.sentence(provenance.of_run(None, teacher=teacher))
    assert provenance.sentence(None) == "source weights unknown, their licence unknown"


def test_who_exports_can_tell_a_licence_where_there_are_weights_that_have_one(weights: Path) -> None:
    assert provenance.with_licence(started(weights), "MIT")["licence"] == "MIT"
    assert provenance.licence_of(provenance.with_licence(None, "MIT")) == "MIT"
    teacher = small.make_model()
    teacher.provenance = None
    student = provenance.of_run(None, teacher=teacher)
    assert provenance.licence_of(provenance.with_licence(student, "MIT")) == "MIT"
    with pytest.raises(ValueError, match="trained from random weights: a licence of source weights, 'MIT', has no"):
        provenance.with_licence(provenance.of_run(None), "MIT")
    with pytest.raises(ValueError, match="model.source_licence 'MIT' has no effect: there are no source weights"):
        Recipe(model=ModelConfig(source_licence="MIT"), phases=(Phase(start="scratch"),))


@pytest.mark.parametrize("wrong", [{"licence": 3}, {"other": "x"}, {"before": {"sha256": []}}, {"source": ["x"]}])
def test_a_document_of_another_kind_is_no_model(wrong: dict[str, Any], tmp_path: Path) -> None:
    model = small.make_model()
    model.provenance = wrong
    run = small.save_run(tmp_path / "run", model, Path("nowhere"))
    with pytest.raises(ValueError, match="model.json: provenance has"):
        checkpoint.load_model(run)


def test_what_a_source_says_of_itself_is_looked_at_too(weights: Path, tmp_path: Path) -> None:
    source = load_source(weights)
    told = dataclasses.replace(source, provenance={"licence": "MIT", "source": None})
    assert provenance.of_run(told)["licence"] == "MIT"
