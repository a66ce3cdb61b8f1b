"""How alike are the faces in photographs? The dot product of two embeddings is their cosine similarity.

python examples/embed_and_compare.py                               # drawn faces: two of one person, one of another
python examples/embed_and_compare.py MODEL PHOTO PHOTO ... [--detect mtcnn]
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

import facefast
from facefast.data import FaceIndex, make_loader, oracle, read_index
from facefast.faces.detect import find_detector

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default="runs/default", help="a run, a checkpoint, a package or source weights")
parser.add_argument("photographs", nargs="*", type=Path, help="faces cut out alike, or whole photographs and --detect")
parser.add_argument("--detect", help="mtcnn or YuNet's .onnx file: faces are aligned by its landmarks")
if (given := parser.parse_args()).photographs:
    paths, points = [bytes(path.resolve())[1:] for path in given.photographs], None  # from the root, "/"
    if given.detect:
        found = find_detector(given.detect).find(pictures := [oracle.decode(path) for path in given.photographs])
        all(map(len, found)) or sys.exit("no face was found on one of the photographs")
        points = np.stack([f.landmarks[f.main(p.shape[1], p.shape[0])] for f, p in zip(found, pictures, strict=True)])
    index = FaceIndex.build("/", paths, None, (), landmarks=points)
else:
    if not Path(given.model).exists():  # a minute's training of the default recipe; `make train` gives it its due
        given.model, quick = "runs/quick", "--phases.0.steps=1 --phases.1.epochs=2 --phases.2.steps=1"
        subprocess.run([sys.executable, "-m", "facefast.train", "--out", given.model, *quick.split()], check=True)
    drawn = read_index("data/drawn-faces")
    index = drawn.select(drawn.splits == 2).select([0, 1, 20])  # people whom no training saw, 20 pictures of each
model = facefast.load(given.model)
with make_loader(index, model.image, batch_size=len(index), max_bad_fraction=0) as loader:
    embeddings = model.embed(next(iter(loader)).images)  # [N, D], each of length 1
for row, similarities in enumerate(embeddings @ embeddings.T):
    print(index.path(row), *(f"{similarity:5.2f}" for similarity in similarities.tolist()))
