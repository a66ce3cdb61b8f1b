"""Where the faces of a photograph are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Detector:
    """The largest face's five landmarks, by OpenCV's YuNet (Wu et al. 2023, doi 10.1007/s11633-023-1423-y)."""

    LONG_SIDE = 640

    def __init__(self, weights: Path) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ValueError("--detect needs OpenCV: pip install 'facefast[detect]'") from error
        if not weights.is_file():
            raise ValueError(f"the detector {weights} is not there; --detect takes YuNet's .onnx file")
        self._cv2 = cv2
        try:  # OpenCV takes any network and finds out what it is when it sees the first picture
            self._yunet = cv2.FaceDetectorYN.create(str(weights), "", (self.LONG_SIDE, self.LONG_SIDE))
            self.landmarks(np.zeros((64, 64, 3), np.uint8))
        except cv2.error as error:
            raise ValueError(f"{weights} is no YuNet detector; --detect takes YuNet's .onnx file") from error

    def landmarks(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[5, 2] in pixels of `picture` (uint8 [H, W, 3], RGB), left before right as seen; NaN without a face."""
        height, width = picture.shape[:2]
        scale = min(1.0, self.LONG_SIDE / max(height, width))
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        self._yunet.setInputSize(shape)
        _, faces = self._yunet.detect(self._cv2.resize(picture[..., ::-1], shape))
        if faces is None:
            return np.full((5, 2), np.nan, np.float32)
        largest = max(faces, key=lambda face: face[2] * face[3])
        # A face is x, y, width, height, five points and a score, in pixels of the picture as it was scaled.
        points: NDArray[np.float32] = (largest[4:14].reshape(5, 2) / scale).astype(np.float32)
        return points
