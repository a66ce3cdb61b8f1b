"""What an evaluation shares with training: people, files, photographs saved again."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facefast.data import FaceIndex, read_index
from facefast.data.divide import divide
from facefast.evaluation import overlap
from facefast.models import FaceModel
from tests.support import small
from tests.support.pictures import encode, garbled_png, make_index, smooth_picture


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return small.make_model()


@pytest.fixture(scope="module")
def run(drawn: Path, model: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small.save_run(tmp_path_factory.mktemp("runs") / "run", model, drawn)
    read_index(drawn).scanned().save(folder / "index.npz")
    return folder


def train_and_test(run: Path, model: FaceModel, drawn: Path) -> tuple[FaceIndex, FaceIndex]:
    recipe = small.make_recipe(drawn, model)
    data = divide(FaceIndex.load(run / "index.npz"), recipe, recipe.phases[-1])
    assert data.evaluation.test is not None
    return data.train, data.evaluation.test


def test_training_rows_are_those_of_the_recipe_and_no_others(run: Path, model: FaceModel, drawn: Path) -> None:
    train, test = train_and_test(run, model, drawn)
    for path in (run, run / "checkpoints" / "best"):
        found = overlap.training_rows(path)
        assert found is not None
        assert sorted(found.paths.tolist()) == sorted(train.paths.tolist())
        assert not set(found.paths.tolist()) & set(test.paths.tolist())


def test_test_pictures_share_nothing_and_training_pictures_everything(run: Path, model: FaceModel, drawn: Path) -> None:
    train, test = train_and_test(run, model, drawn)
    clean = overlap.overlap_of(run, model, [test], held_out=False)
    assert (clean.trained, clean.measured, clean.names, clean.files, clean.near) == (8, 8, None, 0, 0)
    assert clean.sentence().startswith("shared with the 8 training pictures: 0 of 8 files, 0 nearly")
    named = overlap.overlap_of(run, model, [test], held_out=True)  # as if its people should be new
    assert named.names == 4 and named.first == "1"
    nobody = overlap.overlap_of(run, model, [test], held_out=True, new=[test.select([])])  # the others are its own
    assert nobody.names == 0 and nobody.files == 0
    leaked = overlap.overlap_of(run, model, [test, train], held_out=False)
    assert (leaked.files, leaked.near, leaked.measured) == (8, 8, 16)
    assert leaked.first == train.name(0)


def test_a_photograph_saved_again_is_found_whatever_its_name(
    run: Path, model: FaceModel, drawn: Path, tmp_path: Path
) -> None:
    train, test = train_and_test(run, model, drawn)
    (tmp_path / "somebody").mkdir()
    with Image.open(train.path(3)) as picture:
        picture.resize((picture.width // 2, picture.height // 2)).save(tmp_path / "somebody" / "again.jpg", quality=60)
    shutil.copy(test.path(0), tmp_path / "somebody" / "fresh.jpg")
    found = overlap.overlap_of(run, model, [read_index(tmp_path).scanned()], held_out=True)
    assert (found.names, found.files, found.near) == (0, 0, 1)
    assert found.first == "somebody/again.jpg"


def test_what_was_not_compared_is_said(
    run: Path, model: FaceModel, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, test = train_and_test(run, model, drawn)
    package = tmp_path / "package"
    shutil.copytree(run / "checkpoints" / "step-0000001", package)
    found = overlap.overlap_of(package, model, [test], held_out=True)
    assert (found.trained, found.names, found.near) == (0, 4, None)
    assert "keeps no list of its training pictures: names alone" in found.why and found.sentence().startswith(
        "shared with training: 4"
    )
    mine = overlap.overlap_of(package, model, [test], held_out=False)  # its own people: neither counted nor called 0
    assert mine.names is None
    assert mine.sentence() == "shared with training: not compared; the model keeps no list of its training pictures"
    monkeypatch.setattr(overlap, "MOST_PICTURES", 10)
    found = overlap.overlap_of(run, model, [test], held_out=True)
    assert found.near is None and "16 pictures are too many" in found.why
    assert "0 of 8 files (first: 1); not compared by thumbnails: 16 pictures" in found.sentence()
    monkeypatch.setattr(overlap, "MOST_PICTURES", 100)
    other = tmp_path / "moved"
    shutil.copytree(run, other, symlinks=True)
    index = FaceIndex.load(run / "index.npz")
    moved = make_index(tmp_path / "gone", [path.decode() for path in index.paths.tolist()], labels=index.labels)
    dataclasses.replace(index, root=moved.root).save(other / "index.npz")
    found = overlap.overlap_of(other, model, [test], held_out=True)
    assert found.near is None and found.files == 0 and "no longer in" in found.why


def test_an_index_that_does_not_fit_the_recipe_is_no_reason_to_fail(
    run: Path, model: FaceModel, drawn: Path, tmp_path: Path
) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    (other / "index.npz").write_bytes(b"damaged")
    _, test = train_and_test(run, model, drawn)
    found = overlap.overlap_of(other, model, [test], held_out=True)
    assert found.trained == 0 and "are not known" in found.why


def test_thumbnails_do_not_see_brightness_and_are_nothing_for_what_cannot_be_read(tmp_path: Path) -> None:
    picture = smooth_picture(90, 70, 1)
    files = {
        "a.png": encode(picture, "PNG"),
        "dark.png": encode((picture * 0.5).astype(np.uint8), "PNG"),
        "broken.png": garbled_png(),
        "plain.png": encode(np.full((50, 50, 3), 99, np.uint8), "PNG"),
        "none.png": b"no picture",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = overlap.thumbnails(make_index(tmp_path, list(files)), 1)
    assert found[0] @ found[1] > 0.999
    assert not found[2:].any()
