"""Whether photographs of 12 megapixels train as fast as small pictures of the same faces, once these were cut out.

    python benchmarks/bench_large_photographs.py [--data ../shared/data/celeba-mini | --data drawn] [--pictures 192]
        [--rounds 7] [--batches 3]

Each small picture is enlarged and laid into a large one at a place of its own. Contenders read the small pictures, the
crops that training writes of the large ones, and the large ones themselves; they take turns within a round, and ratios
are formed there. `load` is the loader with the recipe's augmentation, `train` a MobileFaceNet's optimiser steps on what
it gives. Of the crops it is also said what they took to write, and how far a batch by them lies from one by full
decoding, in 255ths: all pictures, without augmentation and with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import record
from torch import Tensor

from facefast.data import FaceIndex, make_loader, read_index
from facefast.data.drawn import synthetic
from facefast.data.sampler import EpochSampler
from facefast.faces import crops
from facefast.models import build_model
from facefast.recipe import AugmentSpec, ImageSpec, ModelConfig, Reading
from facefast.recipe.named import FLIP, MILD

SHARED = Path(__file__).parents[2] / "shared/data/celeba-mini"
SIZE = (4032, 3024)
"""Width and height of a telephone's photograph."""
ENLARGED = 4
BATCH = 32
THREADS = 2
IMAGE = ImageSpec(size=112, template="arcface")


def enlarge(small: FaceIndex, folder: Path) -> FaceIndex:
    """The same rows as large photographs: each picture four times as large, at a random place before a soft ground."""
    rng = np.random.default_rng(0)
    paths, landmarks = [], np.array(small.landmarks, np.float64)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    grain = rng.integers(-6, 7, (SIZE[1], SIZE[0], 1), np.int16)  # as a sensor's, or the file would be too easy
    ground = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), np.int16) + grain
    ground = ground.clip(0, 255).astype(np.uint8)
    for row in range(len(small)):
        with Image.open(small.path(row)) as file:
            face = file.convert("RGB")
        face = face.resize((ENLARGED * face.width, ENLARGED * face.height), Image.Resampling.BICUBIC)
        whole = Image.fromarray(ground)
        corner = (int(rng.integers(SIZE[0] - face.width)), int(rng.integers(SIZE[1] - face.height)))
        whole.paste(face, corner)
        paths.append(f"{row:05d}.jpg".encode())
        whole.save(folder / f"{row:05d}.jpg", quality=90)
        landmarks[row] = ENLARGED * (landmarks[row] + 0.5) - 0.5 + corner
    made = dataclasses.replace(
        small, root=str(folder), paths=np.array(paths), landmarks=landmarks.astype(np.float32), boxes=None
    )
    return made.scanned(THREADS)


def batches(index: FaceIndex, augment: AugmentSpec | None, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and labels, without end."""
    loader = make_loader(
        index,
        IMAGE,
        batch_size=BATCH,
        sampler=EpochSampler(np.arange(len(index)), BATCH, seed=seed),
        augment=augment,
        threads=THREADS,
    )
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            yield batch.images, batch.labels


def loads(index: FaceIndex) -> Callable[[], object]:
    """The next batch at each call."""
    given = batches(index, MILD)
    return lambda: next(given)


def steps(index: FaceIndex) -> Callable[[], object]:
    """An optimiser step at each call, on the next batch."""
    model = build_model(ModelConfig(backbone="mobilefacenet"), index.num_classes, IMAGE).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    given = batches(index, FLIP)

    def step() -> None:
        images, labels = next(given)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def apart(one: FaceIndex, other: FaceIndex, augment: AugmentSpec | None) -> tuple[float, float]:
    """Mean and worst picture's mean distance of what a model sees, in 255ths."""
    means = []
    for (left, _), (right, _) in itertools.islice(zip(batches(one, augment), batches(other, augment), strict=False), 2):
        means += ((left - right) * IMAGE.std[0]).abs().mean((1, 2, 3)).tolist()
    return statistics.mean(means), max(means)


def rates(
    runs: dict[str, Callable[[], object]], rounds: int, turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Pictures a second of each contender, one number a round, and pictures for each second of processors, which other
    work on the machine does not lengthen as much; the first batches of each are not counted."""
    for run in runs.values():
        for _ in range(2):
            run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    work: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 else reversed(list(runs)):
            begin, used = time.perf_counter(), time.process_time()
            for _ in range(turns):
                runs[name]()
            found[name].append(turns * BATCH / (time.perf_counter() - begin))
            work[name].append(turns * BATCH / (time.process_time() - used))
    return found, work


def ratio(values: list[float], others: list[float]) -> float:
    """Median over the rounds."""
    return round(statistics.median(a / b for a, b in zip(values, others, strict=True)), 3)


def main() -> None:
    """Makes the photographs, lets the contenders take turns, and records their rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SHARED) if SHARED.exists() else "drawn")
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = given.data
        if root == "drawn":
            root = str(Path(folder) / "drawn")
            synthetic.write(root, synthetic.DrawnSpec(identities=(40, 0, 0)))
        everything = read_index(root).scanned(THREADS)
        chosen = np.linspace(0, len(everything) - 1, given.pictures).round().astype(np.int64)
        small = everything.select(chosen).compact()
        (Path(folder) / "large").mkdir()
        large = enlarge(small, Path(folder) / "large")
        begin = time.perf_counter()
        plan = crops.plan(large, IMAGE, crops.margin_for([MILD], IMAGE))
        cut = crops.write(large, plan, Path(folder) / "crops", Reading(THREADS))
        writing = given.pictures / (time.perf_counter() - begin)
        plain, varied = apart(cut, large, None), apart(cut, large, MILD)
        sets = {"small pictures": small, "crops": cut, "large photographs": large}
        for stage in ("load", "train"):
            runs = {name: loads(index) if stage == "load" else steps(index) for name, index in sets.items()}
            measured, work = rates(runs, given.rounds, given.batches)
            for name, values in measured.items():
                line = record(
                    "large_photographs",
                    stage=stage,
                    contender=name,
                    pictures=given.pictures,
                    megapixels=round(SIZE[0] * SIZE[1] / 1e6, 1),
                    threads=THREADS,
                    images_per_second=round(statistics.median(values), 1),
                    lowest=round(min(values), 1),
                    highest=round(max(values), 1),
                    rounds=given.rounds,
                    ratio_to_small=ratio(values, measured["small pictures"]),
                    images_per_cpu_second=round(statistics.median(work[name]), 1),
                    cpu_ratio_to_small=ratio(work[name], work["small pictures"]),
                    **(
                        {
                            "crops_written_per_second": round(writing, 1),
                            "mean_distance": round(plain[0], 3),
                            "worst_picture": round(plain[1], 3),
                            "mean_distance_augmented": round(varied[0], 3),
                        }
                        if name == "crops"
                        else {}
                    ),
                )
                print(json.dumps({key: value for key, value in line.items() if key not in ("versions", "machine")}))


if __name__ == "__main__":
    main()
