"""What a source model does untrained, on points whose classes are known."""

from __future__ import annotations

import pytest
import torch

from facefast.evaluation.baselines import (
    BASELINES,
    LabelledEmbeddings,
    baseline_accuracies,
    class_means,
    linear_probe,
    nearest_neighbours,
)
from facefast.models.heads import unit


def test_clear_classes_are_told_by_every_baseline_and_unlabelled_rows_are_not_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=generator)
    labels = torch.arange(60) % 5
    points = centres[labels] + 0.3 * torch.randn(60, 16, generator=generator)
    poisoned = torch.cat([points, -points[:10]])  # would pull every class away from its people
    known = torch.cat([labels, torch.full((10,), -1)])
    found = baseline_accuracies(LabelledEmbeddings(7 * poisoned, known, 5), 3 * points, labels)
    assert found == dict.fromkeys(BASELINES, 1.0)


def test_neighbours_see_what_means_cannot() -> None:
    # A person with two looks: the mean of both is nobody.
    looks = torch.eye(4)
    train = unit(
        torch.cat([looks[0].repeat(3, 1), looks[1].repeat(3, 1), (looks[0] + looks[1] + looks[2]).repeat(6, 1)])
    )
    labels = torch.tensor([0] * 6 + [1] * 6)
    test = unit(torch.stack([looks[0], looks[1], looks[0] + looks[1] + looks[2]]))
    assert nearest_neighbours(train, labels, test, 2).tolist() == [0, 0, 1]


def test_the_probe_separates_what_is_linearly_separable_only_with_weights() -> None:
    # The first coordinate dwarfs the second, which alone tells the classes: means point the same way.
    signs = torch.tensor([1.0, -1.0]).repeat(40)
    spread = 1 + torch.rand(80, generator=torch.Generator().manual_seed(1))
    train = unit(torch.stack([10 * spread, signs], dim=1))
    labels = (signs < 0).long()
    weights = linear_probe(train, labels, 2)
    assert torch.equal((train @ weights.T).argmax(1), labels)
    # They are farther apart than the means, which a margin would not have let stand.
    assert weights[0] @ weights[1] < 0.99 * (class_means(train, labels, 2)[0] @ class_means(train, labels, 2)[1])
    assert not train.requires_grad


def test_class_means_are_those_of_directions_and_skip_rows_without_label() -> None:
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 100.0], [0.0, 5.0], [7.0, 7.0], [1.0, 0.0]])
    means = class_means(embeddings, torch.tensor([0, 0, 1, -1, 0]), 2)
    expected = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(means, expected / expected.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="1 of 3 classes have no readable picture"):
        class_means(embeddings, torch.tensor([0, 0, 1, -1, 0]), 3)
