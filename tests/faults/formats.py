"""The formats whose files are damaged by the thousand: sound files to begin with, and the reader that users meet."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator

from facefast import _scan
from facefast.data import oracle, read_bin, read_index, read_pairs
from facefast.data.augment import draw
from facefast.data.corrections import Correction, apply_corrections, read_labels, write_corrections
from facefast.data.dali import decode_probe
from facefast.data.index import FaceIndex
from facefast.models import FaceModel, build_model, checkpoint, load_source
from facefast.recipe import ImageSpec, ModelConfig, Recipe, from_json, to_json
from facefast.recipe.named import RECIPES, Given
from facefast.runtime import files, manifest
from tests.faults import mutations
from tests.support import foreign_files
from tests.support.faulty import jpeg, sound_pictures

Make = Callable[[Path], list[bytes]]


@dataclass(frozen=True)
class Form:
    """A format: its files, where they lie, and what reads them."""

    make: Make
    """Sound files; may write what lies beside them."""
    name: str
    """Of the file that is damaged, below the folder."""
    load: Callable[[Path], object]
    """Reads the file."""
    inside: Callable[[bytes, Generator, list[bytes]], bytes] | None = None
    """Damage behind checksums and lengths."""
    whole: bool = True
    """Whether `load` takes the file; else the folder."""

    def seeds(self, folder: Path) -> list[bytes]:
        return self.make(folder)

    def write(self, folder: Path, data: bytes) -> None:
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def read(self, folder: Path) -> None:
        self.load(folder / self.name if self.whole else folder)

    def mutated(self, seeds: list[bytes], rng: Generator) -> bytes:
        data = seeds[int(rng.integers(len(seeds)))]
        if self.inside is not None and rng.integers(2):
            return self.inside(data, rng, seeds)
        return mutations.mutate(data, rng, seeds)


# Photographs: what the scan lets through, both decoders get.


def _decode(path: Path) -> None:
    data = path.read_bytes()
    index = FaceIndex.build(path.parent, [path.name.encode()], None, ()).scanned(threads=1, max_pixels=4_000_000)
    fault, _, width, height, orientation = _scan.inspect(data, 4_000_000)
    assert index.faults[0] == fault or not data
    if fault == 0:
        decode_probe(data, (height, width) if orientation > 4 else (width, height))
        oracle.decode(data, 4_000_000)
    else:
        raise ValueError(_scan.FAULTS[fault])


def _pictures(*kinds: str) -> Make:
    sound = {name: found for name, found in sound_pictures().items() if found[1] in kinds}
    return lambda folder: [found[0] for found in sound.values()]


# Containers and lists.


def _scanned(index: FaceIndex) -> None:
    index = index.scanned(threads=1)
    rows = np.flatnonzero(index.faults == 0)[:8]
    draw(index, rows, ImageSpec(32), None, 0, 0, np.stack([index.widths, index.heights], 1)[rows])


def _tars(folder: Path) -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            facts = json.dumps({"identity": "ann"}).encode()
            for name, data in {
                "a.jpg": jpeg(),
                "a.cls": b"3",
                "b.jpg": jpeg(),
                "b.json": facts,
                "é" * 40 + ".png": b"1",
            }.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found.append(out.getvalue())
    return found


def _record(key: int, label: float, labels: list[float], data: bytes) -> bytes:
    body = struct.pack(f"<If2Q{len(labels)}f", len(labels), label, key, 0, *labels) + data
    return struct.pack("<2I", 0xCED7230A, len(body)) + body + b"\0" * (-len(body) % 4)


def _records(folder: Path) -> tuple[bytes, bytes]:
    records = [_record(0, 0, [4, 6], b""), *(_record(k, k % 2, [], jpeg()) for k in (1, 2, 3))]
    records += [_record(4, 0, [1, 3], b""), _record(5, 0, [3, 4], b"")]
    places = np.cumsum([0, *map(len, records)]).tolist()
    listing = "".join(f"{k}\t{at}\n" for k, at in enumerate(places[:-1])).encode()
    (folder / "train.rec").write_bytes(b"".join(records))
    (folder / "train.idx").write_bytes(listing)
    return b"".join(records), listing


def _bins(folder: Path) -> list[bytes]:
    pictures = [jpeg() for _ in range(4)]
    arrays = [np.frombuffer(picture, np.uint8) for picture in pictures]
    return [
        *(pickle.dumps((pictures, [True, False]), protocol) for protocol in (3, 4, 5)),
        pickle.dumps((arrays, np.array([1, 0])), 4),
    ]


LISTS = {
    "identity_CelebA.txt": "1.jpg 2880\n2.jpg 12\n3.jpg 2880\n",
    "list_eval_partition.csv": "image_id,partition\n1.jpg,0\n2.jpg,1\n3.jpg,2\n",
    "list_attr_celeba.txt": "3\nSmiling Male\n1.jpg -1 1\n2.jpg 1 -1\n3.jpg 1 1\n",
    "list_landmarks_align_celeba.txt": "3\n"
    + " ".join(f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy")
    + "\n"
    + "".join(f"{k}.jpg 69 109 106 113 77 142 73 152 108 154\n" for k in (1, 2, 3)),
}


def _celeba(name: str) -> Form:
    def make(folder: Path) -> list[bytes]:
        for other, text in LISTS.items():
            (folder / other).write_text(text)
        (folder / "img_align_celeba").mkdir(exist_ok=True)
        for k in (1, 2, 3):
            (folder / "img_align_celeba" / f"{k}.jpg").write_bytes(jpeg())
        return [LISTS[name].encode()]

    return Form(make, name, lambda folder: _scanned(read_index(folder, "celeba")), whole=False)


def _people(folder: Path) -> FaceIndex:
    for name in ("ann", "bob"):
        (folder / "people" / name).mkdir(parents=True, exist_ok=True)
        for k in (1, 2):
            (folder / "people" / name / f"{name}_{k:04d}.jpg").write_bytes(jpeg())
    return read_index(folder / "people", "folder")


def _pairs(folder: Path) -> list[bytes]:
    _people(folder)
    return [b"1\t1\nann\t1\t2\nann\t1\tbob\t2\n", b"2\nann 1 2\nbob 1 2\nann 1 bob 1\nann 2 bob 2\n"]


def _corrections(folder: Path) -> list[bytes]:
    _people(folder)
    lines = [
        Correction("wrong_label", "ann/ann_0001.jpg", "ann", "bob", "relabel", 0.5, 0.1, 0.2),
        Correction("duplicate", "bob/bob_0002.jpg", "bob", "", "drop", other_path="bob/bob_0001.jpg"),
        Correction("merge", "ann/ann_0001.jpg", "ann", "bob", "keep"),
    ]
    write_corrections(folder / "table.csv", lines)
    return [(folder / "table.csv").read_bytes(), b"path,identity,confidence\nann/ann_0001.jpg,ann,0.5\n"]


def _apply(path: Path) -> None:
    index = _people(path.parent)
    if path.read_bytes()[:4] == b"path":
        read_labels(index, path)
    else:
        apply_corrections(index, path)


def _indexes(folder: Path) -> list[bytes]:
    index = _people(folder)
    points = np.full((len(index), 5, 2), 20, np.float32)
    index = dataclasses.replace(index, landmarks=points, boxes=np.ones((len(index), 4), np.float32))
    os.chdir(folder)  # so that the saved root is the same wherever the folder is
    dataclasses.replace(index.scanned(threads=1), root="people").save(folder / "saved.npz")
    return [_dateless((folder / "saved.npz").read_bytes())]


def _dateless(archive: bytes) -> bytes:
    """The same archive whenever it was made."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            new.writestr(zipfile.ZipInfo(member.filename), old.read(member), member.compress_type)
    return out.getvalue()


