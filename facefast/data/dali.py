"""The DALI graph: encoded pictures and their numbers in, batches as the model wants them out.

The fused operator is `csrc/dali`, built as `facefast/_dali.so`; this module loads it, feeds it and hands its memory to
torch. The numbers are those of `augment.draw`, the reference for the pixels is `oracle`.
"""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali as nvdali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, plugin_manager, types
from torch.utils.dlpack import from_dlpack

from facefast.data.augment import Draw
from facefast.data.together import Source, Together
from facefast.recipe import ImageSpec, Place, Reading

PLUGIN = Path(__file__).parents[1] / "_dali.so"
BUILD = "python -m pip install --no-build-isolation --no-deps --editable ."

# bfloat16 is no type of DALI's: its bits travel as int16.
_TYPES = {
    torch.float32: types.FLOAT,
    torch.float16: types.FLOAT16,
    torch.bfloat16: types.INT16,
}
# Pixels around a region: what JPEG's chroma upsampling looks at beside it, and one for rounding.
_MARGIN = 3


class Pipeline:
    """Batches of one source, decoded and augmented ahead of the caller. Made by `build_pipeline`.

    Attributes:
        batch_size: the largest batch that it takes.
    """

    def __init__(
        self, graph: nvdali.Pipeline, asked: Together, batch_size: int, dtype: torch.dtype, channels_last: bool
    ) -> None:
        self._graph: nvdali.Pipeline | None = graph
        self._asked = asked  # the source, where the graph finds it too: the graph must not hold what holds it
        self.batch_size = batch_size
        self._dtype = dtype
        self._channels_last = channels_last

    def run(self) -> torch.Tensor:
        """The next batch, [B, 3, H, W]; calls the source for batches to come.

        The tensor shares DALI's memory and keeps it: it stays valid after later runs and after `close`, and DALI takes
        the memory back when the last tensor of the batch is gone. On a GPU it is ready on torch's current stream.

        Raises:
            StopIteration: the source is through and every batch was handed out; `reset` makes it start again.
            RuntimeError: DALI failed, as it does on a picture that it cannot decode. Which batch is lost and whether
                the next run works is not documented: close this one and build another.
        """
        if self._graph is None:
            raise ValueError("the pipeline is closed; build another one")
        return self._asked.images(self._run)

    def _run(self) -> torch.Tensor:
        assert self._graph is not None
        # DALI makes the result ready in the order of torch's stream, so the host need not wait for it.
        stream = torch.cuda.current_stream() if self._graph.device_id is not None else None
        (pictures,) = self._graph.run(stream)
        # DLPack shares the memory: the tensor's deleter is what gives it back to DALI.
        batch: torch.Tensor = from_dlpack(pictures.as_tensor())
        if self._dtype == torch.bfloat16:
            batch = batch.view(torch.bfloat16)
        return batch.permute(0, 3, 1, 2) if self._channels_last else batch  # a view: NHWC memory, NCHW axes

    def reset(self, source: Source | None = None) -> None:
        """Makes the pipeline ask its source, or another one, again after StopIteration."""
        self._asked.reset(source)
        if self._graph is not None:
            self._graph.reset()

    def close(self) -> None:
        """Ends DALI's threads; batches that were handed out stay valid."""
        self._graph = None


