"""The losses on a GPU: the numbers of the CPU's, the current stream, CUDA graphs, and no waiting."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facefast.ops import AdaFace, Arc, Combined, Cos, backend, focal_loss, linear_focal_loss, sigmoid_focal_loss
from tests.support.derive import derive

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CLASSES = (1, 2, 7, 40, 1000, 1001, 3001, 10177, 70001)
# Of loss and gradient against the same numbers in float64 on the CPU.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11, torch.float16: 2**-10, torch.bfloat16: 2**-7}
HALF_A_UNIT = 2.0**-25  # of float16 below 2^-14, where its numbers lie 2^-24 apart
OPTIONS: dict[str, dict[str, Any]] = {
    "focal": {"gamma": 2.0},
    "cross entropy": {"gamma": 0.0},
    "root": {"gamma": 0.5, "reduction": "sum"},
    "smoothed": {"gamma": 1.5, "label_smoothing": 0.1},
    "cos": {"margin": Cos(0.3), "scale": 16.0, "reduction": "none"},
    "arc": {"margin": Arc(0.4), "scale": 16.0},
    "detached": {"margin": Arc(0.4, gradient="detached"), "scale": 16.0},
    "combined": {"margin": Combined(1.2, 0.3, 0.1), "scale": 16.0},
}


def matrix(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(classes)
    return (torch.rand(rows, classes, dtype=torch.float64, generator=generator) * 1.8 - 0.9).to(dtype)


def labels(rows: int, classes: int) -> Tensor:
    found = torch.arange(rows) * 7919 % classes
    found[rows // 2] = -100
    return found


def close(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float, terms: int = 0) -> None:
    """Within `tolerance` of each number, and of 0 within what the type cannot say: half a unit of float16's subnormal
    numbers, or the rounding of a sum of so many `terms` as great as the greatest number."""
    for ours, truth in zip(found, wanted, strict=True):
        floor = tolerance * 1e-3 + terms * torch.finfo(ours.dtype).eps / 2
        atol = max(floor * truth.abs().amax().item(), HALF_A_UNIT if ours.dtype == torch.float16 else 0.0)
        torch.testing.assert_close(ours.cpu().double(), truth.double(), rtol=tolerance, atol=atol)


def test_the_kernels_are_built_for_the_gpu() -> None:
    assert backend("cuda") == "native"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_the_gpu_computes_what_the_cpu_does(classes: int, dtype: torch.dtype, name: str) -> None:
    x, y = matrix(37, classes, dtype), labels(37, classes)
    truth = derive(lambda leaf: focal_loss(leaf, y, **OPTIONS[name]), x.double())
    found = derive(lambda leaf: focal_loss(leaf, y.cuda(), **OPTIONS[name]), x.cuda())
    close(found, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("classes", (7, 1001, 70001))
def test_weights_and_margins_by_row_and_class_agree_too(classes: int) -> None:
    x, y, norms = matrix(21, classes, torch.float32), labels(21, classes), torch.linspace(1, 90, 21)
    for alpha in (torch.rand(classes), torch.rand(21, 1)):
        truth = derive(
            lambda leaf: focal_loss(leaf, y, alpha=alpha, margin=AdaFace()(norms), scale=8.0, reduction="none"),  # noqa: B023
            x.double(),
        )
        found = derive(
            lambda leaf: focal_loss(
                leaf,
                y.cuda().int(),
                alpha=alpha.cuda(),  # noqa: B023
                margin=AdaFace().cuda()(norms.cuda()),
                scale=8.0,
                reduction="none",
            ),
            x.cuda(),
        )
        close(found, truth, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sigmoid_loss_agrees(dtype: torch.dtype) -> None:
    x, target = matrix(65, 40, dtype) * 8, torch.rand(65, 40).round(decimals=1)
    target[3, 4] = torch.nan
    every: list[dict[str, Any]]
    every = [{}, {"gamma": 0.5, "reduction": "none"}, {"alpha": torch.rand(40), "reduction": "sum"}]
    for options in every:
        there: dict[str, Any] = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
        truth = derive(lambda leaf: sigmoid_focal_loss(leaf, target, **options), x.double())  # noqa: B023
        found = derive(lambda leaf: sigmoid_focal_loss(leaf, target.cuda(), **there), x.cuda())  # noqa: B023
        close(found, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("normalize", (False, True))
@pytest.mark.parametrize("chunk", (0, 64, 999))
def test_the_linear_loss_agrees(chunk: int, normalize: bool, dtype: torch.dtype) -> None:
    x, weight, y = matrix(33, 64, dtype), matrix(1501, 64, dtype), labels(33, 1501)
    margin = Cos(0.2) if normalize else None
    options: dict[str, Any] = {"normalize": normalize, "margin": margin, "scale": 8.0, "chunk": chunk}
    truth = derive(lambda a, b: linear_focal_loss(a, b, y, **options), x.double(), weight.double())
    found = derive(lambda a, b: linear_focal_loss(a, b, y.cuda(), **options), x.cuda(), weight.cuda())
    # A gradient of W adds up 33 rows and loses what lies along W, a sum of 64; that of x adds up 1501 classes.
    close(found[1:2], truth[1:2], 2e-4 if dtype == torch.float32 else 1e-10, terms=1501 + 64)
    close(found[::2], truth[::2], 2e-4 if dtype == torch.float32 else 1e-10, terms=33 + 64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("classes", (3, 37, 1001, 20001))
def test_rows_may_start_anywhere(classes: int, dtype: torch.dtype) -> None:
    """CPU results do not change a bit; here a row's place decides how its sum is grouped."""
    plain, y = matrix(9, classes, dtype).cuda(), labels(9, classes).cuda()
    wanted = derive(lambda leaf: focal_loss(leaf, y), plain)
    for shift in range(1, 8):
        wide = torch.full((9, classes + 9), torch.nan, dtype=dtype, device="cuda")
        wide[:, shift : shift + classes] = plain
        leaf = wide[:, shift : shift + classes].detach().requires_grad_()
        loss = focal_loss(leaf, y)
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted[0], rtol=1e-6, atol=0)
        tolerance = max(1e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(leaf.grad, wanted[1], rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("rows", (0, 5))
def test_empty_and_all_ignored_batches_give_zero(rows: int) -> None:
    target = torch.full((rows,), -100, device="cuda")
    loss, grad = derive(lambda leaf: focal_loss(leaf, target), torch.randn(rows, 4, device="cuda"))
    assert loss == 0 and (grad == 0).all()


def test_more_than_two_to_the_31_numbers() -> None:
    rows, classes = 2200, 1_000_000
    x = torch.zeros(rows, classes, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 10.0
    y = torch.arange(rows, device="cuda") + classes - rows
    loss, grad = derive(lambda leaf: focal_loss(leaf, y, gamma=0.0, reduction="none"), x)
    torch.testing.assert_close(loss[0].item(), torch.tensor(float(classes)).log().item(), rtol=1e-5, atol=0)
    assert grad[-2, -2].item() == pytest.approx(-1, rel=4e-3)
    assert grad[-1, -1].item() == pytest.approx(-0.978, rel=4e-3)


@pytest.mark.parametrize("classes", (2, 40, 1000, 70001))
def test_results_repeat_bit_for_bit(classes: int) -> None:
    x, y = matrix(300, classes, torch.bfloat16).cuda(), labels(300, classes).cuda()
    first = derive(lambda leaf: focal_loss(leaf, y, label_smoothing=0.1), x)
    for _ in range(20):
        again = derive(lambda leaf: focal_loss(leaf, y, label_smoothing=0.1), x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---------------------------------------------------------------------------------------------
# Streams, graphs, waiting


def losses() -> dict[str, Callable[[Tensor], Tensor]]:
    y, weight = torch.arange(32, device="cuda"), torch.randn(50, 64, device="cuda")
    return {
        "focal": lambda x: focal_loss(x, y, margin=Arc(0.2), scale=4.0),
        "sigmoid": lambda x: sigmoid_focal_loss(x, (x.detach() > 0).float()),
        "linear": lambda x: linear_focal_loss(x, weight, y, normalize=True, chunk=16),
    }


@pytest.mark.parametrize("name", ("focal", "sigmoid", "linear"))
def test_a_step_never_waits_for_the_device(name: str) -> None:
    function, x = losses()[name], torch.randn(32, 64, device="cuda")
    derive(function, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leaf = x.requires_grad_()
        function(leaf).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ("focal", "sigmoid", "linear"))
def test_work_goes_to_the_current_stream(name: str) -> None:
    """extension-cpp's reduce-overhead test (pytorch #157363): a kernel on another stream would read too early."""
    function, stream = losses()[name], torch.cuda.Stream()
    wanted = derive(function, torch.full((32, 64), 0.5, device="cuda"))
    with torch.cuda.stream(stream):
        x = torch.zeros(32, 64, device="cuda")
        torch.cuda._sleep(50_000_000)
        x.fill_(0.5)
        found = derive(function, x)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ("focal", "sigmoid", "linear"))
def test_a_cuda_graph_replays_forward_and_backward(name: str) -> None:
    function = losses()[name]
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            x.grad = None
            function(x).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        loss = function(x)
        loss.backward()
    with torch.no_grad():
        x.copy_(torch.rand(32, 64, device="cuda"))
    graph.replay()
    wanted = derive(function, x.detach().clone())
    torch.testing.assert_close((loss.detach(), x.grad), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("classes", (40, 70001))
def test_a_graph_and_another_stream_count_their_blocks_apart(classes: int) -> None:
    """The last block of a launch is known by a count, which launches that run at the same time must not share."""
    inputs = [torch.randn(96, classes, device="cuda") for _ in range(3)]
    y, streams = torch.arange(96, device="cuda") % classes, [torch.cuda.Stream() for _ in range(2)]
    wanted = [focal_loss(x, y) for x in inputs]
    with torch.cuda.stream(streams[0]):
        for _ in range(3):
            focal_loss(inputs[0], y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0]):
        replayed = focal_loss(inputs[0], y)
    for _ in range(50):
        graph.replay()
        found = []
        for x, stream in zip(inputs[1:], streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(focal_loss(x, y))
        torch.cuda.synchronize()
        assert [value.item() for value in (replayed, *found)] == [value.item() for value in wanted]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's graph trees record one of themselves
def test_compiled_with_reduced_overhead_it_is_the_same() -> None:
    function, x = losses()["focal"], torch.randn(32, 64, device="cuda")
    compiled = torch.compile(lambda leaf: function(leaf * 2) + 1, mode="reduce-overhead", fullgraph=True)
    wanted = derive(lambda leaf: function(leaf * 2) + 1, x)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(derive(compiled, x), wanted)


# ---------------------------------------------------------------------------------------------
# What ends a CUDA context is tested in a process of its own.

WRONG = """
import torch
from facefast.ops import focal_loss, sigmoid_focal_loss
x = torch.randn(6, 5, device="cuda")
{call}
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("call", "words"),
    (
        ("focal_loss(x, torch.tensor([0, 1, 5, 2, 3, 4], device='cuda'))", "neither a class nor ignore_index"),
        ("focal_loss(x, torch.tensor([0, 1, -1, 2, 3, 4], device='cuda'))", "neither a class nor ignore_index"),
        ("sigmoid_focal_loss(x, x * 0 + 1.5)", "outside \\[0, 1\\]"),
    ),
)
def test_a_wrong_label_is_a_device_side_assertion(call: str, words: str) -> None:
    done = subprocess.run([sys.executable, "-c", WRONG.format(call=call)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert words.replace("\\", "") in done.stderr + done.stdout


def test_compute_sanitizer_finds_nothing() -> None:
    """Reads and writes outside a tensor, at lengths and alignments that leave every kind of rest."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    script = str(Path(__file__).parents[1] / "support" / "sanitized.py")
    done = subprocess.run([tool, "--error-exitcode", "9", sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
