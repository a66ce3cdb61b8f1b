"""What the model sees: the pictures' size, alignment and normalisation, and how training varies them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class ImageSpec:
    """What the model sees: the only place where preprocessing is written down."""

    size: int = 0
    """Height in pixels (and width, unless `width` says otherwise); 0 is the source model's, or 112."""
    width: int = 0
    """Width in pixels; 0 means square."""
    template: str = "auto"
    """Alignment template: arcface, arcface_112x96, celeba, none; auto is arcface where the index has landmarks."""
    mean: RGB = (127.5, 127.5, 127.5)
    """Subtracted from 0..255 values, in the order of `color`."""
    std: RGB = (127.5, 127.5, 127.5)
    """Divided by after `mean`, in the order of `color`."""
    color: Literal["rgb", "bgr"] = "rgb"
    """Channel order that the model was trained with."""

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("width", self.width)):
            if value != 0 and not 8 <= value <= 4096:
                raise ValueError(f"image.{name} is {value}; it must be 0 or lie in [8, 4096] pixels")
        if min(self.std) <= 0:
            raise ValueError(f"image.std is {self.std}; every value must be above 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        assert self.size > 0, "the image size is not settled yet"
        return self.size, self.width or self.size

    def settled(self, contract: ImageSpec | None = None, fixed: Collection[str] = frozenset()) -> ImageSpec:
        """This specification with what was left open taken from a source model.

        Args:
            contract: the pictures that the source model was trained on.
            fixed: fields of it that the weights depend on.

        Raises:
            ValueError: a value typed by the user contradicts a fixed one.
        """
        if contract is None:
            return dataclasses.replace(self, size=self.size or 112)
        # A field at its default counts as left open: a default that was typed cannot be told from one that was not.
        default, values = ImageSpec(), {}
        for f in dataclasses.fields(self):
            typed, theirs = getattr(self, f.name), getattr(contract, f.name)
            values[f.name] = theirs if typed == getattr(default, f.name) else typed
            if values[f.name] != theirs and f.name in fixed:
                raise ValueError(
                    f"image.{f.name} is {typed}, but the source model was trained with {theirs}; "
                    f"leave image.{f.name} out, or choose another model.source"
                )
        return ImageSpec(**values)


@dataclass(frozen=True)
class AugmentSpec:
    """How a training picture is varied; every strength at 0 leaves the aligned picture alone."""

    crop: float = 0.0
    """Random resized crop: the kept area is drawn from [1 - crop, 1] of the frame."""
    crop_ratio: float = 0.0
    """The crop's aspect ratio is drawn log-uniformly from [1/(1+r), 1+r] times the frame's."""
    shift: float = 0.0
    """Random shift of the frame, as a fraction of its side, each way."""
    flip: float = 0.0
    """Probability of a mirror image."""
    rotation: float = 0.0
    """Degrees each way."""
    brightness: float = 0.0
    """Factor drawn from [1 - b, 1 + b]."""
    contrast: float = 0.0
    """Factor drawn from [1 - c, 1 + c], about mid grey."""
    saturation: float = 0.0
    """Factor drawn from [1 - s, 1 + s]."""
    hue: float = 0.0
    """Rotation of the hue circle drawn from [-h, h], in turns (0.5 is half a turn)."""
    grey: float = 0.0
    """Probability of a grey picture."""
    erase: float = 0.0
    """Probability of an erased rectangle (random erasing, Zhong et al. 2017)."""
    erase_area: tuple[float, float] = (0.02, 0.2)
    """Least and greatest part of the picture that is erased."""

    def __post_init__(self) -> None:
        for name in ("crop", "flip", "grey", "erase", "shift", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augment.hue is {self.hue}; it must lie in [0, 0.5]")
        if self.rotation < 0 or self.rotation > 180:
            raise ValueError(f"augment.rotation is {self.rotation}; it must lie in [0, 180] degrees")
        if self.crop >= 1 or self.crop_ratio < 0:
            raise ValueError("augment.crop must be below 1 and augment.crop_ratio at least 0")
        low, high = self.erase_area
        if not 0 < low <= high < 1:
            raise ValueError(f"augment.erase_area is {self.erase_area}; it must rise within (0, 1)")

    @property
    def active(self) -> bool:
        """Whether any strength is above 0."""
        return any(value > 0 for name, value in dataclasses.asdict(self).items() if name not in ("erase_area",))
