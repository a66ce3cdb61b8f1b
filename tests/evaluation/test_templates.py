"""Templates against means worked out one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facefast.data import PairSet, TemplateSet
from facefast.evaluation import templates
from tests.support.pictures import make_index


def test_a_weighted_mean_by_hand() -> None:
    embeddings = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 9.0]])
    joined, known = templates.join(embeddings, np.array([0, 0, 2]), 3, torch.tensor([3.0, 4.0, 1.0]))
    assert joined[0].tolist() == pytest.approx([0.6, 0.8])  # (3, 4) / 5: lengths of embeddings do not weigh
    assert joined[2].tolist() == [0, 1]
    assert known.tolist() == [True, False, True]
    assert joined[1].tolist() == [0, 0]


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, math.nan], [1.0]])
def test_what_is_no_weight_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="one of 0 or more each"):
        templates.join(torch.eye(2), np.array([0, 0]), 1, torch.tensor(weights))


def test_frames_of_a_video_weigh_as_much_as_one_photograph() -> None:
    rng = np.random.default_rng(0)
    embeddings = torch.from_numpy(rng.normal(size=(8, 5)).astype(np.float32))
    # Template 0: a video of three frames and a photograph; template 1: two photographs, the second unreadable;
    # template 2: nothing that can be read.
    found = TemplateSet(
        make_index(".", [f"{k}.png" for k in range(8)]),
        np.array([0, 1, 2, 3, 4, 5, 6, 0]),
        np.array([0, 0, 0, 0, 1, 1, 2, 1]),
        np.array([0, 0, 0, 1, 2, 3, 4, 2]),
        ("a", "b", "c"),
        np.array([-1, -1, -1]),
        PairSet.of([0], [1], np.array([True])),
    )
    seen = np.array([True, True, True, True, True, False, False, True])
    quality = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    joined, known = templates.join_templates(embeddings, seen, found, quality)
    unit = F.normalize(embeddings, dim=1)
    video = F.normalize(unit[0] + 2 * unit[1], dim=0)
    assert joined[0] == pytest.approx(F.normalize(video + unit[3], dim=0), abs=1e-6)
    assert joined[1] == pytest.approx(F.normalize(3 * unit[4] + unit[0], dim=0), abs=1e-6)
    assert known.tolist() == [True, True, False]
