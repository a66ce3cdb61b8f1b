"""Makes sets of photographs as another camera would have taken them, from a folder in CelebA's layout.

    python benchmarks/shifted.py --root CELEBA --out DIR [--kinds grey small blur jpeg all] [--strength 1]
    python benchmarks/shifted.py --root CELEBA --out DIR --kinds fog dark motion hot

Each kind is a folder DIR/KIND in the same layout, with the same names, people and landmarks; what changes is how the
pictures look. Every picture's noise comes from its name: the command makes the same files again. With a strength below
1 the folder is DIR/KIND@STRENGTH, and the pictures lie between the photographs and what strength 1 makes of them: blur,
noise, paths and hot pixels are so much of theirs; height, JPEG quality, contrast and light lie so far on the way down
to theirs on a logarithmic scale. Grey is grey at any strength.
"""

from __future__ import annotations

import argparse
import io
import shutil
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = NDArray[np.uint8]
SMALL = 28
"""Height in pixels of the whole picture, of which a model is shown 16, from above the eyes to below the chin."""
BLUR, NOISE = 2.5, 16.0
"""Standard deviations: of the blur in pixels of the 218 high pictures, of the noise in levels of 255."""
BEST, QUALITY = 95, 6
HAZE, CONTRAST = 204.0, 0.12
"""The level of what veils a picture, and the part of its own contrast that is left."""
LIGHT, ELECTRONS, GAMMA = 0.04, 800, 2.2
"""The part of the light that is left, and the electrons that white is of in all of it: their number is random."""
PATH = 12.0
"""Pixels of the 218 high pictures that the camera moves along while it looks."""
HOT = 0.1
"""The part of the pixels that is black or white."""
ALIGNED = "img_align_celeba"


def grey(picture: Picture, seed: int, strength: float) -> Picture:
    """One channel three times."""
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def small(picture: Picture, seed: int, strength: float) -> Picture:
    """As from a camera whose pictures are 28 pixels high, made large again."""
    height, width = picture.shape[:2]
    factor = (SMALL / height) ** strength
    size = (round(width * factor), round(height * factor))
    tiny = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(tiny, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def blur(picture: Picture, seed: int, strength: float) -> Picture:
    """Out of focus and in the dark: Gaussian blur, then Gaussian noise."""
    noise = np.random.Generator(np.random.Philox(seed)).normal(0, strength * NOISE, picture.shape)
    blurred = cv2.GaussianBlur(picture, (0, 0), strength * BLUR).astype(np.float64)
    return np.clip(np.rint(blurred + noise), 0, 255).astype(np.uint8)


def jpeg(picture: Picture, seed: int, strength: float) -> Picture:
    """Compressed to a few hundred bytes."""
    held = io.BytesIO()
    Image.fromarray(picture).save(held, "JPEG", quality=round(BEST * (QUALITY / BEST) ** strength))
    return np.asarray(Image.open(held).convert("RGB"))


def everything(picture: Picture, seed: int, strength: float) -> Picture:
    """Grey and small, with noise, compressed."""
    for change in (grey, small, blur, jpeg):
        picture = change(picture, seed, strength)
    return picture


def fog(picture: Picture, seed: int, strength: float) -> Picture:
    """Through haze or a dirty pane: hardly any contrast, around a light grey."""
    left = CONTRAST**strength
    return np.asarray(np.rint(picture * left + HAZE * (1 - left)), np.uint8)


def dark(picture: Picture, seed: int, strength: float) -> Picture:
    """With little light: so few electrons a pixel that their number varies visibly."""
    light = (picture / 255) ** GAMMA * LIGHT**strength
    counted = np.random.Generator(np.random.Philox(seed)).poisson(light * ELECTRONS) / ELECTRONS
    return np.asarray(np.rint(255 * np.clip(counted, 0, 1) ** (1 / GAMMA)), np.uint8)


def motion(picture: Picture, seed: int, strength: float) -> Picture:
    """Blurred along a straight path of any direction."""
    angle = np.random.Generator(np.random.Philox(seed)).uniform(0, np.pi)
    reach = int(np.ceil(strength * PATH / 2)) + 1
    path = np.zeros((2 * reach + 1, 2 * reach + 1))
    for place in np.linspace(-strength * PATH / 2, strength * PATH / 2, 60):
        path[reach + round(place * np.sin(angle)), reach + round(place * np.cos(angle))] = 1
    return np.asarray(cv2.filter2D(picture, -1, path / path.sum()), np.uint8)


def hot(picture: Picture, seed: int, strength: float) -> Picture:
    """Pixels here and there are black or white, others in every picture."""
    drawn = np.random.Generator(np.random.Philox(seed)).random(picture.shape[:2])
    changed = picture.copy()
    changed[drawn < strength * HOT / 2] = 0
    changed[drawn > 1 - strength * HOT / 2] = 255
    return changed


SHIFTS = {"grey": grey, "small": small, "blur": blur, "jpeg": jpeg, "all": everything}
KINDS = SHIFTS | {"fog": fog, "dark": dark, "motion": motion, "hot": hot}


def _change(source: Path, target: Path, kind: str, strength: float) -> None:
    with Image.open(source) as image:
        picture = np.asarray(image.convert("RGB"))
    changed = KINDS[kind](picture, zlib.crc32(source.name.encode()), strength)
    Image.fromarray(changed).save(target, "JPEG", quality=95)


def make(root: Path, out: Path, kind: str, strength: float = 1.0) -> Path:
    """Writes one set; returns its folder.

    Args:
        root: in CelebA's layout, with aligned pictures.
        out: the folder of the sets.
        kind: one of `KINDS`.
        strength: in (0, 1].
    """
    folder = out / (kind if strength == 1 else f"{kind}@{strength:g}")
    (folder / ALIGNED).mkdir(parents=True, exist_ok=True)
    for name in ("identity_CelebA.txt", "list_eval_partition.txt", "list_landmarks_align_celeba.txt"):
        shutil.copy(root / name, folder / name)
    pictures = sorted((root / ALIGNED).iterdir())
    with ProcessPoolExecutor() as pool:
        targets = [folder / ALIGNED / picture.name for picture in pictures]
        for _ in pool.map(_change, pictures, targets, [kind] * len(pictures), [strength] * len(pictures), chunksize=64):
            pass
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(SHIFTS))
    parser.add_argument("--strength", type=float, default=1.0)
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        print(make(arguments.root, arguments.out, kind, arguments.strength))
