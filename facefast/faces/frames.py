"""Whether photographs are aligned, and to what: landmarks of a sample against a template and against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from facefast.data.augment import TEMPLATES, frame_points
from facefast.recipe import ImageSpec

Floats = NDArray[np.float64]
NEAR = 2.5
"""Template pixels (of ArcFace's 112) that half of the aligned faces lie within: aligned ones measure 1.0 to 1.3, crops
around a detector's box 6, photographs 38."""
FAR = 5.0
"""Template pixels that nine of ten lie within."""
FEWEST = 8
"""Faces that tell whether pictures are aligned to something that is not ours."""


@dataclass(frozen=True)
class Frame:
    """What a sample of photographs shows."""

    kind: Literal["ours", "other", "none"]
    """Aligned to the model's template as they are; aligned to something else; not aligned."""
    name: str
    """The template's, where it is known."""
    points: Floats | None
    """[5, 2] where the landmarks of pictures that are aligned to something else lie, as parts of width and height."""
    off: float
    """Median distance from the model's template, in template pixels."""
    spread: float
    """Median distance from the sample's own middle, in template pixels."""


def recognise(landmarks: NDArray[np.float32], sizes: NDArray[np.int64], image: ImageSpec) -> Frame:
    """What the faces of a sample say.

    Args:
        landmarks: [n, 5, 2] of the main face in pixels, without NaN; n at least 1.
        sizes: [n, 2] width and height of the upright pictures.
        image: what the model takes.
    """
    faces = _complex(landmarks.astype(np.float64) + 0.5)
    # Where the model would look if the pictures were taken as they are.
    ours = np.stack([frame_points(image.template, *image.shape, width, height) for width, height in sizes.tolist()])
    off = distances(ours, faces)
    middle = np.median((landmarks.astype(np.float64) + 0.5) / sizes[:, None], axis=0)
    apart = distances(_complex(middle * sizes[:, None]), faces)
    found = float(np.median(off)), float(np.median(apart))
    if _close(off):
        return Frame("ours", image.template, None, *found)
    if len(faces) >= FEWEST and _close(apart):
        return Frame("other", _name(middle, sizes), middle, *found)
    return Frame("none", "", None, *found)


def distances(expected: NDArray[Any], faces: NDArray[Any]) -> Floats:
    """[n] mean distance, in template pixels, by which expected points move when they are fitted to a face.

    The fit is a similarity, as alignment is: an expression or a profile moves single landmarks, not the frame.

    Args:
        expected, faces: [n, 5] complex, in pixels of the pictures.
    """
    factor, offset = _similarity(expected, faces)
    moved = abs(factor[:, None] * expected + offset[:, None] - expected).mean(1)
    template = np.array([complex(*point) for point in TEMPLATES["arcface"].points])
    scale, _ = _similarity(np.broadcast_to(template, faces.shape), faces)
    return np.asarray(moved / abs(scale))


def _similarity(source: NDArray[Any], target: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(factor, offset) of the least-squares similarity of complex points [n, 5]."""
    a, b = source - source.mean(1, keepdims=True), target - target.mean(1, keepdims=True)
    factor = (a.conj() * b).sum(1) / np.maximum((abs(a) ** 2).sum(1), 1e-12)
    return factor, target.mean(1) - factor * source.mean(1)


def _close(moved: Floats) -> bool:
    return bool(np.median(moved) <= NEAR and np.quantile(moved, 0.9) <= FAR)


def _name(middle: Floats, sizes: NDArray[np.int64]) -> str:
    """The known template whose points these are, in pictures of its own shape; "" for none."""
    width, height = np.median(sizes, axis=0)
    for name, template in TEMPLATES.items():
        points = (np.array(template.points) + 0.5) / (template.width, template.height) * (width, height)
        same_shape = abs(width / height - template.width / template.height) < 0.02
        if same_shape and distances(_complex(points[None]), _complex((middle * (width, height))[None]))[0] <= NEAR:
            return name
    return ""


def _complex(points: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(points[..., 0] + 1j * points[..., 1])
