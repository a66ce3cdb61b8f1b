"""The scatter of people's embeddings is that of the definition, and whitening makes it alike in every direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from facefast.training import whiten
from facefast.training.whiten import Scatter, added, whitening, within_scatter

PEOPLE, SIZE = 40, 12


def embeddings_of(seed: int = 0, rows: int = 400) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """[N, D] and labels [N], people in no order, each scattering mostly along the first numbers."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, PEOPLE, rows)
    centres = generator.normal(size=(PEOPLE, SIZE))
    spread = np.linspace(1.0, 0.1, SIZE)
    return torch.tensor(centres[labels] + spread * generator.normal(size=(rows, SIZE))).float(), labels


def defined(embeddings: torch.Tensor, labels: NDArray[np.int64]) -> tuple[NDArray[np.float64], int]:
    """Scatter and freedom as the textbook has them, one person after the other."""
    vectors = embeddings.double().numpy()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    total, freedom = np.zeros((SIZE, SIZE)), 0
    for person in np.unique(labels[labels >= 0]):
        own = vectors[labels == person]
        away = own - own.mean(0)
        total += away.T @ away
        freedom += len(own) - 1
    return total, freedom


@pytest.mark.parametrize("block", [3, 50, 8192])
def test_scatter_is_that_of_the_definition_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whiten, "BLOCK", block)
    embeddings, labels = embeddings_of()
    labels[labels == 3] = 7  # a person of more pictures than a block holds
    total, freedom = defined(embeddings, labels)
    found = within_scatter(embeddings, labels, np.zeros(PEOPLE, np.int64), 1)[0]
    np.testing.assert_allclose(found.within.numpy(), total, rtol=1e-5, atol=1e-6)
    assert found.freedom == freedom


def test_scatters_of_groups_of_people_add_up() -> None:
    embeddings, labels = embeddings_of()
    groups = np.arange(PEOPLE) % 3
    parts = within_scatter(embeddings, labels, groups, 3)
    whole = within_scatter(embeddings, labels, np.zeros(PEOPLE, np.int64), 1)[0]
    together = added(parts)
    torch.testing.assert_close(together.within, whole.within, rtol=1e-4, atol=1e-5)
    assert (together.freedom, together.people) == (whole.freedom, whole.people)
    for group, part in enumerate(parts):
        mine = np.where(groups[labels] == group, labels, -1)
        np.testing.assert_allclose(part.within.numpy(), defined(embeddings, mine)[0], rtol=1e-5, atol=1e-6)


def test_rows_without_a_name_or_with_broken_numbers_and_people_of_one_picture_count_for_nothing() -> None:
    embeddings, labels = embeddings_of()
    expected = defined(embeddings, labels)
    more = torch.cat([embeddings, torch.full((1, SIZE), torch.nan), torch.zeros(1, SIZE), torch.ones(2, SIZE)])
    names = np.concatenate([labels, [0, 1, -1, PEOPLE]])
    found = within_scatter(more, names, np.zeros(PEOPLE + 1, np.int64), 1)[0]
    np.testing.assert_allclose(found.within.numpy(), expected[0], rtol=1e-5, atol=1e-6)
    assert (found.freedom, found.people) == (expected[1], PEOPLE)


def test_length_of_embeddings_does_not_matter() -> None:
    embeddings, labels = embeddings_of()
    groups = np.zeros(PEOPLE, np.int64)
    lengths = torch.linspace(0.1, 9, len(embeddings))[:, None]
    found = within_scatter(embeddings * lengths, labels, groups, 1)[0]
    torch.testing.assert_close(
        found.within, within_scatter(embeddings, labels, groups, 1)[0].within, rtol=1e-4, atol=1e-5
    )


def test_whitened_people_scatter_alike_in_every_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    scatter = Scatter(100 * factor @ factor.T, 100, 10)
    matrix = whitening(scatter, 1e-9).matrix
    covariance = matrix @ (factor @ factor.T) @ matrix.T
    torch.testing.assert_close(
        covariance / covariance.diagonal().mean(), torch.eye(SIZE).double(), rtol=1e-5, atol=1e-5
    )


def test_shrinkage_of_one_changes_nothing_and_less_changes_more() -> None:
    scatter = within_scatter(*embeddings_of(), np.zeros(PEOPLE, np.int64), 1)[0]
    unchanged = torch.eye(SIZE).double()
    torch.testing.assert_close(whitening(scatter, 1.0).matrix, unchanged)
    away = [float((whitening(scatter, shrinkage).matrix - unchanged).norm()) for shrinkage in (0.9, 0.5, 0.1)]
    assert 0 < away[0] < away[1] < away[2]


def test_fewer_pictures_than_numbers_still_give_a_sound_map() -> None:
    embeddings, labels = embeddings_of(rows=10)
    labels = labels % 3
    scatter = within_scatter(embeddings, labels, np.zeros(3, np.int64), 1)[0]
    assert scatter.freedom < SIZE and scatter.spreads
    matrix = whitening(scatter, 0.3).matrix
    assert matrix.isfinite().all() and torch.linalg.cond(matrix) < 20


def test_copies_of_one_picture_do_not_spread() -> None:
    row = torch.randn(1, SIZE)
    scatter = within_scatter(row.repeat(6, 1), np.array([0, 0, 0, 1, 1, 1]), np.zeros(2, np.int64), 1)[0]
    assert not scatter.spreads
    nobody = within_scatter(row, np.array([0]), np.zeros(1, np.int64), 1)[0]
    assert not nobody.spreads and nobody.people == 0
