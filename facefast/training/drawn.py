"""The classes that an update moves where it draws some of them (PartialFC, An et al. 2022, arXiv:2203.15565)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from facefast import ops
from facefast.data import Batch
from facefast.models.heads import CosineHead


class DrawnRows:
    """Puts the drawn classes' rows in the place of a head's weights and of their optimiser's state, for one update:
    gradients, norms and the optimiser then know of no others.

    Args:
        head: a `CosineHead` whose classes may lie on several ranks.
        optimizer: moves its weights.
        batches: this rank's of the update, whose classes are always among the drawn.
        part: of the other classes.
        key: what the draw follows from, with a class's number and nothing else.
    """

    def __init__(
        self, head: CosineHead, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], part: float, key: int
    ) -> None:
        self._head, self._optimizer, self._whole = head, optimizer, head.weight.data
        labels = ops.gather(torch.cat([batch.labels for batch in batches]))
        self._rows = head.draw(labels, part, key)
        self._states: dict[str, Tensor] = {}
        for name, value in self._slots().items():
            if value.shape == self._whole.shape:
                self._states[name] = value
                optimizer.state[head.weight][name] = value[self._rows]
        head.weight.data = self._whole[self._rows]

    def _slots(self) -> dict[str, Tensor]:
        slots = self._optimizer.state.get(self._head.weight, {})
        return {name: value for name, value in slots.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def put_back(self) -> None:
        """Ends the update: the rows, as they are now, among all others, which are as they were."""
        weight = self._head.weight
        for name, value in self._slots().items():
            if value.shape == weight.shape and value.dim():  # also what the optimiser's first step has made
                whole = self._states.get(name)
                whole = torch.zeros_like(self._whole, dtype=value.dtype) if whole is None else whole
                whole[self._rows] = value
                self._optimizer.state[weight][name] = whole
        self._whole[self._rows] = weight.data
        weight.data = self._whole
        self._head.drawn = None
