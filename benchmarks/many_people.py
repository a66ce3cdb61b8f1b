"""A run of `facefast train` with very many people on two processes: what each needs in memory.

    python benchmarks/many_people.py [--people 200000 --ranks 2 --steps 3 --out FOLDER] [TRAIN OPTIONS ...]

Every person has one drawn picture of 32 x 32 px, of which there are few: files are links to them. What is measured is
the greatest resident set of each process, as the system counts it, over the whole run: index, updates, evaluation and
checkpoints.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from record import record

FACES = 50
TESTED = 500
"""People with a second picture, which the model is measured on."""
PROGRAM = """
import resource, sys
from facefast import train
code = train.main(sys.argv[2:])
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import os
open(sys.argv[1] + os.environ["RANK"], "w").write(str(most))
sys.exit(code)
"""


def draw(root: Path, people: int) -> None:
    """A folder for each person with one picture, one of `FACES`."""
    faces, generator = root / "faces", np.random.default_rng(0)
    faces.mkdir(parents=True)
    for k in range(FACES):
        Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)).save(faces / f"{k}.png")
    for person in range(people):
        folder = root / "people" / f"{person:07d}"
        folder.mkdir(parents=True)
        for k in range(2 if person < TESTED else 1):
            os.link(faces / f"{(person + k) % FACES}.png", folder / f"{k}.png")


def main() -> None:
    """Draws, trains, and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, run = Path(temporary), Path(temporary) / "run"
        draw(root, given.people)
        options = ["scratch", f"--data.root={root / 'people'}", "--data.format=folder", f"--out={run}"]
        options += ["--image.size=32", "--image.template=none", "--data.detect=none", "--data.test-fraction=0.5"]
        options += ["--data.validation-fraction=0", "--model.backbone=mobilefacenet_half", "--model.embedding=512"]
        options += ["--model.head=cosine", "--model.shard-head=ranks", "--phases.scratch.batch-size=64"]
        options += [f"--phases.scratch.steps={given.steps}", "--pictures=0", "--rank-timeout=0", *more]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={given.ranks}"]
        start = time.perf_counter()
        program = root / "program.py"
        program.write_text(PROGRAM)
        subprocess.run([*command, str(program), str(root / "most-"), *options], check=True)
        seconds = time.perf_counter() - start
        most = [int((root / f"most-{rank}").read_text()) / 2**20 for rank in range(given.ranks)]
        size = sum(file.stat().st_size for file in (run / "checkpoints" / "last").iterdir())
    line = record(
        "many_people",
        people=given.people,
        ranks=given.ranks,
        steps=given.steps,
        options=more,
        gibibytes=[round(each, 2) for each in most],
        checkpoint_gibibytes=round(size / 2**30, 2),
        seconds=round(seconds, 1),
    )
    print(line)


if __name__ == "__main__":
    main()