def build_pipeline(
    image: ImageSpec,
    *,
    batch_size: int,
    device: str,
    source: Source,
    dtype: torch.dtype,
    channels_last: bool,
    threads: int,
    prefetch: int,
    decoding: Place = "gpu",
    hw_decoder_load: float = Reading.hw_decoder_load,
    together: int = 1,
) -> Pipeline:
    """The one graph: decode, then matrix, colour and erase in one pass over each picture.

    Args:
        image: gives the size of the output.
        batch_size: the largest batch that the source returns.
        device: "cpu", or "gpu" for the current CUDA device.
        source: called by `run` on the caller's thread, `prefetch` batches ahead; raises StopIteration at the end.
        dtype: float32, float16 or bfloat16.
        channels_last: whether the memory is NHWC (`torch.channels_last`) rather than NCHW.
        threads: DALI's worker threads.
        prefetch: batches in flight.
        decoding: where pictures for a GPU are decoded: there (DALI's `mixed` decoder), whole or the region that the
            matrix asks for, or on the CPU, which hands the region over as bytes.
        hw_decoder_load: part of the pictures that the GPU's JPEG hardware takes.
        together: pictures, of consecutive batches, that the graph takes at once where they are that few; no more than
            `batch_size`. `prefetch` then counts what it takes at once.

    Raises:
        ValueError: an argument is out of its range, or the plugin is missing, of another DALI version, or without its
            CUDA part where the device needs it.
    """
    if device not in ("cpu", "gpu"):
        raise ValueError(f"device is {device!r}; it must be cpu or gpu")
    if dtype not in _TYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, _TYPES))}")
    if min(batch_size, threads, prefetch) < 1:
        raise ValueError(
            f"batch_size, threads and prefetch are {batch_size}, {threads} and {prefetch}; each must be at least 1"
        )
    gpu = device == "gpu"
    load_plugin(cuda=gpu)
    asked = Together(source, min(together, batch_size))
    graph = define(
        image.shape,
        asked,
        batch_size=batch_size,
        device_id=torch.cuda.current_device() if gpu else None,
        decoding=decoding if gpu else None,
        hw_decoder_load=hw_decoder_load,
        dtype=dtype,
        channels_last=channels_last,
        threads=threads,
        prefetch=prefetch,
    )
    graph.build()
    return Pipeline(graph, asked, batch_size, dtype, channels_last)


