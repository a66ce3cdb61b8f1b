"""Embeddings drawn on a sphere around one direction for each person, for what needs no photographs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facefast.labels.clustering import unit_rows

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]


def people(
    counts: list[int], spread: float = 0.08, dimensions: int = 64, seed: int = 0
) -> tuple[Floats, Numbers, np.random.Generator]:
    """Rows around a random direction for each person, and whose they are."""
    generator = np.random.default_rng(seed)
    centres = unit_rows(generator.standard_normal((len(counts), dimensions)).astype(np.float32))
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = generator.standard_normal((len(labels), dimensions)) * spread
    return unit_rows((centres[labels] + noise).astype(np.float32)), labels, generator
