"""Terms beside the focal loss, against loops that say what they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from facefast.training.losses import (
    batch_hard_triplet,
    effective_weights,
    matched_statistics,
    mix,
    supervised_contrastive,
)

LABELS = torch.tensor([0, 1, 0, 2, 1, -100, 0, 3, -100])


def embeddings(rows: int = 9, size: int = 6, seed: int = 0) -> Tensor:
    draw = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (5 * draw).requires_grad_()


def unit(x: Tensor) -> Tensor:
    norms: Tensor = x.norm(dim=1, keepdim=True)
    return x / norms


def test_effective_numbers_weigh_rare_classes_more_and_pictures_1_on_average() -> None:
    counts = torch.tensor([1, 10, 100, 0])
    weights = effective_weights(counts, 0.9)
    expected = np.array([(1 - 0.9) / (1 - 0.9**n) for n in (1, 10, 100)])
    np.testing.assert_allclose(weights[:3] / weights[0], expected / expected[0], rtol=1e-6)
    assert weights[3] == 0
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)
    assert effective_weights(counts, 0.0)[:3].tolist() == pytest.approx([1, 1, 1])
    nearly = effective_weights(counts, 0.999999)
    assert float(nearly[0] / nearly[1]) == pytest.approx(10, rel=1e-3)  # towards the inverse of the number


def test_the_hardest_triplet_of_each_row_counts() -> None:
    x = embeddings()
    vectors, losses = unit(x.detach()), []
    for a in range(9):
        if LABELS[a] < 0:
            continue
        same = [float((vectors[a] - vectors[p]).norm()) for p in range(9) if p != a and LABELS[p] == LABELS[a]]
        other = [float((vectors[a] - vectors[n]).norm()) for n in range(9) if LABELS[n] >= 0 and LABELS[n] != LABELS[a]]
        if same and other:
            losses.append(max(0.0, 0.3 + max(same) - min(other)))
    found = batch_hard_triplet(x, LABELS, 0.3)
    assert len(losses) == 5  # the persons seen once have no pair
    assert float(found.detach()) == pytest.approx(np.mean(losses), rel=1e-6)
    assert torch.autograd.gradcheck(lambda t: batch_hard_triplet(t, LABELS, 0.3), (x,))


def test_contrasts_are_the_mean_over_the_pictures_of_the_same_person() -> None:
    x = embeddings()
    scores, losses = unit(x.detach()) @ unit(x.detach()).T / 0.2, []
    known = [k for k in range(9) if LABELS[k] >= 0]
    for a in known:
        others = [k for k in known if k != a]
        log_sum = math.log(sum(math.exp(float(scores[a, k])) for k in others))
        same = [log_sum - float(scores[a, k]) for k in others if LABELS[k] == LABELS[a]]
        if same:
            losses.append(np.mean(same))
    assert float(supervised_contrastive(x, LABELS, 0.2).detach()) == pytest.approx(np.mean(losses), rel=1e-6)
    assert torch.autograd.gradcheck(lambda t: supervised_contrastive(t, LABELS, 0.2), (x,))


@pytest.mark.parametrize("loss", [batch_hard_triplet, supervised_contrastive])
def test_a_batch_without_pairs_costs_nothing_and_breaks_nothing(loss: Callable[..., Tensor]) -> None:
    for labels in (torch.arange(9), torch.full((9,), -100), torch.zeros(9, dtype=torch.long)):
        x = embeddings()
        value = loss(x, labels, 0.3)
        value.backward()
        assert x.grad is not None and torch.isfinite(x.grad).all()
        if labels.unique().numel() != 1 or labels[0] < 0:
            assert value == 0


def test_equal_embeddings_have_a_finite_gradient() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(x, torch.tensor([0, 0, 1, 1]), 0.3).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_coral_is_the_distance_of_the_covariances() -> None:
    x = embeddings(12)
    target = torch.arange(12) < 5
    source = torch.arange(12) >= 7  # two rows belong to neither
    vectors = (unit(x) * math.sqrt(6)).detach().numpy()
    difference = np.cov(vectors[:5].T) - np.cov(vectors[7:].T)
    found = matched_statistics(x, target, source, "coral")
    assert float(found.detach()) == pytest.approx((difference**2).sum() / (4 * 36), rel=1e-6)
    assert torch.autograd.gradcheck(lambda t: matched_statistics(t, target, source, "coral"), (x,))


@pytest.mark.parametrize("kind", ["coral", "mmd"])
def test_descending_the_distance_brings_the_domains_together(kind: Literal["coral", "mmd"]) -> None:
    x = embeddings(64)
    with torch.no_grad():
        x[32:, 0] += 20  # the target domain looks elsewhere
    target = torch.arange(64) >= 32
    before = matched_statistics(x, target, ~target, kind).detach()
    optimizer = torch.optim.Adam([x], lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        matched_statistics(x, target, ~target, kind).backward()
        optimizer.step()
    assert float(matched_statistics(x, target, ~target, kind).detach()) < float(before) / 3
    same = matched_statistics(torch.cat([x[:32], x[:32]]), target, ~target, kind)
    assert abs(float(same.detach())) < 1e-9
    alone = matched_statistics(x, target & (torch.arange(64) < 33), ~target, kind)  # one row of the target domain
    assert alone == 0


def test_mixup_mixes_whole_pictures_and_cutmix_exchanges_a_rectangle() -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 16).contiguous()
    torch.manual_seed(3)
    mixed = mix(images, 0.4, 0.0)
    expected = mixed.weight * images + (1 - mixed.weight) * images[mixed.partner]
    torch.testing.assert_close(mixed.images, expected)
    for seed in range(20):
        torch.manual_seed(seed)
        cut = mix(images, 0.0, 1.0)
        own = (cut.images == images)[:, 0].float().mean((1, 2))
        moved = cut.partner != torch.arange(6)
        torch.testing.assert_close(own[moved], torch.full_like(own[moved], cut.weight))
        assert torch.equal(images, torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 20, 16))  # the batch stays
    torch.manual_seed(5)
    one = mix(images, 0.4, 0.4)
    torch.manual_seed(5)
    assert torch.equal(one.images, mix(images, 0.4, 0.4).images)  # a resume draws the same
