"""Small batches that go through a decoder together: none is lost, mixed up, or joined where it is large."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from facefast.data.augment import Draw
from facefast.data.together import MOST_PIXELS, Encoded, Source, Together


def batch(name: int, length: int, side: int = 10) -> Encoded:
    rows = np.full(length, name)
    draw = Draw(
        np.full((length, 2, 3), name, np.float32), np.zeros((length, 3, 4), np.float32), np.zeros((length, 4), np.int32)
    )
    return Encoded([np.array([row], np.uint8) for row in rows], draw, np.full((length, 2), side, np.int32))


def source(batches: Sequence[Encoded]) -> Source:
    left = iter(batches)
    return lambda: next(left)


def runs(together: Together) -> list[list[int]]:
    """The pictures of each run, by the name of their batch, to the source's end."""
    found: list[list[int]] = []
    while True:
        try:
            taken = together()
        except StopIteration:
            return found
        assert taken.draw.matrix[:, 0, 0].tolist() == [int(data[0]) for data in taken.data]
        assert len(taken.sizes) == len(taken.data)
        found.append([int(data[0]) for data in taken.data])


def test_batches_are_joined_as_far_as_there_is_room_and_every_one_comes() -> None:
    batches = [batch(1, 2), batch(2, 2), batch(3, 2), batch(4, 1), batch(5, 3), batch(6, 9), batch(7, 1)]
    assert runs(Together(source(batches), 5)) == [[1, 1, 2, 2], [3, 3, 4], [5, 5, 5], [6] * 9, [7]]


def test_a_source_that_has_ended_is_asked_again() -> None:
    together = Together(source([batch(1, 2)]), 8)
    assert runs(together) == [[1, 1]] and runs(together) == []


@pytest.mark.parametrize("most", [0, 1, 3])
def test_without_room_for_two_each_batch_is_a_run_of_its_own(most: int) -> None:
    assert runs(Together(source([batch(1, 2), batch(2, 2)]), most)) == [[1, 1], [2, 2]]


def test_large_pictures_are_not_joined() -> None:
    side = int((MOST_PIXELS / 2) ** 0.5) + 1
    assert runs(Together(source([batch(1, 1, side), batch(2, 1, side)]), 64)) == [[1], [2]]
    assert runs(Together(source([batch(1, 1), batch(2, 1, side * 2), batch(3, 1)]), 64)) == [[1], [2], [3]]


def test_images_come_apart_as_their_batches_went_in() -> None:
    together = Together(source([batch(1, 2), batch(2, 1), batch(3, 4), batch(4, 2)]), 5)
    waiting = [together(), together()]  # a decoder has several runs under way

    def run() -> torch.Tensor:
        return torch.tensor([int(data[0]) for data in waiting.pop(0).data])

    assert [together.images(run).tolist() for _ in range(3)] == [[1, 1], [2], [3, 3, 3, 3]]
    waiting.append(together())
    assert together.images(run).tolist() == [4, 4]


def test_what_was_under_way_is_given_up_with_its_source() -> None:
    together = Together(source([batch(1, 2), batch(2, 4), batch(3, 1)]), 5)
    taken = together()  # the second is asked for, and waits
    together.reset(source([batch(9, 1)]))
    assert len(taken.data) == 2 and runs(together) == [[9]]
    together.reset(source([batch(8, 1)]))
    together()
    assert together.images(lambda: torch.tensor([8])).tolist() == [8]
