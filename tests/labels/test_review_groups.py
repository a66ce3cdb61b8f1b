"""Answers about groups of pictures stay with the pictures, whatever number a group has, and with whom it was merged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from facefast.data import FaceIndex
from facefast.data.corrections import read_label_lines
from facefast.labels.review.decisions import LOG, Decisions, summary
from facefast.labels.review.items import Review, label_review
from facefast.recipe import Photographs
from tests.support.reviews import draw, grouped


def clustered(folder: Path, *groups: tuple[str, str, int], known: tuple[str, ...] = ()) -> Decisions:
    """A review of groups, each of somebody's first pictures: who, the name of the group, and how many."""
    paths = [f"{who}-{number}.jpg".encode() for who, _, count in groups for number in range(count)]
    names = [name for _, name, count in groups for _ in range(count)]
    rows = [
        np.eye(len(groups), 8, dtype=np.float32)[place] for place, each in enumerate(groups) for _ in range(each[2])
    ]
    index = FaceIndex.build("photos", paths, None, known)
    label_review(index, np.stack(rows), names, np.ones(len(rows), np.float32), Photographs("photos")).save(folder)
    return Decisions(Review.load(folder), folder)


def answer(decisions: Decisions, person: str, action: str, to: str = "") -> None:
    """By the name of the group: the largest comes first in a review."""
    decisions.decide([item.person for item in decisions.review.items].index(person), action, to)


def test_answers_do_not_go_to_other_people_where_clusters_are_numbered_anew(tmp_path: Path) -> None:
    decisions = clustered(tmp_path, ("ann", "cluster-0001", 5), ("bo", "cluster-0002", 3))
    answer(decisions, "cluster-0001", "move", "Ann")
    answer(decisions, "cluster-0002", "move", "Bo")
    again = clustered(tmp_path, ("bo", "cluster-0001", 9), ("ann", "cluster-0002", 5))
    assert not again.current and again.foreign == 2
    assert "2 earlier answers are about findings that are gone" in summary(again)
    again.write_result(last=True)
    assert {line.identity for line in read_label_lines(again.result)} == {"cluster-0001", "cluster-0002"}
    same = clustered(tmp_path, ("bo", "cluster-0002", 3), ("ann", "cluster-0001", 5))  # the same ones, in any order
    assert same.names() == {"cluster-0001": "Ann", "cluster-0002": "Bo"} and not same.foreign


@pytest.mark.parametrize("action", ["merge", "move"])
def test_an_answer_is_not_about_another_group_that_has_the_name_of_the_one_it_was_about(
    tmp_path: Path, action: str
) -> None:
    ann, bo = ("ann", "cluster-0001", 5), ("bo", "cluster-0002", 3)
    answer(clustered(tmp_path, ann, bo), "cluster-0001", action, "cluster-0002")
    assert clustered(tmp_path, ann, bo).names()["cluster-0001"] == "cluster-0002"
    again = clustered(tmp_path, ann, ("cy", "cluster-0002", 3))
    assert not again.current and again.foreign == 1
    assert again.names() == {"cluster-0001": "cluster-0001", "cluster-0002": "cluster-0002"}


def test_a_known_person_is_the_same_whichever_pictures_are_found_of_them(tmp_path: Path) -> None:
    bo = ("bo", "cluster-0001", 5)
    answer(clustered(tmp_path, bo, ("ann", "Ann", 2), known=("Ann",)), "cluster-0001", "merge", "Ann")
    assert clustered(tmp_path, bo, ("ann", "Ann", 3), known=("Ann",)).names()["cluster-0001"] == "Ann"


def test_a_review_that_was_saved_without_members_goes_on_with_its_answers(tmp_path: Path) -> None:
    grouped(draw(tmp_path / "photos", ("ann", "bo"), pictures=2)).save(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "review.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        assert line.pop("members") == ""
    (tmp_path / "review.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    review = Review.load(tmp_path)
    first = hashlib.blake2b(b"group\0\0cluster-0001\0", digest_size=12).hexdigest()  # as it was then
    (tmp_path / LOG).write_text(json.dumps({"item": first, "action": "move", "to": "Ann"}) + "\n")
    assert Decisions(review, tmp_path).names()["cluster-0001"] == "Ann"


def test_who_is_merged_with_a_name_that_was_given_follows_when_it_is_given_anew(tmp_path: Path) -> None:
    groups = [("a", "cluster-0001", 5), ("b", "cluster-0002", 4), ("c", "cluster-0003", 3)]
    decisions = clustered(tmp_path, *groups)
    answer(decisions, "cluster-0001", "move", "Anna")
    answer(decisions, "cluster-0002", "merge", "anna")
    answer(decisions, "cluster-0003", "merge", "cluster-0002")
    assert set(decisions.names().values()) == {"Anna"}
    answer(decisions, "cluster-0001", "move", "Anna Maria")
    assert set(decisions.names().values()) == {"Anna Maria"}
    assert clustered(tmp_path, *groups).names() == decisions.names()
    assert decisions.undo() == 0 and set(decisions.names().values()) == {"Anna"}


def test_groups_merged_in_a_circle_keep_a_name_that_was_given(tmp_path: Path) -> None:
    decisions = clustered(tmp_path, ("a", "cluster-0001", 5), ("b", "cluster-0002", 4))
    answer(decisions, "cluster-0001", "move", "Anna")
    answer(decisions, "cluster-0002", "merge", "Anna")
    answer(decisions, "cluster-0001", "merge", "cluster-0002")
    assert set(decisions.names().values()) == {"Anna"}
