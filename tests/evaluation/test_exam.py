"""The evaluate command's answers, against the functions that they are made of and counting."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from facefast.data import FaceIndex, PairSet, TemplateSet
from facefast.evaluation import exam, metrics, pairs
from facefast.evaluation.embed import Embed, remembering
from facefast.evaluation.exam import Questions
from tests.support.pictures import make_index

PEOPLE, PICTURES = 12, 10


def embeddings_of(index: FaceIndex) -> tuple[Tensor, Tensor]:
    """Each picture near its person, that of row 7 unreadable."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(40, 16, generator=generator)
    noise = torch.randn(len(index), 16, generator=generator)
    seen = torch.arange(len(index)) != 7
    return centres[torch.from_numpy(index.labels.astype(np.int64))] + 0.9 * noise, seen


@pytest.fixture
def index(tmp_path: Path) -> FaceIndex:
    labels = np.arange(PEOPLE * PICTURES, dtype=np.int32) % PEOPLE
    made = make_index(tmp_path, [f"{k}.png" for k in range(len(labels))], labels=labels)
    values = (labels[:, None] % 2).astype(np.float32)
    hashes = np.arange(1, 2 * len(labels) + 1, dtype=np.uint64).reshape(-1, 2)
    return dataclasses.replace(made, attributes=values, attribute_names=("odd",), hashes=hashes)


def test_pairs_are_answered_in_full(index: FaceIndex) -> None:
    drawn = PairSet.random(index, 800, 4, seed=3)
    questions = Questions(draws=3, groups="odd", hardest=2, seed=3)
    found = exam.verify_in_full(embeddings_of, index, drawn, questions, drawn=True, prefix="known_")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    embeddings, seen = embeddings_of(index)
    whole = seen.numpy()[drawn.left] & seen.numpy()[drawn.right]
    scores = metrics.pair_scores(F.normalize(embeddings, dim=1).numpy(), drawn.left, drawn.right)[whole]
    same = drawn.same[whole]
    assert found["known_eer"] == pairs.equal_error_rate(scores, same)
    first = found["known_pair_thresholds"][0]
    assert first["fmr"] == 0.01 and (scores[~same] >= first["threshold"]).mean() <= 0.01
    assert first["fnmr"] == (scores[same] < first["threshold"]).mean()
    assert found["known_pair_thresholds"][2]["threshold"] is None
    low, high = found["known_intervals"]["auc"]
    assert low < metrics.auc(scores, same) < high
    assert found["known_draws"]["seeds"] == [3, 4, 5]
    assert found["known_draws"]["auc"]["least"] <= metrics.auc(scores, same) <= found["known_draws"]["auc"]["most"]
    hard = found["known_hardest"]
    assert hard["one_person"][0]["cosine"] == round(scores[same].min(), 6)
    assert hard["two_people"][0]["cosine"] == round(scores[~same].max(), 6)
    assert len(hard["two_people"]) == 2
    k = int(np.flatnonzero(whole)[np.flatnonzero(~same)[scores[~same].argmax()]])
    assert {hard["two_people"][0]["a"], hard["two_people"][0]["b"]} == {
        index.name(int(drawn.left[k])), index.name(int(drawn.right[k]))
    }  # fmt: skip
    errors = found["known_groups"]["errors"]
    assert [(e["group"], e["people"], e["pictures"]) for e in errors] == [("0", 6, 60), ("1", 6, 60)]
    assert all(e["genuine"] > 200 and e["impostors"] > 200 for e in errors)  # drawn inside of each group
    assert found["known_groups"]["threshold"]["fmr"] == 0.01


def test_a_list_of_pairs_is_taken_as_it_is(index: FaceIndex) -> None:
    given = PairSet.random(index, 700, 2, seed=0)
    found = exam.verify_in_full(embeddings_of, index, given, Questions(groups="odd"), drawn=False)
    assert "draws" not in found and "hardest" not in found
    odd = index.labels % 2 == 1
    readable = (given.left != 7) & (given.right != 7)
    for error, side in zip(found["groups"]["errors"], (~odd, odd), strict=True):
        inside = side[given.left] & side[given.right] & readable
        assert error["genuine"] == (inside & given.same).sum()
        assert error["impostors"] == (inside & ~given.same).sum()


def test_groups_need_a_threshold(index: FaceIndex) -> None:
    few = PairSet.random(index, 100, 2, seed=0)
    with pytest.raises(ValueError, match="groups need one threshold for all of them: 50 pairs of two people"):
        exam.verify_in_full(embeddings_of, index, few, Questions(groups="odd"), drawn=True)
    mates = PairSet(few.left[few.same], few.right[few.same], few.same[few.same], few.folds[few.same])
    assert exam.verify_in_full(embeddings_of, index, mates, Questions(), drawn=True) == {}


