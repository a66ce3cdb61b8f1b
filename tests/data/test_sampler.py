"""The order of rows: exact, resumable, and the same at any world size."""

from typing import Literal

import numpy as np
import pytest

from facefast.data.sampler import BalancedSampler, EpochSampler, PKSampler, Sampler, make_sampler

Kind = Literal["epoch", "balanced", "pk"]
LABELS = np.repeat(np.arange(12), np.arange(1, 13))  # 78 rows: identity i has i + 1 pictures
ROWS = 1000 + np.arange(len(LABELS))
LABEL_OF = dict(zip(ROWS.tolist(), LABELS.tolist(), strict=True))


def make(kind: Kind, batch_size: int = 16, seed: int = 3) -> Sampler:
    return make_sampler(kind, LABELS, batch_size, seed, rows=ROWS, pictures_per_identity=4)


def epoch_of(sampler: Sampler, epoch: int) -> np.ndarray:
    return np.concatenate([sampler.batch(epoch, step) for step in range(sampler.steps_per_epoch)])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_row_comes_exactly_once_per_epoch_over_all_ranks(world: int) -> None:
    sampler = EpochSampler(ROWS, 16, seed=1)
    assert sampler.steps_per_epoch == 5
    parts = [sampler.local(2, step, rank, world) for step in range(sampler.steps_per_epoch) for rank in range(world)]
    everything = np.concatenate(parts)
    assert sorted(everything[everything >= 0]) == ROWS.tolist()
    assert (everything == -1).sum() == 5 * 16 - len(ROWS)


@pytest.mark.parametrize("kind", ["epoch", "balanced", "pk"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_batch_is_the_same_at_any_world_size(kind: Kind, world: int) -> None:
    sampler = make(kind)
    for step in range(sampler.steps_per_epoch):
        parts = np.stack([sampler.local(1, step, rank, world) for rank in range(world)], axis=1)
        np.testing.assert_array_equal(parts.reshape(-1), sampler.batch(1, step))


@pytest.mark.parametrize("kind", ["epoch", "balanced", "pk"])
def test_a_batch_depends_on_nothing_but_seed_epoch_and_step(kind: Kind) -> None:
    forward, resumed = make(kind), make(kind)
    tail = [resumed.batch(2, step) for step in (4, 3)]  # a new sampler, out of order
    epoch_of(forward, 1)
    np.testing.assert_array_equal(forward.batch(2, 4), tail[0])
    np.testing.assert_array_equal(forward.batch(2, 3), tail[1])


@pytest.mark.parametrize("kind", ["epoch", "balanced", "pk"])
def test_epochs_and_seeds_differ(kind: Kind) -> None:
    sampler = make(kind)
    assert (epoch_of(sampler, 0) != epoch_of(sampler, 1)).any()
    assert (epoch_of(sampler, 0) != epoch_of(make(kind, seed=4), 0)).any()


def test_without_shuffling_rows_come_as_they_are_and_the_tail_is_padded() -> None:
    sampler = EpochSampler(ROWS, 16, shuffle=False)
    np.testing.assert_array_equal(epoch_of(sampler, 5), [*ROWS, -1, -1])


def test_shuffling_reaches_every_place_with_every_row() -> None:
    sampler = EpochSampler(np.arange(8), 8, seed=0)
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), sampler.batch(epoch, 0)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 85.4  # 49 degrees of freedom: the 99.9 % point


def test_balanced_gives_every_identity_equally_often_and_its_pictures_in_turn() -> None:
    sampler = BalancedSampler(ROWS, LABELS, 24, seed=0)
    order = epoch_of(sampler, 0)
    assert len(order) == 4 * 24 and (order >= 0).all()
    labels = np.array([LABEL_OF[row] for row in order.tolist()])
    np.testing.assert_array_equal(np.bincount(labels), np.full(12, 8))
    for label in range(12):
        pictures = order[labels == label]
        assert len(set(pictures.tolist())) == min(8, label + 1)
    for start in range(0, len(order), 12):
        assert len(set(labels[start : start + 12].tolist())) == 12


def test_pk_batches_hold_p_identities_with_k_different_pictures_each() -> None:
    sampler = PKSampler(ROWS, LABELS, 20, seed=0, pictures_per_identity=4)
    for epoch in range(3):
        for step in range(sampler.steps_per_epoch):
            batch = sampler.batch(epoch, step).reshape(4, 5)  # [K, P]
            labels = np.vectorize(LABEL_OF.get)(batch)
            assert (labels == labels[0]).all()
            assert len(set(labels[0].tolist())) == 5
            for label, pictures in zip(labels[0].tolist(), batch.T.tolist(), strict=True):
                assert len(set(pictures)) == min(4, label + 1)


def test_pk_keeps_an_identity_on_one_rank_where_the_world_divides_p() -> None:
    sampler = PKSampler(ROWS, LABELS, 32, seed=0, pictures_per_identity=4)
    owners = [{LABEL_OF[row] for row in sampler.local(0, 0, rank, 4).tolist()} for rank in range(4)]
    assert [len(labels) for labels in owners] == [2, 2, 2, 2]
    assert len(set().union(*owners)) == 8


def test_pk_visits_all_identities_over_the_epochs() -> None:
    sampler = PKSampler(ROWS, LABELS, 20, seed=0, pictures_per_identity=4)
    seen = {LABEL_OF[row] for epoch in range(4) for row in epoch_of(sampler, epoch).tolist()}
    assert seen == set(range(12))


def test_errors_name_the_value_and_the_way_out() -> None:
    with pytest.raises(ValueError, match="global batch of 16 .* 3 processes"):
        make("epoch").local(0, 0, 0, 3)
    with pytest.raises(ValueError, match="rank is 2"):
        make("epoch").local(0, 0, 2, 2)
    with pytest.raises(ValueError, match="step is 5; an epoch has steps 0 to 4"):
        make("epoch").batch(0, 5)
    with pytest.raises(ValueError, match="at least one row"):
        EpochSampler(ROWS[:0], 16)
    with pytest.raises(ValueError, match="batch_size is 0"):
        EpochSampler(ROWS, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        EpochSampler(ROWS, 16, seed=-1)
    with pytest.raises(ValueError, match="must divide the global batch of 18"):
        make("pk", batch_size=18)
    with pytest.raises(ValueError, match="needs 16 identities, and there are 12; lower .* to 48"):
        make("pk", batch_size=64)
    with pytest.raises(ValueError, match="row 1003 has no identity"):
        BalancedSampler(ROWS[:5], np.array([0, 0, 1, -1, 1]), 4)
    with pytest.raises(ValueError, match="5 rows came with 4 labels"):
        BalancedSampler(ROWS[:5], np.zeros(4, int), 4)
    with pytest.raises(ValueError, match="it must be epoch, balanced or pk"):
        make("random")  # type: ignore[arg-type]
