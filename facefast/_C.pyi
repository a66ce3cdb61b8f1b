"""The loss kernels (csrc/loss/ops.cpp). Loading the module registers its operators with torch: they are in
`torch.ops.facefast`, with the schemas written there, and the module itself holds two facts."""

from typing import Literal

cuda: Literal[0, 1]
"""1 where the CUDA kernels are built in; the CPU's always are."""
version: int
"""Raised with every change of a schema; FACEFAST_KERNEL_VERSION in csrc/loss/tensors.h."""
