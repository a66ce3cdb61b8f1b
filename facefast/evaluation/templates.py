"""One embedding for a set of pictures of a person."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facefast.data import TemplateSet


def join(
    embeddings: Tensor, groups: NDArray[np.int64], count: int, weights: Tensor | None = None
) -> tuple[Tensor, NDArray[np.bool_]]:
    """The weighted mean direction of each group.

    Args:
        embeddings: [N, D] of any length, which does not weigh.
        groups: [N] the group of each, below `count`.
        count: G.
        weights: [N] at least 0, such as the quality of each picture; equal ones without them.

    Returns:
        [G, D] of length 1, and [G] whether a group has a picture of a weight above 0 (others are 0).

    Raises:
        ValueError: a weight is negative or not finite, or there is not one for each embedding.
    """
    if weights is None:
        weights = torch.ones(len(embeddings))
    if weights.shape != (len(embeddings),) or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"weights {tuple(weights.shape)} for {len(embeddings)} embeddings; give one of 0 or more each")
    unit = F.normalize(embeddings.double(), dim=1) * weights.double()[:, None]
    places = torch.from_numpy(groups)
    sums = torch.zeros(count, embeddings.shape[1], dtype=torch.float64).index_add_(0, places, unit)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, places, weights.double())
    return F.normalize(sums, dim=1).float(), (total > 0).numpy()


def join_templates(
    embeddings: Tensor, seen: NDArray[np.bool_], templates: TemplateSet, weights: Tensor | None = None
) -> tuple[Tensor, NDArray[np.bool_]]:
    """One embedding a template: the mean over its media of the weighted mean over each medium's pictures, so that a
    video weighs no more than a photograph (the protocol of IJB-A, Klare et al. 2015).

    Args:
        embeddings: [N, D] of the template set's pictures, of any length.
        seen: [N] False for pictures that could not be read.
        templates: T of them.
        weights: [N] quality of each picture.

    Returns:
        [T, D] of length 1, and [T] whether a picture of the template could be read.

    Raises:
        ValueError: as `join`.
    """
    members = seen[templates.rows]
    rows, media = templates.rows[members], templates.media[members]
    kept = torch.from_numpy(rows)
    means, known = join(
        embeddings[kept], media, int(templates.media.max()) + 1, None if weights is None else weights[kept]
    )
    template_of = np.zeros(len(means), np.int64)
    template_of[templates.media] = templates.templates
    return join(means[torch.from_numpy(known)], template_of[known], len(templates.names))
