"""How the losses' CUDA kernels reach memory: 16 bytes at a time on their main path, in the code that runs on a GPU.

nvcc may take a copy of 16 bytes apart into its elements, for which nothing in the source is to blame and which no
result shows: the bfloat16 gradient ran at a third of the bandwidth for it. The kernels' main paths are known by their
names and by their loops. Rows that begin inside a chunk, the label and what is one number a row go element by element,
outside those loops; kernels for operands that do not lie alike are of mode kAnywhere, or have the flag kWide at 0.

`HELD` and `EXEMPT` place every kernel of every library: one that is written tomorrow fails until it stands in either.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch  # noqa: F401 (facefast._C needs its libraries)

from facefast import _C
from tests.support import sass

built = pytest.mark.skipif(not _C.cuda, reason="built without CUDA; FACEFAST_CUDA=1, as .ci/run sets it, runs this")
IN_FLIGHT = 4  # chunks that a thread of the softmax kernels has on their way, csrc/loss/cuda_forward.cuh
# Modes 0 and 1 of the softmax kernels: as it lies, and with scaled columns. The third is kAnywhere.
STREAMING = r"\d(stats|gradient)_kernelI(?P<type>\w+?)Li(?P<group>\d+)ELNS_4ModeE(?P<mode>[01])E"
# A thread's share of a chunk of logits: how many loads of 16 bytes for the chunk and what goes with it.
ELEMENTWISE = r"\d(?P<kind>norm|add|project|sigmoid_forward|sigmoid_backward)_kernelI(?P<type>\w+?)Lb(?P<wide>[01])E"
# Batch normalisation, held to it by test_norm_machine_code.py.
NORM = r"\d(moments|norm_forward|norm_sums|norm_gradient)_kernelI"
HELD = {"softmax": STREAMING, "element-wise": ELEMENTWISE.replace("[01]", "1"), "normalisation": NORM}
"""Kernels whose main path moves 16 bytes at a time, which tests hold them to."""
EXEMPT = {
    r"\d(stats|gradient)_kernelI\w+?Li\d+ELNS_4ModeE2E": "kAnywhere: operands do not lie alike in their chunks",
    ELEMENTWISE.replace("[01]", "0"): "rows or operands that are not aligned",
    r"\dtarget_kernelI": "one logit a row, for margins that need the angle",
    r"\dloss_kernelI": "statistics and a loss, one of each a row",
    r"\drow_gradient_kernelI": "four numbers a row",
    r"\dzero_kernelI": "two numbers, for a matrix without rows",
    r"\dstatistics_kernelE": "a mean and a variance a channel",
    r"\dnorm_settle_kernelE": "gradients of weight, bias and slope, one of each a channel",
    r"\dFaceAugmentKernelI": "gathers bytes of uint8 pictures wherever a warp's pixels fall; writes one stretch a warp",
}
"""All others, and why: what they move is small, or lies where no chunk fits."""
TYPES = {"13__nv_bfloat16", "6__half", "f", "d"}


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    if sass.cuobjdump() is None:
        pytest.skip(
            "no cuobjdump: neither Triton's wheel, which comes with torch for CUDA, nor the CUDA toolkit is here"
        )
    return sass.kernels(Path(str(_C.__file__)))


def faults(kernel: sass.Kernel) -> list[str]:
    """What is wrong with the main path of a kernel that streams."""
    named = re.search(STREAMING, kernel.name)
    if named is None:
        return []
    backward = named[1] == "gradient"
    found = kernel.streaming("STG.E.128" if backward else "LDG.E.128.CONSTANT")
    if not found:
        return ["no loop reads (forward) or writes (backward) 16 bytes at a time"]
    wanted = [f"{one}" for one in found if one.loads or one.stores]
    wanted += [f"{one}: too few at a time" for one in found if one.wide_loads < IN_FLIGHT]
    wanted += [f"{one}: stores" for one in found if one.wide_stores != (IN_FLIGHT if backward else 0)]
    return wanted


def places(name: str) -> list[str]:
    """The entries of `HELD` and `EXEMPT` that a kernel's mangled name belongs to."""
    return [pattern for pattern in (*HELD.values(), *EXEMPT) if re.search(pattern, name)]


@built
def test_every_kernel_is_held_to_16_bytes_or_is_exempt_for_a_reason(kernels: list[sass.Kernel]) -> None:
    augment = sass.kernels(Path(str(_C.__file__)).parent / "_dali.so")
    found = {kernel.name: places(kernel.name) for kernel in (*kernels, *augment)}
    assert {name: where for name, where in found.items() if len(where) != 1} == {}, "place it in HELD or EXEMPT"
    assert {where[0] for where in found.values()} == {*HELD.values(), *EXEMPT}, "an entry for no kernel"


