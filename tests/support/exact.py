"""The losses in 60-digit arithmetic (mpmath): the truth that the kernels' tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mpmath as mp

mp.mp.dps = 60
ONE = mp.mpf(1)
SIN_FLOOR = mp.mpf("1e-3")


@dataclass(frozen=True)
class Softmax:
    """Options of `focal_loss` for one row."""

    gamma: float = 2.0
    smoothing: float = 0.0
    scale: float = 1.0
    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    detached: bool = False


def with_margin(c: mp.mpf, o: Softmax) -> tuple[mp.mpf, mp.mpf]:
    """The target's cosine after the margin, and its slope."""
    m1, m2, m3 = mp.mpf(o.m1), mp.mpf(o.m2), mp.mpf(o.m3)
    if m1 == 1 and m2 == 0:
        return c - m3, ONE
    c = min(max(c, -ONE), ONE)
    angle = mp.acos(c)
    moved = m1 * angle + m2
    if moved > mp.pi:
        drop = m2 * mp.sin(m2) if m1 == 1 else 1 + mp.cos((mp.pi - m2) / m1)
        value, slope = c - drop, ONE
    elif moved < 0:
        value, slope = ONE, mp.mpf(0)
    else:
        value = mp.cos(moved)
        slope = m1 * mp.sin(moved) / max(mp.sin(angle), SIN_FLOOR)
    return value - m3, ONE if o.detached else slope


def softmax_focal(x: Sequence[float], y: int, o: Softmax) -> tuple[mp.mpf, list[mp.mpf]]:
    """The loss of one row and its gradient with respect to x."""
    scale, gamma, eps = mp.mpf(o.scale), mp.mpf(o.gamma), mp.mpf(o.smoothing)
    value, slope = with_margin(mp.mpf(x[y]), o)
    z = [scale * (value if j == y else mp.mpf(v)) for j, v in enumerate(x)]
    powers = [mp.exp(v) for v in z]
    total = mp.fsum(powers)
    others = mp.fsum(p for j, p in enumerate(powers) if j != y)
    p, u = powers[y] / total, others / total
    lse = mp.log(total)
    ce = mp.log1p(others / powers[y])
    focal = u**gamma * ce if gamma else ce
    loss = (1 - eps) * focal + eps * (lse - mp.fsum(z) / len(z))
    # d (u^gamma ce) / d z_y = -u^gamma (gamma p ce + u) ... divided by u to keep the form without 0 / 0
    k = ONE if not gamma else u**gamma * (1 + gamma * p * ce / u) if u else mp.mpf(0)
    grads = []
    for j in range(len(z)):
        share = eps * (powers[j] / total - ONE / len(z))
        if j == y:
            grads.append(scale * slope * ((1 - eps) * -k * u + share))
        else:
            grads.append(scale * ((1 - eps) * k * powers[j] / total + share))
    return loss, grads


def sigmoid_focal(x: float, target: float, gamma: float) -> tuple[mp.mpf, mp.mpf]:
    """The loss of one element, without alpha, and its derivative."""
    x, t, gamma = mp.mpf(x), mp.mpf(target), mp.mpf(gamma)
    p, q = 1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(x))
    ce = t * mp.log1p(mp.exp(-x)) + (1 - t) * mp.log1p(mp.exp(x))
    u = p * (1 - t) + q * t
    if not gamma:
        return ce, (1 - t) * p - t * q
    slope = (1 - 2 * t) * p * q / u
    return u**gamma * ce, u**gamma * (gamma * slope * ce + (1 - t) * p - t * q)
