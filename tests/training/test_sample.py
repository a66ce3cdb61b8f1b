"""A look at few pictures of each person: pictures like the source's are let through, others are asked whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import FaceIndex
from facefast.data.divide import PhaseData
from facefast.evaluation.baselines import class_means
from facefast.evaluation.embed import embed_rows
from facefast.models import FaceModel, checkpoint, load_source
from facefast.recipe import AdaptConfig, EvalConfig, Phase
from facefast.training import begin, sample
from facefast.training.leftout import Trial
from facefast.training.restate import Statistics
from tests.support import small
from tests.support.beginning import NOBODY, RUN, Said, make_state

PICTURES = 9


class Pictures:
    """People who differ in all numbers alike; pictures of one by `within` in a quarter of them and by half elsewhere,
    all `middle` away from 0. With the source's BatchNorm statistics `noise` comes on top, until they are restated, and
    `grain` does, until the pictures are blurred; nothing rids them of what is `lasting`."""

    def __init__(
        self,
        people: int,
        within: float = 0.5,
        middle: float = 0.0,
        noise: float = 0.0,
        grain: float = 0.0,
        lasting: float = 0.0,
    ) -> None:
        generator = np.random.default_rng(3)
        self.labels = np.repeat(np.arange(people), PICTURES)
        spread = np.full(24, 0.5)
        spread[:6] = within
        clean = generator.normal(size=(people, 24))[self.labels] + spread * generator.normal(
            size=(len(self.labels), 24)
        )
        clean += lasting * np.random.default_rng(4).normal(size=clean.shape)
        self.restated = torch.tensor(clean + middle).float()
        self.noise = max(noise, grain) * torch.tensor(generator.normal(size=self.restated.shape)).float()
        self.blurs = grain > noise
        self.index = FaceIndex.build(
            "people", [f"{row}.jpg".encode() for row in range(len(clean))], self.labels, [str(p) for p in range(people)]
        )
        self.asked: list[int] = []
        self.mirrored: list[bool] = []

    def embed(self, model: FaceModel, index: FaceIndex, mirror: bool) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([int(Path(index.name(row)).stem) for row in range(len(index))])
        self.asked.append(len(rows))
        self.mirrored.append(mirror)
        restated = float(next(iter(model.backbone.buffers())).flatten()[0]) == 7.0
        rid = model.smoothing is not None if self.blurs else restated
        found = self.restated if rid else self.restated + self.noise
        return found[rows].clone(), torch.ones(len(rows), dtype=torch.bool)

    def measure(self, model: FaceModel, index: FaceIndex) -> Statistics:
        self.asked.append(len(index))
        return {}

    def look(self, seed: int = 0) -> sample.Look:
        return sample.look(small.make_model(), self.index, self.embed, self.measure, RUN, seed)


@pytest.fixture(autouse=True)
def restating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A model whose statistics were restated is known by a buffer."""

    def restate(model: FaceModel, *_: object) -> None:
        next(iter(model.backbone.buffers())).fill_(7.0)

    monkeypatch.setattr(sample, "restate", restate)
    yield


@pytest.mark.parametrize("seed", range(3))
def test_pictures_like_the_sources_are_let_through_after_a_bounded_number_of_them(seed: int) -> None:
    pictures = Pictures(400)
    found = pictures.look(seed)
    assert not found.promising and len(found.trials) == 6 and found.verified > 0.99
    assert len(found.rows) == sample.MOST < len(pictures.labels)
    assert sum(pictures.asked) <= sample.MOST
    assert not any(pictures.mirrored)
    said = list(found.told())
    assert said[0].startswith("the source model stays as it is: 720 pictures of 240 people rule out") and len(said) == 7
    assert "no blur and no BatchNorm statistics are tried" in said[0]


def test_a_blur_and_statistics_are_tried_where_many_pairs_fail_and_no_map_helps() -> None:
    pictures = Pictures(400, lasting=1.0)
    found = pictures.look()
    assert not found.promising and len(found.trials) == 8 and 0.1 < found.verified < sample.VERIFIED
    assert sum(pictures.asked) <= sample.MOST + sample.FOR_STATISTICS + 2 * 0.6 * sample.MOST
    assert "are tried" not in next(found.told())


SHIFTED = [{"within": 2.0}, {"within": 4.0}, {"within": 1.0, "middle": 8.0}, {"noise": 1.5}, {"grain": 1.5}]


@pytest.mark.parametrize("shift", SHIFTED, ids=str)
@pytest.mark.parametrize("people", [20, 80, 400])
def test_pictures_that_an_adaptation_helps_are_never_let_through(shift: dict[str, float], people: int) -> None:
    for seed in range(3):
        found = Pictures(people, **shift).look(seed)
        assert found.promising and max(trial.gain for trial in found.trials) > sample.WORTH
        assert next(found.told()).endswith("by 3 points: it is chosen on all pictures")


def test_what_cannot_be_ruled_out_is_asked_of_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(high: float) -> sample.Look:
        trial = Trial("a map", 0.5, 0.0, -high, high, 20)
        monkeypatch.setattr(sample, "choose_map", lambda *_: (None, (trial,)))
        monkeypatch.setattr(sample, "_networks_tried", lambda *_: ())
        return Pictures(20).look()

    assert not tried(0.029).promising
    assert tried(0.03).promising
    monkeypatch.setattr(sample, "choose_map", lambda *_: (None, ()))
    assert Pictures(20).look().promising  # nothing could be told


