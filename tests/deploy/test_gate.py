"""The gate between a model and its int8 copy: what it compares, what it refuses, and how fast each of them is."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import PairSet
from facefast.deploy import gate as gates
from facefast.deploy.gate import Gate

Array = NDArray[np.float32]
PEOPLE = np.repeat(np.eye(4, dtype=np.float32), 4, 0)
"""Embeddings [16, 4] of four people with four pictures each."""
LEFT, RIGHT = np.triu_indices(16, 1)
PAIRS = PairSet.of(LEFT, RIGHT, LEFT // 4 == RIGHT // 4)


class Session:
    """Gives picture k, whose only number is k, the k-th embedding."""

    def __init__(self, embeddings: Array) -> None:
        self.embeddings = embeddings
        self.seen: list[int] = []

    def run(self, _: None, given: dict[str, Array]) -> list[Array]:
        rows = given["images"][:, 0].astype(int)
        self.seen += rows.tolist()
        return [self.embeddings[rows]]


def pictures(rows: NDArray[np.int64], size: int = 4) -> Iterator[tuple[Array, Tensor]]:
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield part[:, None].astype(np.float32), torch.from_numpy(part)


def made(cosine: float, after: float | None) -> Gate:
    """A gate that found an accuracy of 0.95 before and `after` afterwards; None has no pairs."""
    if after is None:
        return Gate(cosine, cosine, 100, None, None)
    return Gate(cosine, cosine, 100, *({"verification_accuracy": x, "pairs": 6000} for x in (0.95, after)))


def test_the_gate_refuses_lost_cosine_lost_verification_and_nan() -> None:
    made(0.98, 0.946).check(0.98, 0.005, "its parent")
    made(0.98, 0.99).check(0.98, 0.0, "its parent")  # better than before
    made(0.98, None).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="mean cosine 0.9790 .* at least 0.98 is asked for"):
        made(0.979, 0.95).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="accuracy 0.9440 after 0.9500 on 6000 pairs, a loss of at most 0.005"):
        made(0.99, 0.944).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="mean cosine nan"):
        made(float("nan"), 0.95).check(0.98, 0.005, "its parent")
    with pytest.raises(ValueError, match="verifies worse than its parent: accuracy nan"):
        made(0.99, float("nan")).check(0.98, 0.005, "its parent")


def test_a_refusal_names_the_other_model_and_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"than runs/first: .*; nothing was written. .*or lower --min-cosine"):
        made(0.5, None).check(0.98, 0.005, "runs/first")
    with pytest.raises(ValueError, match=r"than runs/first: .*; nothing was written. .*or raise --max-loss"):
        made(1.0, 0.5).check(0.98, 0.005, "runs/first")


def test_the_same_embeddings_lose_nothing() -> None:
    same = gates.compare(Session(PEOPLE), Session(PEOPLE), pictures(np.arange(16)), 16, PAIRS)
    assert (same.cosine_mean, same.cosine_p01, same.loss, same.photographs) == (1, 1, 0, 16)
    assert same.verification_before is not None and same.verification_before["pairs"] == len(PAIRS)


def test_a_model_that_mixes_people_up_loses_verification_accuracy() -> None:
    other = Session(PEOPLE[np.arange(16) % 4 * 4])
    mixed = gates.compare(Session(PEOPLE), other, pictures(np.arange(16)), 16, PAIRS)
    assert mixed.loss is not None and mixed.loss > 0.1
    with pytest.raises(ValueError, match="verifies worse"):
        mixed.check(-1, 0.005, "its parent")
    won = gates.compare(other, Session(PEOPLE), pictures(np.arange(16)), 16, PAIRS)
    assert won.loss == -mixed.loss  # the order of the two matters


def test_pictures_that_were_not_read_count_for_nothing() -> None:
    rows = np.array([1, 0, 5, 4, 8, 9, 12, 13, 15, 2])  # in any order; six are missing
    broken = PEOPLE.copy()
    broken[[3, 6, 7, 10, 11, 14]] = np.nan  # nobody asks for them
    one, two = Session(broken), Session(broken)
    found = gates.compare(one, two, pictures(rows, size=3), 16, PAIRS)
    assert (found.photographs, found.cosine_mean) == (10, 1)
    assert found.verification_after is not None and found.verification_after["pairs"] == 10 * 9 / 2
    assert one.seen == two.seen == rows.tolist()  # each picture once


def test_the_first_percentile_is_that_of_the_worst_pictures() -> None:
    people = np.tile(np.eye(2, dtype=np.float32)[:1], (200, 1))
    worse = people.copy()
    worse[:10] = [0, 1]
    found = gates.compare(Session(people), Session(worse), pictures(np.arange(200), size=32), 200, None)
    assert found.cosine_mean == pytest.approx(0.95)
    assert found.cosine_p01 == 0
    assert (found.verification_before, found.verification_after, found.loss) == (None, None, None)


def test_contenders_run_in_turn_and_the_median_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    calls: list[str] = []
    slow = iter([50.0, 60.0, 3.0, 2.0, 90.0, 2.0, 2.0])  # the first two warm up; one round is disturbed

    def first() -> None:
        calls.append("first")
        now[0] += next(slow)

    def second() -> None:
        calls.append("second")
        now[0] += 5.0

    assert gates.seconds_per_picture({"first": first, "second": second}, rounds=5) == {"first": 2.0, "second": 5.0}
    assert calls == ["first", "second"] * 7