# Weights.

STATE = {"conv.weight": torch.arange(24.0).view(2, 3, 2, 2), "conv.bias": torch.ones(2), "steps": torch.tensor(3)}


def _load(path: Path) -> None:
    source = load_source(path)
    if source.backbone and source.image:
        build_model(ModelConfig(), 0, source=source)


def _small_model() -> FaceModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone="mobilefacenet_half", embedding=8), 2, ImageSpec(32), ["ann", "bob"])


def _torch_files(folder: Path) -> list[bytes]:
    found = []
    for value, zipped in ((STATE, True), ({"epoch": 3, "state_dict": STATE}, True), (STATE, False)):
        out = io.BytesIO()
        torch.save(value, out, _use_new_zipfile_serialization=zipped)
        found.append(out.getvalue())
    return found


def _inside_torch(data: bytes, rng: Generator, seeds: list[bytes]) -> bytes:
    return mutations.inside_zip(data, rng, seeds) if data[:2] == b"PK" else mutations.mutate(data, rng, seeds)


def _safetensors(folder: Path) -> list[bytes]:
    found = []
    published = {key: tensor for key, tensor in _small_model().backbone.state_dict().items()}
    for state in (STATE, published):
        checkpoint.write_tensors(folder / "weights.safetensors", state)
        found.append((folder / "weights.safetensors").read_bytes())
    return found


def _npz(folder: Path) -> list[bytes]:
    found = []
    save: Any
    for save in (np.savez, np.savez_compressed):
        out = io.BytesIO()
        save(out, **{"conv/kernel": np.arange(24, dtype="f4"), "bias": np.ones(3, ">f8"), "n": np.array(["a"])})
        found.append(_dateless(out.getvalue()))
    return found


