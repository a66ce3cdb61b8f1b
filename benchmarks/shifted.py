"""Makes sets of photographs as another camera would have taken them, from a folder in CelebA's layout.

    python benchmarks/shifted.py --root CELEBA --out DIR [--kinds grey small blur jpeg all] [--strength 1]

Each kind is a folder DIR/KIND in the same layout, with the same names, people and landmarks; what changes is how the
pictures look. Every picture's noise comes from its name: the command makes the same files again. With a strength below
1 the folder is DIR/KIND@STRENGTH, and the pictures lie between the photographs and what strength 1 makes of them: blur
and noise are so much of theirs, height and JPEG quality lie so far on the way down to theirs on a logarithmic scale.
Grey is grey at any strength.
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
FULL, SMALL = 112, 28
"""Height in pixels of what a model is shown of the picture, from above the eyes to below the chin."""
SHOWN = 122 / 218
"""Part of a picture's height that this is."""
BLUR, NOISE = 2.5, 16.0
"""Standard deviations: of the blur in pixels of the 218 high pictures, of the noise in levels of 255."""
BEST, QUALITY = 95, 6
ALIGNED = "img_align_celeba"


def grey(picture: Picture, seed: int, strength: float) -> Picture:
    """One channel three times."""
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def small(picture: Picture, seed: int, strength: float) -> Picture:
    """As from a camera for which the face is 28 pixels high, made large again."""
    height, width = picture.shape[:2]
    factor = FULL * (SMALL / FULL) ** strength / (SHOWN * height)
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


KINDS = {"grey": grey, "small": small, "blur": blur, "jpeg": jpeg, "all": everything}


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
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--strength", type=float, default=1.0)
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        print(make(arguments.root, arguments.out, kind, arguments.strength))
