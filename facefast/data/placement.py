"""Where pictures for a GPU are decoded: by its JPEG hardware, by its cores or by the processor's.

What is best depends on the pictures, on the cores beside the GPU and on what else the GPU has to do, so it is measured,
beside work like a network's. That takes seconds: it is done where a run is long enough to gain by it, and kept for the
next run with such pictures on such a machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import nvidia.dali as nvdali
import torch

from facefast.data.index import FaceIndex
from facefast.data.loader import make_loader
from facefast.data.sampler import EpochSampler
from facefast.recipe import AugmentSpec, Decoding, ImageSpec, Place, Reading
from facefast.runtime import files
from facefast.runtime.process import Runtime

Candidate = tuple[Place, float]
"""A place and the part of the pictures that the JPEG hardware takes."""
USUAL: Candidate = ("gpu", Reading.hw_decoder_load)
CANDIDATES: tuple[Candidate, ...] = (
    USUAL,
    ("gpu", 1.0),
    ("gpu", 0.37),
    ("gpu", 0.0),
    ("regions", Reading.hw_decoder_load),
    ("cpu", 0.0),
)
PAYS = 2_000_000
"""Pictures of a run from which measuring pays: even a fast decoder takes a minute for them."""
WARM, MEASURED = 4, 12
"""Batches of each candidate before the clock starts, and while it runs."""
WORK = 1e-4
"""Seconds of the GPU for each picture while it is measured, about what a fast network takes."""
GAIN = 1.03
"""Times the usual place's rate that another one has to reach: less is noise."""


@dataclass(frozen=True)
class Job:
    """Batches as a run wants them, whose decoding is to be placed."""

    index: FaceIndex
    image: ImageSpec
    augment: AugmentSpec | None
    reading: Reading
    batch_size: int
    """Of one process."""
    dtype: torch.dtype
    channels_last: bool
    pictures: int
    """That the whole run reads."""


Measure = Callable[[Job, Candidate, Runtime], float]
"""Pictures a second with a candidate; 0 where it does not work."""


def asked_for(place: str, hw_decoder_load: float) -> list[Candidate]:
    """The candidates that a recipe leaves, in the order of `CANDIDATES`.

    Args:
        place: data.decoding, a place or auto.
        hw_decoder_load: data.hw_decoder_load, below 0 where it is left open.
    """
    found: list[Candidate] = []
    for where, load in CANDIDATES:
        if place in ("auto", where):
            candidate = (where, load if hw_decoder_load < 0 or where == "cpu" else hw_decoder_load)
            if candidate not in found:
                found.append(candidate)
    return found


def choose(job: Job, candidates: Sequence[Candidate], run: Runtime, measure: Measure | None = None) -> Decoding:
    """Where a run's pictures are decoded, the same on every rank; every rank must ask.

    Measured by all ranks at once, since they share the cores: the slowest one counts.

    Args:
        candidates: of `asked_for`, the usual one first.
        measure: takes the place of `pictures_a_second` in tests.
    """
    if len(candidates) == 1:
        return Decoding(*candidates[0], "asked")
    cache = cache_file(job, candidates, run)
    kept = run.broadcast(_load(cache, candidates) if run.is_main else None)
    if kept is not None:
        return Decoding(*kept, "measured")
    if job.pictures < PAYS:
        return Decoding(*candidates[0], "usual")
    rates: dict[Candidate, float] = {}
    _ = (measure or pictures_a_second)(job, candidates[0], run)  # brings the files into memory
    for candidate in candidates:
        run.barrier()
        rates[candidate] = min(run.gather((measure or pictures_a_second)(job, candidate, run)))
    best = best_of(rates)
    if run.is_main:
        _save(cache, best, rates, run)
    return Decoding(*best, "measured")


def check(decoding: Decoding) -> None:
    """Raises ValueError unless a loader could decode so."""
    Reading(decoding=decoding.place, hw_decoder_load=decoding.hw_decoder_load)


def best_of(rates: Mapping[Candidate, float]) -> Candidate:
    """The fastest candidate, or the first where that is not clearly slower."""
    usual, best = next(iter(rates)), max(rates, key=lambda candidate: rates[candidate])
    return best if rates[best] >= GAIN * rates[usual] else usual