def test_a_kernel_that_nobody_has_placed_is_in_neither_list() -> None:
    namespace = "_ZN8facefast45_GLOBAL__N__5c677f88_12_norm_cuda_cu_7b3474a2"
    assert places("_ZN8facefast14renorm_kernelIfLb1EEEvPKT_") == []
    assert places(namespace + "13median_kernelIfEEvPKT_") == []
    assert places(namespace + "14moments_kernelIfEEvPKT_NS_4GridEPNS0_7MomentsE") == [NORM]
    assert places("_ZN8facefast11norm_kernelIfLb0EEEvPKT_ll") == [ELEMENTWISE.replace("[01]", "0")]


@built
def test_the_softmax_kernels_stream_whole_chunks(kernels: list[sass.Kernel]) -> None:
    named = [match for kernel in kernels if (match := re.search(STREAMING, kernel.name))]
    for kind in ("stats", "gradient"):
        seen = {(match["type"], match["mode"]) for match in named if match[1] == kind}
        assert seen == {(name, mode) for name in TYPES for mode in "01"} - {("d", "0")}
    assert {kernel.name + kernel.arch: faults(kernel) for kernel in kernels if faults(kernel)} == {}


@built
def test_the_elementwise_kernels_move_whole_chunks(kernels: list[sass.Kernel]) -> None:
    """All their accesses are of 16 bytes but for a norm a row, the rest of a length that is no multiple of a chunk, a
    class's weight, and sums of blocks."""
    found = [(match, kernel.accesses()) for kernel in kernels if (match := re.search(ELEMENTWISE, kernel.name))]
    wide = [(match["kind"], match["type"], one) for match, one in found if match["wide"] == "1"]
    assert {kind for kind, *_ in wide} == {"norm", "add", "project", "sigmoid_forward", "sigmoid_backward"}
    for kind, kinds_type, one in wide:
        per_chunk = 8 if "bfloat16" in kinds_type or "half" in kinds_type else 2 if kinds_type[0] == "d" else 4
        assert one.wide_loads >= 2 or kind == "norm" and one.wide_loads >= 1, (kind, kinds_type, one)
        if kind in ("norm", "add", "project"):
            assert one.loads <= (kind == "project"), (kind, kinds_type, one)
            assert one.stores <= (kind == "norm"), (kind, kinds_type, one)
        else:  # weights of a chunk's columns, a rest of one logit, target, weight and upstream gradient
            assert one.loads <= per_chunk + 6, (kind, kinds_type, one)
            assert one.wide_stores >= 1, (kind, kinds_type, one)
            assert one.stores <= (1 if kind == "sigmoid_backward" else 5), (kind, kinds_type, one)


SAMPLE = """
        code for sm_90
                Function : _ZN8facefast15gradient_kernelIfLi32ELNS_4ModeE0EEEvNS_3JobE
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;  /* 0x0 */
        /*0010*/              @!P1 LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0030*/                   LDG.E.128.STRONG.GPU R12, desc[UR4][R2.64] ;  /* 0x0 */
        /*0040*/                   LDG.E.128.STRONG.GPU R16, desc[UR4][R2.64] ;  /* 0x0 */
        /*0050*/                   STG.E.128.STRONG.GPU desc[UR4][R2.64], R4 ;  /* 0x0 */
        /*0060*/                   STG.E.128.STRONG.GPU desc[UR4][R2.64], R8 ;  /* 0x0 */
        /*0070*/                   STG.E.128.STRONG.GPU desc[UR4][R2.64], R12 ;  /* 0x0 */
        /*0080*/                   STG.E.128.STRONG.GPU desc[UR4][R2.64], R16 ;  /* 0x0 */
        /*0090*/               @P0 BRA 0x10 ;  /* 0x0 */
        /*00a0*/                   STG.E.U16 desc[UR4][R2.64], R1 ;  /* 0x0 */
        /*00b0*/                   EXIT ;  /* 0x0 */
"""


def test_a_loop_that_went_to_pieces_is_found() -> None:
    """The reader sees what it is there for, on code like a kernel's; outside the loop an element may go alone."""

    def found(text: str) -> list[str]:
        (kernel,) = sass.parse(text)
        assert kernel.arch == "sm_90"
        return faults(kernel)

    assert found(SAMPLE) == []
    assert "too few" in str(found(SAMPLE.replace("128.STRONG.GPU R8", "64.STRONG.GPU R8")))
    assert "stores=1" in str(
        found(SAMPLE.replace("STG.E.128.STRONG.GPU desc[UR4][R2.64], R8", "STG.E.U16 desc[UR4], R8"))
    )
    # An address of which the compiler does not know that it is global memory's.
    assert "stores=1" in str(
        found(SAMPLE.replace("STG.E.128.STRONG.GPU desc[UR4][R2.64], R8", "ST.E.U16 desc[UR4], R8"))
    )
    assert "no loop" in str(found(SAMPLE.replace("STG.E.128", "STG.E.64")))
    assert "no loop" in str(found(SAMPLE.replace("BRA 0x10", "BRA 0xb0")))
