"""Batches of features that were computed once: the sampler's rows on every rank, and none that could not be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from facefast.data.cached import CachedLoader
from facefast.data.sampler import BalancedSampler, EpochSampler
from facefast.runtime.process import Runtime, World

RUN = Runtime(World(), torch.device("cpu"))


@pytest.mark.parametrize("world", [1, 2])
def test_cached_batches_are_the_samplers_rows_on_every_rank_and_from_any_step(world: int) -> None:
    embeddings, labels = torch.randn(10, 4), np.arange(10, dtype=np.int32) % 3
    embeddings[7] = torch.nan  # its picture could not be read: it counts for nothing, like padding
    sampler = EpochSampler(np.arange(10), 4, seed=5)
    runs = [Runtime(World(rank, world, rank, world), torch.device("cpu")) for rank in range(world)]
    for run in runs:
        with CachedLoader(embeddings, labels, sampler, run) as loader:
            loader.set_epoch(2, 1)
            batches = list(loader)
            assert list(itertools.islice(loader, 1))[0].rows.tolist() == batches[0].rows.tolist()  # again from there
        assert len(batches) == 2
        for step, batch in enumerate(batches, start=1):
            rows = sampler.local(2, step, run.world.rank, world)
            rows = np.where(rows == 7, -1, rows)
            assert batch.rows.tolist() == rows.tolist()
            assert batch.images.isfinite().all()
            for place, row in enumerate(rows.tolist()):
                assert batch.labels[place] == (-100 if row < 0 else labels[row])
                assert row < 0 or torch.equal(batch.images[place], embeddings[row])
    assert (batches[-1].rows < 0).any()  # ten rows do not fill three batches of four


def test_epochs_follow_each_other_as_the_sampler_has_them_and_end_where_it_ends() -> None:
    labels = np.arange(12, dtype=np.int32) % 3
    sampler = BalancedSampler(np.arange(12), labels, 6, seed=1)
    loader = CachedLoader(torch.randn(12, 4), labels, sampler, RUN)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append([batch.rows.tolist() for batch in loader])
        assert epochs[-1] == [sampler.batch(epoch, step).tolist() for step in (0, 1)]
    assert epochs[0] == epochs[2] != epochs[1]
    loader.set_epoch(0, 2)
    assert list(loader) == []


def test_one_number_that_is_none_makes_a_row_unreadable_and_its_slot_finite() -> None:
    embeddings = torch.randn(4, 3)
    embeddings[1, 2], embeddings[2, 0] = torch.nan, torch.inf
    loader = CachedLoader(embeddings, np.zeros(4, np.int32), EpochSampler(np.arange(4), 4, shuffle=False), RUN)
    (batch,) = loader
    assert batch.rows.tolist() == [0, -1, -1, 3]
    assert batch.labels.tolist() == [0, -100, -100, 0]
    assert batch.images.isfinite().all()  # what counts for nothing must not make a gradient NaN either


def test_a_rank_that_only_gets_padding_gets_a_batch_all_the_same() -> None:
    sampler = EpochSampler(np.arange(1), 4, shuffle=False)
    runs = [Runtime(World(rank, 4, rank, 4), RUN.device) for rank in range(4)]
    batches = [list(CachedLoader(torch.ones(1, 2), np.zeros(1, np.int32), sampler, run)) for run in runs]
    assert [len(batch) for batch in batches] == [1] * 4
    assert [batch[0].rows.tolist() for batch in batches] == [[0], [-1], [-1], [-1]]
    assert [batch[0].labels.tolist() for batch in batches] == [[0], [-100], [-100], [-100]]


def test_features_are_never_waited_for_and_what_was_handed_in_stays_as_it_is() -> None:
    embeddings = torch.tensor([[1.0, torch.nan], [2.0, 3.0]])
    before = embeddings.clone()
    with CachedLoader(embeddings, np.zeros(2, np.int32), EpochSampler(np.arange(2), 1), RUN) as loader:
        for batch in loader:
            batch.images.mul_(0)  # a step may do with its batch what it likes
        assert loader.wait_seconds == 0
    torch.testing.assert_close(embeddings, before, equal_nan=True)


def test_a_picture_without_a_name_has_the_label_that_losses_leave_out() -> None:
    sampler = EpochSampler(np.arange(4), 4, shuffle=False)
    with CachedLoader(torch.randn(4, 2), np.array([0, -1, 1, -1], np.int32), sampler, RUN) as loader:
        (batch,) = loader
    assert batch.labels.tolist() == [0, -100, 1, -100] and batch.rows.tolist() == [0, 1, 2, 3]
