"""YuNet (Wu et al. 2023, doi 10.1007/s11633-023-1423-y), as OpenCV runs it, from its .onnx file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from facefast.faces.found import Faces

Picture = NDArray[np.uint8]
LEAST_SCORE = 0.7


class YuNet:
    """The detector in a file; `find` may be called by several threads."""

    side = 640
    """Pixels of the long side from which on a picture is shown smaller: faces above 300 pixels are seen badly."""

    def __init__(self, weights: Path) -> None:
        """Raises:
        ValueError: OpenCV is not installed, or the file is not there or no YuNet.
        """
        try:
            import cv2
        except ImportError as error:
            raise ValueError("--detect FILE needs OpenCV: pip install 'facefast[detect]'") from error
        if not weights.is_file():
            raise ValueError(f"the detector {weights} is not there; --detect takes mtcnn, or YuNet's .onnx file")
        self._cv2, self._weights = cv2, weights
        self._own = threading.local()  # OpenCV's object keeps the size of the picture that it looks at
        self.name = weights.name
        self.key = f"yunet-1-{hashlib.blake2b(weights.read_bytes(), digest_size=8).hexdigest()}"
        try:  # OpenCV takes any network and finds out what it is when it sees the first picture
            self.find([np.zeros((64, 64, 3), np.uint8)])
        except cv2.error as error:
            raise ValueError(f"{weights} is no YuNet detector; --detect takes mtcnn, or YuNet's .onnx file") from error

    def find(self, pictures: Sequence[Picture]) -> list[Faces]:
        """Every face of each picture (uint8 [H, W, 3], RGB)."""
        return [self._find(picture) for picture in pictures]

    def _find(self, picture: Picture) -> Faces:
        network = self._network()
        network.setInputSize(picture.shape[1::-1])
        _, lines = network.detect(np.ascontiguousarray(picture[..., ::-1]))  # blue first
        if lines is None:
            return Faces.none()
        # A line is x, y, width, height, five points and a score.
        lines = lines[np.argsort(-lines[:, 14], kind="stable")].astype(np.float32)
        return Faces(lines[:, :4], lines[:, 4:14].reshape(-1, 5, 2), lines[:, 14])

    def _network(self) -> Any:
        if not hasattr(self._own, "network"):
            self._own.network = self._cv2.FaceDetectorYN.create(
                str(self._weights), "", (self.side, self.side), score_threshold=LEAST_SCORE
            )
        return self._own.network
