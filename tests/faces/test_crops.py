"""Faces cut out of large photographs: the same pictures for a model, whole folders or none, begun ones finished."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facefast import align
from facefast.data import FaceIndex, oracle, read_index
from facefast.data.drawn import synthetic
from facefast.faces import crops
from facefast.faces.align import Locator
from facefast.recipe import AugmentSpec, ImageSpec, Reading
from facefast.runtime.exits import StorageError
from facefast.runtime.process import Runtime, World
from tests.support.pictures import exif

READING = Reading(2)
IMAGE = ImageSpec(size=112, template="arcface")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    """Six faces as photographs of 2000 x 1600 pixels, one of them turned by EXIF, with landmarks."""
    base = tmp_path_factory.mktemp("large")
    drawn = read_index(synthetic.write(base / "drawn", synthetic.DrawnSpec((3, 0, 0), 2)), "celeba").scanned()
    assert drawn.landmarks is not None
    points = np.zeros((6, 5, 2), np.float32)
    for row in range(6):
        scene = Image.new("RGB", (2000, 1600), (100, 120, 90))
        face = Image.open(drawn.path(row)).resize((178 * 7, 218 * 7), Image.Resampling.BICUBIC)
        scene.paste(face, (100 * row, 20))
        points[row] = (drawn.landmarks[row] + 0.5) * 7 - 0.5 + (100 * row, 20)
        path = base / "people" / str(row % 3) / f"{row}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if row == 4:  # stored on its side: upright after EXIF orientation 6
            scene.transpose(Image.Transpose.ROTATE_90).save(path, quality=92, exif=exif(6))
        else:
            scene.save(path, quality=92)
    index = read_index(base / "people").scanned()
    order = [int(Path(index.name(row)).stem) for row in range(6)]
    return dataclasses.replace(index, landmarks=points[order])


@pytest.fixture(scope="module")
def small(large: FaceIndex, tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    return crops.write(large, crops.plan(large, IMAGE), tmp_path_factory.mktemp("crops") / "set", READING)


def test_a_crop_gives_the_model_the_same_picture(large: FaceIndex, small: FaceIndex) -> None:
    rows = np.arange(6)
    for image in (
        IMAGE,
        ImageSpec(size=112, width=96, template="arcface_112x96"),
        ImageSpec(size=64, template="arcface"),
    ):
        one, other = (oracle.render(index, rows, image) for index in (large, small))
        assert float(abs(one - other).mean(dim=(1, 2, 3)).max()) * 127.5 < 2


def test_crops_hold_what_a_varied_picture_shows(large: FaceIndex, small: FaceIndex) -> None:
    augment = AugmentSpec(shift=0.08, rotation=20)
    rows = np.arange(6)
    for seed in range(3):
        one, other = (oracle.render(index, rows, IMAGE, augment, seed) for index in (large, small))
        assert float(abs(one - other).mean(dim=(1, 2, 3)).max()) * 127.5 < 2


def test_stronger_variation_asks_for_a_wider_margin(large: FaceIndex) -> None:
    assert crops.margin_for([AugmentSpec()], IMAGE) == crops.MARGIN
    wide = crops.margin_for([AugmentSpec(), AugmentSpec(rotation=45, shift=0.3)], IMAGE)
    assert wide == pytest.approx(2**0.5 * 1.6)
    assert crops.plan(large, IMAGE, wide).bytes > crops.plan(large, IMAGE).bytes


def test_crops_are_bounded_and_what_the_index_knows_stays(large: FaceIndex, small: FaceIndex) -> None:
    assert small.widths.max() <= np.ceil(1.7 * 112 * 1.5) + 1 and (small.orientations == 1).all()
    assert small.paths.tolist() == large.paths.tolist() and small.class_names == large.class_names
    np.testing.assert_array_equal(small.labels, large.labels)
    assert not small.faults.any() and small.hashes.any(1).all()


def test_the_folder_is_read_as_a_data_set_wherever_it_is_moved(small: FaceIndex, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(small.root, moved)
    index = read_index(moved)
    assert index.root == str(moved) and oracle.decode(index.path(0)).shape[1] == index.widths[0]
    np.testing.assert_array_equal(index.landmarks, small.landmarks)


def test_a_set_that_was_begun_goes_on_and_another_set_is_refused(large: FaceIndex, tmp_path: Path) -> None:
    chosen = crops.plan(large, IMAGE)
    first = crops.write(large, chosen, tmp_path / "set", READING)
    kept, lost = Path(first.path(0)), Path(first.path(3))
    (tmp_path / "set" / "index.npz").unlink()
    with pytest.raises(ValueError, match="is not finished"):
        read_index(tmp_path / "set")
    lost.unlink()
    before = kept.stat().st_mtime_ns
    again = crops.write(large, chosen, tmp_path / "set", READING)
    assert kept.stat().st_mtime_ns == before and lost.exists()
    np.testing.assert_array_equal(again.hashes, first.hashes)
    with pytest.raises(ValueError, match="crops of other photographs"):
        crops.write(large.select([0, 1]), crops.plan(large.select([0, 1]), IMAGE), tmp_path / "set", READING)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no crops"):
        crops.write(large, chosen, tmp_path / "full", READING)


def test_too_little_space_is_said_before_anything_is_written(
    large: FaceIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="6 crops need about"):
        crops.write(large, crops.plan(large, IMAGE), tmp_path / "set", READING)
    assert not list((tmp_path / "set").iterdir())


def test_pictures_without_landmarks_cannot_be_cut(large: FaceIndex) -> None:
    with pytest.raises(ValueError, match="no landmarks"):
        crops.plan(dataclasses.replace(large, landmarks=None), IMAGE)


def test_a_run_reads_large_photographs_once_and_small_ones_as_they_are(large: FaceIndex, tmp_path: Path) -> None:
    run = Runtime(World(), torch.device("cpu"))
    for detect, folder in (("auto", tmp_path / "a"), ("auto", tmp_path / "a")):  # the second time it is there already
        locate = Locator(IMAGE, detect, run, alone=True, crops=folder)
        found = locate(large, READING)
        assert found.root == str(folder / "0") and found.paths.tolist() == large.paths.tolist()
        assert "cut out of large photographs" in locate.said()[-1] and "MiB" in locate.said()[-1]
    tiny = dataclasses.replace(large, widths=np.full(6, 300, np.int32), heights=np.full(6, 300, np.int32))
    assert Locator(IMAGE, "auto", run, alone=True, crops=tmp_path / "b")(tiny, READING) is tiny
    assert Locator(IMAGE, "auto", run, alone=True)(large, READING) is large  # data.crops never
    (tmp_path / "c" / "0").mkdir(parents=True)
    (tmp_path / "c" / "0" / "letter.txt").write_text("mine")
    locate = Locator(IMAGE, "auto", run, alone=True, crops=tmp_path / "c")
    assert locate(large, READING) is large and "decoded anew in every epoch" in locate.said()[-1]


# The command.


def test_align_writes_landmarks_quality_and_faces(
    large: FaceIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (300, 200), (10, 90, 30)).save(Path(large.root) / "0" / "wall.png")
    try:
        flags = ["--out", str(tmp_path / "index"), "--crops", str(tmp_path / "faces"), "--json"]
        assert align.main([large.root, *flags]) == 0
    finally:
        (Path(large.root) / "0" / "wall.png").unlink()
    report = json.loads(capsys.readouterr().out)
    assert report["pictures"] == 7 and report["with_landmarks"] == 6 and report["no_face"] == ["0/wall.png"]
    index = FaceIndex.load(tmp_path / "index.npz")
    assert index.landmarks is not None and large.landmarks is not None and index.quality is not None
    sound = index.sound()
    assert sound.landmarks is not None and abs(sound.landmarks - large.landmarks).mean() < 0.1 * 37 * 7
    assert (sound.quality[:, 0] > 112 * 5).all() if sound.quality is not None else False
    assert len(read_index(tmp_path / "faces")) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [((), "give --out INDEX"), (("--out", "index", "--detect", "none"), "--detect none would find nothing")],
)
def test_align_says_what_it_needs(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert align.main([str(tmp_path), *flags]) == 64
    assert message in capsys.readouterr().err


def test_align_refuses_an_output_that_cannot_be_written_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert align.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "file" / "index")]) == 74
    assert align.main([str(tmp_path / "nowhere"), "--crops", str(tmp_path / "file")]) == 74
    assert capsys.readouterr().err.count("cannot write") == 2