def define(
    shape: tuple[int, int],
    source: Source,
    *,
    batch_size: int,
    device_id: int | None,
    decoding: Place | None,
    hw_decoder_load: float,
    dtype: torch.dtype,
    channels_last: bool,
    threads: int,
    prefetch: int,
) -> nvdali.Pipeline:
    """The graph of `build_pipeline`, not built yet: a GPU's can be written down without one.

    Args:
        shape: (height, width) of the output.
        decoding: None for the CPU, where the operator works too.
    """
    whole = decoding == "gpu"

    def feed() -> tuple[Any, ...]:
        data, draw, sizes = source()
        # One array for the numbers of a batch, so that one copy brings them.
        if whole:  # regions start at 0
            return data, pack(draw, np.zeros_like(sizes))
        start, extent = regions(draw.matrix, sizes, shape)
        return data, pack(draw, start), start, extent

    # Its streams have the priority of any other: DALI 2.4 accepts `default_cuda_stream_priority` and ignores it.
    graph = nvdali.Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # outputs own their memory, so torch can keep it without a copy
    )
    # Chroma is interpolated as libjpeg-turbo does it: without, a subsampled JPEG's pixels differ from the CPU's by 0.48
    # of 255 on average, with it by 0.0135, at no speed that could be told from noise (H100).
    on_gpu = {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": hw_decoder_load}
    options: dict[str, Any] = on_gpu if decoding in ("gpu", "regions") else {"device": "cpu"}
    with graph:
        inputs = [types.UINT8, types.FLOAT] if whole else [types.UINT8, types.FLOAT, types.INT32, types.INT32]
        data, numbers, *region = fn.external_source(source=feed, num_outputs=len(inputs), dtype=inputs, ndim=1)
        # No decoder of DALI 2.4 offers libjpeg's scaled decoding; the operator averages large pictures instead.
        # use_fast_idct would save about 3 % and move pixels by a level of 255 on average, 10 at most: not worth it.
        # YCbCr would not save the decoder's conversion of each picture: it decodes to RGB first and converts back.
        if whole:  # which is what the JPEG hardware is made for
            pictures = fn.decoders.image(data, output_type=types.RGB, **options)
        else:  # only the rows and columns that the matrix asks for, which saves a third of a CPU's decoding
            start, extent = region
            pictures = fn.decoders.image_slice(
                data, start=start, shape=extent, axes=(1, 0), output_type=types.RGB, **options
            )
        if decoding == "cpu":
            pictures = pictures.gpu()
        batch = fn.face_augment(  # type: ignore[attr-defined]  # the plugin brings it
            pictures,
            numbers=numbers,
            size=shape,
            dtype=_TYPES[dtype],
            layout="HWC" if channels_last else "CHW",
        )
        graph.set_outputs(batch)
    return graph


def regions(
    matrix: NDArray[np.float32], sizes: NDArray[Any], shape: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """What of each picture the operator can touch: start and extent, each int32 [B, 2] as (x, y).

    Args:
        matrix: float32 [B, 2, 3], output centre to picture.
        sizes: int [B, 2], (width, height) of the pictures.
        shape: (height, width) of the output.
    """
    # An affine map takes the output's middle to the middle of what it covers. Along a source axis that reaches to
    # either side by half of the output's sides (between pixel centres) times the absolute values of the matrix row.
    rows = matrix.astype(np.float64)
    middle = rows @ np.array([shape[1] / 2, shape[0] / 2, 1.0])  # [B, 2]
    half = np.abs(rows[:, :, :2]) @ np.array([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    # A tent of radius R, after blocks of at most R / 2 (augment_math.h).
    reach = half + 1.5 * np.maximum(1.0, np.hypot(rows[:, :, 0], rows[:, :, 1])) + _MARGIN
    # A picture that the matrix misses altogether is still decoded, in one pixel.
    start = np.clip(np.floor(middle - reach), 0, sizes - 1)
    stop = np.clip(np.ceil(middle + reach), start + 1, sizes)
    return start.astype(np.int32), (stop - start).astype(np.int32)


def pack(draw: Draw, start: NDArray[np.int32]) -> NDArray[np.float32]:
    """The operator's numbers: float32 [B, 24] of matrix, colour, erase and the start of the decoded region."""
    count = len(start)
    numbers = np.empty((count, 24), np.float32)
    numbers[:, :6] = draw.matrix.reshape(count, 6)
    numbers[:, 6:18] = draw.color.reshape(count, 12)
    numbers[:, 18:22] = draw.erase
    numbers[:, 22:] = start
    return numbers


def decode_probe(data: bytes | NDArray[np.uint8], size: tuple[int, int] | None = None) -> str | None:
    """Why DALI cannot use one picture, or None if it can.

    Args:
        data: the bytes of the file.
        size: (width, height) after EXIF orientation as the loader knows it, to be compared with what DALI sees.
    """
    picture = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    if picture.size == 0:
        return "the file is empty"
    # One pipeline is kept for all probes, and serves one thread at a time.
    with _probe_lock:
        try:
            height, width, _ = _probe().run(data=[picture])[0].shape()[0]
        except RuntimeError as error:
            _probe.cache_clear()  # a pipeline that failed is not used again
            return _reason(str(error))
    if size is not None and (width, height) != tuple(size):
        return f"DALI sees {width} x {height} pixels where {size[0]} x {size[1]} were expected"
    return None


_probe_lock = threading.Lock()
# nvimgcodec.h, nvimgcodecStatus_t
_STATUS = {"'#3'": "bad code stream", "'#4'": "unsupported kind of file"}


@lru_cache(maxsize=1)
def _probe() -> nvdali.Pipeline:
    graph = nvdali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with graph:
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        graph.set_outputs(fn.decoders.image(data, device="cpu", output_type=types.RGB))
    graph.build()
    return graph


def _reason(message: str) -> str:
    """What DALI says between the traceback of the graph's definition and its farewell."""
    reason = message.partition("encountered:")[2].partition("Current pipeline object")[0].strip()
    for code, meaning in _STATUS.items():
        reason = reason.replace(code, meaning)
    return reason.replace(" sample #0 :", "") or message.strip()


@lru_cache(maxsize=2)
def load_plugin(cuda: bool = False) -> None:
    """Registers `fn.face_augment` with DALI, once.

    Args:
        cuda: whether the GPU operator is needed.

    Raises:
        ValueError: the plugin is missing, or was built against another version of DALI, or lacks its CUDA part; the
            message has the command that builds it.
    """
    check_plugin(PLUGIN, nvdali.__version__, cuda)
    plugin_manager.load_library(str(PLUGIN))


def check_plugin(path: Path, installed: str, cuda: bool = False) -> None:
    """Raises ValueError unless the plugin at `path` fits the installed DALI. Reads the file without running it."""
    # DALI promises no binary compatibility: a plugin of another version may crash the process while it is loaded.
    if not path.exists():
        raise ValueError(f"the DALI plugin {path} is not there; build it with: {BUILD}")
    found = re.search(rb"facefast plugin for DALI ([\w.+-]+) with ([\w,]+)", path.read_bytes())
    if found is None:
        raise ValueError(f"{path} is no plugin of facefast's; build it with: {BUILD}")
    version, parts = found[1].decode(), found[2].decode().split(",")
    if version != installed:
        raise ValueError(
            f"{path} was built against DALI {version}, but {installed} is installed; rebuild it with: {BUILD}"
        )
    if cuda and "cuda" not in parts:
        raise ValueError(
            f"{path} was built without its CUDA part, which device gpu needs; rebuild it with: FACEFAST_CUDA=1 {BUILD}"
        )
