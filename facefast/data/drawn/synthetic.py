"""Drawn faces in CelebA's official layout: a data set for machines that have no photographs.

The people do not exist: every picture is painted by `drawing` from the numbers of `persona`, so nothing here needs a
download, a licence or a consent.

    python -m facefast.data.drawn.synthetic ROOT --identities 200 40 40 --pictures 20 --preview sheet.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from facefast.data.drawn.canvas import HEIGHT, WIDTH
from facefast.data.drawn.drawing import draw
from facefast.data.drawn.persona import Identity, Shot, draw_identity, draw_shot
from facefast.runtime.files import storing

VERSION = 1
"""Raised whenever the same spec would give other pixels."""

_LANDMARKS = "lefteye righteye nose leftmouth rightmouth"
_PICTURES_PER_PROCESS = 200  # fewer are drawn before another process has started


@dataclass(frozen=True)
class DrawnSpec:
    """What `write` draws; the same spec always gives the same files."""

    identities: tuple[int, int, int] = (200, 40, 40)
    """People in the train, validation and test partition; each is in one."""
    pictures: int = 20
    """Pictures of each person."""
    seed: int = 0
    """People and pictures of different seeds have nothing in common."""
    nuisance: float = 1.0
    """Strength of pose, expression, light, recording and what is in the way: 0 for passport pictures."""

    def __post_init__(self) -> None:
        counts = tuple(self.identities)
        if len(counts) != 3 or min(counts) < 0 or not 0 < sum(counts) < 1 << 31:
            raise ValueError(f"identities is {counts}; give three counts (train, validation, test), not all zero")
        if not 0 < self.pictures < 1 << 31:
            raise ValueError(f"pictures is {self.pictures}; each identity needs at least 1")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2^64)")
        if not 0 <= self.nuisance <= 2:
            raise ValueError(f"nuisance is {self.nuisance}; it must lie in [0, 2]")


def draw_face(
    spec: DrawnSpec, identity: int, picture: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], dict[str, bool]]:
    """Draw one picture of one person; any picture can be drawn without the others.

    Args:
        spec: Only `seed` and `nuisance` matter here.
        identity: Number of the person from 0; the file lists count from 1.
        picture: Number of the picture from 0.

    Returns:
        The picture, uint8 [218, 178, 3]; landmarks in its pixels, float32 [5, 2], in CelebA's order (left eye, right
        eye, nose, left and right mouth corner as seen); the attributes by their CelebA names.
    """
    who, shot = _portray(spec, identity, picture)
    pixels, landmarks = draw(who, shot)
    return pixels, landmarks, _attributes(who, shot)


def write(root: str | os.PathLike[str], spec: DrawnSpec, processes: int = 0, progress: bool = True) -> Path:
    """Draw a whole set into `root`, or return at once if it is already there.

    The set is drawn into a folder beside `root` that gets its name when it is complete, so `root` never holds a part.

    Args:
        root: Folder to create; it may exist if it is empty or holds this very set.
        spec: What to draw.
        processes: Processes to draw with, 0 for one per core; the files do not depend on it.
        progress: Show a progress bar where there is a terminal.

    Returns:
        `root`.

    Raises:
        ValueError: `root` holds another set, or something else.
        StorageError: it cannot be written.
    """
    root = Path(root)
    if _holds(root, spec):
        return root
    if processes < 0:
        raise ValueError(f"processes is {processes}; it must be 0 (one per core) or more")
    part = root.absolute().with_name(f".{root.absolute().name}.part-{os.getpid()}")
    try:
        with storing(root):
            pictures = part / "img_align_celeba"
            pictures.mkdir(parents=True)
            _write_set(part, spec, processes, progress)
            try:
                part.replace(root)
            except OSError:
                # Another process finished the same set first.
                if not _holds(root, spec):
                    raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def _holds(root: Path, spec: DrawnSpec) -> bool:
    """Whether `root` is this set already; False if it can be created."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "drawn.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"{root} exists and is not a set of drawn faces (it has no readable drawn.json); choose another folder"
        ) from None
    if found != _stamp(spec):
        raise ValueError(
            f"{root} holds the drawn faces {json.dumps(found)}, not the requested {json.dumps(_stamp(spec))}; "
            "delete it or choose another folder"
        )
    return True


