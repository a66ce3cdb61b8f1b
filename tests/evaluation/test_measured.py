"""What a model says it reached: numbers, on which pictures, what had chosen it, in a file and in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from facefast.data import PairSet, read_index
from facefast.data.divide import EvaluationSet
from facefast.evaluation import measured
from tests.support import small

RESULTS = {"top1": 0.9, "top1_low": 0.8, "top1_high": 0.95, "tar@1e-3": float("nan")}
SELECTED = {"metric": "top1", "value": 0.8, "pictures": 12, "part": "validation"}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    index = read_index(small.draw(tmp_path_factory.mktemp("data") / "faces")).scanned()
    strangers = index.select(index.labels >= 2)
    return EvaluationSet(index.select(index.labels < 2), strangers, PairSet.random(strangers, 12, 2, 0), True)


def test_the_document_has_numbers_their_pictures_and_what_chose_and_is_strict_json(asked: EvaluationSet) -> None:
    found = measured.document("finetune", RESULTS, asked, SELECTED)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["row"] == "finetune" and found["results"]["tar@1e-3"] is None and found["selected"] == SELECTED
    described = found["evaluation_set"]
    assert described["name"] == "faces" and described["test"] == {"people": 2, "pictures": 8}
    assert asked.pairs is not None
    assert described["verification"] == {"people": 2, "pictures": 8, "pairs": len(asked.pairs), "held_out": True}
    assert len(described["digest"]) == 64


def test_the_digest_is_of_the_pictures_their_labels_and_their_pairs(asked: EvaluationSet) -> None:
    def digest(one: EvaluationSet) -> str:
        return str(measured.document("x", RESULTS, one, None)["evaluation_set"]["digest"])

    assert asked.test is not None and asked.pairs is not None
    fewer = EvaluationSet(asked.test.select(np.arange(7)), asked.verification, asked.pairs, True)
    turned = PairSet(asked.pairs.right, asked.pairs.left, asked.pairs.same, asked.pairs.folds)
    others = EvaluationSet(asked.test, asked.verification, turned, True)
    assert len({digest(asked), digest(fewer), digest(others)}) == 3
    assert digest(asked) == digest(EvaluationSet(asked.test, asked.verification, asked.pairs, True))


def test_the_line_says_number_interval_set_and_what_chose(asked: EvaluationSet) -> None:
    assert measured.sentence(measured.document("x", RESULTS, asked, SELECTED)) == (
        "top1 90.00% (95 % interval 80.00% to 95.00%) on 8 pictures of 2 people of faces, chosen by top1 of 12 "
        "validation pictures when it was made"
    )
    assert measured.sentence(measured.document("x", {"verification_accuracy": 0.7}, None, None)) == (
        "verification_accuracy 70.00% when it was made"
    )


@pytest.mark.parametrize("odd", [None, {}, {"results": 3}, {"results": {"top1": "much"}}, {"results": {"top1": None}}])
def test_where_nothing_was_measured_the_line_says_so(odd: dict[str, Any] | None) -> None:
    assert measured.sentence(odd) == "not measured when it was made"


def test_a_header_names_the_model_its_kind_its_people_and_its_source() -> None:
    model = small.make_model()
    said = measured.header(Path("runs/x"), model)
    assert said == ("model runs/x: mobilefacenet, 4 people; trained from random weights; not measured when it was made")
