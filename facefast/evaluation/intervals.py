"""95 % intervals of rates, thresholds and curves whose trials are not independent: those of one identity stand and fall
together, so that people count and not pictures.

Twenty pictures of a stranger are hardly more than one: whoever looks like somebody enrolled does so in most of them.
How many independent trials some are worth is their number divided by the design effect (Kish 1965). It is itself found
on few people, mostly too small, so it is taken at higher rates as well, where more of them have an error, and the
largest counts; and a t distribution stands for the normal one, as in Korn and Graubard (1998).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from facefast.evaluation.metrics import Floats, Interval
from facefast.evaluation.thresholds import lowest_threshold

DRAWS = 1000
"""Bootstrap samples."""
CONFIDENCE = 0.95
MORE = (2, 5, 10)
"""Times a rate at which the dependence of its trials is looked for."""
MOST_RATE = 0.25
"""Rate up to which it is: what is common says little about what is rare."""
_Z = 1.959963984540054
"""Of a normal distribution: 95 % lie within as many standard deviations."""
_T_OF_FEW = {1: 12.706204736, 2: 4.302652730}
"""The same of Student's distribution, where the series is not near enough."""
_FAR = 100
"""Errors more than ten times those expected at which no chance is left."""


def error_interval(errors: ArrayLike, one: NDArray[Any] | None = None, other: NDArray[Any] | None = None) -> Interval:
    """Wilson's interval of an error rate, for as many trials as those of some identities are worth.

    Where nothing or everything is an error the dependence cannot be seen, and as many trials count as there are
    identities.

    Args:
        errors: [N] bool.
        one: [N] the identity of each trial; independent trials without it.
        other: [N] the second identity of each trial, where there are two.

    Raises:
        ValueError: there is no trial.
    """
    wrong = np.asarray(errors, dtype=bool)
    if not len(wrong):
        raise ValueError("there is no trial; an error rate needs one")
    rate, trials = float(wrong.mean()), float(len(wrong))
    if one is not None:
        members, num = _numbered(one, other)
        effect = _design_effect(wrong, members, num)
        trials = _as_people(trials, members, num) if effect is None else _worth(trials, effect, num)
    return _wilson(rate, trials)


def trials_worth(impostors: Floats, rate: float, one: NDArray[Any], other: NDArray[Any] | None = None) -> float:
    """How many independent trials some are worth for an interval of a rate: t for z included.

    Args:
        impostors: [N] scores, at least one.
        rate: part of them that a threshold accepts.
        one: [N] the identity of each.
        other: [N] the second identity of each comparison, where there are two.
    """
    members, num = _numbered(one, other)
    rates = (rate, *(rate * more for more in MORE if rate * more <= MOST_RATE))
    effects = [_design_effect(impostors >= lowest_threshold(impostors, at), members, num) for at in rates]
    found = [effect for effect in effects if effect is not None]
    if not found:
        return _as_people(len(impostors), members, num)
    return _worth(len(impostors), max(found), num)


def rate_again(rate: float, trials: float) -> Interval:
    """Where the rate will lie on another set of as many identities: the prediction interval of a binomial count.

    A count in new trials, the chance of which is known by a count in old ones, is beta-binomial; the two priors of
    Clopper and Pearson's interval make it wide enough whatever the chance (Thatcher 1964).

    Args:
        rate: on the set that is known.
        trials: that it is worth, and another one will be.
    """
    again = max(1, round(trials))
    errors = min(rate, 1.0) * trials
    low = _beta_binomial(again, errors, trials - errors + 1, 0.5 - CONFIDENCE / 2) if errors > 0 else 0
    high = again
    if errors < trials:
        high = _beta_binomial(again, errors + 1, trials - errors, 0.5 + CONFIDENCE / 2)
    return Interval(low / again, high / again)


def threshold_interval(impostors: Floats, rate: float, trials: float) -> Interval:
    """Where the threshold for a rate lies that as many impostors as one likes would give: the thresholds of the ends of
    the rate's own interval (Woodruff 1952).

    The upper end is never far above the highest score seen, which few people may not reach.

    Args:
        impostors: [N] scores.
        rate: within (0, 1).
        trials: that they are worth.
    """
    interval = _wilson(rate, trials)
    return Interval(lowest_threshold(impostors, interval.high), lowest_threshold(impostors, interval.low))


