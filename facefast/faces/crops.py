"""Faces cut out of large photographs once, so that every epoch reads small pictures.

A set of crops is a folder with the photographs' own paths below it, `index.npz` (labels, names, splits, attributes and
landmarks in the crops' pixels) and `crops.json`, written first: what the crops are of. It is read like any data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from facefast.data import FaceIndex, oracle
from facefast.data.augment import draw
from facefast.data.formats.crops import INDEX, SIGN
from facefast.faces.detect import upright_sizes
from facefast.faces.landmarks import known
from facefast.recipe import AugmentSpec, ImageSpec, Reading
from facefast.runtime import files
from facefast.runtime.exits import StorageError

QUALITY = 95
"""Of the JPEG, with its colours at half resolution, as telephones store them: it decodes a third faster, and what a
model sees lies within 1.1 of 255 of full decoding."""
BYTES_PER_PIXEL = 0.6
"""Of such a JPEG, generously."""
OVERSAMPLING = 1.25
"""Pixels of a crop for one of the model's on each axis: a crop at the model's own would be filtered twice."""
MARGIN = 1.7
"""Side of a crop in sides of the model's frame: it holds the frame at any turn (1.41), shifted by a tenth each way."""
LARGE = 1_500_000
"""Pixels of a photograph from which on decoding costs more than training on a CPU."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is cut out of N photographs."""

    boxes: NDArray[np.int64]
    """[N, 4] left, top, right, bottom in the upright photograph; inside it."""
    sizes: NDArray[np.int64]
    """[N, 2] width and height of the crop."""

    @property
    def bytes(self) -> int:
        """About how much space the crops take."""
        return int(self.sizes.prod(1).sum() * BYTES_PER_PIXEL)


def margin_for(augments: list[AugmentSpec], image: ImageSpec) -> float:
    """The least margin with which no variation of a picture shows what lies beside its crop; at least `MARGIN`."""
    height, width = image.shape
    margins = [MARGIN]
    for each in augments:
        turn = math.radians(min(each.rotation, 45.0))  # at 45 degrees a square is widest
        wide = (math.cos(turn) + math.sin(turn)) * (1 + 2 * each.shift) * math.sqrt(1 + each.crop_ratio)
        margins.append(wide * max(height, width) / math.sqrt(height * width))
    return max(margins)


def plan(index: FaceIndex, image: ImageSpec, margin: float = MARGIN) -> Plan:
    """What to cut out of a scanned index with landmarks, for a model that takes `image`.

    Raises:
        ValueError: a row has no landmarks.
    """
    rows = np.arange(len(index))
    if not known(index).all():
        raise ValueError(f"pictures in {index.root} have no landmarks: their faces cannot be cut out")
    height, width = image.shape
    sizes = upright_sizes(index, rows)
    matrix = draw(index, rows, image, None, 0, 0, sizes).matrix.astype(np.float64)  # output pixel -> photograph
    centre = matrix[:, :, :2] @ (np.array([width, height]) / 2) + matrix[:, :, 2]
    scale = np.hypot(matrix[:, 0, 0], matrix[:, 1, 0])  # photograph's pixels for one of the model's
    half = margin / 2 * max(height, width) * scale
    low = np.clip(np.floor(centre - half[:, None]), 0, sizes - 1).astype(np.int64)
    high = np.clip(np.ceil(centre + half[:, None]), low + 1, sizes).astype(np.int64)
    shrink = np.maximum(1.0, scale / OVERSAMPLING)[:, None]
    return Plan(np.concatenate([low, high], 1), np.maximum(1, np.rint((high - low) / shrink)).astype(np.int64))


def are_large(index: FaceIndex) -> bool:
    """Whether most photographs are so large that decoding them in every epoch would be what a run waits for."""
    return bool(np.median(index.widths.astype(np.int64) * index.heights) >= LARGE)


def write(
    index: FaceIndex,
    chosen: Plan,
    folder: Path,
    reading: Reading,
    tick: Callable[[], None] = lambda: None,
) -> FaceIndex:
    """Writes the crops of a plan and their index; a set that was begun goes on, one that is finished is read.

    Raises:
        ValueError: the folder holds something else.
        StorageError: there is too little space, or it cannot be written.
    """
    key = _key(index, chosen)
    try:
        if (folder / SIGN).exists() and files.read_json(folder / SIGN).get("of") != key:
            raise ValueError(f"{folder} holds crops of other photographs, or cut otherwise; choose an empty folder")
        if not (folder / SIGN).exists() and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no crops; choose an empty folder")
        paths = [_path_of(index, row) for row in range(len(index))]
        if not (folder / INDEX).exists():
            folder.mkdir(parents=True, exist_ok=True)
            missing = [row for row in range(len(index)) if not os.path.exists(_inside(folder, paths[row]))]
            need = int(chosen.bytes * len(missing) / len(index))
            if (free := shutil.disk_usage(folder).free) < need:
                raise StorageError(
                    f"{len(missing)} crops need about {need / 2**20:.0f} MiB and {free / 2**20:.0f} are free at "
                    f"{folder}; choose another place"
                )
            files.write_json(folder / SIGN, {"of": key, "pictures": len(index), "root": index.root})
            _write_all(index, chosen, folder, paths, missing, reading, tick)
            _indexed(index, chosen, folder, paths, reading).save(folder / INDEX)
    except OSError as error:
        raise StorageError(f"cannot write the crops in {folder}: {error}; choose another place") from error
    return dataclasses.replace(FaceIndex.load(folder / INDEX), root=os.path.abspath(folder))


