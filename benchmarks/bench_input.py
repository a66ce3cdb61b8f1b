"""How fast photographs become augmented batches: our loader, DALI's stock operators, torchvision, and decoding alone.

    python benchmarks/bench_input.py [--data ../shared/data/celeba-mini | --data drawn] [--sizes 112 224] [--rounds 9]
        [--device cuda] [--quick]
    python -m pytest benchmarks/bench_input.py --benchmark-enable

Every contender starts from row numbers or file names and ends with a float32 tensor [B, 3, H, W] on the device, on the
same files and the same two threads (or worker processes). They take turns, one stretch of batches each per round, so
that whatever else the machine does hits all of them; ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as nvdali
import pytest
import torch
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
BATCH = 128
THREADS = 2
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


def ours(index: FaceIndex, image: ImageSpec, device: str) -> Batches:
    """The loader as training uses it: sampler, native reading, draws, decoding, the fused operator."""
    loader = make_loader(
        index,
        image,
        batch_size=BATCH,
        sampler=EpochSampler(np.arange(len(index)), BATCH, seed=0),
        augment=AUGMENT,
        threads=THREADS,
        channels_last=False,
        device=device,
    )
    for *_, batch in loader.stream(0, 0, until=(1 << 30, 0)):
        yield batch.images


def _run(graph: nvdali.Pipeline) -> Batches:
    """Tensors of a DALI graph without copies."""
    graph.build()
    while True:
        (batch,) = graph.run()
        yield torch.utils.dlpack.from_dlpack(batch.as_tensor())


def _graph(device: str) -> nvdali.Pipeline:
    return nvdali.Pipeline(batch_size=BATCH, num_threads=THREADS, device_id=0 if device == "cuda" else None, seed=0)


def _decoder(device: str) -> str:
    return "mixed" if device == "cuda" else "cpu"


def _paths(index: FaceIndex) -> list[str]:
    return [index.path(row) for row in range(len(index))]


def stock(index: FaceIndex, image: ImageSpec, device: str, *, region: bool) -> Batches:
    """DALI's own operators on the very same numbers, in the fastest arrangement found.

    Files are read by DALI's reader; warp_affine does the matrix, coord_transform the colours (10 % faster than
    color_twist and crop_mirror_normalize), then erase and transpose. With `region`, decoding is confined to what the
    matrix needs, as in our loader; the files then wait in memory, since the reader's order would not be known.
    """
    rows, steps = np.arange(len(index)), len(index) // BATCH
    sizes = np.stack([index.widths, index.heights], 1)
    files = [np.fromfile(path, np.uint8) for path in _paths(index)] if region else []

    def feed() -> Iterator[tuple[Any, ...]]:
        for turn in itertools.count():
            chosen = rows[turn % steps * BATCH :][:BATCH]
            matrix, color, erase = draw(index, chosen, image, AUGMENT, 0, turn // steps)
            corner, extent = erase[:, :2].astype(np.float32), (erase[:, 2:] - erase[:, :2]).astype(np.float32)
            fed: tuple[Any, ...] = (color[:, :, :3].copy(), color[:, :, 3].copy(), corner, extent)
            if region:
                start, shape = regions(matrix, sizes[chosen], image.shape)
                matrix[:, :, 2] -= start
                fed = (*fed, [files[row] for row in chosen], start, shape)
            yield (matrix, *fed)

    graph = _graph(device)
    with graph:
        matrix, mix, shift, corner, extent, *rest = fn.external_source(
            source=feed(), num_outputs=8 if region else 5, batch=True
        )
        if region:
            pictures = fn.decoders.image_slice(
                rest[0], device=_decoder(device), start=rest[1], shape=rest[2], axes=(1, 0)
            )
        else:
            data, _ = fn.readers.file(files=_paths(index))
            pictures = fn.decoders.image(data, device=_decoder(device), output_type=types.RGB)
        warped = fn.warp_affine(pictures, matrix, size=image.shape, fill_value=0)
        colored = fn.coord_transform(warped, M=mix, T=shift, dtype=types.FLOAT)
        erased = fn.erase(colored, anchor=corner, shape=extent, axis_names="WH", fill_value=0)
        graph.set_outputs(fn.transpose(erased, perm=[2, 0, 1]))
    return _run(graph)


def decode_only(index: FaceIndex, device: str) -> Batches:
    """DALI's reader and decoder and nothing else; every batch is given out as an empty tensor."""
    graph = _graph(device)
    with graph:
        data, _ = fn.readers.file(files=_paths(index))
        graph.set_outputs(fn.decoders.image(data, device=_decoder(device), output_type=types.RGB))
    graph.build()
    while True:
        graph.run()
        yield torch.empty(BATCH)


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


def with_torchvision(index: FaceIndex, image: ImageSpec, *, pil: bool) -> Batches:
    """A DataLoader of two worker processes."""
    loader = DataLoader(
        _Pictures(index, image, pil=pil),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=THREADS,
        persistent_workers=True,
        worker_init_fn=_one_thread,
    )
    while True:
        yield from loader


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def contenders(index: FaceIndex, image: ImageSpec, device: str = "cpu") -> dict[str, Batches]:
    """Everything that takes turns at one size."""
    return {
        "facefast": ours(index, image, device),
        "DALI stock": stock(index, image, device, region=False),
        "DALI stock, region": stock(index, image, device, region=True),
        "torchvision, tensors": (b.to(device) for b in with_torchvision(index, image, pil=False)),
        "torchvision, PIL": (b.to(device) for b in with_torchvision(index, image, pil=True)),
        "decode alone": decode_only(index, device),
    }


def measure(all_batches: dict[str, Batches], rounds: int, batches: int) -> dict[str, list[float]]:
    """Images per second of each contender in each round."""
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
            rates[name].append(batches * BATCH / (time.perf_counter() - began))
            time.sleep(0.5)  # its queues fill up again
    return rates


def report(size: int, rates: dict[str, list[float]], device: str = "cpu") -> None:
    """Prints the table of one size and records its rows."""
    print(f"\n{size} px on {device}, batches of {BATCH}, {THREADS} threads, {len(rates['facefast'])} rounds")
    print(f"{'':22}{'images/s':>10}{'lowest':>9}{'highest':>9}{'facefast is':>13}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["facefast"], values, strict=True))
        median = statistics.median(values)
        print(f"{name:22}{median:10.0f}{min(values):9.0f}{max(values):9.0f}{ratio:12.2f}x")
        record(
            "input",
            contender=name,
            size=size,
            batch=BATCH,
            threads=THREADS,
            device=device,
            images_per_second=round(median, 1),
            lowest=round(min(values), 1),
            highest=round(max(values), 1),
            rounds=len(values),
            facefast_ratio=round(ratio, 3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SHARED, help="a set that read_index knows, or drawn: faces drawn for this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[112, 224])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=16, help="timed batches per turn")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 4 batches")
    options = parser.parse_args()
    rounds, batches = (3, 4) if options.quick else (options.rounds, options.batches)
    with tempfile.TemporaryDirectory() as folder:
        root = synthetic.write(Path(folder), DRAWN) if options.data == "drawn" else options.data
        index = read_index(root).scanned()
        for size in options.sizes:
            report(size, measure(contenders(index, ImageSpec(size), options.device), rounds, batches), options.device)


@pytest.mark.parametrize("size", [112, 224])
def test_input_beside_its_peers(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the command, for `make bench`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here; run the command with --data")
    rates = measure(contenders(read_index(SHARED).scanned(), ImageSpec(size)), rounds=9, batches=16)
    with capsys.disabled():
        report(size, rates)


if __name__ == "__main__":
    main()
