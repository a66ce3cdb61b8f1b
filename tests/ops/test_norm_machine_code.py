"""The machine code of batch normalisation's CUDA kernels: what moves by the million moves 16 bytes at a time."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from facefast import _C
from tests.support import sass

pytestmark = pytest.mark.skipif(
    not _C.cuda, reason="built without CUDA; FACEFAST_CUDA=1, as .ci/run sets it, runs this"
)
# Loads and stores of whole chunks in the loop over rows: kAhead of them for each tensor, and one after the loop.
# The gradient's may be written once for both of its results.
LOADS = {"moments": 6, "norm_forward": 5, "norm_sums": 10, "norm_gradient": 10}
STORES = {"norm_forward": 5, "norm_gradient": 10}
ACCESS = re.compile(r"(LDG?|STG?|LDL|STL)(\.|$)")


@pytest.fixture(scope="module")
def accesses() -> dict[str, Counter[str]]:
    """Kernel -> how often each kind of access to memory stands in it, on the newest architecture built for."""
    # Architectures come in order: the newest one stays.
    newest = {kernel.name: kernel for kernel in sass.kernels(Path(str(_C.__file__)))}
    return {
        name: Counter(word for _, text in kernel.code if ACCESS.match(word := text.split()[0]))
        for name, kernel in newest.items()
        if re.search(r"moments_kernel|norm_(forward|sums|gradient)_", name)
    }


def wide(count: Counter[str], kind: str) -> int:
    return sum(number for name, number in count.items() if name.startswith(kind) and ".128" in name)


def test_every_value_is_loaded_and_stored_in_chunks_of_16_bytes(accesses: dict[str, Counter[str]]) -> None:
    assert len(accesses) == 3 + 3 * 5 + 3 * 4 + 3 * 4  # types times activations and residuals, or masks
    for name, count in accesses.items():
        kind = next(kind for kind in LOADS if f"{kind}_kernel" in name)
        assert wide(count, "LD") >= LOADS[kind], (name, count)
        assert wide(count, "ST") >= STORES.get(kind, 0), (name, count)
        assert not any(access.startswith(("LDL", "STL")) for access in count), (name, count)


def test_no_value_is_written_by_itself(accesses: dict[str, Counter[str]]) -> None:
    """Sums are few and may be; a result of the input's size may not. 16-bit values have no loads of their own size."""
    for name, count in accesses.items():
        assert not any(".U16" in access or ".U8" in access for access in count), (name, count)
        if "norm_forward" in name or "norm_gradient" in name:
            narrow = {access for access in count if access.startswith("ST") and ".128" not in access}
            assert not narrow, (name, count)
