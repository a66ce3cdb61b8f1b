"""How fast photographs become augmented batches: our loader, DALI's stock operators, torchvision, FFCV where it is
importable, and decoding alone.

    python benchmarks/bench_input.py [--data ../shared/data/celeba-mini | --data drawn] [--sizes 112 224] [--rounds 9]
        [--device cuda] [--threads 2] [--batch 128] [--quick]
    python -m pytest benchmarks/bench_input.py --benchmark-enable

Every contender starts from row numbers or file names and ends with a float32 tensor [B, 3, H, W] on the device, on the
same files and as many threads (or worker processes). They take turns, one stretch of batches each per round, so
that whatever else the machine does hits all of them; ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as nvdali
import pytest
import torch
from libraries import library, missing
from nvidia.dali import fn, types
from PIL import Image
from record import record
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from facefast.data import FaceIndex, make_loader, read_index
from facefast.data.augment import draw
from facefast.data.dali import regions
from facefast.data.drawn import synthetic
from facefast.data.sampler import EpochSampler
from facefast.recipe import AugmentSpec, ImageSpec

SHARED = Path(__file__).parents[2] / "shared/data/celeba-mini"


@dataclass(frozen=True)
class Way:
    """What all contenders have in common."""

    index: FaceIndex
    image: ImageSpec
    device: str = "cpu"
    batch: int = 128
    threads: int = 2


# Every kind of augmentation at an ordinary strength.
AUGMENT = AugmentSpec(
    crop=0.2,
    crop_ratio=0.1,
    shift=0.03,
    flip=0.5,
    rotation=10,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.05,
    grey=0.1,
    erase=0.25,
)

DRAWN = synthetic.DrawnSpec(identities=(40, 0, 0))  # 800 pictures

Batches = Iterator[Tensor]


def ours(way: Way) -> Batches:
    """The loader as training uses it: sampler, native reading, draws, decoding, the fused operator."""
    loader = make_loader(
        way.index,
        way.image,
        batch_size=way.batch,
        sampler=EpochSampler(np.arange(len(way.index)), way.batch, seed=0),
        augment=AUGMENT,
        threads=way.threads,
        channels_last=False,
        device=way.device,
    )
    for *_, batch in loader.stream(0, 0, until=(1 << 30, 0)):
        yield batch.images


def _run(graph: nvdali.Pipeline) -> Batches:
    """Tensors of a DALI graph without copies."""
    graph.build()
    while True:
        (batch,) = graph.run()
        yield torch.utils.dlpack.from_dlpack(batch.as_tensor())


def _graph(way: Way) -> nvdali.Pipeline:
    device = 0 if way.device == "cuda" else None
    return nvdali.Pipeline(batch_size=way.batch, num_threads=way.threads, device_id=device, seed=0)


def _decoder(way: Way) -> str:
    return "mixed" if way.device == "cuda" else "cpu"


def _paths(index: FaceIndex) -> list[str]:
    return [index.path(row) for row in range(len(index))]


def stock(way: Way, *, region: bool) -> Batches:
    """DALI's own operators on the very same numbers, in the fastest arrangement found.

    Files are read by DALI's reader; warp_affine does the matrix, coord_transform the colours (10 % faster than
    color_twist and crop_mirror_normalize), then erase and transpose. With `region`, decoding is confined to what the
    matrix needs, as in our loader; the files then wait in memory, since the reader's order would not be known.
    """
    index, image = way.index, way.image
    rows, steps = np.arange(len(index)), len(index) // way.batch
    sizes = np.stack([index.widths, index.heights], 1)
    files = [np.fromfile(path, np.uint8) for path in _paths(index)] if region else []

    def feed() -> Iterator[tuple[Any, ...]]:
        for turn in itertools.count():
            chosen = rows[turn % steps * way.batch :][: way.batch]
            matrix, color, erase = draw(index, chosen, image, AUGMENT, 0, turn // steps)
            corner, extent = erase[:, :2].astype(np.float32), (erase[:, 2:] - erase[:, :2]).astype(np.float32)
            fed: tuple[Any, ...] = (color[:, :, :3].copy(), color[:, :, 3].copy(), corner, extent)
            if region:
                start, shape = regions(matrix, sizes[chosen], image.shape)
                matrix[:, :, 2] -= start
                fed = (*fed, [files[row] for row in chosen], start, shape)
            yield (matrix, *fed)

    graph = _graph(way)
    with graph:
        matrix, mix, shift, corner, extent, *rest = fn.external_source(
            source=feed(), num_outputs=8 if region else 5, batch=True
        )
        if region:
            pictures = fn.decoders.image_slice(rest[0], device=_decoder(way), start=rest[1], shape=rest[2], axes=(1, 0))
        else:
            data, _ = fn.readers.file(files=_paths(index))
            pictures = fn.decoders.image(data, device=_decoder(way), output_type=types.RGB)
        warped = fn.warp_affine(pictures, matrix, size=image.shape, fill_value=0)
        colored = fn.coord_transform(warped, M=mix, T=shift, dtype=types.FLOAT)
        erased = fn.erase(colored, anchor=corner, shape=extent, axis_names="WH", fill_value=0)
        graph.set_outputs(fn.transpose(erased, perm=[2, 0, 1]))
    return _run(graph)


def decode_only(way: Way) -> Batches:
    """DALI's reader and decoder and nothing else; every batch is given out as an empty tensor."""
    graph = _graph(way)
    with graph:
        data, _ = fn.readers.file(files=_paths(way.index))
        graph.set_outputs(fn.decoders.image(data, device=_decoder(way), output_type=types.RGB))
    graph.build()
    while True:
        graph.run()
        yield torch.empty(way.batch)


