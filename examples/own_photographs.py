"""From a folder of photographs to a model that names the people: the commands, in the order one types them.

python examples/own_photographs.py                                  # draws a folder per person first; a minute
python examples/own_photographs.py DIR [SOURCE] [FLAG ...]          # DIR/NAME/*.jpg; weights as they were published
"""

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from PIL import Image

from facefast.data.drawn.synthetic import DrawnSpec, draw_face


def facefast(*words: str) -> None:
    """Runs a command and shows it."""
    print("\n$ facefast", *words, flush=True)
    subprocess.run([sys.executable, "-m", "facefast", *words], check=True)


places = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
flags = sys.argv[1 + len(places) :]  # of `facefast train`
if not places:
    places, flags = ["data/own-photographs"], ["--image.size=64", *flags]
    for person, picture in ((person, picture) for person in range(10) for picture in range(20)):
        path = Path(places[0], f"person-{person}", f"{picture:02d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_face(DrawnSpec(), person, picture)[0]).save(path)

root, source = places[0], places[1] if places[1:] else "none"  # without source weights training starts anew
facefast("index", root)  # what is there, what is damaged, what is there twice
facefast("train", "--data.root", root, "--model.source", source, "--out", "runs/own", *flags)
facefast("evaluate", "runs/own", "--data.root", root)  # on the pictures that were kept from training
facefast("predict", "runs/own", *map(str, sorted(Path(root).rglob("*.jpg"))[:3]))
