"""Detectors: every face in the picture's own pixels, what is shown to them, and photographs that show none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from facefast.data import FaceIndex, oracle
from facefast.data.drawn import synthetic
from facefast.faces.detect import Detector, find_detector, look, shown
from facefast.faces.found import Faces
from facefast.faces.mtcnn import Mtcnn
from facefast.faces.yunet import YuNet
from facefast.recipe import Reading
from tests.support.graphs import face_network
from tests.support.pictures import as_taken, encode, exif, garbled_png, smooth_picture


def faces(*found: tuple[float, float, float, float, float]) -> Faces:
    """Faces by left, top, width, height and score."""
    lines = np.array(found, np.float32).reshape(-1, 5)
    landmarks = np.repeat(lines[:, None, :2], 5, axis=1)
    return Faces(lines[:, :4], landmarks, lines[:, 4])


def distance(found: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean distance of five landmarks, in distances between the eyes."""
    return float(np.linalg.norm(found - truth, axis=1).mean() / np.linalg.norm(truth[1] - truth[0]))


# Which face a picture is of.


def test_the_main_face_is_large_and_near_the_middle() -> None:
    assert faces((40, 40, 20, 20, 1), (10, 10, 10, 10, 1)).main(100, 100) == 0
    assert faces((0, 0, 24, 24, 1), (40, 40, 20, 20, 1)).main(100, 100) == 1  # larger, but in the corner
    assert faces((0, 0, 90, 90, 1), (40, 40, 20, 20, 1)).main(100, 100) == 0


def test_what_is_hardly_a_face_gives_way_to_a_sure_one() -> None:
    assert faces((25, 25, 50, 50, 0.75), (0, 0, 20, 20, 0.99)).main(100, 100) == 1
    assert faces((0, 0, 20, 20, 0.8), (25, 25, 50, 50, 0.75)).main(100, 100) == 1  # none is sure
    with pytest.raises(ValueError, match="without a face"):
        Faces.none().main(100, 100)


def test_pixels_of_a_smaller_picture_become_those_of_the_photograph() -> None:
    """Centres are whole numbers: the pixel 0 of a picture at half the size covers 0 and 1."""
    large = faces((0, 1, 10, 20, 1)).enlarged(2, 4)
    np.testing.assert_allclose(large.landmarks[0, 0], (0.5, 5.5))
    np.testing.assert_allclose(large.boxes[0], (0.5, 5.5, 20, 80))


# What a detector is shown.


def test_a_large_photograph_is_shown_smaller_and_upright() -> None:
    picture = smooth_picture(1200, 1600)
    for encoded in (encode(picture), encode(picture, "PNG")):
        seen = shown(encoded, 400)
        assert seen.shape == (300, 400, 3)
        expected = np.array(Image.fromarray(picture).resize((400, 300), Image.Resampling.BOX), float)
        assert abs(seen - expected).mean() < 2
    assert shown(encode(picture, exif=exif(6)), 400).shape == (400, 300, 3)
    assert shown(encode(smooth_picture(30, 40)), 400).shape == (30, 40, 3)  # never larger
    assert shown(encode(smooth_picture(1, 900)), 400).shape == (1, 400, 3)
    with pytest.raises(ValueError, match="more than the 100 allowed"):
        shown(encode(picture), 400, max_pixels=100)


class Corners:
    """Stands for a detector: a face at the upper left pixel of every picture that is not black."""

    name, key, side = "corners", "corners-1", 50

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def find(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Faces]:
        self.shapes += [picture.shape for picture in pictures]
        return [faces((0, 0, 1, 1, 1)) if picture.any() else Faces.none() for picture in pictures]


def test_answers_come_in_order_in_the_photographs_pixels_whatever_the_threads(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.jpg").write_bytes(encode(smooth_picture(100, 60 + 10 * number, number)))
    (tmp_path / "03.jpg").write_bytes(encode(np.zeros((40, 40, 3), np.uint8), "PNG"))
    (tmp_path / "05.jpg").write_bytes(garbled_png())
    index = FaceIndex.build(tmp_path, [b"%02d.jpg" % number for number in range(20)], None, ()).scanned()
    rows = np.array([7, 3, 5, *range(8, 20)])
    for threads in (1, 3):
        detector = Corners()
        seen = list(look(index, rows, cast(Detector, detector), Reading(threads)))
        assert [each.row for each in seen] == rows.tolist()
        assert seen[2].faces is None and seen[2].picture is None
        assert seen[1].faces is not None and len(seen[1].faces) == 0
        assert max(max(shape) for shape in detector.shapes) == 50
        first = seen[0].faces  # 130 x 100 pixels, seen as 50 x 38
        assert first is not None
        np.testing.assert_allclose(first.landmarks[0, 0], (0.5 * 130 / 50 - 0.5, 0.5 * 100 / 38 - 0.5), rtol=1e-5)
    assert list(look(index, rows[:0], cast(Detector, Corners()), Reading(1))) == []


# Detectors that there are not.


def test_without_their_packages_the_error_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    for name in ("auto", "mtcnn", str(tmp_path / "yunet.onnx")):
        with pytest.raises(ValueError, match=r"pip install 'facefast\[detect\]'"):
            find_detector(name)


def test_a_detector_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.onnx", tmp_path):  # a folder is none either
        with pytest.raises(ValueError, match=f"the detector {path} is not there; --detect takes mtcnn, or YuNet's"):
            find_detector(str(path))


def test_a_network_that_is_no_detector_is_refused(tmp_path: Path) -> None:
    """OpenCV opens another network and answers something: what it is shows in the first picture only."""
    (tmp_path / "yunet.onnx").write_bytes(b"not a network")
    onnx.save(face_network(), tmp_path / "embedder.onnx")
    for name in ("yunet", "embedder"):
        with pytest.raises(ValueError, match=rf"{name}\.onnx is no YuNet detector"):
            YuNet(tmp_path / f"{name}.onnx")


# YuNet's answers, with OpenCV's object replaced.


class Found:
    """Stands for OpenCV's detector: it notes what it was asked and answers with given lines."""

    def __init__(self, lines: NDArray[np.float32] | None) -> None:
        self.lines = lines

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, picture: NDArray[np.uint8]) -> tuple[int, NDArray[np.float32] | None]:
        assert picture.shape[1::-1] == self.size
        self.seen = picture
        return 1, self.lines


