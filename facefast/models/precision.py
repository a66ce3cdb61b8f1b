"""The number format of a model's arithmetic, and the memory format that goes with it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from facefast.models.backbones import DEPTHWISE
from facefast.runtime.process import cpu_has_bf16

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision(NamedTuple):
    """What "auto" comes to on this machine."""

    name: str
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def choose(cls, name: str, backbone: str, channels_last: bool, device: torch.device) -> Precision:
        """A recipe's precision and memory format, with "auto" being the fast one.

        Args:
            name: auto, bf16, fp16 or fp32.
            backbone: what the model really is; "auto" has been settled by now.
            channels_last: memory format of pictures and convolutions.
            device: where the model runs.
        """
        if name == "auto":
            # On a CPU bfloat16 doubles a ResNet's speed, but depthwise convolutions lose a fifth to it.
            cpu_gains = cpu_has_bf16() and backbone not in DEPTHWISE
            name = "bf16" if device.type == "cuda" or cpu_gains else "fp32"
        return cls(name, DTYPES[name], channels_last)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context for a forward pass."""
        return torch.autocast(device.type, self.dtype, enabled=self.name != "fp32")