def _write_all(
    index: FaceIndex,
    chosen: Plan,
    folder: Path,
    paths: list[bytes],
    rows: list[int],
    reading: Reading,
    tick: Callable[[], None],
) -> None:
    waiting: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(max(1, reading.threads), "crops") as pool,
        tqdm(total=len(rows), unit="pictures", desc="crops", disable=None, leave=False) as bar,
    ):
        for row in rows:
            waiting.append(pool.submit(_write_one, index, row, chosen, _inside(folder, paths[row]), reading))
            while len(waiting) > 4 * reading.threads or (row == rows[-1] and waiting):
                waiting.popleft().result()
                bar.update()
                tick()


def _write_one(index: FaceIndex, row: int, chosen: Plan, path: str, reading: Reading) -> None:
    try:
        crop = cut(oracle.read_bytes(index, row), index, row, chosen, reading.max_pixels)
    except ValueError:  # damaged behind a sound header: the crop is missing, and counts as a bad file
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    aside = f"{path}.{os.getpid()}.tmp"
    try:
        Image.fromarray(crop).save(aside, "JPEG", quality=QUALITY, subsampling=2)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside)


def cut(
    encoded: bytes, index: FaceIndex, row: int, chosen: Plan, max_pixels: int = Reading.max_pixels
) -> NDArray[np.uint8]:
    """One crop, uint8 [h, w, 3].

    Raises:
        ValueError: the photograph cannot be decoded.
    """
    left, top, right, bottom = chosen.boxes[row].tolist()
    size = (int(chosen.sizes[row, 0]), int(chosen.sizes[row, 1]))
    width, height = upright_sizes(index, np.array([row]))[0].tolist()
    shrink = (right - left) / size[0]
    # Decoded at a reduced scale where twice the crop's pixels are left to average over.
    least = math.ceil(max(width, height) * min(1.0, 2 / shrink))
    picture = oracle.decode(encoded, max_pixels, least if shrink >= 4 else 0)
    by = round(width / picture.shape[1])  # 1, 2, 4 or 8: the last pixel may stand for fewer
    box = tuple(edge / by for edge in (left, top, right, bottom))
    box = (*box[:2], min(box[2], picture.shape[1]), min(box[3], picture.shape[0]))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.BOX, box))


def _indexed(index: FaceIndex, chosen: Plan, folder: Path, paths: list[bytes], reading: Reading) -> FaceIndex:
    """The index of the crops: the same rows, landmarks and boxes in the crops' pixels."""
    origin = chosen.boxes[:, :2]
    shrink = (chosen.boxes[:, 2:] - origin) / chosen.sizes  # [N, 2]
    assert index.landmarks is not None
    moved = dataclasses.replace(
        index,
        root=os.path.abspath(folder),
        paths=np.asarray(paths, np.bytes_),
        offsets=np.full(len(index), -1, np.int64),
        lengths=np.full(len(index), -1, np.int64),
        landmarks=((index.landmarks + 0.5 - origin[:, None]) / shrink[:, None] - 0.5).astype(np.float32),
        boxes=None
        if index.boxes is None
        else np.concatenate(
            [(index.boxes[:, :2] + 0.5 - origin) / shrink - 0.5, index.boxes[:, 2:] / shrink], 1
        ).astype(np.float32),
    )
    return moved.scanned(reading.threads, reading.max_pixels)


def _key(index: FaceIndex, chosen: Plan) -> str:
    """Digest of what the crops are of."""
    digest = hashlib.blake2b(index.fingerprint().encode(), digest_size=16)
    for column in (chosen.boxes, chosen.sizes):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _path_of(index: FaceIndex, row: int) -> bytes:
    """Where a picture's crop lies: at the photograph's own path, with .jpg behind another ending or a place in a
    container."""
    path = bytes(index.paths[row])
    if index.offsets[row] >= 0:
        return path + b"@%d.jpg" % index.offsets[row]
    return path if path.lower().endswith((b".jpg", b".jpeg")) else path + b".jpg"


def _inside(folder: Path, path: bytes) -> str:
    return os.path.join(folder, os.fsdecode(path))
