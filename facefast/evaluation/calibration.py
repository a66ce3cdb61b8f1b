"""Probabilities that mean what they say: one temperature for all logits, and how far off they are before and after."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

BINS = 15
"""Of the expected calibration error, as Guo et al. 2017 have them."""
LEAST, MOST = 0.01, 100.0
"""Temperatures; logits that differ in nothing, or are wrong more often than by chance, ask for ever higher ones."""
ROWS = 1024
"""Logits in double precision at a time."""


class Calibration(NamedTuple):
    """What a temperature does on the pictures that it was fitted to."""

    temperature: float
    """Logits are divided by it."""
    nll_before: float
    """Mean negative log-likelihood of the right class, in nats."""
    nll: float
    ece_before: float
    """Expected calibration error."""
    ece: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return self._asdict()


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """The temperature of the least negative log-likelihood (Guo et al. 2017, arXiv:1706.04599) of smoothed targets.

    The right class of N rows counts (N + 1) / (N + 2), and the others share the rest (after Platt 1999): that few
    pictures are all named rightly makes no name certain.

    Args:
        logits: [N, C] with the model's scale, without a margin.
        labels: [N] integers; negative ones do not count.

    Raises:
        ValueError: no labelled row, a label that is no class, or a logit that is not finite.
    """
    counted = labels >= 0
    logits, labels = logits[counted].detach().cpu(), labels[counted].cpu().long()
    if not len(labels) or logits.ndim != 2 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"logits {tuple(logits.shape)} for {len(labels)} labelled rows; give [N, C], N above 0")
    if bad := int((~logits.isfinite()).sum()):
        raise ValueError(f"{bad} of {logits.numel()} logits are not finite; leave out pictures that could not be read")
    # The likelihood is convex in the inverse of the temperature, and its slope, the mean of the expected logit less the
    # target's, rises in it: the least lies where the slope changes sign.
    low, high = 1 / MOST, 1 / LEAST
    if _slope(logits, labels, low) >= 0:
        high = low
    elif _slope(logits, labels, high) <= 0:
        low = high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if _slope(logits, labels, middle) > 0:
            high = middle
        else:
            low = middle
    inverse = (low + high) / 2
    (nll_before, ece_before), (nll, ece) = _judged(logits, labels, 1.0), _judged(logits, labels, inverse)
    return Calibration(1 / inverse, nll_before, nll, ece_before, ece, len(labels))


def _slope(logits: Tensor, labels: Tensor, inverse: float) -> float:
    total, certain = 0.0, (len(labels) + 1) / (len(labels) + 2)
    for block, label in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        block = block.double()
        expected = (torch.softmax(block * inverse, 1) * block).sum(1)
        right = block.gather(1, label[:, None])[:, 0]
        others = (block.sum(1) - right) / (block.shape[1] - 1) if block.shape[1] > 1 else right
        total += float((expected - certain * right - (1 - certain) * others).sum())
    return total / len(labels)


def _judged(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """Negative log-likelihood and calibration error at an inverse temperature."""
    nll, probabilities, right = 0.0, [], []
    for block, label in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        logs = torch.log_softmax(block.double() * inverse, 1)
        nll -= float(logs.gather(1, label[:, None]).sum())
        best = logs.max(1)
        probabilities.append(best.values.exp())
        right.append(best.indices == label)
    return nll / len(labels), expected_calibration_error(torch.cat(probabilities), torch.cat(right))


def expected_calibration_error(probabilities: ArrayLike, right: ArrayLike, bins: int = BINS) -> float:
    """Mean distance between how sure answers are and how often they are right, over bins of equal width.

    A bin holds the probabilities from its lower edge, left out, to its upper one; it weighs as much as it holds
    (Naeini et al. 2015, Guo et al. 2017).

    Args:
        probabilities: [N] of the answers given, within [0, 1].
        right: [N] bool, whether they were right.
        bins: at least 1.

    Raises:
        ValueError: lengths differ, nothing is given, or a probability is none.
    """
    sure, correct = np.asarray(probabilities, dtype=np.float64), np.asarray(right, dtype=bool)
    if sure.shape != correct.shape or sure.ndim != 1 or not len(sure) or bins < 1:
        raise ValueError(f"{sure.shape} probabilities for {correct.shape} answers in {bins} bins; give [N] of both")
    if not ((sure >= 0) & (sure <= 1 + 1e-9)).all():
        raise ValueError("a probability lies outside [0, 1]; give those of a softmax")
    place = np.clip(np.ceil(sure * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(place, sure, bins) - np.bincount(place, correct, bins)
    return float(np.abs(gaps).sum() / len(sure))