def test_probes_are_looked_for_in_a_gallery_by_their_names(index: FaceIndex, tmp_path: Path) -> None:
    gallery = index.select(np.flatnonzero((np.arange(120) < 60) & (index.labels < 8)))
    probes = index.select(np.flatnonzero(np.arange(120) >= 50))
    labels = probes.labels.copy()
    labels[-1] = -1
    probes = dataclasses.replace(probes, labels=labels)
    found = exam.identify(remembering(embeddings_of_rows(index)), probes, gallery, "mean")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["gallery_people"], found["gallery_pictures"]) == (8, 39)  # row 7 cannot be read
    copies = int(((np.arange(50, 60) % PEOPLE) < 8).sum())
    assert (found["left_out_copies"], found["left_out_nameless"]) == (copies, 1)
    assert found["known_probes"] + found["strangers_probes"] == 70 - copies - 1
    assert found["strangers"] == 4
    assert found["cmc"][0] == found["rank1"] > 0.5
    assert [t["fpir"] for t in found["naming_thresholds"]] == [0.1, 0.05, 0.01, 0.001]
    assert found["naming_thresholds"][0]["threshold"] is None  # 25 pictures of strangers
    assert found["det"][-1]["fpir"] == 1
    other = dataclasses.replace(gallery, labels=np.full(len(gallery), -1, np.int32))
    with pytest.raises(ValueError, match="0 of 40 pictures of the gallery have a name"):
        exam.identify(embeddings_of_rows(index), probes, other, "mean")


def embeddings_of_rows(index: FaceIndex) -> Embed:
    """As `embeddings_of` has them, for selections of an index."""
    embeddings, seen = embeddings_of(index)
    places = {bytes(path): k for k, path in enumerate(index.paths)}

    def embed(part: FaceIndex) -> tuple[Tensor, Tensor]:
        rows = torch.tensor([places[bytes(path)] for path in part.paths])
        return embeddings[rows], seen[rows]

    return embed


def test_templates_are_verified(index: FaceIndex) -> None:
    # Two templates a person, of five pictures each.
    members = np.arange(120)
    templates = (index.labels * 2 + (members >= 60)).astype(np.int64)
    left, right = np.triu_indices(24, 1)
    asked = TemplateSet(
        index, members, templates, members, tuple(f"t{k}" for k in range(24)), np.arange(24) // 2,
        PairSet.of(left, right, left // 2 == right // 2),
    )  # fmt: skip
    found = exam.verify_templates(embeddings_of, asked, False, 1)
    single = exam.verify_in_full(
        embeddings_of, index, PairSet.random(index, 800, 4, seed=3), Questions(draws=1), drawn=True
    )
    assert found["pairs"] == 276 and found["templates"] == 24 and found["unreadable_templates"] == 0
    assert found["eer"] < single["eer"]  # five pictures say more than one
    assert found["hardest"]["two_people"][0]["a"].startswith("t")
    assert exam.verify_templates(embeddings_of, asked, True, 0)["auc"] > 0.9


def test_an_index_is_embedded_once(index: FaceIndex) -> None:
    asked = []

    def embed(part: FaceIndex) -> tuple[Tensor, Tensor]:
        asked.append(part)
        return embeddings_of(part)

    again = remembering(embed)
    half = index.select(np.arange(60))
    assert again(index)[0] is again(index)[0]
    assert len(again(half)[0]) == 60
    assert [len(part) for part in asked] == [120, 60]


def test_lines_say_what_the_json_says(index: FaceIndex) -> None:
    questions = Questions(draws=2, groups="odd", hardest=1)
    found = exam.verify_in_full(embeddings_of, index, PairSet.random(index, 800, 4), questions, drawn=True)
    lines = list(exam.lines({"auc": 0.5, "overlap": "nothing", **found}))
    text = "\n".join(lines)
    assert lines[0] == "auc      0.5" and lines[1] == "overlap  nothing"
    assert "FMR 0.001: " in text and "3000 are needed" in text
    assert f"threshold {found['pair_thresholds'][0]['threshold']:.4f}" in text and "few errors, so roughly" in text
    assert "auc over 2 draws of pairs: " in text
    assert "  odd 1 (60 pictures): FMR " in text
    assert f"two people: {found['hardest']['two_people'][0]['cosine']:.3f}" in text
    named = exam.identify(
        embeddings_of_rows(index), index.select(np.arange(60, 120)), index.select(np.arange(24)), "max"
    )
    assert "found among the first 1, 5, 20: " in "\n".join(exam.lines(named))
