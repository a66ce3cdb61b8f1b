"""The native path against the oracle: real photographs and odd files, within 2/255 of the picture on average."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from facefast.data import read_index
from facefast.data.index import FaceIndex
from facefast.data.loader import make_loader
from facefast.data.oracle import render
from facefast.recipe import AugmentSpec, ImageSpec, Place
from tests.support.pictures import encode, exif, make_index, odd_pictures, smooth_picture

EVERYTHING = AugmentSpec(
    crop=0.4,
    crop_ratio=0.2,
    shift=0.1,
    flip=0.5,
    rotation=25,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    grey=0.2,
    erase=0.5,
)
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


def loaded(index: FaceIndex, image: ImageSpec, augment: AugmentSpec | None, device: str, **options: Any) -> Tensor:
    """Every picture of the index through DALI: [N, 3, H, W]."""
    images = torch.zeros(len(index), 3, *image.shape)
    settings: dict[str, Any] = {"augment": augment, "seed": 3, "epoch": 4, "device": device, "threads": 2}
    with make_loader(index, image, batch_size=16, **settings, **options) as loader:
        for batch in loader:
            valid = batch.rows >= 0
            images[batch.rows[valid].cpu()] = batch.images[valid].cpu()
        assert not loader.bad
    return images


def differences(index: FaceIndex, image: ImageSpec, augment: AugmentSpec | None, device: str) -> Tensor:
    """Mean absolute difference of each picture between DALI and the oracle, of 255."""
    theirs = render(index, np.arange(len(index)), image, augment, seed=3, epoch=4)
    scale = torch.tensor(image.std)[:, None, None]
    return ((loaded(index, image, augment, device) - theirs) * scale).abs().mean((1, 2, 3))


@pytest.mark.parametrize("augment", [None, EVERYTHING], ids=["still", "augmented"])
@pytest.mark.parametrize(
    "image",
    [ImageSpec(112), ImageSpec(112, 96, color="bgr"), ImageSpec(64, template="none"), ImageSpec(224)],
    ids=["arcface", "112x96 bgr", "no template", "enlarged"],
)
@pytest.mark.parametrize("device", DEVICES)
def test_aligned_photographs(celeba: Path, device: str, image: ImageSpec, augment: AugmentSpec | None) -> None:
    index = read_index(celeba)
    index = index.select(np.random.default_rng(1).choice(len(index), 32, replace=False))
    found = differences(index, image, augment, device)
    assert found.max() < (0.05 if device == "cpu" else 2)


@pytest.mark.parametrize("augment", [None, EVERYTHING], ids=["still", "augmented"])
@pytest.mark.parametrize("device", DEVICES)
def test_photographs_in_the_wild(celeba_in_the_wild: Path, device: str, augment: AugmentSpec | None) -> None:
    names = sorted(path.name for path in celeba_in_the_wild.iterdir())[:32]
    index = make_index(celeba_in_the_wild, names).scanned()
    found = differences(index, ImageSpec(112), augment, device)
    assert found.max() < (0.05 if device == "cpu" else 2)


@pytest.mark.parametrize("augment", [None, EVERYTHING], ids=["still", "augmented"])
@pytest.mark.parametrize("device", DEVICES)
def test_odd_files(tmp_path: Path, device: str, augment: AugmentSpec | None) -> None:
    kinds = odd_pictures()
    names = [f"{i}.bin" for i in range(len(kinds))]
    for name, data in zip(names, kinds.values(), strict=True):
        (tmp_path / name).write_bytes(data)
    index = make_index(tmp_path, names).scanned()
    found = differences(index, ImageSpec(48), augment, device)
    assert {kind: float(value) for kind, value in zip(kinds, found, strict=True) if value >= 1} == {}


@pytest.mark.parametrize("device", DEVICES)
def test_a_twelve_megapixel_photograph_neither_differs_nor_aliases(tmp_path: Path, device: str) -> None:
    picture = np.full((3000, 4000, 3), 255, np.uint8)
    picture[::2] = 0  # one-pixel stripes: whatever skips pixels sees black, white or waves
    picture[1000:2000, 1000:3000] = (200, 100, 50)
    (tmp_path / "large.jpg").write_bytes(encode(picture, quality=85, subsampling=0, exif=exif(6)))
    index = make_index(tmp_path, ["large.jpg"]).scanned()
    assert differences(index, ImageSpec(112), EVERYTHING, device).item() < 1
    still = loaded(index, ImageSpec(112), None, device)[0].rot90(1, (1, 2)) * 127.5 + 127.5
    assert (still[:, 2:30, 2:-2] - 127.5).abs().max() < 4
    middle = still[:, 45:67, 45:67].mean((1, 2))
    torch.testing.assert_close(middle, torch.tensor([200.0, 100.0, 50.0]), atol=3, rtol=0)


PLACES = [(place, load) for place in get_args(Place) for load in ((0.0, 0.65, 1.0) if place != "cpu" else (0.0,))]


def apart(index: FaceIndex, image: ImageSpec, augment: AugmentSpec | None, place: str, load: float) -> Tensor:
    """Mean absolute difference of each picture between a GPU's loader and the CPU's, of 255."""
    there = loaded(index, image, augment, "cuda", decoding=place, hw_decoder_load=load)
    scale = torch.tensor(image.std)[:, None, None]
    return ((there - loaded(index, image, augment, "cpu")) * scale).abs().mean((1, 2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("augment", [None, EVERYTHING], ids=["still", "augmented"])
@pytest.mark.parametrize("image", [ImageSpec(112), ImageSpec(224)], ids=["112", "enlarged"])
@pytest.mark.parametrize(("place", "load"), PLACES)
def test_wherever_a_gpus_pictures_are_decoded_they_are_those_of_the_cpu(
    celeba: Path, place: str, load: float, image: ImageSpec, augment: AugmentSpec | None
) -> None:
    index = read_index(celeba)
    index = index.select(np.random.default_rng(1).choice(len(index), 64, replace=False))
    found = apart(index, image, augment, place, load)
    assert found.mean() < 0.05 and found.max() < 0.2


def jpegs(folder: Path, **options: Any) -> FaceIndex:
    """16 JPEG files of one kind, as Pillow writes them with these options."""
    folder.mkdir()
    names = [f"{seed:02}.jpg" for seed in range(16)]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(encode(smooth_picture(150, 140, seed), quality=90, **options))
    return make_index(folder, names).scanned()


@pytest.mark.gpu
@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize(("place", "load"), PLACES)
def test_so_they_are_for_each_way_in_which_a_jpeg_keeps_its_colours(
    tmp_path: Path, place: str, load: float, progressive: bool, subsampling: int
) -> None:
    index = jpegs(tmp_path / "jpegs", progressive=progressive, subsampling=subsampling)
    found = apart(index, ImageSpec(112), None, place, load)
    assert found.mean() < 0.05 and found.max() < 0.2


@pytest.mark.gpu
@pytest.mark.parametrize(("place", "load"), PLACES)
def test_odd_files_are_the_cpus_within_a_level_wherever_they_are_decoded(
    tmp_path: Path, place: str, load: float
) -> None:
    kinds = odd_pictures()
    names = [f"{i}.bin" for i in range(len(kinds))]
    for name, data in zip(names, kinds.values(), strict=True):
        (tmp_path / name).write_bytes(data)
    found = apart(make_index(tmp_path, names).scanned(), ImageSpec(48), None, place, load)
    assert {kind: float(value) for kind, value in zip(kinds, found, strict=True) if value >= 1} == {}
