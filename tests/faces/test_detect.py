"""Where faces are: the largest one's landmarks in the picture's own pixels, and nothing where there is no face."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from facefast.data import oracle
from facefast.faces.detect import Detector
from tests.support.graphs import face_network
from tests.support.pictures import as_taken

# What is asked of the detector, and what becomes of its answer.


class Found:
    """Stands for OpenCV's detector: it notes what it was asked and answers with given faces."""

    def __init__(self) -> None:
        self.faces: NDArray[np.float32] | None = None
        self.size = (0, 0)
        self.seen: NDArray[np.uint8] = np.zeros((0, 0, 3), np.uint8)

    def setInputSize(self, size: tuple[int, int]) -> None:
        self.size = size

    def detect(self, picture: NDArray[np.uint8]) -> tuple[int, NDArray[np.float32] | None]:
        assert picture.shape[1::-1] == self.size
        self.seen = picture
        return 1, self.faces


@pytest.fixture
def opencv() -> Found:
    return Found()


@pytest.fixture
def detector(opencv: Found) -> Detector:
    made = Detector.__new__(Detector)
    made._cv2, made._yunet = cv2, cast(Any, opencv)
    return made


def faces(*found: tuple[float, float, float]) -> NDArray[np.float32]:
    """YuNet's lines by left, width and height of a box: box, five landmarks, the k-th at (left + k, 10 k), score."""
    return np.array(
        [
            [left, 0, width, height, *(value for k in range(5) for value in (left + k, 10 * k)), 0.9]
            for left, width, height in found
        ],
        np.float32,
    )


def black(height: int, width: int) -> NDArray[np.uint8]:
    return np.zeros((height, width, 3), np.uint8)


def test_a_picture_is_shown_as_opencv_wants_it_and_no_larger_than_needed(detector: Detector, opencv: Found) -> None:
    detector.landmarks(black(300, 400) + np.array([200, 0, 50], np.uint8))
    assert opencv.size == (400, 300)  # small enough as it is
    assert opencv.seen[0, 0].tolist() == [50, 0, 200]  # blue first
    for shape, size in (((960, 1280), (640, 480)), ((2560, 640), (160, 640)), ((3, 6400), (640, 1)), ((1, 1), (1, 1))):
        detector.landmarks(black(*shape))
        assert opencv.size == size


def test_landmarks_are_brought_back_to_the_pictures_own_pixels(detector: Detector, opencv: Found) -> None:
    opencv.faces = faces((100, 50, 50))
    expected = np.array([[100 + k, 10 * k] for k in range(5)], np.float32)
    np.testing.assert_array_equal(detector.landmarks(black(480, 640)), expected)
    found = detector.landmarks(black(960, 1280))
    np.testing.assert_array_equal(found, 2 * expected)
    assert found.dtype == np.float32


def test_the_largest_face_is_that_with_the_largest_box_in_any_order(detector: Detector, opencv: Found) -> None:
    boxes = [(1, 10, 90), (2, 31, 30), (3, 40, 2)]
    for order in (boxes, boxes[::-1], boxes[1:] + boxes[:1]):
        opencv.faces = faces(*order)
        assert detector.landmarks(black(100, 100))[0].tolist() == [2, 0]


def test_where_there_is_no_face_nothing_is_made_up(detector: Detector) -> None:
    found = detector.landmarks(black(100, 100))
    assert found.shape == (5, 2) and np.isnan(found).all()


# Detectors that there are not.


def test_without_opencv_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install 'facefast\[detect\]'"):
        Detector(tmp_path / "yunet.onnx")


def test_a_detector_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.onnx", tmp_path):  # a folder is none either
        with pytest.raises(ValueError, match=f"the detector {path} is not there; --detect takes YuNet's .onnx file"):
            Detector(path)


def test_a_network_that_is_no_detector_is_refused(tmp_path: Path) -> None:
    (tmp_path / "yunet.onnx").write_bytes(b"not a network")
    with pytest.raises(ValueError, match=r"yunet\.onnx is no YuNet detector"):
        Detector(tmp_path / "yunet.onnx")


def test_another_network_is_no_detector(tmp_path: Path) -> None:
    """OpenCV opens it and answers something: what it is shows in the first picture only."""
    onnx.save(face_network(), tmp_path / "embedder.onnx")
    with pytest.raises(ValueError, match=r"embedder\.onnx is no YuNet detector"):
        Detector(tmp_path / "embedder.onnx")


# From here on: the real detector on real photographs.


@pytest.fixture(scope="module")
def yunet(shared_weights: Path) -> Path:
    return shared_weights / "face_detection_yunet.onnx"


@pytest.fixture(scope="module")
def wild(celeba: Path) -> tuple[list[Path], NDArray[np.float32]]:
    """Six photographs as they were taken, and the landmarks that another detector found on them."""
    return as_taken(celeba)


def distance(found: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean distance of five landmarks, in distances between the eyes."""
    return float(np.linalg.norm(found - truth, axis=1).mean() / np.linalg.norm(truth[1] - truth[0]))


def test_landmarks_come_in_the_pictures_own_pixels_left_before_right(
    yunet: Path, wild: tuple[list[Path], NDArray[np.float32]]
) -> None:
    detector = Detector(yunet)
    distances = []
    for path, truth in zip(*wild, strict=True):
        picture = oracle.decode(path)
        found = detector.landmarks(picture)
        distances.append(distance(found, truth))
        large = np.array(Image.fromarray(picture).resize((picture.shape[1] * 3, picture.shape[0] * 3)))
        if np.isfinite(found).all():  # seen smaller than it is, and still in its own pixels
            assert distance(detector.landmarks(large) / np.float32(3), found) < 0.1
    distances = [value for value in distances if np.isfinite(value)]
    assert len(distances) >= 5
    assert max(distances) < 0.25  # with left and right exchanged it would be about 1


def test_the_largest_of_several_faces_is_taken(yunet: Path, wild: tuple[list[Path], NDArray[np.float32]]) -> None:
    face = Image.open(wild[0][0]).convert("RGB")
    size = (face.width // 2, face.height // 2)
    scene = Image.new("RGB", (face.width + size[0], face.height), (128, 128, 128))
    scene.paste(face.resize(size), (0, 0))
    scene.paste(face, (size[0], 0))
    detector = Detector(yunet)
    alone = detector.landmarks(np.array(face))
    assert distance(detector.landmarks(np.array(scene)) - (size[0], 0), alone) < 0.3  # the other one is 4 away
    mirrored = np.array(scene)[:, ::-1]  # the large one comes first
    expected = alone * (-1, 1) + (face.width - 1, 0)
    assert distance(detector.landmarks(mirrored)[[1, 0, 2, 4, 3]], expected) < 0.3


def test_a_picture_without_a_face_has_no_landmarks(yunet: Path) -> None:
    detector = Detector(yunet)
    for shape in ((100, 80), (1, 1), (3, 900)):
        assert np.isnan(detector.landmarks(np.full((*shape, 3), 128, np.uint8))).all()
