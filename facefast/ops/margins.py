"""Margins of face recognition: what is done to the cosine of a row's own class before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Gradient = Literal["exact", "detached"]

SIN_FLOOR = 1e-3
"""Least sine of the angle in the exact slope, which is infinite at |cos| = 1."""


class Terms(NamedTuple):
    """A margin in the one form that the kernels know: cos(m1 * angle + m2) - m3."""

    m1: float
    m2: float | Tensor
    m3: float | Tensor
    detached: bool


@dataclass(frozen=True)
class Cos:
    """CosFace (Wang et al. 2018): cos(angle) - m.

    Args:
        m: cosine units, one number or one per row [N].
    """

    m: float | Tensor

    def __post_init__(self) -> None:
        _check("Cos.m", self.m)

    def terms(self) -> Terms:
        """The margin as the kernels take it."""
        return Terms(1.0, 0.0, self.m, False)


@dataclass(frozen=True)
class Arc:
    """ArcFace (Deng et al. 2019): cos(angle + m); cos(angle) - m sin(m) once angle + m passes pi.

    Args:
        m: radians, one number or one per row [N].
        gradient: "exact" is the derivative, with the sine of the angle kept above 1e-3; "detached" treats the
            margin as a constant shift, which is what InsightFace trains with.
    """

    m: float | Tensor
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        _check("Arc.m", self.m)
        _check_gradient("Arc", self.gradient)

    def terms(self) -> Terms:
        """The margin as the kernels take it."""
        return Terms(1.0, self.m, 0.0, self.gradient == "detached")


@dataclass(frozen=True)
class Combined:
    """cos(m1 * angle + m2) - m3: SphereFace, ArcFace and CosFace in one (Deng et al. 2019, section 2.2).

    Args:
        m1: factor of the angle, at least 1.
        m2: radians, one number or one per row [N]; below 0 (AdaFace) the angle stops at 0.
        m3: cosine units, one number or one per row [N].
        gradient: as for `Arc`.
    """

    m1: float = 1.0
    m2: float | Tensor = 0.0
    m3: float | Tensor = 0.0
    gradient: Gradient = "exact"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.m1) and self.m1 >= 1):
            raise ValueError(f"Combined.m1 is {self.m1}; it must be a finite number of at least 1")
        _check("Combined.m2", self.m2)
        _check("Combined.m3", self.m3)
        _check_gradient("Combined", self.gradient)

    def terms(self) -> Terms:
        """The margin as the kernels take it."""
        return Terms(float(self.m1), self.m2, self.m3, self.gradient == "detached")


Margin = Cos | Arc | Combined


class AdaFace(nn.Module):
    """AdaFace's margin, set per row by the norm of its embedding (Kim et al. 2022, equations 18 and 19).

    Norms stand for picture quality: a high norm gets a cosine margin, a low one an angular margin. The running
    mean and deviation of the norms are buffers, so that they travel with a checkpoint; they move in training
    mode only.

    Args:
        m: size of the margin.
        h: how many deviations of the norm span the range of margins.
        momentum: part of the newest batch in the running statistics.

    Example:
        margin = adaface(embeddings.norm(dim=1)); loss = focal_loss(cosines, target, margin=margin, scale=64)
    """

    def __init__(self, m: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__()
        _check("AdaFace.m", m)
        if h <= 0 or not 0 < momentum <= 1:
            raise ValueError(f"AdaFace: h is {h} and momentum {momentum}; h must be above 0, momentum in (0, 1]")
        self.m, self.h, self.momentum = m, h, momentum
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    @torch.no_grad()
    def forward(self, norms: Tensor) -> Combined:  # [N]
        """The margins of rows whose embeddings have these norms [N].

        Raises:
            ValueError: norms are not [N], or on another device than the running statistics.
        """
        if norms.dim() != 1:
            raise ValueError(f"norms has shape {tuple(norms.shape)}; it must be [N], one norm per row")
        if norms.device != self.mean.device:
            raise ValueError(
                f"norms are on {norms.device} and AdaFace's running statistics on {self.mean.device}; "
                f"move the margin there once: margin.to({str(norms.device)!r})"
            )
        norms = norms.float().clamp(1e-3, 100)  # as the published code does
        if self.training and norms.shape[0] > 1:
            self.mean.lerp_(norms.mean(), self.momentum)
            self.std.lerp_(norms.std(), self.momentum)
        z = ((norms - self.mean) / (self.std + 1e-3) * self.h).clamp(-1, 1)
        return Combined(m1=1.0, m2=-self.m * z, m3=self.m + self.m * z)


def _check(name: str, m: Any) -> None:
    if isinstance(m, Tensor):
        if m.dim() > 1 or not m.is_floating_point():
            raise ValueError(
                f"{name} is a {m.dtype} tensor of shape {tuple(m.shape)}; it must be a number or floating point [N]"
            )
        if m.requires_grad:
            raise ValueError(f"{name} requires grad; margins get no gradient, pass {name}.detach()")
    elif not math.isfinite(m):
        raise ValueError(f"{name} is {m}; it must be finite")


def _check_gradient(name: str, gradient: str) -> None:
    if gradient not in ("exact", "detached"):
        raise ValueError(f"{name}.gradient is {gradient!r}; it must be 'exact' or 'detached'")