class _Pictures(Dataset[Tensor]):
    """torchvision's way: decode in a worker process, then v2 transforms, on tensors or on PIL's pictures."""

    def __init__(self, index: FaceIndex, image: ImageSpec, *, pil: bool) -> None:
        self.paths = _paths(index)
        self.pil = pil
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image.shape, scale=(0.8, 1.0), ratio=(0.91, 1.1)),
                v2.RandomHorizontalFlip(),
                v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR),
                v2.ColorJitter(0.2, 0.2, 0.2, 0.05),
                v2.RandomGrayscale(0.1),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
                v2.RandomErasing(0.25, scale=(0.02, 0.2)),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        if self.pil:
            with Image.open(self.paths[row]) as file:
                picture: Tensor = self.transform(file.convert("RGB"))
        else:
            picture = self.transform(decode_jpeg(read_file(self.paths[row]), ImageReadMode.RGB))
        return picture


def with_torchvision(way: Way, *, pil: bool) -> Batches:
    """A DataLoader with a worker process for each thread of the others."""
    loader = DataLoader(
        _Pictures(way.index, way.image, pil=pil),
        way.batch,
        shuffle=True,
        drop_last=True,
        num_workers=way.threads,
        persistent_workers=True,
        pin_memory=way.device == "cuda",
        worker_init_fn=_one_thread,
    )
    while True:
        for images in loader:
            yield images.to(way.device, non_blocking=True)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def with_ffcv(way: Way, folder: Path) -> Batches:
    """FFCV's loader, from its own file, which is written first: JPEGs as they are, decoded in its threads."""
    from ffcv.fields import BytesField, RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    class Stored(Dataset[tuple[Any, Any]]):
        def __len__(self) -> int:
            return len(way.index)

        def __getitem__(self, row: int) -> tuple[Any, Any]:
            with Image.open(way.index.path(row)) as file:
                return np.asarray(file.convert("RGB")), np.zeros(1, np.uint8)

    path = folder / "pictures.beton"
    if not path.exists():
        DatasetWriter(path, {"image": RGBImageField(write_mode="jpg"), "rest": BytesField()}).from_indexed_dataset(
            Stored()
        )
    grey = np.full(3, 127.5)
    steps = [
        RandomResizedCropRGBImageDecoder(way.image.shape, scale=(0.8, 1.0), ratio=(0.91, 1.1)),
        RandomHorizontalFlip(),
        NormalizeImage(grey, grey, np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        path,
        batch_size=way.batch,
        num_workers=way.threads,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": steps, "rest": None},
    )
    while True:
        for images, *_ in loader:
            yield images.to(way.device, non_blocking=True)


def contenders(way: Way, folder: Path) -> dict[str, Batches]:
    """Everything that takes turns at one size.

    Args:
        folder: for what a library wants to have in a file of its own.
    """
    found = {
        "facefast": ours(way),
        "DALI stock": stock(way, region=False),
        "DALI stock, region": stock(way, region=True),
        "torchvision, tensors": with_torchvision(way, pil=False),
        "torchvision, PIL": with_torchvision(way, pil=True),
        "decode alone": decode_only(way),
    }
    return found if library("FFCV") is None else found | {"FFCV": with_ffcv(way, folder)}


def measure(all_batches: dict[str, Batches], size: int, rounds: int, batches: int) -> dict[str, list[float]]:
    """Images per second of each contender in each round, by batches of so many."""
    ahead = 6  # more than any contender keeps ready, so that none is paid for what it did out of its turn
    rates: dict[str, list[float]] = {name: [] for name in all_batches}
    for stream in all_batches.values():
        for _ in range(2 * ahead):
            next(stream)
    for _ in range(rounds):
        for name, stream in all_batches.items():
            for _ in range(ahead):
                next(stream)
            began = time.perf_counter()
            for _ in range(batches):
                next(stream)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rates[name].append(batches * size / (time.perf_counter() - began))
            time.sleep(0.5)  # its queues fill up again
    return rates


def report(way: Way, rates: dict[str, list[float]]) -> None:
    """Prints the table of one size and records its rows."""
    size, rounds = way.image.size, len(rates["facefast"])
    print(f"\n{size} px on {way.device}, batches of {way.batch}, {way.threads} threads, {rounds} rounds")
    print(f"{'':22}{'images/s':>10}{'lowest':>9}{'highest':>9}{'facefast is':>13}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["facefast"], values, strict=True))
        median = statistics.median(values)
        print(f"{name:22}{median:10.0f}{min(values):9.0f}{max(values):9.0f}{ratio:12.2f}x")
        record(
            "input",
            contender=name,
            size=size,
            batch=way.batch,
            threads=way.threads,
            device=way.device,
            images_per_second=round(median, 1),
            lowest=round(min(values), 1),
            highest=round(max(values), 1),
            rounds=len(values),
            facefast_ratio=round(ratio, 3),
        )
    for name in missing("FFCV"):
        print(f"{name:22}{'not run: not importable here':>30}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SHARED, help="a set that read_index knows, or drawn: faces drawn for this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 224])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=Way.batch, help="pictures of a batch")
    parser.add_argument("--threads", type=int, default=Way.threads)
    parser.add_argument("--batches", type=int, default=16, help="timed batches per turn")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 4 batches")
    options = parser.parse_args()
    rounds, batches = (3, 4) if options.quick else (options.rounds, options.batches)
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic.write(Path(folder), DRAWN) if options.data == "drawn" else options.data
        index = read_index(root).scanned()
        for size in options.sizes:
            way = Way(index, ImageSpec(size), options.device, options.batch, options.threads)
            report(way, measure(contenders(way, Path(folder)), way.batch, rounds, batches))


@pytest.mark.parametrize("size", [112, 224])
def test_input_beside_its_peers(size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the command, for `make bench`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here; run the command with --data")
    way = Way(read_index(SHARED).scanned(), ImageSpec(size))
    rates = measure(contenders(way, tmp_path), way.batch, rounds=9, batches=16)
    with capsys.disabled():
        report(way, rates)


if __name__ == "__main__":
    main()