def middle_of(values: Sequence[float], num: int) -> Interval:
    """The middle of bootstrap values, by as much more than 95 % as a sample of few varies too little (Hesterberg
    2015).

    Args:
        values: at least one.
        num: identities that were drawn from.
    """
    part = 0.5 * math.erfc(math.sqrt(num / (2 * (num - 1))) * _student(num - 1)) if num > 1 else 0.0
    low, high = np.quantile(values, [part, 1 - part])
    return Interval(float(low), float(high))


def draw_weights(rng: np.random.Generator, num: int, members: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each trial occurs among identities drawn with replacement.

    Args:
        rng: draws them.
        num: identities.
        members: [1 or 2, N] of each trial; a trial of one identity twice counts as often as it is drawn.
    """
    times = np.bincount(rng.integers(num, size=num), minlength=num)
    weights: NDArray[np.int64] = times[members[0]]
    if len(members) == 2:
        weights = np.where(members[0] == members[1], weights, weights * times[members[1]])
    return weights


def _numbered(one: NDArray[Any], other: NDArray[Any] | None) -> tuple[NDArray[np.int64], int]:
    """[1 or 2, N] identities counted from 0, and how many there are."""
    stacked = np.stack([one] if other is None else [one, other])
    names, members = np.unique(stacked, return_inverse=True)
    return members.reshape(stacked.shape).astype(np.int64), len(names)


def _worth(trials: float, effect: float, num: int) -> float:
    """Trials divided by their design effect, and by what an estimate of it from few identities is short of."""
    return trials / effect * (_Z / _student(num - 1)) ** 2


def _as_people(trials: float, members: NDArray[np.int64], num: int) -> float:
    """As many trials as identities, or pairs of them."""
    return min(trials, float(max(1, num // 2 if _in_two(members) else num)))


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's distribution: the expansion of Cornish and Fisher, from 3 degrees of freedom on
    within 1 %."""
    if freedom in _T_OF_FEW:
        return _T_OF_FEW[freedom]
    terms = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))


def _wilson(rate: float, trials: float) -> Interval:
    centre = (rate + _Z * _Z / (2 * trials)) / (1 + _Z * _Z / trials)
    half = _Z / (1 + _Z * _Z / trials) * math.sqrt(rate * (1 - rate) / trials + (_Z / (2 * trials)) ** 2)
    # Exact at the ends, where the formula leaves a rounding.
    return Interval(0.0 if rate == 0 else max(0.0, centre - half), 1.0 if rate == 1 else min(1.0, centre + half))


def _beta_binomial(trials: int, a: float, b: float, part: float) -> int:
    """Least count at which at least a part of the distribution is reached."""
    mean = trials * a / (a + b)
    k = np.arange(min(trials, math.ceil(10 * mean) + _FAR), dtype=np.float64)
    steps = np.log((trials - k) * (k + a)) - np.log((k + 1) * (trials - k - 1 + b))
    logarithms = np.concatenate([[0.0], np.cumsum(steps)])
    chances = np.exp(logarithms - logarithms.max())
    return int(np.searchsorted(np.cumsum(chances) / chances.sum(), part))


def _design_effect(errors: NDArray[np.bool_], members: NDArray[np.int64], num: int) -> float | None:
    """Variance of an error rate with the dependence of its trials over the variance without, at least 1; None where it
    cannot be seen, as where all or none are errors."""
    rate = float(errors.mean())
    if rate in (0.0, 1.0) or num < 2:
        return None
    return max(
        1.0, _dependent_variance(errors.astype(np.float64) - rate, members, num) / (rate * (1 - rate) / len(errors))
    )


def _in_two(members: NDArray[np.int64]) -> bool:
    return len(members) == 2 and bool((members[0] != members[1]).any())


def _dependent_variance(residuals: Floats, members: NDArray[np.int64], num: int) -> float:
    """Variance of the mean where trials with an identity in common are dependent, and no others are (for comparisons
    of two the dyadic form of Aronow et al. 2015)."""
    sums = np.bincount(members[0], residuals, num)
    if _in_two(members):
        # Each trial adds to both of its identities; what a pair of identities shares has then been counted twice.
        apart = members[0] != members[1]
        sums += np.bincount(members[1][apart], residuals[apart], num)
        low, high = members.min(0)[apart], members.max(0)[apart]
        _, pairs = np.unique(low * num + high, return_inverse=True)
        twice = float(np.square(np.bincount(pairs, residuals[apart])).sum())
    else:
        twice = 0.0
    correction = num / max(1, num - 1)  # few identities, as for a sample's variance
    return max(0.0, correction * (float(np.square(sums).sum()) - twice)) / len(residuals) ** 2