def pictures_a_second(job: Job, candidate: Candidate, run: Runtime) -> float:
    """Rate of this process at which batches are decoded and a GPU works on each as long as a network would."""
    place, load = candidate
    rows = np.flatnonzero(job.index.faults == 0)
    count = min(len(rows), (WARM + MEASURED) * job.batch_size)
    rows = np.random.Generator(np.random.PCG64(run.world.rank)).choice(rows, count, replace=False)
    sampler = EpochSampler(rows, job.batch_size, seed=run.world.rank)
    work = Work(run.device, WORK * job.batch_size)
    reading = job.reading
    try:
        with make_loader(
            job.index,
            job.image,
            sampler=sampler,
            augment=job.augment,
            device=run.device,
            dtype=job.dtype,
            channels_last=job.channels_last,
            threads=reading.threads,
            max_bad_fraction=1.0,
            max_pixels=reading.max_pixels,
            decoding=place,
            hw_decoder_load=load,
        ) as loader:
            until = divmod(WARM + MEASURED, sampler.steps_per_epoch)
            began = time.perf_counter()
            for number, _ in enumerate(loader.stream(0, 0, until=until)):
                if number == WARM:
                    work.wait()
                    began = time.perf_counter()
                work()
            work.wait()
            return MEASURED * job.batch_size / (time.perf_counter() - began)
    except RuntimeError:  # no room for it on this GPU, or no such decoder there
        return 0.0


class Work:
    """Products of matrices that keep a device busy for some seconds, as the passes of a network do."""

    SIDE = 2048

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device = device
        side = self.SIDE if device.type == "cuda" else self.SIDE // 8
        self.matrix = torch.full((side, side), 1 / side, dtype=torch.bfloat16, device=device)
        self.number = 1
        self()
        self.wait()
        began = time.perf_counter()
        for _ in range(10):
            self()
        self.wait()
        self.number = max(1, round(seconds / ((time.perf_counter() - began) / 10)))

    def __call__(self) -> None:
        """Sends the work to the device."""
        for _ in range(self.number):
            torch.mm(self.matrix, self.matrix)

    def wait(self) -> None:
        """Until the device has done it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def cache_file(job: Job, candidates: Sequence[Candidate], run: Runtime) -> Path:
    """Where an answer is kept: in $XDG_CACHE_HOME/facefast, by machine, versions and kind of pictures."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facefast"
    text = json.dumps([*_machine(run), job.reading.threads, *kind_of(job), list(candidates)])
    return folder / f"decoding-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"


def _machine(run: Runtime) -> list[Any]:
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    return [device, nvdali.__version__, len(os.sched_getaffinity(0)), run.world.local_size]


def kind_of(job: Job) -> list[Any]:
    """What decides how fast pictures are decoded: their formats, bytes and pixels, as powers of 2, and what is made of
    them."""
    index = job.index
    rows = np.flatnonzero(index.faults == 0)[:: max(1, len(index) // 1000)]
    endings = sorted({os.path.splitext(path)[1].lower().decode("utf-8", "replace") for path in index.paths[rows]})
    pixels = np.median(index.widths[rows].astype(float) * index.heights[rows]) if len(rows) else 0
    # An index of single files does not have their lengths: pixels must do.
    known = index.lengths[rows][index.lengths[rows] > 0]
    sizes = [round(math.log2(max(1.0, float(value)))) for value in (pixels, np.median(known) if len(known) else 0)]
    return [endings, *sizes, list(job.image.shape), str(job.dtype), job.channels_last, job.batch_size]


def _load(path: Path, candidates: Sequence[Candidate]) -> Candidate | None:
    """What was kept; None where there is nothing sound."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = files.read_json(path)
        candidate = (found["decoding"], float(found["hw_decoder_load"]))
        if candidate[0] in get_args(Place) and candidate in candidates:
            return candidate
    return None


def _save(path: Path, best: Candidate, rates: Mapping[Candidate, float], run: Runtime) -> None:
    device, dali, cores, processes = _machine(run)
    found = {
        "decoding": best[0],
        "hw_decoder_load": best[1],
        "pictures_a_second": [[*candidate, rate] for candidate, rate in rates.items()],
        "machine": {"device": device, "dali": dali, "cores": cores, "processes": processes},
    }
    with contextlib.suppress(OSError, ValueError):  # a cache: without it the next run measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, found)
