"""The numbers of an evaluation: counted by hand over what could be read, and named by what the model was trained on."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from facefast.data import FaceIndex, PairSet, read_index
from facefast.data.divide import EvaluationSet
from facefast.evaluation import measure, metrics
from facefast.evaluation.baselines import BASELINES, LabelledEmbeddings
from facefast.evaluation.embed import embed_rows
from facefast.evaluation.measure import evaluate, verification
from facefast.models import FaceModel
from facefast.models.precision import Precision
from facefast.recipe import AttributeSpec, EvalConfig, ImageSpec, ModelConfig, Reading
from facefast.runtime import process
from tests.support import small

RUN = process.Runtime(process.World(), torch.device("cpu"))
FP32 = Precision.choose("fp32", "mobilefacenet", True, RUN.device)
EVERYTHING = Reading(threads=1, max_bad_fraction=1.0)
CONFIG = EvalConfig(batch_size=4)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    return read_index(small.photographs(tmp_path_factory.mktemp("data") / "people"), "folder").scanned()


def set_of(test: FaceIndex | None, verified: FaceIndex | None = None, held_out: bool = False) -> EvaluationSet:
    pairs = None if verified is None else PairSet.random(verified, 18, 2)
    return EvaluationSet(test=test, verification=verified, pairs=pairs, held_out=held_out)


def measured(model: FaceModel, asked: EvaluationSet, **more: Any) -> dict[str, float]:
    return evaluate(model, asked, CONFIG, RUN, FP32, EVERYTHING, **more)


# Verification.


def test_pairs_with_a_picture_that_cannot_be_read_are_left_out_and_counted() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [1.0, 1.0]])
    same = np.array([True, True, True, False, False, False])
    pairs = PairSet(np.array([0, 2, 4, 0, 1, 4]), np.array([1, 3, 0, 2, 3, 1]), same, np.arange(6, dtype=np.int16) % 2)
    seen = torch.tensor([True, True, True, True, False])
    found = verification(embeddings, seen, pairs)
    assert found["pairs"] == 4
    assert (found["verification_accuracy"], found["auc"]) == (1.0, 1.0)
    assert np.isnan(found["tar@1e-2"])  # two pairs of two people cannot show one in a hundred
    assert verification(embeddings, torch.tensor([True, True, False, False, False]), pairs) == {"pairs": 1}


def test_too_few_pairs_for_folds_give_what_they_can_show() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    pairs = PairSet.of([0, 0, 1], [1, 2, 3], np.array([True, False, False]))
    found = verification(embeddings, torch.ones(4, dtype=torch.bool), pairs)
    assert (found["pairs"], found["auc"]) == (3, 1.0)
    assert np.isnan(found["verification_accuracy"]) and np.isnan(found["verification_std"])


def test_lengths_of_embeddings_say_nothing_and_what_stands_for_unreadable_ones_neither() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, 8, generator=generator)
    embeddings[20:] = embeddings[:20] + 0.3 * torch.randn(20, 8, generator=generator)
    left, right = (
        np.concatenate([np.arange(20), np.arange(20)]),
        np.concatenate([np.arange(20, 40), np.arange(39, 19, -1)]),
    )
    pairs = PairSet.of(left, right, left + 20 == right, 4)
    seen = torch.arange(40) != 7
    expected = verification(embeddings, seen, pairs)
    lengths = 0.1 + 10 * torch.rand(40, 1, generator=generator)
    assert verification(embeddings * lengths, seen, pairs) == pytest.approx(expected, nan_ok=True)
    for other in (0.0, 1e6, math.nan):
        embeddings[7] = other
        assert verification(embeddings, seen, pairs) == pytest.approx(expected, nan_ok=True)
    assert expected["pairs"] == 38
    assert 0.5 < expected["verification_accuracy"] < 1.01


# A whole evaluation.


def test_an_evaluation_counts_what_could_be_read_and_puts_the_model_back_as_it_was(index: FaceIndex) -> None:
    model = small.make_model(classes=small.PEOPLE).train()
    asked = set_of(index, index)
    found = measured(model, asked)
    assert model.training
    assert found["test_rows"] == 8
    assert found["top1_low"] < found["top1"] < found["top1_high"] or found["top1"] in (0.0, 1.0)
    assert (found["top1_low"], found["top1_high"]) == metrics.wilson_interval(round(8 * found["top1"]), 8)
    assert 0 <= found["ece"] <= 1
    assert asked.pairs is not None and found["known_pairs"] < len(asked.pairs)
    assert "verification_accuracy" not in found  # these people are known
    model.eval()
    embeddings, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    logits = model.classify(embeddings[seen]).detach() * model.scale
    labels = torch.tensor(index.labels, dtype=torch.long)[seen]
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert found["top5"] == 1.0  # of three
    assert measured(model, asked) == pytest.approx(found, nan_ok=True)
    assert not model.training


def steered(index: FaceIndex, answers: list[int]) -> FaceModel:
    """A model that takes row k for person `answers[k]`, whatever that row shows."""
    model = small.make_model(classes=small.PEOPLE)
    embeddings, _ = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    readable = [row for row in range(9) if row != small.BROKEN]
    wanted = torch.nn.functional.one_hot(torch.tensor(answers), 3).float()
    matrix = torch.linalg.lstsq(embeddings[readable], 10 * wanted[readable]).solution  # [16, 3]: 8 rows are met exactly
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.copy_(matrix.T)
        assert isinstance(model.head, torch.nn.Linear)
        model.head.bias.zero_()
    return model


def test_accuracy_is_that_of_pictures_and_per_class_that_of_people(index: FaceIndex) -> None:
    answers = [0, 0, 0, 1, 0, 2, 2, 2, 0]  # ann all right, bo one of two readable ones, cy two of three
    found = measured(steered(index, answers), set_of(index))
    assert found["top1"] == pytest.approx(6 / 8)
    assert found["per_class"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert set(found) == {"loss", "top1", "top1_low", "top1_high", "top5", "per_class", "ece", "test_rows"}


def test_people_without_a_test_picture_do_not_count_as_wrong(index: FaceIndex) -> None:
    found = measured(steered(index, [0] * 9), set_of(index.select([0, 1, 3])))
    assert found["per_class"] == pytest.approx(1 / 2)  # of ann and bo; cy was not asked about


def test_rows_without_a_name_are_not_asked_for_one(index: FaceIndex) -> None:
    labels = index.labels.copy()
    labels[[3, 8]] = -1
    found = measured(steered(index, [0, 0, 0, 0, 0, 1, 2, 2, 0]), set_of(dataclasses.replace(index, labels=labels)))
    assert (found["test_rows"], found["top1"]) == (6, 1.0)
    none = dataclasses.replace(index, labels=np.full(9, -1, np.int32))
    assert "top1" not in measured(steered(index, [0] * 9), set_of(none))


def test_the_loss_is_that_of_probabilities_and_so_of_the_scale(index: FaceIndex) -> None:
    model = steered(index, [0, 0, 0, 1, 1, 1, 2, 2, 0])
    losses = []
    for scale in (0.5, 1.0):
        model.scale = scale
        losses.append(measured(model, set_of(index))["loss"])

    def loss(scale: float) -> float:
        """7 right and 1 wrong: logits of 10 x scale for one class and of 0 for the others."""
        right = math.log(1 + 2 * math.exp(-10 * scale))
        return (7 * right + right + 10 * scale) / 8

    assert losses == pytest.approx([loss(0.5), loss(1.0)], abs=0.02)


def test_people_kept_out_of_training_are_verified_under_the_plain_name(index: FaceIndex) -> None:
    model = small.make_model(classes=("dan", "eve"))
    found = measured(model, set_of(None, index, held_out=True))
    assert {"verification_accuracy", "verification_std", "auc", "tar@1e-2", "threshold@far1e-2", "pairs"} <= set(found)
    assert not any(name.startswith("known_") for name in found)
    assert "top1" not in found
    known = measured(model, set_of(None, index, held_out=False))
    assert known == pytest.approx({f"known_{name}": value for name, value in found.items()}, nan_ok=True)


def test_a_model_without_a_head_is_verified_and_names_nobody(index: FaceIndex) -> None:
    found = measured(small.make_model(classes=()), set_of(index, index, held_out=True))
    assert "verification_accuracy" in found
    assert not {"top1", "loss", "test_rows"} & set(found)


def test_nothing_to_ask_gives_no_number(index: FaceIndex) -> None:
    assert measured(small.make_model(), set_of(None)) == {}


def test_pictures_that_are_named_and_verified_are_embedded_once(
    index: FaceIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(model: FaceModel, given: FaceIndex, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        asked.append(len(given))
        return embed_rows(model, given, *rest, **more)

    monkeypatch.setattr(measure, "embed_rows", counted)
    model = small.make_model(classes=small.PEOPLE)
    measured(model, set_of(index, index))
    assert asked == [9]
    measured(model, set_of(index, index.select(list(range(6)))))
    assert asked == [9, 9, 6]


def test_baselines_are_measured_on_the_same_rows(index: FaceIndex) -> None:
    model = small.make_model(classes=small.PEOPLE)
    embeddings, seen = embed_rows(model, index, RUN, FP32, EVERYTHING, batch_size=9)
    labels = torch.tensor(index.labels, dtype=torch.long).where(seen, -1)
    found = measured(model, set_of(index), known=LabelledEmbeddings(embeddings, labels, 3))
    assert {name: found[name] for name in BASELINES} == dict.fromkeys(BASELINES, 1.0)  # training pictures themselves
    assert not set(BASELINES) & set(measured(model, set_of(index)))
    nameless = dataclasses.replace(index, labels=np.full(9, -1, np.int32))
    headless = small.make_model(classes=())
    assert measured(headless, set_of(nameless), known=LabelledEmbeddings(embeddings, labels, 3)) == {}


# Attributes.


def with_values(index: FaceIndex, **columns: list[float]) -> FaceIndex:
    values = np.array(list(columns.values()), np.float32).T
    return dataclasses.replace(index, attributes=values, attribute_names=tuple(columns))


def telling(index: FaceIndex, specs: list[AttributeSpec], answers: list[list[float]]) -> FaceModel:
    """A model whose attribute heads give row k the k-th of each answer."""
    model = FaceModel(
        ModelConfig(backbone="mobilefacenet", embedding=16),
        0,
        ImageSpec(size=small.SIZE, template="none"),
        attributes=specs,
    ).eval()

    def predict(embeddings: Tensor) -> dict[str, Tensor]:
        assert len(embeddings) == len(index)
        return {spec.name: torch.tensor(values) for spec, values in zip(specs, answers, strict=True)}

    model.predict_attributes = predict  # type: ignore[method-assign]
    return model


NAN = math.nan


def test_attributes_are_measured_where_they_are_known_and_their_picture_could_be_read(index: FaceIndex) -> None:
    truth = with_values(index, smile=[1, 1, 0, 0, 1, NAN, NAN, 1, 0], age=[20, 30, 40, 50, 60, NAN, 25, 35, 45])
    smiles = [0.9, 0.4, 0.1, 0.6, 0.0, 0.0, 0.0, 0.8, 0.2]
    ages = [22.0, 30, 36, 56, 0, 0, 25, 30, 45]  # off by 2, 0, 4, 6, -, -, 0, 5, 0
    model = telling(index, [AttributeSpec("smile"), AttributeSpec("age", (20.0, 40.0, 60.0))], [smiles, ages])
    found = measured(model, set_of(truth))
    assert found["smile/accuracy"] == pytest.approx(4 / 6)  # row 4 cannot be read, 5 and 6 are not known
    assert found["smile/auc"] == pytest.approx(8 / 9)  # of three yes and three no, one pair stands the wrong way round
    assert found["age/mae"] == pytest.approx((2 + 0 + 4 + 6 + 0 + 5 + 0) / 7)
    assert found["age/within5"] == pytest.approx(6 / 7)
    assert found["tasks"] == pytest.approx((8 / 9 + 1 - 17 / 7 / 40) / 2)


def test_an_attribute_of_which_only_one_answer_occurs_has_no_number(index: FaceIndex) -> None:
    truth = with_values(index, smile=[1] * 9, beard=[NAN] * 9, glasses=[1, 0] + [NAN] * 7)
    specs = [AttributeSpec(name) for name in ("smile", "beard", "glasses")]
    found = measured(telling(index, specs, [[0.9] * 9, [0.9] * 9, [0.9, 0.1] + [0.5] * 7]), set_of(truth))
    assert set(found) == {"glasses/accuracy", "glasses/auc", "glasses/tar@1e-2", "tasks"}
    assert found["tasks"] == found["glasses/auc"] == 1.0


def test_attributes_of_other_names_or_in_another_order_are_not_compared(index: FaceIndex) -> None:
    specs = [AttributeSpec("smile"), AttributeSpec("beard")]
    model = telling(index, specs, [[0.5] * 9] * 2)
    values = [0.0, 1.0] * 4 + [0.0]
    for columns in ({"beard": values, "smile": values}, {"smile": values, "hat": values}, {"smile": values}):
        assert measured(model, set_of(with_values(index, **columns))) == {}
    assert measured(model, set_of(with_values(index, smile=values, beard=values)))
