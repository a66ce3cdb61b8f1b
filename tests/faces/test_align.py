"""What is done about the faces of photographs: recognised as aligned, brought to a template, looked for, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from facefast.data import FaceIndex, oracle, read_index
from facefast.data.drawn import synthetic
from facefast.data.index import NO_FACE
from facefast.data.prepare import read_photographs
from facefast.faces import landmarks as landmarks_module
from facefast.faces.align import Locator, locator
from facefast.faces.detect import Detector
from facefast.faces.found import Faces
from facefast.faces.landmarks import find_landmarks
from facefast.faces.mtcnn import Mtcnn
from facefast.recipe import ImageSpec, Photographs, Reading
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime, World

RUN = Runtime(World(), torch.device("cpu"))
ARCFACE = ImageSpec(size=112, template="arcface")
NARROW = ImageSpec(size=112, width=96, template="arcface_112x96")
CELEBA = ImageSpec(size=218, width=178, template="celeba")
READING = Reading(1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    """Faces in CelebA's frame."""
    root = synthetic.write(tmp_path_factory.mktemp("drawn"), synthetic.DrawnSpec((4, 0, 0), 5, nuisance=0.5))
    return read_index(root, "celeba").scanned()


@pytest.fixture(scope="module")
def folders(drawn: FaceIndex, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same faces as folders per person without landmarks: as they are, in ArcFace's frame, and anywhere."""
    root = tmp_path_factory.mktemp("folders")
    rows = np.arange(len(drawn))
    arcface, celeba = (oracle.to_picture(oracle.render(drawn, rows, spec), spec) for spec in (ARCFACE, CELEBA))
    generator = np.random.default_rng(0)
    for row in rows.tolist():
        picture = oracle.decode(drawn.path(row))
        scale = generator.uniform(0.6, 1.4)
        small = Image.fromarray(picture).resize((round(178 * scale), round(218 * scale)), Image.Resampling.BILINEAR)
        wild = Image.new("RGB", (420, 360), (90, 110, 100))
        wild.paste(small, tuple(generator.integers(0, (420 - small.width, 360 - small.height)).tolist()))
        name = f"{drawn.labels[row]}/{row:02d}.png"
        for kind, image in (
            ("celeba", Image.fromarray(celeba[row])),
            ("arcface", Image.fromarray(arcface[row])),
            ("wild", wild),
        ):
            (root / kind / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / kind / name)
    return {kind: root / kind for kind in ("celeba", "arcface", "wild")}


class Counted(Mtcnn):
    """MTCNN that counts the pictures that it was shown, and stops after some."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.most = 0, 10**9

    def find(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        self.shown += len(pictures)
        if self.shown > self.most:
            raise KeyboardInterrupt
        return super().find(pictures)


@pytest.fixture
def detector() -> Counted:
    return Counted()


def made(image: ImageSpec, detector: Detector | None = None, detect: str = "auto", keep: bool = False) -> Locator:
    return Locator(image, detect, RUN, detector=detector, keep=keep)


def rendered(index: FaceIndex, image: ImageSpec) -> NDArray[np.float32]:
    return oracle.render(index, np.arange(len(index)), image).numpy()


# Photographs that need no detector.


def test_the_data_sets_landmarks_are_used_and_nobody_is_asked(drawn: FaceIndex) -> None:
    locate = made(ARCFACE)
    assert locate(drawn, READING) is drawn
    assert locate.done[0].way == "landmarks" and locate.detector is None
    assert locate.document() == {"how": "landmarks", "template": "arcface", "detector": ""}


@pytest.mark.parametrize("template", ["none", "auto"])
def test_models_that_take_whole_pictures_change_nothing(template: str, folders: dict[str, Path]) -> None:
    index = read_index(folders["wild"]).scanned()
    locate = made(ImageSpec(size=32, template=template))
    assert locate(index, READING) is index and locate.detector is None
    assert bool(locate.said()) == (template == "auto")  # a model that might have aligned them says that it did not


def test_without_detection_pictures_are_taken_as_they_are_and_it_says_so(folders: dict[str, Path]) -> None:
    index = read_index(folders["wild"]).scanned()
    locate = made(ARCFACE, detect="none")
    assert locate(index, READING) is index
    assert "nothing is aligned" in locate.said()[0]


def test_a_detector_that_would_change_nothing_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="detect mtcnn would change nothing"):
        made(ImageSpec(size=32, template="none"), detect="mtcnn")(read_index(folders["wild"]).scanned(), READING)


# What a sample says.


@pytest.mark.parametrize("image", [ARCFACE, NARROW])
def test_pictures_aligned_to_the_models_template_are_taken_as_they_are(
    image: ImageSpec, folders: dict[str, Path], detector: Counted, drawn: FaceIndex
) -> None:
    index = read_index(folders["arcface"]).scanned()
    locate = made(image, detector)
    assert locate(index, READING) is index
    assert locate.done[0].way == "as they are" and locate.done[0].distance < 2
    assert "are taken as they are" in locate.said()[0]
    assert abs(rendered(index, image) - rendered(drawn, image)).mean() < 0.01


def test_pictures_aligned_to_another_template_are_brought_to_the_models(
    folders: dict[str, Path], detector: Counted, drawn: FaceIndex
) -> None:
    index = read_index(folders["celeba"]).scanned()
    locate = made(NARROW, detector)
    found = locate(index, READING)
    assert locate.done[0].way == "other template" and locate.done[0].seen_template == "celeba"
    assert "aligned to celeba, not to arcface_112x96" in locate.said()[0]
    assert found.landmarks is not None
    assert np.ptp(found.landmarks, axis=0).max() == 0  # one frame for all
    difference = abs(rendered(found, NARROW) - rendered(drawn, NARROW)).mean()
    assert difference < 0.3 * abs(rendered(index, NARROW) - rendered(drawn, NARROW)).mean()


def test_photographs_are_looked_through_and_become_what_their_aligned_copies_are(
    folders: dict[str, Path], detector: Counted, drawn: FaceIndex
) -> None:
    index = read_index(folders["wild"]).scanned()
    locate = made(ARCFACE, detector)
    found = locate(index, READING)
    assert locate.done[0].way == "detected" and len(found) == len(index)
    assert found.boxes is not None and found.quality is not None and np.isfinite(found.quality).all()
    difference = abs(rendered(found, ARCFACE) - rendered(drawn, ARCFACE)).mean((1, 2, 3))
    blind = abs(rendered(index, ARCFACE) - rendered(drawn, ARCFACE)).mean((1, 2, 3))
    assert np.median(difference) < 0.25 * np.median(blind)


def test_rows_without_landmarks_beside_rows_with_them_are_looked_at(drawn: FaceIndex, detector: Counted) -> None:
    assert drawn.landmarks is not None
    lost = drawn.landmarks.copy()
    lost[[1, 3]] = np.nan
    found = made(ARCFACE, detector)(dataclasses.replace(drawn, landmarks=lost), READING)
    assert detector.shown == 2 and found.landmarks is not None
    np.testing.assert_array_equal(np.delete(found.landmarks, [1, 3], 0), np.delete(drawn.landmarks, [1, 3], 0))
    assert abs(found.landmarks[[1, 3]] - drawn.landmarks[[1, 3]]).mean() < 4


# Photographs without a face, or with several.


def test_pictures_without_a_face_are_left_out_and_named(
    folders: dict[str, Path], tmp_path: Path, detector: Counted
) -> None:
    for row, path in enumerate(sorted(folders["wild"].rglob("*.png"))[:6]):
        (tmp_path / "people/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"people/a/{row}.png").write_bytes(path.read_bytes())
    Image.new("RGB", (300, 200), (10, 90, 30)).save(tmp_path / "people/a/wall.png")
    index = read_index(tmp_path / "people").scanned()
    locate = made(ARCFACE, detector)
    assert len(locate(index, READING)) == 6
    assert locate.done[0].missing == ("a/wall.png",)
    assert "1 without a face are left out (a/wall.png)" in locate.said()[0]
    kept = made(ARCFACE, detector)(index, READING, faceless=True)
    assert len(kept) == 7 and kept.landmarks is not None and np.isnan(kept.landmarks[-1]).all()


def test_no_face_anywhere_is_refused_with_what_to_do(tmp_path: Path, detector: Counted) -> None:
    for row in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (60 + row, 50), (10, 90, 30 * row)).save(tmp_path / f"a/{row}.png")
    index = read_index(tmp_path).scanned()
    with pytest.raises(DataError, match=r"a face was found in 0 of 3 photographs .*--detect none"):
        made(ARCFACE, detector)(index, READING)
    with pytest.raises(DataError, match="no face was found in any of 3 photographs"):
        made(ARCFACE, detector, detect="mtcnn")(index, READING)
    locate = made(ARCFACE, detector)
    assert locate(index, READING, faceless=True) is index
    assert locate.said() == ["faces: none was found by mtcnn in a sample of the photographs"]


def test_pictures_of_the_models_own_size_are_taken_for_cut_out_faces_where_none_is_found(
    tmp_path: Path, detector: Counted
) -> None:
    height, width = ARCFACE.shape
    for row in range(3):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", (width, height), (10, 90, 30 * row)).save(tmp_path / f"a/{row}.png")
    index = read_index(tmp_path).scanned()
    locate = made(ARCFACE, detector)
    assert locate(index, READING) is index
    assert "the pictures have the size that the model takes" in locate.said()[0]
    found, owners = made(ARCFACE, detector).every_face(index, READING)
    assert found is index and owners.tolist() == [0, 1, 2]


def test_every_face_of_a_group_has_a_row_the_main_one_first(
    drawn: FaceIndex, tmp_path: Path, detector: Counted
) -> None:
    pictures = [oracle.decode(drawn.path(row)) for row in (0, 5, 10)]
    Image.fromarray(np.concatenate(pictures, 1)).save(tmp_path / "group.png")
    Image.new("RGB", (80, 90), (10, 90, 30)).save(tmp_path / "wall.png")
    index = read_index(tmp_path, "folder").scanned()
    locate = made(ARCFACE, detector)
    found, owners = locate.every_face(index, READING)
    assert owners.tolist() == [0, 0, 0]
    assert "1 show several faces, each of which is taken; 1 without a face" in locate.said()[0]
    assert found.landmarks is not None
    centres = found.landmarks[:, :, 0].mean(1)
    assert 178 < centres[0] < 356 and sorted((centres // 178).tolist()) == [0, 1, 2]
    upright = drawn.select([5, *(0 if left < 178 else 10 for left in centres[1:])])
    assert abs(rendered(found, ARCFACE) - rendered(upright, ARCFACE)).mean() < 0.1  # as a model is shown them


def test_pictures_that_fit_the_model_have_one_row_each(folders: dict[str, Path], detector: Counted) -> None:
    index = read_index(folders["arcface"]).scanned()
    found, owners = made(ARCFACE, detector).every_face(index, READING)
    assert found is index and owners.tolist() == list(range(len(index)))


# What was found is kept.


def test_what_was_found_is_kept_by_content_and_a_stopped_search_goes_on(
    folders: dict[str, Path], tmp_path: Path, detector: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, cache = read_index(folders["wild"]).scanned(), tmp_path / "deeper" / "faces.npz"
    rows = np.arange(len(index))
    detector.most = 12
    with pytest.raises(KeyboardInterrupt):
        find_landmarks(index, rows, detector, READING, cache)
    before, detector.shown, detector.most = detector.shown, 0, 10**9
    assert before > 0 and cache.exists()
    whole = find_landmarks(index, rows, detector, READING, cache)
    assert detector.shown == len(index) - 8  # one chunk was finished
    again = find_landmarks(index, rows[::-1], detector, READING, cache)
    assert detector.shown == len(index) - 8
    np.testing.assert_array_equal(again.landmarks[::-1], whole.landmarks)
    assert not list(cache.parent.glob(".*"))
    cache.write_bytes(cache.read_bytes()[:-40])  # damaged: looked for anew
    find_landmarks(index, rows[:2], detector, READING, cache)
    assert detector.shown == len(index) - 6


def test_copies_are_looked_at_once(folders: dict[str, Path], tmp_path: Path, detector: Counted) -> None:
    picture = next(folders["wild"].rglob("*.png")).read_bytes()
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture)
    index = read_index(tmp_path).scanned()
    found = find_landmarks(index, np.arange(3), detector, READING, None)
    assert detector.shown == 1 and np.ptp(found.landmarks, axis=0).max() == 0


def test_a_saved_index_keeps_its_faces_and_loses_those_of_changed_pictures(
    folders: dict[str, Path], tmp_path: Path, detector: Counted
) -> None:
    people = tmp_path / "people" / "a"
    people.mkdir(parents=True)
    for path in sorted(folders["wild"].rglob("*.png"))[:4]:
        (people / path.name).write_bytes(path.read_bytes())
    index = made(ARCFACE, detector)(read_index(tmp_path / "people").scanned(), READING)
    faults = index.faults.copy()
    faults[0] = NO_FACE
    dataclasses.replace(index, faults=faults).save(tmp_path / "index.npz")
    Image.fromarray(oracle.decode(index.path(2))[:, ::-1]).save(index.path(2))
    back = read_photographs(Photographs(str(tmp_path / "index.npz"), max_bad_fraction=0), READING)
    assert back.paths.tolist() == index.paths[1:].tolist()  # the one without a face is no bad file, and is left out
    assert back.landmarks is not None and index.landmarks is not None
    np.testing.assert_array_equal(back.landmarks[[0, 2]], index.landmarks[[1, 3]])
    assert np.isnan(back.landmarks[1]).all()


# Later commands.


def test_a_model_of_pictures_taken_as_they_are_takes_them_so_again() -> None:
    trained = {"how": "not aligned", "template": "arcface", "detector": ""}
    assert locator(ARCFACE, trained, "auto", RUN).detect == "none"
    assert locator(ARCFACE, trained, "mtcnn", RUN).detect == "mtcnn"
    assert locator(ARCFACE, None, "auto", RUN).detect == "auto"


def test_another_detector_than_in_training_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    locator(ARCFACE, {"how": "detected", "template": "arcface", "detector": "mtcnn-1"}, "auto", RUN)
    assert capsys.readouterr().err == ""
    locator(ARCFACE, {"how": "detected", "template": "arcface", "detector": "yunet-1-ab"}, "auto", RUN)
    assert "trained on faces found by yunet-1-ab" in capsys.readouterr().err


def test_where_no_detector_is_installed_the_refusal_says_what_can_be_done(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "facenet_pytorch", None)
    with pytest.raises(ValueError, match=r"facefast\[detect\].*--detect FILE.*--detect none"):
        made(ARCFACE)(read_index(folders["wild"]).scanned(), READING)


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = landmarks_module.cache_file("/pictures", cast(Detector, Counted))
    other = landmarks_module.cache_file("/others", cast(Detector, Counted))
    assert one.parent == tmp_path / "facefast" and one != other and Mtcnn.key in one.name
