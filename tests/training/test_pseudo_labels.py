"""Names for pictures without one: who gets which, and that a run that goes on keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facefast.data import FaceIndex
from facefast.data.corrections import read_labels
from facefast.data.divide import PhaseData
from facefast.models import FaceModel, load_source
from facefast.recipe import (
    DistillConfig,
    Phase,
)
from facefast.training import begin
from facefast.training.step import TrainState
from tests.support import small
from tests.support.beginning import NOBODY, Said, make_state

PSEUDO = Phase(name="loose", start="source", labels="pseudo", pseudo_confidence=0.0, batch_size=4, steps=2)


@pytest.fixture
def loose(index: FaceIndex) -> PhaseData:
    """One picture of each person has a name."""
    labels = np.where(np.arange(9) % 3 == 0, index.labels, -1).astype(np.int32)
    return PhaseData(dataclasses.replace(index, labels=labels), NOBODY, NOBODY)


def named(state: TrainState, data: PhaseData, folder: Path, fresh: Any, said: Said, least: float = 0.0) -> list[int]:
    """Labels after `with_pseudo_labels`."""
    path = folder / "names.csv"
    found = begin.with_pseudo_labels(path, state, data, least, fresh, said.log)
    assert found.train.class_names == data.train.class_names
    return list(found.train.labels.tolist())


def directions(index: FaceIndex, wrong: int) -> torch.Tensor:
    """[9, 64] embeddings by which everybody is told apart, but for row `wrong`, which looks like another person."""
    generator = np.random.default_rng(0)
    centres = np.eye(3, 64, dtype=np.float32)
    who = index.labels.copy()
    who[wrong] = (who[wrong] + 1) % 3
    return torch.from_numpy(centres[who] + 0.01 * generator.standard_normal((9, 64)).astype(np.float32))


def test_pictures_without_a_name_get_that_of_whom_they_look_like_but_for_unreadable_ones(
    index: FaceIndex, loose: PhaseData, source_run: Path, tmp_path: Path
) -> None:
    state, said = make_state(PSEUDO, data=(loose,), source=source_run), Said()
    seen = torch.arange(9) != small.BROKEN
    labels = named(state, loose, tmp_path, (directions(index, wrong=2), seen), said)
    assert labels == [0, 0, 1, 1, -1, 1, 2, 2, 2]
    assert said == [
        f"5 of 6 pictures without a name got one with a confidence of 0.0 or more: {tmp_path / 'names.csv'}"
    ]
    lines = (tmp_path / "names.csv").read_text().splitlines()
    assert len(lines) == 1 + 5  # neither the known ones nor the unreadable one


def test_what_stands_for_an_unreadable_picture_of_a_known_person_gives_nobody_a_name(
    index: FaceIndex, loose: PhaseData, source_run: Path, tmp_path: Path
) -> None:
    labels = np.where(np.arange(9) == 1, 0, loose.train.labels).astype(np.int32)
    data = dataclasses.replace(loose, train=dataclasses.replace(loose.train, labels=labels))
    state, seen = make_state(PSEUDO, data=(data,), source=source_run), torch.arange(9) != 1
    tables = []
    for other in (0, 8):
        embeddings = directions(index, wrong=2)
        embeddings[1] = embeddings[other]
        named(state, data, tmp_path, (embeddings, seen), Said())
        tables.append((tmp_path / "names.csv").read_text())
    assert tables[0] == tables[1]


def test_a_run_that_goes_on_keeps_the_names_of_its_file_whatever_the_model_would_say_now(
    index: FaceIndex, loose: PhaseData, source_run: Path, tmp_path: Path
) -> None:
    state, seen = make_state(PSEUDO, data=(loose,), source=source_run), torch.ones(9, dtype=torch.bool)
    first = named(state, loose, tmp_path, (directions(index, wrong=2), seen), Said())
    assert named(state, loose, tmp_path, None, Said()) == first
    path = tmp_path / "names.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "cy_0003" not in line))
    assert named(state, loose, tmp_path, None, Said()) == [*first[:8], -1]
    path.unlink()
    with pytest.raises(ValueError, match="cannot read .*names.csv"):
        named(state, loose, tmp_path, None, Said())


def test_names_that_are_not_sure_enough_are_written_down_and_not_trained_on(
    index: FaceIndex, loose: PhaseData, source_run: Path, tmp_path: Path
) -> None:
    # Two pictures of each person: one would not show how sure a name is.
    labels = np.where(np.arange(9) % 3 == 2, -1, index.labels).astype(np.int32)
    loose = dataclasses.replace(loose, train=dataclasses.replace(loose.train, labels=labels))
    state, seen = make_state(PSEUDO, data=(loose,), source=source_run), torch.ones(9, dtype=torch.bool)
    embeddings = torch.from_numpy(np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32))  # of nobody
    everybody = named(state, loose, tmp_path, (embeddings, seen), Said())
    lines = [line.rpartition(",") for line in (tmp_path / "names.csv").read_text().splitlines()[1:]]
    confidences = sorted(float(confidence) for _, _, confidence in lines)
    least = (confidences[0] + confidences[-1]) / 2
    assert confidences[0] < least < confidences[-1]
    fewer = named(state, loose, tmp_path, (embeddings, seen), Said(), least)
    assert fewer.count(-1) == sum(confidence < least for confidence in confidences) > everybody.count(-1) == 0
    assert len((tmp_path / "names.csv").read_text().splitlines()) == 1 + 3


def test_a_phase_with_pseudo_labels_counts_the_names_that_it_gave(
    loose: PhaseData, source_run: Path, tmp_path: Path
) -> None:
    state = make_state(PSEUDO, data=(loose,), source=source_run)
    found = begin.begin(tmp_path, state, 0, loose, load_source(source_run), None, None, Said().log)
    labels = found.data.train.labels
    assert labels[small.BROKEN] == -1 and np.count_nonzero(labels >= 0) == 8
    assert labels[::3].tolist() == [0, 1, 2]  # who was known stays who they are
    given = read_labels(loose.train, tmp_path / "pseudo-labels-loose.csv")
    np.testing.assert_array_equal(given.labels, labels)
    assert state.side_inputs.counts is not None
    assert state.side_inputs.counts.tolist() == np.bincount(labels[labels >= 0], minlength=3).tolist()


def test_a_student_gives_names_by_its_teacher_whose_layers_fit_each_other(
    loose: PhaseData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, embed = small.make_model(template="none"), begin.embed_pictures
    asked: list[FaceModel] = []

    def listen(state: TrainState, model: FaceModel, *rest: Any, **more: Any) -> Any:
        asked.append(model)
        return embed(state, model, *rest, **more)

    monkeypatch.setattr(begin, "embed_pictures", listen)
    phase = dataclasses.replace(PSEUDO, start="teacher", distill=DistillConfig(logits=0.0, features=1.0))
    state = make_state(phase, data=(loose,), model={"teacher": "run"})
    begin.begin(tmp_path, state, 0, loose, None, teacher, None, Said().log)
    assert asked == [teacher]
