"""How far pictures are blurred ahead of the network: as far as people left out are verified better for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from facefast.data import FaceIndex, read_index
from facefast.data.drawn import synthetic
from facefast.models import FaceModel
from facefast.models.smoothing import Deviations
from facefast.recipe import AdaptConfig
from facefast.runtime.process import Runtime, World
from facefast.training.adapt import BLURS, Adaptation, adapt, choose_blur
from tests.support import small

PEOPLE, PICTURES, SIZE = 40, 6, 24
RUN = Runtime(World(0, 1, 0, 1), torch.device("cpu"))
NONE = Deviations(0.0, 0.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    spec = synthetic.DrawnSpec(identities=(PEOPLE, 0, 0), pictures=PICTURES, seed=5)
    return read_index(synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False))


class Camera:
    """Embeds people as a network would from a camera whose noise each blur leaves so much of."""

    def __init__(self, noise: dict[Deviations, float]) -> None:
        self.noise, self.asked = noise, list[Deviations]()

    def __call__(self, model: FaceModel, index: FaceIndex, mirror: bool) -> tuple[Tensor, Tensor]:
        blur = NONE if model.smoothing is None else model.smoothing.deviations
        self.asked.append(blur)
        people = np.random.default_rng(1).normal(size=(PEOPLE, SIZE))[index.labels]
        own = [np.random.default_rng([label, row]).normal(size=SIZE) for row, label in enumerate(index.labels)]
        found = torch.from_numpy(people + self.noise[blur] * np.stack(own)).float()
        return found, torch.ones(len(index), dtype=torch.bool)


def chosen(index: FaceIndex, *noise: float) -> tuple[Deviations, list[Deviations], int]:
    """What is chosen where no blur, the first and the second leave so much noise; what was embedded, and how many
    trials are told."""
    camera, model = Camera(dict(zip((NONE, *BLURS), noise, strict=True))), small.make_model()
    found, trials = choose_blur(model, index, None, camera, seed=2)
    assert model.smoothing is None
    return found, camera.asked, len(trials)


def test_the_blur_that_leaves_least_noise_is_taken(index: FaceIndex) -> None:
    assert chosen(index, 2.0, 1.2, 0.5) == (BLURS[1], [NONE, *BLURS], 2)
    assert chosen(index, 2.0, 0.5, 1.2) == (BLURS[0], [NONE, *BLURS], 2)
    assert chosen(index, 2.0, 2.2, 0.5) == (BLURS[1], [NONE, *BLURS], 2)


def test_pictures_that_a_blur_costs_keep_what_they_show(index: FaceIndex) -> None:
    assert chosen(index, 0.8, 1.6, 1.6) == (NONE, [NONE, *BLURS], 2)


def test_a_gain_within_chance_is_none(index: FaceIndex) -> None:
    assert chosen(index, 1.0, 1.0, 1.0)[0] == NONE


def test_embeddings_that_are_there_are_not_made_again(index: FaceIndex) -> None:
    camera = Camera(dict(zip((NONE, *BLURS), (2.0, 1.2, 0.5), strict=True)))
    plain = Camera(camera.noise)(small.make_model(), index, False)
    assert choose_blur(small.make_model(), index, plain, camera, seed=2)[0] == BLURS[1]
    assert camera.asked == list(BLURS)


def given(index: FaceIndex, model: FaceModel, camera: Camera, config: AdaptConfig) -> Adaptation:
    known = Camera(camera.noise)(model, index, True)
    done, after = adapt(model, index, None, config, known, camera, lambda *_: {}, RUN, seed=2)
    blur = model.smoothing.deviations if model.smoothing else NONE
    assert blur == (done.luma, done.chroma)
    np.testing.assert_allclose(after[0], known[0] if blur == NONE else Camera(camera.noise)(model, index, True)[0])
    return done


def test_a_given_blur_is_done_as_it_is_and_takes_the_place_of_another(index: FaceIndex, tmp_path: Path) -> None:
    model, camera = small.make_model(), Camera({NONE: 1.0, Deviations(2.0, 0.0): 0.5, Deviations(0.0, 3.0): 0.7})
    done = given(index, model, camera, AdaptConfig("given", luma=2.0))
    assert (done.luma, done.chroma, done.changes) == (2.0, 0.0, True)
    assert "pictures blurred, lightness by 2 and colour by 0 pixels of 112" in "".join(done.told())
    given(index, model, camera, AdaptConfig("given", chroma=3.0))


@pytest.mark.parametrize(("luma", "chroma"), [(-1.0, 0.0), (0.0, 17.0), (float("nan"), 0.0)])
def test_a_blur_of_no_picture_is_refused(luma: float, chroma: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 16\]"):
        AdaptConfig("given", luma=luma, chroma=chroma)
