"""Whether an int8 model is near enough to the one it was made from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from facefast.data import PairSet
from facefast.evaluation.measure import verification

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """What an int8 model is worth beside its float32 parent."""

    cosine_mean: float
    cosine_p01: float
    """First percentile over the photographs."""
    photographs: int
    verification_before: dict[str, float] | None
    """As `measure.verification` gives it, of embeddings without mirror images; None without pairs."""
    verification_after: dict[str, float] | None

    @property
    def loss(self) -> float | None:
        """Lost verification accuracy, in parts of 1; None without pairs."""
        if self.verification_before is None or self.verification_after is None:
            return None
        return self.verification_before["verification_accuracy"] - self.verification_after["verification_accuracy"]

    def check(self, min_cosine: float, max_loss: float, other: str) -> None:
        """Lets a model pass that is near enough to the `other` one.

        Raises:
            ValueError: it is worse than allowed.
        """
        if not self.cosine_mean >= min_cosine:
            raise ValueError(
                f"the int8 model gives other embeddings than {other}: mean cosine {self.cosine_mean:.4f} (1st "
                f"percentile {self.cosine_p01:.4f}) on {self.photographs} photographs, at least {min_cosine} is asked "
                "for; nothing was written. Calibrate on more photographs of the kind that the model will see "
                "(--photographs), or lower --min-cosine"
            )
        if self.loss is not None and not self.loss <= max_loss:
            assert self.verification_before is not None and self.verification_after is not None
            raise ValueError(
                f"the int8 model verifies worse than {other}: accuracy "
                f"{self.verification_after['verification_accuracy']:.4f} after "
                f"{self.verification_before['verification_accuracy']:.4f} on {self.verification_after['pairs']} pairs, "
                f"a loss of at most {max_loss} is allowed; nothing was written. Calibrate on more photographs "
                "(--photographs), or raise --max-loss"
            )


def compare(
    before: Any,
    after: Any,
    pictures: Iterator[tuple[Array, Tensor]],
    number: int,
    pairs: PairSet | None,
) -> Gate:
    """Holds two sessions against each other on pictures that are read once.

    Args:
        before, after: ONNX Runtime sessions from `images` to embeddings of length 1.
        pictures: [B, 3, H, W] as both models take them, and their rows [B].
        number: rows of their index.
        pairs: of rows of their index; None leaves verification out.
    """
    found: list[Tensor] = []
    seen = torch.zeros(number, dtype=torch.bool)
    for images, rows in pictures:
        for place, session in enumerate((before, after)):
            embeddings = torch.from_numpy(session.run(None, {"images": images})[0])
            if len(found) == place:
                found.append(torch.zeros(number, embeddings.shape[1]))
            found[place][rows] = embeddings
        seen[rows] = True
    cosines = (found[0][seen] * found[1][seen]).sum(1).numpy()
    results = [None, None] if pairs is None else [verification(embeddings, seen, pairs) for embeddings in found]
    return Gate(float(cosines.mean()), float(np.percentile(cosines, 1)), len(cosines), results[0], results[1])


def seconds_per_picture(runs: dict[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Medians over rounds in which every contender runs once, so that a busy machine is slow for all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):  # the first two warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number > 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}
