"""Builds the CUDA back ends as host code (cuda_on_host.h), and stands it in for `facefast._C`.

`python tests/support/cuda_on_host.py LIBRARY PYTEST_ARGUMENTS...` runs tests in a process whose CPU kernels are the
CUDA ones; with `--digest` instead it prints a hash of a few losses and gradients, with `--launches` what is put on the
stream for one.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = (
    *(f"csrc/loss/{name}.cpp" for name in ("linear_focal", "ops", "products")),
    "csrc/norm/ops.cpp",
    "tests/support/cuda_on_host.cpp",
)
# Rows and classes, one for each number of threads a row; the last two are divided, in one bundle of rows and in two.
DIGESTED = ((70, 3), (9, 40), (5, 1000), (5, 3001), (3, 10177), (2, 30001), (40, 17001))
# Rows, classes and a margin's m1, 0 for no margin: heads of every number of threads a row, and one of divided rows.
# Where m1 is neither 0 nor 1 the margin needs the angle itself.
COUNTED = (
    (4096, 2, 0.0), (4096, 40, 0.0), (70, 257, 0.0), (9, 1000, 0.0), (9, 1000, 1.0), (64, 40, 1.05), (9, 1000, 1.35),
    (2, 30001, 0.0),
)  # fmt: skip
# What torch does on the host alone, or without a kernel: memory, and other views of it.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "as_strided", "alias", "expand"}
CUDA_SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())["_C"]["cuda"]


def build(folder: Path) -> Path:
    """A module with the operators of facefast._C whose kernels are the CUDA sources, run on the host."""
    import torch
    from torch.utils.cpp_extension import include_paths

    site = Path(sysconfig.get_paths()["purelib"])
    includes = [*include_paths(), site / "nvidia" / "cu13" / "include", ROOT / "csrc" / "loss"]
    includes.append(sysconfig.get_paths()["include"])
    flags = ["-O1", "-std=c++20", "-fPIC", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-fvisibility=hidden", "-w", *(f"-I{path}" for path in includes)]
    compiler = os.environ.get("CXX", "c++")
    jobs, objects = [], []
    for source in (*SOURCES, *CUDA_SOURCES):
        cuda = source in CUDA_SOURCES
        emulation = ["-include", str(HERE / "cuda_on_host.h"), "-x", "c++"] if cuda else []
        objects.append(folder / f"{source.replace('/', '_')}.o")
        command = [compiler, *flags, *emulation, "-c", str(ROOT / source), "-o", str(objects[-1])]
        jobs.append(subprocess.Popen(command))
    if any([job.wait() for job in jobs]):
        raise RuntimeError("the CUDA sources do not compile as host code")
    library = folder / "_C.abi3.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-shared", *map(str, objects), f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def stand_in(library: Path) -> None:
    """Makes `library` facefast._C in this process, before facefast is imported."""
    import torch  # noqa: F401 (the library needs its symbols)

    loader = importlib.machinery.ExtensionFileLoader("facefast._C", str(library))
    spec = importlib.util.spec_from_loader("facefast._C", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules["facefast._C"] = module


def digest(rows: int, classes: int) -> list[str]:
    """A hash of the mean loss and its gradient, with label smoothing and without, each held against the reference."""
    import torch

    from facefast.ops import focal_loss, reference
    from tests.support.derive import derive

    generator = torch.Generator().manual_seed(rows)
    x, y = torch.randn(rows, classes, generator=generator).bfloat16(), torch.arange(rows) % classes
    hashes = []
    for smoothing in (0.0, 0.1):
        loss, grad = derive(lambda leaf: focal_loss(leaf, y, label_smoothing=smoothing), x)  # noqa: B023
        truth = derive(lambda leaf: reference.focal_loss(leaf, y, label_smoothing=smoothing), x.double())  # noqa: B023
        torch.testing.assert_close(loss.double(), truth[0], rtol=1e-6, atol=0)
        # Where a class is as probable as smoothing wants it, its gradient is what two greater numbers leave.
        near = 1e-5 * truth[1].abs().amax().item()
        torch.testing.assert_close(grad.double(), truth[1], rtol=2**-7, atol=near)
        found = loss.numpy().tobytes() + grad.view(torch.int16).numpy().tobytes()
        hashes.append(hashlib.sha256(found).hexdigest())
    return hashes


def launches(library: Path, rows: int, classes: int, m1: float, dtype: str, reduction: str) -> dict[str, object]:
    """What a loss and its gradient put on the stream: numbers of our launches, and what torch computes beside them."""
    import torch

    from facefast.ops import Combined, focal_loss

    count = ctypes.CDLL(str(library)).facefast_launches
    count.restype = ctypes.c_int64
    cosines = torch.rand(rows, classes).to(getattr(torch, dtype)).requires_grad_()
    target = torch.arange(rows) % classes
    margin = Combined(m1, 0.3, 0.1) if m1 else None
    upstream = torch.ones((rows,) if reduction == "none" else ())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        before = count()
        loss = focal_loss(cosines, target, margin=margin, scale=8.0, reduction=reduction)
        forward = count() - before
        torch.autograd.grad(loss, cosines, upstream)
        backward = count() - before - forward
    beside = {event.name.removeprefix("aten::") for event in profile.events() if event.name.startswith("aten::")}
    shape = {"rows": rows, "classes": classes, "m1": m1, "dtype": dtype, "reduction": reduction}
    return {**shape, "forward": forward, "backward": backward, "beside": sorted(beside - NO_KERNEL)}


if __name__ == "__main__":
    import pytest

    sys.path.insert(0, str(ROOT))
    stand_in(Path(sys.argv[1]))
    if sys.argv[2:] == ["--digest"]:
        print(*(line for shape in DIGESTED for line in digest(*shape)), sep="\n")
        sys.exit()
    if sys.argv[2:] == ["--launches"]:
        kinds = [(dtype, reduction) for dtype in ("float32", "bfloat16", "float16") for reduction in ("none", "mean")]
        for case in COUNTED:
            print(*(json.dumps(launches(Path(sys.argv[1]), *case, *kind)) for kind in kinds), sep="\n")
        sys.exit()
    sys.exit(pytest.main(sys.argv[2:]))
