"""Makes README's pictures anew; nobody in them exists.

python docs/pictures/make.py        # batch.png: what the loader gives, plain above and augmented below
python docs/pictures/make.py RUN    # and report.png: the top of a finished run's report.html, photographed by Chromium
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from facefast.data import make_loader, read_index
from facefast.data.drawn import synthetic
from facefast.data.oracle import to_picture
from facefast.evaluation import report
from facefast.recipe import ImageSpec
from facefast.recipe.named import STRONG

HERE = Path(__file__).parent
PEOPLE, SIZE, GAP = 8, 112, 4
EPOCH = 53
"""One that shows each kind of augmentation: mirror images, turns, crops, colours, grey, erased rectangles."""
WINDOW = (1280, 1030)
"""Width and height of the report's part that is shown: the headline and the results."""
WAIT = 8000
"""Milliseconds of the page's own time that its charts have to be drawn in."""


def batch_picture() -> Image.Image:
    """One batch of drawn people, 2 rows of `PEOPLE`; the same on every machine, up to the decoder's rounding."""
    with tempfile.TemporaryDirectory() as folder:
        spec = synthetic.DrawnSpec(identities=(PEOPLE, 0, 0), pictures=1, seed=3)
        index = read_index(synthetic.write(Path(folder) / "drawn", spec, processes=1, progress=False))
        image, rows = ImageSpec(size=SIZE), []
        for augment in (None, STRONG):
            with make_loader(index, image, batch_size=PEOPLE, augment=augment, epoch=EPOCH) as loader:
                rows.append(to_picture(next(iter(loader)).images, image))  # uint8 [PEOPLE, SIZE, SIZE, 3]
    step = SIZE + GAP
    sheet = np.full((2 * step - GAP, PEOPLE * step - GAP, 3), 255, np.uint8)
    for line, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet[line * step :, column * step :][:SIZE, :SIZE] = picture
    return Image.fromarray(sheet)


def report_picture(run: Path) -> Image.Image:
    """The top of the run's report, written anew by today's code, at twice the pixels for sharp letters.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise FileNotFoundError("found no Chromium; install chromium (Debian, Ubuntu) or google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "default"
        shutil.copytree(run, copy, ignore=shutil.ignore_patterns("*.safetensors", "tensorboard"))
        page, target = report.write(copy), Path(folder) / "report.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2"]
        shot = [f"--window-size={WINDOW[0]},{WINDOW[1]}", f"--virtual-time-budget={WAIT}", f"--screenshot={target}"]
        subprocess.run([browser, *options, *shot, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
        return Image.open(target).convert("RGB")


def coarse(picture: Image.Image) -> Image.Image:
    """The picture with 6 bits a channel, which nobody sees: a PNG of half the bytes."""
    return picture.point([value // 4 * 4 + 2 for value in range(256)] * 3)


def save(picture: Image.Image, name: str) -> None:
    """Writes a PNG beside this file."""
    picture.save(HERE / name, optimize=True)
    print(f"{HERE / name}: {picture.width} x {picture.height}, {(HERE / name).stat().st_size // 1000} KB")


if __name__ == "__main__":
    save(coarse(batch_picture()), "batch.png")
    for run in sys.argv[1:]:
        save(report_picture(Path(run)).quantize(64), "report.png")