def _keras(folder: Path) -> list[bytes]:
    h5py: Any = importlib.import_module("h5py")
    found = []
    for options in (dict[str, Any](), {"compression": "gzip", "chunks": True}):
        out = io.BytesIO()
        with h5py.File(out, "w") as file:
            file.attrs["layer_names"] = [b"dense", b"conv"]
            for layer in ("dense", "conv"):
                group = file.create_group(layer)
                group.attrs["weight_names"] = [b"kernel:0", b"bias:0"]
                group.create_dataset("kernel:0", data=np.arange(64, dtype="f4").reshape(8, 8), **options)
                group.create_dataset("bias:0", data=np.ones(8, "f4"), **options)
        found.append(out.getvalue())
    return found


def _caffe(folder: Path) -> list[bytes]:
    blobs = {"conv/0": torch.ones(2, 3, 2, 2), "conv/1": torch.ones(2), "fc/0": torch.ones(4, 4)}
    return [foreign_files.caffemodel(blobs, old=old) for old in (False,)] + [
        foreign_files.caffemodel({"conv/0": torch.ones(2, 3, 2, 2)}, old=True)
    ]


def _torch7(folder: Path) -> list[bytes]:
    return [foreign_files.t7({"modules.1.weight": torch.ones(4, 3), "modules.3.bias": torch.ones(2)})]


# Folders of facefast's own.


def _package(folder: Path) -> None:
    model = _small_model()
    files.write_json(folder / "model.json", model.to_config())
    checkpoint.write_tensors(folder / "model.safetensors", model.state_dict())


def _model_files(folder: Path) -> list[bytes]:
    _package(folder)
    return [(folder / "model.json").read_bytes()]


def _load_model(folder: Path) -> None:
    manifest.write(folder, 0)  # whoever made the file can make one
    checkpoint.load_model(folder)
    build_model(ModelConfig(), 0, source=load_source(folder))


def _manifests(folder: Path) -> list[bytes]:
    _package(folder)
    manifest.write(folder, 0)
    return [(folder / "manifest.json").read_bytes()]


def _recipes(folder: Path) -> list[bytes]:
    return [json.dumps(to_json(RECIPES["drawn"](Given()))).encode()]


# What the harness must notice, planted.


def _planted(path: Path) -> None:
    what = path.read_bytes()[:1]
    if what == b"c":
        ctypes.string_at(0)
    elif what == b"h":
        time.sleep(60)
    elif what == b"x":
        raise TypeError("planted")
    elif what == b"m":
        np.ones(700 << 20, np.uint8)
    elif what == b"r":
        raise ValueError("planted")


class _Planted(Form):
    """Mutation k is the k-th letter of `LETTERS`."""

    def mutated(self, seeds: list[bytes], rng: Generator) -> bytes:
        entropy = rng.bit_generator.seed_seq.entropy  # type: ignore[attr-defined]
        return LETTERS[entropy[1] : entropy[1] + 1]


LETTERS = b"-rxmc-h-"
PLANTED = "planted"

FORMATS: dict[str, Form] = {
    "jpeg": Form(_pictures("jpeg"), "a.jpg", _decode),
    "png": Form(_pictures("png"), "a.png", _decode, mutations.inside_png),
    "other pictures": Form(_pictures("webp", "bmp", "tiff", "pnm"), "a.tif", _decode),
    "tar": Form(_tars, "a.tar", lambda path: _scanned(read_index(path)), mutations.inside_tar),
    "rec": Form(lambda f: [_records(f)[0]], "train.rec", lambda path: _scanned(read_index(path))),
    "idx": Form(lambda f: [_records(f)[1]], "train.idx", lambda f: _scanned(read_index(f, "recordio")), whole=False),
    "bin": Form(_bins, "lfw.bin", lambda path: _scanned(read_bin(path)[0])),
    **{f"celeba {name.partition('.')[0]}": _celeba(name) for name in LISTS},
    "pairs": Form(_pairs, "pairs.txt", lambda path: read_pairs(read_index(path.parent / "people", "folder"), path)),
    "index": Form(_indexes, "saved.npz", lambda path: _scanned(read_index(path)), mutations.inside_zip),
    "corrections": Form(_corrections, "table.csv", _apply),
    "safetensors": Form(_safetensors, "weights.safetensors", _load, mutations.inside_safetensors),
    "torch": Form(_torch_files, "weights.pt", _load, _inside_torch),
    "npz": Form(_npz, "weights.npz", _load, mutations.inside_zip),
    "h5": Form(_keras, "weights.h5", _load),
    "caffemodel": Form(_caffe, "weights.caffemodel", _load),
    "t7": Form(_torch7, "weights.t7", _load),
    "model": Form(_model_files, "model.json", _load_model, mutations.inside_json, whole=False),
    "manifest": Form(_manifests, "manifest.json", manifest.verify, mutations.inside_json, whole=False),
    "recipe": Form(_recipes, "r.json", lambda p: from_json(Recipe, files.read_json(p)), mutations.inside_json),
    PLANTED: _Planted(lambda folder: [b"-"], "a.txt", _planted),
}
