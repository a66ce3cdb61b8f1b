"""How well a face can be seen: size, sharpness, pose and the detector's score, a column each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facefast.data.augment import TEMPLATES
from facefast.recipe.ranges import MOST, require

Floats = NDArray[np.float64]
_TEMPLATE = TEMPLATES["arcface"]
SEEN_AT = round(_TEMPLATE.width)
"""Pixels on a side at which `Limits` judge sharpness: what most models see of a face."""
_DEPTHS = (0.0, 0.0, 19.0, 4.0, 4.0)
"""How far the five points stand out towards the camera, in the template's pixels: the tip of a nose is about 34 mm in
front of the eyes, which are 62 mm apart."""
_SHARPNESS_SIDE = 128
"""Pixels on a side that a face is brought to before its sharpness is measured: of what a model sees of it."""


@dataclass(frozen=True)
class Limits:
    """What a face must have to be known again by.

    Of 4950 photographs of CelebA 0.9 % are turned further, and none of 900 is less sharp. A blur of 2.5 pixels at 112,
    which costs a MobileFaceNet nine names in a hundred, leaves a sharpness below 11 in 99 of 100 pictures. Past 50
    degrees one eye is all but hidden, and one name in ten is wrong.
    """

    size: float = 40
    """Least pixels on a side of the face in its photograph, and of the photograph."""
    sharpness: float = 12
    """Least variance of the Laplacian of the face at 112 pixels, in grey levels squared; 0 takes blurred ones."""
    yaw: float = 50
    """Most degrees that the head is turned to the side; 180 takes profiles."""
    pitch: float = 50
    """Most degrees that it is turned up or down."""

    def __post_init__(self) -> None:
        require(self, size=(0, MOST), sharpness=(0, MOST), yaw=(0, 180), pitch=(0, 180))

    def objections(self, sizes: Floats, sharpnesses: Floats, angles: Floats) -> list[str]:
        """What speaks against each of N faces, in words; empty for good ones, and where nothing is known.

        Args:
            sizes: [N] pixels on a side.
            sharpnesses: [N] of the face at 112 pixels.
            angles: [N, 3] of `poses`.
        """
        found = []
        for size, sharp, (yaw, pitch, _) in zip(sizes.tolist(), sharpnesses.tolist(), angles.tolist(), strict=True):
            why = ""
            if size < self.size:
                why = f"its face has {size:.0f} pixels on a side, {self.size:g} are needed"
            elif sharp < self.sharpness:
                why = f"it is blurred: a sharpness of {sharp:.1f}, {self.sharpness:g} is needed"
            elif abs(yaw) > self.yaw:
                why = f"it is a profile: the head is turned by {abs(yaw):.0f} degrees, at most {self.yaw:g} are taken"
            elif abs(pitch) > self.pitch:
                way = "up" if pitch > 0 else "down"
                why = f"it looks {way} by {abs(pitch):.0f} degrees, at most {self.pitch:g} are taken"
            found.append(why)
        return found


def qualities(
    landmarks: NDArray[np.float32], scores: NDArray[np.float32], sharpness: NDArray[np.float32]
) -> NDArray[np.float32]:
    """[N, 6], the columns of `facefast.data.index.QUALITIES`; NaN where the landmarks [N, 5, 2] are."""
    sizes, angles = face_sizes(landmarks), poses(landmarks)
    return np.column_stack([sizes, sharpness, angles, scores]).astype(np.float32)


def face_sizes(landmarks: NDArray[Any]) -> Floats:
    """[N] pixels on a side of the square that ArcFace's frame covers in the photograph.

    A model whose pictures have more pixels is shown an enlarged face.
    """
    points, model = _centred(landmarks), _centred(np.array(_TEMPLATE.points)[None])
    # The factor of the least-squares similarity from the template to the face, whatever its turn.
    source = model[..., 0] + 1j * model[..., 1]
    target = points[..., 0] + 1j * points[..., 1]
    return np.asarray(abs((source.conj() * target).sum(1)) / (abs(source) ** 2).sum() * _TEMPLATE.width)


def poses(landmarks: NDArray[Any]) -> Floats:
    """[N, 3] yaw, pitch and roll in degrees, from five landmarks by a scaled orthographic camera.

    Yaw is above 0 where the face looks to the right of the picture, pitch where it looks up, roll where it is turned
    clockwise as seen. Five points give them to some five degrees: enough to tell a profile from a portrait.
    """
    points = _centred(landmarks).astype(np.float64)
    model = np.column_stack([np.array(_TEMPLATE.points), -np.array(_DEPTHS)])  # z points away from the camera
    model -= model.mean(0)
    rows = np.einsum("nkc,kd->ncd", points, np.linalg.pinv(model).T)  # [N, 2, 3], the two rows of scale * rotation
    known = np.isfinite(rows).all((1, 2))
    angles = np.full((len(points), 3), np.nan)
    left, _, right = np.linalg.svd(rows[known], full_matrices=False)
    first, second = np.moveaxis(left @ right, 1, 0)  # the nearest rows of length 1 at right angles
    third = np.cross(first, second)
    # Rotation = roll about z after yaw about y after pitch about x.
    angles[known, 0] = np.degrees(np.arcsin(np.clip(third[:, 0], -1, 1)))
    angles[known, 1] = np.degrees(np.arctan2(-third[:, 1], third[:, 2]))
    angles[known, 2] = np.degrees(np.arctan2(second[:, 0], first[:, 0]))
    return angles


def sharpness(picture: NDArray[np.uint8], box: NDArray[np.float32]) -> float:
    """Variance of the Laplacian of the face's luma at 128 x 128 pixels, in grey levels squared.

    Below about 30 a face is blurred, or too small for the model. NaN where the box lies outside the picture.

    Args:
        picture: uint8 [H, W, 3].
        box: x, y, width and height.
    """
    height, width = picture.shape[:2]
    left, top = np.floor(np.maximum(box[:2] + 0.5, 0)).astype(int)
    right, bottom = np.ceil(np.minimum(box[:2] + 0.5 + box[2:], (width, height))).astype(int)
    if right <= left or bottom <= top:
        return float("nan")
    face = Image.fromarray(np.ascontiguousarray(picture[top:bottom, left:right])).convert("L")
    grey = np.asarray(face.resize((_SHARPNESS_SIDE, _SHARPNESS_SIDE), Image.Resampling.BILINEAR), np.float32)
    return float(laplacian_variances(grey[None])[0])


def laplacian_variances(grey: NDArray[np.float32]) -> Floats:
    """[N] variance of the Laplacian of pictures [N, H, W], in grey levels squared."""
    inner, rows, columns = grey[:, 1:-1, 1:-1], grey[:, :, 1:-1], grey[:, 1:-1, :]
    edges = rows[:, :-2] + rows[:, 2:] + columns[:, :, :-2] + columns[:, :, 2:] - 4 * inner
    return np.asarray(edges.var((1, 2)), np.float64)


def _centred(landmarks: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(landmarks - landmarks.mean(1, keepdims=True))
