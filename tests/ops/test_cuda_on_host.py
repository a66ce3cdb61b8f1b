"""The CUDA kernels without a GPU: their code run on the host, and what the compiler said of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from facefast import _C
from tests.support import cuda_on_host, ptxas

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")
THREADS, REGISTER_FILE = 256, 65536
# What runs with the CUDA code computing. The rest would take minutes, or differs on a GPU: there a wrong label is an
# assertion, the order of a sum depends on how a row lies in memory, and there are no threads to set.
CHOSEN = {
    "focal": "not every_option and not strides_and_alignment and not number_of_threads and not two_to_the_31",
    "focal_operator": "numerical_derivatives or upstream_gradients or loss_scale",
    "focal_peers": "not compiled",
    "cross_entropy_peers": "every_width or first_and_the_last",
    "sigmoid_focal": "exact or half or mask or infinite",
    "sharded_focal": "any_sizes and kernels or close_to_the_float64_truth or held_by_one_rank",
    "batch_norm_act": "every_type or running_statistics",
    "linear_focal": "float32_is_close or floor or own_upstream or chunks_wider or one_class",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """facefast._C with the CUDA kernels as its CPU kernels."""
    return cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"))


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, str(Path(cuda_on_host.__file__)), *arguments]
    done = subprocess.run(
        command, cwd=cuda_on_host.ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", CHOSEN)
def test_the_kernels_pass_the_operators_own_tests(name: str, library: Path) -> None:
    """60-digit arithmetic, derivatives, peers' cases."""
    printed = run(str(library), f"tests/ops/test_{name}.py", "-q", "-k", CHOSEN[name])
    passed = re.search(r"(\d+) passed", printed)
    assert passed and int(passed[1]) >= 20, printed


def test_no_result_depends_on_the_order_of_the_blocks(library: Path) -> None:
    """Short rows, rows of a block and rows divided among several blocks; no sum may wait for who comes first."""
    first, turned = (run(str(library), "--digest", **order) for order in ({}, {"FACEFAST_BLOCK_ORDER": "backwards"}))
    assert first == turned
    assert len(set(first.split())) == 2 * len(cuda_on_host.DIGESTED)


def test_a_loss_is_one_launch_and_its_gradient_another(library: Path) -> None:
    """Sums over the rows included, and nothing of torch's beside them; a margin that needs the angle is one more."""
    counted = [json.loads(line) for line in run(str(library), "--launches").splitlines()]
    assert len(counted) == 6 * len(cuda_on_host.COUNTED)
    for row in counted:
        wanted = 1 if row["m1"] in (0, 1) else 2
        assert (row["forward"], row["backward"], row["beside"]) == (wanted, wanted, []), row


@pytest.mark.skipif(not _C.cuda, reason="built without CUDA; FACEFAST_CUDA=1, as .ci/run sets it, runs this")
def test_every_kernel_fits_its_registers_on_every_architecture() -> None:
    """No spills, and as many blocks on a multiprocessor as its kernel asks for."""
    kernels = [kernel for source in cuda_on_host.CUDA_SOURCES for kernel in ptxas.kernels(source)]
    for arch in ARCHS:
        names = {kernel.name for kernel in kernels if kernel.arch == arch}
        for kind in (
            "stats_kernel",
            "gradient_kernel",
            "loss_kernel",
            "sigmoid_forward_kernel",
            "norm_kernel",
            "moments_kernel",
        ):
            assert any(kind in name for name in names), (arch, kind)
    assert [kernel for kernel in kernels if kernel.spills] == []
    # Blocks of 256 threads of the streaming kernels, whose mode, the last number of their names, is kPlain.
    for name, arch, registers, *_ in kernels:
        plain = "ModeE0E" in name
        forward = 4 if "Li256E" in name else 5
        blocks = forward if plain and "stats_kernel" in name else 3 if plain else 2
        assert registers * THREADS * blocks <= REGISTER_FILE, (name, arch, registers)


@pytest.mark.skipif(not _C.cuda, reason="built without CUDA; FACEFAST_CUDA=1, as .ci/run sets it, runs this")
def test_the_operators_are_registered_for_cuda_as_well() -> None:
    for name in ("focal", "sigmoid_focal", "linear_focal"):
        for way in ("forward", "backward"):
            assert "\nCUDA: registered" in torch._C._dispatch_dump(f"facefast::{name}_{way}")
    for part in ("statistics", "losses", "backward"):
        assert "\nCUDA: registered" in torch._C._dispatch_dump(f"facefast::block_{part}")
    for name in ("batch_statistics", "normalise_forward", "normalise_backward"):
        assert "\nCUDA: registered" in torch._C._dispatch_dump(f"facefast::{name}")