def test_too_few_people_are_counted_and_nobody_is_embedded() -> None:
    pictures = Pictures(9)
    found = pictures.look()
    assert (found.promising, len(found.rows), pictures.asked) == (False, 0, [])
    assert "9 people have two pictures or more; 10 are needed" in next(found.told())


def test_a_few_pictures_of_each_person_are_drawn_by_the_seed_and_more_of_few_people() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(-1, 300), 20))
    labels[np.flatnonzero(labels == 5)[1:]] = -1
    rows = sample.few_of_each(labels, 3, seed=1)
    counts = np.bincount(labels[rows], minlength=300)
    assert (labels[rows] >= 0).all() and (np.diff(rows) > 0).all()
    assert counts[5] == 1 and set(np.delete(counts, 5)) == {3}
    assert set(rows) < set(sample.few_of_each(labels, 4, seed=1))
    np.testing.assert_array_equal(rows, sample.few_of_each(labels, 3, seed=1))
    assert len(np.setdiff1d(rows, sample.few_of_each(labels, 3, seed=2))) > 300
    few = sample.few_of_each(labels[labels < 40], 3, seed=1)
    assert len(few) == 39 * (sample.MOST // 40) + 1


def test_the_sample_is_of_whole_people_and_those_with_one_picture_come_last() -> None:
    labels = np.concatenate([np.repeat(np.arange(100), 5), np.arange(100, 900)])
    rows = sample.rows_to_look_at(labels, seed=1)
    counts = np.bincount(labels[rows], minlength=900)
    assert (counts[:100] == sample.EACH).all() and counts[100:].max() == 1
    assert len(rows) == sample.MOST and set(rows) <= set(sample.few_of_each(labels, 3, seed=1))
    many = sample.rows_to_look_at(np.repeat(np.arange(5000), 4), seed=1)
    assert len(many) == sample.MOST and (np.bincount(many // 4)[np.unique(many // 4)] == sample.EACH).all()


# The head's start.


def test_a_head_starts_from_few_pictures_and_all_of_a_person_of_whom_these_cannot_be_read(
    index: FaceIndex, source_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "MOST", 0)
    monkeypatch.setattr(sample, "EACH", 1)
    asked: list[list[str]] = []

    def listen(model: FaceModel, some: FaceIndex, *rest: object, **more: object) -> tuple[Tensor, Tensor]:
        asked.append([some.name(row) for row in range(len(some))])
        assert more["mirror"] == "none"
        return embed_rows(model, some, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(begin, "embed_rows", listen)
    whose = index.labels[small.BROKEN]
    only = np.flatnonzero(index.labels == whose)
    drawn: NDArray[np.int64] = np.array([0, small.BROKEN, 6])
    monkeypatch.setattr(sample, "few_of_each", lambda *_: drawn)
    phase = Phase(name="tune", start="source", head_start="class_mean", batch_size=4, steps=5)
    data = PhaseData(index, NOBODY, NOBODY)
    state = make_state(phase, data=(data,), source=source_run, eval=EvalConfig(baselines=False))
    begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, Said().log)
    rest = np.setdiff1d(only, drawn)
    assert asked == [[index.name(row) for row in drawn], [index.name(row) for row in rest]]
    assert state.model.head is not None
    rows = np.concatenate([np.setdiff1d(drawn, [small.BROKEN]), rest])
    model = checkpoint.load_model(source_run)
    embeddings, seen = embed_rows(
        model, index.select(rows), RUN, state.precision, state.reading, batch_size=4, mirror="none"
    )
    assert bool(seen.all())
    means = class_means(embeddings, torch.tensor(index.labels[rows], dtype=torch.long), 3)
    found = torch.nn.functional.normalize(state.model.head.weight.detach())
    torch.testing.assert_close(found, means, rtol=0, atol=1e-4)


def look_of(promising: bool, index: FaceIndex) -> sample.Look:
    return sample.Look(promising, np.arange(0), torch.zeros(0, 16), torch.zeros(0).bool(), 12)


@pytest.mark.parametrize("promising", [False, True])
def test_all_pictures_are_asked_for_an_adaptation_where_the_sample_promises_one(
    index: FaceIndex, source_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promising: bool
) -> None:
    chosen: list[int] = []
    adapted = begin.adapted_to

    def listen(state: object, config: AdaptConfig, model: FaceModel, data: PhaseData, *rest: object) -> object:
        chosen.append(len(data.train))
        return adapted(state, config, model, data, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(begin, "adapted_to", listen)
    monkeypatch.setattr(sample, "MOST", 0)
    monkeypatch.setattr(sample, "look", lambda *_: look_of(promising, index))
    phase = Phase(
        name="tune", start="source", head_start="class_mean", batch_size=4, steps=5, adapt=AdaptConfig("auto")
    )
    data, said = PhaseData(index, NOBODY, NOBODY), Said()
    state = make_state(phase, data=(data,), source=source_run)
    begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, said.log)
    assert chosen == ([len(index)] if promising else [])
    assert sum("0 pictures of 12 people" in text for text in said) == 1
    # Where no update follows, the class means are what is handed on, and all pictures are asked at once.
    chosen.clear()
    phase = dataclasses.replace(phase, steps=0, epochs=0)
    state = make_state(phase, data=(data,), source=source_run)
    begin.begin(tmp_path, state, 0, data, load_source(source_run), None, None, said.log)
    assert chosen == [len(index)]
