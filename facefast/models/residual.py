"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382), for any network that is a sum of residual blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def drop_paths(last: float, count: int) -> Callable[[], nn.Module]:
    """Gives a network's residual blocks their stochastic depth, one call a block, from the picture to the embedding.

    Block l of `count` leaves its branch out for a picture with probability `last` * l / `count`, in training only, and
    scales it up otherwise so that its mean stays. The modules hold no tensors: state dicts are the same with and
    without.

    Args:
        last: probability for the last block, in [0, 1).
        count: residual blocks of the network.

    Raises:
        ValueError: a probability outside [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f"model.drop_path is {last}; it must lie in [0, 1)")
    if last == 0:
        return nn.Identity
    from torchvision.ops import StochasticDepth  # takes seconds to load

    places = iter(range(1, count + 1))
    return lambda: StochasticDepth(last * next(places) / count, mode="row")