def yunet_with(lines: NDArray[np.float32] | None, monkeypatch: pytest.MonkeyPatch) -> tuple[YuNet, Found]:
    detector, network = YuNet.__new__(YuNet), Found(lines)
    monkeypatch.setattr(detector, "_cv2", cv2, raising=False)
    monkeypatch.setattr(detector, "_network", lambda: network)
    return detector, network


def test_yunet_is_shown_blue_first_and_its_lines_are_read_the_surest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    line = np.arange(15, dtype=np.float32)
    detector, network = yunet_with(np.stack([line, line + 1]), monkeypatch)
    (found,) = detector.find([np.zeros((30, 40, 3), np.uint8) + np.array([200, 0, 50], np.uint8)])
    assert network.size == (40, 30) and network.seen[0, 0].tolist() == [50, 0, 200]
    assert found.scores.tolist() == [15, 14]
    assert found.boxes[1].tolist() == [0, 1, 2, 3]
    assert found.landmarks[1].tolist() == [[4, 5], [6, 7], [8, 9], [10, 11], [12, 13]]
    nobody, _ = yunet_with(None, monkeypatch)
    assert len(nobody.find([np.zeros((8, 8, 3), np.uint8)])[0]) == 0


# MTCNN on drawn faces, whose landmarks are known.


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> FaceIndex:
    from facefast.data import read_index

    root = synthetic.write(tmp_path_factory.mktemp("drawn"), synthetic.DrawnSpec((3, 0, 0), 4, nuisance=0.5))
    return read_index(root, "celeba").scanned()


@pytest.fixture(scope="module")
def mtcnn() -> Mtcnn:
    return Mtcnn()


def pictures_of(index: FaceIndex, *rows: int) -> list[NDArray[np.uint8]]:
    return [oracle.decode(index.path(row)) for row in rows]


def test_mtcnn_finds_drawn_faces_where_they_are(mtcnn: Mtcnn, drawn: FaceIndex) -> None:
    assert drawn.landmarks is not None
    for row, found in enumerate(mtcnn.find(pictures_of(drawn, *range(len(drawn))))):
        main = found.main(178, 218)
        assert distance(found.landmarks[main], drawn.landmarks[row]) < 0.15
        left, top, width, height = found.boxes[main]
        inside = (found.landmarks[main] - (left, top)) / (width, height)
        assert inside.min() > 0 and inside.max() < 1


def test_mtcnn_finds_every_face_of_a_group_in_any_shape_of_picture(mtcnn: Mtcnn, drawn: FaceIndex) -> None:
    group = np.concatenate(
        [np.concatenate(pictures_of(drawn, 0, 4, 8), 1), np.concatenate(pictures_of(drawn, 1, 5, 9), 1)]
    )
    small = np.array(Image.fromarray(group).resize((400, 330), Image.Resampling.BILINEAR))
    for picture, scale in ((group, (1.0, 1.0)), (small, (400 / 534, 330 / 436))):
        (found,) = mtcnn.find([picture])
        assert len(found) == 6
        assert drawn.landmarks is not None
        for place, row in enumerate((0, 4, 8, 1, 5, 9)):
            offset = np.array([place % 3 * 178, place // 3 * 218])
            truth = (drawn.landmarks[row] + offset) * scale
            assert min(distance(face, truth) for face in found.landmarks) < 0.2


def test_what_mtcnn_finds_in_a_picture_does_not_depend_on_its_neighbours(mtcnn: Mtcnn, drawn: FaceIndex) -> None:
    pictures = pictures_of(drawn, 0, 1, 2)
    pictures.insert(1, np.concatenate(pictures, 1))
    together = mtcnn.find(pictures)
    for picture, found in zip(pictures, together, strict=True):
        (alone,) = mtcnn.find([picture])
        np.testing.assert_allclose(alone.landmarks, found.landmarks, atol=0.05)
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=0.05)


def test_pictures_without_a_face_or_too_small_for_one_give_none(mtcnn: Mtcnn) -> None:
    pictures = [np.full((*shape, 3), 128, np.uint8) for shape in ((100, 80), (1, 1), (3, 900), (40, 40))]
    assert [len(found) for found in mtcnn.find(pictures)] == [0, 0, 0, 0]
    assert mtcnn.find([]) == []


# From here on: the real detectors on real photographs.


@pytest.mark.parametrize("name", ["mtcnn", "yunet"])
def test_real_faces_are_found_where_another_detector_found_them(name: str, celeba: Path, shared_weights: Path) -> None:
    detector = find_detector("mtcnn" if name == "mtcnn" else str(shared_weights / "face_detection_yunet.onnx"))
    paths, truths = as_taken(celeba)
    index = FaceIndex.build("/", [bytes(path.resolve())[1:] for path in paths], None, ()).scanned()
    distances = []
    for seen, truth in zip(look(index, np.arange(len(index)), detector, Reading(1)), truths, strict=True):
        assert seen.faces is not None
        distances.append(min(distance(face, truth) for face in seen.faces.landmarks))
    assert max(distances) < {"mtcnn": 0.15, "yunet": 0.25}[name]  # with left and right exchanged it would be about 1
