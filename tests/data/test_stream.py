"""Batches across the ends of epochs: those of one epoch after the other, read ahead, and not one too many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facefast.data import work as work_module
from facefast.data.augment import draw
from facefast.data.cached import CachedLoader
from facefast.data.index import FaceIndex
from facefast.data.loader import AHEAD, BadDataError, Batch, Loader, make_loader
from facefast.data.sampler import EpochSampler, Parts, Sampler
from facefast.recipe import AugmentSpec, ImageSpec
from facefast.runtime.process import Runtime, World
from tests.support.pictures import encode, garbled_png, make_index, smooth_picture

IMAGE = ImageSpec(24)
AUGMENT = AugmentSpec(crop=0.3, flip=0.5, rotation=10)
NUMBER, BATCH, STEPS = 21, 4, 6
"""Pictures, pictures of a batch, batches of an epoch; the last of them is padded."""
Place = tuple[int, int]


@pytest.fixture
def index(tmp_path: Path) -> FaceIndex:
    names = [f"{i:03}.jpg" for i in range(NUMBER)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encode(smooth_picture(40, 48, i)))
    return make_index(tmp_path, names, (48, 40))


def open_loader(index: FaceIndex, world: int = 1, rank: int = 0, **options: Any) -> Loader:
    settings: dict[str, Any] = {"sampler": EpochSampler(np.arange(len(index)), BATCH, 1)}
    settings |= {"augment": AUGMENT, "seed": 5, "threads": 2, "world": world, "rank": rank} | options
    return make_loader(index, IMAGE, **settings)


def epochs(index: FaceIndex, start: Place, until: Place, **options: Any) -> list[tuple[int, int, Batch]]:
    """What `stream` is to give, each epoch read by a loader of its own that looks no further."""
    found = []
    for epoch in range(start[0], until[0] + 1):
        with open_loader(index, **options) as loader:
            loader.set_epoch(epoch)
            found += [(epoch, step, batch) for step, batch in enumerate(loader)]
    return [each for each in found if start <= each[:2] < until]


def assert_same(ours: list[tuple[int, int, Batch]], theirs: list[tuple[int, int, Batch]]) -> None:
    assert [each[:2] for each in ours] == [each[:2] for each in theirs] and ours
    for (_, _, one), (_, _, other) in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


RANGES = {
    "whole epochs": ((0, 0), (3, 0)),
    "from the last batch of an epoch": ((1, STEPS - 1), (2, 2)),
    "from behind the last batch of an epoch": ((1, STEPS), (2, 2)),
    "from the first batch of an epoch": ((2, 0), (3, 1)),
    "within one epoch": ((1, 1), (1, 4)),
    "a phase that ends inside an epoch": ((0, 4), (2, 3)),
}


@pytest.mark.parametrize("decoder", ["dali", "oracle"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", RANGES)
def test_rows_and_pixels_are_those_of_epochs_read_one_by_one(
    index: FaceIndex, name: str, world: int, decoder: str
) -> None:
    start, until = RANGES[name]
    for rank in range(world):
        options: dict[str, Any] = {"world": world, "rank": rank, "decoder": decoder}
        with open_loader(index, **options) as loader:
            assert_same(list(loader.stream(*start, until=until)), epochs(index, start, until, **options))


def test_epochs_of_a_single_batch_are_read_several_ahead(index: FaceIndex) -> None:
    few = index.select(np.arange(3))
    with open_loader(few) as loader:
        assert_same(list(loader.stream(0, 0, until=(12, 0))), epochs(few, (0, 0), (12, 0)))


def test_batches_taken_in_parts_go_on_from_epoch_to_epoch(index: FaceIndex) -> None:
    whole = EpochSampler(np.arange(NUMBER), 2 * BATCH, 1)
    sampler: Sampler = Parts(whole, 1, 3)
    with open_loader(index, sampler=sampler) as loader:
        ours = list(loader.stream(0, 4, until=(2, 1)))
        assert len(ours) == 2 * sampler.steps_per_epoch - 4 + 1
        assert_same(ours, epochs(index, (0, 4), (2, 1), sampler=sampler))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """The epochs of the batches read so far, in this order."""
    seen: list[int] = []

    def noted(index: FaceIndex, rows: Any, image: ImageSpec, augment: Any, seed: int, epoch: int, *rest: Any) -> Any:
        seen.append(epoch)
        return draw(index, rows, image, augment, seed, epoch, *rest)

    monkeypatch.setattr(work_module, "draw", noted)
    yield lambda: list(seen)


def test_the_next_epoch_is_read_before_this_one_is_used_up(index: FaceIndex, read: Callable[[], list[int]]) -> None:
    with open_loader(index, sampler=EpochSampler(np.arange(20), BATCH, 1)) as loader:  # no padding: one draw a batch
        batches = loader.stream(0, 0, until=(2, 0))
        for _ in range(4):
            next(batches)
        loader._reader.submit(lambda: None).result()  # what was sent to the reading thread is read
        assert read().count(0) == 5 and read().count(1) >= AHEAD - 1


@pytest.mark.parametrize("until", [(1, 0), (1, 2)])
def test_nothing_is_read_from_where_a_phase_ends(index: FaceIndex, read: Callable[[], list[int]], until: Place) -> None:
    sampler = EpochSampler(np.arange(20), BATCH, 1)
    with open_loader(index, sampler=sampler) as loader:
        assert len(list(loader.stream(0, 0, until=until))) == 5 + until[1]
    assert read() == [0] * 5 + [1] * until[1]


def test_one_pass_reads_nothing_of_another_epoch(index: FaceIndex, read: Callable[[], list[int]]) -> None:
    with make_loader(index, IMAGE, batch_size=7, threads=1) as loader:
        assert len(list(loader)) == 3
    assert read() == [0] * 3


@pytest.mark.parametrize("place", [STEPS - 1, STEPS])
def test_a_picture_that_breaks_the_decoder_at_an_epochs_end_costs_its_row_in_both(
    index: FaceIndex, place: int, capfd: pytest.CaptureFixture[str]
) -> None:
    sampler = EpochSampler(np.arange(NUMBER), BATCH, 1)
    victim = int(sampler.batch(*divmod(place, STEPS))[0])  # of the last batch of epoch 0, or of the first of epoch 1
    Path(index.path(victim)).write_bytes(garbled_png())
    with open_loader(index) as loader:
        ours = list(loader.stream(0, 0, until=(3, 0)))
        assert set(loader.bad) == {victim}
    assert_same(ours, epochs(index, (0, 0), (3, 0)))
    for epoch in range(3):
        rows = torch.cat([batch.rows for found, _, batch in ours if found == epoch])
        assert sorted(rows[rows >= 0].tolist()) == [row for row in range(NUMBER) if row != victim]
    with open_loader(index) as loader:  # a run that goes on inside fills empty slots alike
        assert_same(list(loader.stream(1, 2, until=(3, 0))), ours[STEPS + 2 :])
    capfd.readouterr()


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.4, 0.55, 0.6])
def test_the_budget_is_spent_batch_by_batch_whatever_was_read_ahead(index: FaceIndex, fraction: float) -> None:
    for row in range(12):
        Path(index.path(row)).unlink()

    def outcome(ahead: bool) -> tuple[int, str]:
        """Batches handed out in three epochs, and the error that ended them."""
        number = 0
        with open_loader(index, max_bad_fraction=fraction) as loader:
            try:
                for epoch in range(3):
                    loader.set_epoch(epoch)
                    for _ in loader.stream(0, 0, until=(3, 0)) if ahead else loader:
                        number += 1
                    if ahead:
                        break
            except BadDataError as error:
                return number, str(error)
        return number, ""

    found = outcome(ahead=True)
    assert found == outcome(ahead=False)
    assert (found[1] == "") == (fraction == 0.6)  # 12 of 21 are 0.57


def test_a_stream_that_lost_its_place_says_so_and_a_place_must_exist(index: FaceIndex) -> None:
    with open_loader(index) as loader:
        old = loader.stream(0, 0, until=(2, 0))
        next(old)
        new = loader.stream(1, 3, until=(2, 1))
        assert next(new)[:2] == (1, 3)
        with pytest.raises(ValueError, match="taken this one's place"):
            next(old)
        with pytest.raises(ValueError, match=f"epoch 0, step {STEPS + 1} does not exist"):
            next(loader.stream(0, STEPS + 1, until=(2, 0)))
        with pytest.raises(ValueError, match="epoch -1, step 0 does not exist"):
            next(loader.stream(0, 0, until=(-1, 0)))
        assert list(loader.stream(1, 0, until=(1, 0))) == []


def test_closing_in_the_middle_ends_the_reading_thread(index: FaceIndex) -> None:
    with open_loader(index) as loader:
        next(loader.stream(0, STEPS - 1, until=(5, 0)))
        assert any("facefast-loader" in thread.name for thread in threading.enumerate())
    assert not any("facefast-loader" in thread.name for thread in threading.enumerate())


def test_features_that_were_computed_once_go_on_from_epoch_to_epoch_too() -> None:
    sampler = EpochSampler(np.arange(10), BATCH, 1)
    run = Runtime(World(), torch.device("cpu"))
    loader = CachedLoader(torch.randn(10, 3), np.zeros(10, np.int32), sampler, run)
    found = [(epoch, step, batch.rows.tolist()) for epoch, step, batch in loader.stream(0, 2, until=(2, 1))]
    places = [(0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert found == [(*place, sampler.batch(*place).tolist()) for place in places]
