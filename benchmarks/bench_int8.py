"""Embedding a picture on a CPU: what int8 brings beside float32, in ONNX Runtime and in torch.

    python benchmarks/bench_int8.py [--backbones mobilefacenet ...] [--batches 1 32] [--threads 1 2] [--rounds 9]
    python -m pytest benchmarks/bench_int8.py --benchmark-enable

Contenders, on normalised pictures of 112x96 pixels, random weights:
  torch        float32, eager, channels last
  onnxruntime  float32, the file of `facefast.export`
  rewritten    the same with PReLUs as `onnx_graph.split_prelus` writes them, still float32
  int8         the file of `facefast.compress`
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import onnx
import onnxruntime
import pytest
import torch
from record import record
from timing import interleaved, ratio, summary

from facefast.deploy import int8, onnx_file, onnx_graph
from facefast.models import FaceModel, build_model
from facefast.recipe import ImageSpec, ModelConfig

BACKBONES = ("mobilefacenet", "mobilefacenet_short")
BATCHES = (1, 32)
THREADS = (1, 2)
IMAGE = ImageSpec(size=112, width=96, template="arcface_112x96")


def make_model(backbone: str) -> FaceModel:
    """Random weights; PReLUs with some slopes above 1, as training leaves them, so that none is made easier than real
    ones."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone), 0, IMAGE)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.PReLU):
                module.weight.uniform_(-0.2, 1.2)
    return model.eval()


def contenders(backbone: str) -> tuple[FaceModel, dict[str, onnx.ModelProto]]:
    """The torch model and what ONNX Runtime is given."""
    model = make_model(backbone)
    parent = onnx_file.network_of(model)
    found = {"onnxruntime": parent}
    if any(node.op_type == "PRelu" for node in parent.graph.node):
        graph = onnx_graph.Graph(onnx_graph.copied(parent))
        onnx_graph.flatten_slopes(graph)
        onnx_graph.split_prelus(graph)
        found["rewritten"] = graph.model
    found["int8"] = int8.quantise(parent, torch.randn(16, 3, *IMAGE.shape).numpy(), target=-1).model
    return model, found


def measure(
    model: FaceModel, files: dict[str, onnx.ModelProto], batch: int, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds per batch, one number per round."""
    torch.set_num_threads(threads)
    images = torch.randn(batch, 3, *IMAGE.shape)
    embedder = onnx_file.Embedder(model).eval()
    embedder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster one, 1.75 times
    nhwc, plain = images.contiguous(memory_format=torch.channels_last), {"images": images.numpy()}

    def eager() -> object:
        with torch.inference_mode():
            return embedder(nhwc)

    runs: dict[str, Callable[[], object]] = {"torch": eager}
    for name, file in files.items():
        session = onnx_graph.session(file, threads)
        runs[name] = functools.partial(session.run, None, plain)
    return interleaved(runs, rounds)


def report(
    backbone: str, batch: int, threads: int, files: dict[str, onnx.ModelProto], seconds: dict[str, list[float]]
) -> None:
    """Prints a table, in milliseconds per batch, and records a row for each contender."""
    print(f"\n{backbone}, batch {batch}, {threads} threads, {len(seconds['int8'])} rounds")
    print(f"{'':14}{'ms':>10}{'lowest':>10}{'highest':>10}{'int8 is':>10}")
    for name, times in seconds.items():
        shown, times_int8 = summary(times), ratio(times, seconds["int8"])
        print(
            f"{name:14}{shown['milliseconds']:10.3f}{shown['lowest']:10.3f}{shown['highest']:10.3f}{times_int8:9.2f}x"
        )
        record(
            "int8",
            contender=name,
            backbone=backbone,
            height=IMAGE.shape[0],
            width=IMAGE.shape[1],
            batch=batch,
            threads=threads,
            **shown,
            int8_ratio=round(times_int8, 3),
            bytes=files[name].ByteSize() if name in files else None,
            onnxruntime=onnxruntime.__version__,
            capability=torch.backends.cpu.get_cpu_capability(),
        )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_int8_beside_float32(backbone: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as the command, for `make bench`."""
    model, files = contenders(backbone)
    for batch in BATCHES:
        for threads in THREADS:
            measured = measure(model, files, batch, threads, 7)
            with capsys.disabled():
                report(backbone, batch, threads, files, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for backbone in given.backbones:
        model, files = contenders(backbone)
        for batch in given.batches:
            for threads in given.threads:
                report(backbone, batch, threads, files, measure(model, files, batch, threads, given.rounds))


if __name__ == "__main__":
    main()
