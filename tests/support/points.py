"""Embeddings drawn on a sphere around one direction for each person, for what needs no photographs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facefast.data import FaceIndex
from facefast.labels.clustering import unit_rows
from facefast.labels.selftest import plant_wrong_labels
from facefast.labels.suspects import Suspects, find_suspects

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


def doubtful_people() -> tuple[FaceIndex, Suspects, Floats]:
    """Thirty people whose pictures are not there, what is suspected of them, and their embeddings; some labels are
    wrong, and the first person has a second name, "person 30"."""
    unit, labels, _ = people([10] * 30)
    wrong, _ = plant_wrong_labels(labels, 0.05, seed=0)
    wrong[0:4] = 30
    names = tuple(f"person {k}" for k in range(31))
    index = FaceIndex.build("photos", [b"%d.jpg" % k for k in range(len(labels))], wrong, names)
    return index, find_suspects(unit, wrong), unit
