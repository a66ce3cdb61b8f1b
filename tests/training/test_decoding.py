"""Where a run's pictures are decoded: chosen when it begins, kept as long as it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast.data import FaceIndex, placement, read_index
from facefast.data.divide import PhaseData, divide
from facefast.recipe import DataConfig, Decoding, ImageSpec, ModelConfig, Phase, Recipe, resolve, to_json
from facefast.runtime.exits import StorageError
from facefast.runtime.process import Runtime, World
from facefast.training.decoding import settle_decoding
from facefast.training.step import TrainState
from tests.support import small

CPU, GPU = Runtime(World(), torch.device("cpu")), Runtime(World(), torch.device("cuda"))
MEASURED = Decoding("regions", 0.65, "measured")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    return read_index(small.photographs(tmp_path_factory.mktemp("data") / "people"), "folder").scanned()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[placement.Job]:
    """The jobs that were measured; the answer is always `MEASURED`."""
    jobs: list[placement.Job] = []

    def choose(job: placement.Job, candidates: Sequence[placement.Candidate], run: Runtime) -> Decoding:
        jobs.append(job)
        return MEASURED if len(candidates) > 1 else Decoding(*candidates[0], "asked")

    monkeypatch.setattr(placement, "choose", choose)
    return jobs


def begin(index: FaceIndex, run: Runtime = GPU, **data: Any) -> tuple[TrainState, list[PhaseData]]:
    recipe = Recipe(
        data=DataConfig(root="people", max_bad_fraction=1.0, **data),
        image=ImageSpec(size=small.SIZE, template="none"),
        model=ModelConfig(backbone="mobilefacenet", embedding=16),
        phases=(Phase(name="scratch", start="scratch", batch_size=4, accumulate=2, steps=5),),
        precision="fp32",
    )
    datasets = [divide(index, recipe, phase) for phase in recipe.phases]
    state = TrainState(recipe, resolve(recipe, tuple(data.facts() for data in datasets), 1), CPU)
    state.run = run  # nothing here touches the device
    return state, datasets


def save_plan(folder: Path, state: TrainState, **fields: Any) -> Path:
    (folder / "plan.json").write_text(json.dumps(to_json(state.plan) | fields))
    return folder


def test_a_run_that_begins_writes_down_what_was_measured_and_reads_by_it(
    index: FaceIndex, asked: list[placement.Job]
) -> None:
    state, datasets = begin(index)
    before = state.reading
    settle_decoding(state, None, datasets)
    assert state.plan.decoding == MEASURED and to_json(state.plan)["decoding"] == dataclasses.asdict(MEASURED)
    assert state.reading == dataclasses.replace(before, decoding="regions", hw_decoder_load=0.65)
    (job,) = asked
    assert (job.index, job.batch_size, job.pictures) == (datasets[0].train, 2, 20)


def test_on_the_cpu_nothing_is_measured_and_nothing_changes(index: FaceIndex, asked: list[placement.Job]) -> None:
    state, datasets = begin(index, CPU)
    reading, plan = state.reading, state.plan
    settle_decoding(state, None, datasets)
    assert (state.reading, state.plan, asked) == (reading, plan, []) and plan.decoding is None


@pytest.mark.parametrize("data", [{"decoding": "gpu"}, {"decoding": "cpu"}, {"hw_decoder_load": 0.5}], ids=str)
def test_what_has_no_effect_without_a_gpu_is_said(
    index: FaceIndex, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    state, datasets = begin(index, CPU)
    settle_decoding(state, None, datasets)
    assert capsys.readouterr().out == ""
    state, datasets = begin(index, CPU, **data)
    settle_decoding(state, None, datasets)
    assert "have no effect without a GPU" in capsys.readouterr().out


def test_a_run_that_goes_on_keeps_its_place_though_another_one_would_be_chosen(
    index: FaceIndex, asked: list[placement.Job], tmp_path: Path
) -> None:
    state, datasets = begin(index)
    kept = {"place": "cpu", "hw_decoder_load": 0.0, "why": "measured"}
    settle_decoding(state, save_plan(tmp_path, state, decoding=kept), datasets)
    assert asked == [] and state.plan.decoding == Decoding("cpu", 0.0, "measured")
    assert state.reading.decoding == "cpu"


def test_a_run_that_began_on_the_cpu_or_before_there_was_a_choice_takes_the_usual_place(
    index: FaceIndex, asked: list[placement.Job], tmp_path: Path
) -> None:
    state, datasets = begin(index)
    settle_decoding(state, save_plan(tmp_path, state), datasets)
    assert asked == [] and state.plan.decoding == Decoding("gpu", 0.65, "usual")
    plan = to_json(state.plan)
    del plan["decoding"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    settle_decoding(state, tmp_path, datasets)
    assert asked == [] and state.plan.decoding == Decoding("gpu", 0.65, "usual")


def test_what_a_recipe_asks_for_is_taken(index: FaceIndex, asked: list[placement.Job]) -> None:
    state, datasets = begin(index, decoding="gpu", hw_decoder_load=0.2)
    settle_decoding(state, None, datasets)
    assert state.plan.decoding == Decoding("gpu", 0.2, "asked") and state.reading.hw_decoder_load == 0.2


@pytest.mark.parametrize("decoding", [[], {"place": "gpu"}, {"place": "tpu", "hw_decoder_load": 0.5, "why": "asked"}])
def test_a_plan_with_no_place_that_there_is_is_refused(
    index: FaceIndex, asked: list[placement.Job], tmp_path: Path, decoding: Any
) -> None:
    state, datasets = begin(index)
    with pytest.raises(StorageError, match="no plan of facefast's: decoding"):
        settle_decoding(state, save_plan(tmp_path, state, decoding=decoding), datasets)
