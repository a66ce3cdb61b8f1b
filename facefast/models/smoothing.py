"""A Gaussian blur of the pictures ahead of a network, of lightness and colour apart: noise and the blocks of strong
compression go, and with them detail that such pictures hardly have. Colour bears more blur than lightness: a face is
known nearly as well without any, and JPEG keeps less of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from facefast.recipe import ImageSpec
from facefast.recipe.phase import MOST_BLUR

LIGHTNESS = (0.299, 0.587, 0.114)
"""Of red, green and blue in luma (ITU-R BT.601), as JPEG takes it."""
REFERENCE = 112
"""Height in pixels of the pictures that deviations are given for."""
REACH = 4.0
"""Deviations beyond which the blur's weights are 0: the rest is less than a level of 255."""


class Deviations(NamedTuple):
    """Standard deviations of a blur in pixels of a picture 112 high; 0 leaves as it is."""

    luma: float
    chroma: float


def blur_matrix(length: int, deviation: float) -> Tensor:
    """[length, length] float32 which, times a column of pixels, blurs it; ends are mirrored about the last pixel."""
    if not deviation:
        return torch.eye(length)
    reach = max(1, math.ceil(REACH * deviation))
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / deviation).square())
    weights /= weights.sum()
    period = max(1, 2 * (length - 1))
    places = (torch.arange(length)[:, None] + offsets) % period
    places = torch.minimum(places, period - places)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, places, weights.expand(length, -1)).float()


class Smoothing(nn.Module):
    """Blurs normalised pictures [B, 3, H, W]; it holds no weights.

    Args:
        image: the pictures.
        deviations: how far.

    Raises:
        ValueError: a deviation is not in [0, 16].
    """

    spread: Tensor
    share: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, image: ImageSpec, deviations: Deviations) -> None:
        super().__init__()
        if not all(0 <= deviation <= MOST_BLUR for deviation in deviations):
            raise ValueError(f"deviations of a blur are {list(deviations)}; each must lie in [0, {MOST_BLUR:g}]")
        self.deviations = deviations
        scale = image.shape[0] / REFERENCE
        of_luma, of_chroma = (
            [blur_matrix(length, deviation * scale) for length in image.shape] for deviation in deviations
        )
        share = torch.tensor(LIGHTNESS if image.color == "rgb" else LIGHTNESS[::-1])
        buffers = {
            "spread": torch.tensor(image.std).view(1, 3, 1, 1),
            "share": share.view(1, 3, 1, 1),
            # Lightness, then three channels of colour: all in one product for each direction.
            "rows": torch.stack([of_luma[0]] + 3 * [of_chroma[0]]),
            "columns": torch.stack([of_luma[1]] + 3 * [of_chroma[1]]),
        }
        for name, values in buffers.items():  # none of them is a weight: model.json holds the deviations
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to the same, of the same type."""
        kind = images.device.type
        if torch.is_autocast_enabled(kind):  # in 16 bits, weights that no longer add up to 1 would dim the picture
            with torch.autocast(kind, enabled=False):
                return self._smoothed(images.float()).to(images.dtype)
        return self._smoothed(images)

    def _smoothed(self, images: Tensor) -> Tensor:
        levels = images * self.spread  # the mean is still subtracted; a blur does not change it
        light = (levels * self.share).sum(1, keepdim=True)
        planes = torch.cat([light, levels - light], 1)
        # Both matrices on the right, where runtimes look for a layer's constants.
        planes = ((planes @ self.columns.mT).mT @ self.rows.mT).mT
        return (planes[:, 1:] + planes[:, :1]) / self.spread

    def to_json(self) -> dict[str, float]:
        """For model.json."""
        return self.deviations._asdict()

    @classmethod
    def from_json(cls, image: ImageSpec, document: Any) -> Smoothing:
        """The layer that `to_json` describes.

        Raises:
            ValueError: it is something else.
        """
        if (
            not isinstance(document, dict)
            or set(document) != set(Deviations._fields)
            or not all(type(value) in (int, float) for value in document.values())
        ):
            fields = " and ".join(Deviations._fields)
            raise ValueError(f"model.json: smoothing is {document!r:.80}; it must give {fields}")
        return cls(image, Deviations(**document))