def _stamp(spec: DrawnSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    return {"version": VERSION, "spec": {**fields, "identities": list(spec.identities)}}


def _portray(spec: DrawnSpec, identity: int, picture: int) -> tuple[Identity, Shot]:
    who = draw_identity(spec.seed, identity)
    return who, draw_shot(who, spec.seed, identity, picture, spec.nuisance)


def _attributes(who: Identity, shot: Shot) -> dict[str, bool]:
    return {
        "Bald": who.is_bald,
        "Bangs": shot.bangs,
        "Black_Hair": who.hair_name == "Black_Hair",
        "Blond_Hair": who.hair_name == "Blond_Hair",
        "Blurry": shot.blur > 1.2,
        "Brown_Hair": who.hair_name == "Brown_Hair",
        "Eyeglasses": shot.glasses or shot.sunglasses,
        "Gray_Hair": who.hair_name == "Gray_Hair",
        "Male": who.male > 0,
        "Mouth_Slightly_Open": shot.mouth_open > 1.5,
        "Mustache": shot.moustache > 0,
        "No_Beard": shot.beard == 0,
        "Smiling": shot.smile > 0.45,
        "Wearing_Hat": shot.hat,
        "Wearing_Lipstick": shot.lipstick > 0,
        "Young": who.age < 0.55,
    }


@dataclass(frozen=True)
class _Row:
    """What the lists say about one picture."""

    file: str
    landmarks: list[int]
    attributes: dict[str, bool]


def _write_identity(folder: str, spec: DrawnSpec, identity: int) -> list[_Row]:
    """Draw all pictures of one person; the unit of work of a process."""
    rows = []
    for picture in range(spec.pictures):
        who, shot = _portray(spec, identity, picture)
        pixels, landmarks = draw(who, shot)
        name = f"{identity * spec.pictures + picture + 1:06d}.jpg"
        Image.fromarray(pixels).save(os.path.join(folder, name), "JPEG", quality=shot.quality)
        points = np.rint(landmarks).astype(int).ravel().tolist()
        rows.append(_Row(name, points, _attributes(who, shot)))
    return rows


def _keep_memory() -> None:
    """Make malloc keep what it got from the system, which saves a third of the drawing time.

    Freeing one block of this size raises glibc's limits; without it every temporary array of a picture is mapped,
    zeroed and unmapped each time.
    """
    np.empty(31 << 20, np.uint8)


@contextmanager
def _identity_rows(folder: str, spec: DrawnSpec, processes: int) -> Iterator[Iterator[list[_Row]]]:
    """Draws the pictures into `folder` while the rows, person by person in order, are read."""
    people = range(sum(spec.identities))
    draw_one = partial(_write_identity, folder, spec)
    useful = -(-len(people) * spec.pictures // _PICTURES_PER_PROCESS)
    processes = processes or min(len(os.sched_getaffinity(0)), useful)
    if processes == 1:
        _keep_memory()
        yield map(draw_one, people)
    else:
        # Spawned, not forked: the caller may hold threads of torch or DALI.
        with multiprocessing.get_context("spawn").Pool(processes, _keep_memory) as pool:
            yield pool.imap(draw_one, people, chunksize=2)


def _write_set(folder: Path, spec: DrawnSpec, processes: int, progress: bool) -> None:
    identities, partition, attributes, landmarks = [], [], [], []
    header = ""
    bounds = np.cumsum(spec.identities)
    total = sum(spec.identities) * spec.pictures
    pictures = str(folder / "img_align_celeba")
    with (
        tqdm(total=total, desc="drawing faces", unit="img", disable=None if progress else True) as bar,
        _identity_rows(pictures, spec, processes) as people,
    ):
        for identity, rows in enumerate(people):
            split = int(np.searchsorted(bounds, identity, side="right"))
            for row in rows:
                header = " ".join(row.attributes)
                identities.append(f"{row.file} {identity + 1}\n")
                partition.append(f"{row.file} {split}\n")
                landmarks.append(f"{row.file} {' '.join(f'{value:3d}' for value in row.landmarks)}\n")
                signs = (" 1" if value else "-1" for value in row.attributes.values())
                attributes.append(f"{row.file} {' '.join(signs)}\n")
            bar.update(len(rows))
    points = " ".join(f"{name}_{axis}" for name in _LANDMARKS.split() for axis in "xy")
    for name, lines in (
        ("identity_CelebA.txt", identities),
        ("list_eval_partition.txt", partition),
        ("list_attr_celeba.txt", [f"{total}\n", f"{header}\n", *attributes]),
        ("list_landmarks_align_celeba.txt", [f"{total}\n", f"{points}\n", *landmarks]),
    ):
        (folder / name).write_text("".join(lines))
    (folder / "drawn.json").write_text(json.dumps(_stamp(spec), indent=2) + "\n")


def contact_sheet(spec: DrawnSpec, people: int = 6, pictures: int = 8) -> Image.Image:
    """The first pictures of the first people, one person a line."""
    people, pictures = min(people, sum(spec.identities)), min(pictures, spec.pictures)
    sheet = Image.new("RGB", (WIDTH * pictures, HEIGHT * people))
    for identity in range(people):
        for picture in range(pictures):
            pixels, _, _ = draw_face(spec, identity, picture)
            sheet.paste(Image.fromarray(pixels), (WIDTH * picture, HEIGHT * identity))
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code (0, or 64 for a wrong argument)."""
    default = DrawnSpec()
    parser = argparse.ArgumentParser(
        prog="python -m facefast.data.drawn.synthetic", description="Draw faces in CelebA's official layout."
    )
    parser.add_argument("root", help="folder to create")
    parser.add_argument(
        "--identities",
        type=int,
        nargs=3,
        default=default.identities,
        metavar=("TRAIN", "VAL", "TEST"),
        help="people in each partition (default: %(default)s)",
    )
    parser.add_argument("--pictures", type=int, default=default.pictures, help="pictures per person")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--nuisance", type=float, default=default.nuisance, help="0 (easy) .. 2")
    parser.add_argument("--processes", type=int, default=0, help="0: one per core")
    parser.add_argument("--preview", metavar="PNG", help="also write a contact sheet")
    given = parser.parse_args(arguments)
    try:
        spec = DrawnSpec(tuple(given.identities), given.pictures, given.seed, given.nuisance)
        write(given.root, spec, given.processes)
        if given.preview:
            contact_sheet(spec).save(given.preview)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 64
    print(f"{sum(spec.identities) * spec.pictures} pictures of {sum(spec.identities)} people in {given.root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
